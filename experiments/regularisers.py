"""Regularisers of the vocabulary that may be added to the cross-entropy, and a loss with them.

Every regulariser is a float32 number to be minimised, a mean over the scored positions n, with z
the logits, q = softmax z, y the targets, pi the unigram probabilities of the training text and V
the vocabulary size. The z-loss and the coverage leave the optimum at the distribution p of the
text; each other docstring says where its regulariser, with weight w beside the cross-entropy, moves
it (mu makes q sum to 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax.config import Hyper
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy, scored_mean


class Predictions(NamedTuple):
    """What the regularisers look at."""

    log_q_BLV: jax.Array
    logsumexp_BL: jax.Array
    batch: Batch  # [B, L]
    unigram_V: jax.Array


def label_smoothing(p: Predictions) -> jax.Array:
    """mean_v(-log q_v) + log q_y: times eps, it turns CE into CE against (1 - eps) y + eps / V.

    Szegedy et al. 2016 (arXiv 1512.00567, section 7). Sign: none to choose, the definition is a
    target. Optimum: (1 - eps) p + eps / V.
    """
    log_q_y = jnp.take_along_axis(p.log_q_BLV, p.batch.targets[..., None], axis=-1)[..., 0]
    return scored_mean(log_q_y - jnp.mean(p.log_q_BLV, axis=-1), p.batch.weights)


def z_loss(p: Predictions) -> jax.Array:
    """(log sum exp z)^2: keeps the normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

    Optimum: p, and of the logits that give it those with log sum exp z = 0, which is z = log p.
    """
    return scored_mean(jnp.square(p.logsumexp_BL), p.batch.weights)


def entropy_bonus(p: Predictions) -> jax.Array:
    """1 - entropy(q) / ln V: the confidence penalty (arXiv 1701.06548) up to a constant.

    Sign: as lambda * (1 - entropy) is written, entropy is rewarded; dividing by ln V makes the 1 a
    maximum, so that the term lies in [0, 1]. Optimum: p_v / q_v = mu + w log q_v / ln V.
    """
    entropy_BL = -jnp.sum(jnp.exp(p.log_q_BLV) * p.log_q_BLV, axis=-1)
    return scored_mean(1 - entropy_BL / jnp.log(p.log_q_BLV.shape[-1]), p.batch.weights)


def frequency_penalty(p: Predictions) -> jax.Array:
    """sum_v q_v log(pi_v / min(pi)): what the predictions cost by the frequency of their tokens.

    Sign: opposite to the formula -lambda * log p(token), which added to a loss would punish rare
    tokens and so deepen what it is meant to cure. Optimum: q_v = p_v / (mu + w log pi_v).
    """
    log_pi_V = jnp.log(p.unigram_V)
    cost_BL = jnp.sum(jnp.exp(p.log_q_BLV) * (log_pi_V - jnp.min(log_pi_V)), axis=-1)
    return scored_mean(cost_BL, p.batch.weights)


def diversity_bonus(p: Predictions) -> jax.Array:
    """Probability of the distinct tokens that the window holds up to n, n included.

    Sign: the reward for tokens not seen recently, minus their probability, is this less 1; "recent"
    is the window. Optimum: q_v = p_v / (mu + w), or p_v / mu where v is not in the window.
    """
    log_q_BLM, first_BLM = _seen(p.log_q_BLV, p.batch.inputs)
    return scored_mean(jnp.sum(first_BLM * jnp.exp(log_q_BLM), axis=-1), p.batch.weights)


def coverage(p: Predictions) -> jax.Array:
    """KL(pi || mean q over the scored positions): the batch's predictions cover the vocabulary.

    Optimum: p, if the batch's mean p is pi. Below 1e-30 a mean gives no gradient.
    """
    weights_BL = p.batch.weights
    mean_q_V = jnp.einsum("blv,bl->v", jnp.exp(p.log_q_BLV), weights_BL)
    mean_q_V = mean_q_V / jnp.maximum(jnp.sum(weights_BL), 1.0)
    log_mean = jnp.log(jnp.maximum(mean_q_V, 1e-30))
    return jnp.sum(p.unigram_V * (jnp.log(p.unigram_V) - log_mean))


def unlikelihood(p: Predictions) -> jax.Array:
    """Sum of -log(1 - q_c) over the window's tokens c != y up to n (arXiv 1908.04319, eq. 4).

    Optimum, with S the window's tokens: p_v / q_v = mu + w [v in S] (1 - p_v) / (1 - q_v). Beyond
    q_c = 1 - 1e-6, where float32 has no digits of 1 - q_c left, only the cross-entropy pulls.
    """
    inputs_BL, targets_BL = p.batch.inputs, p.batch.targets
    log_q_BLM, first_BLM = _seen(p.log_q_BLV, inputs_BL)
    wrong_BLM = first_BLM & (inputs_BL[:, None, :] != targets_BL[..., None])
    q_BLM = jnp.minimum(jnp.exp(log_q_BLM), 1 - 1e-6)
    cost_BL = jnp.sum(-jnp.log1p(-jnp.where(wrong_BLM, q_BLM, 0)), axis=-1)
    return scored_mean(cost_BL, p.batch.weights)


def _seen(log_q_BLV, inputs_BL):
    """log q at position n of the input token m, and whether m <= n is its first occurrence."""
    length = inputs_BL.shape[1]
    same_BMM = inputs_BL[:, :, None] == inputs_BL[:, None, :]
    earlier = jnp.tril(jnp.ones((length, length), bool), -1)
    first_BM = ~jnp.any(same_BMM & earlier, axis=-1)
    first_BLM = first_BM[:, None, :] & jnp.tril(jnp.ones((length, length), bool))
    index_BLM = jnp.broadcast_to(inputs_BL[:, None, :], first_BLM.shape)
    return jnp.take_along_axis(log_q_BLV, index_BLM, axis=-1), first_BLM


REGULARISERS = {
    f.__name__: f
    for f in (
        label_smoothing,
        z_loss,
        entropy_bonus,
        frequency_penalty,
        diversity_bonus,
        coverage,
        unlikelihood,
    )
}


def penalty(
    logits_BLV: jax.Array, batch: Batch, weights: dict[str, jax.Array], unigram_V: jax.Array
) -> jax.Array:
    """Sum of the regularisers that `weights` names, each times its weight."""
    z_BLV = logits_BLV.astype(jnp.float32)
    logsumexp_BL = jax.nn.logsumexp(z_BLV, axis=-1)
    p = Predictions(z_BLV - logsumexp_BL[..., None], logsumexp_BL, batch, unigram_V)
    return sum((weight * REGULARISERS[name](p) for name, weight in weights.items()), jnp.zeros(()))


def regularised_loss(
    logits_BLV: jax.Array, batch: Batch, hyper: Hyper, unigram_V: jax.Array
) -> jax.Array:
    """Cross-entropy and the regularisers that `hyper.extra` names, with their weights there."""
    return cross_entropy(logits_BLV, batch) + penalty(logits_BLV, batch, hyper.extra, unigram_V)
