"""The training loss: cross-entropy over the scored positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    loss, grad_BLV = grad(logits_BLV, targets_BL, weights_BL)
    other_loss, other_grad_BLV = grad(other_logits_BLV, other_targets_BL, weights_BL)
    assert loss == other_loss
    np.testing.assert_array_equal(grad_BLV, other_grad_BLV)
    np.testing.assert_array_equal(np.abs(grad_BLV).sum(axis=-1) > 0, ~masked_BL)


def test_a_batch_without_scored_positions_has_loss_and_gradient_zero(case):
    logits_BLV, targets_BL, weights_BL = case
    loss, grad_BLV = jax.value_and_grad(next_token_loss)(logits_BLV, targets_BL, 0 * weights_BL)
    assert loss == 0
    np.testing.assert_array_equal(grad_BLV, 0)


def test_bfloat16_logits_are_summed_in_float32(case):
    """Logits that bfloat16 can represent give the loss of their float32 copies, bit for bit."""
    logits_BLV = jnp.asarray(case[0], jnp.bfloat16)
    loss = next_token_loss(logits_BLV, *case[1:])
    assert loss.dtype == jnp.float32
    assert loss == next_token_loss(logits_BLV.astype(jnp.float32), *case[1:])
