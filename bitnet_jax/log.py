"""What a run writes down: metrics.jsonl, TensorBoard, lines of progress, provenance."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax.config import Replicate, UserError
from bitnet_jax.verdict import LABELS

SECONDS, WIDTH = 30, 160  # between lines of progress in a file; their length
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
LARGE = "large block"  # a kind of row, whatever it is called
HEAD_OF_ROW = re.compile(rb'\{"step": \d+, "replicate": (\d+), "kind": "(\w+)"')


def provenance() -> dict:
    """Git commit and dirty flag, versions, device and command line."""
    import jax

    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "argv": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*args: str) -> str | None:
    """Output of a git command in this source tree; None where there is no git or no repository.

    An installed package may lie in the repository of something else, which does not track it.
    """
    here = Path(__file__)
    outputs = []
    for command in (("ls-files", "--error-unmatch", here.name), args):
        try:
            result = subprocess.run(
                ["git", "-C", here.parent, *command], capture_output=True, text=True
            )
        except FileNotFoundError:
            return None
        outputs.append(result.stdout.strip() if result.returncode == 0 else None)
    return None if None in outputs else outputs[-1]


UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters as escapes, not \\n and \\t.

    So are characters that change the direction of writing, and bytes that were not UTF-8.
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str, most: int) -> str:
    """Printable text on one line; what lies in the middle of a text longer than `most` is cut."""
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def write_json(path: Path, tree) -> None:
    """Write a JSON file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises UserError when there is none or something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object but {type(tree).__name__}")
    return tree


def read_rows(path: Path) -> list[dict]:
    """Rows of a jsonl file; a last line without its line break was cut off and is dropped.

    Raises UserError that names the file and the line for any other line that is not an object.
    """
    return [_parse(path, number, line) for number, line in _numbered_lines(path)]


@dataclass(frozen=True)
class Rows:
    """Rows of metrics.jsonl by what a page does with them, each oldest first."""

    drawn: list[dict]  # evenly thinned, the last of each replicate and kind among them
    last: dict[int, dict]  # replicate -> its last evaluation
    trained: dict[int, dict]  # replicate -> its last row of training
    large: dict[int, dict]  # replicate -> its last row of the large block


def read_thinned(path: Path, most: int) -> Rows:
    """Rows of metrics.jsonl, thinned to `most` and the last one of each replicate and kind.

    One pass, in memory that does not grow with the run; only rows that are kept are parsed. Raises
    UserError as `read_rows` does, for those.
    """
    kept: dict[tuple, list] = {}  # (replicate, kind) -> (line number, line), every stride-th
    seen, stride = Counter(), Counter()
    last: dict[tuple, tuple[int, bytes]] = {}
    for number, line in _numbered_lines(path):
        key = _replicate_and_kind(path, number, line)
        if b'"held_out/' in line:
            last[key[0], LARGE] = number, line
            if b'"eval/' not in line:
                continue
        last[key] = number, line
        rows = kept.setdefault(key, [])
        if seen[key] % 2 ** stride[key] == 0:
            rows.append((number, line))
            if len(rows) >= most:
                del rows[1::2]
                stride[key] += 1
        seen[key] += 1
    numbered = {pair for rows in kept.values() for pair in rows} | set(last.values())
    parsed = {number: _parse(path, number, line) for number, line in sorted(numbered)}

    def ends(kind):
        return {i: parsed[number] for (i, k), (number, _) in sorted(last.items()) if k == kind}

    return Rows(list(parsed.values()), ends("eval"), ends("train"), ends(LARGE))


def _replicate_and_kind(path, number, line) -> tuple:
    head = HEAD_OF_ROW.match(line)
    if head:
        return int(head[1]), head[2].decode()
    row = _parse(path, number, line)
    return row.get("replicate"), row.get("kind")


def _numbered_lines(path) -> Iterator[tuple[int, bytes]]:
    """Lines that end; one without its line break was cut off."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.endswith(b"\n"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path, number, line) -> dict:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"but {type(row).__name__}")
    except ValueError as error:
        raise UserError(f"{path}:{number}: not a JSON object ({error})") from error
    return row


class Metrics:
    """metrics.jsonl and TensorBoard; rows after `step` (left by an interrupted run) are dropped.

    `rows` are those kept of an interrupted run.
    """

    def __init__(self, workdir: Path, step: int, replicates: list[Replicate]):
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        rows = read_rows(self.path)
        for number, row in enumerate(rows, 1):
            if type(row.get("step")) is not int or row.get("replicate") not in range(
                len(replicates)
            ):
                raise UserError(f"{self.path}:{number}: no row of this run: no step or replicate")
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(replicates):  # cut off while the first rows were written
            kept = []
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        self.rows = kept
        self.file = self.path.open("a")
        self.boards = [
            SummaryWriter(str(workdir / "tb" / f"{i}-{r.name}-{r.seed}"), purge_step=step + 1)
            for i, r in enumerate(replicates)
        ]

    def write(self, rows: list[dict]) -> None:
        """Append rows, at once for a reader and for a killed process."""
        from tensorboardX.proto.summary_pb2 import Summary

        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()
        for row in rows:
            values = [
                Summary.Value(tag=key, simple_value=value)
                for key, value in row.items()
                if "/" in key and isinstance(value, (int, float))
            ]
            board = self.boards[row["replicate"]].file_writer
            board.add_summary(Summary(value=values), row["step"])  # one event for all its numbers

    def close(self) -> None:
        self.file.close()
        for board in self.boards:
            board.close()


class Progress:
    """Where a run is: one line that a terminal redraws, or whole lines, seldom, in a file.

    Compilation is told apart, and is no part of the rate. A warning stands on a line of its own
    when it is first met.
    """

    def __init__(self, replicates: Sequence[Replicate], step: int, steps: int, tokens: int):
        """`tokens` are those of one step of all replicates."""
        self.labels = [f"{rep.name} {rep.seed}" for rep in replicates]
        self.step, self.steps, self.tokens = step, steps, tokens
        self.done, self.seconds, self.since = 0, 0.0, None
        self.states: dict[int, dict] = {}  # the last evaluation of each replicate
        self.warned: set[tuple[str, int]] = set()
        self.compiled: set[str] = set()
        self.drawn, self.written, self.shown = False, -math.inf, None

    @contextlib.contextmanager
    def compiling(self, what: str):
        """Tell how long a block takes that is the first of its name, and so compiles."""
        if what in self.compiled:
            yield
            return
        self.compiled.add(what)
        began = time.monotonic()
        self.end_line()
        print(f"compiling {what} ...", end="", file=sys.stderr, flush=True)
        yield
        took = time.monotonic() - began
        print(f" {took:.1f} s", file=sys.stderr, flush=True)
        if self.since is not None:
            self.since += took

    def start(self) -> None:
        """The clock runs from here."""
        self.since = time.monotonic()

    def update(self, step: int, rows: list[dict]) -> None:
        """Show the evaluations of a step."""
        if self.since is not None and step > self.step:
            now = time.monotonic()
            self.done += step - self.step
            self.seconds += now - self.since
            self.since = now
        self.step = step
        evals = [row for row in rows if row["kind"] == "eval"]
        self.states |= {row["replicate"]: row for row in evals}
        for text, replicates in self._new_warnings(evals).items():
            self.end_line()
            where = ", ".join(self.labels[i] for i in replicates)
            print(f"step {step}: {text} ({where})", file=sys.stderr)
        self._show()

    def _new_warnings(self, evals: list[dict]) -> dict[str, list[int]]:
        """Warnings not met before, numbers aside, each with the replicates that have it."""
        new: dict[str, list[int]] = {}
        texts: dict[str, str] = {}
        for row in evals:
            for text in row["collapse/warnings"]:
                kind = re.sub(r"[\d.]+", "", text)
                if (kind, row["replicate"]) not in self.warned:
                    self.warned.add((kind, row["replicate"]))
                    new.setdefault(texts.setdefault(kind, text), []).append(row["replicate"])
        return new

    def _show(self) -> None:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            text = progress_line(self.labels, self.states, self._place(), width)
            print("\r" + text.ljust(width), end="", file=sys.stderr, flush=True)
            self.drawn = True
            return
        worst = max(LABELS[row["collapse/verdict"]].severity for row in self.states.values())
        now = time.monotonic()
        if now - self.written > SECONDS or worst != self.shown or self.step == self.steps:
            text = progress_line(self.labels, self.states, self._place(), WIDTH)
            print(text, file=sys.stderr, flush=True)
            self.written, self.shown = now, worst

    def _place(self) -> list[str]:
        """Where the run is: all that can be told, then what must."""
        place = f"{self.step}/{self.steps}"
        if not self.seconds or self.step == self.steps:
            return [place]
        left = round((self.steps - self.step) * self.seconds / self.done)
        left = f"{left // 60}:{left % 60:02}"
        return [f"{place}, {left} left, {self.tokens_per_second:,.0f} tok/s", place]

    @property
    def tokens_per_second(self) -> float:
        return self.done * self.tokens / self.seconds if self.seconds else 0.0

    def end_line(self) -> None:
        """What is printed next begins a line of its own."""
        if self.drawn:
            print(file=sys.stderr, flush=True)
        self.drawn = False


def progress_line(labels: list[str], states: dict[int, dict], places: list[str], width: int) -> str:
    """The fullest line that fits: the state of each replicate, worst first, else their counts.

    `!` marks a state that has warnings. `states` are the last evaluations.
    """
    worst_first = sorted(
        states.items(),
        key=lambda state: (
            -LABELS[state[1]["collapse/verdict"]].severity,
            not state[1]["collapse/warnings"],
            -state[1].get("eval/loss", math.inf),
        ),
    )

    def name(row):
        return row["collapse/verdict"] + "!" * bool(row["collapse/warnings"])

    losses = [f" {row['eval/loss']:.2f}" if "eval/loss" in row else "" for _, row in worst_first]
    full = [
        f"{labels[i]} {name(row)}{loss}" for (i, row), loss in zip(worst_first, losses, strict=True)
    ]
    short = [f"{labels[i]} {name(row)}" for i, row in worst_first]
    counts = Counter(name(row) for _, row in worst_first[1:])
    rest = [f"{n} {verdict}" for verdict, n in counts.items()]
    choices = [
        [*full, places[0]],
        [*full, places[-1]],
        [*short, places[-1]],
        [*full[:1], *rest, places[0]],
        [*full[:1], *rest, places[-1]],
    ]
    lines = [" | ".join(parts) for parts in choices]
    return next((line for line in lines if len(line) <= width), lines[-1][:width])
