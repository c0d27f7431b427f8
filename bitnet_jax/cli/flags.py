"""What commands share: the flags that describe a run, how a mistake is told, how a process stops.

Only the standard library is imported at the top; experiments use this module, too.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_jax import stopping
from bitnet_jax.fields import nearest

if TYPE_CHECKING:
    from bitnet_jax.config import Config, Replicate

DETERMINISTIC = "--xla_gpu_deterministic_ops"  # a GPU resumes bitwise only with it
COMPILED_BYTES, COMPILED_SECONDS = 1 << 30, 0.3  # size of the cache; what is too quick to keep
ERROR_CHARS = 600  # of a line that tells a mistake
PRESET = "quick"
SECTIONS = ("model", "data", "optim", "run")
MOST_SEEDS = 1000


# How a process ends


def guard(command: Callable[[], int | None]) -> None:
    """Call a command and exit with its status (none: 0); mistakes and signals become one line.

    An exception ends with its `exit_status` where it has one, and with a traceback otherwise.
    """
    try:
        stopping.exit_on_signals(lambda signum: fail("stopped", 128 + signum))
        for stream in (sys.stdout, sys.stderr):  # a terminal of ASCII shows all text somehow
            stream.reconfigure(errors="backslashreplace")
        status = command() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except Exception as error:
        if (status := getattr(error, "exit_status", None)) is None:
            raise
        kind = {1: "failed: ", 2: "error: "}.get(status, "")
        fail(f"{kind}{error}", status)
    finally:
        stopping.default()
    sys.exit(status)


def fail(text: str, status: int) -> int:
    """Print one line that a terminal can show, and return the status."""
    from bitnet_jax.terminal import one_line

    print(one_line(text, ERROR_CHARS), file=sys.stderr, flush=True)
    return status


def prepare() -> None:
    """Set up the libraries, after imports and before the first array; what the user has set stays.

    Compiled programs are kept between processes: the second start of a program compiles nothing.
    """
    import absl.logging
    import jax

    from bitnet_jax import cache, hosts

    # Orbax warns about files that it does not need, and downloads about each of their retries; what
    # fails in the end raises.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}=true".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = cache.folder() / "xla"
        cache.heal_compiled(compiled)
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_SECONDS)
    hosts.initialize()


# Arguments


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line with the nearest right name, exit status 2.

    The help of a command that trains ends with all fields, as the chosen preset has them.
    """

    def __init__(self, prog: str, doc: str, any_bytes: bool = False):
        super().__init__(
            prog=prog,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.any_bytes = any_bytes  # whether arguments need not be UTF-8
        self.argv: list[str] = []
        self.default_preset: str | None = None

    def parse_args(self, argv):
        self.argv = argv
        for text in argv:
            if not self.any_bytes and os.fsencode(text).decode("utf-8", "replace") != text:
                self.error(f"argument {text!r} is not UTF-8")
        args, unknown = self.parse_known_args(argv)
        if unknown:
            hint = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return args

    def error(self, message):
        sys.exit(fail(f"error: {message}; see {self.prog} --help", 2))

    def format_help(self):
        if self.default_preset is not None:
            early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            _add_base(early, self.default_preset)
            args, _ = early.parse_known_args(self.argv)
            self.epilog = describe_fields(args)
        return super().format_help()


@dataclass(frozen=True)
class Request:
    """A run that the user asked for."""

    preset: str
    cfg: "Config"
    seeds: list[int]
    hyper: dict[str, float]  # numbers of every replicate that --set changed
    replicates: "list[Replicate]"  # every recipe of the configuration from every seed
    workdir: Path
    resume: bool
    dry_run: bool
    verbose: bool


def add_run(parser: Parser, *, preset: str = PRESET, seeds: str = "0", place: str) -> None:
    """Add the flags that describe a run; `place` says what the default of --workdir is."""
    add_configuration(parser, preset=preset, seeds=seeds)
    add = parser.add_argument
    add("--workdir", type=_folder, help=f"where to write (default: {place})")
    add("--resume", action="store_true", help="go on in a workdir that was interrupted")
    add("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    add("--verbose", action="store_true", help="print the table of what decays, too")


def add_configuration(parser: Parser, *, preset: str = PRESET, seeds: str = "0") -> None:
    """Add the flags that describe what is trained."""
    parser.default_preset = preset
    _add_base(parser, preset)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="assignments",
        help="change a field (see below); may be repeated",
    )
    parser.add_argument(
        "--seeds",
        help=f"0 | 0-4 | 1,5,7 (default: {seeds}): initialisation and order of the data",
    )
    parser.set_defaults(default_seeds=seeds, workdir=None, resume=False)
    parser.set_defaults(dry_run=False, verbose=False)


def _add_base(parser, preset: str) -> None:
    parser.add_argument(
        "--preset",
        default=preset,
        help=f"a whole configuration by name, see below (default: {preset})",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a config.json, of a workdir or by hand: what it has replaces the preset's",
    )


def add_source(parser: Parser, optional: bool = False) -> None:
    """Add the model that a command is about."""
    parser.add_argument(
        "source",
        nargs="?" if optional else None,
        metavar="SOURCE",
        help="WORKDIR[@STEP[:REPLICATE]] (default: last step, replicate 0), or a folder of "
        "Hugging Face's transformers",
    )


def add_text(parser: Parser) -> None:
    """Add the text that a model is examined on."""
    parser.add_argument(
        "--text", metavar="GLOB", help="files to examine it on (default: the run's own corpus)"
    )


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a folder")
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text}: a workdir is local; put checkpoints there: --set run.checkpoints={text}"
        )
    return Path(text)


def parse_seeds(text: str) -> list[int]:
    """`0`, `0-4` and `1,5,7`, or a mix; raises UserError."""
    from bitnet_jax.fields import UserError

    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        ends = (low, high) if dash else (low, low)
        if not all(end.isascii() and end.isdecimal() and len(end) <= 10 for end in ends):
            raise UserError(f"--seeds {text}: use a number, a range 0-4 or a list 1,5,7")
        first, last = map(int, ends)
        if last < first or last >= 2**32 or last - first >= MOST_SEEDS:
            raise UserError(
                f"--seeds {text}: a range goes upwards, below 2**32, to {MOST_SEEDS} seeds at most"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed stands there twice")
    return seeds


def resolve(args: argparse.Namespace, name: str, changes: Sequence[str] = ()) -> Request:
    """The run that the flags of `add_configuration` describe; raises UserError for a misfit.

    `changes` are assignments that an experiment makes before the user's; `name` begins the name of
    the default workdir.
    """
    from bitnet_jax import config_file, presets

    cfg, listed = _base(args)
    cfg, hyper = presets.override(cfg, [*changes, *args.assignments])
    seeds = parse_seeds(args.default_seeds if args.seeds is None else args.seeds)
    if listed and not any(text.startswith("run.recipes=") for text in args.assignments):
        replicates = [replace(r, hyper=r.hyper.replace(**hyper)) for r in listed]
        if args.seeds:
            arms = {rep.name: rep for rep in replicates}.values()
            replicates = [replace(rep, seed=seed) for rep in arms for seed in seeds]
        for rep in replicates:
            presets.check_replicate(cfg.run, rep)
    else:
        replicates = presets.make_replicates(cfg, seeds, hyper)
    workdir = args.workdir or Path("runs") / config_file.run_id(name, cfg, replicates)
    seeds = list(dict.fromkeys(rep.seed for rep in replicates))
    flags = (args.resume, args.dry_run, args.verbose)
    return Request(args.preset, cfg, seeds, hyper, replicates, workdir, *flags)


def _base(args) -> "tuple[Config, list[Replicate]]":
    """The preset, changed as --config says, and the replicates that its file lists."""
    from bitnet_jax import config_file, log, presets
    from bitnet_jax.fields import check_known

    cfg = presets.preset(args.preset)
    if args.config is None:
        return cfg, []
    source, tree = str(args.config), log.read_json(args.config)
    if "provenance" not in tree:  # not from a workdir: every key counts
        for key in tree:
            check_known(key, (*SECTIONS, "replicates"), f"key in {source}:")
    base = config_file.to_json(cfg, presets.make_replicates(cfg, [0], {}))
    for key in (*SECTIONS, "replicates"):
        part = tree.get(key, base[key])
        base[key] = base[key] | part if isinstance(part, dict) and key in SECTIONS else part
    cfg, replicates = config_file.from_json(base, source)
    return cfg, replicates if "replicates" in tree else []


def as_text(value) -> str:
    """A value as --set takes it."""
    if isinstance(value, (tuple, list)):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def describe_fields(args) -> str:
    """Presets, recipes, and every field with its meaning and its value in the base of `args`."""
    from bitnet_jax import config, presets

    cfg, listed = _base(args)
    replicates = listed or presets.make_replicates(cfg, [0], {})
    text_lines = [
        f"presets: {', '.join(presets.PRESETS)}",
        f"recipes: {', '.join(presets.RECIPES)}",
        "",
        f"fields for --set, with the values of {args.config or f'preset {args.preset}'}:",
    ]
    for section in SECTIONS:
        part = getattr(cfg, section)
        for field in fields(part):
            value = as_text(getattr(part, field.name))
            choices = field.metadata["choices"]
            text = field.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
            text_lines.append(f"  {section}.{field.name}={value}\n      {text}")
    for field in (f for f in fields(config.Hyper) if f.name in config.HYPER_FIELDS):
        values = {rep.name: f"{getattr(rep.hyper, field.name):g}" for rep in replicates}
        listing = " ".join(f"{value} ({name})" for name, value in values.items())
        if len(set(values.values())) == 1:
            listing = values[replicates[0].name]
        text_lines.append(f"  hyper.{field.name}={listing}\n      {field.metadata['help']}")
    return "\n".join(text_lines)
