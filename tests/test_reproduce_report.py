"""The report's statistics of a log, the places of ours beside its own, and what rows bear out."""

import types

import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import presets
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import (
    DISTINCT,
    LOGIT_STD,
    LOSS,
    TRACK_ENTROPY,
    TRACK_LOSS,
    TRAIN_LOSS,
)
from experiments import reproduce_report as study
from experiments.lab import claims, ledger, rows
from experiments.lab.finished import Finished
from experiments.lab.studies import BOOKS

CLAIMS = {claim.name: claim for claim in study.CLAIMS}


def log_of(steps, every):
    """Evaluations that count as many distinct predictions as steps are done."""
    return [
        {"step": step, DISTINCT: step, LOSS: step / 3, LOGIT_STD: 0.1}
        for step in sorted({*range(0, steps, every), steps})
    ]


@pytest.mark.parametrize(
    ("base", "steps", "every", "where"),
    [
        (1000, 1000, 5, [5, 50, 100, 130, 140, 500, 600, 700]),
        (1000, 10_000, 20, [100, 500, 1000, 1500, 2000]),
        (200, 2000, 10, [20, 100, 200, 300, 400]),  # the same share of a run a fifth as long
        (200, 200, 300, [200] * 8),  # step 0 is none: the first and the last evaluation
    ],
)
def test_milestones_are_the_nearest_evaluations_after_the_start(base, steps, every, where):
    milestones = ledger.milestones(base, RunConfig(steps, eval_every=every), log_of(steps, every))
    length = 1000 * steps // base
    assert [m["step"] for m in milestones.values()] == where
    assert list(map(int, milestones)) == list(ledger.MILESTONES[length])
    assert all(m["unique"] == m["step"] for m in milestones.values())


def test_the_statistics_of_a_run_that_falls_and_recovers():
    """At steps 0, 5 .. 40 of 40; severe at 10 and 15; below the unigram's loss, 4, at 35."""
    unique, loss = [99, 50, 2, 1, 20, 20, 20, 3, 2], [7, 6, 5, 5, 5, 5, 5, 3, 3.5]
    evals = [
        {"step": 5 * n, DISTINCT: u, LOSS: x, LOGIT_STD: 0.5 / (n + 1), TRACK_LOSS: 7.5,
         TRACK_ENTROPY: float(n)}
        for n, (u, x) in enumerate(zip(unique, loss, strict=True))
    ]  # fmt: skip
    run = types.SimpleNamespace(
        cfg=types.SimpleNamespace(run=RunConfig(40, eval_every=5)),
        evals=[evals],
        trains=[[{TRAIN_LOSS: float(n)} for n in range(1, 9)]],
        references={"unigram": {"loss": 4.0}},
        steps=np.arange(0, 41, 5),
    )
    run.column = lambda key: Finished.column(run, key)
    (numbers,) = ledger.measure(run, base=40)
    shares = {"severe_share": 3 / 8, "unique_stage1": 73 / 4, "unique_stage2": 45 / 4,
              "loss_mean": 4.5, "loss_final": 8, "late_entropy": 5.5, "start_logit_std": 0.5,
              "partial_unique_mean": 118 / 8}  # fmt: skip
    counts = {"evaluations": 8, "unique_min": 1, "unique_max": 50, "unique_final": 2,
              "first_severe": 10, "first_complete": 15, "transit": 35, "severe_after_transit": 1,
              "recoveries": 1, "count_recoveries": 0}  # fmt: skip
    assert {key: numbers[key] for key in shares | counts} == pytest.approx(shares | counts)
    assert numbers["milestones"]["500"] == {"step": 20, "unique": 20, "loss": 5, "logit_std": 0.1}


def test_the_report_tracks_its_first_batch():
    with pytest.raises(UserError, match="first_batch"):
        study.check(presets.preset("tiny"))


# ------------------------------------------------------------------------------ beside the report


def test_runs_stand_for_the_lengths_of_the_report():
    df = rows.frame(rows.read("reproduce_report"))
    steps_by_length = {length: set(runs["steps"]) for length, runs in ledger.by_length(df).items()}
    assert steps_by_length[1000] == {1000} and steps_by_length[10_000] == {10_000}
    at_500 = "numbers/milestones/500/step"
    fifths = df.assign(**{name: df[name] / 5 for name in ("steps", at_500)})  # of 200, 2000
    assert [len(runs) for runs in ledger.by_length(fifths).values()] == [
        len(runs) for runs in ledger.by_length(df).values()
    ]


def test_ours_stand_in_the_column_beside_the_reports():
    numbers, milestones = ledger.beside(frame())
    line = dict(zip(numbers.columns, numbers.rows[0], strict=True))
    assert (line["report, 1000"], line["ours, 1000"], line["ours"]) == ("95", "90 [90, 90]", "")
    assert len({len(x) for x in [numbers.columns, *numbers.rows]}) == 1
    at_500 = milestones.rows[5]
    assert at_500[:4] == ["1000", "500", "5", "5 [5, 5]"]


# ------------------------------------------------------------------------------------------ claims


def frame(seeds=3, **changed):
    """Runs of 1000 and 10,000 steps that bear the claims out; `changed` are numbers of all of them.

    The predicted step of half the spread is 152 at this width: the curve passes 1/2 at 150.
    """
    sets = {"model__d_model": 64, "run__eval_every": 50, "run__save_every": 1000}
    losses = {study.COUPLED: [5.0] * seeds}
    run_rows = [row for steps in (1000, 10_000) for row in make_rows(losses, steps=steps, **sets)]
    for row in run_rows:
        length = row["config"]["run"]["steps"]
        hyper = presets.RECIPES["coupled"](RunConfig(steps=length))
        row["config"]["hyper"] = {"warmup_steps": hyper.warmup_steps, "lr_peak": hyper.lr_peak}
        row["curve"] |= {"step": [0, 100, 200], LOGIT_STD: [0.5, 0.375, 0.125]}
        milestones = {step: {"step": step, "unique": 5, "loss": 5.5, "logit_std": 0.1}
                      for step in ledger.MILESTONES[length]}  # fmt: skip
        if length > 1000:
            milestones[1000] |= {"unique": 50, "loss": 6.0, "logit_std": 1e-6}
        else:
            milestones[5]["unique"], milestones[50]["unique"], milestones[100]["unique"] = 80, 60, 8
        numbers = {column: 9 for _, column, *_ in ledger.MEASUREMENTS}
        numbers |= {"unique_max": 90, "transit": None, "late_entropy": 5.9, "start_logit_std": 0.5}
        numbers |= {"unique_stage1": 15, "unique_stage2": 4}
        numbers |= {"loss_mean": 9.4 + 0.2 * row["seed"], "loss_final": 9.8 + 0.1 * row["seed"]}
        numbers |= {"milestones": {str(step): x for step, x in milestones.items()}}
        row["extra"] |= {"numbers": numbers, "unique_stage1": 20.0, "unique_stage2": 9.0,
                         "above_1.1": {"all": 1000, "predicted": 1000.5}}  # fmt: skip
    df = rows.frame(run_rows)
    for column, value in changed.items():
        df[column] = value
    return df


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_on_rows_made_to_bear_them(name):
    assert claims.judge(CLAIMS[name], BOOKS, frame()).status == claims.HOLDS


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("never", "numbers/transit", 35),
        ("never", LOSS, 4.3),
        ("stages", "unique_stage2", 11.0),
        ("flat", "numbers/late_entropy", 5.3),
        ("large", "above_1.1/predicted", 1002),
        ("half", "curve", [{"step": [0, 100, 200], LOGIT_STD: [0.5, 0.3, 0.1]}] * 6),
        ("half", "curve", [{"step": [0, 100, 200], LOGIT_STD: [0.5, 0.4, 0.3]}] * 6),
        ("recovery", "numbers/milestones/1000/unique", 14),
        ("recovery", "numbers/milestones/1000/loss", 5.9),
        ("recovery", "numbers/milestones/1000/logit_std", 1e-3),
        ("early", "numbers/milestones/50/unique", 100),
        ("means", "numbers/unique_stage1", 25),
        ("losses", "numbers/loss_mean", 9.7),
        ("losses", "numbers/loss_final", 9.93),
    ],
)
def test_claims_fail_on_rows_that_are_otherwise(name, column, value):
    assert claims.judge(CLAIMS[name], BOOKS, frame(**{column: value})).status == claims.FAILS


def test_two_seeds_or_one_length_decide_nothing():
    statuses = {name: claims.judge(claim, BOOKS, frame(2)).status for name, claim in CLAIMS.items()}
    assert set(statuses.values()) == {claims.UNDECIDED}
    df = frame()
    df = df[df["steps"] == 1000]
    assert claims.judge(CLAIMS["recovery"], BOOKS, df).status == claims.UNDECIDED


def test_longer_runs_alone_decide_the_recovery_and_nothing_else():
    df = frame()
    df = df[df["steps"] > 1000]
    statuses = {name: claims.judge(claim, BOOKS, df).status for name, claim in CLAIMS.items()}
    assert statuses.pop("recovery") == claims.HOLDS
    assert set(statuses.values()) == {claims.UNDECIDED}
