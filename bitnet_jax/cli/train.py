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
    from bitnet_jax.config import HYPER_FIELDS

    cfg, replicates = request.cfg, request.replicates
    lines = [
        f"{section}.{name}={flags.as_text(value)}"
        for section in flags.SECTIONS
        for name, value in vars(getattr(cfg, section)).items()
    ]
    for rep in replicates:
        numbers = " ".join(f"{name}={getattr(rep.hyper, name):g}" for name in HYPER_FIELDS)
        lines.append(f"{rep.name} seed {rep.seed}: {numbers}")
    vocab, said = vocabulary(cfg)
    n_params, n_bytes = sizes(cfg, replicates[0], vocab)
    per_step = cfg.data.batch_size * cfg.data.seq_len
    many = f", {len(replicates)} replicates" if len(replicates) > 1 else ""
    return [
        *lines,
        "",
        f"vocabulary: {vocab:,} tokens{said}",
        f"parameters: {n_params:,}{many}",
        f"steps: {cfg.run.steps:,}, the second stage from {cfg.run.boundary + 1:,} on",
        f"tokens: {per_step:,} a step, {per_step * cfg.run.steps:,} in all, per replicate",
        f"memory: about {len(replicates) * n_bytes / 1e9:.3g} GB, besides the corpus",
        f"workdir: {request.workdir}",
    ]


def vocabulary(cfg) -> tuple[int, str]:
    """Size of the vocabulary, without a look at the corpus, and where it is from."""
    kind, _, argument = cfg.data.tokenizer.partition(":")
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size, ""
    if kind == "bpe":
        return int(argument), " (fewer on a small corpus)"
    if kind == "hf":
        from pathlib import Path

        from bitnet_jax import tokenizer

        return tokenizer.load_folder(Path(argument)).vocab_size, ""
    return 50257, ""


def sizes(cfg, replicate, vocab: int) -> tuple[int, int]:
    """Parameters of one replicate, and roughly the bytes it needs in training.

    In float32 weights, gradient, two moments and the update; a block of the logits and its
    gradient; of each layer what the backward pass keeps, in the compute type. At 125m and 32 x 1024
    tokens it says 7.2 GiB, where XLA needs 8.4 on one TPU v5e.
    """
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from bitnet_jax import loss, train

    model, data = cfg.model, cfg.data
    positions = data.batch_size // data.accumulate * data.seq_len  # at once
    cfg = replace(cfg, model=replace(model, vocab_size=vocab))
    params = jax.eval_shape(lambda: train.init_state(cfg, replicate.hyper, 0)).params
    n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    width = 12 * model.d_model + 6 * model.d_ff + 2 * model.n_heads * data.seq_len
    kept = width + model.n_layers * model.d_model if model.remat else model.n_layers * width
    kept = kept * jnp.dtype(model.dtype).itemsize + 6 * min(vocab, loss.NARROWEST)
    return n_params, 20 * n_params + positions * kept
