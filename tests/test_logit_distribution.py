"""Statistics of logits have their closed forms; what rows bear out."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_rows import REFERENCES, make_rows

from bitnet_jax import presets, program
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, MODE_SHARE
from experiments import logit_distribution as study
from experiments.lab import claims, logits, rows
from experiments.lab.finished import Finished
from experiments.lab.studies import QUICK

V = 4096
CLAIMS = {claim.name: claim for claim in study.CLAIMS}


@pytest.fixture(scope="module")
def gaussian():
    """Independent logits with the spread of the report's head at initialisation, 1 / sqrt(3)."""
    return np.random.default_rng(0).normal(0, 0.577, (256, V)).astype(np.float32)


def test_independent_gaussian_logits_have_the_entropy_of_the_approximation(gaussian):
    got = logits.describe(gaussian)
    assert got["entropy"] == pytest.approx(np.log(V) - 0.577**2 / 2, abs=0.01)
    assert got["gaussian_entropy"] == pytest.approx(got["entropy"], abs=0.01)
    assert got["std"] == pytest.approx(0.577, abs=1e-3)


def test_independent_gaussian_logits_have_one_mode_and_no_shared_direction(gaussian):
    zc = logits.centred(gaussian)
    assert logits.bimodality(zc) == pytest.approx(1 / 3, abs=0.01)
    assert logits.skewness(zc) == pytest.approx(0, abs=0.01)
    assert logits.shared_direction(zc) == pytest.approx(1 / 256, rel=0.1)
    assert logits.describe(gaussian)["p95"] == pytest.approx(1.6449 * 0.577, abs=0.01)


def test_near_maximal_entropy_and_one_predicted_token_go_together():
    """The report's paradox: one small direction that every position shares."""
    row = np.random.default_rng(1).normal(0, 0.1, V)
    got = logits.describe(np.tile(row, (64, 1)))
    assert got["entropy"] > 0.999 * np.log(V)
    assert (got["distinct"], got["shared"]) == (1, pytest.approx(1))
    assert got["context_std"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([-1.0, 1.0] * 50, 1.0), (np.linspace(-1, 1, 100_001), 5 / 9)],
    ids=["two points", "uniform"],
)
def test_bimodality_of_two_points_is_1_and_of_the_uniform_5_ninths(values, expected):
    assert logits.bimodality(values) == pytest.approx(expected, abs=1e-4)


def test_one_hot_logits_are_certain():
    z = np.zeros((3, V), np.float32)
    z[[0, 1, 2], [5, 6, 6]] = 1e4
    got = logits.describe(z)
    assert (got["entropy"], got["distinct"], got["gap"]) == (0, 2, 1e4)
    assert got["float32/tied"] == got["bfloat16/kl"] == 0


def test_constant_rows_are_uniform_and_tied():
    z = np.repeat(np.float32([[1.0], [-7.0]]), V, axis=1)
    assert logits.entropy(logits.softmax(z)) == pytest.approx([np.log(V)] * 2, abs=1e-12)
    loss = logits.precision_loss(z, jnp.float32)
    assert (loss["tied"], loss["argmax_changed"]) == (1, 0)


def test_softmax_in_float32_is_not_the_cause_of_anything(gaussian):
    loss = logits.precision_loss(gaussian, jnp.float32)
    assert max(loss["sum_error"], loss["entropy_error"], loss["kl"]) < 1e-6
    assert loss["argmax_changed"] == 0


def test_bfloat16_ties_logits_that_float32_tells_apart():
    """bfloat16 has 8 bits of precision: 1 + 2^-9 rounds to 1, and the lowest id wins the tie."""
    z = np.float32([[0.0, 1.0, 1 + 2**-9, -1.0]])
    loss = logits.precision_loss(z, jnp.bfloat16)
    assert (loss["tied"], loss["argmax_changed"]) == (1, 1)
    assert loss["sum_error"] > 1e-4 or loss["kl"] > 1e-8
    assert logits.precision_loss(z, jnp.float32)["tied"] == 0


def test_gap_is_the_distance_of_the_two_largest():
    z = np.float32([[0, 3, 1], [2, 2.5, 0], [9, 0, 2]])
    got = logits.describe(z)
    assert (got["gap"], got["distinct"], got["mode_share"]) == (2, 2, pytest.approx(2 / 3))


def test_measured_logits_agree_with_the_evaluation_of_the_run(tiny):
    """At initialisation, which no checkpoint holds."""
    built = program.build(tiny, presets.make_replicates(tiny, [3, 4], {}))
    run = types.SimpleNamespace(
        cfg=built.cfg,
        replicates=built.replicates,
        kept_steps=[],
        tokens=built.tokens,
        states_at=lambda step: Finished.states_at(run, step),
        replicate=lambda tree, index: jax.tree.map(lambda x: x[index], tree),
    )
    logit_stats = study.measure(run)["logits"]
    with jax.set_mesh(built.mesh):
        evaluated = jax.device_get(built.evaluate(built.init()))
    assert logit_stats[0] != logit_stats[1] and logit_stats[0]["step"] == [0]
    wanted = {"distinct": DISTINCT, "mode_share": MODE_SHARE, "entropy": ENTROPY, "std": LOGIT_STD}
    for name, key in wanted.items():
        measured = [numbers[name][0] for numbers in logit_stats]
        np.testing.assert_allclose(measured, evaluated[key], rtol=0.01)


# --------------------------------------------------------------------------------------- claims


def frame(**changed):
    """Three seeds of both arms; `changed` are last numbers of the coupled arm.

    The bigram predicts 5 distinct tokens, and an entropy is 6 at most.
    """
    run_rows = make_rows({arm: [5.0, 5.1, 5.2] for arm in study.ARM_NAMES})
    rounding = {"prediction_changed": 0.0, "sum_error": 1e-7, "entropy_error": 1e-8}
    for row in run_rows:
        numbers = {"entropy": 5.9, "gaussian_entropy": 5.98, "distinct": 1, "mode_share": 0.9,
                   "context_std": 0.1}  # fmt: skip
        numbers |= {f"{dtype}/{k}": x for dtype in ("float32", "bfloat16")
                    for k, x in rounding.items()}  # fmt: skip
        if row["arm"] == study.COUPLED:
            numbers |= changed
        else:
            numbers |= {"entropy": 3.0, "mode_share": 0.1, "context_std": 0.7}
        row["extra"]["logits"] = {k: [0.0, x] for k, x in numbers.items()}
    return rows.frame(run_rows)


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_on_rows_that_are_so_by_construction(name):
    assert REFERENCES["bigram"]["distinct"] == 5
    assert claims.judge(CLAIMS[name], QUICK, frame()).status == claims.HOLDS


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("paradox", {"entropy": 5.0}),
        ("paradox", {"distinct": 4}),
        ("spread", {"gaussian_entropy": 5.95}),
        ("spread", {"entropy": 5.6, "gaussian_entropy": 5.98}),
        ("same", {"mode_share": 0.5}),
        ("context", {"context_std": 0.5}),
        ("numerics", {"float32/sum_error": 0.3}),
        ("numerics", {"float32/prediction_changed": 0.01}),
        ("bfloat16", {"bfloat16/entropy_error": 0.1}),
    ],
)
def test_claims_fail_on_rows_that_are_otherwise(name, changed):
    assert claims.judge(CLAIMS[name], QUICK, frame(**changed)).status == claims.FAILS
