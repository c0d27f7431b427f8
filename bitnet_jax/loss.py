"""The training loss: cross-entropy of the next token."""

import jax
import jax.numpy as jnp
import optax

from bitnet_jax.config import Hyper
from bitnet_jax.data import Batch


def cross_entropy(logits_BLV: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross-entropy over the scored positions, in nats, float32.

    A batch without scored positions has loss 0.
    """
    nll_BL = optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV.astype(jnp.float32), batch.targets
    )
    return scored_mean(nll_BL, batch.weights)


def scored_mean(values_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """Mean of the scored positions; 0 without any."""
    return jnp.sum(values_BL * weights_BL) / jnp.maximum(jnp.sum(weights_BL), 1.0)


def training_loss(
    logits_BLV: jax.Array, batch: Batch, hyper: Hyper, unigram_V: jax.Array
) -> jax.Array:
    """What training minimises unless an experiment gives its own function of these arguments.

    `unigram_V` holds the token probabilities of the training text; `hyper.extra` the numbers that
    such a function reads.
    """
    del hyper, unigram_V
    return cross_entropy(logits_BLV, batch)
