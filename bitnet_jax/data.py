"""Cached token files of a corpus, and batches of windows as a function of (seed, step).

A split is tokenised once into a file of the cache folder, with a mark of end of text after every
document, and memory-mapped from there. Window i of a split starts at token i * seq_len.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bitnet_jax import corpus
from bitnet_jax import tokenizer as tokenizers
from bitnet_jax.config import DataConfig, UserError

PIECE_CHARS = 1 << 18  # a document is encoded in pieces of about this size
BATCH_CHARS = 1 << 22  # pieces that are encoded at once, in parallel
CUT = re.compile(r"\S(?=\n)")


@dataclass(frozen=True)
class TokenData:
    """The tokens of a corpus, memory-mapped (uint16, or int32 for more than 65536 tokens)."""

    train_N: np.ndarray
    validation_N: np.ndarray
    tokenizer: tokenizers.Tokenizer
    identity: dict  # JSON values: source, sha256, tokenizer, and per split its counts and sha256


def load(cfg: DataConfig) -> TokenData:
    """Tokens of both splits, from the cache or made now; raises UserError for unusable corpora."""
    sha256, splits = corpus.open_corpus(cfg)
    train = splits["train"]
    tokenizer = tokenizers.load_tokenizer(
        cfg.tokenizer,
        train.sha256,
        lambda: (piece for document in train.documents() for piece in cut_pieces(document)),
    )
    tokens, identity = {}, {"source": cfg.corpus, "sha256": sha256}
    identity["tokenizer"] = {"name": tokenizer.name, "key": tokenizer.key}
    for name, split in splits.items():
        tokens[name], identity[name] = _cached_tokens(name, split, tokenizer)
        check_length(cfg, name, len(tokens[name]))
    return TokenData(tokens["train"], tokens["validation"], tokenizer, identity)


def n_windows(n_tokens: int, seq_len: int) -> int:
    """Number of windows: each is seq_len inputs and the token after them."""
    return (n_tokens - 1) // seq_len


def check_length(cfg: DataConfig, split: str, n_tokens: int) -> None:
    """Raise UserError if a split has no window."""
    if n_windows(n_tokens, cfg.seq_len) < 1:
        raise UserError(
            f"data.corpus={cfg.corpus}: split {split} has {n_tokens} tokens, fewer than the "
            f"{cfg.seq_len + 1} of one window (data.seq_len={cfg.seq_len} and the next token)"
        )


def window_ids(cfg: DataConfig, n_windows: int, data_seed: int, step: int) -> np.ndarray:
    """Windows of the batch of `step` (from 0): int32 [B].

    `shuffled` takes each window once per epoch, in an order drawn from (data_seed, epoch); a batch
    may straddle epochs.
    """
    position_B = step * cfg.batch_size + np.arange(cfg.batch_size)
    if cfg.order == "sequential":
        return (position_B % n_windows).astype(np.int32)
    epoch_B, place_B = np.divmod(position_B, n_windows)
    orders = [_epoch_order(n_windows, data_seed, int(epoch)) for epoch in epoch_B]
    return np.array([order[place] for order, place in zip(orders, place_B, strict=True)], np.int32)


@functools.lru_cache(maxsize=16)
def _epoch_order(n_windows: int, data_seed: int, epoch: int) -> np.ndarray:
    bits = np.random.Philox(key=[data_seed % 2**64, epoch])
    order = np.random.Generator(bits).permutation(np.arange(n_windows, dtype=np.int32))
    order.flags.writeable = False
    return order


def gather(tokens_N, ids, seq_len: int):
    """Cut windows: int32 [..., seq_len + 1] for ids of any shape, in numpy or in JAX."""
    # np.int64 keeps numpy's int32 ids from overflowing past 2**31 tokens; JAX stays in int32.
    index = ids[..., None] * np.int64(seq_len) + np.arange(seq_len + 1)
    return tokens_N[index].astype("int32")


def score_weights(windows, end_of_text: int, score_last: bool):
    """Weight of every target windows[..., 1:]: float32 [..., L], in numpy or in JAX.

    0 where the target is end of text, and on the last position unless `score_last`; else 1.
    """
    target = windows[..., 1:]
    length = target.shape[-1]
    scored_L = np.arange(length) < (length if score_last else length - 1)
    return ((target != end_of_text) & scored_L).astype("float32")


def eval_blocks(cfg: DataConfig, validation_N: np.ndarray) -> np.ndarray:
    """The fixed held-out windows, evenly spaced and distinct: int32 [eval_batches, B, L + 1].

    Raises UserError when the split has fewer windows than that.
    """
    available = n_windows(len(validation_N), cfg.seq_len)
    needed = cfg.eval_batches * cfg.batch_size
    if available < needed:
        raise UserError(
            f"data.corpus={cfg.corpus}: split validation has {available} windows of "
            f"{cfg.seq_len} tokens, but data.eval_batches={cfg.eval_batches} x "
            f"data.batch_size={cfg.batch_size} needs {needed}"
        )
    ids = np.arange(needed) * available // needed
    return gather(validation_N, ids.reshape(cfg.eval_batches, cfg.batch_size), cfg.seq_len)


def first_batch(cfg: DataConfig, train_N: np.ndarray, data_seed: int) -> np.ndarray:
    """The batch of step 0: int32 [B, L + 1]."""
    ids_B = window_ids(cfg, n_windows(len(train_N), cfg.seq_len), data_seed, 0)
    return gather(train_N, ids_B, cfg.seq_len)


def cut_pieces(document: Iterable[str]) -> Iterator[str]:
    """Cut a document (blocks of text) into pieces that encode to the tokens of the whole.

    The cut lies between a non-space character and a newline: GPT-2's pre-tokenisation
    (Radford et al. 2019) always ends a word there, and looks ahead only from white space. Text
    without such a place stays whole.
    """
    rest = ""
    for block in document:
        rest += block
        start = 0
        while match := CUT.search(rest, start + PIECE_CHARS):
            yield rest[start : match.end()]
            start = match.end()
        rest = rest[start:]
    if rest:
        yield rest


def _cached_tokens(name, split, tokenizer) -> tuple[np.ndarray, dict]:
    """Tokens of a split, memory-mapped, and its counts; tokenises unless the cache has them."""
    key = hashlib.sha256(f"{split.sha256} {tokenizer.key}".encode()).hexdigest()[:16]
    path = tokenizers.cache_dir() / f"tokens-{key}.npy"
    cached = _read_cache(path)
    if cached is None:
        with tokenizers.cache_lock(path):
            cached = _read_cache(path)
            if cached is None:
                _write_cache(path, name, split, tokenizer)
                cached = _read_cache(path)
    return cached


def _read_cache(path: Path) -> tuple[np.ndarray, dict] | None:
    """None when there is no cache file, or a damaged one."""
    try:
        counts = json.loads(path.with_suffix(".json").read_text())
        tokens_N = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return (tokens_N, counts) if len(tokens_N) == counts["tokens"] else None


def _write_cache(path: Path, name: str, split: corpus.Split, tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.int32)
    counts = {"tokens": 0, "bytes": 0, "documents": 0, "sha256": split.sha256}
    bar = tqdm(desc=f"tokenizing {name}", unit="B", unit_scale=True)
    with tokenizers.replacing(path) as temporary, open(temporary, "wb") as file, bar:
        _write_header(file, dtype, 0)
        for batch in _batches(split.documents()):
            ids = tokenizer.encode_batch([piece for piece, _ in batch])
            size = sum(len(piece.encode()) for piece, _ in batch)
            for ids_n, (_, last) in zip(ids, batch, strict=True):
                file.write(np.append(ids_n, [tokenizer.end_of_text] * last).astype(dtype).tobytes())
                counts["tokens"] += len(ids_n) + last
                counts["documents"] += last
            counts["bytes"] += size
            bar.update(size)
        _write_header(file, dtype, counts["tokens"])
    with tokenizers.replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(counts))


def _write_header(file, dtype: np.dtype, n: int) -> None:
    """Write a .npy header; numpy pads it so that its size does not depend on `n`."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(documents: Iterator[Iterable[str]]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece, is the last of its document), each list about BATCH_CHARS long."""
    batch, chars = [], 0
    for document in documents:
        pieces = cut_pieces(document)
        piece = next(pieces, None)
        while piece is not None:
            following = next(pieces, None)
            batch.append((piece, following is None))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
            piece = following
    if batch:
        yield batch
