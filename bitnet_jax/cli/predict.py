"""Say before training whether weight decay inside Adam will collapse a language model.

Of one of our runs (--preset, --config, --set), or of any framework's, by flags from --optimizer on.
Token frequencies come from --counts (as `bitnet triage --log` reads them), from --text (with the
tokenizer of the configuration), or from the configuration's own corpus. Nothing is trained; it
takes seconds.

    bitnet predict --preset report --text 'books/*.txt' --set data.tokenizer=bpe:4096
    bitnet predict --optimizer adam --weight-decay 0.01 --lr 1e-3 --steps 2000 --warmup 100 \\
        --schedule cosine --width 256 --layers 4 --tokens-per-batch 4096 --counts counts.txt
"""

import math
from pathlib import Path

from bitnet_jax.cli import flags

NEEDED = ("lr", "steps", "width", "tokens_per_batch")  # of another framework's run
OPTIMIZERS, DECAYED = ("adam", "adamw"), ("all", "matrices", "no-norms")


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet predict", __doc__)
    flags.add_configuration(parser)
    add = parser.add_argument
    add("--text", metavar="GLOB", help="files whose token frequencies count")
    add("--counts", type=Path, metavar="FILE", help="counts of the vocabulary's tokens "
        "in the training text: .npy, JSON, or one a line")  # fmt: skip
    _add_setting(add)
    args = parser.parse_args(argv)
    request = flags.resolve(args, "predict")
    if args.optimizer:
        check_setting(args)

    from bitnet_jax import forecast

    flags.prepare()
    text = frequencies(args, request.cfg)
    if args.optimizer:
        found = {"this setting": setting_of(args, *text)}
    else:
        found = {
            rep.name: forecast.of_run(request.cfg, rep.hyper, *text) for rep in request.replicates
        }
    for name, (setting, decay) in found.items():
        print("\n".join([f"{name}:", *forecast.lines(forecast.forecast(setting, decay))]))
    return 0


def _add_setting(add) -> None:
    """The flags of another framework's run; --optimizer says that they are meant."""
    add("--optimizer", choices=OPTIMIZERS, help="where the decay acts: inside Adam, or AdamW")
    add("--weight-decay", type=float, default=0.1, help="(default: 0.1)")
    add("--decay-on", choices=DECAYED, default="all", help="parameters that decay (default: all)")
    add("--lr", type=float, help="peak of the learning rate")
    add("--warmup", type=int, default=0, metavar="STEPS", help="(default: 0)")
    add("--schedule", default="constant", help="constant | linear | cosine | two-stage")
    add("--lr-file", type=Path, help="instead of --lr and --schedule: lines STEP,LR")
    add("--steps", type=int, help="updates of the whole run")
    add("--betas", default="0.9,0.999", metavar="B1,B2", help="(default: 0.9,0.999)")
    add("--eps", type=float, default=1e-8, help="(default: 1e-8)")
    add("--clip", type=float, default=math.inf, help="norm that gradients are clipped to")
    add("--tokens-per-batch", type=int, help="of one update")
    add("--init", metavar="KIND:SIZE", help="of the output matrix: uniform:BOUND (default: "
        "1 / sqrt(width)) or normal:DEVIATION")  # fmt: skip
    add("--tied", action="store_true", help="the embedding is the output matrix")
    add("--ternary", action="store_true", help="matrices are ternary, as in BitNet b1.58")
    add("--width", type=int, help="of the residual stream")
    add("--layers", type=int, default=4, help="(default: 4)")
    add("--ff", type=int, help="width of the feed-forward layer (default: 4 x width)")


def check_setting(args) -> None:
    """Raise UserError for what is missing or makes no run."""
    from bitnet_jax.config import UserError

    for name in NEEDED:
        if getattr(args, name) is None and not (name == "lr" and args.lr_file):
            raise UserError(f"--{name.replace('_', '-')} is missing: --optimizer needs it")
    for name in ("lr", "weight_decay", "eps", "clip"):
        value = getattr(args, name)
        if value is not None and (math.isnan(value) or value < 0 or (name == "clip" and not value)):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be positive")
    for name in ("steps", "width", "tokens_per_batch", "layers", "ff"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie in 1 .. {2**31 - 1}")
    if not 0 <= args.warmup <= args.steps:
        raise UserError(f"--warmup {args.warmup}: must lie in 0 .. --steps ({args.steps})")


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


def setting_of(args, probs_V, context: float):
    """The setting that the flags describe, and its decay inside Adam; raises UserError."""
    import numpy as np

    from bitnet_jax import forecast, shrink

    width, all_, steps = args.width, args.decay_on == "all", args.steps
    if args.lr_file:
        rates_T = forecast.rates_through(points_of(args.lr_file), steps)
    else:
        rates_T = forecast.rates(args.schedule, args.lr, args.warmup, steps)
    beta1, beta2 = _pair(args.betas)
    uniform, size = _init(args.init or f"uniform:{width**-0.5}")
    fan_in, fan_out = forecast.fans(width, args.layers, args.ff or 4 * width)
    rest = float(args.decay_on != "matrices")
    # torch's defaults: an embedding of N(0, 1), matrices that keep a third of a variance of 1.
    stream = math.sqrt((size**2 if args.tied else 1) + args.layers * 2 / 3)
    setting = shrink.Setting(
        probs_V, rates_T, np.ones(steps), width, args.tokens_per_batch, fan_in, fan_out, size,
        uniform, context=context, stream=stream, ternary=args.ternary, beta1=beta1,
        beta2=beta2, eps=args.eps, clip=args.clip, decay_head=rest, decay_norm=float(all_),
        decay_embedding=rest,
    )  # fmt: skip
    return setting, args.weight_decay if args.optimizer == "adam" else 0.0


def points_of(path: Path) -> list[tuple[float, float]]:
    """(step, rate) of every line STEP,LR; raises UserError."""
    from bitnet_jax.config import UserError, shown

    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--lr-file {path}: {error.strerror}") from error
    return [_pair(line, f"--lr-file {path}: {shown(line)!r}") for line in lines if line.strip()]


def _pair(text: str, what: str | None = None) -> tuple[float, float]:
    from bitnet_jax.config import UserError

    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = math.nan
    limit = math.inf if what else 1
    if not (0 <= first < math.inf and 0 <= second < limit and first < limit):
        raise UserError(f"{what or f'--betas {text}'}: use two numbers FIRST,SECOND")
    return first, second


def _init(text: str) -> tuple[bool, float]:
    from bitnet_jax.config import UserError

    kind, _, size = text.partition(":")
    try:
        value = float(size)
    except ValueError:
        value = math.nan
    if kind not in ("uniform", "normal") or not 0 < value < math.inf:
        raise UserError(f"--init {text}: use uniform:BOUND or normal:DEVIATION")
    return kind == "uniform", value
