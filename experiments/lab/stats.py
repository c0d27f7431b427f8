"""Statistics of experiments on a frame of rows. The unit of evidence is the seed.

A statistic that needs rows which are not there, or more seeds than there are, raises NotEnough: a
claim is then told as `not enough rows`, never as false.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from bitnet_jax import verdict
from bitnet_jax.metrics import LOSS

SEEDS = 3  # the fewest that an interval or a claim is made of


class NotEnough(Exception):
    """The rows do not decide this."""


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its 95 % t interval (infinite when n = 1)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def below(self) -> bool:
        """Whether all of it lies below zero; raises NotEnough for fewer than SEEDS seeds."""
        return self._enough().high < 0

    @property
    def above(self) -> bool:
        """Whether all of it lies above zero; raises NotEnough for fewer than SEEDS seeds."""
        return self._enough().low > 0

    @property
    def effect(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def within(self, low: float, high: float) -> bool:
        """Whether all of it lies between; raises NotEnough for fewer than SEEDS seeds."""
        return low < self._enough().low and self.high < high

    def text(self, spec: str = ".2f") -> str:
        """`1.23 [1.01, 1.45]`; without a bracket for one seed, empty for none."""
        if self.n < 2:
            return f"{self.mean:{spec}}" if self.n else ""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def _enough(self) -> "Interval":
        if self.n < SEEDS:
            raise NotEnough(f"{self.n} seeds")
        return self


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % Student t interval of one number per seed; missing ones are left out."""
    x = np.asarray([math.nan if v is None else v for v in values], np.float64)
    x = x[~np.isnan(x)]
    if not len(x):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def prediction_interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % interval for one more value of the same normal distribution; infinite for n = 1."""
    x = np.asarray(list(values), np.float64)
    if len(x) == 1:
        return -math.inf, math.inf
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) * math.sqrt(1 + 1 / len(x))
    return float(x.mean() - half), float(x.mean() + half)


# ------------------------------------------------------------------------------------ of a frame


def of(df: pd.DataFrame, arm: str, steps: int | None = None) -> pd.DataFrame:
    """Rows of an arm at one length (none: its shortest), by seed; raises NotEnough without any."""
    rows = df[df["arm"] == arm]
    if len(rows):
        rows = rows[rows["steps"] == (rows["steps"].min() if steps is None else steps)]
    if not len(rows):
        raise NotEnough(f"no rows of {arm}" + (f" at {steps} steps" if steps else ""))
    return rows.set_index("seed").sort_index()


def values(df: pd.DataFrame, arm: str, column: str, steps: int | None = None) -> pd.Series:
    """A number of each seed of an arm; raises NotEnough when no row has it."""
    rows = of(df, arm, steps)
    if column not in rows or rows[column].isna().all():
        raise NotEnough(f"no {column} in the rows of {arm}")
    return rows[column]


def each(df: pd.DataFrame, arm: str, column: str, steps: int | None = None) -> pd.Series:
    """`values` for a claim about every seed: raises NotEnough for fewer than SEEDS rows."""
    per_seed = values(df, arm, column, steps)
    if len(per_seed) < SEEDS:
        raise NotEnough(f"{len(per_seed)} seeds of {arm}")
    return per_seed


def mean(df: pd.DataFrame, arm: str, column: str, steps: int | None = None) -> Interval:
    """Mean over the seeds of an arm with its interval."""
    return interval(values(df, arm, column, steps))


def difference(
    df: pd.DataFrame, arm: str, control: str, column: str = LOSS, steps: int | None = None
) -> Interval:
    """Paired difference arm - control over the seeds that both have.

    Replicates of one seed share their start and their batches, so it varies less than either.
    """
    a, b = (values(df, name, column, steps) for name in (arm, control))
    return interval((a - b).dropna())


def compared(df: pd.DataFrame) -> pd.DataFrame:
    """Without an arm's runs of fewer than SEEDS seeds where it has more at another length, or where
    they are longer than the shortest of the study."""
    n = df.groupby(["arm", "steps"])["seed"].transform("nunique")
    most = n.groupby(df["arm"]).transform("max")
    return df[(n >= SEEDS) | ((most < SEEDS) & (df["steps"] == df["steps"].min()))]


def seeds(df: pd.DataFrame) -> int:
    """The smallest number of seeds that an arm has at a length."""
    return int(df.groupby(["arm", "steps"])["seed"].nunique().min())


def learned(rows: pd.DataFrame) -> pd.Series:
    """Whether each run knows more than word frequencies, beyond noise: `verdict.learned`."""
    return rows.apply(lambda row: verdict.learned(row.dropna(), row["references"]), axis=1)


def ended(df: pd.DataFrame, arm: str, steps: int | None = None) -> pd.Series:
    """Whether each seed of an arm has learned at its last step; raises NotEnough below SEEDS."""
    rows = of(df, arm, steps)
    if len(rows) < SEEDS:
        raise NotEnough(f"{len(rows)} seeds of {arm}")
    return learned(rows)


def cured(df: pd.DataFrame, arm: str, healthy: str, steps: int | None = None) -> pd.Series:
    """`ended` of an arm where the healthy one shows that the length suffices.

    Raises NotEnough unless every seed of the healthy arm has learned: a collapse cannot be told
    from a young model there.
    """
    if not ended(df, healthy, steps).all():
        raise NotEnough(f"too short: {healthy} has not learned")
    return ended(df, arm, steps)


# ------------------------------------------------------------------------------------ shares, tests


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    ci = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(ci.low), float(ci.high)


def severe_share(df: pd.DataFrame, arm: str, steps: int | None = None) -> Interval:
    """Share of all evaluations with fewer than 3 distinct predictions, over the seeds of an arm.

    Raises ValueError where rows of unequal `run.eval_every` would be averaged.
    """
    rows = of(df, arm, steps)
    if rows["eval_every"].nunique() > 1:
        raise ValueError(f"{arm}: shares of evaluations every {set(rows['eval_every'])} steps")
    return interval(rows["severe"] / rows["evaluations"])


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values)
    m, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
