"""Token files: a split is tokenised once into the cache folder, and verified at every start.

Where documents have prompts, a record of the file is a token and whether it is scored.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from bitnet_jax import cache
from bitnet_jax.corpus import Split
from bitnet_jax.documents import Stream
from bitnet_jax.tokenizer import Tokenizer

PIECE_CHARS = 1 << 15  # a document is encoded in pieces of at least this size
MOST_CHARS = 1 << 17  # and of at most this size
BATCH_BYTES = 1 << 20  # pieces that are encoded at once, in parallel
# Between a character that is no white space and a space, between a letter or digit and another
# white space, and between a letter and a punctuation mark that begins no contraction.
SPACE_CUT = re.compile(r"\S(?= )")
CUT = re.compile(
    r"\S(?= )|[^\W_](?=[\n\r\t])|[^\W\d_](?=[.,;:!?()\"\u201c\u201d\u2026"
    r"\u3001\u3002\u300c-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f])"
)


def pieces(stream: Stream, tokenizer: Tokenizer | None = None) -> Stream:
    """Cut documents into pieces that encode to the tokens of the whole.

    The pre-tokenisation of GPT-2 (Radford et al. 2019) and of its heirs (GPT-4, Llama 3, Qwen)
    always ends a word at a `CUT`, does not look back over it, and looks ahead only from white
    space; one that puts a space before a text needs the space of a `SPACE_CUT`. Where there is no
    such place in MOST_CHARS characters, the piece ends all the same: tokens may differ there, and
    only there.
    """
    cut = SPACE_CUT if tokenizer and tokenizer.prefix_space else CUT
    rest = ""
    for text, ends in stream:
        rest += text
        start = 0
        while len(rest) - start > MOST_CHARS:
            match = cut.search(rest, start + PIECE_CHARS, start + MOST_CHARS + 1)
            end = match.end() if match else start + MOST_CHARS
            yield rest[start:end], False
            start = end
        rest = rest[start:]
        if ends:
            yield rest, True
            rest = ""


def stripped_lines(stream: Stream) -> Stream:
    """Each line without the white space around it, empty ones left out, of a text that never ends.

    So the code behind the troubleshooting report reads: every line is encoded alone, and nothing
    stands between two. A line of more than MOST_CHARS characters is cut.
    """
    rest = ""
    for text, ends in stream:
        *text_lines, rest = (rest + text).split("\n")
        if ends or len(rest) > MOST_CHARS:
            text_lines, rest = [*text_lines, rest], ""
        yield from ((line.strip(), False) for line in text_lines if line.strip())
    if rest.strip():
        yield rest.strip(), False


def cached_tokens(
    name: str, split: Split, tokenizer: Tokenizer, by_line: bool = False
) -> tuple[np.ndarray, dict]:
    """Tokens of a split, memory-mapped, and its counts; tokenises unless the cache has them.

    Each document has `tokenizer.begin` before and `tokenizer.close` after it; `by_line`, there is
    one document, of the `stripped_lines`, without an end.

    With prompts the records [N] have the fields `token` and `scored`: those of a prompt, and what
    stands before it, are not. A prompt and its text are encoded apart, as a prompt is whose
    continuation is yet to come.
    """
    rule = f"{split.sha256} {tokenizer.key}" + " stripped lines" * by_line
    path = cache.folder() / f"tokens-{hashlib.sha256(rule.encode()).hexdigest()[:16]}.npy"

    def write():
        stretches = split.read()
        if not split.prompts:
            stretches = stripped_lines(stretches) if by_line else pieces(stretches, tokenizer)
        _write(path, f"tokenizing {name}", split, stretches, tokenizer)

    return cache.cached(path, lambda: _read(path), write)


def _read(path: Path) -> tuple[np.ndarray, dict]:
    """Raises FileNotFoundError or DamagedError."""
    sealed = cache.read_json(path.with_suffix(".json"))
    with open(path, "rb") as file:
        if cache.checksum(file) != sealed["checksum"]:
            raise cache.DamagedError("wrong checksum")
        return _map(file), sealed["counts"]


def _map(file: BinaryIO) -> np.ndarray:
    file.seek(0)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype, "r", file.tell(), shape)


def _write(path: Path, title: str, split: Split, stretches: Stream, tokenizer: Tokenizer) -> None:
    token = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.int32)
    dtype = np.dtype([("token", token), ("scored", np.bool_)]) if split.prompts else token
    begin, close = (np.array(ids, np.int32) for ids in (tokenizer.begin, tokenizer.close))
    counts = {"tokens": 0, "bytes": 0, "documents": 0, "sha256": split.sha256}
    counts |= {"scored": 0} if split.prompts else {}
    bar = tqdm(desc=title, unit="B", unit_scale=True, total=split.size)
    with cache.replacing(path) as file, bar:
        _write_header(file, dtype, 0)
        starts = bare = True  # bare: no token of the document has been written, so none is scored
        for batch in _batches(stretches):
            begun = [starts, *(ends for _, ends in batch[:-1])]
            rows = tokenizer.encode_batch([text for text, _ in batch], begun)
            for ids_n, (_, ends) in zip(rows, batch, strict=True):
                row = [begin[: starts * len(begin)], ids_n, close[: ends * len(close)]]
                row_n = np.concatenate(row).astype(token)
                counts["tokens"] += len(row_n)
                if split.prompts:
                    scored_n = np.full(len(row_n), not starts)
                    scored_n[:1] &= not bare
                    bare = ends or (bare and not len(row_n))
                    counts["scored"] += int(scored_n.sum())
                    row_n = with_scores(row_n, scored_n)
                file.write(row_n.tobytes())
                counts["documents"] += ends
                starts = ends
            size = sum(len(text.encode()) for text, _ in batch)
            counts["bytes"] += size
            bar.update(size)
        _write_header(file, dtype, counts["tokens"])
        checksum = cache.checksum(file)
    cache.write_json(path.with_suffix(".json"), {"checksum": checksum, "counts": counts})


def with_scores(tokens_N: np.ndarray, scored) -> np.ndarray:
    """Records of tokens and whether each is scored (one for all, or [N])."""
    records_N = np.empty(len(tokens_N), [("token", tokens_N.dtype), ("scored", np.bool_)])
    records_N["token"], records_N["scored"] = tokens_N, scored
    return records_N


def _write_header(file, dtype: np.dtype, n: int) -> None:
    """Write a .npy header; numpy pads it so that its size does not depend on `n`."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(stream: Stream) -> Iterator[list[tuple[str, bool]]]:
    """Lists of pieces, each about BATCH_BYTES long."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece[0].encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
