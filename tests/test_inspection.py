"""Inspection against planted weights and the evaluation of training; the worst comes first."""

import jax
import numpy as np
import pytest

from bitnet_jax import (
    audit,
    checkpoint,
    config_file,
    inspection,
    model,
    presets,
    program,
    restore,
    subject,
)
from bitnet_jax.workdir import describe

KERNEL = "block_1/ffn/down/kernel"


@pytest.fixture
def workdir(tiny, tmp_path):
    """An unfinished run of 20 steps with checkpoints at 5 and 10.

    At step 10 seven entries of the embedding are 2 and one ternary matrix has changed its sign.
    """
    cfg, _ = presets.override(tiny, ["run.recipes=published", "run.steps=20", "run.eval_every=5"])
    replicates = presets.make_replicates(cfg, [3], {})
    built = program.build(cfg, replicates)
    settings = config_file.to_json(built.cfg, replicates)
    folder = tmp_path / "run"
    states = {5: built.init().replace(step=np.array([5], np.int32))}
    params = jax.tree.map(np.array, states[5].params)
    params["embed"]["embedding"][0].flat[:7] = 2.0
    params["block_1"]["ffn"]["down"]["kernel"] *= -1
    states[10] = states[5].replace(step=np.array([10], np.int32), params=params)
    with checkpoint.open_manager(folder, cfg.run) as manager:
        for step, state in states.items():
            checkpoint.save(manager, step, state, describe(built, settings))
    return folder


@pytest.mark.slow
def test_inspection_of_an_unfinished_run(workdir, monkeypatch):
    folder = workdir
    rows = [{"step": s, "collapse/unique_tokens": n} for s, n in ((0, 1), (5, 2), (10, 1))]
    report = inspection.inspect(str(folder), rows=rows)
    measured = audit.predictions(subject.open_source(str(folder)))
    weights, tokens = report["weights"], report["predictions"]

    assert weights["total"]["above_1.1"] == 7
    assert weights["tensors"]["embed/embedding"]["above_1.1"] == 7
    assert (weights["quantised_above_1.1"], weights["total"]["outside"]) == (0, 0)
    assert weights["faults"] == {} and report["previous_step"] == 5
    flipped = weights["tensors"][KERNEL]
    assert flipped["flip_rate"] == 1 - flipped["zero_rate"] > 0.5
    assert weights["tensors"]["block_0/attn/o/kernel"]["flip_rate"] == 0

    # Two ways to the same number: from shares of tokens, and from sums over positions.
    assert tokens["kl_unigram_to_mean"] == pytest.approx(measured["unigram_kl"], rel=1e-3)
    most = max(t["share_of_argmax"] for t in tokens["most_frequent"])
    assert tokens["most_predicted"][0]["share_of_argmax"] >= most

    counted = {"evaluations": 2, "severe": 2, "first_severe": 5, "first_complete": 10}
    assert report["course"] == counted and inspection.course(rows[:1]) is None
    assert not tokens["learned"] and any("not learned" in o for o in report["observations"])
    assert report["observations"][0] in inspection.terminal_lines(report)[0]

    monkeypatch.setattr(restore, "saved_corpus", lambda *_: "another")
    other = inspection.inspect(str(folder))
    assert other["weights"] == weights and other["predictions"] is None
    assert "has changed since the run" in other["left_out"]


def found_with(params, **predictions):
    """A finding of these parameters, beside predictions of a model that has learned."""
    sound = {"learned": True, "loss": 4.0, "minus_unigram": -1.0, "minus_unigram_se": 0.1}
    sound |= {"future_leak": 0.0, "mutual_information": 1.0}
    sound |= {"most_predicted": [{"token": "a", "share_of_argmax": 0.6}]}
    weights = inspection.weights(params, 1.0)
    return {"weights": weights, "predictions": sound | predictions}


def planted(zero_rate=0.3):
    kernel = np.where(np.random.default_rng(0).random((64, 64)) < zero_rate, 1e-6, 1.0)
    block = {"attn": {"q": {"kernel": kernel}}, "ffn_norm": {"scale": np.ones(64)}}
    return {"block_0": block, "embed": {"embedding": np.ones((4, 64))}}


def test_the_worst_thing_comes_first():
    """Not finite before dead, dead before what is predicted, that before the loss."""
    assert inspection.observations(found_with(planted())) == []
    stuck = {"learned": False, "minus_unigram": 1.0}
    first, second = inspection.observations(found_with(planted(), **stuck))
    assert "'a'" in first and "60%" in first and "not learned" in second
    leaking = inspection.observations(found_with(planted(), future_leak=0.2, **stuck))
    assert "later tokens" in leaking[0] and leaking[1:] == [first, second]
    dead = planted()
    dead["block_0"]["attn"]["q"]["kernel"] *= 0
    assert "one code only" in inspection.observations(found_with(dead, **stuck))[0]
    dead["embed"]["embedding"][0, 0] = np.inf
    broken = found_with(dead) | {"predictions": None}
    first, second = inspection.observations(broken)
    assert "not finite" in first and "embed/embedding" in first and "one code only" in second
    (mostly,) = inspection.observations(found_with(planted(0.95)))
    assert "zeros" in mostly


def test_inspection_of_packed_weights_counts_their_codes(tiny):
    built = program.build(tiny, presets.make_replicates(tiny, [0], {}))
    s = subject.of_run(built, jax.tree.map(lambda x: x[0], built.init()))
    latent = inspection.weights(s.params, 1.0)["tensors"]
    packed = inspection.weights(model.pack_params(s.params, tiny.model, s.hyper), 1.0)["tensors"]
    name = "block_0/attn/q"
    assert packed[f"{name}/packed"]["zero_rate"] == latent[f"{name}/kernel"]["zero_rate"]
    assert packed[f"{name}/packed"]["size"] == latent[f"{name}/kernel"]["size"]
    assert f"{name}/scale" not in packed


def test_sums_of_planted_weights():
    w = np.array([[2.0, -2.0, 0.1, 0.1], [0.0, 0.0, 1.05, -1.05]])
    sums = inspection.tensor_sums(w, ternary=True, before=-w)
    assert (sums["above_1"], sums["above_1.1"], sums["outside"]) == (4, 2, 0)
    assert (sums["zeros"], sums["flips"]) == (4, 4)
    half = inspection.tensor_sums(w, ternary=True, strength=0.5)
    assert half["outside"] == 6  # all but the zeros lie between latent and code
    both = inspection.add([sums, sums])
    assert inspection.numbers(both) == pytest.approx(
        inspection.numbers(sums) | {"size": 16, "above_1": 8, "above_1.1": 4}
    )


def test_divergence_of_two_coins():
    p, q = np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])
    np.testing.assert_allclose(inspection.divergence(p, q), 0.5 * np.log(2))
    assert inspection.divergence(p, p) == 0
