"""What is wrong with a model? Tests of its weights, text and optimiser, and the causes they name.

A model of a run is tested with its optimiser and its start, a folder of transformers on a text.
Then come the causes that the numbers support, the most likely first, with their evidence, and what
to do about the first. The exit status is 1 when there is one.

    bitnet triage runs/train-1a2b3c4d
    bitnet triage runs/train-1a2b3c4d@500:1
    bitnet triage my-bitnet --text 'mine/*.txt'
"""

from bitnet_jax.cli import flags


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet triage", __doc__)
    flags.add_source(parser)
    flags.add_text(parser)
    parser.add_argument(
        "--exit-zero", action="store_true", help="exit 0 when a cause is found, too"
    )
    args = parser.parse_args(argv)

    from bitnet_jax import audit, causes
    from bitnet_jax.terminal import printable

    flags.prepare()
    found = audit.examine(args.source, args.text)
    print(printable(f"{args.source} ({found['name']} seed {found['seed']}, step {found['step']})"))
    print("\n".join(audit.lines(found["measured"], found["left_out"])))
    findings = causes.rank(found["measured"])
    print("\n" + printable("\n".join(causes.render(found["measured"], findings))))
    return 1 if findings and not args.exit_zero else 0
