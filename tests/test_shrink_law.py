"""The law against logs that follow it, or do not, by construction; what rows bear out."""

import types

import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import presets, shrink
from bitnet_jax.config import Replicate, RunConfig
from bitnet_jax.fields import UserError
from experiments import shrink_law as study
from experiments.lab import arms, claims, rows
from experiments.lab.studies import BOOKS

CLAIMS = {claim.name: claim for claim in study.CLAIMS}


def config_of(steps=300, layout="report"):
    return presets.override(
        presets.preset("tiny"),
        [f"run.steps={steps}", f"model.layout={layout}", "model.d_model=64", "run.eval_every=5",
         "model.vocab_size=300"],
    )[0]  # fmt: skip


def test_warm_ups_are_shares_of_the_length():
    request = arms.Request("toy", "tiny", config_of(1000), {}, [0], workdir="unused")
    hypers = {arm.name: arms.replicates(request, arm, 1)[1][0].hyper for arm in study.ARMS}
    assert [hypers[name].warmup_steps for name in (study.SHORT, study.LONG)] == [25, 400]
    assert (hypers[study.LEAST].coupled_1, hypers[study.DECOUPLED].coupled_1) == (0.001, 0)


def test_another_layout_is_refused():
    study.check(config_of())
    with pytest.raises(UserError, match=r"model\.layout=report"):
        study.check(config_of(layout="b158"))


def run_of(recipe, ratio):
    """A run whose spread of logits is 0.5 times `ratio(steps)`, and half of its updates decay."""
    cfg = config_of()
    steps = np.arange(0, cfg.run.steps + 1, cfg.run.eval_every)
    columns = {study.LOGIT_STD: 0.5 * ratio(steps)[None]}
    columns |= {study.UPDATE_SHARE + g: np.full((1, len(steps) - 1), 0.5) for g in study.GROUPS}
    return types.SimpleNamespace(
        cfg=cfg,
        replicates=[Replicate(recipe, 0, presets.RECIPES[recipe](cfg.run))],
        steps=steps,
        column=lambda key, kind="eval": columns[key],
        trains=[[{"step": step} for step in steps[1:].tolist()]],
    )


def test_a_log_that_follows_the_law_is_measured_so():
    cfg, hyper = config_of(), presets.RECIPES["coupled"](RunConfig(steps=300))
    total = shrink.summed_rate(cfg.run, hyper)
    run = run_of("coupled", lambda steps: shrink.spread_ratio(total[steps], 64**-0.5))
    numbers = study.against_law(run, 0)
    assert numbers["law_error"] == pytest.approx(0, abs=1e-6)
    assert numbers["half_step"] == pytest.approx(numbers["half_step_predicted"], abs=0.3)
    assert numbers["mean_share"] == dict.fromkeys(study.GROUPS, 0.5)
    assert numbers["spread"]["measured"] == numbers["spread"]["law"]


def test_a_log_that_keeps_its_spread_breaks_the_law():
    numbers = study.against_law(run_of("decoupled", lambda steps: np.ones(len(steps))), 0)
    assert numbers["half_step"] is None
    assert 0.4 < numbers["law_error"] <= 0.5


def test_a_kept_curve_has_its_ends():
    kept = study.thin(np.arange(1001))
    assert (len(kept), kept[0], kept[-1]) == (study.POINTS, 0, 1000)
    assert study.thin(np.array([1.23456])) == [1.235]


def lawful(seed, head=0.8):
    """Half the spread at step 41 of 40 predicted, and regrown at the end."""
    return {
        "half_step": 41.0,
        "half_step_predicted": 40.0,
        "law_error": 0.01 + 0.001 * seed,
        "share": {"step": [20, 40, 300], "head": [head, head, 0.0]},
        "spread": {"step": [0, 300], "measured": [1, 0.3], "law": [1, 0.0]},
    }


def frame(**changed):
    """Three seeds; coupled decay of 0.1 and 1 follows the law and has not learned, the rest has.

    `changed` are numbers of the coupled arm's `shrink`.
    """
    losses = {arm: [7.0, 7.1, 7.2] for arm in study.LAWFUL}
    losses |= {study.LESS: [3.5] * 3, study.LEAST: [3.0, 3.02, 3.04], study.DECOUPLED: [3.0] * 3}
    run_rows = make_rows(losses)
    for row in run_rows:
        numbers = lawful(row["seed"], 0.01 if row["arm"] == study.DECOUPLED else 0.8)
        if row["arm"] not in study.LAWFUL:
            numbers |= {"half_step": None, "law_error": 0.2}
        if row["arm"] == study.COUPLED:
            numbers |= changed
        row["extra"] |= {"shrink": numbers, "above_1.1": {"embedding": 990, "predicted": 1000.0}}
    return rows.frame(run_rows)


def status(name, df):
    return claims.judge(CLAIMS[name], BOOKS, df).status


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_on_rows_that_are_so_by_construction(name):
    assert status(name, frame()) == claims.HOLDS


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("onset", {"law_error": 0.3}),
        ("step", {"half_step": 60.0}),
        ("only", {"spread": {"step": [0, 300], "measured": [1, 0.1], "law": [1, 0.0]}}),
        ("head", {"share": {"step": [20, 40, 300], "head": [0.8, 0.4, 0.9]}}),
    ],
)
def test_claims_fail_on_rows_that_are_otherwise(name, changed):
    assert status(name, frame(**changed)) == claims.FAILS


def test_claims_of_amounts_follow_losses_and_counts():
    df = frame()
    assert status("amount", df.replace({"arm": {study.LEAST: "x", study.LESS: study.LEAST}})) == (
        claims.FAILS
    )
    assert status("large", df.assign(**{study.LOSS: 1.0})) == claims.FAILS
    assert status("counts", df.assign(**{"above_1.1/embedding": 900})) == claims.FAILS
    assert status("less", df.assign(**{"shrink/half_step": 100.0})) == claims.FAILS
    assert status("onset", df[df["seed"] < 2]) == claims.UNDECIDED
