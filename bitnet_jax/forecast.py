"""Told before training: at which coupled decays a run collapses, and where a setting lies.

`forecast` runs the mean field of `shrink` at a grid of decays and reads its edges. It needs token
frequencies, a schedule and shapes, and nothing of a framework.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_jax import optim, shrink
from bitnet_jax.config import Config, Hyper, Replicate, UserError, check_known

GRID = tuple(10 ** (k / 2) for k in range(-10, 2))  # decays whose fate the mean field tells
HALF = 0.5  # of the first logit spread, and of the seeds


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
    part = (logs[i] - logs[i - 1]) * x[i - 1] / (x[i - 1] - x[i])
    return float(math.exp(logs[i - 1] + part))


# ------------------------------------------------------------------------- schedules and settings


def _cosine(x):
    return 0.1 + 0.45 * (1 + np.cos(np.pi * x))


SCHEDULES = {  # share of the peak after the warm-up, by the share x of the rest that has passed
    "constant": lambda x: np.ones_like(x),
    "linear": lambda x: 1 - x,
    "cosine": _cosine,  # to a tenth of the peak
    "two-stage": lambda x: np.where(x <= 0.5, 1 - x * 2 / 3, 4 / 3 * (1 - x)),
}


def rates(name: str, peak: float, warmup: int, steps: int) -> np.ndarray:
    """Learning rates of updates 1 .. steps: a line from 0 over the warm-up, then the schedule.

    Raises UserError for an unknown schedule.
    """
    check_known(name, SCHEDULES, "schedule")
    n = np.arange(1, steps + 1)
    passed = np.clip((n - warmup) / max(steps - warmup, 1), 0, 1)
    return peak * np.where(n <= warmup, n / max(warmup, 1), SCHEDULES[name](passed))


def rates_through(points: Sequence[tuple[float, float]], steps: int) -> np.ndarray:
    """Learning rates of updates 1 .. steps on lines through (step, rate) points; UserError."""
    at = [step for step, _ in points]
    if len(points) < 2 or any(b <= a for a, b in itertools.pairwise(at)):
        raise UserError("--lr-file: needs two lines STEP,LR or more, their steps ascending")
    return np.interp(np.arange(1, steps + 1), at, [rate for _, rate in points])


def fans(width: int, layers: int, ff: int) -> tuple[int, int]:
    """`fan_in` and `fan_out` of a Setting for blocks of attention and a gated feed-forward."""
    return layers * (3 * width + ff), layers * (width + ff)


def of_run(cfg: Config, hyper: Hyper, probs_V) -> tuple[shrink.Setting, float]:
    """The setting of a replicate of ours, and its coupled decay in stage 1."""
    run, model = cfg.run, cfg.model
    n = np.arange(1, run.steps + 1)
    decays = np.asarray(optim.by_stage(n, run, hyper.coupled_1, hyper.coupled_2), np.float64)
    decay = float(hyper.coupled_1) or float(hyper.coupled_2)
    report = model.layout == "report"
    bound = model.d_model**-0.5
    fan_in, fan_out = fans(model.d_model, model.n_layers, model.d_ff)
    setting = shrink.Setting(
        probs_V=np.asarray(probs_V, np.float64),
        rates_T=np.asarray(optim.learning_rate(hyper, n, run), np.float64),
        shape_T=decays / decay if decay else np.ones(run.steps),
        width=model.d_model,
        tokens=cfg.data.batch_size * cfg.data.seq_len,
        fan_in=fan_in,
        fan_out=fan_out,
        init=bound if report and not model.tied_embedding else (1.0 if report else 0.02),
        uniform=report and not model.tied_embedding,
        embedding=1.0 if report else math.sqrt(0.02**2 * (1 + fan_out)),
        ternary=float(hyper.weight_quant) > 0,
        beta1=cfg.optim.beta1,
        beta2=cfg.optim.beta2,
        eps=cfg.optim.eps,
        clip=cfg.optim.clip_norm,
        decay_head=float(hyper.decay_rest),
        decay_norm=float(hyper.decay_rest),
        decay_embedding=float(hyper.decay_rest),
    )
    return setting, decay


# --------------------------------------------------------------------------------- what is told


@dataclass(frozen=True)
class Forecast:
    """What is expected of a setting: decays of the edges (None: above all of GRID), nats, steps."""

    decay: float
    onset: float | None
    outcome: float | None
    blind: float | None
    half_step: float | None  # of the setting itself; None: the spread is not halved
    loss: float  # without context, at the setting's decay
    entropy: float
    alive: float  # tokens whose output rows survive, and their share of the text
    mass: float
    unigram: float
    uniform: float


def forecast(setting: shrink.Setting, decay: float) -> Forecast:
    """What is expected of a setting whose decay inside Adam is `decay` (0: none, or AdamW)."""
    decays = sorted({*GRID, decay} - {0.0})
    path = shrink.mean_field(setting, AMPLIFIED * np.array([0.0, *decays]))
    p_V = np.asarray(setting.probs_V)
    unigram, uniform = float(-(p_V * np.log(p_V)).sum()), math.log(len(p_V))
    steps, i = len(setting.rates_T), ([0.0, *decays]).index(decay)
    onset = crossing(decays, least_spread(path, steps)[1:], HALF)
    blind = crossing(decays, path.loss[-1, 1:], (unigram + uniform) / 2)
    ratio = path.spread[:, i] / path.spread[0, i]
    below = np.flatnonzero((ratio <= HALF) & (path.step <= max(steps // 2, 1)))
    half_step = None
    if len(below):
        j = below[0]
        half_step = float(np.interp(-HALF, -ratio[j - 1 : j + 1], path.step[j - 1 : j + 1]))
    return Forecast(
        decay,
        onset,
        outcome_edge(blind),
        blind,
        half_step,
        *(float(x) for x in (path.loss[-1, i], path.entropy[-1, i], path.alive[i], path.mass[i])),
        unigram,
        uniform,
    )


def least_spread(path: shrink.Path, steps: int) -> np.ndarray:
    """The least share of the first logit spread in stage 1, by decay."""
    return (path.spread / path.spread[0])[path.step <= max(steps // 2, 1)].min(0)


# What the star of measurements of experiments/critical_decay.py says of the mean field: see there.
AMPLIFIED = 2.0
OUTCOME = 0.2  # outcome edge over blind edge
WITHIN = 2.0  # the factor within which edges lie


def outcome_edge(blind: float | None) -> float | None:
    """The decay at which a model ends without context."""
    return None if blind is None else OUTCOME * blind


def expected(told: Forecast) -> str:
    """`collapse`, `edge` (within the error of the outcome edge) or `no collapse by decay`."""
    edge = told.outcome
    if not told.decay or edge is None or told.decay < edge / WITHIN:
        return "no collapse by decay"
    return "collapse" if told.decay > edge * WITHIN else "edge"


def lines(told: Forecast) -> list[str]:
    """What a terminal shows of a forecast."""
    edges = (
        f"onset {_decay(told.onset)}, outcome {_decay(told.outcome)}, blind {_decay(told.blind)}"
    )
    found = [
        f"  edges of decay inside Adam: {edges} (each within a factor {WITHIN:g})",
        f"  decay inside Adam here: {told.decay:g}, {_place(told)}",
        f"  expected: {expected(told)}",
    ]
    if told.half_step is not None:
        found.append(f"  half of the first logit spread at step {told.half_step:.0f}")
    if told.blind is not None and told.decay > told.blind / WITHIN:
        found.append(
            f"  then: loss about {told.loss:.2f} (unigram {told.unigram:.2f}, ln V "
            f"{told.uniform:.2f}), entropy {told.entropy:.2f}"
        )
    if expected(told) != "no collapse by decay":
        found.append(f"  change: {change(told)}")
    return found


def change(told: Forecast) -> str:
    """What keeps a run from the collapse."""
    safe = min(x for x in (told.onset, told.outcome) if x is not None) / WITHIN
    return f"AdamW (decay outside Adam), or a decay inside Adam of {safe:.1g} or less"


def _decay(edge: float | None) -> str:
    return f"above {GRID[-1]:.1g}" if edge is None else f"{edge:.2g}"


def _place(told: Forecast) -> str:
    passed = [name for name in ("onset", "outcome", "blind") if _beyond(told, getattr(told, name))]
    return f"beyond {', '.join(passed)}" if passed else "below all edges"


def _beyond(told: Forecast, edge: float | None) -> bool:
    return edge is not None and told.decay > edge


def warning(told: Forecast) -> str | None:
    """One line for a run that is expected to collapse, else None."""
    if expected(told) != "collapse":
        return None
    return (
        f"decay inside Adam of {told.decay:g} is expected to collapse this run (outcome edge "
        f"{_decay(told.outcome)}); {change(told)}"
    )


def warnings(cfg: Config, replicates: Sequence[Replicate], probs_V) -> list[str]:
    """A line for every recipe of a run that is expected to collapse."""
    found = []
    for rep in {rep.name: rep for rep in replicates}.values():
        setting, decay = of_run(cfg, rep.hyper, probs_V)
        if decay and (text := warning(forecast(setting, decay))):
            found.append(f"{rep.name}: {text}")
    return found
