"""Statistics of logits: spread, modes, gaps, ties, and the error of softmax in few bits. Pure.

Arrays are [N, V]: positions, vocabulary. Where nothing else is said, numbers are computed in
float64 from float32 logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr, rel_entr

from bitnet_jax.shrink import gaussian_entropy

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)  # 100: the largest


def describe(logits_NV) -> dict[str, float]:
    """Every number of this module, flat: percentiles `p1` .. `p100`, `float32/*`, `bfloat16/*`.

    `std` is the root of the mean variance over the vocabulary, `gaussian_entropy` the entropy that
    it gives, `shared` the part of that variance which no context changes and `context_std` the root
    of the rest; `gap` is the median distance of the two largest logits, `distinct` counts argmax
    tokens, and `mode_share` is the share of positions of the most frequent one.
    """
    z_NV = np.asarray(logits_NV, np.float32)
    zc_NV = centred(z_NV)
    top2_N2 = np.partition(z_NV, -2, axis=-1)[:, -2:]
    counts = np.unique(z_NV.argmax(-1), return_counts=True)[1]
    spread, shared = float(np.mean(np.square(zc_NV))), shared_direction(zc_NV)
    return {
        **{f"p{p}": float(np.percentile(zc_NV, p)) for p in PERCENTILES},
        "std": spread**0.5,
        "skewness": skewness(zc_NV),
        "bimodality": bimodality(zc_NV),
        "shared": shared,
        "context_std": (spread * max(0.0, 1 - shared)) ** 0.5,
        "entropy": float(np.mean(entropy(softmax(z_NV)))),
        "gaussian_entropy": gaussian_entropy(z_NV.shape[-1], spread**0.5),
        "distinct": len(counts),
        "mode_share": float(counts.max() / len(z_NV)),
        "gap": float(np.median(top2_N2[:, 1] - top2_N2[:, 0])),
        **{f"float32/{k}": v for k, v in precision_loss(z_NV, jnp.float32).items()},
        **{f"bfloat16/{k}": v for k, v in precision_loss(z_NV, jnp.bfloat16).items()},
    }


def centred(z_NV) -> np.ndarray:
    """z minus its mean over the vocabulary, which softmax does not see."""
    z_NV = np.asarray(z_NV, np.float64)
    return z_NV - z_NV.mean(-1, keepdims=True)


def softmax(z_NV) -> np.ndarray:
    """exp(z) / sum exp(z) over the vocabulary."""
    e_NV = np.asarray(z_NV, np.float64)
    e_NV = np.exp(e_NV - e_NV.max(-1, keepdims=True))
    return e_NV / e_NV.sum(-1, keepdims=True)


def entropy(q_NV) -> np.ndarray:
    """-sum q ln q of each position, nats [N]."""
    return entr(q_NV).sum(-1)


def skewness(x) -> float:
    """Third standardised moment of all entries."""
    x = np.asarray(x, np.float64)
    return float(np.mean((x - x.mean()) ** 3) / x.std() ** 3)


def bimodality(x) -> float:
    """(skewness^2 + 1) / kurtosis of all entries, in (0, 1] (Pearson 1929, SAS's coefficient).

    1 for two points, 5/9 for the uniform distribution, 1/3 for a normal one. More than 5/9 suggests
    more than one mode; so does strong skewness, which reaches it with one mode.
    """
    x = np.asarray(x, np.float64)
    kurtosis = np.mean((x - x.mean()) ** 4) / x.var() ** 2
    return float((skewness(x) ** 2 + 1) / kurtosis)


def shared_direction(zc_NV) -> float:
    """|mean_n z_n|^2 / mean_n |z_n|^2 of centred logits: the part that no context changes.

    1 where all positions have the same logits, 1 / N for independent ones.
    """
    return float(np.sum(np.square(zc_NV.mean(0))) / np.mean(np.sum(np.square(zc_NV), axis=-1)))


def precision_loss(z_NV, dtype) -> dict[str, float]:
    """What softmax loses when logits and softmax are held in `dtype`, against float64.

    `tied` and `argmax_changed` are shares of positions: two or more logits share the first place;
    the first argmax of the rounded logits, and of q (`prediction_changed`), differs from that of
    the float32 logits. `sum_error` is the largest |sum q - 1|, `entropy_error` the absolute error
    of the mean entropy, `kl` the mean of KL(exact || renormalised q), both in nats.
    """
    z_NV = np.asarray(z_NV, np.float32)
    exact_NV = softmax(z_NV)
    rounded_NV = jnp.asarray(z_NV).astype(dtype)
    q_NV = np.asarray(jax.nn.softmax(rounded_NV, axis=-1).astype(jnp.float32), np.float64)
    z_dtype_NV = np.asarray(rounded_NV.astype(jnp.float32))
    top_N1 = z_dtype_NV.max(-1, keepdims=True)
    sum_N = q_NV.sum(-1)
    kl_N = rel_entr(exact_NV, q_NV / sum_N[:, None]).sum(-1)
    argmax_N = z_NV.argmax(-1)
    return {
        "tied": float(np.mean((z_dtype_NV == top_N1).sum(-1) > 1)),
        "argmax_changed": float(np.mean(z_dtype_NV.argmax(-1) != argmax_N)),
        "prediction_changed": float(np.mean(q_NV.argmax(-1) != argmax_N)),
        "sum_error": float(np.max(np.abs(sum_N - 1))),
        "entropy_error": float(abs(np.mean(entropy(q_NV)) - np.mean(entropy(exact_NV)))),
        "kl": float(np.mean(kl_N)),
    }
