"""Log files of other trainers as rows: trainer_state.json, JSONL, CSV, TensorBoard event files.

Here a file's format is read and nothing is interpreted: `history` says what a column means.
"""

import contextlib
import csv
import io
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bitnet_jax.fields import UserError, shown

Row = dict[str, float | str]  # of a column that is not there a row has no entry

EVENTS, STATE = "tfevents", "trainer_state.json"
# Where transformers' Trainer writes its arguments and the model's configuration in TensorBoard, and
# where it saves the latter beside its log.
SETTINGS = ("args/text_summary", "model_config/text_summary")
CONFIG = "config.json"
EMPTY = ("", "none", "null")  # cells without a value
FLOAT_TYPE, DOUBLE_TYPE = 1, 2  # of TensorFlow's TensorProto


@dataclass(frozen=True)
class Log:
    """What a log says: its format in words, rows in their order, and settings of its trainer.

    `places` says where each row stands, for messages.
    """

    path: Path
    kind: str
    rows: list[Row]
    places: list[str]
    settings: dict = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))


def read(path: Path) -> Log:
    """A log file, or the log in a folder: a Trainer's checkpoint or output, or TensorBoard's.

    Raises UserError for what is no log, is empty, is damaged, or holds several runs.
    """
    try:
        log = _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise UserError(f"--log {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--log {path}: not a log: not UTF-8 at byte {error.start}") from error
    if not log.rows:
        raise UserError(f"--log {path}: a {log.kind} without any numbers")
    return log


def _folder(path: Path) -> Log:
    states = [path / STATE] if (path / STATE).is_file() else []
    states = states or sorted(path.glob(f"checkpoint-*/{STATE}"), key=_natural)
    if states:
        return _file(states[-1])
    runs: dict[Path, list[Path]] = {}
    for events in sorted(path.rglob(f"*{EVENTS}*")):
        runs.setdefault(events.parent, []).append(events)
    if len(runs) > 1:
        names = ", ".join(str(run.relative_to(path)) for run in runs)
        raise UserError(f"--log {path}: holds {len(runs)} runs; name one of {shown(names, 300)}")
    if not runs:
        raise UserError(
            f"--log {path}: holds neither {STATE} nor event files of TensorBoard; name a file"
        )
    return _event_log(path, *runs.values())


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _file(path: Path) -> Log:
    if EVENTS in path.name:
        return _event_log(path, [path])
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"--log {path}: is empty")
    if text.lstrip()[0] in "{[":
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):  # several objects, one a line
            tree = None
        if isinstance(tree, dict) and "log_history" in tree:
            log = _numbered(path, "trainer_state.json of transformers", tree["log_history"])
            steps = {"max_steps": tree["max_steps"]} if "max_steps" in tree else {}
            return replace(log, settings=steps | _configuration(path.with_name(CONFIG)))
        if isinstance(tree, list):
            return _numbered(path, "list in JSON", tree)
        return _json_lines(path, text)
    return _csv(path, text)


def _configuration(path: Path) -> dict:
    """That of a model which was saved beside its log, else nothing."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _numbered(path: Path, kind: str, entries) -> Log:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"--log {path}: not a log: no list of objects")
    places = [f"entry {n}" for n in range(1, len(entries) + 1)]
    return Log(path, kind, [_flat(entry) for entry in entries], places)


def _json_lines(path: Path, text: str) -> Log:
    rows, places = [], []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            if not line.endswith("\n"):  # cut off while it was written
                break
            place = f"--log {path}:{number}"
            raise UserError(f"{place}: not a JSON object: {shown(line.strip())}") from error
        if not isinstance(entry, dict):
            raise UserError(f"--log {path}:{number}: not a JSON object: {shown(line.strip())}")
        rows.append(_flat(entry))
        places.append(f"line {number}")
    return Log(path, "JSONL file", rows, places)


def _flat(tree: dict, prefix: str = "") -> Row:
    """The numbers and texts of nested objects, their names joined by `/`."""
    row: Row = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, str | int | float):
            row[prefix + key] = _value(value)
    return row


def _value(value: float | str) -> float | str:
    """A number where the value is one, also as text: `1e-3`, `NaN`, `-inf`."""
    try:
        return float(value)
    except ValueError:
        return value
    except OverflowError:
        return math.inf


def _csv(path: Path, text: str) -> Log:
    names, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=names.count)
    if delimiter not in names:
        raise UserError(f"--log {path}: not a log: neither JSON nor a table with a line of names")
    try:
        header, *rest = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise UserError(f"--log {path}: not a table: {error}") from error
    rows, places = [], []
    for number, cells in enumerate(rest, 2):
        if len(cells) > len(header):
            raise UserError(f"--log {path}:{number}: {len(cells)} fields, but {len(header)} names")
        named = zip(header, cells, strict=False)
        rows.append({k.strip(): _value(x) for k, x in named if x.strip().lower() not in EMPTY})
        places.append(f"line {number}")
    return Log(path, "CSV file", [row for row in rows if row], places)


# ------------------------------------------------------------------------------------ TensorBoard


def _event_log(path: Path, files: list[Path]) -> Log:
    """The event files of one run, oldest first by their names."""
    rows, places, settings = [], [], {}
    for file in files:
        for number, event in enumerate(_events(file), 1):
            row = {v.tag: n for v in event.summary.value if (n := _scalar(v)) is not None}
            if row:
                rows.append({"step": float(event.step)} | row)
                places.append(f"event {number} of {file.name}")
            settings |= _arguments(event.summary.value)
    return Log(path, "TensorBoard log", rows, places, settings)


def _events(path: Path) -> Iterator:
    """Events of a file of TFRecords: length, its masked CRC-32C, content, that of the content.

    One that was cut off while it was written ends the file.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != checksum:
                raise UserError(f"--log {path}: damaged, or not an event file of TensorBoard")
            content = file.read(length + 4)
            if len(content) < length + 4:
                return
            yield Event.FromString(content[:-4])


def _scalar(value) -> float | None:
    """The number of a summary: as PyTorch and tensorboardX write it, or as TensorFlow 2 does."""
    if value.HasField("simple_value"):
        return value.simple_value
    tensor, formats = value.tensor, {FLOAT_TYPE: "<f", DOUBLE_TYPE: "<d"}
    if tensor.dtype not in formats or any(d.size != 1 for d in tensor.tensor_shape.dim):
        return None
    for number in (*tensor.float_val, *tensor.double_val):
        return number
    kind = formats[tensor.dtype]
    if len(tensor.tensor_content) != struct.calcsize(kind):
        return None
    return struct.unpack(kind, tensor.tensor_content)[0]


def _arguments(values: Iterable) -> dict:
    """Settings that transformers' Trainer wrote down; an older version wrote them in Markdown."""
    settings = {}
    for value in values:
        if value.tag in SETTINGS and value.tensor.string_val:
            with contextlib.suppress(ValueError):
                settings |= json.loads(value.tensor.string_val[0])
    return settings
