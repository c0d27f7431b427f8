"""Reference predictors fitted on the training tokens: what a collapse number is compared with.

Uniform, unigram, bigram, and the tempered unigram: the best a model can do that ignores its input.
All losses and entropies are in nats.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from scipy import sparse
from scipy.special import entr, xlogy

from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError, shown

FIT_TOKENS = 50_000_000  # the predictors are fitted on at most this many tokens from the start
COUNT_TOKENS = 1 << 22  # tokens counted at once
CURVE_SCALES = tuple(i / 20 for i in range(25))
CHUNK_ROWS = 64  # dense rows [V] of the bigram held at once


def unigram_probs(tokens_N, vocab_size: int, alpha: float = 0.1, scored_N=None) -> np.ndarray:
    """Add-alpha token frequencies, of the scored tokens where that is given; float64 [V]."""
    counts_V = np.zeros(vocab_size)
    for start in range(0, len(tokens_N), COUNT_TOKENS):
        chunk_N = tokens_N[start : start + COUNT_TOKENS]
        if scored_N is not None:
            chunk_N = chunk_N[scored_N[start : start + COUNT_TOKENS]]
        counts_V += np.bincount(chunk_N, minlength=vocab_size)
    return smoothed(counts_V, alpha)


def smoothed(counts_V, alpha: float = 0.1) -> np.ndarray:
    """Add-alpha frequencies of counts, float64 [V]."""
    return (counts_V + alpha) / (counts_V + alpha).sum()


def read_counts(path: Path) -> np.ndarray:
    """Counts of the tokens of a vocabulary, float64 [V], those that never occur among them.

    A file of NumPy (.npy), of JSON (a list, or an object with a count per token), or of text, a
    count at the end of each line. Raises UserError.
    """
    try:
        if path.suffix == ".npy":
            counts = np.load(path)
        else:
            text = path.read_text(encoding="utf-8")
            is_json = text.lstrip()[:1] in ("[", "{")
            counts = json.loads(text) if is_json else _last_words(path, text)
            counts = list(counts.values()) if isinstance(counts, dict) else counts
        counts_V = np.asarray(counts, np.float64)
    except OSError as error:
        raise UserError(f"--counts {path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--counts {path}: not a list of counts, one for each token") from error
    if counts_V.ndim != 1 or len(counts_V) < 2 or not (counts_V >= 0).all() or not counts_V.sum():
        raise UserError(f"--counts {path}: needs two counts and more, of 0 and above, not all 0")
    return counts_V


def _last_words(path: Path, text: str) -> list[int]:
    counts = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.replace(",", " ").split()[-1:] or [""]
        if not word[0].isascii() or not word[0].isdecimal():
            raise UserError(f"--counts {path}: line {number} ends in no count: {shown(line)!r}")
        counts.append(int(word[0]))
    return counts


@dataclass(frozen=True)
class Scores:
    """Per position [..., L]: losses in nats, the bigram's entropy and its most likely token."""

    unigram_nats: np.ndarray
    bigram_nats: np.ndarray
    bigram_entropy: np.ndarray
    bigram_argmax: np.ndarray


@dataclass(frozen=True)
class Predictors:
    """Unigram and bigram fitted on the first FIT_TOKENS tokens of the training text."""

    unigram_V: np.ndarray
    counts_VV: sparse.csr_array

    def score(self, batch: Batch) -> Scores:
        """What both give on every position of a batch of any shape [..., L]."""
        contexts_N, targets_N = np.ravel(batch.inputs), np.ravel(batch.targets)
        order_N = np.argsort(contexts_N, kind="stable")
        nats_N, entropy_N = np.empty(len(order_N)), np.empty(len(order_N))
        argmax_N = np.empty(len(order_N), np.int64)
        contexts = np.unique(contexts_N)
        sorted_N = contexts_N[order_N]
        for start in range(0, len(contexts), CHUNK_ROWS):
            contexts_C = contexts[start : start + CHUNK_ROWS]
            rows_CV = bigram_rows(self.counts_VV, self.unigram_V, contexts_C)
            here = order_N[slice(*np.searchsorted(sorted_N, [contexts_C[0], contexts_C[-1] + 1]))]
            row_N = np.searchsorted(contexts_C, contexts_N[here])
            nats_N[here] = -np.log(rows_CV[row_N, targets_N[here]])
            entropy_N[here] = entr(rows_CV).sum(axis=1)[row_N]
            argmax_N[here] = rows_CV.argmax(axis=1)[row_N]
        shape = np.shape(batch.targets)
        unigram = -np.log(self.unigram_V)[np.asarray(batch.targets)]
        return Scores(unigram, *(x.reshape(shape) for x in (nats_N, entropy_N, argmax_N)))


def scored_mean(values, batch: Batch) -> float:
    """Mean over the scored positions of a batch."""
    return float((values * batch.weights).sum() / batch.weights.sum(dtype=np.float64))


def fit(train_N, vocab_size: int, scored_N=None) -> Predictors:
    """Fit the predictors on at most FIT_TOKENS tokens; what is not scored is only a context."""
    fit_N = train_N[:FIT_TOKENS]
    scored_N = None if scored_N is None else scored_N[:FIT_TOKENS]
    unigram_V = unigram_probs(fit_N, vocab_size, scored_N=scored_N)
    return Predictors(unigram_V, bigram_counts(fit_N, vocab_size, scored_N))


def references(predictors: Predictors, held_out: Batch, tracked: Batch | None = None) -> dict:
    """Score the predictors: a JSON-able dict.

    `held_out` gives "loss" and "entropy", means over scored positions. "distinct" is the number of
    distinct predictions (argmax, ties to the lowest id) over all positions of a batch of `tracked`
    [R, B, L], beside the distinct targets there: the mean over its R batches. Without `tracked` it
    is counted over all of `held_out`.
    """
    unigram_V, weights = predictors.unigram_V, held_out.weights
    vocab_size = len(unigram_V)
    target_counts_V = np.bincount(
        held_out.targets.ravel(), weights=weights.ravel(), minlength=vocab_size
    )
    scores = predictors.score(held_out)
    counted = jax.tree.map(lambda x: x[None], held_out) if tracked is None else tracked
    argmax_R = predictors.score(counted).bigram_argmax

    def distinct(tokens_R):
        return float(np.mean([len(np.unique(tokens)) for tokens in tokens_R]))

    unigram = unigram_curve(unigram_V, target_counts_V, [1.0])
    uniform = float(np.log(vocab_size))
    return {
        "positions": int(weights.sum()),
        "tracked_positions": int(counted.targets[0].size),
        "targets": {"distinct": distinct(counted.targets)},
        "uniform": {"loss": uniform, "entropy": uniform, "distinct": 1},
        "unigram": {"loss": unigram["loss"][0], "entropy": unigram["entropy"][0], "distinct": 1},
        "bigram": {
            "loss": scored_mean(scores.bigram_nats, held_out),
            "entropy": scored_mean(scores.bigram_entropy, held_out),
            "distinct": distinct(argmax_R),
        },
        "curve": unigram_curve(unigram_V, target_counts_V, CURVE_SCALES),
    }


def unigram_curve(model_probs_V, target_counts_V, scales) -> dict[str, list[float]]:
    """Cross-entropy and entropy of q ~ probs**scale against a distribution of targets.

    Scale 0 is uniform, 1 the unigram itself; a model without context can only lie on this curve
    or above it. Returns lists "scale", "loss", "entropy".
    """
    target_V = target_counts_V / target_counts_V.sum()
    curve = {"scale": [], "loss": [], "entropy": []}
    for scale in scales:
        q_V = model_probs_V**scale
        q_V = q_V / q_V.sum()
        curve["scale"].append(float(scale))
        curve["loss"].append(float(-xlogy(target_V, q_V).sum()))
        curve["entropy"].append(float(entr(q_V).sum()))
    return curve


def bigram_counts(tokens_N, vocab_size: int, scored_N=None) -> sparse.csr_array:
    """How often (scored) token y follows token x, as sparse rows x: int32 [V, V]."""
    counts_VV = sparse.csr_array((vocab_size, vocab_size), dtype=np.int32)
    for start in range(0, len(tokens_N) - 1, COUNT_TOKENS):
        x_N = tokens_N[start : start + COUNT_TOKENS]
        y_N = tokens_N[start + 1 : start + 1 + COUNT_TOKENS]
        x_N = x_N[: len(y_N)]
        if scored_N is not None:
            kept_N = scored_N[start + 1 : start + 1 + COUNT_TOKENS]
            x_N, y_N = x_N[kept_N], y_N[kept_N]
        pairs = (np.ones(len(y_N), np.int32), (x_N, y_N))
        counts_VV += sparse.coo_array(pairs, shape=counts_VV.shape).tocsr()
    return counts_VV


def bigram_rows(counts_VV: sparse.csr_array, unigram_V, contexts_C) -> np.ndarray:
    """p(y | x) by Witten-Bell interpolation with the unigram, float64 [C, V].

    p(y|x) = (c(x,y) + T(x) p(y)) / (c(x) + T(x)), T(x) the number of distinct followers of x
    (Witten & Bell 1991; Chen & Goodman 1998, section 2.6); an unseen x gets the unigram.
    """
    counts_CV = counts_VV[contexts_C]
    kinds_C1 = np.maximum(np.diff(counts_CV.indptr), 1)[:, None]
    rows_CV = counts_CV.toarray() + kinds_C1 * unigram_V
    return rows_CV / (counts_CV.sum(axis=1)[:, None] + kinds_C1)
