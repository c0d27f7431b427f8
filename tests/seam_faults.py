"""Faults of code, put in through the seams of the step or in place of a function."""

import jax
import jax.numpy as jnp
import optax

from bitnet_jax import loss, optim, quant
from bitnet_jax.train import Seams


def rounding_alone(w, strength, dtype):
    """Weights are quantised by formulas alone: rounding has no gradient."""
    scale = quant.weight_scale(w)
    q = quant.weight_codes(w, scale) / scale
    return ((1 - strength) * w + strength * q).astype(dtype)


def shifted_loss(logits_BLV, batch, hyper, unigram_V):
    """Targets that are shifted already are shifted again: position t learns the token at t + 2."""
    rest = batch.replace(targets=batch.targets[:, 1:], weights=batch.weights[:, 1:])
    return loss.training_loss(logits_BLV[:, :-1], rest, hyper, unigram_V)


def smoothed_loss(logits_BLV, batch, hyper, unigram_V):
    """A sound loss and a regulariser."""
    spread = 0.1 * jnp.mean(jax.nn.logsumexp(logits_BLV, axis=-1) - logits_BLV.mean(-1))
    return loss.training_loss(logits_BLV, batch, hyper, unigram_V) + spread


def _with_update(make, change):
    """The optimiser whose updates are changed by `change(updates, params, groups)`."""

    def optimizer(cfg, run, hyper, groups):
        tx = make(cfg, run, hyper, groups)

        def update(gradients, state, params, **extra):
            updates, state = tx.update(gradients, state, params, **extra)
            return change(updates, params, groups), state

        return optim.Optimizer(tx.init, update, tx.decay_part)

    return optimizer


def _frozen_output(updates, params, groups):
    still = optim.output_group(groups)
    return jax.tree.map(lambda u, g: jnp.zeros_like(u) if g == still else u, updates, groups)


def _unscaled(updates, params, groups):
    return jax.tree.map(lambda u, w: u - 0.02 * w, updates, params)


def _optax_adamw(cfg, run, hyper, groups):
    """A chain of optax's own, which reports no decay."""
    tx = optax.adamw(1e-3)

    def update(gradients, state, params, *, grad_norm=None):
        return tx.update(gradients, state, params)

    return optim.Optimizer(
        tx.init, update, lambda params, state: jax.tree.map(jnp.zeros_like, params)
    )


NO_STRAIGHT_THROUGH = Seams(quantize_weight=rounding_alone)
SHIFTED = Seams(loss=shifted_loss)
SMOOTHED = Seams(loss=smoothed_loss)
FROZEN_OUTPUT = Seams(optimizer=_with_update(optim.make_optimizer, _frozen_output))
UNSCALED_DECAY = Seams(optimizer=_with_update(optim.make_optimizer, _unscaled))
HOLDS_ITS_UPDATES = Seams(optimizer=_with_update(optim.make_optimizer, lambda u, params, groups: u))
OTHER_OPTIMISER = Seams(optimizer=_optax_adamw)


def attention_to_all(q, k, v, is_causal):
    """Every position sees the whole window."""
    return jnp.broadcast_to(jnp.mean(v, axis=1, keepdims=True), q.shape)
