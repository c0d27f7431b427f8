"""All checks pass on sound code, and each fails when what it checks is broken."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import seam_faults

from bitnet_jax import checks, data, presets, program, quant, subject
from bitnet_jax.train import STANDARD


@pytest.fixture
def small(tiny):
    return replace(tiny, model=replace(tiny.model, n_layers=1))


def replicate_of(cfg, recipe, **hyper):
    cfg = replace(cfg, run=replace(cfg.run, recipes=(recipe,)))
    return presets.make_replicates(cfg, [0], hyper)[0]


def checked(cfg, recipe="published", seams=STANDARD, **hyper) -> checks.Checked:
    built = program.build(cfg, [replicate_of(cfg, recipe, **hyper)], seams)
    return checks.Checked(subject.of_run(built, jax.tree.map(lambda x: x[0], built.init())))


def with_params(c, **params):
    """The same at a start with other parameters."""
    s = c.subject
    state = s.state.replace(params=s.params | params)
    return checks.Checked(replace(s, params=state.params, state=state))


def failed(results) -> list[str]:
    return [check.run.__name__ for check, outcome in results if not outcome.passed]


@pytest.mark.slow
def test_sound_code_passes_all_checks(small):
    results = checks.examine(small, replicate_of(small, "published"))
    assert failed(results) == [] and len(results) == len(checks.CHECKS)
    assert checks.terminal_lines(results)[-1] == "all passed"


@pytest.mark.slow
def test_coupled_decay_fails_the_decay_check_alone_and_a_negligible_one_none(small):
    results = checks.examine(small, replicate_of(small, "coupled"))
    assert failed(results) == ["decay"]
    assert checks.terminal_lines(results)[-1] == "failed: norm after zero gradients"
    harmless = checked(small, decoupled_1=0.0, coupled_1=1e-6)
    assert checks.decay(harmless).passed


def test_decay_that_forgets_the_learning_rate_is_told_apart(small):
    outcome = checks.decay(checked(small, seams=seam_faults.UNSCALED_DECAY))
    assert not outcome.passed and "not scaled" in outcome.measured


@jax.custom_vjp
def noisy_in_training(x, strength):
    return x


noisy_in_training.defvjp(lambda x, strength: (1.5 * x, None), lambda _, g: (g, jnp.zeros(())))


def codes_that_vary():
    n = itertools.count()
    return mock.patch.object(quant, "weight_codes", lambda w, s: 0 * w + next(n) % 2)


BROKEN_CODE = {
    "train_and_eval_agree": lambda: mock.patch.object(
        quant, "quantize_activation", noisy_in_training
    ),
    "weights_deterministic": codes_that_vary,
    "activations_deterministic": lambda: mock.patch.object(
        quant, "activation_scale", lambda x: 127 / jnp.max(jnp.abs(x))
    ),
    "codes_in_range": lambda: mock.patch.object(
        quant, "weight_codes", lambda w, scale: jnp.round(w * scale)
    ),
    "causal": lambda: mock.patch.object(
        jax.nn, "dot_product_attention", seam_faults.attention_to_all
    ),
    "scored_targets": lambda: mock.patch.object(data.Windows, "cut", scores_everything),
}
BROKEN_SEAMS = {
    "straight_through": seam_faults.NO_STRAIGHT_THROUGH,
    "targets": seam_faults.SHIFTED,
    "decay": seam_faults.UNSCALED_DECAY,
    "everything_moves": seam_faults.FROZEN_OUTPUT,
}
BROKEN_START = {
    "all_finite": lambda p: {"final_norm": {"scale": p["final_norm"]["scale"] / 0}},
    "weights_alive": lambda p: {
        "block_0": p["block_0"] | {"ffn": jax.tree.map(jnp.zeros_like, p["block_0"]["ffn"])}
    },
    "configuration": lambda p: {"bias": jnp.zeros(1)},
    "initial_loss": lambda p: {"embed": {"embedding": 40 * p["embed"]["embedding"]}},
}
BROKEN_NUMBERS = {"head_gain": {"logit_scale": 0.5}}

cut = data.Windows.cut


def scores_everything(windows, ids, tokens_N=None):
    batch = cut(windows, ids, tokens_N)
    return batch.replace(weights=0 * batch.weights + 1)


@pytest.mark.parametrize("name", BROKEN_CODE)
def test_broken_code_fails_its_check(small, name):
    cfg = replace(small, data=replace(small.data, score_end=False))
    jax.clear_caches()
    with BROKEN_CODE[name]():
        outcome = getattr(checks, name)(checked(cfg))
    jax.clear_caches()
    assert not outcome.passed


@pytest.mark.parametrize("name", BROKEN_SEAMS)
def test_a_broken_seam_fails_its_check(small, name):
    assert not getattr(checks, name)(checked(small, seams=BROKEN_SEAMS[name])).passed


@pytest.mark.parametrize("name", BROKEN_START)
def test_a_broken_start_fails_its_check(small, name):
    c = checked(small)
    broken = with_params(c, **BROKEN_START[name](c.subject.params))
    assert not getattr(checks, name)(broken).passed


@pytest.mark.parametrize("name", BROKEN_NUMBERS)
def test_wrong_numbers_fail_their_check(small, name):
    assert not getattr(checks, name)(checked(small, **BROKEN_NUMBERS[name])).passed


@pytest.mark.parametrize(
    ("logits", "passed"),
    [
        (lambda x_BL: jax.nn.one_hot(x_BL, 16), True),
        (lambda x_BL: jax.nn.one_hot(jnp.roll(x_BL, -1, axis=1), 16), False),
        (lambda x_BL: jnp.zeros((*x_BL.shape, 16)), False),
    ],
    ids=["its own token", "one token ahead", "no token"],
)
def test_a_causal_model_sees_its_own_token_and_none_ahead(logits, passed):
    inputs_BL = jnp.arange(16).reshape(2, 8)
    sizes = {"data": SimpleNamespace(seq_len=8), "model": SimpleNamespace(vocab_size=16)}
    start = SimpleNamespace(
        batch=SimpleNamespace(inputs=inputs_BL),
        cfg=SimpleNamespace(**sizes),
        subject=SimpleNamespace(logits=logits),
        logits_BLV=logits(inputs_BL),
    )
    assert checks.causal(start).passed == passed


def test_every_check_is_broken_by_a_test():
    tested = {*BROKEN_CODE, *BROKEN_SEAMS, *BROKEN_START, *BROKEN_NUMBERS}
    assert tested == {check.run.__name__ for check in checks.CHECKS}


def test_dead_weights_are_named(small):
    c = checked(small)
    outcome = checks.weights_alive(
        with_params(c, **BROKEN_START["weights_alive"](c.subject.params))
    )
    assert "block_0/ffn/down" in outcome.measured
