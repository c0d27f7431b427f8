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


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    preset: str
    cfg: Config
    replicates: list[Replicate]
    workdir: Path
    resume: bool


DETERMINISTIC = "--xla_gpu_deterministic_ops"  # a GPU resumes bitwise only with it


def main(doc: str, name: str, default_preset: str, body: Callable[[Request], None]) -> None:
    """Parse the command line and call `body`; mistakes become one line and an exit status."""
    # Orbax warns about files that it does not need, and downloads about each of their retries; what
    # fails in the end raises.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}=true".strip()
    try:
        body(parse(doc, name, default_preset, sys.argv[1:]))
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


def parse(doc: str, name: str, default_preset: str, argv: list[str]) -> Request:
    """Turn arguments into a Request; raises UserError for values that do not fit."""
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
    parser.add_argument("--seeds", default="0", help="initialisation seeds: 0 | 0-4 | 1,5,7")
    parser.add_argument(
        "--workdir", type=Path, help="where to write (default: runs/NAME-HASH of the settings)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on in a workdir that was interrupted"
    )
    args = parser.parse_args(argv)
    cfg, hyper = presets.override(presets.preset(args.preset), args.overrides)
    replicates = presets.make_replicates(cfg, parse_seeds(args.seeds), hyper)
    workdir = args.workdir or Path("runs") / config.run_id(name, cfg, replicates)
    return Request(args.preset, cfg, replicates, workdir, args.resume)


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
