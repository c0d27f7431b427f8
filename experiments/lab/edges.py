"""Edges of decay: where, along runs that differ in coupled decay alone, something is lost.

The definitions that `critical_decay` predicts and measures. Every threshold that `verdict` has is
taken from there.
"""

import math
from collections.abc import Sequence

import numpy as np

HALF = 0.5  # of the first logit spread, and of the seeds
ALIVE = 0.1  # share of the mean initial norm that a row of the output matrix has while it is alive
# What counts as right. Edges: a factor; step of half the spread: a share; loss: nats.
EDGE_FACTOR, STEP_SHARE, LOSS_NATS = 2.0, 0.1, 0.3


def crossing(decays: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The least decay at which `values` pass `level`, between neighbours on a log axis.

    `decays` ascend and are positive. The side of the first value says the direction. None when no
    value lies beyond the level: the edge is above the largest decay.
    """
    logs, x = np.log(np.asarray(decays, float)), np.asarray(values, float) - level
    beyond = np.flatnonzero(np.sign(x) != np.sign(x[0]))
    if not len(beyond):
        return None
    i = beyond[0]
    return float(math.exp(np.interp(0, *_ascending(x[i - 1 : i + 1], logs[i - 1 : i + 1]))))


def _ascending(x, y):
    return (x, y) if x[0] < x[1] else (x[::-1], y[::-1])


def onset(decays, least_spread_SN) -> float | None:
    """The decay at which half of the S seeds reach half of the initial logit spread in stage 1.

    `least_spread_SN`: the least share of the first spread over the evaluations of stage 1, by seed
    and decay. None: none of the decays does it, or the least of them does already.
    """
    middle_N = np.median(np.asarray(least_spread_SN, float), axis=0)
    return crossing(decays, middle_N, HALF) if middle_N[0] > HALF else None


def outcome(decays, learned_SN) -> float | None:
    """The decay at which half of the seeds have not learned (`verdict.learned`) at the last step.

    None: all decays learn, or already the least does not.
    """
    share_N = np.mean(np.asarray(learned_SN, float), axis=0)
    return crossing(decays, share_N, HALF) if share_N[0] > HALF else None


def blind(decays, loss_SN, unigram: float, uniform: float) -> float | None:
    """The decay at which the mean loss passes the middle between unigram's and ln V: the word
    frequencies are half lost. None as for the others."""
    mean_N, middle = np.mean(np.asarray(loss_SN, float), axis=0), (unigram + uniform) / 2
    return crossing(decays, mean_N, middle) if mean_N[0] < middle else None


def right_edge(predicted: float | None, measured: float | None) -> bool | None:
    """Within EDGE_FACTOR; None where either is missing: nothing is compared."""
    if predicted is None or measured is None:
        return None
    return abs(math.log(predicted / measured)) <= math.log(EDGE_FACTOR)
