"""What is wrong with a model, or with a run that another trainer logged?

Of a SOURCE: tests of its weights, text and optimiser, then the causes that the numbers support, the
most likely first, with their evidence, and what to do about the first. A model of a run is tested
with its optimiser and its start, a folder of transformers on a text. Tests that need a text that
is not there are left out, and named.

Of a log (--log): the verdict on its losses and whatever else it holds, beside what predictions
without context would lose on the same text, and a page with the curves. Logs are trainer_state.json
of transformers, JSONL, CSV (also exported from W&B), and event files of TensorBoard. Where the log
and the flags from --optimizer on name Adam's settings, and --text or --counts the text, what
`bitnet predict` says of them stands beside the verdict.

The exit status is 1 when a cause, or an alarm, is found.

    bitnet triage runs/train-1a2b3c4d
    bitnet triage runs/train-1a2b3c4d@500:1
    bitnet triage my-bitnet --text 'mine/*.txt'
    bitnet triage --log out/checkpoint-500 --text 'mine/*.txt' --tokenizer hf:out
    bitnet triage --log wandb.csv --vocab-size 50257 --unigram-loss 7.1
    bitnet triage --log metrics.csv --map loss=ce --map step=it --counts counts.npy
    bitnet triage --log out --counts counts.npy --optimizer torch.optim.Adam --weight-decay 0.1 \\
        --width 256 --layers 4 --tokens-per-batch 4096
"""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from bitnet_jax.cli import flags, predict

OF_A_LOG = ("map", "counts", "vocab_size", "unigram_loss", "tokenizer", "page", "optimizer")


def main(argv: list[str]) -> int:
    args = parse(argv)
    alarm = of_log(args) if args.log else of_source(args)
    return 1 if alarm and not args.exit_zero else 0


def parse(argv: list[str]) -> Namespace:
    """The command line; exits with one line for flags that do not go together."""
    parser = flags.Parser("bitnet triage", __doc__)
    flags.add_source(parser, optional=True)
    flags.add_text(parser)
    parser.add_argument(
        "--exit-zero", action="store_true", help="exit 0 when a cause is found, too"
    )
    add = parser.add_argument_group("the log of another trainer").add_argument
    add("--log", type=Path, metavar="FILE", help="a log, or the folder that holds it")
    add("--map", action="append", metavar="NAME=COLUMN", help="which column is the NAME: step, "
        "loss, eval_loss, lr, grad_norm, entropy, mutual_information, logit_std, unigram_kl, "
        "head_norm; may be repeated")  # fmt: skip
    add("--tokenizer", metavar="NAME", help="of --text: hf:FOLDER, gpt2 or gpt2:FOLDER")
    add("--counts", type=Path, metavar="FILE", help="counts of the vocabulary's tokens in the "
        "training text, instead of --text: .npy, JSON, or one a line")  # fmt: skip
    add("--vocab-size", type=_above(1, int), metavar="N", help="tokens of the vocabulary")
    add("--unigram-loss", type=_above(0, float), metavar="NATS", help="entropy of the training "
        "text's word frequencies, nats per token, instead of both")  # fmt: skip
    add("--page", type=Path, metavar="FILE", help="where the page is written (default: beside it)")
    add = parser.add_argument_group(
        "its settings, where the log does not say them, or says them wrongly"
    ).add_argument
    add("--optimizer", metavar="NAME", help="such as AdamW, or torch.optim.Adam")
    predict.add_setting(add)
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.log):
        parser.error("give a SOURCE or --log FILE, one of them")
    for name in () if args.log else (*OF_A_LOG, *predict.SETTING, "lr_file"):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --log FILE")
    if args.log:
        _check_references(parser, args)
    return args


def _above(low, kind):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = low
        if not low < value < float("inf"):
            raise ArgumentTypeError(f"{text!r}: needs a number above {low}")
        return value

    return convert


def _check_references(parser: flags.Parser, args: Namespace) -> None:
    by_number = args.vocab_size is not None or args.unigram_loss is not None
    if (args.text is not None) + (args.counts is not None) + by_number > 1:
        parser.error("give one of --text, --counts, and --vocab-size with --unigram-loss")
    if (args.text is None) != (args.tokenizer is None):
        parser.error("--text and --tokenizer go together: the run's own tokenizer counts the text")


def of_source(args: Namespace) -> bool:
    """Test a model and print what was found; whether a cause was."""
    from bitnet_jax import audit, causes
    from bitnet_jax.terminal import printable

    flags.prepare()
    examined = audit.examine(args.source, args.text)
    print(
        printable(
            f"{args.source} ({examined['name']} seed {examined['seed']}, step {examined['step']})"
        )
    )
    print(printable("\n".join(audit.terminal_lines(examined["measured"], examined["left_out"]))))
    findings = causes.rank(examined["measured"])
    print("\n" + printable("\n".join(causes.render(examined["measured"], findings))))
    return bool(findings)


def of_log(args: Namespace) -> bool:
    """Judge a log, print the verdict and write the page; whether the verdict is an alarm."""
    from bitnet_jax import diagnosis, history, history_page
    from bitnet_jax.terminal import printable

    given = {"optim": args.optimizer, "weight_decay": args.weight_decay}
    given = {key: value for key, value in given.items() if value is not None}
    run = history.read(args.log, args.map or (), given)
    flags.prepare()
    if args.text:
        references = diagnosis.of_text(args.text, args.tokenizer)
    elif args.counts:
        references = diagnosis.of_counts(args.counts)
    else:
        references = diagnosis.of_numbers(args.vocab_size, args.unigram_loss)
    result = diagnosis.diagnose(run, references)
    prediction_lines = prediction(args, run)
    path = args.page or place(args.log)
    history_page.write_page(path, run, result, references, prediction_lines)
    print(printable("\n".join(diagnosis.terminal_lines(run, result, references, prediction_lines))))
    print(printable(f"page: {path}"))
    return result.alarm


def prediction(args: Namespace, run) -> list[str]:
    """What `bitnet predict` says of a logged run; see `elsewhere.prediction`.

    Rates are those of --lr-file, else as --lr gives them, else as they were logged.
    """
    from bitnet_jax import elsewhere
    from bitnet_jax.config import Config, DataConfig

    given = predict.given(args)
    values = {"steps": run.last_step} | elsewhere.of_log(run.settings)
    values["warmup"] = min(values.get("warmup", 0), values["steps"])  # of a run that is cut short
    values |= given
    points = predict.points_of(args.lr_file) if args.lr_file else ()
    if "lr" in run.columns and not points and "lr" not in given:
        logged = run.columns["lr"].finite()
        if len(logged.steps_N) > 1:
            points = list(zip(logged.steps_N, logged.values_N, strict=True))
            values["lr"] = float(logged.values_N.max())
    cfg = Config()
    if args.text:
        cfg = Config(data=DataConfig(tokenizer=args.tokenizer))
    counted = bool(args.text or args.counts)
    text = (lambda: predict.frequencies(args, cfg)) if counted else None
    return elsewhere.prediction(values, points, text, run.settings.get("optim"))


def place(log: Path) -> Path:
    """`triage.html` in a folder, NAME.html beside a file."""
    return log / "triage.html" if log.is_dir() else log.with_name(f"{log.name}.html")
