"""What a run writes down: metrics.jsonl, TensorBoard, the progress bar, provenance."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from bitnet_jax.collapse import LABELS
from bitnet_jax.config import Replicate, UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
LARGE = "large block"  # a kind of row, whatever it is called
HEAD_OF_ROW = re.compile(rb'\{"step": \d+, "replicate": (\d+), "kind": "(\w+)"')


def provenance() -> dict:
    """Git commit and dirty flag, versions, device and command line."""
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
    """Output of a git command in this source tree; None where there is no git or no repository."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def write_json(path: Path, tree) -> None:
    """Write a JSON file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(temporary, path)


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
    if path.exists():
        with path.open("rb") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.endswith(b"\n"))


def _parse(path, number, line) -> dict:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"but {type(row).__name__}")
    except ValueError as error:
        raise UserError(f"{path}:{number}: not a JSON object ({error})") from error
    return row


class Metrics:
    """metrics.jsonl and TensorBoard; rows after `step` (left by an interrupted run) are dropped."""

    def __init__(self, workdir: Path, step: int, replicates: list[Replicate]):
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        if len(kept) < len(replicates):  # cut off while the first rows were written
            kept = []
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        self.resumed = bool(kept)
        self.file = self.path.open("a")
        self.boards = [
            SummaryWriter(str(workdir / "tb" / f"{i}-{r.name}-{r.seed}"), purge_step=step + 1)
            for i, r in enumerate(replicates)
        ]

    def write(self, rows: list[dict]) -> None:
        """Append rows, at once for a reader and for a killed process."""
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()
        for row in rows:
            for key, value in row.items():
                if "/" in key and isinstance(value, (int, float)):
                    self.boards[row["replicate"]].add_scalar(key, value, row["step"])

    def close(self) -> None:
        self.file.close()
        for board in self.boards:
            board.close()


class Progress:
    """A bar over steps with the worst replicate's verdict and loss, and tokens per second."""

    def __init__(self, step: int, steps: int, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.tokens, self.seconds, self.last = 0, 0.0, None
        # In a log file a bar is redrawn on lines of its own: seldom is enough.
        interval = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=steps, initial=step, unit="step", mininterval=interval, desc="train")

    def update(self, step: int, rows: list[dict]) -> None:
        """Move to `step`; the first chunk starts the clock, so its compilation does not count."""
        done, now = step - self.bar.n, time.monotonic()
        if self.last is not None:
            self.tokens += done * self.tokens_per_step
            self.seconds += now - self.last
        if done:
            self.last = now
        evals = [row for row in rows if row["kind"] == "eval"]
        worst = max(evals, key=lambda r: (LABELS[r["collapse/verdict"]][0], r["eval/loss"]))
        warned = "".join(f"; warning: {text}" for text in worst["collapse/warnings"][:1])
        self.bar.set_postfix_str(
            f"worst: {worst['collapse/verdict']}, loss {worst['eval/loss']:.3f}; "
            f"{self.tokens_per_second:,.0f} tok/s{warned}",
            refresh=False,
        )
        self.bar.update(done)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        self.bar.close()
