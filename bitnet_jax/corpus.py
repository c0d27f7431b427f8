"""Corpora: stdlib, text:GLOB and tfds:NAME[/CONFIG] as streams of documents, in two splits."""

import codecs
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax.config import DataConfig, UserError

BLOCK_BYTES = 1 << 20  # files are read in blocks
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Split:
    """Documents, each a stream of blocks of text; `sha256` changes when any of them does."""

    sha256: str
    documents: Callable[[], Iterator[Iterable[str]]]


def open_corpus(cfg: DataConfig) -> tuple[str, dict[str, Split]]:
    """Digest of the corpus, and its splits "train" and "validation".

    Raises UserError for a corpus that cannot be read; a text file is decoded only when its
    documents are, so errors inside it come then.
    """
    kind, _, name = cfg.corpus.partition(":")
    separate = cfg.validation is not None and cfg.validation.startswith("text:")
    if cfg.validation is not None and not separate and kind != "tfds":
        raise UserError(f"data.validation={cfg.validation}: use text:GLOB (or none)")
    if kind == "tfds":
        sha256, splits = _tfds(cfg, name, separate)
    elif kind == "stdlib":
        sha256, splits = _stdlib(cfg, separate)
    else:
        sha256, splits = _text(cfg, name, separate)
    if separate:
        splits["validation"] = _file_split(_find(cfg.validation))
    return sha256, splits


def _find(source: str) -> dict[str, Path]:
    """Files of text:GLOB by their path below the folder that holds them all, sorted."""
    pattern = os.path.expanduser(source.removeprefix("text:"))
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [Path(path) for path in found if os.path.isfile(path)]
    if not files:
        what = "is a folder; add a pattern such as /**/*.txt" if found else "matches no file"
        raise UserError(f"{source}: {what}")
    root = os.path.commonpath([path.parent for path in files])
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in files))


def _digest(files: dict[str, Path]) -> str:
    """Digest of names and contents."""
    total = hashlib.sha256()
    for name, path in files.items():
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        total.update(f"{name}\n{content}\n".encode())
    return total.hexdigest()


def _file_split(files: dict[str, Path]) -> Split:
    return Split(_digest(files), lambda: (_read_text(path) for path in files.values()))


def _read_text(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Stream the characters [start, stop) of a UTF-8 file, decompressed by its suffix."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = done = 0  # characters and bytes before this block
    try:
        with opener(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                pending = len(decoder.getstate()[0])
                text = decoder.decode(block)
                yield text[max(0, start - place) : None if stop is None else max(0, stop - place)]
                place, done = place + len(text), done + len(block)
                if stop is not None and place >= stop:
                    return
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        offset = done - pending + error.start
        raise UserError(f"{path}: not UTF-8 at byte {offset}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not done:
        raise UserError(f"{path}: empty file")


def _stdlib(cfg: DataConfig, separate: bool) -> tuple[str, dict[str, Split]]:
    """This interpreter's standard library without tests, split by a hash of the file's path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = {name: files[name] for name in sorted(files) if _is_library_text(name, files[name])}
    held_out = {
        name
        for name in files
        if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < cfg.holdout * 2**32
    }
    train = {n: p for n, p in files.items() if separate or n not in held_out}
    validation = {n: p for n, p in files.items() if n in held_out}
    splits = {"train": _file_split(train), "validation": _file_split(validation)}
    return _digest(files), splits


def _is_library_text(name: str, path: Path) -> bool:
    if NOT_STDLIB & set(name.split("/")):
        return False
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:  # a few modules declare another encoding
        return False


def _text(cfg: DataConfig, name: str, separate: bool) -> tuple[str, dict[str, Split]]:
    """Text files; the held-out part is the tail of their concatenation, from a line break on."""
    files = _find(f"text:{name}")
    whole = _file_split(files)
    if separate:
        return whole.sha256, {"train": whole}
    paths = list(files.values())
    find_cut = functools.cache(functools.partial(_find_cut, paths, cfg.holdout))

    def head():
        i, offset = find_cut()
        yield from (_read_text(path) for path in paths[:i])
        yield from ([_read_text(paths[i], 0, offset)] if offset else [])

    def tail():
        i, offset = find_cut()
        yield _read_text(paths[i], offset)
        yield from (_read_text(path) for path in paths[i + 1 :])

    rule = f"{whole.sha256} holdout {cfg.holdout!r}"
    splits = {
        part: Split(hashlib.sha256(f"{rule} {part}".encode()).hexdigest(), documents)
        for part, documents in (("train", head), ("validation", tail))
    }
    return whole.sha256, splits


def _find_cut(paths: list[Path], holdout: float) -> tuple[int, int]:
    """(file, character) after the first line break in the last `holdout` share of all characters.

    The start of a file counts as a line break.
    """
    lengths = [sum(map(len, _read_text(path))) for path in paths]
    left = int((1 - holdout) * sum(lengths))
    i = 0
    while left >= lengths[i] and i + 1 < len(lengths):
        left -= lengths[i]
        i += 1
    if not left:
        return i, 0
    offset = left
    for block in _read_text(paths[i], left):
        newline = block.find("\n")
        if newline >= 0:
            return i, offset + newline + 1
        offset += len(block)
    return i, offset


def _tfds(cfg: DataConfig, name: str, separate: bool) -> tuple[str, dict[str, Split]]:
    """A TensorFlow dataset. The digest covers name, version and sizes, not the contents."""
    sources = _tfds_sources(cfg, name)
    info = sources["train"].dataset_info
    held_out = next((s for s in (cfg.validation, "validation", "test") if s in sources), None)
    if not separate and cfg.validation not in (None, held_out):
        raise UserError(
            f"data.validation={cfg.validation}: {cfg.corpus} has splits {', '.join(sources)}"
        )
    sizes = {s: [info.splits[s].shard_lengths, info.splits[s].num_bytes] for s in sorted(sources)}
    sha256 = hashlib.sha256(json.dumps([info.full_name, sizes]).encode()).hexdigest()

    def part(split, start, stop):
        rule = f"{sha256} {cfg.feature} {split} {start} {stop}"
        read = functools.partial(_examples, sources[split], cfg.feature, start, stop)
        return Split(hashlib.sha256(rule.encode()).hexdigest(), read)

    size = len(sources["train"])
    if separate:
        return sha256, {"train": part("train", 0, size)}
    if held_out:
        validation = part(held_out, 0, len(sources[held_out]))
        return sha256, {"train": part("train", 0, size), "validation": validation}
    cut = int((1 - cfg.holdout) * size)
    return sha256, {"train": part("train", 0, cut), "validation": part("train", cut, size)}


def _tfds_sources(cfg: DataConfig, name: str) -> dict:
    """Random-access splits by name, prepared as array_record under $TFDS_DATA_DIR if need be."""
    # The library is slow to import and only these corpora need it.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        sources = tfds.data_source(
            name,
            data_dir=os.environ.get("TFDS_DATA_DIR"),
            builder_kwargs={"file_format": "array_record"},
        )
    except (
        ValueError,
        OSError,
        ImportError,
        AssertionError,
        NotImplementedError,
        DownloadError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.corpus={cfg.corpus}: {reason}") from error
    if "train" not in sources:
        raise UserError(f"data.corpus={cfg.corpus}: no split train; it has {', '.join(sources)}")
    features = sources["train"].dataset_info.features
    if cfg.feature not in features:
        have = ", ".join(sorted(features))
        raise UserError(f"data.feature={cfg.feature}: {cfg.corpus} has {have}")
    if not isinstance(sources["train"][0][cfg.feature], bytes):
        raise UserError(f"data.feature={cfg.feature}: not text but {features[cfg.feature]}")
    return sources


def _examples(source, feature: str, start: int, stop: int) -> Iterator[Iterable[str]]:
    for i in range(start, stop):
        yield (source[i][feature].decode("utf-8"),)
