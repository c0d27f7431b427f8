"""Files as streams of documents: plain text, .jsonl and .parquet, each maybe compressed.

A stream is an iterator of (text, ends): the next stretch of a document, and whether the document
ends with it. Documents without any text do not appear.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from bitnet_jax.fields import UserError, nearest, shown

Stream = Iterator[tuple[str, bool]]

BLOCK_BYTES = 1 << 20  # files are read in blocks
BOM = "\ufeff"
LINE_BREAKS = "\r\n"
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*OPENERS, ".zst")


def read(path: Path, separator: str | None, field: str) -> Stream:
    """Documents of a file, by its suffixes.

    Text (UTF-8) is split at `separator`, and loses a byte order mark and the line breaks around
    separators. Each line of `.jsonl` and each row of `.parquet` is a document: its text `field`.
    Raises UserError, while reading, naming the file and the place that cannot be read.
    """
    records = _records(path, (field,))
    if records is None:
        return split(_decode(path), separator)
    return ((text, True) for (text,) in records if text)


def read_pairs(path: Path, prompt: str, field: str) -> Iterator[tuple[str, str]]:
    """The prompt and the text of each line of `.jsonl` or row of `.parquet` that has a text.

    Raises UserError, while reading, as `read` does, and for a file of another kind.
    """
    records = _records(path, (prompt, field))
    if records is None:
        raise UserError(
            f"{path}: data.prompt={shown(prompt)}: only .jsonl and .parquet have fields"
        )
    return ((before, text) for before, text in records if text)


def _records(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]] | None:
    """The texts of some fields, record by record; None for a file that has no fields."""
    name = path.name.lower()
    inner = name.removesuffix(next((s for s in COMPRESSED if name.endswith(s)), ""))
    if inner.endswith(".parquet"):
        return _rows(path, fields, compressed=inner != name)
    if inner.endswith((".jsonl", ".ndjson")):
        return _json_lines(path, fields)
    return None


def is_empty(path: Path) -> bool:
    """Whether a file holds no bytes once decompressed, but for a byte order mark."""
    with _reading(path) as file:
        return file.read(4) in (b"", BOM.encode())


def split(blocks: Iterable[str], separator: str | None) -> Stream:
    """Split a text that comes in blocks at `separator`.

    Line breaks next to a separator are dropped, of those before it the last 8. Little more than a
    block is held at a time.
    """
    held, begun, after = "", False, False  # `after`: nothing has come since the last separator
    keep = len(separator or "") + 8
    for block in blocks:
        held, start = held + block, 0
        while separator and (place := held.find(separator, start)) >= 0:
            text = held[start:place]
            text = text.lstrip(LINE_BREAKS) if after else text
            text = text[:-8] + text[-8:].rstrip(LINE_BREAKS)
            if text or begun:
                yield text, True
            start, begun, after = place + len(separator), False, True
        held = held[start:]
        if after:
            held = held.lstrip(LINE_BREAKS)
            after = not held
        if len(held) > keep:
            yield held[:-keep], False
            held, begun = held[-keep:], True
    if held or begun:
        yield held, True


def _decode(path: Path) -> Iterator[str]:
    """Blocks of text of a UTF-8 file without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = pending = 0  # bytes read; those that still wait for the rest of their character
    start = True
    with _reading(path) as file:
        try:
            while block := file.read(BLOCK_BYTES):
                pending = len(decoder.getstate()[0])
                text = decoder.decode(block)
                done += len(block)
                yield text.removeprefix(BOM) if start else text
                start = start and not text
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, done - pending + error.start, error.object) from error


def _json_lines(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    place = 0
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, place + error.start, line) from error
            place += len(line)
            text = text.removeprefix(BOM) if number == 1 else text
            if text.strip():
                yield _text_fields(text, fields, f"{path}:{number}")


def _text_fields(line: str, fields: tuple[str, ...], where: str) -> tuple[str, ...]:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {shown(line.strip())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: not a JSON object: {shown(line.strip())}")
    for name, field in _named(fields):
        if field not in tree:
            raise _no_field(where, name, field, list(tree))
        text = tree[field]
        if not isinstance(text, str):
            raise UserError(f"{where}: {name}={shown(field)}: not text but {shown(text)}")
        if not is_utf8(text):
            raise UserError(f"{where}: {name}={shown(field)}: holds half a surrogate pair")
    return tuple(tree[field] for field in fields)


def _named(fields: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of the configuration's field and what it names: the text is the last one."""
    return list(zip(("data.prompt", "data.feature")[-len(fields) :], fields, strict=True))


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can express a text: JSON can spell out halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path, fields: tuple[str, ...], compressed: bool) -> Iterator[tuple[str, ...]]:
    # Only .parquet needs the library, which takes a third of a second to import.
    import pyarrow
    import pyarrow.parquet

    if compressed:
        raise UserError(f"{path}: .parquet is compressed inside; decompress the file itself")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for name, field in _named(fields):
                _check_text(path, file.schema_arrow, name, field)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=list(dict.fromkeys(fields))):
                columns = [batch.column(field) for field in fields]
                for scalars in zip(*columns, strict=True):
                    row += 1
                    yield tuple(
                        _text_scalar(scalar, f"{path}: row {row}: {shown(field)}")
                        for scalar, field in zip(scalars, fields, strict=True)
                    )
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _check_text(path: Path, schema, name: str, field: str) -> None:
    import pyarrow

    if field not in schema.names:
        raise _no_field(str(path), name, field, schema.names)
    kind = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise UserError(f"{path}: {name}={shown(field)}: not text but {kind}")


def _text_scalar(scalar, where: str) -> str:
    text = scalar.as_py() or ""
    try:
        return text if isinstance(text, str) else text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for bytes, decompressed by its suffix; errors inside the block name the file."""
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # Python itself reads no zstd before 3.14

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), BLOCK_BYTES)
    return OPENERS.get(suffix, open)(path, "rb")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return UserError(f"{path}: cannot be read: {reason or type(error).__name__}")


def _not_utf8(path: Path, offset: int, content: bytes) -> UserError:
    utf16 = offset == 0 and content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return UserError(f"{path}: not UTF-8 at byte {offset}{' (UTF-16)' if utf16 else ''}")


def _no_field(where: str, name: str, field: str, names: list[str]) -> UserError:
    listed = ", ".join(shown(known) for known in names[:20]) or "no field"
    return UserError(
        f"{where}: {name}={shown(field)} is not there; it has {listed}{nearest(field, names)}"
    )
