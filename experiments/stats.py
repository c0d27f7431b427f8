"""Statistics of experiments. The unit of evidence is the seed."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its 95 % t interval (infinite when n = 1)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def effect(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def text(self, spec: str = ".2f") -> str:
        """`1.23 [1.01, 1.45]`; without a bracket for one seed."""
        if self.n == 1:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def interval(values) -> Interval:
    """Mean and 95 % Student t interval of one number per seed; raises ValueError without any."""
    x = np.asarray(list(values), np.float64)
    if not len(x):
        raise ValueError("no values to average")
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired(treatment: dict[int, float], control: dict[int, float]) -> Interval:
    """Interval of treatment - control over the seeds that both have.

    Replicates of one seed start from the same parameters and see the same batches, so their
    difference varies less than either. Raises ValueError without common seeds.
    """
    seeds = sorted(treatment.keys() & control.keys())
    return interval(treatment[s] - control[s] for s in seeds)


def effect_text(difference: Interval, spec: str = "+.2f") -> str:
    """`-0.35 [-0.41, -0.29] (n=3)`, or `no effect seen (n=3)` with the interval."""
    told = f"{difference.text(spec)} (n={difference.n})"
    if difference.effect:
        return told
    return f"no effect seen (n={difference.n}): {difference.text(spec)}"


def sign_flip_p(differences) -> float:
    """Two-sided p of the mean of paired differences under all 2^n flips of their signs."""
    d = np.asarray(list(differences), np.float64)
    return float(
        stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values)
    m, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    ci = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(ci.low), float(ci.high)
