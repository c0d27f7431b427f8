"""Cached token files of a corpus, and batches of windows as a function of (seed, step).

A split is tokenised once into a file of the cache folder, with a mark of end of text after every
document, and memory-mapped from there. Window i of a split starts at token i * seq_len, or, where
documents have prompts, as `packed` says. A Batch is complete: nobody who receives one needs to know
which token ends a text, or belongs to a prompt.
"""

import functools
from dataclasses import dataclass

import flax.struct
import jax
import numpy as np

from bitnet_jax import corpus
from bitnet_jax import tokenizer as tokenizers
from bitnet_jax.config import DataConfig
from bitnet_jax.fields import UserError, shown
from bitnet_jax.tokens import cached_tokens, pieces


@dataclass(frozen=True)
class TokenData:
    """The tokens of a corpus, memory-mapped (uint16, or int32 for more than 65536 tokens).

    Where documents have prompts, `*_scored_N` says of each token whether it is scored.
    """

    train_N: np.ndarray
    validation_N: np.ndarray
    tokenizer: tokenizers.Tokenizer
    identity: dict  # JSON values: source, sha256, tokenizer, and per split its counts and sha256
    train_scored_N: np.ndarray | None = None
    validation_scored_N: np.ndarray | None = None


def load(cfg: DataConfig) -> TokenData:
    """Tokens of both splits, from the cache or made now; raises UserError for unusable corpora."""
    sha256, splits = corpus.open_corpus(cfg)
    train = splits["train"]
    tokenizer = tokenizers.load_tokenizer(
        cfg.tokenizer,
        train.sha256,
        lambda: (text for text, _ in pieces(train.read())),
    )
    tokens, identity = {}, {"source": cfg.corpus, "sha256": sha256}
    identity["tokenizer"] = {"name": tokenizer.name, "key": tokenizer.key}
    for name, split in splits.items():
        tokens[name], identity[name] = cached_tokens(name, split, tokenizer, cfg.stripped_lines)
        check_length(cfg, name, len(tokens[name]))
    if cfg.prompt is None:
        return TokenData(tokens["train"], tokens["validation"], tokenizer, identity)
    ids = (tokens[name]["token"] for name in ("train", "validation"))
    scored = (tokens[name]["scored"] for name in ("train", "validation"))
    return TokenData(*ids, tokenizer, identity, *scored)


def n_windows(n_tokens: int, seq_len: int) -> int:
    """Number of windows: each is seq_len inputs and the token after them."""
    return (n_tokens - 1) // seq_len


def check_length(cfg: DataConfig, split: str, n_tokens: int) -> None:
    """Raise UserError if a split has no window."""
    if n_windows(n_tokens, cfg.seq_len) < 1:
        raise UserError(
            f"data.corpus={shown(cfg.corpus, 200)}: split {split} has {n_tokens} tokens, fewer "
            f"than the {cfg.seq_len + 1} of one window (data.seq_len={cfg.seq_len} and the next "
            "token); give more text, another data.holdout, or held-out text by data.validation"
        )


@flax.struct.dataclass
class Batch:
    """Inputs, next tokens and how much each counts: [..., L], in NumPy or in JAX.

    A target of weight 0 is not scored.
    """

    inputs: jax.Array | np.ndarray  # int32
    targets: jax.Array | np.ndarray  # int32
    weights: jax.Array | np.ndarray  # float32


@dataclass(frozen=True)
class Windows:
    """The windows of one split, and what a batch of them scores.

    `score_last` and `score_end` are those of DataConfig; an evaluation scores every last position.
    With `scored_N`, windows are `packed`, and cut in NumPy alone.
    """

    tokens_N: np.ndarray
    seq_len: int
    end_of_text: int
    score_last: bool
    score_end: bool
    scored_N: np.ndarray | None = None

    def __len__(self) -> int:
        if self.scored_N is not None:
            return len(self.packed[0])
        return n_windows(len(self.tokens_N), self.seq_len)

    @functools.cached_property
    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """`packed` of the split: [W], [W]."""
        return packed(self.scored_N, self.seq_len)

    def cut(self, ids, tokens_N=None) -> Batch:
        """The windows `ids` (of any shape) as a Batch [*ids, L].

        In NumPy from the split; in JAX from `tokens_N`, the same tokens on the device.
        """
        if self.scored_N is not None:
            return self._cut_packed(np.asarray(ids))
        tokens_N = self.tokens_N if tokens_N is None else tokens_N
        # np.int64 keeps numpy's int32 ids from overflowing past 2**31 tokens; JAX stays in int32.
        index = ids[..., None] * np.int64(self.seq_len) + np.arange(self.seq_len + 1)
        windows = tokens_N[index].astype("int32")
        targets = windows[..., 1:]
        scored_L = np.arange(self.seq_len) < self.seq_len - (not self.score_last)
        scored = (targets != self.end_of_text) | self.score_end
        return Batch(windows[..., :-1], targets, (scored & scored_L).astype("float32"))

    def _cut_packed(self, ids) -> Batch:
        """Of a window only its own tokens are scored: what follows them is another window's."""
        starts_W, lengths_W = self.packed
        place_L = np.arange(self.seq_len + 1)
        index = np.minimum(starts_W[ids][..., None] + place_L, len(self.tokens_N) - 1)
        windows = self.tokens_N[index].astype("int32")
        own = place_L[1:] < lengths_W[ids][..., None]
        targets = windows[..., 1:]
        scored = self.scored_N[index[..., 1:]] & own
        scored &= (targets != self.end_of_text) | self.score_end
        scored &= place_L[1:] < self.seq_len + self.score_last
        return Batch(windows[..., :-1], targets, scored.astype("float32"))


def packed(scored_N: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where windows of documents with prompts start, and how many tokens each holds: [W], [W].

    A window begins with a prompt and holds the whole documents that fit into its seq_len + 1
    tokens. A document that is longer goes on in further windows, each of which begins with the last
    token of the one before: its prompt is out of sight there. Every scored token is the target of
    one window; windows without any are left out.
    """
    n, room = len(scored_N), seq_len + 1
    begins = np.flatnonzero(~scored_N & np.append(True, scored_N[:-1]))
    ends = np.append(begins[1:], n)
    starts, lengths = [], []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if starts and end - starts[-1] <= room and lengths[-1] == begin - starts[-1]:
            lengths[-1] = end - starts[-1]
            continue
        for start in range(begin, max(begin + 1, end - 1), seq_len):
            starts.append(start)
            lengths.append(min(room, end - start))
    starts_W, lengths_W = np.array(starts, np.int64), np.array(lengths, np.int64)
    before_N = np.concatenate([[0], np.cumsum(scored_N)])  # scored tokens before each place
    kept_W = before_N[starts_W + lengths_W] > before_N[starts_W + 1]
    return starts_W[kept_W], lengths_W[kept_W]


def beginnings(tokens: TokenData, n: int, n_prompt: int, n_new: int):
    """Where n held-out beginnings start, evenly spaced, and how many tokens they have: [n], [n].

    `n_prompt` tokens of the text, with room for `n_new` after them; where documents have prompts, a
    prompt, of which the last `n_prompt` tokens at most.
    """
    scored_N = tokens.validation_scored_N
    if scored_N is None:
        last = max(0, len(tokens.validation_N) - n_prompt - n_new)
        return np.linspace(0, last, n).astype(int), np.full(n, n_prompt)
    before_N = np.append(True, scored_N[:-1])
    documents, answers = np.flatnonzero(~scored_N & before_N), np.flatnonzero(scored_N & ~before_N)
    answer_n = answers[np.linspace(0, len(answers) - 1, n).astype(int)]
    document_n = documents[np.searchsorted(documents, answer_n) - 1]
    start_n = np.maximum(document_n, answer_n - n_prompt)
    return start_n, answer_n - start_n


def train_windows(cfg: DataConfig, tokens: TokenData) -> Windows:
    """The windows of the training split as training scores them."""
    end = tokens.tokenizer.end_of_text
    scored_N = tokens.train_scored_N
    windows = Windows(tokens.train_N, cfg.seq_len, end, cfg.score_last, cfg.score_end, scored_N)
    if scored_N is not None and not len(windows):
        raise UserError(
            f"data.corpus={shown(cfg.corpus, 200)}: no window of data.seq_len={cfg.seq_len} has a "
            "scored token"
        )
    return windows


def held_out_windows(cfg: DataConfig, tokens: TokenData) -> Windows:
    """The windows of the validation split as evaluations score them."""
    end = tokens.tokenizer.end_of_text
    scored_N = tokens.validation_scored_N
    return Windows(tokens.validation_N, cfg.seq_len, end, True, cfg.score_end, scored_N)


def window_ids(cfg: DataConfig, n_windows: int, seed: int, start: int, end: int) -> np.ndarray:
    """Windows of the batches of the steps start .. end - 1 (from 0) for one seed: int32 [K, B].

    `shuffled` takes each window once per epoch, in an order drawn from (seed, epoch); `sequential`
    takes them in order from window seed * n / 8 on. A batch may straddle epochs.
    """
    position = np.arange(start * cfg.batch_size, end * cfg.batch_size)
    if cfg.order == "sequential":
        ids = (seed * n_windows // 8 + position) % n_windows
    else:
        epoch, place = np.divmod(position, n_windows)
        ids = np.concatenate(
            [permuted(place[epoch == e], n_windows, (seed, int(e))) for e in np.unique(epoch)]
        )
    return ids.astype(np.int32).reshape(end - start, cfg.batch_size)


def permuted(index: np.ndarray, n: int, key: tuple[int, int]) -> np.ndarray:
    """Where a permutation of 0 .. n - 1, drawn from `key`, takes each index: uint64.

    A Feistel network of 6 rounds over the next power of 4, walked along its cycles until the value
    is below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): no table of n
    entries. Its round function is the finaliser of SplitMix64 (Steele et al. 2014).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def encrypt(x):
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        return left << half | right

    out = encrypt(np.asarray(index, np.uint64))
    while (outside := out >= n).any():
        out[outside] = encrypt(out[outside])
    return out


def spaced(windows: Windows, batch_size: int, n_batches: int) -> Batch:
    """Evenly spaced, distinct windows, `n_batches` of them at most: [N, B, L].

    Raises UserError when the split has fewer windows than one batch.
    """
    available = len(windows)
    if available < batch_size:
        raise UserError(
            f"the held-out text has {available} windows of {windows.seq_len} tokens, fewer than "
            f"data.batch_size={batch_size}; give more text (data.validation, data.holdout)"
        )
    n_batches = min(n_batches, available // batch_size)
    ids = np.arange(n_batches * batch_size) * available // (n_batches * batch_size)
    return windows.cut(ids.reshape(n_batches, batch_size))


def small_block(cfg: DataConfig, windows: Windows) -> Batch:
    """The held-out windows of every evaluation: [eval_batches, B, L]; UserError without as many."""
    available, needed = len(windows), cfg.eval_batches * cfg.batch_size
    if available < needed:
        raise UserError(
            f"data.corpus={cfg.corpus}: split validation has {available} windows of "
            f"{cfg.seq_len} tokens, but data.eval_batches={cfg.eval_batches} x "
            f"data.batch_size={cfg.batch_size} needs {needed}"
        )
    return spaced(windows, cfg.batch_size, cfg.eval_batches)


def large_block(cfg: DataConfig, windows: Windows) -> Batch:
    """Held-out windows of at least `held_out_positions` positions, or all there are: [N, B, L]."""
    per_batch = cfg.batch_size * cfg.seq_len
    return spaced(windows, cfg.batch_size, -(-cfg.held_out_positions // per_batch))
