"""Planted faults are what their names say, and nothing where their numbers are 0."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import data, model, optim, presets
from bitnet_jax.config import Hyper, RunConfig
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy, training_loss
from bitnet_jax.metrics import HELD_OUT_LOSS
from bitnet_jax.signatures import CAUSES
from experiments import held_out_faults as study
from experiments.lab import arms, exhibits, planted, rows

RUN = presets.override(presets.preset("tiny"), ["run.steps=16"])[0].run
GROUPS = {
    "block_0": {"ffn": {"up": {"kernel": "matrix"}}},
    "block_1": {"ffn": {"up": {"kernel": "matrix"}}},
    "embed": {"embedding": "embedding"},
    "final_norm": {"scale": "norm"},
}


def hyper(**changes) -> Hyper:
    return presets.RECIPES["published"](RunConfig(steps=16)).replace(extra=planted.SOUND | changes)


def batch() -> Batch:
    tokens = np.arange(36).reshape(4, 9).astype("int32")
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 8), "float32"))


def updated(n: int, **changes):
    """Weights before, and updates at step n of gradients of 1, after n - 1 of them."""
    cfg = presets.preset("tiny").optim
    ones = jax.tree.map(lambda _: jnp.ones((2, 3)), GROUPS)
    params = jax.tree.map(lambda x: x * jnp.array([[0.5], [0.25]]), ones)
    tx = planted.optimizer(cfg, RUN, hyper(**changes), GROUPS)
    state = tx.init(params)
    for _ in range(n):
        updates, state = tx.update(ones, state, params, grad_norm=jnp.ones(()))
    return params, updates, state


def test_every_right_cause_is_one_that_triage_knows_and_five_faults_have_no_detector():
    right = [names for _, names, _ in planted.FAULTS.values()]
    assert {name for names in right for name in names} <= {cause.name for cause in CAUSES}
    assert len(right) == 18 and sum(not names for names in right) == 11


def test_with_all_numbers_0_the_loss_and_the_optimiser_are_the_standard_ones():
    logits = jax.random.normal(jax.random.key(0), (4, 8, 50))
    mine = planted.training_loss(logits, batch(), hyper(), None)
    assert mine == training_loss(logits, batch(), hyper(), None)
    params, updates, state = updated(3)
    tx = optim.make_optimizer(presets.preset("tiny").optim, RUN, hyper(), GROUPS)
    sound, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        expected, sound = tx.update(ones, sound, params, grad_norm=jnp.ones(()))
    jax.tree.map(np.testing.assert_array_equal, (updates, state), (expected, sound))


def test_losses_of_other_targets_and_over_the_number_of_logits():
    logits = jax.random.normal(jax.random.key(0), (4, 8, 50))
    rolled = replace(batch(), targets=np.roll(batch().targets, 1, axis=0))
    sound = training_loss(logits, batch(), hyper(), None)
    planted_loss = {
        name: planted.training_loss(logits, batch(), hyper(**{name: x}), None)
        for name, x in (("targets_rolled", 1.0), ("over_logits", 1.0), ("label_noise", 1.0))
    }
    np.testing.assert_allclose(planted_loss["targets_rolled"], cross_entropy(logits, rolled))
    np.testing.assert_allclose(planted_loss["over_logits"], sound / (4 * 8 * 50), rtol=1e-5)
    assert abs(planted_loss["label_noise"] - sound) > 0.01


def test_numbers_that_follow_no_rule_are_uniform():
    share = np.histogram(planted.mixed(jnp.arange(100_000, dtype=jnp.uint32)), 10, (0, 1))[0] / 1e5
    np.testing.assert_allclose(share, 0.1, atol=0.005)


def test_updates_of_each_fault_of_the_optimiser():
    params, sound, _ = updated(3)
    still = updated(3, block_still=1.0)[1]
    np.testing.assert_array_equal(jax.tree.leaves(still["block_1"])[0], 0)
    np.testing.assert_array_equal(*(jax.tree.leaves(u["block_0"])[0] for u in (still, sound)))
    slow = updated(3, embedding_slow=1.0)[1]["embed"]["embedding"]
    np.testing.assert_allclose(slow, sound["embed"]["embedding"] / 100, rtol=1e-5)
    stuck = updated(1, norm_stuck=1.0)[1]["final_norm"]["scale"]
    np.testing.assert_allclose(params["final_norm"]["scale"] + stuck, 0.1, rtol=1e-6)
    turned = updated(3, matrices_reversed=1.0)[1]
    assert (jax.tree.leaves(turned["block_0"])[0] > 0).all()
    stale = jax.tree.leaves(updated(14, stale=1.0)[1]["block_0"])[0]
    kernel = jax.tree.leaves(params["block_0"])[0]
    np.testing.assert_allclose(kernel + stale, kernel[::-1])
    fast = updated(2, micro_steps=1.0)[1]["embed"]["embedding"]
    np.testing.assert_allclose(fast, 0, atol=1e-12)  # 8 micro-batches each: the rate of step 16
    assert updated(3, state_lost=1.0)[2]["lr"].count == 0


def test_with_all_numbers_0_a_layer_is_the_standard_one_and_else_it_is_not():
    x, w = (jax.random.normal(jax.random.key(k), shape) for k, shape in ((0, (3, 5)), (1, (5, 4))))

    def run(layer, **changes):
        return jax.value_and_grad(lambda x: layer(x, w, hyper(**changes)).sum())(x)

    jax.tree.map(np.testing.assert_array_equal, run(planted.bit_linear), run(model.bit_linear))
    sound, gradient = run(model.bit_linear)
    for name, size in (("dropout", 0.3), ("largest", 1.0), ("batch_scale", 1.0)):
        value, slope = run(planted.bit_linear, **{name: size})
        assert value != sound and slope.any(), name
    same, lost = run(planted.bit_linear, activation_gradient_lost=1.0)
    assert same == sound and gradient.any() and not lost.any()


def test_windows_of_the_two_seeds_are_served_again():
    cfg = presets.preset("tiny").data
    twice = planted.window_ids(cfg, 5000, planted.TWICE, 3, 7)
    expected = data.window_ids(cfg, 5000, planted.TWICE, 1, 4)[[0, 1, 1, 2]]
    np.testing.assert_array_equal(twice, expected)
    few = planted.window_ids(cfg, 5000, planted.FEW, 0, 200)
    assert few.max() < planted.FEW_WINDOWS
    sound = [ids(cfg, 5000, 11, 3, 7) for ids in (planted.window_ids, data.window_ids)]
    np.testing.assert_array_equal(*sound)


def test_faults_have_one_seed_and_controls_all():
    cfg = presets.preset("tiny")
    request = arms.Request("toy", "tiny", cfg, {}, [4, 5], "unused", at_once=9)
    group = study.planted_group(request, list(study.ARMS))
    seeds = {rep.name: rep.seed for rep in group.replicates}
    assert len(group.replicates) == 18 + 2 * 3 and seeds["every batch twice"] == planted.TWICE
    assert len({tuple(rep.hyper.extra) for rep in group.replicates}) == 1


def make(verdicts=(), named=()):
    """The right cause or a symptom for each fault, harm of all but one, silent controls."""
    ends = {name: [6.0] for name in planted.FAULTS} | {"dropout left on": [5.0]}
    run_rows = make_rows(ends | {study.CONTROL: [5.0, 5.01, 5.02, 5.03]})
    for row in run_rows:
        arm, loss = row["arm"], row["final"]["eval/loss"]
        cause = (planted.FAULTS[arm][1] or ("context ignored",))[0] if arm != study.CONTROL else ""
        cause = dict(named).get(arm, cause)
        row["extra"]["causes"] = [{"name": cause}] if cause else []
        row["final"] |= {HELD_OUT_LOSS: loss}
        row["final"]["collapse/verdict"] = dict(verdicts).get(arm, "healthy")
    return rows.frame(run_rows)


@pytest.mark.parametrize(
    ("changed", "with_detector", "counted"),
    [
        ({}, True, {"named": 7}),
        ({}, False, {"found": 10}),
        ({"named": {"every batch twice": "context ignored"}}, True, {"named": 6, "found": 1}),
        ({"named": {"every batch twice": "shifted labels"}}, True, {"named": 6, "wrong name": 1}),
        ({"named": {"optimiser state thrown away": ""}}, False, {"found": 9, "missed": 1}),
        ({"named": {"dropout left on": ""}}, False, {"found": 10}),  # it does no harm
    ],
)
def test_harmful_faults_are_counted_by_how_they_came_out(changed, with_detector, counted):
    assert study.outcomes(make(**changed), with_detector) == Counter(counted)


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({}, 0),
        ({"verdicts": {study.CONTROL: "dead"}}, 4),
        ({"named": {study.CONTROL: "context ignored"}}, 4),
        ({"verdicts": {"every batch twice": "dead"}}, 0),  # no healthy run
    ],
)
def test_alarms_of_healthy_runs_are_false(changed, count):
    df = make(**changed)
    assert len(study.false_alarms(df)) == count
    assert study.are_slow(df, count, of=4) == (count == 0)  # at the published rate


def test_the_table_tells_how_each_fault_came_out():
    df = make(named={"second block not updated": "decay through Adam"})
    shown = exhibits.Exhibits(df)
    study.show(df, shown)
    cells = {row[0]: row[-2:] for row in shown.tables[0].rows}
    assert cells["every batch twice"] == ["yes", "named"]
    assert cells["second block not updated"] == ["yes", "wrong name"]
    assert cells["optimiser state thrown away"] == ["yes", "found"]
    assert cells["dropout left on"] == ["no", "found"]
    assert shown.tables[1].rows[0][:2] == [study.CONTROL, "4"]
