"""All checks pass on sound code, and each fails when what it checks is broken."""

import itertools
import re
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import data, presets, quant
from bitnet_jax import program as programs
from experiments import checks, common, faults


@pytest.fixture
def small(tiny):
    return replace(tiny, model=replace(tiny.model, n_layers=1))


def subject_of(cfg, recipe="b158", **hyper) -> checks.Subject:
    cfg = replace(cfg, run=replace(cfg.run, recipes=(recipe,)))
    return checks.Subject(programs.build(cfg, presets.make_replicates(cfg, [0], hyper)))


def with_params(subject, **changed):
    """The subject at a start with other parameters."""
    subject.__dict__["state"] = subject.state.replace(params=subject.state.params | changed)
    return subject


def request_for(cfg, recipe, tmp_path):
    cfg = replace(cfg, run=replace(cfg.run, recipes=(recipe,)))
    made = presets.make_replicates(cfg, [0], {})
    return common.Request("tiny", cfg, [0], {}, made, tmp_path, False, None)


def test_sound_code_passes_all_checks(small, tmp_path, capsys):
    checks.body(request_for(small, "b158", tmp_path))
    printed = capsys.readouterr().out
    n = len(checks.QUANTISATION + checks.SANITY)
    assert len(re.findall("  ok$", printed, re.M)) == n >= 10
    assert printed.endswith("all passed\n")


def test_the_reports_recipe_fails_the_decay_check_alone_and_exits_1(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        checks.body(request_for(small, "report", tmp_path))
    printed = capsys.readouterr().out
    assert stopped.value.code == 1
    assert printed.endswith("failed: norm after zero gradients\n")
    assert "decay is not decoupled" in printed


def test_decay_that_forgets_the_learning_rate_is_told_apart(small):
    check = checks.decay(subject_of(small, unscaled_1=0.1))
    assert not check.passed and "decay is not scaled" in check.measured


@jax.custom_vjp
def noisy_in_training(x, strength):
    return x


noisy_in_training.defvjp(lambda x, strength: (1.5 * x, None), lambda _, g: (g, jnp.zeros(())))


def codes_that_vary():
    n = itertools.count()
    return mock.patch.object(quant, "weight_codes", lambda w, s, largest=1: 0 * w + next(n) % 2)


def scale_of_all_rows(x):
    return 127 / jnp.max(jnp.abs(x))


def codes_without_clip(w, scale, largest=1):
    return jnp.round(w * scale)


def scores_everything(windows, end_of_text, score_last):
    return 0.0 * windows[..., 1:] + 1


def attention_to_all(q, k, v, is_causal):
    return jnp.broadcast_to(jnp.mean(v, axis=1, keepdims=True), q.shape)


BROKEN_CODE = {
    "train_and_eval_agree": lambda: mock.patch.object(
        quant, "quantize_activation", noisy_in_training
    ),
    "weights_deterministic": codes_that_vary,
    "activations_deterministic": lambda: mock.patch.object(
        quant, "activation_scale", scale_of_all_rows
    ),
    "codes_in_range": lambda: mock.patch.object(quant, "weight_codes", codes_without_clip),
    "straight_through": faults.without_straight_through,
    "causal": lambda: mock.patch.object(jax.nn, "dot_product_attention", attention_to_all),
    "padding": lambda: mock.patch.object(data, "score_weights", scores_everything),
    "targets": faults.shifted_twice,
}
BROKEN_START = {
    "all_finite": lambda s: {"final_norm": {"scale": s.state.params["final_norm"]["scale"] / 0}},
    "configuration": lambda s: {"bias": jnp.zeros(1)},
    "initial_loss": lambda s: {"embed": {"embedding": 40 * s.state.params["embed"]["embedding"]}},
}
BROKEN_NUMBERS = {"head_gain": {"logit_scale": 0.5}, "everything_moves": {"head_lr": 0.0}}


@pytest.mark.parametrize("name", BROKEN_CODE)
def test_broken_code_fails_its_check(small, name):
    jax.clear_caches()
    with BROKEN_CODE[name]():
        check = getattr(checks, name)(subject_of(small))
    jax.clear_caches()
    assert not check.passed


@pytest.mark.parametrize("name", BROKEN_START)
def test_a_broken_start_fails_its_check(small, name):
    subject = subject_of(small)
    broken = with_params(subject, **BROKEN_START[name](subject))
    assert not getattr(checks, name)(broken).passed


@pytest.mark.parametrize("name", BROKEN_NUMBERS)
def test_wrong_numbers_fail_their_check(small, name):
    subject = subject_of(small, **BROKEN_NUMBERS[name])
    assert not getattr(checks, name)(subject).passed


def test_every_check_is_broken_by_a_test():
    tested = {*BROKEN_CODE, *BROKEN_START, *BROKEN_NUMBERS, "decay"}
    assert tested == {check.__name__ for check in checks.QUANTISATION + checks.SANITY}
