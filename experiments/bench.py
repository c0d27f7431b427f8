"""What the benchmarks share: their command line, rounds, spreads, and rows that name the machine.

What is compared is measured in turns in one process, round after round, so that a slow minute hits
everything alike; ratios are taken within a round, and only then their median, smallest and largest.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import log, presets
from bitnet_jax.cli import flags
from bitnet_jax.config import Config, ModelConfig
from bitnet_jax.fields import UserError

FOLDER = Path(__file__).parent / "results"
LIMIT_S = 240  # after two rounds, none begins past this
CPU_INFO = Path("/proc/cpuinfo")
# Instructions that decide how fast products are, by the names of Linux (x86, then Arm).
X86_FLAGS = "avx2 avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
CPU_FLAGS = (*X86_FLAGS.split(), "asimddp", "i8mm", "bf16", "sve")


class Skipped(Exception):
    """A measurement that does not fit this machine, and why."""


# The command line


def parser(name: str, doc: str, *, preset: str, rounds: int | None) -> flags.Parser:
    """The flags that benchmarks share; `rounds` is None where nothing is timed."""
    flag_parser = flags.Parser(f"python -m experiments.{name}", doc)
    flag_parser.default_preset = preset
    add = flag_parser.add_argument
    add("--preset", default=preset, help=f"whose sizes, see below (default: {preset})")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="assignments",
        help="change a field (see below); may be repeated",
    )
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    if rounds is not None:
        add("--rounds", type=int, default=rounds, help=f"at most (default: {rounds})")
    return flag_parser


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an argument below 1, and for a seed that is none."""
    if not 0 <= args.seed < 2**32 - 1:
        raise UserError(f"--seed {args.seed}: use a number from 0 to {2**32 - 2}")
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: needs at least 1")


def resolve(args: argparse.Namespace, changes=()) -> tuple[Config, dict[str, float]]:
    """The preset with `changes` and then the user's; the latter's numbers of `hyper.*` apart."""
    return presets.override(presets.preset(args.preset), [*changes, *args.assignments])


def prepare() -> None:
    """Set up the libraries; compiled programs are not kept, so that compiling can be measured."""
    flags.prepare()
    jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def precision(model: ModelConfig):
    """Products as `bitnet train` computes them: float32 means float32."""
    with jax.default_matmul_precision("float32" if model.dtype == "float32" else "default"):
        yield


# Rounds


def timed(call: Callable[[], object]) -> float:
    """Seconds until what `call` returns has been computed."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def rounds(moves: dict[str, Callable[[], float]], most: int) -> dict[str, np.ndarray]:
    """The seconds that each move returned in every round, after a round of warm-up."""
    for move in moves.values():
        move()
    taken, begun = [], time.perf_counter()
    while len(taken) < min(2, most) or (
        len(taken) < most and time.perf_counter() - begun < LIMIT_S
    ):
        taken.append([move() for move in moves.values()])
    return dict(zip(moves, np.array(taken).T, strict=True))


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Median, smallest and largest, four digits each."""
    numbers = {"median": np.median(values), "min": values.min(), "max": values.max()}
    return {f"{name}_{k}": float(f"{x:.4g}") for k, x in numbers.items()}


def show(row: dict, name: str, unit: str, factor: float = 1) -> str:
    """`spread(name)` of a row as `median [smallest, largest] unit`; empty where it has none."""
    if f"{name}_median" not in row:
        return ""
    middle, low, high = (factor * row[f"{name}_{k}"] for k in ("median", "min", "max"))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}] {unit}"


# The machine


def machine() -> dict:
    """Commit, versions, device, and the CPU with the instructions that it has or may use."""
    seen = log.provenance()
    del seen["argv"]  # rows are published, and it names folders of this machine
    return seen | {"cpu_flags": cpu_flags(), "cpu_caps": cpu_caps()}


def cpu_flags() -> list[str] | None:
    """Those of CPU_FLAGS that this CPU has; None where the system does not tell."""
    if not CPU_INFO.exists():
        return None
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    return [name for name in CPU_FLAGS if name in listed[1].split()] if listed else None


def cpu_caps() -> dict[str, str]:
    """Instructions that the environment forbids to XLA and to torch (oneDNN)."""
    of_xla = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    caps = {"xla": of_xla[-1] if of_xla else None, "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA")}
    return {name: cap for name, cap in caps.items() if cap}


def peak_memory() -> dict[str, float]:
    """The most that this process, and where it counts the device, have held so far, in MB."""
    unit = 1024 if sys.platform == "linux" else 1
    peak = {"rss_mb": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if stats := jax.devices()[0].memory_stats():
        peak["device_peak_mb"] = stats["peak_bytes_in_use"]
    return {k: round(v / 1e6, 1) for k, v in peak.items()}


def free_memory() -> float:
    """Bytes free on the device, or in the machine where that is the device."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    return 1024 * int(available[1])


# Rows


def shape_of(preset: str, cfg: Config, n_params: int) -> dict:
    """What rows of one model share."""
    model = cfg.model
    return {
        "preset": preset,
        "layout": model.layout,
        "dtype": model.dtype,
        "d_model": model.d_model,
        "layers": model.n_layers,
        "vocab": model.vocab_size,
        "params": n_params,
    }


class Rows:
    """Rows of one call: appended to experiments/results/NAME.jsonl as they come."""

    def __init__(self, name: str, fixed: dict):
        self.path, self.fixed, self.seen = FOLDER / f"{name}.jsonl", fixed, machine()
        self.rows: list[dict] = []

    def add(self, benchmark: str, **values) -> dict:
        """Append a row, and return it."""
        row = {"benchmark": benchmark} | self.fixed | values
        row |= {"load_1min": round(os.getloadavg()[0], 2)} | self.seen
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def heading(self) -> str:
        """Model and machine in words."""
        fixed, seen = self.fixed, self.seen
        fast = ", ".join(seen["cpu_flags"] or ["unknown instructions"])
        capped = "".join(f"; {name} up to {cap}" for name, cap in seen["cpu_caps"].items())
        return (
            f"{fixed['preset']}: {fixed['params']:,} parameters, layout {fixed['layout']}, "
            f"{fixed['dtype']}, on {seen['device']}, {seen['cores']} cores ({fast}{capped})"
        )
