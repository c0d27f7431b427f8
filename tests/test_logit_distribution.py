"""Statistics of logits have their closed forms; the analysis says what the rows show."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import log, presets, run
from experiments import logit_distribution as study
from experiments import logits

V = 4096


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


REFERENCES = {
    "tracked_positions": 1024,
    "targets": {"distinct": 394},
    "uniform": {"loss": 7.62, "entropy": 7.62, "distinct": 1},
    "unigram": {"loss": 6.49, "entropy": 6.33, "distinct": 1},
    "bigram": {"loss": 4.39, "entropy": 4.09, "distinct": 185},
}


def rows(**coupled):
    """Rows of three seeds: noise at step 0, then the given last numbers of the coupled arm."""
    start = logits.describe(np.random.default_rng(0).normal(0, 0.577, (16, 2048)))
    small = {"entropy": 7.6, "gaussian_entropy": 7.61, "distinct": 4, "std": 0.1}
    small |= {"context_std": 0.01, "gap": 0.3, "mode_share": 0.97}
    wide = {"entropy": 5.0, "context_std": 0.7, "gap": 0.3}
    last = {"report": small | coupled, "report_decoupled": wide}
    return [
        {
            "arm": arm,
            "seed": seed,
            "steps": 300,
            "references": REFERENCES,
            "logits": {"step": [0, 300]}
            | {k: [v, ended.get(k, v) * (1 + 1e-4 * seed)] for k, v in start.items()},
        }
        for arm, ended in last.items()
        for seed in range(3)
    ]


def test_small_shared_logits_are_named_as_what_explains_the_paradox():
    found = study.analyse(rows())
    told = found.conclusion
    assert "the paradox is there at step 300 (n=3): entropy 7.60" in told
    assert "4 distinct predictions of 1024 (text 394, bigram 185, unigram 1)" in told
    assert "accounts for the entropy: ln V - s^2/2 = 7.61 [7.61, 7.61]" in told
    assert "numerics do not explain it" in told
    assert "no sign of several modes" in found.result
    seldom, can = found.result.split("; decoupled, ")
    assert "less than the 0.30" in seldom and "97% of positions predict the same" in seldom
    assert "more than the 0.30" in can


@pytest.mark.parametrize("changed", [{"entropy": 6.0, "gaussian_entropy": 6.0}, {"distinct": 150}])
def test_low_entropy_or_many_predictions_are_no_paradox(changed):
    assert study.analyse(rows(**changed)).conclusion.startswith("no paradox at step 300 (n=3)")


@pytest.mark.parametrize(
    ("gaussian", "told"),
    [(7.65, "accounts for"), (7.3, "alone puts it near the maximum"), (6.0, "does not account")],
)
def test_spread_is_credited_only_as_far_as_the_approximation_holds(gaussian, told):
    assert (
        f"s = 0.10 [0.10, 0.10], {told}"
        in study.analyse(rows(gaussian_entropy=gaussian)).conclusion
    )


def test_a_tail_above_the_limit_of_one_mode_is_described():
    told = study.analyse(rows(bimodality=0.62, skewness=6.3, p95=0.3, p100=4.7)).result
    assert "skewness 6.3 [6.3, 6.3]: a narrow bulk (p95 0.30) and few" in told


def test_a_gap_that_seeds_disagree_about_decides_nothing():
    several = rows(context_std=0.3)
    several[0]["logits"]["gap"][-1] = 0.1
    assert "no difference seen (n=3) from the" in study.analyse(several).result


@pytest.mark.parametrize("key", ["float32/sum_error", "float32/entropy_error"])
def test_an_inaccurate_softmax_is_not_ruled_out(key):
    told = study.analyse(rows(**{key: 0.3})).conclusion
    assert "numerics may explain part of it" in told


def test_figures_and_tables_show_both_arms_and_every_step():
    found = study.analyse(rows())
    assert ">ln V<" in found.figures[0][1] and ">p1 to p99<" in found.figures[2][1]
    assert [r[0] for r in found.tables[-1].rows] == [
        f"{arm}, step {step}" for arm in ("report", "report_decoupled") for step in (0, 300)
    ]


def test_measured_logits_agree_with_the_evaluations_of_the_run(tiny, tmp_path):
    run_cfg = dataclasses.replace(
        tiny.run, steps=4, eval_every=2, save_every=2, checkpoint_every=2, recipes=("report",)
    )
    cfg = dataclasses.replace(tiny, run=run_cfg)
    run.run(cfg, presets.make_replicates(cfg, [3, 4], {}), tmp_path / "work")
    found = study.measure(tmp_path / "work", cfg, 1)["logits"]
    evals = [
        row
        for row in log.read_rows(tmp_path / "work" / "metrics.jsonl")
        if row["kind"] == "eval" and row["replicate"] == 1
    ]
    assert found["step"] == [row["step"] for row in evals] == [0, 2, 4]
    assert found["distinct"] == [row["collapse/unique_tokens"] for row in evals]
    for key in ("mode_share", "entropy", "logit_std"):
        wanted = [row[f"collapse/{key}"] for row in evals]
        assert found[key.removeprefix("logit_")] == pytest.approx(wanted, rel=0.01)
