"""Do quantisers, model, loss and optimiser do what they should? Tests before training.

Every recipe of the run that the same flags of `bitnet train` would start is tested on its first
seed. Each test prints what it measured, and beside it what sound code gives where that differs;
nothing is trained but single steps. The exit status is 1 when a test fails: with the recipe
`coupled` one does, since its weight decay goes through Adam.

    bitnet check --set run.recipes=decoupled
    bitnet check --preset report --set data.corpus='text:mine/*.txt' --set data.tokenizer=bpe:4096
"""

from bitnet_jax.cli import flags


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet check", __doc__)
    flags.add_configuration(parser)
    args = parser.parse_args(argv)
    request = flags.resolve(args, "check")

    from bitnet_jax import checks

    flags.prepare()
    all_passed = True
    for rep in {rep.name: rep for rep in reversed(request.replicates)}.values():
        print(f"{rep.name} seed {rep.seed}:", flush=True)
        results = checks.examine(request.cfg, rep)
        print("\n".join(checks.terminal_lines(results)), flush=True)
        all_passed &= all(outcome.passed for _, outcome in results)
    return 0 if all_passed else 1
