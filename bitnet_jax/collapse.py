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

Logits and targets may be NumPy arrays of any trainer. With transformers:

    class CollapseCallback(TrainerCallback):
        def __init__(self, tokens_BL, unigram_V):  # held-out token ids; frequencies of the text
            self.tokens_BL, self.unigram_V = tokens_BL, unigram_V

        def on_evaluate(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                logits_BLV = model(self.tokens_BL[:, :-1].to(model.device)).logits
            sums = collapse.stats(logits_BLV.float().cpu().numpy(), self.tokens_BL[:, 1:].numpy())
            numbers = collapse.finalize(sums, sums, self.unigram_V)
            row = {key: float(value[0]) for key, value in numbers.items()}
            state.log_history.append({"step": state.global_step} | row)

    unigram_V = reference.unigram_probs(training_token_ids, vocab_size)
    trainer.add_callback(CollapseCallback(tokens_BL, unigram_V))
"""

import flax.struct
import jax
import jax.numpy as jnp

from bitnet_jax import metrics


@flax.struct.dataclass
class Stats:
    """Sums over positions and windows; those of two batches merge with `+` leaf by leaf.

    `all_*` run over every position, the others over the scored ones. The last three are over
    windows b, of n_b scored positions and a loss of d_b nats more than each of K references, with
    0 nats as the first reference. Shapes [R], of token counts and `probs` [R, V], of the last
    three [R, 1 + K].
    """

    all_positions: jax.Array
    all_top1: jax.Array
    all_argmax: jax.Array
    all_targets: jax.Array
    positions: jax.Array
    nats: jax.Array
    bytes: jax.Array | None
    entropy: jax.Array
    logit_std: jax.Array
    probs: jax.Array
    windows: jax.Array
    windows_n_n: jax.Array
    windows_d: jax.Array
    windows_d_d: jax.Array
    windows_d_n: jax.Array


def stats(
    logits_RBLV, targets_BL, weights_BL=None, token_bytes_V=None, reference_nats_KBL=None
) -> Stats:
    """Sum the statistics of one batch of windows, seen by R replicates, in one pass over logits.

    `logits_RBLV` may lack the leading axis (one model), `targets_BL` and `weights_BL` may have it
    (replicates that see different text). Weights mark the scored positions with 1, by default all;
    a position that is not scored still needs a token id as its target. `token_bytes_V` gives each
    token's bytes; `reference_nats_KBL` the nats of K other predictors at each position.
    """
    logits_RBLV = jnp.asarray(logits_RBLV)
    if logits_RBLV.ndim == 3:
        logits_RBLV = logits_RBLV[None]
    *shape_RBL, vocab = logits_RBLV.shape
    n_rep = shape_RBL[0]
    targets_RN = jnp.broadcast_to(targets_BL, shape_RBL).reshape(n_rep, -1)
    weights_BL = 1.0 if weights_BL is None else weights_BL
    weights_RN = jnp.broadcast_to(weights_BL, shape_RBL).reshape(n_rep, -1)

    # Rows of all replicates in one axis P: XLA:CPU reduces two-dimensional arrays up to 2.5 times
    # faster than three-dimensional ones.
    z_PV = logits_RBLV.reshape(-1, vocab).astype(jnp.float32)
    top_P1 = jnp.max(z_PV, axis=-1, keepdims=True)
    exp_PV = jnp.exp(z_PV - top_P1)
    total_P = jnp.sum(exp_PV, axis=-1)
    log_total_P = top_P1[:, 0] + jnp.log(total_P)
    entropy_P = log_total_P - jnp.sum(exp_PV * z_PV, axis=-1) / total_P
    target_z_P1 = jnp.take_along_axis(z_PV, targets_RN.reshape(-1, 1), axis=-1)
    nats_RN = (log_total_P - target_z_P1[:, 0]).reshape(n_rep, -1)
    # The first argmax by a float reduction, which vectorises where jnp.argmax does not (2 times
    # faster in all at 2,048 tokens); exact for vocabularies below 2^24.
    countdown_V = jnp.arange(vocab, 0, -1, dtype=jnp.float32)
    countdown_P = jnp.max(jnp.where(z_PV == top_P1, countdown_V, 0), axis=-1)
    argmax_RN = vocab - countdown_P.astype(jnp.int32).reshape(n_rep, -1)
    total_RN = total_P.reshape(n_rep, -1)

    def scored(x):
        return jnp.sum(x.reshape(n_rep, -1) * weights_RN, axis=1)

    return Stats(
        all_positions=jnp.full(n_rep, targets_RN.shape[1], jnp.float32),
        all_top1=jnp.sum(1 / total_RN, axis=1),
        all_argmax=_counts(argmax_RN, vocab),
        all_targets=_counts(targets_RN, vocab),
        positions=jnp.sum(weights_RN, axis=1),
        nats=scored(nats_RN),
        bytes=None if token_bytes_V is None else scored(jnp.asarray(token_bytes_V)[targets_RN]),
        entropy=scored(entropy_P),
        logit_std=scored(jnp.std(z_PV, axis=-1)),
        probs=jnp.einsum("rn,rnv->rv", weights_RN / total_RN, exp_PV.reshape(n_rep, -1, vocab)),
        **_window_sums(*(x.reshape(shape_RBL) for x in (nats_RN, weights_RN)), reference_nats_KBL),
    )


def _counts(tokens_RN, vocab: int) -> jax.Array:
    """How often each replicate has each token: [R, V]."""
    n_rep = len(tokens_RN)
    return jnp.zeros((n_rep, vocab)).at[jnp.arange(n_rep)[:, None], tokens_RN].add(1)


def _window_sums(nats_RBL, weights_RBL, reference_nats_KBL) -> dict[str, jax.Array]:
    """What the standard error of a mean over positions needs, where windows are the samples."""
    n_R1B = jnp.sum(weights_RBL, axis=-1)[:, None]
    d_RKB = jnp.sum(nats_RBL * weights_RBL, axis=-1)[:, None]
    if reference_nats_KBL is not None:
        reference_RKB = jnp.sum(jnp.asarray(reference_nats_KBL) * weights_RBL[:, None], axis=-1)
        d_RKB = jnp.concatenate([d_RKB, d_RKB - reference_RKB], axis=1)
    return {
        "windows": jnp.sum(n_R1B > 0, axis=(1, 2), dtype=jnp.float32),
        "windows_n_n": jnp.sum(n_R1B**2, axis=(1, 2)),
        "windows_d": jnp.sum(d_RKB, axis=-1),
        "windows_d_d": jnp.sum(d_RKB**2, axis=-1),
        "windows_d_n": jnp.sum(d_RKB * n_R1B, axis=-1),
    }


def merge(batches: Stats) -> Stats:
    """Sum statistics that are stacked along a leading axis."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), batches)


def finalize(held_out: Stats, tracked: Stats, unigram_V) -> dict[str, jax.Array]:
    """Turn sums into the flat `eval/*` and `collapse/*` numbers, each [R].

    Without the bytes of tokens there is no `eval/bits_per_byte`.
    """
    loss, entropy = held_out.nats / held_out.positions, held_out.entropy / held_out.positions
    log_q = _log_mean_q(held_out)
    numbers = {
        metrics.LOSS: loss,
        metrics.DISTINCT: jnp.sum(tracked.all_argmax > 0, axis=-1),
        metrics.DISTINCT_TARGETS: jnp.sum(tracked.all_targets > 0, axis=-1),
        metrics.TOP_1: tracked.all_top1 / tracked.all_positions,
        metrics.MODE_SHARE: jnp.max(tracked.all_argmax, axis=-1) / tracked.all_positions,
        metrics.ENTROPY: entropy,
        metrics.LOGIT_STD: held_out.logit_std / held_out.positions,
        metrics.MUTUAL_INFORMATION: _mutual_information(held_out),
        metrics.UNIGRAM_KL: jnp.sum(unigram_V * (jnp.log(unigram_V) - log_q), axis=-1),
        metrics.OVERCONFIDENCE: loss - entropy,
    }
    if held_out.bytes is not None:
        numbers[metrics.BITS_PER_BYTE] = held_out.nats / jnp.log(2.0) / held_out.bytes
    return numbers


def finalize_large(block: Stats) -> dict[str, jax.Array]:
    """Turn the sums of the large block into the flat `held_out/*` numbers, each [R].

    Its references are the unigram and the bigram predictor, in this order; the differences to
    those that it was not given are left out. A standard error is
    that of a ratio of sums over windows (Cochran 1977, section 6.4): with d_b nats over n_b
    positions and D = sum d / sum n, sqrt(B / (B - 1) sum (d_b - D n_b)^2) / sum n. NaN for one
    window.
    """
    n_R1, windows_R1 = block.positions[:, None], block.windows[:, None]
    mean = block.windows_d / n_R1
    squares = (
        block.windows_d_d - 2 * mean * block.windows_d_n + mean**2 * block.windows_n_n[:, None]
    )
    error = jnp.sqrt(windows_R1 / (windows_R1 - 1) * jnp.maximum(squares, 0)) / n_R1
    numbers = {
        metrics.HELD_OUT_POSITIONS: block.positions,
        metrics.HELD_OUT_MUTUAL_INFORMATION: _mutual_information(block),
    }
    keys = (metrics.HELD_OUT_LOSS, metrics.MINUS_UNIGRAM, metrics.MINUS_BIGRAM)
    for key, mean_R, error_R in zip(keys, mean.T, error.T, strict=False):
        numbers |= {key: mean_R, f"{key}_se": error_R}
    return numbers


def later_changed(inputs: jax.Array, vocab: int) -> tuple[jax.Array, int]:
    """Inputs [..., L] whose second half is made of other tokens, and the length of the first."""
    length = inputs.shape[-1]
    later = jnp.arange(length) >= length // 2
    return jnp.where(later, (inputs + 1) % vocab, inputs), length // 2


def future_leak(before: jax.Array, after: jax.Array) -> jax.Array:
    """Largest change of logits [..., B, L, V] over their mean spread over V, [...]."""
    change = jnp.max(jnp.abs(after - before), axis=(-3, -2, -1))
    return change / jnp.maximum(jnp.mean(jnp.std(before, axis=-1), axis=(-2, -1)), 1e-30)


def _log_mean_q(sums: Stats) -> jax.Array:
    return jnp.log(jnp.maximum(sums.probs / sums.positions[:, None], 1e-30))


def _mutual_information(sums: Stats) -> jax.Array:
    mean_q = sums.probs / sums.positions[:, None]
    return -jnp.sum(mean_q * _log_mean_q(sums), axis=-1) - sums.entropy / sums.positions
