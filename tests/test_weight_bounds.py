"""Weights over a run's kept steps, what decay alone leaves of them, and what rows bear out."""

import types

import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import inspection, optim, presets, shrink
from bitnet_jax.config import Hyper, OptimConfig, Replicate, RunConfig
from experiments import weight_bounds as study
from experiments.lab import claims, rows, weights
from experiments.lab.studies import QUICK

RNG = np.random.default_rng(0)
START = np.linspace(0.5, 3, 11)
CLAIMS = {claim.name: claim for claim in study.CLAIMS}


def config_of(steps, layout="report"):
    """A whole embedding of 50257 x 256 entries, and schedules that step before the optimiser."""
    cfg = presets.preset("report" if layout == "report" else "b158")
    sets = [f"run.steps={steps}", "run.late_schedule=false", "model.vocab_size=50257"]
    return presets.override(cfg, sets)[0]


# ------------------------------------------------------------------------------ what decay leaves


def test_coupled_decay_alone_is_the_scalar_adam_recursion():
    cfg, hyper = config_of(200), presets.RECIPES["coupled"](RunConfig(steps=200))
    path = weights.without_gradient(cfg, hyper, START)
    end = shrink.starved_weight(START, OptimConfig(), RunConfig(steps=200), hyper)
    np.testing.assert_allclose(path[0], START)
    np.testing.assert_allclose(path[-1], end, rtol=1e-4)


def test_decoupled_decay_alone_is_the_product_of_its_factors():
    cfg = config_of(40)
    hyper = Hyper(decoupled_1=0.1, decoupled_2=0.05, decay_rest=1.0, warmup_steps=4.0)
    lr = np.asarray(optim.learning_rate(hyper, np.arange(1, 41), cfg.run))
    factors = np.cumprod(1 - lr * np.where(np.arange(1, 41) <= 20, 0.1, 0.05))
    path = weights.without_gradient(cfg, hyper, START)
    np.testing.assert_allclose(path[1:] / START, factors[:, None].repeat(11, 1), rtol=1e-5)


def test_the_count_for_the_reports_run():
    """979,330 of its 12,865,792 embedding entries; the report counted 981,223."""
    cfg, hyper = config_of(1000), presets.RECIPES["coupled"](RunConfig(steps=1000))
    first, last = weights.counts_without_gradient(cfg, hyper, [0, 1000])
    np.testing.assert_allclose(first, 12_865_792 * 0.271332, rtol=1e-4)
    np.testing.assert_allclose(last, 979_330, rtol=1e-4)


def test_a_small_initialisation_has_nothing_above_the_threshold():
    cfg, hyper = config_of(40, "b158"), presets.RECIPES["published"](RunConfig(steps=40))
    assert weights.counts_without_gradient(cfg, hyper, [0, 40]) == [0, 0]


# ------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("w", "above", "zeros", "sqnr"),
    [
        (RNG.normal(size=1 << 20), 0.425, 0.310, 5.79),
        (RNG.uniform(-1, 1, 1 << 20), 0.5, 0.25, 8.06),
    ],
    ids=["normal", "uniform"],
)
def test_shares_of_known_distributions(w, above, zeros, sqnr):
    numbers = inspection.numbers(inspection.tensor_sums(0.03 * w, True))
    stats = [numbers[key] for key in ("above_scale", "zero_rate", "std", "outside")]
    np.testing.assert_allclose(stats, [above, zeros, 0.03 * w.std(), 0], atol=2e-3)
    np.testing.assert_allclose(numbers["sqnr"], sqnr, atol=2e-2)


def test_only_partly_quantised_weights_leave_the_codes():
    w = RNG.normal(size=(64, 32))
    assert inspection.tensor_sums(w, True)["outside"] == 0
    assert inspection.tensor_sums(w, True, strength=0.5)["outside"] > 1000


def test_sums_of_two_tensors_are_those_of_both():
    """Each keeps its own scale, so only what does not depend on it equals the concatenation's."""
    a, b = RNG.normal(size=300), RNG.uniform(-2, 2, 500)
    both = inspection.numbers(inspection.add([inspection.tensor_sums(x, True) for x in (a, b)]))
    joined = inspection.numbers(inspection.tensor_sums(np.concatenate([a, b])))
    for key in ("size", "above_1", "above_1.1", "std", "scale"):
        np.testing.assert_allclose(both[key], joined[key], rtol=1e-6)


def test_a_histogram_is_one_of_multiples_of_the_mean():
    counts = weights.histogram(np.array([0.0, 1.0, -1.0, 2.0]))
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {0: 1, 4: 2, 8: 1}


def test_weights_of_a_run_over_its_kept_steps():
    """Step 1 plants two entries of 2 in the embedding and changes the signs of half the codes."""
    kernel = np.where(np.arange(64).reshape(8, 8) % 2, 0.5, -0.5)
    start = {
        "block_0": {"ffn": {"down": {"kernel": kernel}}},
        "embed": {"embedding": np.full((300, 8), 0.1)},
        "final_norm": {"scale": np.ones(8)},
        "head": {"kernel": np.full((8, 300), 0.1)},
    }
    later = {
        "block_0": {"ffn": {"down": {"kernel": kernel * np.repeat([1, -1], 32).reshape(8, 8)}}},
        "embed": {"embedding": np.where(np.arange(2400).reshape(300, 8) < 2, 2.0, 0.1)},
        "final_norm": start["final_norm"],
        "head": start["head"],
    }
    cfg, _ = presets.override(
        presets.preset("tiny"), ["model.layout=report", "model.vocab_size=300", "model.d_model=8"]
    )
    run = types.SimpleNamespace(
        cfg=cfg,
        replicates=[Replicate("coupled", 0, presets.RECIPES["coupled"](RunConfig(steps=20)))],
        kept_steps=[1],
        states_at=lambda step: types.SimpleNamespace(params=(start, later)[step]),
        replicate=lambda tree, index: tree,
    )
    (stats,) = study.measure(run)["weights"]
    assert stats["step"] == [0, 1]
    assert stats["counts"]["embedding"]["above_1.1"] == [0, 2]
    assert stats["counts"]["ternary"] == {"above_1": [0, 0], "above_1.1": [0, 0], "outside": [0, 0]}
    assert stats["ternary"]["flip_rate"] == [0.5]
    assert stats["first_last"]["down"]["zero_rate"] == [0, 0]
    assert stats["first_last"]["down"]["histogram"][0][4] == 1000
    assert "zero_rate" not in stats["first_last"]["head"]
    assert len(stats["predicted"]) == 2


# --------------------------------------------------------------------------------------- claims


def frame(**changed):
    """Three seeds of each arm; `changed` replaces columns of the coupled arm."""
    run_rows = make_rows({arm: [4.0, 4.1, 4.2] for arm in study.ARM_NAMES})
    for row in run_rows:
        coupled, nothing = row["arm"] == study.COUPLED, {"above_1": [0, 0], "above_1.1": [0, 0]}
        codes, ends = [0.25, 0.85 if coupled else 0.27], [0.25, 1.0 if coupled else 0.27]
        row["extra"]["weights"] = {
            "step": [0, 20],
            "predicted": [1300, 1000],
            "counts": {
                "embedding": {"above_1": [1500, 1100], "above_1.1": [1300, 1001]},
                **{group: nothing for group in ("head", "norm")},
                "ternary": nothing | {"outside": [0, 0]},
            },
            "ternary": {"zero_rate": codes},
            "first_last": {kind: {"zero_rate": ends} for kind in ("gate_up", "down")},
        }
    df = rows.frame(run_rows)
    for column, value in changed.items():
        of_arm = df["arm"] == study.COUPLED
        df[column] = [value if x else old for x, old in zip(of_arm, df[column], strict=True)]
    return df


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_on_rows_that_are_so_by_construction(name):
    assert claims.judge(CLAIMS[name], QUICK, frame()).status == claims.HOLDS


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("codes", "weights/counts/ternary/outside", [0, 3]),
        ("latents", "weights/counts/ternary/above_1", [1, 0]),
        ("embedding", "weights/counts/head/above_1.1", [0, 1]),
        ("predicted", "weights/predicted", [1300, 900]),
        ("zeros", "weights/ternary/zero_rate", [0.9, 0.5]),
        ("feed-forward", "weights/first_last/down/zero_rate", [1.0, 0.5]),
    ],
)
def test_claims_fail_on_rows_that_are_otherwise(name, column, value):
    assert claims.judge(CLAIMS[name], QUICK, frame(**{column: value})).status == claims.FAILS
