"""Say before training whether weight decay inside Adam will collapse a language model.

Of one of our runs (--preset, --config, --set), or of any framework's, by flags from --optimizer on.
Token frequencies come from --counts (as `bitnet triage --log` reads them), from --text (with the
tokenizer of the configuration), or from the configuration's own corpus. Nothing is trained; it
takes seconds.

    bitnet predict --preset report --text 'books/*.txt' --set data.tokenizer=bpe:4096
    bitnet predict --optimizer adam --weight-decay 0.01 --lr 1e-3 --steps 2000 --warmup 100 \\
        --schedule cosine --width 256 --layers 4 --tokens-per-batch 4096 --counts counts.txt
"""

from pathlib import Path

from bitnet_jax.cli import flags

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "two-stage")
DECAYED = ("all", "matrices", "no-norms")
SETTING = (  # flags of `add_setting`, but --lr-file
    *("weight_decay", "decay_on", "lr", "warmup", "schedule", "steps", "betas", "eps", "clip"),
    *("tokens_per_batch", "init", "tied", "ternary", "width", "layers", "ff"),
)


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet predict", __doc__)
    flags.add_configuration(parser)
    add = parser.add_argument
    add("--text", metavar="GLOB", help="files whose token frequencies count")
    add("--counts", type=Path, metavar="FILE", help="counts of the vocabulary's tokens "
        "in the training text: .npy, JSON, or one a line")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, help="of another framework's run: where the decay acts, "
        "inside Adam, or AdamW; the flags below say the rest")  # fmt: skip
    add_setting(add)
    args = parser.parse_args(argv)
    request = flags.resolve(args, "predict")

    from bitnet_jax import elsewhere, forecast

    values = {"optimizer": args.optimizer} | given(args)
    if args.optimizer:
        elsewhere.check(values, args.lr_file is not None)
    elif named := [*given(args), *["lr_file"] * (args.lr_file is not None)]:
        parser.error(f"{elsewhere.flag(named[0])} is of another framework's run: add --optimizer")

    flags.prepare()
    text = frequencies(args, request.cfg)
    if args.optimizer:
        points = points_of(args.lr_file) if args.lr_file else ()
        settings = {"this setting": elsewhere.setting_of(values, *text, points)}
    else:
        settings = {
            rep.name: forecast.of_run(request.cfg, rep.hyper, *text) for rep in request.replicates
        }
    for name, (setting, decay) in settings.items():
        print("\n".join([f"{name}:", *forecast.terminal_lines(forecast.forecast(setting, decay))]))
    return 0


def add_setting(add) -> None:
    """The flags of another framework's run but --optimizer; what is not given is None."""
    add("--weight-decay", type=float, metavar="X", help="(default: 0.1)")
    add("--decay-on", choices=DECAYED, help="parameters that decay (default: all)")
    add("--lr", type=float, help="peak of the learning rate")
    add("--warmup", type=int, metavar="STEPS", help="(default: 0)")
    add("--schedule", choices=SCHEDULES, help="after the warm-up (default: constant)")
    add("--lr-file", type=Path, help="instead of --lr and --schedule: lines STEP,LR")
    add("--steps", type=int, help="updates of the whole run")
    add("--betas", metavar="B1,B2", help="(default: 0.9,0.999)")
    add("--eps", type=float, help="(default: 1e-8)")
    add("--clip", type=float, help="norm that gradients are clipped to")
    add("--tokens-per-batch", type=int, help="of one update")
    add("--init", metavar="KIND:SIZE", help="of the output matrix: uniform:BOUND (default: "
        "1 / sqrt(width)) or normal:DEVIATION")  # fmt: skip
    add("--tied", action="store_true", default=None, help="the embedding is the output matrix")
    add("--ternary", action="store_true", default=None,
        help="matrices are ternary, as in BitNet b1.58")  # fmt: skip
    add("--width", type=int, help="of the residual stream")
    add("--layers", type=int, help="(default: 4)")
    add("--ff", type=int, help="width of the feed-forward layer (default: 4 x width)")


def given(args) -> dict:
    """Values of the flags of `add_setting` that were given."""
    return {name: value for name in SETTING if (value := getattr(args, name)) is not None}


def frequencies(args, cfg):
    """Token frequencies [V] of the counts, the text or the configuration's corpus, and the strength
    of its context, that of English where counts are all there is; raises UserError."""
    from dataclasses import replace

    from bitnet_jax import data, forecast, reference, shrink

    if args.counts:
        return reference.smoothed(reference.read_counts(args.counts)), shrink.Setting.context
    if args.text:
        cfg = replace(cfg, data=replace(cfg.data, corpus=f"text:{args.text}", validation=None))
    tokens = data.load(cfg.data)
    return forecast.frequencies(tokens.train_N, tokens.tokenizer.vocab_size)


def points_of(path: Path) -> list[tuple[float, float]]:
    """(step, rate) of every line STEP,LR; raises UserError."""
    from bitnet_jax import elsewhere
    from bitnet_jax.fields import UserError, shown

    try:
        rows = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--lr-file {path}: {error.strerror}") from error
    return [
        elsewhere.pair(line, f"--lr-file {path}: {shown(line)!r}") for line in rows if line.strip()
    ]
