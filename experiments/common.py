"""The command line that all experiments share."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import absl.logging

from bitnet_jax import config, presets
from bitnet_jax.config import Config, Replicate, UserError
from bitnet_jax.run import Interrupted, TrainingFailed
from experiments import page, results


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    preset: str
    cfg: Config
    seeds: list[int]
    hyper: dict[str, float]  # overrides of every replicate's numbers
    replicates: list[Replicate]  # every recipe of the configuration from every seed
    workdir: Path  # for a sweep: the folder of its groups' workdirs and of its page
    resume: bool
    at_once: int | None
    lengths: tuple[int, ...] = ()  # of a study of lengths: multiples of run.steps
    only: tuple[str, ...] = ()  # of such a study: parts of the names of the arms to train


# A model, smaller: what `--preset quick` means for an experiment of many arms.
SIZE = (
    "model.d_model=128",
    "model.n_layers=2",
    "model.d_ff=256",
    "data.tokenizer=bpe:2048",
    "data.seq_len=32",
    "data.eval_batches=4",
    "run.steps=300",
    "run.save_every=300",
)
# The same of the report's layout.
SMALL = (
    "model.layout=report",
    "model.tied_embedding=false",
    "model.rope_theta=10000",
    *SIZE,
)


DETERMINISTIC = "--xla_gpu_deterministic_ops"  # a GPU resumes bitwise only with it


def main(
    doc: str,
    name: str,
    default_preset: str,
    body: Callable[[Request], None],
    *,
    seeds: str = "0",
    quick: tuple[str, ...] = (),
    sweep: bool = False,
    lengths: str = "",
) -> None:
    """Parse the command line and call `body`; mistakes become one line and an exit status.

    `quick` holds assignments that the experiment adds to the preset of that name; `lengths` is the
    default of a study of several lengths.
    """

    def command():
        request = parse(
            doc,
            name,
            default_preset,
            sys.argv[1:],
            seeds=seeds,
            quick=quick,
            sweep=sweep,
            lengths=lengths,
        )
        resume = "the same command" if sweep else f"--resume --workdir {request.workdir}"
        try:
            body(request)
        except Interrupted as error:
            raise Interrupted(f"{error}; go on with {resume}", error.signum) from None

    guard(command)


def guard(command: Callable[[], None]) -> None:
    """Run a command; mistakes become one line and an exit status."""
    # Orbax warns about files that it does not need, and downloads about each of their retries; what
    # fails in the end raises.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}=true".strip()
    try:
        command()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except TrainingFailed as error:
        _exit(f"failed: {error}", 1)
    except Interrupted as error:
        _exit(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        _exit("stopped before training began", 130)


def _exit(text: str, status: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(status)


def parse(
    doc: str,
    name: str,
    default_preset: str,
    argv: list[str],
    *,
    seeds: str = "0",
    quick: tuple[str, ...] = (),
    sweep: bool = False,
    lengths: str = "",
) -> Request:
    """Turn arguments into a Request; raises UserError for values that do not fit.

    A sweep resumes by itself and keeps its workdirs in runs/NAME.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=doc,
        epilog="fields for --set, with their defaults:\n" + describe_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        default=default_preset,
        help=f"{' | '.join(presets.PRESETS)} (default: {default_preset})",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.field=value", dest="overrides"
    )
    parser.add_argument(
        "--seeds",
        default=seeds,
        help=f"initialisation seeds: 0 | 0-4 | 1,5,7 (default: {seeds})",
    )
    place = f"runs/{name}" if sweep else "runs/NAME-HASH of the settings"
    parser.add_argument("--workdir", type=Path, help=f"where to write (default: {place})")
    if sweep:
        parser.add_argument(
            "--at-once", type=int, help="replicates in one program (default: what memory allows)"
        )
    if lengths:
        parser.add_argument(
            "--lengths",
            default=lengths,
            help=f"lengths to train, in multiples of run.steps (default: {lengths})",
        )
        parser.add_argument(
            "--only",
            metavar="TEXT,TEXT",
            help="train only arms with one of these in their name (default: all); `make report` "
            "analyses the rows of several commands together",
        )
    if not sweep:
        parser.add_argument(
            "--resume", action="store_true", help="go on in a workdir that was interrupted"
        )
    args = parser.parse_args(argv)
    at_once = args.at_once if sweep else None
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}: needs at least 1")
    assignments = [*(quick if args.preset == "quick" else ()), *args.overrides]
    cfg, hyper = presets.override(presets.preset(args.preset), assignments)
    chosen = parse_seeds(args.seeds)
    replicates = presets.make_replicates(cfg, chosen, hyper)
    default = name if sweep else config.run_id(name, cfg, replicates)
    workdir = args.workdir or Path("runs") / default
    resume = True if sweep else args.resume
    multiples = parse_lengths(args.lengths, lengths) if lengths else ()
    only = tuple(args.only.split(",")) if lengths and args.only else ()
    return Request(
        args.preset, cfg, chosen, hyper, replicates, workdir, resume, at_once, multiples, only
    )


def conclude(name: str, doc: str, workdir: Path, rows: list[dict], analyse: page.Analyse) -> None:
    """Append the rows to the results, print what they show and write the page."""
    results.append(name, rows)
    studies = {label: analyse(part) for label, part in results.by_study(rows).items()}
    for label, study in studies.items():
        print("\n" + page.console(label, study))
    print(f"\npage: {page.write(workdir / 'report.html', name, doc, studies, rows)}")


def parse_lengths(text: str, known: str) -> tuple[int, ...]:
    """Some of the `known` numbers, each once, in ascending order; raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not set(parts) <= set(known.split(",")) or len(set(parts)) < len(parts):
        raise UserError(f"--lengths {text}: use some of {known}, separated by commas")
    return tuple(sorted(map(int, parts)))


def parse_seeds(text: str) -> list[int]:
    """`0`, `0-4` and `1,5,7`, or a mix; raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if (
            not low.isdecimal()
            or (dash and not high.isdecimal())
            or (dash and int(high) < int(low))
        ):
            raise UserError(f"--seeds {text}: use a number, a range 0-4 or a list 1,5,7")
        seeds += range(int(low), int(high or low) + 1)
    if len(set(seeds)) < len(seeds) or max(seeds) >= 2**32:
        raise UserError(f"--seeds {text}: needs distinct seeds below 2**32")
    return seeds


def describe_fields() -> str:
    """Every field with its default and meaning."""
    lines = []
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            default = field.default
            default = ",".join(default) if isinstance(default, tuple) else default
            choices = field.metadata["choices"]
            text = field.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
            lines.append(f"  {section.name}.{field.name}={default}\n      {text}")
    for field in dataclasses.fields(config.Hyper):
        lines.append(f"  hyper.{field.name}=(recipe's)\n      {field.metadata['help']}")
    return "\n".join(lines)
