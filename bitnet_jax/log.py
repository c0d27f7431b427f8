"""What a run writes down: metrics.jsonl, TensorBoard, a tracker's numbers, provenance."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax import hosts
from bitnet_jax.config import Replicate
from bitnet_jax.fields import UserError

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


def write_sealed(path: Path, tree: dict) -> None:
    """Write a JSON object with a digest of its other keys, `sha256`; see `read_sealed`."""
    write_json(path, tree | {"sha256": _digest(tree)})


def read_sealed(path: Path) -> dict:
    """The object that `write_sealed` wrote there; UserError when it was damaged or edited since."""
    tree = read_json(path)
    if tree.pop("sha256", None) != _digest(tree):
        raise UserError(f"{path}: damaged or edited: not as the run wrote it")
    return tree


def _digest(tree: dict) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path) -> list[dict]:
    """Rows of a jsonl file; a last line without its line break was cut off and is dropped.

    Raises UserError that names the file and the line for any other line that is not an object.
    """
    return [_parse(path, number, line) for number, line in _numbered_lines(path)]


def seal(path: Path, size: int | None = None) -> dict[str, int]:
    """Length and CRC-32 of the first `size` bytes of a file, of all by default."""
    crc32, left = 0, path.stat().st_size if size is None else size
    taken = left
    try:
        with path.open("rb") as file:
            while left and (block := file.read(min(left, 1 << 24))):
                crc32, left = zlib.crc32(block, crc32), left - len(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return {"bytes": taken - left, "crc32": crc32}


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

    `rows` are those kept of an interrupted run. Only the first process writes.
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
        self.rows, self.boards = kept, []
        hosts.wait("rows are read")
        if not hosts.is_first():
            return
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        self.file = self.path.open("a")
        self.boards = [
            SummaryWriter(str(workdir / "tb" / f"{i}-{r.name}-{r.seed}"), purge_step=step + 1)
            for i, r in enumerate(replicates)
        ]

    def write(self, rows: list[dict]) -> None:
        """Append rows, at once for a reader and for a killed process."""
        if not self.boards:
            return
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
        if self.boards:
            self.file.close()
        for board in self.boards:
            board.close()


def check_tracker(kind: str) -> None:
    """Raise UserError where the package of `run.tracker` is not installed."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(f"run.tracker={kind}: not installed; pip install {kind}, or use none")


class Tracker:
    """The numbers of a run in wandb or trackio: one run there, which a resumed one goes on with.

    Of several replicates each has its name and seed before its keys.
    """

    def __init__(self, kind: str, workdir: Path, config: dict, replicates: list[Replicate]):
        place = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]
        name = f"{workdir.resolve().name}-{place}"
        more = {"id": name} if kind == "wandb" else {}  # trackio goes by the name
        library = importlib.import_module(kind)
        self.run = library.init(
            project="bitnet_jax", name=name, config=config, resume="allow", **more
        )
        several = len(replicates) > 1
        self.prefixes = [f"{rep.name} {rep.seed}/" * several for rep in replicates]

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            start = self.prefixes[row["replicate"]]
            named = [(k, x) for k, x in row.items() if "/" in k and isinstance(x, int | float)]
            self.run.log({start + key: value for key, value in named}, step=row["step"])

    def close(self) -> None:
        self.run.finish()
