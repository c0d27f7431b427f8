"""Collapse statistics: additive sums over positions, turned into numbers once at the end.

Definitions. z: float32 logits of a position, q = softmax z, a = argmax z (ties to the lowest id).

unique_tokens       distinct a over the tracked positions (the report's number)
unique_targets      distinct next tokens of the text over the same positions
concentration       mean of max q over the tracked positions (the report's number)
mode_share          share of tracked positions that predict the most frequent a
entropy             mean entropy of q over the scored held-out positions, nats
logit_std           mean over positions of the standard deviation of z over the vocabulary
mutual_information  H(mean q) - mean H(q), nats: how much the prediction depends on the context
unigram_kl          KL(unigram of the training text || mean q), nats
overconfidence      loss - entropy; d loss / d ln(scale of z) at scale 1, so negative means that
                    larger logits would lower the loss
"""

import math

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Stats:
    """Sums over positions, each [R] or [R, V]; two batches merge with `+` leaf by leaf.

    `all_*` run over every position, the others over the scored ones.
    """

    all_positions: jax.Array
    all_top1: jax.Array
    all_argmax: jax.Array
    all_targets: jax.Array
    positions: jax.Array
    nats: jax.Array
    bytes: jax.Array
    entropy: jax.Array
    logit_std: jax.Array
    probs: jax.Array


def stats(
    logits_RBLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, token_bytes_V: jax.Array
) -> Stats:
    """Sum the statistics of one batch, seen by R replicates, in one pass over the logits.

    `weights_BL` marks the scored positions with 1; `token_bytes_V` gives each token's bytes.
    Replicates and positions are flattened to rows because XLA:CPU reduces two-dimensional arrays
    faster than vmapped ones.
    """
    n_rep, vocab = logits_RBLV.shape[0], logits_RBLV.shape[-1]
    z = logits_RBLV.reshape(-1, vocab).astype(jnp.float32)  # [R * N, V]
    w_N, y_N = weights_BL.reshape(-1), targets_BL.reshape(-1)
    w, y = jnp.tile(w_N, n_rep), jnp.tile(y_N, n_rep)

    top = jax.lax.optimization_barrier(jnp.max(z, axis=-1, keepdims=True))
    exp = jax.lax.optimization_barrier(jnp.exp(z - top))
    total = jnp.sum(exp, axis=-1)
    log_total = top[:, 0] + jnp.log(total)
    entropy = log_total - jnp.sum(exp * z, axis=-1) / total
    nats = log_total - jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]
    mean = jnp.mean(z, axis=-1)
    variance = jnp.mean(jnp.square(z - mean[:, None]), axis=-1)
    # The first argmax by a float reduction, which vectorises where jnp.argmax does not; exact for
    # vocabularies below 2^24.
    countdown_V = jnp.arange(vocab, 0, -1, dtype=jnp.float32)
    argmax = vocab - jnp.max(jnp.where(z == top, countdown_V, 0), axis=-1).astype(jnp.int32)

    def total_by_replicate(x):
        return jnp.sum(x.reshape(n_rep, -1), axis=1)

    rows = jnp.kron(jnp.eye(n_rep), w_N[None]) / total  # [R, R * N]
    replicate = jnp.repeat(jnp.arange(n_rep), y_N.size)
    counts = jnp.zeros((n_rep, vocab))
    return Stats(
        all_positions=jnp.full(n_rep, y_N.size, jnp.float32),
        all_top1=total_by_replicate(1 / total),
        all_argmax=counts.at[replicate, argmax].add(1),
        all_targets=counts.at[replicate, y].add(1),
        positions=total_by_replicate(w),
        nats=total_by_replicate(nats * w),
        bytes=total_by_replicate(token_bytes_V[y] * w),
        entropy=total_by_replicate(entropy * w),
        logit_std=total_by_replicate(jnp.sqrt(variance) * w),
        probs=rows @ exp,
    )


def merge(batches: Stats) -> Stats:
    """Sum statistics that are stacked along a leading axis."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), batches)


def finalize(held_out: Stats, tracked: Stats, unigram_V: jax.Array) -> dict[str, jax.Array]:
    """Turn sums into the flat `eval/*` and `collapse/*` numbers, each [R]."""
    loss, entropy = held_out.nats / held_out.positions, held_out.entropy / held_out.positions
    mean_q = held_out.probs / held_out.positions[:, None]
    log_q = jnp.log(jnp.maximum(mean_q, 1e-30))
    return {
        "eval/loss": loss,
        "eval/bits_per_byte": held_out.nats / jnp.log(2.0) / held_out.bytes,
        "collapse/unique_tokens": jnp.sum(tracked.all_argmax > 0, axis=-1),
        "collapse/unique_targets": jnp.sum(tracked.all_targets > 0, axis=-1),
        "collapse/concentration": tracked.all_top1 / tracked.all_positions,
        "collapse/mode_share": jnp.max(tracked.all_argmax, axis=-1) / tracked.all_positions,
        "collapse/entropy": entropy,
        "collapse/logit_std": held_out.logit_std / held_out.positions,
        "collapse/mutual_information": -jnp.sum(mean_q * log_q, axis=-1) - entropy,
        "collapse/unigram_kl": jnp.sum(unigram_V * (jnp.log(unigram_V) - log_q), axis=-1),
        "collapse/overconfidence": loss - entropy,
    }


def verdict(row: dict, references: dict, sum_lr: float) -> str:
    """Name what an evaluation shows: a pure function of one row, the references and the summed LR.

    `row` holds the keys of `finalize`, `references` those of `reference.references`, and `sum_lr`
    is the sum of the learning rate so far, the yardstick of how far weights can have moved: healthy
    runs pass the unigram phase by about 0.03. Distinct tokens decide nothing. First match:

    nonfinite        loss or entropy is NaN or inf
    healthy          loss below the unigram's, predictions depend on the context
    context_blind    loss below the unigram's, predictions do not depend on the context
    init             loss and logits as at initialisation: ln V + std^2 / 2
    overconfident    loss more than 1 nat above the entropy
    unigram_transit  word frequencies are being learned (normal early on)
    dead             loss near ln V although weights had time to move
    underscaled      loss above the unigram's, entropy above the loss: larger logits would help
    collapsed        loss above the unigram's, predictions do not depend on the context
    slow             loss above the unigram's, predictions depend on the context
    """
    loss, entropy = row["eval/loss"], row["collapse/entropy"]
    ln_v, unigram = references["uniform"]["loss"], references["unigram"]["loss"]
    early = sum_lr < 0.05
    if not (math.isfinite(loss) and math.isfinite(entropy)):
        return "nonfinite"
    informed = row["collapse/mutual_information"] > 0.05
    if loss < unigram:
        return "healthy" if informed else "context_blind"
    if early and abs(loss - (ln_v + row["collapse/logit_std"] ** 2 / 2)) < 0.1:
        return "init"
    if loss - entropy > 1:
        return "overconfident"
    if early:
        return "unigram_transit"
    if loss > ln_v - 0.05:
        return "dead"
    if loss - entropy < -0.3:
        return "underscaled"
    return "slow" if informed else "collapsed"
