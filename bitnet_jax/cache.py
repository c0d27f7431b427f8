"""The cache folder: locks, files that appear whole, checksums, and downloads that fail at once.

A cache file is checked whenever it is read. One that is damaged is made again, under a lock, so
that any number of processes may start at the same moment.
"""

import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import filelock

from bitnet_jax import stopping
from bitnet_jax.fields import UserError

BLOCK_BYTES = 1 << 22  # a checksum is taken of blocks of this size, in parallel
PROBE_SECONDS = 5
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([\w.]+)'")

T = TypeVar("T")


class DamagedError(Exception):
    """A cache file is not as it was written."""


def folder() -> Path:
    """Where tokenizers and token files are kept: $BITNET_JAX_CACHE or ~/.cache/bitnet_jax."""
    return Path(os.environ.get("BITNET_JAX_CACHE") or "~/.cache/bitnet_jax").expanduser()


def cached(path: Path, load: Callable[[], T], build: Callable[[], None]) -> T:
    """`load()`, after `build()` where `path` is missing or damaged.

    `load` raises FileNotFoundError or DamagedError; `build` runs under the lock of `path`, in one
    process at a time. A damaged file is named on stderr. Raises UserError when the cache folder
    cannot be used.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, DamagedError):
            return load()
        with lock(path):
            try:
                return load()
            except FileNotFoundError:
                pass
            except DamagedError as error:
                print(f"{path}: damaged ({error}); made again", file=sys.stderr)
            build()
            return load()
    except DamagedError as error:
        raise UserError(f"{path}: damaged as soon as it was written ({error})") from error
    except OSError as error:
        raise _unusable(path, error) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a cache file, making its folder; drafts of killed processes are removed.

    Raises UserError when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise _unusable(path, error) from error
    with held:
        for draft in path.parent.glob(f".{path.name}.*.tmp"):
            draft.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file, open for bytes, that takes the place of `path` when the block ends well.

    Its name cannot be guessed, and neither it nor `path` is followed where it is a link. Raises
    UserError naming the folder when it cannot be written (full disk, no permission).
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with stopping.undone(lambda: draft.unlink(missing_ok=True)):
            with open(os.open(draft, flags, 0o666), "w+b") as file:
                yield file
            os.replace(draft, path)
    except OSError as error:
        raise _unusable(path, error) from error


def checksum(file: BinaryIO) -> str:
    """SHA-256 of the CRC-32 of each block from the start of an open file, in hexadecimal.

    It finds damage, not forgery, at 2 GB/s and core.
    """
    file.seek(0)
    blocks = iter(functools.partial(file.read, BLOCK_BYTES), b"")
    threads = min(8, os.cpu_count() or 1)
    total = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(blocks, 2 * threads)):
            for crc in pool.map(zlib.crc32, batch):
                total.update(crc.to_bytes(4, "big"))
    return total.hexdigest()


def write_json(path: Path, tree) -> None:
    """Write JSON values together with a checksum of them and of the file's name."""
    content = json.dumps(tree)
    with replacing(path) as file:
        file.write(json.dumps({"sha256": _seal(path, content), "content": content}).encode())


def read_json(path: Path):
    """The values that `write_json` wrote there. Raises FileNotFoundError or DamagedError."""
    try:
        tree = json.loads(path.read_bytes())
        sha256, content = tree["sha256"], tree["content"]
        whole = sha256 == _seal(path, content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError("not JSON with a checksum") from error
    if not whole:
        raise DamagedError("wrong checksum")
    return json.loads(content)


def _seal(path: Path, content: str) -> str:
    return hashlib.sha256(f"{path.name}\n{content}".encode()).hexdigest()


def heal_compiled(folder: Path) -> None:
    """Remove compiled programs of jax's cache that are half written or, once met, damaged.

    jax writes an entry in place and the time of its use after it, keeps an entry that it cannot
    read, warns at every start, and compiles again each time.
    """
    for entry in folder.glob("*-cache"):
        used = entry.with_name(entry.name.removesuffix("cache") + "atime")
        if not used.is_file():
            _remove(entry)
            _remove(used)

    def show(message, *place, tell=warnings.showwarning, **more):
        if not (damaged := UNREADABLE.match(str(message))):
            return tell(message, *place, **more)
        for entry in folder.glob(f"{damaged[1]}-*"):
            _remove(entry)
        print(f"{folder}: compiled program {damaged[1]} damaged; made again", file=sys.stderr)

    warnings.showwarning = show


def _remove(path: Path) -> None:
    """Remove a file, or a folder that stands in its place; another process may be faster."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_network(what: str, url: str, instead: str) -> None:
    """Try once to reach the server of `url`; any answer of it will do.

    The libraries that download retry for minutes before they say that there is no network. Raises
    UserError: `what` needs a download; `instead` says what to do.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, http.client.HTTPException) as error:
        host = urllib.request.Request(url).host
        raise UserError(
            f"{what} needs a download, and there is no network ({host} does not answer); {instead}"
        ) from error


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cache folder {path.parent}: {error.strerror or error} ({path.name}); "
        "set BITNET_JAX_CACHE to a folder with space that can be written"
    )
