"""Runs of unequal length: schedules, equal steps and summed rates, cut logs, claims."""

import types
from dataclasses import asdict, replace

import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import presets
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import DISTINCT, LOSS, MUTUAL_INFORMATION, TRAIN_LOSS
from experiments import training_length as study
from experiments.lab import arms, exhibits, rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.studies import QUICK

LENGTHS = (40, 400, 800)
ENDS = {"coupled": (7.5, 7.0, 7.3), "decoupled": (7.0, 5.5, 5.0)}  # make_rows: unigram's loss 4
COUNTS = (500, 100, 70)


def make(ends=ENDS, counts=COUNTS, seeds=3):
    """Rows of both recipes: the loss falls in a line from 8 to its end, plus the seed / 100."""
    run_rows = []
    for kind, losses in ends.items():
        for steps, end, count in zip(LENGTHS, losses, counts, strict=True):
            hyper = presets.RECIPES[kind](RunConfig(steps=steps)).replace(warmup_steps=15.0)
            some = [end + seed / 100 for seed in range(seeds)]
            for row in make_rows({kind: some}, steps=steps, context=0.5):
                at = [step for step in LENGTHS if step <= steps]
                line = [8 - (8 - row["final"][LOSS]) * step / steps for step in at]
                row["config"]["hyper"] = asdict(hyper)
                row["final"][DISTINCT] = count
                row["curve"] = {"step": [0, steps], LOSS: [8.0, row["final"][LOSS]]}
                row["curve"] |= {key: [1.0, 1.0] for key in (DISTINCT, MUTUAL_INFORMATION)}
                row["extra"] |= {
                    "at": {"step": at, LOSS: line, DISTINCT: [count] * len(at)},
                    "unique_stage1": count,
                    "unique_stage2": count / 2,
                    "cut_log": {"unique": count, "train_loss": 7.0},
                }
                run_rows.append(row)
    return rows.frame(run_rows)


def statuses(*args, **more):
    df = make(*args, **more)
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


def warmups(preset, **hyper):
    """Warm-up steps of the replicates that would be trained at all lengths."""
    cfg = presets.preset(preset)
    request = arms.Request("toy", preset, cfg, hyper, [0], "unused", lengths=study.TIMES)
    warmup_steps = set()

    def train_arms(request, arms_, measure):
        for length in request.lengths:
            for arm in arms_:
                _, replicates, _ = arms.replicates(request, arm, length)
                warmup_steps.update(rep.hyper.warmup_steps for rep in replicates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train_arms", train_arms)
        study.train(request, list(study.ARMS), study.measure)
    return warmup_steps


def test_the_warm_up_is_the_same_for_all_lengths_unless_set():
    assert warmups("report") == {375}
    assert warmups("tiny") == {8}
    assert warmups("tiny", warmup_steps=3.0) == {3}


def test_ends_of_shorter_runs_must_be_evaluated():
    cfg = presets.preset("report")
    study.check(cfg)
    with pytest.raises(UserError, match=r"run\.eval_every=7"):
        study.check(replace(cfg, run=replace(cfg.run, eval_every=7)))


def test_a_row_holds_the_ends_of_shorter_runs_and_the_averages_of_a_cut_log():
    """Base 40: the log is cut at step 90, as the report's at 2260 of 1000, 10,000 and 20,000."""
    steps = np.arange(0, 401, 5)
    columns = {key: np.stack([steps, 2.0 * steps]) for key in study.KEYS}
    columns[DISTINCT] = np.where(steps <= 90, 30, 1) * np.ones((2, 1))
    columns[TRAIN_LOSS] = np.where(steps[1:] <= 90, 9.0, 1.0) * np.ones((2, 1))
    run = types.SimpleNamespace(
        steps=steps,
        trains=[[{"step": step} for step in steps[1:]]],
        replicates=[0, 1],
        column=lambda key, kind="eval": columns[key],
    )
    numbers = study.measure(run, base=40)
    assert numbers["cut_log"] == [{"unique": 30, "train_loss": 9}] * 2
    assert numbers["at"][1]["step"] == [40, 400] and numbers["at"][1][LOSS] == [80, 800]


def test_the_summed_rate_in_warm_up_is_a_sum_of_integers():
    row = make().iloc[0]
    total = study.sum_lr(row)
    np.testing.assert_allclose(
        total[:16], 1.5e-3 * np.arange(16) * np.arange(1, 17) / 30, rtol=1e-5
    )
    assert len(total) == 41
    run = RunConfig(40, late_schedule=True)
    row["config"]["run"] = asdict(run)
    np.testing.assert_allclose(study.sum_lr(row)[1], 1.5e-3, rtol=1e-6)  # the peak at update 1


def test_runs_at_equal_summed_rate_are_read_between_evaluations():
    df = make()
    row = df[(df["arm"] == "coupled") & (df["steps"] == 800)].iloc[0]
    half = float(np.interp(400, np.arange(801), study.sum_lr(row)))
    losses = study.at_sum_lr(df, "coupled", 800, half, LOSS)
    ends = study.sum_lr(row)[-1]
    np.testing.assert_allclose(losses[0], 8 - (8 - 7.3) * half / ends, rtol=1e-6)


def test_differences_at_the_ends_and_at_the_same_step():
    df = make()
    assert study.longer(df, "coupled", LOSS, 40, 400).mean == pytest.approx(-0.5)
    at_40 = 8 - (8 - 7.01) * 40 / 400  # of the mean over seeds
    assert study.same_step(df, "coupled", LOSS, 40, 400).mean == pytest.approx(at_40 - 7.51)


def test_claims_hold_on_rows_made_to_bear_them():
    outcomes = statuses()
    assert outcomes == {"decoupled": HOLDS, "coupled": HOLDS, "distinct": HOLDS, "schedule": HOLDS}


def test_claims_fail_on_rows_that_contradict_them():
    fell = statuses({"coupled": (7.5, 7.3, 7.0), "decoupled": (7.0, 5.0, 5.5)}, counts=(9, 29, 26))
    assert set(fell.values()) == {FAILS} and len(fell) == 4
    learned = statuses(ENDS | {"coupled": (7.5, 3.0, 7.3)})
    assert learned["coupled"] == FAILS


def test_two_lengths_or_two_seeds_decide_nothing():
    df = make()
    short = df[df["steps"] < 800]
    assert {judge(claim, QUICK, short).status for claim in study.CLAIMS} == {UNDECIDED}
    assert set(statuses(seeds=2).values()) == {UNDECIDED}


def test_lengths_stand_beside_each_other_in_every_pair():
    df = make()
    shown = exhibits.Exhibits(df)
    study.show(df, shown)
    assert [row[0] for row in shown.tables[-1].rows[:3]] == [
        "coupled, 400 - 40", "coupled, 800 - 40", "coupled, 800 - 400"
    ]  # fmt: skip
