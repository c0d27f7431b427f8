"""Training losses."""

import jax
import jax.numpy as jnp
import optax


def next_token_loss(logits_BLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array):
    """Mean cross-entropy over the scored positions, in nats, float32.

    `weights_BL` is 1 where the target is scored and 0 elsewhere (end of text, padding). A batch
    without scored positions has loss 0.
    """
    nll_BL = optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV.astype(jnp.float32), targets_BL
    )
    return jnp.sum(nll_BL * weights_BL) / jnp.maximum(jnp.sum(weights_BL), 1.0)
