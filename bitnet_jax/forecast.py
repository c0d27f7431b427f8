"""Told before training: at which coupled decays a run collapses, and where a setting lies.

`forecast` runs the mean field of `shrink` at a grid of decays and reads its edges. It needs token
frequencies, a schedule and shapes, and nothing of a framework.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_jax import optim, reference, shrink
from bitnet_jax.config import Config, Hyper, Replicate
from bitnet_jax.fields import UserError, check_known

GRID = tuple(10 ** (k / 2) for k in range(-10, 2))  # decays whose fate the mean field tells
HALF = 0.5  # of the first logit spread, and of the seeds
FIT_TOKENS = 1 << 22  # of which pairs are counted
MARGIN = 0.3  # nats above the unigram's loss: what the mean field does not reach, or decay costs
WITHIN = 2.0  # the factor within which an edge is predicted
# Measured over predicted edges of experiments/critical_decay.py: V 300 to 8192, width 32 to 128,
# 32 to 512 tokens a batch, 400 to 2000 updates, English books and Python. Onset: 0.49 at 2000.
SPREAD = "onset 0.5 to 1.1, outcome 0.3 to 1.5 (lower at 4 of 32), blind 0.5 to 3.0"
# A collapsed model meets a decay as the mean field meets COLLAPSED times as much: its gradient's
# norm is larger by that than the rows' (matrices before a norm have shrunk, and their gradient
# grows as they shrink), so the clip factor smaller. The one fitted number: the geometric mean of
# 3.4, 1.7 and 5.9 at the points centre, V 512 and clip 0.1 of experiments/critical_decay.py.
COLLAPSED = 3.2


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


def of_run(cfg: Config, hyper: Hyper, probs_V, context: float) -> tuple[shrink.Setting, float]:
    """The setting of a replicate of ours on a text, and its coupled decay in stage 1."""
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
        context=context,
        stream=math.sqrt(1 + model.n_layers * 2 / 3) if report else 0.02 * math.sqrt(1 + fan_out),
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


# -------------------------------------------------------------------------------- what is predicted


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
    undecayed: float  # the loss without any decay

    @property
    def unlearned(self) -> bool:
        """Whether the mean field does not learn word frequencies even without decay.

        The run is short, or its batches have few of many tokens: of 128 tokens of 50,257 the mean
        field's rows keep too much noise, where models of that size have learned.
        """
        return self.undecayed - self.unigram > MARGIN

    @property
    def costs(self) -> bool:
        """Whether the decay clearly raises the mean field's loss."""
        return self.loss - self.undecayed > MARGIN


def frequencies(tokens_N, vocab_size: int) -> tuple[np.ndarray, float]:
    """Token frequencies [V] of a text, and the strength of its context (`Setting.context`)."""
    pairs_VV = reference.bigram_counts(tokens_N[:FIT_TOKENS], vocab_size).astype(np.float64)
    pairs_VV /= pairs_VV.sum()
    first_V, second_V = pairs_VV.sum(axis=1), pairs_VV.sum(axis=0)
    context = (
        pairs_VV.multiply(pairs_VV).sum()
        - 2 * first_V @ (pairs_VV @ second_V)
        + (first_V**2).sum() * (second_V**2).sum()
    )
    return reference.unigram_probs(tokens_N, vocab_size), float(context)


def edge(decays, values, level: float) -> float | None:
    """`crossing` upwards of values that lie below the level without decay; 0 where they do not."""
    return crossing(decays, values, level) if values[0] < level else 0.0


def forecast(setting: shrink.Setting, decay: float) -> Forecast:
    """What is expected of a setting whose decay inside Adam is `decay` (0: none, or AdamW)."""
    return forecasts(setting, [decay])[0]


def forecasts(setting: shrink.Setting, decays: Sequence[float]) -> list[Forecast]:
    """`forecast` of several decays, by one mean field."""
    followed = sorted({0.0, *GRID, *decays, *(COLLAPSED * x for x in decays)})
    path, above = shrink.mean_field(setting, followed), followed[1:]
    p_V, steps = np.asarray(setting.probs_V), len(setting.rates_T)
    unigram, uniform = float(-(p_V * np.log(p_V)).sum()), math.log(len(p_V))
    cost = path.loss[-1, 1:] - unigram - path.reach[1:] * setting.context
    onset = edge(above, -least_spread(path, steps)[1:], -HALF)
    outcome = edge(above, cost, 0.0)
    blind = edge(above, path.loss[-1, 1:], (unigram + uniform) / 2)
    outlooks = []
    for decay in decays:
        collapsed = outcome is not None and decay > outcome
        end = followed.index(COLLAPSED * decay if collapsed else decay)
        ratio = path.spread[:, followed.index(decay)] / path.spread[0, 0]
        outlook = Forecast(
            decay,
            onset,
            outcome,
            None if blind is None else blind / COLLAPSED,
            half_step(path, ratio, steps),
            *(float(x[end]) for x in (path.loss[-1], path.entropy[-1], path.alive, path.mass)),
            unigram,
            uniform,
            float(path.loss[-1, 0]),
        )
        outlooks.append(outlook)
    return outlooks


def half_step(path: shrink.Path, ratio: np.ndarray, steps: int) -> float | None:
    """The update of stage 1 at which a share of the first spread is a half; None without one."""
    stage_1 = path.step <= max(steps // 2, 1)
    return halved(path.step[stage_1], ratio[stage_1])


def halved(steps_N: np.ndarray, ratio_N: np.ndarray) -> float | None:
    """The step, between neighbours, at which a ratio that starts at 1 is first HALF; or None."""
    below = np.flatnonzero(ratio_N <= HALF)
    if not len(below):
        return None
    j = below[0]
    return float(np.interp(-HALF, -ratio_N[j - 1 : j + 1], steps_N[j - 1 : j + 1]))


def least_spread(path: shrink.Path, steps: int) -> np.ndarray:
    """The least share of the first logit spread in stage 1, by decay."""
    return (path.spread / path.spread[0])[path.step <= max(steps // 2, 1)].min(0)


COLLAPSE, EDGE, NO_COLLAPSE = "collapse", "edge", "no collapse by decay"
CANNOT_TELL = "cannot tell"


def expected(outlook: Forecast) -> str:
    """`collapse`, `edge` (within the error of the outcome edge), `no collapse by decay`, or `cannot
    tell` where the mean field learns nothing even without decay."""
    if not outlook.decay or outlook.outcome is None or outlook.decay < outlook.outcome / WITHIN:
        return CANNOT_TELL if outlook.unlearned else NO_COLLAPSE
    if outlook.unlearned and not outlook.costs:
        return CANNOT_TELL
    return COLLAPSE if outlook.decay > outlook.outcome * WITHIN else EDGE


EDGES = ("onset", "outcome", "blind")


def terminal_lines(outlook: Forecast) -> list[str]:
    """What a terminal shows of a forecast."""
    edges = ", ".join(f"{name} {_decay(getattr(outlook, name))}" for name in EDGES)
    verdict = expected(outlook)
    shown = [
        f"  edges of decay inside Adam: {edges}",
        f"  (measured over predicted, 32 small models: {SPREAD})",
        f"  decay inside Adam here: {outlook.decay:g}, {_place(outlook)}",
        f"  expected: {verdict}",
    ]
    if verdict == CANNOT_TELL:
        shown.append(
            f"  (without decay the mean field ends at {outlook.undecayed:.2f}, above word "
            f"frequencies, {outlook.unigram:.2f})"
        )
    if outlook.half_step is not None and outlook.decay:
        shown.append(f"  half of the first logit spread at step {outlook.half_step:.0f}")
    if outlook.blind is not None and outlook.decay > outlook.blind / WITHIN:
        shown.append(
            f"  then: loss about {outlook.loss:.2f} (unigram {outlook.unigram:.2f}, ln V "
            f"{outlook.uniform:.2f}), entropy {outlook.entropy:.2f}"
        )
    if verdict in (COLLAPSE, EDGE):
        shown.append(f"  change: {change(outlook)}")
    return shown


def change(outlook: Forecast) -> str:
    """What keeps a run from the collapse."""
    safe = min(x for x in (outlook.onset, outlook.outcome) if x is not None) / WITHIN
    return f"AdamW (decay outside Adam), or a decay inside Adam of {safe:.1g} or less"


def _decay(edge: float | None) -> str:
    if edge is None:
        return f"above {GRID[-1]:.1g}"
    return f"{edge:.2g}" if edge else f"below {GRID[0]:.1g}"


def _place(outlook: Forecast) -> str:
    passed = [name for name in EDGES if _beyond(outlook, getattr(outlook, name))]
    return f"beyond {', '.join(passed)}" if passed else "below all edges"


def _beyond(outlook: Forecast, edge: float | None) -> bool:
    return edge is not None and outlook.decay > edge


def warning(outlook: Forecast) -> str | None:
    """One line for a run that is expected to collapse, else None."""
    if expected(outlook) != COLLAPSE:
        return None
    return (
        f"decay inside Adam of {outlook.decay:g} is expected to collapse this run (outcome edge "
        f"{_decay(outlook.outcome)}); {change(outlook)}"
    )


def warnings(cfg: Config, replicates: Sequence[Replicate], tokens_N) -> list[str]:
    """A line for every recipe of a run on a text that is expected to collapse."""
    decaying = {rep.name: rep for rep in replicates if rep.hyper.coupled_1 or rep.hyper.coupled_2}
    text = frequencies(tokens_N, cfg.model.vocab_size) if decaying else None
    texts = []
    for rep in decaying.values():
        setting, decay = of_run(cfg, rep.hyper, *text)
        if line := warning(forecast(setting, decay)):
            texts.append(f"{rep.name}: {line}")
    return texts
