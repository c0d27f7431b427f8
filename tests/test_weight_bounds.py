"""Counts of weights before and after quantisation, and the prediction beside them."""

import xml.etree.ElementTree

import numpy as np
import pytest

from bitnet_jax import optim, presets, shrink
from bitnet_jax.config import Hyper, OptimConfig, RunConfig
from experiments import weight_bounds

RNG = np.random.default_rng(0)
START = np.linspace(0.5, 3, 11)


def config_of(steps, layout="report"):
    cfg = presets.preset("report" if layout == "report" else "b158")
    return presets.override(cfg, [f"run.steps={steps}"])[0]


@pytest.mark.parametrize(
    "w, above, zeros, sqnr",
    [
        (RNG.normal(size=1 << 20), 0.425, 0.310, 5.79),
        (RNG.uniform(-1, 1, 1 << 20), 0.5, 0.25, 8.06),
    ],
    ids=["normal", "uniform"],
)
def test_shares_of_known_distributions(w, above, zeros, sqnr):
    numbers = weight_bounds.numbers(weight_bounds.tensor_sums(0.03 * w, "ternary"))
    np.testing.assert_allclose(numbers["above_scale"], above, atol=2e-3)
    np.testing.assert_allclose(numbers["zero_rate"], zeros, atol=2e-3)
    np.testing.assert_allclose(numbers["sqnr"], sqnr, atol=2e-2)
    np.testing.assert_allclose(numbers["std"], 0.03 * w.std(), rtol=1e-4)
    assert (numbers["above_1"], numbers["outside"]) == (0, 0)


def test_counts_are_those_of_the_latents():
    sums = weight_bounds.tensor_sums(np.array([0.9, -1.0, 1.05, -1.1001, 1.2, 5]))
    assert (sums["above_1"], sums["above_1.1"]) == (4, 3)
    assert "outside" not in sums


@pytest.mark.parametrize("fmt", ["ternary", "int4", "int8"])
def test_only_partly_quantised_weights_leave_the_codes(fmt):
    w = RNG.normal(size=(64, 32))
    assert weight_bounds.tensor_sums(w, fmt)["outside"] == 0
    assert weight_bounds.tensor_sums(w, fmt, strength=0.5)["outside"] > 1000


def test_flips_are_changed_codes():
    w = np.array([[1.0, -1, 0.1, 0.1]])
    sums = weight_bounds.tensor_sums(w * [[1, -1, 1, 1]], "ternary", before=w)
    assert weight_bounds.numbers(sums)["flip_rate"] == 0.25


def test_sums_of_two_tensors_are_those_of_both():
    """Each keeps its own scale, so only what does not depend on it equals the concatenation's."""
    a, b = RNG.normal(size=300), RNG.uniform(-2, 2, 500)
    both = weight_bounds.numbers(
        weight_bounds.add([weight_bounds.tensor_sums(x, "ternary") for x in (a, b)])
    )
    joined = weight_bounds.numbers(weight_bounds.tensor_sums(np.concatenate([a, b])))
    for key in ("size", "above_1", "above_1.1", "std", "scale"):
        np.testing.assert_allclose(both[key], joined[key], rtol=1e-6)


def test_coupled_decay_alone_is_the_scalar_adam_recursion():
    cfg, hyper = config_of(200), presets.RECIPES["report"](200)
    path = weight_bounds.without_gradient(cfg, hyper, START)
    end = shrink.starved_weight(START, OptimConfig(), RunConfig(steps=200), hyper)
    np.testing.assert_allclose(path[0], START)
    np.testing.assert_allclose(path[-1], end, rtol=1e-4)


def test_decoupled_decay_alone_is_the_product_of_its_factors():
    cfg = config_of(40)
    hyper = Hyper(decoupled_1=0.1, decoupled_2=0.05, decay_rest=1.0, warmup_steps=4.0)
    lr = np.asarray(optim.learning_rate(hyper, np.arange(1, 41), cfg.run))
    shrink = np.cumprod(1 - lr * np.where(np.arange(1, 41) <= 20, 0.1, 0.05))
    path = weight_bounds.without_gradient(cfg, hyper, START)
    np.testing.assert_allclose(path[1:] / START, shrink[:, None].repeat(11, 1), rtol=1e-5)


def test_the_count_for_the_reports_run():
    """979,330 of its 12,865,792 embedding entries; the report counted 981,223."""
    cfg, hyper = config_of(1000), presets.RECIPES["report"](1000)
    first, last = weight_bounds.predicted_counts(cfg, hyper, 50257 * 256, [0, 1000])
    np.testing.assert_allclose(first, 12_865_792 * 0.271332, rtol=1e-4)
    np.testing.assert_allclose(last, 979_330, rtol=1e-4)


def test_a_small_initialisation_has_nothing_above_the_threshold():
    cfg, hyper = config_of(40, "b158"), presets.RECIPES["b158"](40)
    assert weight_bounds.predicted_counts(cfg, hyper, 10**6, [0, 40]) == [0, 0]


def make_row(arm, seed, embedding=990, ternary=0, outside=0):
    ends = {"above_scale": [0.5, 0.44], "std": [0.05, 0.03], "scale": [0.04, 0.02]}
    ends["histogram"] = [[100] * 10, [910] + [10] * 9]
    quantised = {"zero_rate": [0.25, 0.4], "sqnr": [8.06, 5.6]}
    counts = {"above_1": [1500, embedding + 50], "above_1.1": [1300, embedding]}
    return {
        "arm": arm,
        "seed": seed,
        "hyper": {"coupled_1": 0.1 * (arm == "report")},
        "steps": 20,
        "final": {"eval/loss": 7.0, "collapse/verdict": "slow", "collapse/unique_tokens": 5},
        "references": {
            "tracked_positions": 128,
            "targets": {"distinct": 60},
            **{k: {"loss": 7.0, "entropy": 7.0, "distinct": 1}
               for k in ("uniform", "unigram", "bigram")},
        },
        "weights": {
            "step": [0, 20],
            "embedding_size": 5000,
            "counts": {
                "embedding": counts,
                "head": {"above_1": [0, 0], "above_1.1": [0, 10]},
                "ternary": {"above_1": [0, ternary], "above_1.1": [0, ternary],
                            "outside": [0, outside]},
            },
            "predicted": [1300, 900],
            "ternary": {"above_scale": [0.5, 0.44], "zero_rate": [0.25, 0.4], "flip_rate": [0.01],
                        "sqnr": [8.06, 5.6]},
            "first_last": {"embedding": ends, "qkv": ends | quantised},
            "layers": {"block_0/attn/qkv/kernel": [0.4, 0.03, 0.02, 5.6]},
        },
    }  # fmt: skip


def make_rows(**changes):
    """Only the recipe with coupled decay gets the changes."""
    return [make_row("report", s, **changes) for s in (0, 1)] + [
        make_row("b158", s) for s in (0, 1)
    ]


def test_conclusion_names_what_the_count_holds_and_how_far_the_prediction_is_off():
    study = weight_bounds.analyse(make_rows())
    assert study.n == 2
    assert study.conclusion == (
        "no value of the forward pass lies outside the quantised codes; of 1,000 [1,000, 1,000] "
        "weights above 1.1 in report at step 20, 99.0% are entries of the embedding and none a "
        "ternary latent; the embedding's count differs from the 900 that decay alone predicts by "
        "+10.0% [+10.0%, +10.0%] (n=2)"
    )


def test_conclusion_follows_rows_that_say_otherwise():
    study = weight_bounds.analyse(make_rows(embedding=0, ternary=7, outside=3))
    assert "6 values of the forward pass lie outside" in study.conclusion
    assert "some a ternary latent" in study.conclusion
    assert "ternary latents above it, at 2 steps of all arms: 14;" in study.result


def test_figures_are_well_formed():
    study = weight_bounds.analyse(make_rows())
    assert len(study.figures) == 4
    for _, svg in study.figures:
        xml.etree.ElementTree.fromstring(svg.replace("xlink:href", "href"))
