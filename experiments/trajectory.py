"""What the distinct predictions and the loss did over a run: collapses, recoveries, averages.

All functions take evaluations in the order of their steps, without the one at step 0 (the report's
first is step 5). Stage 1 ends at step T // 2, and the evaluation at that step belongs to it.
Unique-token counts decide nothing by themselves: a recovery here also needs the loss, and a run
that learns word frequencies passes through few distinct predictions too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_jax import log
from bitnet_jax.config import RunConfig, UserError
from experiments import stats

SEVERE = 3  # fewer distinct predictions are a severe collapse; exactly 1 is a complete one
RECOVERED = 10  # at least max(this, 3 x SEVERE) distinct predictions ...
IN_A_ROW = 3  # ... in so many evaluations, with a loss no higher than at the collapse
COMPLETE = 0.99  # share of the planned evaluations that an average needs
BLOCK = 20  # evaluations in a block of the bootstrap


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


@dataclass(frozen=True)
class Rate:
    """A share of evaluations of one run; the Wilson interval takes them as independent."""

    count: int
    n: int
    wilson: tuple[float, float]
    bootstrap: tuple[float, float] | None  # None: fewer than two blocks


def read(workdir: Path, index: int) -> Trajectory:
    """The trajectory of replicate `index` from a workdir's metrics.jsonl.

    Raises UserError when it has no evaluation after step 0.
    """
    path = Path(workdir) / "metrics.jsonl"
    rows = [r for r in log.read_rows(path) if r["kind"] == "eval" and r["replicate"] == index]
    rows = [r for r in rows if r["step"]]
    if not rows:
        raise UserError(f"{path}: no evaluation of replicate {index} after step 0")
    keys = ("step", "collapse/unique_tokens", "eval/loss")
    return Trajectory(*(np.array([r[k] for r in rows]) for k in keys))


def read_run(workdir: Path) -> RunConfig:
    """The run section of a workdir's config.json."""
    run = json.loads((Path(workdir) / "config.json").read_text())["run"]
    return RunConfig(**run | {"recipes": tuple(run["recipes"])})


def first_severe(path: Trajectory) -> int | None:
    """First step with fewer than SEVERE distinct predictions."""
    return _first(path.steps, path.unique < SEVERE)


def first_complete(path: Trajectory) -> int | None:
    """First step with one distinct prediction."""
    return _first(path.steps, path.unique == 1)


def transit(path: Trajectory, unigram: float) -> int | None:
    """First step with a held-out loss below `unigram`, that of word frequencies alone (nats)."""
    return _first(path.steps, path.loss < unigram)


def episodes(path: Trajectory) -> list[Episode]:
    """Severe collapses; each lasts to its recovery, and only then can the next one start.

    The recovery is the first of IN_A_ROW evaluations that all have max(RECOVERED, 3 x SEVERE)
    distinct predictions or more and a loss no higher than at the start of the collapse.
    """
    many = path.unique >= max(RECOVERED, 3 * SEVERE)
    found, i = [], 0
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
        found.append(Episode(int(path.steps[i]), float(path.loss[i]), recovery, count_only))
        if end is None:
            break
        i = end
    return found


def half_step(steps: np.ndarray, ratio: np.ndarray) -> float | None:
    """First step at which `ratio` has fallen to 1/2, interpolated; None when it never has."""
    below = np.flatnonzero(ratio <= 0.5)
    if not len(below):
        return None
    i = below[0]
    at = np.interp(0.5, ratio[i - 1 : i + 1][::-1], steps[i - 1 : i + 1][::-1])
    return round(float(at), 2)


def milestones(path: Trajectory, at: list[int]) -> dict[int, int]:
    """Distinct predictions at exact steps; raises UserError for a step without evaluation."""
    unique = dict(zip(path.steps.tolist(), path.unique.tolist(), strict=True))
    for step in at:
        if step not in unique:
            raise UserError(
                f"no evaluation at step {step}; the log has {len(unique)}, at steps "
                f"{min(unique)} to {max(unique)}"
            )
    return {step: unique[step] for step in at}


def planned(run: RunConfig, stage: int | None = None) -> list[int]:
    """Steps after 0 at which a whole run, or one stage of it, is evaluated."""
    steps = sorted({run.steps, *range(run.eval_every, run.steps, run.eval_every)})
    return [step for step in steps if stage is None or stage == 1 + (step > run.boundary)]


def of_stage(path: Trajectory, run: RunConfig, stage: int | None = None) -> Trajectory:
    """The evaluations of stage 1 or 2, or of the whole run (None), to be averaged.

    Raises UserError when less than COMPLETE of the planned ones are there.
    """
    expected = planned(run, stage)
    missing = sorted(set(expected) - set(path.steps.tolist()))
    n, found = len(expected), len(expected) - len(missing)
    if found < COMPLETE * n:
        part = f"stage {stage}" if stage else "the run"
        raise UserError(
            f"no evaluation at step {missing[0]}; the log has {found} of the {n} of {part} "
            f"({found / n:.1%}), an average needs {COMPLETE:.0%}"
        )
    inside = np.ones(len(path.steps), bool)
    if stage:
        inside = (path.steps > run.boundary) == (stage == 2)
    return Trajectory(path.steps[inside], path.unique[inside], path.loss[inside])


def stage_average(path: Trajectory, run: RunConfig, stage: int | None = None) -> float:
    """Mean number of distinct predictions; refuses incomplete logs as `of_stage` does."""
    return float(of_stage(path, run, stage).unique.mean())


def severe_rate(path: Trajectory, run: RunConfig, stage: int | None = None) -> Rate:
    """Share of severe collapses; refuses incomplete logs as `of_stage` does."""
    severe = of_stage(path, run, stage).unique < SEVERE
    count, n = int(severe.sum()), len(severe)
    interval = block_bootstrap(severe) if n >= 2 * BLOCK else None
    return Rate(count, n, stats.wilson(count, n), interval)


def block_bootstrap(values, block: int = BLOCK, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of a dependent series by moving blocks.

    Künsch, Annals of Statistics 17 (1989): overlapping blocks keep the dependence of neighbours.
    Raises ValueError for a series shorter than two blocks. Deterministic.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2 * block:
        raise ValueError(f"{n} values are fewer than two blocks of {block}")
    n_blocks = -(-n // block)
    start = np.random.default_rng(0).integers(0, n - block + 1, (resamples, n_blocks))
    # Sums of blocks from cumulative sums; the last block is cut so that n values are drawn.
    total = np.concatenate([[0.0], np.cumsum(x)])
    length = np.full(n_blocks, block)
    length[-1] = n - block * (n_blocks - 1)
    means = (total[start + length] - total[start]).sum(axis=1) / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _first(steps, condition) -> int | None:
    at = np.flatnonzero(condition)
    return int(steps[at[0]]) if len(at) else None


def _run_starts(condition) -> np.ndarray:
    """Where a row of IN_A_ROW true values begins."""
    padded = np.concatenate([condition, np.zeros(IN_A_ROW - 1, bool)])
    return np.lib.stride_tricks.sliding_window_view(padded, IN_A_ROW).all(axis=1)
