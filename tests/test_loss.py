"""The training loss: cross-entropy over the scored positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import loss
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy


def next_token_loss(logits_BLV, targets_BL, weights_BL):
    """`cross_entropy` of a batch whose inputs do not matter."""
    return cross_entropy(logits_BLV, Batch(targets_BL, targets_BL, weights_BL))


@pytest.fixture
def case():
    """Logits [2, 5, 7], targets [2, 5], weights [2, 5] with seven scored positions."""
    random = np.random.default_rng(0)
    weights_BL = np.float32([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]])
    logits_BLV = random.normal(size=(2, 5, 7)).astype(np.float32) * 3
    return logits_BLV, random.integers(0, 7, (2, 5)), weights_BL


def test_loss_is_the_mean_cross_entropy_of_scored_positions(case):
    logits_BLV, targets_BL, weights_BL = case
    z = logits_BLV.astype(np.float64)
    nll_BL = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets_BL[..., None], -1)[..., 0]
    want = (nll_BL * weights_BL).sum() / 7
    assert float(next_token_loss(*case)) == pytest.approx(want, rel=1e-6)


def test_unscored_positions_change_neither_loss_nor_gradient(case):
    logits_BLV, targets_BL, weights_BL = case
    masked_BL = weights_BL == 0
    other_targets_BL = np.where(masked_BL, (targets_BL + 1) % 7, targets_BL)
    other_logits_BLV = np.where(masked_BL[..., None], -logits_BLV, logits_BLV)
    grad = jax.value_and_grad(next_token_loss)
    nats, grad_BLV = grad(logits_BLV, targets_BL, weights_BL)
    other_nats, other_grad_BLV = grad(other_logits_BLV, other_targets_BL, weights_BL)
    assert nats == other_nats
    np.testing.assert_array_equal(grad_BLV, other_grad_BLV)
    np.testing.assert_array_equal(np.abs(grad_BLV).sum(axis=-1) > 0, ~masked_BL)


def test_a_batch_without_scored_positions_has_loss_and_gradient_zero(case):
    logits_BLV, targets_BL, weights_BL = case
    nats, grad_BLV = jax.value_and_grad(next_token_loss)(logits_BLV, targets_BL, 0 * weights_BL)
    assert nats == 0
    np.testing.assert_array_equal(grad_BLV, 0)


def test_bfloat16_logits_are_summed_in_float32(case):
    """Logits that bfloat16 can represent give the loss of their float32 copies, bit for bit."""
    logits_BLV = jnp.asarray(case[0], jnp.bfloat16)
    nats = next_token_loss(logits_BLV, *case[1:])
    assert nats.dtype == jnp.float32
    assert nats == next_token_loss(logits_BLV.astype(jnp.float32), *case[1:])


@pytest.mark.parametrize(("vocab", "most"), [(101, 1 << 21), (101, 300), (50257, 1 << 16)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_head_by_blocks_is_softmax_minus_one_hot_in_float64(monkeypatch, axis, vocab, most):
    """Value and gradients; 101 and 50,257 divide into no blocks, so the last two overlap."""
    monkeypatch.setattr(loss, "MOST_LOGITS", most)
    monkeypatch.setattr(loss, "NARROWEST", 32)
    random = np.random.default_rng(0)
    x_ND, w_DV = random.normal(size=(6, 16)), random.normal(size=(16, vocab))
    bias_V, targets_N = random.normal(size=vocab), random.integers(0, vocab, 6)
    targets_N[:2] = vocab - 1, vocab // 2
    grad_N = random.normal(size=6)
    z = 1.5 * x_ND @ w_DV + bias_V
    q = np.exp(z - z.max(-1, keepdims=True))
    d = q / q.sum(-1, keepdims=True) - (np.arange(vocab) == targets_N[:, None])
    nats = np.log(q.sum(-1)) + z.max(-1) - z[np.arange(6), targets_N]
    d *= grad_N[:, None]
    arrays = [jnp.asarray(x, jnp.float32) for x in (x_ND, w_DV if axis == 0 else w_DV.T, bias_V)]

    @jax.jit
    def value_and_gradients(x, w, bias):
        def nats_of(x, w, bias):
            return loss.head_nats(axis, x, w, jnp.float32(1.5), bias, targets_N)

        nats_N, vjp = jax.vjp(nats_of, x, w, bias)
        return nats_N, *vjp(jnp.float32(grad_N))

    outputs = value_and_gradients(*arrays)
    head = 1.5 * x_ND.T @ d
    exact = nats, 1.5 * d @ w_DV.T, head if axis == 0 else head.T, d.sum(0)
    for output, wanted in zip(outputs, exact, strict=True):
        off = np.abs(np.asarray(output, np.float64) - wanted).max() / np.abs(wanted).max()
        assert off < 3e-6


def test_without_a_bias_the_head_has_no_gradient_for_one(case):
    logits_BLV, targets_BL, weights_BL = case
    x = jnp.eye(7, dtype=jnp.float32)
    batch = Batch(targets_BL, targets_BL, weights_BL)
    readout = loss.Readout(batch)
    value = readout(jnp.asarray(logits_BLV), x, 0, jnp.float32(1.0), None)
    assert float(value) == pytest.approx(float(cross_entropy(logits_BLV, batch)), rel=1e-6)
    fast = jax.grad(lambda z: readout(z, x, 0, jnp.float32(1.0), None))(jnp.asarray(logits_BLV))
    slow = jax.grad(cross_entropy)(jnp.asarray(logits_BLV), batch)
    np.testing.assert_allclose(fast, slow, atol=1e-7)
