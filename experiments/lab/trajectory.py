"""Collapses and recoveries along a run, from its distinct predictions and its loss.

All functions take evaluations in the order of their steps, without the one at step 0 (the report's
first is step 5). Distinct predictions decide nothing by themselves: a recovery here also needs the
loss, and a run that learns word frequencies passes through few distinct predictions too.
"""

from dataclasses import dataclass

import numpy as np

from bitnet_jax.metrics import DISTINCT, LOSS
from bitnet_jax.verdict import SEVERE
from experiments.lab.finished import Finished

RECOVERED = 10  # at least max(this, 3 x SEVERE) distinct predictions ...
IN_A_ROW = 3  # ... in so many evaluations, with a loss no higher than at the collapse


@dataclass(frozen=True)
class Trajectory:
    """Evaluations of one replicate: steps, distinct predictions, held-out loss (nats), all [N]."""

    steps: np.ndarray
    unique: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Episode:
    """A severe collapse: its first step, its loss there (nats), the step of its recovery."""

    start: int
    loss: float
    recovery: int | None
    count_only: int | None  # first time that the count recovered while the loss was higher


def of_run(run: Finished) -> list[Trajectory]:
    """The trajectory of each replicate."""
    unique, loss = run.column(DISTINCT), run.column(LOSS)
    return [Trajectory(run.steps[1:], u[1:], x[1:]) for u, x in zip(unique, loss, strict=True)]


def first_severe(path: Trajectory) -> int | None:
    """First step with fewer than SEVERE distinct predictions."""
    return _first(path.steps, path.unique < SEVERE)


def first_complete(path: Trajectory) -> int | None:
    """First step with one distinct prediction."""
    return _first(path.steps, path.unique == 1)


def episodes(path: Trajectory) -> list[Episode]:
    """Severe collapses; each lasts to its recovery, and only then can the next one start.

    The recovery is the first of IN_A_ROW evaluations that all have max(RECOVERED, 3 x SEVERE)
    distinct predictions or more and a loss no higher than at the start of the collapse.
    """
    many = path.unique >= max(RECOVERED, 3 * SEVERE)
    collapses, i = [], 0
    while i < len(path.steps):
        if path.unique[i] >= SEVERE:
            i += 1
            continue
        no_higher = path.loss <= path.loss[i]
        after = np.arange(len(path.steps)) > i
        end = _first(np.arange(len(path.steps)), _run_starts(many & no_higher & after))
        counts = _first(path.steps, _run_starts(many & after))
        recovery = None if end is None else int(path.steps[end])
        count_only = counts if counts != recovery else None
        collapses.append(Episode(int(path.steps[i]), float(path.loss[i]), recovery, count_only))
        if end is None:
            break
        i = end
    return collapses


def half_step(steps: np.ndarray, ratio: np.ndarray) -> float | None:
    """First step at which `ratio` has fallen to 1/2, interpolated; None when it never has."""
    below = np.flatnonzero(ratio <= 0.5)
    if not len(below):
        return None
    i = below[0]
    at = np.interp(0.5, ratio[i - 1 : i + 1][::-1], steps[i - 1 : i + 1][::-1])
    return round(float(at), 2)


def _first(steps, condition) -> int | None:
    at = np.flatnonzero(condition)
    return int(steps[at[0]]) if len(at) else None


def _run_starts(condition) -> np.ndarray:
    """Where a row of IN_A_ROW true values begins."""
    padded = np.concatenate([condition, np.zeros(IN_A_ROW - 1, bool)])
    return np.lib.stride_tricks.sliding_window_view(padded, IN_A_ROW).all(axis=1)
