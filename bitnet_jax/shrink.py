"""What decay alone does to weights, and what that does to logits: the theory of the collapse. Pure.

A weight whose loss gradient is small against coupled decay moves, through Adam's normaliser,
towards 0 by the learning rate at every update. From that follow, without a free parameter, how many
weights stay large, how the logits shrink, and when.
"""

import math

import numpy as np

from bitnet_jax.config import Hyper, OptimConfig, RunConfig
from bitnet_jax.optim import by_stage, learning_rate


def summed_rate(run: RunConfig, hyper: Hyper) -> np.ndarray:
    """Sum of the learning rates of updates 1 .. n, for n = 0 .. T: [T + 1], float64."""
    rates = np.asarray(learning_rate(hyper, np.arange(1, run.steps + 1), run), np.float64)
    return np.concatenate([[0.0], np.cumsum(rates)])


def starved_weight(w0: np.ndarray, cfg: OptimConfig, run: RunConfig, hyper: Hyper) -> np.ndarray:
    """Where weights end that start at `w0` and receive nothing but coupled decay, float64.

    The scalar Adam recursion (Kingma & Ba 2015, algorithm 1) with gradient decay_n * w: what
    happens to the embedding rows of tokens that the batches do not contain.
    """
    w = np.array(w0, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    lr = np.diff(summed_rate(run, hyper))
    n_all = np.arange(1, run.steps + 1)
    decay = np.asarray(by_stage(n_all, run, hyper.coupled_1, hyper.coupled_2), np.float64)
    for n in n_all:
        g = decay[n - 1] * hyper.decay_rest * w
        m = cfg.beta1 * m + (1 - cfg.beta1) * g
        v = cfg.beta2 * v + (1 - cfg.beta2) * g * g
        m_hat, v_hat = m / (1 - cfg.beta1**n), v / (1 - cfg.beta2**n)
        w = w - lr[n - 1] * m_hat / (np.sqrt(v_hat) + cfg.eps)
    return w


def shrink_limit(w0: np.ndarray, total: float) -> np.ndarray:
    """`starved_weight` when every update is a full step: |w0| less the summed rate, down to 0."""
    w0 = np.asarray(w0, np.float64)
    return np.sign(w0) * np.maximum(np.abs(w0) - total, 0)


def count_above(
    threshold: float, size: int, cfg: OptimConfig, run: RunConfig, hyper: Hyper
) -> float:
    """How many of `size` weights drawn from N(0, 1) `starved_weight` leaves above `threshold`."""
    start = np.linspace(threshold, threshold + 5, 50_001)
    end = starved_weight(start, cfg, run, hyper)
    return size * math.erfc(np.interp(threshold, end, start) / math.sqrt(2))


def spread_ratio(total: np.ndarray, bound: float) -> np.ndarray:
    """Standard deviation of logits over that at the start, once the head's rates sum to `total`.

    A head drawn from U(-bound, bound) and shrunk by `shrink_limit` has the mean square
    (bound - total)^3 / (3 bound), and logits of normalised states are proportional to its root:
    (1 - total / bound)^1.5, 0 beyond the bound.
    """
    return np.maximum(1 - np.asarray(total, np.float64) / bound, 0) ** 1.5


def half_spread_step(run: RunConfig, hyper: Hyper, bound: float) -> float | None:
    """Update (interpolated) at which `spread_ratio` is 1/2; None when the run ends before it."""
    total, half = summed_rate(run, hyper), bound * (1 - 0.5 ** (2 / 3))
    if total[-1] < half:
        return None
    return float(np.interp(half, total, np.arange(run.steps + 1)))


def gaussian_entropy(vocab: int, std: float) -> float:
    """ln V - std^2 / 2: entropy of the softmax of V independent draws from N(0, std^2).

    From ln sum exp(z) = ln V + std^2 / 2 and E_q z = std^2 for large V; nats.
    """
    return float(np.log(vocab) - std**2 / 2)


def scale_slope(loss: float, entropy: float) -> float:
    """d loss / d ln s of logits s z, at s = 1: loss - entropy, nats.

    loss = ln sum exp(z) - z_y and entropy = ln sum exp(z) - E_q z, so both sides are E_q z - z_y.
    Negative: larger logits of the same shape would lower the loss.
    """
    return loss - entropy
