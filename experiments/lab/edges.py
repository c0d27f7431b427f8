"""Edges of decay: where, along runs that differ in coupled decay alone, something is lost.

The definitions that `critical_decay` predicts and measures. Every threshold that `verdict` has is
taken from there.
"""

import math

import numpy as np
import pandas as pd

from bitnet_jax import data, forecast, metrics, program
from bitnet_jax.forecast import HALF, crossing
from experiments.lab import arms, stats

# What counts as right. Edges: a factor; step of half the spread: a share; loss: nats.
EDGE_FACTOR, STEP_SHARE, LOSS_NATS = 2.0, 0.1, 0.3
EDGES, KINDS = ("onset", "outcome", "blind"), ("half_step", "loss", "verdict")

# Measured at the centre of the star: what one number for all points is worth.
CENTRE = {"onset": 0.01361, "outcome": 0.01778, "blind": 0.04306}


def onset(decays, least_spread_SN) -> float | None:
    """The decay at which half of the S seeds reach half of the initial logit spread in stage 1.

    `least_spread_SN`: the least share of the first spread over the evaluations of stage 1, by seed
    and decay. None: none of the decays does it; 0: the least of them does already.
    """
    middle_N = np.median(np.asarray(least_spread_SN, float), axis=0)
    return crossing(decays, middle_N, HALF) if middle_N[0] > HALF else 0.0


def outcome(decays, learned_SN) -> float | None:
    """The decay at which half of the seeds have not learned (`verdict.learned`) at the last step.

    None: all decays learn; 0: already the least does not.
    """
    share_N = np.mean(np.asarray(learned_SN, float), axis=0)
    return crossing(decays, share_N, HALF) if share_N[0] > HALF else 0.0


def blind(decays, loss_SN, unigram: float, uniform: float) -> float | None:
    """The decay at which the mean loss passes the middle between unigram's and ln V: the word
    frequencies are half lost. None and 0 as for the others."""
    mean_N, middle = np.mean(np.asarray(loss_SN, float), axis=0), (unigram + uniform) / 2
    return crossing(decays, mean_N, middle) if mean_N[0] < middle else 0.0


def right_edge(predicted: float | None, measured: float | None, decays) -> bool | None:
    """Whether a predicted edge is within EDGE_FACTOR of a measured one.

    Where the measured one lies beyond the `decays` that were run, so must the predicted one, up to
    the factor; that it does says little, and gives None.
    """
    predicted = math.inf if predicted is None else predicted
    if measured is None:
        return False if predicted < max(decays) / EDGE_FACTOR else None
    if measured == 0:
        return False if predicted > min(decays) * EDGE_FACTOR else None
    return measured / EDGE_FACTOR <= predicted <= measured * EDGE_FACTOR


def split(arm: str) -> tuple[str, float]:
    """Point and decay of an arm named `POINT | DECAY`."""
    point, _, decay = arm.partition(" | ")
    return point, float(decay)


def predict(request: arms.Request, group: list[arms.Arm]) -> dict:
    """What `forecast` says of the arms of one point, JSON values: edges, and by decay the rest."""
    runs = [arms.replicates(request, arm, 1) for arm in group]
    cfg, hyper = runs[-1][0], runs[-1][1][0].hyper
    tokens = data.load(cfg.data)
    cfg = program.resolve_vocab(cfg, tokens.tokenizer.vocab_size)
    text = forecast.frequencies(tokens.train_N, cfg.model.vocab_size)
    setting, _ = forecast.of_run(cfg, hyper, *text)
    decays = [split(arm.name)[1] for arm in group]
    outlooks = forecast.forecasts(setting, decays)
    numbers = {name: short(getattr(outlooks[0], name)) for name in EDGES}
    numbers["decays"] = {
        f"{decay:g}": {
            "half_step": short(outlook.half_step),
            "loss": short(outlook.loss),
            "expected": forecast.expected(outlook),
        }
        for decay, outlook in zip(decays, outlooks, strict=True)
    }
    return numbers


def measure(df: pd.DataFrame, point: str) -> dict:
    """The same of the rows of one point."""
    rows = df[[split(arm)[0] == point and split(arm)[1] > 0 for arm in df["arm"]]]
    rows = rows.assign(decay=[split(arm)[1] for arm in rows["arm"]], learned=stats.learned(rows))
    table = rows.pivot_table(
        index="seed",
        columns="decay",
        values=["least_spread", "learned", metrics.HELD_OUT_LOSS],
        aggfunc="first",
    )
    held_out = rows["references"].iloc[0]["held_out"]["unigram"]["loss"]
    losses = table[metrics.HELD_OUT_LOSS]
    numbers = {
        "onset": onset(losses.columns, table["least_spread"]),
        "outcome": outcome(losses.columns, table["learned"].astype(float)),
        "blind": blind(losses.columns, losses, held_out, rows["uniform"].iloc[0]),
        "unigram": held_out,
    }
    halves = rows.groupby("decay")["half_step"].median()
    numbers["decays"] = {
        f"{decay:g}": {
            "half_step": None if math.isnan(halves[decay]) else float(halves[decay]),
            "loss": float(losses[decay].mean()),
            "learned": float(table["learned"][decay].astype(float).mean()),
        }
        for decay in losses.columns
    }
    return {k: v if k == "decays" else short(v) for k, v in numbers.items()}


def short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def points(df: pd.DataFrame, among, predicted: dict) -> dict[str, tuple[dict, dict]]:
    """What is predicted and what was measured of the points that have both."""
    have = {split(arm)[0] for arm in df["arm"]}
    return {p: (predicted[p], measure(df, p)) for p in among if p in have and p in predicted}


def all_judged(points: dict[str, tuple[dict, dict]]) -> dict[str, list[bool]]:
    """`judged` of all points together."""
    by_point = [judged(*pair) for pair in points.values()]
    return {kind: [mark for marks in by_point for mark in marks[kind]] for kind in (*EDGES, *KINDS)}


def share(points: dict[str, tuple[dict, dict]], kind: str) -> float:
    """Share of a kind's predictions that are right; raises NotEnough for fewer than 3 cases."""
    marks = all_judged(points)[kind]
    if len(marks) < 3:
        raise stats.NotEnough(f"{len(marks)} cases")
    return sum(marks) / len(marks)


def centre_for_all(points: dict[str, tuple[dict, dict]]) -> dict:
    """The same points as if CENTRE had been predicted of each: a baseline."""
    return {point: (predicted | CENTRE, was) for point, (predicted, was) in points.items()}


def gains_at_onset_alone(points: dict[str, tuple[dict, dict]]) -> bool:
    """Whether the baseline has fewer edges right: at onset by a third, of outcomes by no tenth."""
    baseline = centre_for_all(points)
    onset, outcome = (share(points, x) - share(baseline, x) for x in ("onset", "outcome"))
    return onset > 1 / 3 and outcome < 0.1


def judged(predicted: dict, measured: dict) -> dict[str, list[bool]]:
    """A point's predictions against what was measured, by kind: right or wrong, one by one.

    A step of half the spread is compared where both halve it; a loss where the measured one is
    above the unigram's; a verdict everywhere but at the predicted edge.
    """
    marks: dict[str, list[bool]] = {name: [] for name in (*EDGES, *KINDS)}
    for name in EDGES:
        right = right_edge(predicted[name], measured[name], list(map(float, measured["decays"])))
        marks[name] += [] if right is None else [right]
    for decay, was in measured["decays"].items():
        outlook = predicted["decays"].get(decay)
        if outlook is None:
            continue
        if outlook["half_step"] and was["half_step"]:
            off = abs(was["half_step"] / outlook["half_step"] - 1)
            marks["half_step"].append(off <= STEP_SHARE)
        if was["loss"] > measured["unigram"]:
            marks["loss"].append(abs(was["loss"] - outlook["loss"]) <= LOSS_NATS)
        if outlook["expected"] != forecast.EDGE:
            lost = outlook["expected"] == forecast.COLLAPSE
            marks["verdict"].append(lost == (was["learned"] < HALF))
    return marks


def table(points: dict[str, tuple[dict, dict]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a line per point, what is right in all, and what the baseline gives."""
    table_rows = []
    for point, (predicted, measured) in points.items():
        marks = judged(predicted, measured)
        shown = [f"{_cell(predicted[x])} / {_cell(measured[x])}{_mark(marks[x])}" for x in EDGES]
        table_rows.append([point, *shown, *(_count(marks[x]) for x in KINDS)])
    heads = [
        "point",
        *(f"{x}: predicted / measured" for x in EDGES),
        *(f"{x}: right" for x in KINDS),
    ]
    right, baseline = all_judged(points), all_judged(centre_for_all(points))
    ends = [
        ["right", *map(_count, right.values())],
        [
            "right, the centre's edge for all",
            *(_count(baseline[x]) for x in EDGES),
            *[""] * len(KINDS),
        ],
    ]
    return heads, table_rows + ends


def _cell(edge: float | None) -> str:
    return "above" if edge is None else f"{edge:.2g}" if edge else "below"


def _mark(marks: list[bool]) -> str:
    return "" if not marks else " right" if marks[0] else " WRONG"


def _count(marks: list[bool]) -> str:
    return f"{sum(marks)} of {len(marks)}"
