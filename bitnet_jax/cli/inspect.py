"""What do a model's weights and predictions look like? Tensors, tokens, and the course of its run.

What is wrong stands first. A model of a run is looked at on the run's own held-out text unless
--text gives another; a folder of transformers has none, and without text the weights stand alone.

    bitnet inspect runs/train-1a2b3c4d
    bitnet inspect runs/train-1a2b3c4d@500:1
    bitnet inspect my-bitnet --text 'mine/*.txt'
"""

from pathlib import Path

from bitnet_jax.cli import flags


def main(argv: list[str]) -> None:
    parser = flags.Parser("bitnet inspect", __doc__)
    flags.add_source(parser)
    flags.add_text(parser)
    args = parser.parse_args(argv)

    from bitnet_jax import inspection
    from bitnet_jax.terminal import printable

    flags.prepare()
    inspected = inspection.inspect(args.source, args.text, evaluations(args.source))
    print(printable("\n".join(inspection.terminal_lines(inspected))))


def evaluations(source: str) -> list[dict]:
    """The evaluations of a run's replicate up to the step of SOURCE; none of a folder alone."""
    from bitnet_jax import restore

    if restore.is_hf_folder(Path(source)):
        return []
    workdir, step, index = restore.checkpoint_place(source)
    return restore.evaluations(workdir, step, index or 0)
