"""Train replicates side by side, and write a page of what happened.

The default trains two BitNets in one program on the text of this interpreter's standard library:
one whose weight decay is coupled into Adam, one with the published recipe. At the end stand a line
per replicate with its verdict, and the page, report.html in the workdir.

    bitnet train
    bitnet train --set data.corpus=text:mine/*.txt --set run.steps=2000 --seeds 0-2
    bitnet train --preset 125m --dry-run
    bitnet train --config runs/first/config.json --set run.recipes=decoupled --workdir runs/second
"""

import json

from bitnet_jax.cli import flags

PLACE = "runs/train-HASH of the settings"


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet train", __doc__)
    flags.add_run(parser, place=PLACE)
    parser.add_argument(
        "--stop-when",
        choices=("collapsed",),
        help="end early, and saved, once all replicates have collapsed",
    )
    args = parser.parse_args(argv)
    request = flags.resolve(args, "train")
    if request.dry_run:
        print("\n".join(describe(request)))
        return 0

    from bitnet_jax import run

    flags.prepare()
    try:
        summary = run.run(
            request.cfg,
            request.replicates,
            request.workdir,
            resume=request.resume,
            stop_when_collapsed=args.stop_when == "collapsed",
        )
    except run.Interrupted as error:
        command = f"bitnet train {_arguments(argv)} --resume --workdir {request.workdir}"
        raise run.Interrupted(f"{error}; go on with: {command}", error.signum) from None
    return tell(request, summary)


def _arguments(argv: list[str]) -> str:
    """The arguments of this start without those that say how to go on."""
    import shlex

    kept = [text for text in argv if text != "--resume"]
    if "--workdir" in kept:
        i = kept.index("--workdir")
        kept[i : i + 2] = []
    return shlex.join(text for text in kept if not text.startswith("--workdir="))


def tell(request: flags.Request, summary: dict) -> int:
    """Print how each replicate ended and where the page is; 1 when one failed."""
    from bitnet_jax import checkpoint
    from bitnet_jax.recorder import failure_text

    if request.verbose:
        table = json.loads((request.workdir / "config.json").read_text())["decay_table"]
        print("\n".join(table))
    if not summary["finished"]:
        print(f"stopped at step {summary['step']} and saved: all replicates have collapsed")
    for entry in summary["replicates"]:
        loss, unigram = entry["held_out"]["loss"], entry["held_out"]["unigram"]
        held_out = "nan" if loss is None else f"{loss:.3f}"
        print(
            f"{entry['name']} seed {entry['seed']}: {entry['verdict']}, held-out {held_out} "
            f"(unigram {unigram:.3f})"
        )
    kept = checkpoint.kept_steps(request.workdir)
    for i, entry in enumerate(summary["replicates"]):
        if failure := entry["failed"]:
            good = [step for step in kept if step < failure["step"]]
            place = f"last good checkpoint: {request.workdir}@{good[-1]}:{i}" if good else ""
            text = f"{entry['name']} seed {entry['seed']}: {failure_text(failure)}"
            flags.fail(f"failed: {text}; {place or 'no checkpoint before'}", 1)
    print(f"page: {request.workdir / 'report.html'}")
    return 1 if any(entry["failed"] for entry in summary["replicates"]) else 0


def describe(request: flags.Request) -> list[str]:
    """What would be trained: every field, parameters, steps, tokens and memory."""
    import jax

    from bitnet_jax import checkpoint, plan, shapes
    from bitnet_jax.config import HYPER_FIELDS

    cfg, replicates = request.cfg, request.replicates
    text_lines = [
        f"{section}.{name}={flags.as_text(value)}"
        for section in flags.SECTIONS
        for name, value in vars(getattr(cfg, section)).items()
    ]
    for rep in replicates:
        numbers = " ".join(f"{name}={getattr(rep.hyper, name):g}" for name in HYPER_FIELDS)
        text_lines.append(f"{rep.name} seed {rep.seed}: {numbers}")
    vocab, said = shapes.vocabulary(cfg)
    mesh = shapes.abstract_mesh(cfg, len(replicates), n_devices=1)
    program = shapes.abstract_program(cfg, replicates, mesh, "cpu")
    state = program.abstract_state
    n_params = sum(x.size for x in jax.tree.leaves(state.params)) // len(replicates)
    size, n_kept = shapes.size_of(state), len(checkpoint.steps_at_end(cfg.run))
    per_step = cfg.data.batch_size * cfg.data.seq_len
    many = f", {len(replicates)} replicates" if len(replicates) > 1 else ""
    return [
        *text_lines,
        "",
        f"vocabulary: {vocab:,} tokens{said}",
        f"parameters: {n_params:,}{many}",
        f"steps: {cfg.run.steps:,}, the second stage from {cfg.run.boundary + 1:,} on",
        f"tokens: {per_step:,} a step, {per_step * cfg.run.steps:,} in all, per replicate",
        f"memory: about {plan.estimate(program, state).used / 1e9:.3g} GB on one device, besides "
        "the corpus; bitnet plan tells of more devices",
        f"checkpoints: {size / 1e9:.3g} GB each, {n_kept} at the end: {n_kept * size / 1e9:.3g} GB",
        f"workdir: {request.workdir}",
    ]
