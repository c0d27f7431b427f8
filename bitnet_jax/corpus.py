"""Corpora: stdlib, text:GLOB and tfds:NAME[/CONFIG] as streams of documents, in two splits."""

import bisect
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax import documents
from bitnet_jax.cache import require_network
from bitnet_jax.config import DataConfig
from bitnet_jax.documents import Stream
from bitnet_jax.fields import UserError, nearest, shown

NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
LINE_BREAK = re.compile(r"\n|\r(?!\n)")
PATH = 200  # characters of a path in a message
WHITE_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Split:
    """A stream of documents that can be read again; `sha256` changes when any document does.

    With `prompts` each document is two stretches: its prompt and its text.
    """

    sha256: str
    read: Callable[[], Stream]
    size: float | None = None  # bytes, where that is known beforehand; only for a progress bar
    prompts: bool = False


def open_corpus(cfg: DataConfig) -> tuple[str, dict[str, Split]]:
    """Digest of the corpus, and its splits "train" and "validation".

    Raises UserError for a corpus that cannot be read; files are decoded only when their documents
    are read, so errors inside them come then.
    """
    kind, _, name = cfg.corpus.partition(":")
    separate = cfg.validation is not None and cfg.validation.startswith("text:")
    if cfg.validation is not None and not separate and kind != "tfds":
        raise UserError(f"data.validation={shown(cfg.validation, PATH)}: use text:GLOB (or none)")
    if kind == "tfds":
        sha256, splits = _tfds(cfg, name, separate)
    elif kind == "stdlib":
        sha256, splits = _stdlib(cfg, separate)
    else:
        sha256, splits = _text(cfg, separate)
    if separate:
        splits["validation"] = _files(_find("data.validation", cfg.validation), cfg)
    return sha256, splits


def _find(field: str, source: str) -> dict[str, Path]:
    """Files of text:GLOB by their path below the folder that holds them all, sorted.

    Empty files are left out, and their number is said on stderr.
    """
    pattern = os.path.expanduser(source.removeprefix("text:"))
    named = f"{field}={shown(source, PATH)}"
    if "\0" in pattern:
        raise UserError(f"{named}: matches no file")
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [Path(path) for path in matches if os.path.isfile(path)]
    if not paths:
        what = "is a folder; add a pattern such as /**/*.txt" if matches else "matches no file"
        raise UserError(f"{named}: {what}")
    files = [path for path in paths if not documents.is_empty(path)]
    if not files:
        raise UserError(f"{named}: {len(paths)} files, all empty; give text")
    if len(files) < len(paths):
        empty = len(paths) - len(files)
        print(f"{named}: {empty} of {len(paths)} files are empty and skipped", file=sys.stderr)
    root = os.path.commonpath([path.parent for path in files])
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in files))


def _digest(files: dict[str, Path], rule: str) -> str:
    """Digest of names and contents, and of how they are read."""
    total = hashlib.sha256(f"{rule}\n".encode())
    for name, path in files.items():
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        total.update(os.fsencode(name) + f"\n{content}\n".encode())
    return total.hexdigest()


def _files(files: dict[str, Path], cfg: DataConfig) -> Split:
    """The documents of files, in order."""
    rule = [cfg.separator, cfg.feature] + ([cfg.prompt] if cfg.prompt else [])
    return Split(
        _digest(files, json.dumps(rule)),
        lambda: _chain(files.values(), cfg),
        None
        if any(path.suffix in documents.COMPRESSED for path in files.values())
        else sum(path.stat().st_size for path in files.values()),
        cfg.prompt is not None,
    )


def _chain(paths: Iterable[Path], cfg: DataConfig) -> Stream:
    if cfg.prompt is not None:
        for pair in _pairs(paths, cfg):
            yield from zip(pair, (False, True), strict=True)
        return
    for path in paths:
        yield from documents.read(path, cfg.separator, cfg.feature)


def _pairs(paths: Iterable[Path], cfg: DataConfig) -> Iterator[tuple[str, str]]:
    for path in paths:
        yield from documents.read_pairs(path, cfg.prompt, cfg.feature)


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
    splits = {"train": _files(train, cfg), "validation": _files(validation, cfg)}
    return _digest(files, ""), splits


def _is_library_text(name: str, path: Path) -> bool:
    if NOT_STDLIB & set(name.split("/")):
        return False
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:  # a few modules declare another encoding
        return False


def _text(cfg: DataConfig, separate: bool) -> tuple[str, dict[str, Split]]:
    """Files; the held-out part is the tail of their concatenation, from `_find_cut` on."""
    files = _find("data.corpus", cfg.corpus)
    whole = _files(files, cfg)
    if separate:
        return whole.sha256, {"train": whole}
    paths = list(files.values())
    if cfg.prompt is not None:
        return whole.sha256, _parts(whole, cfg, *_halves_of_pairs(paths, cfg))
    find_cut = functools.cache(functools.partial(_find_cut, paths, cfg))

    def head():
        i, offset = find_cut()
        yield from _chain(paths[:i], cfg)
        if offset:
            yield from _between(_chain(paths[i : i + 1], cfg), 0, offset)

    def tail():
        i, offset = find_cut()
        yield from _between(_chain(paths[i : i + 1], cfg), offset)
        yield from _chain(paths[i + 1 :], cfg)

    return whole.sha256, _parts(whole, cfg, head, tail)


def _parts(whole: Split, cfg: DataConfig, head, tail) -> dict[str, Split]:
    rule = f"{whole.sha256} holdout {cfg.holdout!r}"
    return {
        part: Split(
            hashlib.sha256(f"{rule} {part}".encode()).hexdigest(),
            stream,
            whole.size and share * whole.size,
            whole.prompts,
        )
        for part, stream, share in (
            ("train", head, 1 - cfg.holdout),
            ("validation", tail, cfg.holdout),
        )
    }


def _halves_of_pairs(paths: list[Path], cfg: DataConfig) -> tuple[Callable, Callable]:
    """Streams of all documents but the last `holdout` share, one at least, and of those."""

    @functools.cache
    def cut() -> int:
        n = sum(1 for _ in _pairs(paths, cfg))
        return n - max(1, round(cfg.holdout * n))

    def head():
        return itertools.islice(_chain(paths, cfg), 2 * cut())

    def tail():
        return itertools.islice(_chain(paths, cfg), 2 * cut(), None)

    return head, tail


def _between(stream: Stream, start: int, stop: int | None = None) -> Stream:
    """The characters [start, stop) of a stream; a document that `stop` cuts ends there."""
    place = 0
    for text, ends in stream:
        part = text[max(0, start - place) : None if stop is None else stop - place]
        place += len(text)
        done = stop is not None and place >= stop
        if place > start:
            yield part, ends or done
        if done:
            return


def _find_cut(paths: list[Path], cfg: DataConfig) -> tuple[int, int]:
    """Where the held-out part starts: (file, character).

    Of the last `holdout` share of all characters: the first start of a document in its first
    half, or without one there the first place after a line break, or after white space, or its
    start.
    """
    lengths = [sum(len(text) for text, _ in _chain([path], cfg)) for path in paths]
    ends = list(itertools.accumulate(lengths))
    left = int((1 - cfg.holdout) * ends[-1])
    limit = (left + ends[-1]) // 2
    first = min(bisect.bisect_right(ends, left), len(paths) - 1)
    cut = _first_break(_chain(paths[first:], cfg), ends[first] - lengths[first], left, limit)
    i = min(bisect.bisect_right(ends, cut), len(paths) - 1)
    return i, cut - (ends[i] - lengths[i])


def _first_break(stream: Stream, place: int, left: int, limit: int) -> int:
    """The break of `_find_cut` in a stream whose first document starts at `place` <= left."""
    if place == left:
        return left
    places = {}
    for text, ends in stream:
        inside = max(left - place, 0), max(limit - place, 0)
        for pattern in (LINE_BREAK, WHITE_SPACE):
            if pattern not in places and (match := pattern.search(text, *inside)):
                places[pattern] = place + match.end()
        place += len(text)
        if ends and left <= place <= limit:
            return place
        if place > limit:
            break
    return places.get(LINE_BREAK, places.get(WHITE_SPACE, left))


def _tfds(cfg: DataConfig, name: str, separate: bool) -> tuple[str, dict[str, Split]]:
    """A TensorFlow dataset. The digest covers name, version and sizes, not the contents."""
    sources = _tfds_sources(cfg, name)
    info = sources["train"].dataset_info
    held_out = next((s for s in (cfg.validation, "validation", "test") if s in sources), None)
    if not separate and cfg.validation not in (None, held_out):
        raise UserError(
            f"data.validation={shown(cfg.validation)}: {cfg.corpus} has splits "
            f"{', '.join(sources)}{nearest(cfg.validation, sources)}"
        )
    sizes = {s: [info.splits[s].shard_lengths, info.splits[s].num_bytes] for s in sorted(sources)}
    sha256 = hashlib.sha256(json.dumps([info.full_name, sizes]).encode()).hexdigest()

    def part(split, start, stop):
        rule = f"{sha256} {cfg.feature} {split} {start} {stop}"
        read = functools.partial(_examples, cfg, sources[split], split, start, stop)
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

    where = f"data.corpus={shown(cfg.corpus)}"
    try:
        folder = os.environ.get("TFDS_DATA_DIR")
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        if not builder.is_prepared():
            urls = [url for url in builder.url_infos or () if url.startswith("http")]
            for url in urls[:1]:
                require_network(where, url, "use text:GLOB, or prepare it under TFDS_DATA_DIR")
            builder.download_and_prepare()
        sources = builder.as_data_source()
    except (
        ValueError,
        OSError,
        ImportError,
        AssertionError,
        NotImplementedError,
        DownloadError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {reason}") from error
    if "train" not in sources:
        raise UserError(f"{where}: no split train; it has {', '.join(sources)}")
    features = sources["train"].dataset_info.features
    field = f"data.feature={shown(cfg.feature)}"
    if cfg.feature not in features:
        have = ", ".join(sorted(features))
        raise UserError(f"{field}: {cfg.corpus} has {have}{nearest(cfg.feature, features)}")
    if not isinstance(sources["train"][0][cfg.feature], bytes):
        raise UserError(f"{field}: not text but {features[cfg.feature]}")
    return sources


def _examples(cfg: DataConfig, source, split: str, start: int, stop: int) -> Stream:
    for i in range(start, stop):
        try:
            text = source[i][cfg.feature].decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"data.corpus={shown(cfg.corpus)}: example {i} of split {split}"
            raise UserError(f"{where} is not UTF-8 at byte {error.start}") from error
        if text:
            yield text, True
