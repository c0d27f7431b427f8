"""The training loss: cross-entropy of the next token, of logits or straight from the head.

Shapes: B batch, L position, N = B L positions, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from bitnet_jax import products, sharding
from bitnet_jax.config import Hyper
from bitnet_jax.data import Batch

MOST_LOGITS = 1 << 21  # of a block of the vocabulary: 8 MB, which a core's caches nearly hold
NARROWEST = 8192  # tokens of a block, however many rows there are


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


@dataclass(frozen=True)
class Readout:
    """`cross_entropy` of a Transformer's logits, which never exist as one array (`head_nats`)."""

    batch: Batch

    def __call__(self, x_BLD, head, axis, scale, bias_V) -> jax.Array:
        x_ND, targets_N = x_BLD.reshape(-1, x_BLD.shape[-1]), self.batch.targets.reshape(-1)
        nats_N = head_nats(axis, x_ND, head, scale, bias_V, targets_N)
        return scored_mean(nats_N, self.batch.weights.reshape(-1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_nats(axis: int, x_ND, head, scale, bias_V, targets_N) -> jax.Array:
    """Cross-entropy [N], float32, of logits scale * x . head + bias against the targets.

    `head` is [D, V] (axis 0) or [V, D] (axis 1), `bias_V` may be None. The gradient is softmax
    minus one-hot, without a scatter; that of `scale`, a hyper-parameter, counts as 0. Past
    MOST_LOGITS logits are made by blocks of the vocabulary, once forwards and once backwards.
    """
    return _head_fwd(axis, x_ND, head, scale, bias_V, targets_N)[0]


def _blocks(n_rows: int, vocab: int) -> tuple[int, int]:
    """Number of blocks and the width of all but the last, which is no wider."""
    n_rows = -(-n_rows // sharding.n_data())  # on one device
    n = min(-(-n_rows * vocab // MOST_LOGITS), -(-vocab // NARROWEST))
    return n, -(-vocab // n)


def _over_blocks(add, sums, n_rows: int, vocab: int):
    """sums after add(sums, start, width) of every block of the vocabulary."""
    n, width = _blocks(n_rows, vocab)
    if n > 1:
        starts = width * jnp.arange(n - 1)
        sums, _ = jax.lax.scan(lambda sums, start: (add(sums, start, width), None), sums, starts)
    return add(sums, (n - 1) * width, vocab - (n - 1) * width)


def _block(axis, x_ND, head, bias_V, start, width) -> tuple[jax.Array, jax.Array]:
    """A block of the head in the type of x, and its logits [N, width], float32."""
    w = jax.lax.dynamic_slice_in_dim(head, start, width, 1 - axis).astype(x_ND.dtype)
    z_NV = products.dot(x_ND, w, 1, axis)
    if bias_V is not None:
        z_NV += jax.lax.dynamic_slice_in_dim(bias_V, start, width)
    return w, z_NV


def _whole(head, x_ND) -> jax.Array:
    """The head on every device that shares a batch, in the type of x; else as it is."""
    return sharding.whole(head.astype(x_ND.dtype)) if sharding.n_data() > 1 else head


def _is_target(targets_N, start, width) -> jax.Array:
    return targets_N[:, None] == start + jnp.arange(width)


def _head_fwd(axis, x_ND, head, scale, bias_V, targets_N):
    vocab, kept = head.shape[1 - axis], []
    scaled_ND, whole = (scale * x_ND).astype(x_ND.dtype), _whole(head, x_ND)

    def add(sums, start, width):
        top_N, total_N, target_N = sums
        _, z_NV = _block(axis, scaled_ND, whole, bias_V, start, width)
        if width == vocab:
            kept.append(z_NV)
        higher_N = jnp.maximum(top_N, jnp.max(z_NV, axis=-1))
        exp_N = jnp.sum(jnp.exp(z_NV - higher_N[:, None]), axis=-1)
        here_N = jnp.sum(jnp.where(_is_target(targets_N, start, width), z_NV, 0), axis=-1)
        return higher_N, total_N * jnp.exp(top_N - higher_N) + exp_N, target_N + here_N

    zeros_N = jnp.zeros(len(x_ND), jnp.float32)
    top_N, total_N, target_N = _over_blocks(
        add, (zeros_N - jnp.inf, zeros_N, zeros_N), len(x_ND), vocab
    )
    log_total_N = top_N + jnp.log(total_N)
    saved = x_ND, head, scale, bias_V, targets_N, log_total_N, kept
    return log_total_N - target_N, saved


def _head_bwd(axis, saved, grad_N):
    x_ND, head, scale, bias_V, targets_N, log_total_N, kept = saved
    vocab, scaled_ND = head.shape[1 - axis], (scale * x_ND).astype(x_ND.dtype)
    whole, split = _whole(head, x_ND), sharding.by_columns if axis else sharding.split_batch

    def add(sums, start, width):
        grad_x_ND, grad_head, grad_bias_V = sums
        w, z_NV = _block(axis, scaled_ND, whole, bias_V, start, width)
        q_NV = jnp.exp((kept[0] if kept else z_NV) - log_total_N[:, None])
        d_NV = (q_NV - _is_target(targets_N, start, width)) * grad_N[:, None]
        # Made once: XLA would compute it anew for each use.
        d_NV = jax.lax.optimization_barrier(d_NV)
        if bias_V is not None:
            new_V = jnp.sum(d_NV, axis=0)
            grad_bias_V = jax.lax.dynamic_update_slice(grad_bias_V, new_V, (start,))
        d_NV = d_NV.astype(x_ND.dtype)
        grad_x_ND += products.dot(d_NV, w, 1, 1 - axis)
        rows, columns = (scaled_ND, d_NV) if axis == 0 else (d_NV, scaled_ND)
        new = products.dot(products.transposed(rows), columns, 1, 0).astype(head.dtype)
        new = split(sharding.whole(new))
        at = (0, start) if axis == 0 else (start, 0)
        return grad_x_ND, jax.lax.dynamic_update_slice(grad_head, new, at), grad_bias_V

    zeros = jnp.zeros(x_ND.shape, jnp.float32), split(jnp.zeros_like(head))
    zeros = *zeros, None if bias_V is None else jnp.zeros_like(bias_V)
    grad_x_ND, grad_head, grad_bias_V = _over_blocks(add, zeros, len(x_ND), vocab)
    grad_x_ND = (scale * grad_x_ND).astype(x_ND.dtype)
    return grad_x_ND, sharding.as_state(grad_head), jnp.zeros_like(scale), grad_bias_V, None


head_nats.defvjp(_head_fwd, _head_bwd)


def accumulated(gradient: Callable, batch: Batch, n_parts: int):
    """(loss, gradient) of a batch [B, L] from those of its parts, one after another.

    Part a holds the windows a, a + n, a + 2n and so on, so that each device of a split batch keeps
    its own. The means over the scored positions of each part become that of the batch: a part
    counts by what its mean was divided by.
    """
    if n_parts == 1:
        return gradient(batch)

    def add(sums, part):
        share = jnp.maximum(jnp.sum(part.weights), 1.0)
        loss_and_gradient = gradient(sharding.split_batch(part))
        return jax.tree.map(lambda total, x: total + share * x, sums, loss_and_gradient), None

    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n_parts, *x.shape[1:]), 1, 0), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, first)
    zeros = jax.tree.map(lambda x: sharding.as_state(jnp.zeros(x.shape, x.dtype)), shapes)
    sums, _ = jax.lax.scan(add, zeros, parts)
    scored = jnp.maximum(jnp.sum(batch.weights), 1.0)
    return jax.tree.map(lambda x: x / scored, sums)
