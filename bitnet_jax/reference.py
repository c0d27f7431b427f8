"""Reference predictors fitted on the training tokens: what a collapse number is compared with.

Uniform, unigram, bigram, and the tempered unigram: the best a model can do that ignores its input.
All losses and entropies are in nats.
"""

import numpy as np
from scipy import sparse
from scipy.special import entr, xlogy

FIT_TOKENS = 50_000_000  # the predictors are fitted on at most this many tokens from the start
CURVE_SCALES = tuple(i / 20 for i in range(25))
CHUNK_ROWS = 64  # dense rows [V] of the bigram held at once


def unigram_probs(tokens_N, vocab_size: int, alpha: float = 0.1) -> np.ndarray:
    """Add-alpha token frequencies, float64 [V]."""
    counts_V = np.bincount(tokens_N, minlength=vocab_size) + alpha
    return counts_V / counts_V.sum()


def references(train_N, vocab_size: int, held_out, weights, tracked) -> dict:
    """Score the predictors: a JSON-able dict.

    `held_out` windows [n, L+1] with `weights` [n, L] give "loss" and "entropy", means over scored
    positions; `tracked` windows [m, L+1] give "distinct", the number of distinct predictions
    (argmax, ties to the lowest id) over all their positions, beside the distinct targets there.
    """
    fit_N = np.asarray(train_N[:FIT_TOKENS]).astype(np.int64)
    unigram_V = unigram_probs(fit_N, vocab_size)
    target_counts_V = np.bincount(
        held_out[:, 1:].ravel(), weights=weights.ravel(), minlength=vocab_size
    )
    unigram = unigram_curve(unigram_V, target_counts_V, [1.0])
    uniform = float(np.log(vocab_size))
    return {
        "positions": int(weights.sum()),
        "tracked_positions": int(tracked[:, 1:].size),
        "targets": {"distinct": len(np.unique(tracked[:, 1:]))},
        "uniform": {"loss": uniform, "entropy": uniform, "distinct": 1},
        "unigram": {"loss": unigram["loss"][0], "entropy": unigram["entropy"][0], "distinct": 1},
        "bigram": _score_bigram(fit_N, unigram_V, held_out, weights, tracked),
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


def bigram_counts(tokens_N, vocab_size: int) -> sparse.csr_array:
    """How often token y follows token x, as sparse rows x: int64 [V, V]."""
    pairs = (np.ones(len(tokens_N) - 1, np.int64), (tokens_N[:-1], tokens_N[1:]))
    return sparse.coo_array(pairs, shape=(vocab_size, vocab_size)).tocsr()


def bigram_rows(counts_VV: sparse.csr_array, unigram_V, contexts_C) -> np.ndarray:
    """p(y | x) by Witten-Bell interpolation with the unigram, float64 [C, V].

    p(y|x) = (c(x,y) + T(x) p(y)) / (c(x) + T(x)), T(x) the number of distinct followers of x
    (Witten & Bell 1991; Chen & Goodman 1998, section 2.6); an unseen x gets the unigram.
    """
    counts_CV = counts_VV[contexts_C]
    kinds_C1 = np.maximum(np.diff(counts_CV.indptr), 1)[:, None]
    rows_CV = counts_CV.toarray() + kinds_C1 * unigram_V
    return rows_CV / (counts_CV.sum(axis=1)[:, None] + kinds_C1)


def _score_bigram(fit_N, unigram_V, held_out, weights, tracked) -> dict:
    counts_VV = bigram_counts(fit_N, len(unigram_V))
    contexts_n, targets_n, weights_n = (
        a.ravel() for a in (held_out[:, :-1], held_out[:, 1:], weights)
    )
    order_n = np.argsort(contexts_n, kind="stable")
    contexts_n, targets_n, weights_n = (a[order_n] for a in (contexts_n, targets_n, weights_n))
    followed = np.unique(tracked[:, :-1])
    needed = np.union1d(contexts_n, followed)
    loss = entropy = 0.0
    predictions = set()
    for start in range(0, len(needed), CHUNK_ROWS):
        contexts_C = needed[start : start + CHUNK_ROWS]
        rows_CV = bigram_rows(counts_VV, unigram_V, contexts_C)
        here = slice(*np.searchsorted(contexts_n, [contexts_C[0], contexts_C[-1] + 1]))
        row_n = np.searchsorted(contexts_C, contexts_n[here])
        loss -= weights_n[here] @ np.log(rows_CV[row_n, targets_n[here]])
        entropy += weights_n[here] @ entr(rows_CV).sum(axis=1)[row_n]
        predictions |= set(rows_CV[np.isin(contexts_C, followed)].argmax(axis=1).tolist())
    total = weights.sum(dtype=np.float64)
    return {
        "loss": float(loss / total),
        "entropy": float(entropy / total),
        "distinct": len(predictions),
    }
