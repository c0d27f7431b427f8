"""Each test of an audit measures what it says: closed forms, and faults that are put in."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seam_faults

from bitnet_jax import (
    audit,
    causes,
    model,
    optim,
    presets,
    program,
    reference,
    subject,
    train,
    updates,
)
from bitnet_jax.config import Hyper, Replicate
from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError
from bitnet_jax.loss import cross_entropy
from bitnet_jax.train import STANDARD


def subject_of(cfg, recipe="decoupled", seams=STANDARD, **hyper) -> subject.Subject:
    """The start of a run of one replicate."""
    cfg = replace(cfg, run=replace(cfg.run, recipes=(recipe,)))
    built = program.build(cfg, presets.make_replicates(cfg, [0], hyper), seams)
    return subject.of_run(built, jax.tree.map(lambda x: x[0], built.init()))


@pytest.fixture
def untied(tiny):
    """The tiny preset in the report's layout, and long enough to sum up to some learning."""
    layers = replace(tiny.model, layout="report", tied_embedding=False, n_layers=1)
    return replace(tiny, model=layers, run=replace(tiny.run, steps=100))


def changed(s, path, value):
    """The subject with one tensor replaced by `value(tensor)`."""
    params = jax.tree.map_with_path(
        lambda p, w: value(w) if optim.path_name(p) == path else w, s.params
    )
    return replace(s, params=params, state=s.state.replace(params=params))


def test_the_peak_has_full_quantisation_and_the_peak_rate_at_every_step(tiny):
    hyper = Hyper(warmup_steps=7.0, quant_warmup_steps=9.0)
    built = SimpleNamespace(replicates=[Replicate("a", 0, hyper)])
    s = subject.Subject(built, {}, 3)
    assert s.hyper.weight_quant < 1
    for step in (0, 3, 10, tiny.run.steps):
        now = train.at_step(s.peak, step)
        assert (now.weight_quant, now.act_quant) == (1, 1)
        assert optim.learning_rate(s.peak, step + 1, tiny.run) == np.float32(hyper.lr_peak)


# ------------------------------------------------------------------------------ weights and text


def test_rescue_finds_the_scale_and_the_bias_that_were_taken_away():
    """z = log q / 4 costs least at scale 4 and needs no bias; z = 0 needs log pi."""
    key = jax.random.key(0)
    z_BLV = 2 * jax.random.normal(key, (64, 32, 12)) + jnp.linspace(-3, 3, 12)
    log_q_BLV = jax.nn.log_softmax(z_BLV)
    targets_BL = jax.random.categorical(jax.random.key(1), log_q_BLV)
    batch = Batch(targets_BL, targets_BL, jnp.ones((64, 32)))
    pi_V = reference.unigram_probs(targets_BL.ravel(), 12)
    scaled = audit.rescue(log_q_BLV / 4, batch, pi_V)
    assert scaled["scale"] == pytest.approx(4, rel=0.1) and scaled["scale_gain"] > 0.3
    assert abs(scaled["bias"]) < 0.2
    flat = audit.rescue(0 * log_q_BLV, batch, pi_V)
    assert flat["bias"] == pytest.approx(1, abs=1e-2)
    entropy = -np.sum(pi_V * np.log(pi_V))
    assert flat["bias_gain"] == pytest.approx(np.log(12) - entropy, abs=1e-3)


def test_the_difference_to_the_unigram_is_that_of_the_losses_on_the_same_positions(untied):
    s = subject_of(untied)
    measured, large = audit.predictions(s), s.program.evals.large
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), large)
    nats = -jnp.log(s.program.evals.unigram_V)[rows.targets]
    unigram = float(jnp.sum(nats * rows.weights) / jnp.sum(rows.weights))
    assert measured["unigram_loss"] == pytest.approx(unigram, rel=1e-5)
    assert measured["loss"] == pytest.approx(
        float(cross_entropy(s.logits(rows.inputs), rows)), rel=1e-5
    )
    assert 0 < measured["minus_unigram_se"] < measured["minus_unigram"]


def test_without_attention_the_tokens_before_the_last_one_do_not_matter(untied):
    s = subject_of(untied)
    assert audit.context(s)["earlier_tokens"] > 1e-3
    blind = changed(s, "block_0/attn/o/kernel", jnp.zeros_like)
    assert audit.context(blind)["earlier_tokens"] == pytest.approx(0, abs=1e-6)


def test_a_token_moves_no_earlier_logit_unless_attention_sees_it(untied):
    assert audit.causality(subject_of(untied))["future_leak"] == 0
    jax.clear_caches()
    with mock.patch.object(jax.nn, "dot_product_attention", seam_faults.attention_to_all):
        leak = audit.causality(subject_of(untied))["future_leak"]
    jax.clear_caches()
    assert leak > 0.01


def test_a_model_that_sees_one_token_ahead_leaks():
    inputs_BL = jnp.arange(16).reshape(2, 8)

    def leak(ahead):
        return audit.causality(
            SimpleNamespace(
                held_out=SimpleNamespace(inputs=inputs_BL),
                program=SimpleNamespace(cfg=SimpleNamespace(model=SimpleNamespace(vocab_size=16))),
                logits=lambda x_BL: jax.nn.one_hot(jnp.roll(x_BL, -ahead, axis=1), 16),
            )
        )["future_leak"]

    assert leak(0) == 0 and leak(1) > 1


def test_straight_through_is_exact_and_formulas_alone_are_not():
    exact = audit.quantiser_gradients(STANDARD.quantize_weight)
    assert exact == {"ste_weight": 0, "ste_activation": 0}
    assert audit.quantiser_gradients(seam_faults.rounding_alone)["ste_weight"] > 0.1


def test_dead_matrices_and_broken_values_are_counted_and_named(untied):
    s = subject_of(untied)
    sound = audit.codes(s)
    assert (sound["dead_matrices"], sound["nonfinite"]) == (0, 0)
    assert 0.2 < sound["zero_rate"] <= sound["zero_rate_most"] < 0.4
    assert subject.weight_faults(s.params) == {}
    dead = changed(s, "block_0/ffn/down/kernel", jnp.zeros_like)
    assert audit.codes(dead)["dead_matrices"] == 1 / 4
    assert subject.weight_faults(dead.params) == {"one code only": ["block_0/ffn/down"]}
    broken = changed(s, "block_0/ffn/down/kernel", lambda w: w.at[0, 0].set(jnp.nan))
    measured, left_out = audit.measure(broken)
    size = sum(w.size for w in jax.tree.leaves(s.params))
    assert measured == {"nonfinite": 1 / size}
    assert len(left_out) == len(audit.TESTS) - 1
    assert [f.name for f in causes.rank(measured)] == ["weights are not finite"]


def test_packed_codes_are_those_of_the_latents(untied):
    s = subject_of(untied)
    packed = model.pack_params(s.params, s.program.cfg.model, s.hyper)
    codes = subject.codes_by_path(s.params)
    for layer, q in subject.codes_by_path(packed).items():
        np.testing.assert_array_equal(q, codes[layer])
    packed["block_0"]["ffn"]["down"]["scale"] = jnp.zeros(())
    assert subject.weight_faults(packed) == {"scale 0": ["block_0/ffn/down/scale"]}


def test_repeated_pieces_are_counted_at_any_place():
    text_N = np.random.default_rng(0).integers(0, 50_000, 5000).astype(np.uint16)
    assert audit.repeated_pieces(text_N) == 0
    twice = audit.repeated_pieces(np.concatenate([text_N, text_N[:7], text_N]))
    assert twice == pytest.approx(0.5, abs=0.01)
    assert audit.repeated_pieces(text_N[:10]) == 0


# --------------------------------------------------------------------------------- the optimiser


def test_decay_audit_of_decoupled_decay_is_the_product(untied):
    s = subject_of(untied, decoupled_1=0.5, decoupled_2=0.25, decay_rest=0.1)
    factors = updates.decay(s)
    n = np.arange(1, 101)
    lr = np.asarray(optim.learning_rate(s.program.replicates[0].hyper, n, untied.run), np.float64)
    decay = np.where(n <= 50, 0.5, 0.25)
    assert factors["decay_expected_matrix"] == pytest.approx(np.prod(1 - lr * decay))
    assert factors["decay_expected_head"] == pytest.approx(np.prod(1 - lr * decay * 0.1))
    for group in ("matrix", "head", "embedding", "norm"):
        expected = factors[f"decay_expected_{group}"]
        assert factors[f"decay_factor_{group}"] == pytest.approx(expected, rel=1e-5)
        assert factors[f"decay_spread_{group}"] < 1e-5 and factors[f"decay_unscaled_{group}"] == 0
    hyper = subject.arrays(s.program.replicates[0].hyper)
    bias = updates.decay_numbers(s.program, hyper, {"output_bias": jnp.ones(3)})
    assert bias["decay_factor_bias"] == bias["decay_expected_bias"] == 1


def test_decay_audit_tells_unscaled_from_coupled(untied):
    """The one multiplies weights also at rate 0, the other subtracts about lr from each."""
    none = {"decoupled_1": 0.0, "decoupled_2": 0.0}
    unscaled = updates.decay(subject_of(untied, seams=seam_faults.UNSCALED_DECAY, **none))
    assert unscaled["decay_factor_matrix"] == pytest.approx(0.98**100, rel=1e-4)
    assert unscaled["decay_unscaled_matrix"] == pytest.approx(1 - 0.98**100, rel=1e-4)
    assert unscaled["decay_spread_matrix"] < 1e-5
    coupled = updates.decay(subject_of(untied, coupled_1=0.1, coupled_2=0.05, **none))
    assert coupled["decay_factor_matrix"] < 0.9 < coupled["decay_expected_matrix"]
    assert coupled["decay_spread_matrix"] > 0.01 and coupled["decay_unscaled_matrix"] == 0


def test_the_share_of_decay_in_an_update_is_that_of_its_norms(untied, monkeypatch):
    """One step from new moments: Adam's part is lr * sign(gradient), AdamW's decay lr * d w."""
    monkeypatch.setattr(updates, "REPLAYED", 1)
    s = subject_of(untied, decoupled_1=0.5, decay_rest=1.0)
    update_stats = updates.updates(s)
    head = s.params["head"]["kernel"]
    by_decay = 0.5 * float(optax.tree.norm(head))
    share = by_decay / (by_decay + head.size**0.5)  # all signs are +-1: the norm of the rest
    assert update_stats["decay_share_head"] == pytest.approx(share, rel=1e-3)
    batch = jax.tree.map(lambda x: x[0], subject.served(s.program, 1))
    gradient = jax.grad(lambda p: cross_entropy(s.logits(batch.inputs, s.peak, p), batch))(s.params)
    assert update_stats["gradient_head"] == pytest.approx(subject.rms(gradient["head"]), rel=1e-4)
    assert update_stats["zeros_embedding"] > 0.5 > update_stats["zeros_matrix"]
    # The same compiled program: numbers are data.
    amounts = [1e-6, 1e-2, 10.0]
    shares = [
        updates.updates(subject_of(untied, decoupled_1=0, coupled_1=x))["decay_share_matrix"]
        for x in amounts
    ]
    assert shares[0] < 0.01 < shares[2] and shares == sorted(shares)


def test_what_is_not_updated_is_seen_in_any_optimiser(untied, monkeypatch):
    monkeypatch.setattr(updates, "REPLAYED", 1)
    update_stats = updates.updates(subject_of(untied, seams=seam_faults.FROZEN_OUTPUT))
    assert update_stats["update_head"] == 0 < update_stats["update_matrix"]
    update_stats = updates.updates(subject_of(untied, seams=seam_faults.OTHER_OPTIMISER))
    assert update_stats["update_head"] > 0 and 0 < update_stats["decay_share_matrix"] < 0.01


def test_small_gradients_are_below_eps_and_clipping_is_told(untied, monkeypatch):
    monkeypatch.setattr(updates, "REPLAYED", 1)
    clipped = replace(untied, optim=replace(untied.optim, clip_norm=1e-6))
    update_stats = updates.updates(subject_of(clipped))
    assert update_stats["clip_factor"] < 1e-4 and update_stats["below_eps_matrix"] > 0.4


def test_labels_are_told_apart_before_training(untied):
    """A shift is seen although all targets cost about ln V; a regulariser is not a shift."""
    assert updates.labels(subject_of(untied)) == {"offset": 1, "offset_error": 0, "loss_error": 0}
    labels = updates.labels(subject_of(untied, seams=seam_faults.SHIFTED))
    assert labels["offset"] == 2 and labels["offset_error"] < 1e-5 and labels["loss_error"] > 0.1
    labels = updates.labels(subject_of(untied, seams=seam_faults.SMOOTHED))
    assert labels["offset_error"] > 0.1 * labels["loss_error"]


def test_windows_served_again_and_padding_are_counted(untied):
    s = subject_of(untied)
    assert updates.batches(s) == {"repeated": 0, "padding_scored": 0}
    first = subject.served(s.program, 1)
    n = updates.SERVED_STEPS
    with mock.patch.object(
        updates, "served", lambda *_: jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), first)
    ):
        assert updates.batches(s)["repeated"] == 1 - 1 / n
    end = s.program.tokens.tokenizer.end_of_text
    half = jnp.arange(first.inputs.shape[-1]) >= 8
    padded = first.replace(
        inputs=jnp.where(half, end, first.inputs), targets=jnp.where(half, end, first.targets)
    )
    with mock.patch.object(updates, "served", lambda *_: padded):
        assert updates.batches(s)["padding_scored"] == pytest.approx(8 / 16)
        unscored = padded.replace(weights=padded.weights * ~half)
    with mock.patch.object(updates, "served", lambda *_: unscored):
        assert updates.batches(s)["padding_scored"] == 0


# -------------------------------------------------------------------------------------- the start


def test_displacement_of_doubled_and_of_unchanged_weights(untied):
    start = subject_of(untied).params
    doubled = start | {"head": jax.tree.map(lambda w: 2 * w, start["head"])}
    moved = updates.moved(doubled, start)
    assert (moved["moved_head"], moved["norm_head"]) == (1, 2)
    assert moved["moved_matrix"] == moved["moved_embedding"] == moved["codes_changed"] == 0
    flipped = jax.tree.map(jnp.negative, start)
    codes = subject.codes_by_path(start).values()
    zeros = sum(int((q == 0).sum()) for q in codes) / sum(q.size for q in codes)
    assert updates.moved(flipped, start)["codes_changed"] == pytest.approx(1 - zeros)


def test_overfit_stops_once_the_loss_is_low(untied):
    s = subject_of(untied)
    overfit = updates.overfit(replace(s, overfit_steps=1000), windows=1)
    assert overfit["overfit_loss"] < overfit["overfit_limit"] and overfit["overfit_steps"] < 1000
    held = replace(subject_of(untied, lr_peak=0.0), overfit_steps=50)
    assert updates.overfit(held, windows=1)["overfit_loss"] > updates.OVERFIT_LOSS


# ------------------------------------------------------------------------------------------ whole


@pytest.mark.slow
def test_all_tests_of_a_sound_start_point_to_nothing_but_its_length(untied):
    s = replace(subject_of(untied), overfit_steps=25)
    measured, left_out = audit.measure(s)
    assert left_out == {} and all(np.isfinite(x) for x in measured.values())
    assert [f.name for f in causes.rank(measured)] == []
    assert len(audit.terminal_lines(measured, left_out)) == len(audit.TESTS)


def test_a_model_without_optimiser_and_start_has_these_tests_left_out(untied):
    s = subject_of(untied)
    alone = subject.Subject(s.program, s.params, 0)
    measured, left_out = audit.measure(alone)
    rest = (subject.OPTIMISER, subject.START)
    assert left_out == {t.name: t.needs[-1] for t in audit.TESTS if t.needs[-1] in rest}
    assert causes.rank(measured | {"overfit_loss": 9.0}) != []
    assert any("left out" in line for line in audit.terminal_lines(measured, left_out))


def test_a_folder_without_checkpoints_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no checkpoints in"):
        subject.open_source(str(tmp_path / "nothing"))


def test_without_text_only_a_violated_identity_is_a_cause(untied):
    """Nobody knows whether the model has learned, so nothing is said of what keeps it from it."""
    rates = ("lr_peak", "lr_stage1_end", "lr_stage2_start", "lr_final")
    s = subject_of(untied, **dict.fromkeys(rates, 1e-9))
    alone = program.without_text(s.program.cfg, s.program.replicates)
    s = replace(s, program=alone, start=None, no_text="gone")
    measured, left_out = audit.measure(s)
    assert {t.name for t in audit.TESTS} - set(left_out) == {
        *("codes", "straight-through", "schedule", "decay")
    }
    assert measured["planned_lr"] < 1e-6 and causes.rank(measured) == []
    dead = changed(s, "block_0/ffn/down/kernel", jnp.zeros_like)
    assert [f.name for f in causes.rank(audit.measure(dead)[0])] == ["dead ternary matrices"]
