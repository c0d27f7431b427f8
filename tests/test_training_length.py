"""Runs of unequal length: schedules, equal steps and summed rates, cut logs, conclusions."""

import dataclasses
import json

import numpy as np
import pytest

from bitnet_jax import optim, presets
from bitnet_jax.config import Config, RunConfig
from experiments import common, stats, training_length
from experiments.training_length import KINDS, LOSS, MI, UNIQUE

BASE = 40
LENGTHS = (40, 400, 800)


def request(cfg, hyper=None, workdir=None):
    return common.Request("tiny", cfg, [0], hyper or {}, [], workdir, True, None)


def test_at_the_reports_size_the_runs_are_its_three_and_their_numbers_its_recipe():
    arms = training_length.arms(request(presets.preset("report")))
    assert [arm.run["steps"] for arm in arms] == [1000, 1000, 10_000, 10_000, 20_000, 20_000]
    for arm in arms:
        recipe = presets.RECIPES[arm.recipe](arm.run["steps"])
        assert recipe.replace(**arm.hyper) == recipe


def test_the_warmup_is_the_same_for_all_lengths_unless_set():
    cfg = dataclasses.replace(Config(), run=RunConfig(steps=BASE))
    assert {arm.hyper["warmup_steps"] for arm in training_length.arms(request(cfg))} == {15.0}
    assert not any(arm.hyper for arm in training_length.arms(request(cfg, {"warmup_steps": 3.0})))


def test_equal_steps_are_evaluated_in_all_runs_that_reach_them():
    steps = {t: training_length.grid(BASE, RunConfig(t, eval_every=5)) for t in LENGTHS}
    assert steps[40] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert steps[400] == [s for s in steps[800] if s <= 400]
    assert set(range(40, 801, 40)) <= set(steps[800])
    report = training_length.grid(1000, RunConfig(20_000, eval_every=5))
    assert {500, 1000, 1500, 2000, 10_000, 12_000} <= set(report)


def curve_of(t, hyper, loss, unique):
    """A row's numbers from functions of the step."""
    steps = training_length.grid(BASE, RunConfig(t, eval_every=5))
    at = {LOSS: [loss(s) for s in steps], UNIQUE: [unique(s) for s in steps]}
    at[MI] = [8 - x for x in at[LOSS]]
    return {
        "steps": t,
        "base": BASE,
        "hyper": dataclasses.asdict(hyper),
        "at": {"step": steps} | at,
        "curve": {"step": [0, *steps]} | {k: [8.0, *v] for k, v in at.items()},
    }


def made_rows(final=(6.5, 6.2, 6.0), unique=(10, 20, 30), seeds=3, loss=None):
    """Rows of both recipes; loss falls in a line to `final`, or is `loss(t, seed)(step)`."""
    rows = []
    for kind, recipe in KINDS.items():
        for t, end, count in zip(LENGTHS, final, unique, strict=True):
            hyper = presets.RECIPES[recipe](t).replace(warmup_steps=15.0)
            for seed in range(seeds):

                def line(step, t=t, end=end, seed=seed):
                    return 8 - (8 - end) * step / t + 0.01 * seed

                at = loss(t, seed) if loss else line
                row = curve_of(t, hyper, at, lambda step, count=count: count)
                numbers = {LOSS: at(t), MI: 8 - at(t), UNIQUE: count}
                row |= {
                    "arm": f"{kind} {t}",
                    "seed": seed,
                    "final": numbers
                    | {
                        "collapse/entropy": 6.0,
                        "collapse/logit_std": 1.0,
                        "collapse/verdict": "healthy",
                    },
                    "unique_stage1": count,
                    "unique_stage2": count / 2,
                    "severe": 2,
                    "evaluations": 8,
                    "cut_log": {"points": 8, "unique": count, "severe": 4, "train_loss": 7.0},
                    "references": {
                        **{
                            name: {"loss": x, "entropy": x, "distinct": 1}
                            for name, x in (("uniform", 8), ("unigram", 7), ("bigram", 5))
                        },
                        "targets": {"distinct": 30},
                        "tracked_positions": 128,
                    },
                }
                if t == LENGTHS[-1]:
                    row["stopped_early"] = {"step": BASE, "identical": True}
                rows.append(row)
    return rows


def test_the_summed_rate_is_that_of_the_schedule():
    (row, *_) = made_rows()
    hyper = presets.RECIPES["report"](40).replace(warmup_steps=15.0)
    rates = optim.learning_rate(hyper, np.arange(1, 41), RunConfig(40))
    np.testing.assert_allclose(training_length.sum_lr(row)[-1], np.sum(rates), rtol=1e-6)
    assert training_length.sum_lr(row)[0] == 0 and len(training_length.sum_lr(row)) == 41


def test_runs_at_equal_summed_rate_are_read_between_evaluations():
    """In warm-up the summed rate after n steps is peak * n (n + 1) / (2 * 15)."""
    rows = made_rows(final=(6.0, 6.0, 6.0))
    total = 1.5e-3 * 7 * 8 / 30
    found = training_length.at_sum_lr(rows, "coupled 800", total, LOSS)
    low, high = (1.5e-3 * n * (n + 1) / 30 for n in (5, 10))
    share = (total - low) / (high - low)
    want = 8 - 2 * (5 + share * 5) / 800
    assert found[0] == pytest.approx(want, rel=1e-9) and found[2] == pytest.approx(want + 0.02)


def test_runs_part_where_their_interval_first_excludes_zero():
    """Equal to step 15; at 20 one seed differs, which is no effect; from 25 all do."""

    def loss(t, seed):
        def at(step):
            differs = t == 800 and (step > 20 or (step == 20 and seed == 0))
            return 7.0 + 0.01 * seed + (0.5 if differs else 0.0)

        return at

    rows = made_rows(loss=loss)
    assert training_length.parting(rows, "coupled 40", "coupled 800", LOSS) == (15, 25)
    assert training_length.parting(rows, "coupled 40", "coupled 400", LOSS) == (40, None)


def test_runs_that_differ_from_the_start_are_never_equal():
    rows = made_rows(final=(6.5, 6.2, 6.0))
    assert training_length.parting(rows, "coupled 400", "coupled 800", LOSS) == (None, 5)


@pytest.mark.parametrize(
    ("final", "told"),
    [((6.5, 6.2, 6.4), "400 steps end with the lowest held-out loss"),
     ((6.5, 6.2, 6.0), "no sweet spot at 400 steps: the longest run ends with a lower loss"),
     ((6.0, 6.2, 6.4), "no sweet spot at 400 steps: the shortest run ends with a lower loss"),
     ((6.5, 6.2, 6.2), "no sweet spot seen at 400 steps (no effect seen (n=3)")],
)  # fmt: skip
def test_a_sweet_spot_needs_the_lowest_loss(final, told):
    study = training_length.analyse(made_rows(final))
    assert told in study.conclusion


def test_distinct_tokens_make_no_sweet_spot():
    """The report's pattern of counts with a loss that goes on falling."""
    study = training_length.analyse(made_rows(unique=(9, 29, 26)))
    assert "no sweet spot at 400 steps" in study.conclusion
    assert "stage-1 average +3.0 [+3.0, +3.0] (n=3)" in study.result
    assert "of 800 against 40 steps: stage-1 average +17.0 [+17.0, +17.0]" in study.result


def test_one_seed_shows_no_effect():
    study = training_length.analyse(made_rows(seeds=1))
    assert study.n == 1 and "no sweet spot seen at 400 steps" in study.conclusion


def test_an_early_stop_that_differs_is_told():
    rows = made_rows()
    rows[-1]["stopped_early"]["identical"] = False
    assert "has the same log in 5 of 6 runs" in training_length.analyse(rows).result


def test_tied_and_common_schedules_are_compared_at_the_shorter_run_s_last_step():
    rows = made_rows(final=(6.5, 6.2, 6.0))
    table = training_length.schedule_table(rows)
    assert [line[0] for line in table.rows[:2]] == ["coupled, step 40", "coupled, step 400"]
    assert table.rows[0][1].startswith(f"{6.5 - (8 - 2 * 40 / 800):+.3f}")


def test_rows_hold_the_average_of_a_cut_log(tmp_path):
    """Steps 5 to 90 of 800, as 5 to 2260 of 20,000; severe is fewer than 3 distinct tokens."""
    rows = []
    for step in range(0, 401, 5):
        unique = 2 if step == 5 else 30 if step <= 90 else 1
        row = {"step": step, "replicate": 0}
        rows.append(row | {"kind": "eval", LOSS: 7.0, MI: 0.123456789, UNIQUE: unique})
        rows.append(row | {"kind": "train", "train/loss": 9.0 if step <= 90 else 1.0})
    text = "".join(json.dumps(row) + "\n" for row in rows[:1] + rows[2:])
    (tmp_path / "metrics.jsonl").write_text(text)
    cfg = dataclasses.replace(Config(), run=RunConfig(400, eval_every=5))
    found = training_length.details(BASE, tmp_path, cfg, 0)
    assert found["cut_log"] == {
        "points": 18,
        "unique": float(f"{(2 + 17 * 30) / 18:.5g}"),
        "severe": 1,
        "train_loss": 9.0,
    }
    assert found["at"]["step"][-1] == 400 and found["at"][MI][0] == 0.12346
    assert "stopped_early" not in found


def test_runs_that_follow_the_summed_rate_agree_there_and_not_at_equal_steps():
    """Loss as a function of the summed rate alone, linear between the steps of the curves."""

    def loss(t, seed):
        hyper = presets.RECIPES["report"](t).replace(warmup_steps=15.0)
        rates = optim.learning_rate(hyper, np.arange(t + 1), RunConfig(t))
        total = np.cumsum(np.asarray(rates, float))
        return lambda step: 8 - total[step] + 0.01 * seed

    rows = made_rows(loss=loss)
    total = training_length.sum_lr(rows[3])[-1]
    rate, step = (
        stats.paired(*(read(rows, f"coupled {t}", where, LOSS) for t in (400, 800)))
        for read, where in (
            (training_length.at_sum_lr, total),
            (training_length.at_step, 400),
        )
    )
    assert rows[3]["arm"] == "coupled 400"
    assert rate.mean == pytest.approx(0, abs=1e-6) and step.mean > 0.01
    result = training_length.analyse(rows).result
    assert f"both at step 400 {stats.effect_text(step)}" in result
    assert f"both at the same summed learning rate {stats.effect_text(rate)}" in result


def test_the_report_s_statistics_stand_beside_loss_and_mutual_information():
    table = training_length.statistics_table(made_rows(seeds=1))
    found = dict(zip(table.columns, table.rows[-1], strict=True))
    assert found == {
        "run": "decoupled 800",
        "stage 1": "30.0",
        "stage 2": "15.0",
        "severe": "25.0%",
        "cut log": "30.0",
        "cut log: severe": "50.0%",
        "cut log: train loss": "7.00",
        "held-out loss at T": "6.000",
        "context MI at T": "2.000",
        "distinct at T": "30",
    }
    assert "ends at step 90" in table.note
