"""State, one training step, one evaluation, and the compiled chunk of both. Pure: no I/O.

A chunk runs K steps (`lax.scan`) and the evaluation at their end, over R replicates (`vmap`), as
one dispatch on donated state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bitnet_jax import collapse, loss, metrics, optim, quant, sharding
from bitnet_jax.config import Config, Hyper
from bitnet_jax.data import Batch, Windows
from bitnet_jax.model import Transformer
from bitnet_jax.products import CODES, PLAIN

MOST_LOGITS = 1 << 27  # of an evaluation, on a device: half a GiB


@dataclass(frozen=True)
class Seams:
    """Functions of the step that an experiment may give its own of; their numbers: `Hyper.extra`.

    Equal seams compile one program, so give functions of a module, not lambdas made anew. Which
    `products` a program uses is found when it is built (`products.choose`).
    """

    loss: Callable = loss.training_loss
    optimizer: Callable = optim.make_optimizer
    quantize_weight: Callable = quant.quantize_weight
    products: str = PLAIN

    def transformer(self, cfg: Config) -> Transformer:
        """The model as it trains and evaluates."""
        by_codes = self.products == CODES
        return Transformer(cfg.model, quant.quantize_fully if by_codes else self.quantize_weight)


STANDARD = Seams()


@flax.struct.dataclass
class TrainState:
    """Arrays only; with R replicates every leaf has a leading axis [R]."""

    step: jax.Array  # updates done
    failed: (
        jax.Array
    )  # the update that first met a NaN or inf, else 0; the parameters stay as they were then
    params: Any
    opt_state: Any
    init_norm: dict[str, jax.Array]  # norm of each parameter group at initialisation


@flax.struct.dataclass
class EvalData:
    """What evaluations look at."""

    small: Batch  # [N, B, L], of every evaluation
    large: Batch  # [N, B, L], of the stage boundary and the end
    large_nats_NKBL: jax.Array  # losses there of the unigram and the bigram predictor
    tracked: Batch | None  # [R, B, L], each replicate's first training batch; None: the small block
    unigram_V: jax.Array
    token_bytes_V: jax.Array


def init_state(
    cfg: Config,
    hyper: Hyper,
    seed: jax.Array,
    unigram_V: jax.Array | None = None,
    seams: Seams = STANDARD,
) -> TrainState:
    """Initialise one replicate from its seed; an output bias starts at log `unigram_V`."""
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    params = Transformer(cfg.model).init(jax.random.key(seed), tokens_BL, hyper)["params"]
    if cfg.model.output_bias and unigram_V is not None:
        params = params | {"output_bias": jnp.log(unigram_V)}
    groups = optim.param_groups(params)
    opt_state = seams.optimizer(cfg.optim, cfg.run, hyper, groups).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, opt_state, group_norms(params, groups))


def by_group(tree, groups) -> dict[str, list[jax.Array]]:
    """Collect the leaves of `tree` by parameter group."""
    leaves: dict[str, list] = {}
    for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(groups), strict=True):
        leaves.setdefault(group, []).append(leaf)
    return leaves


def group_norms(params, groups) -> dict[str, jax.Array]:
    """L2 norm of each parameter group."""
    return {g: optax.tree.norm(leaves) for g, leaves in by_group(params, groups).items()}


def at_step(hyper: Hyper, step: jax.Array) -> Hyper:
    """The numbers that hold after `step` updates: quantisation strengths grow during warm-up."""
    ramp = jnp.where(
        hyper.quant_warmup_steps > 0,
        jnp.minimum(step / jnp.maximum(hyper.quant_warmup_steps, 1.0), 1.0),
        1.0,
    )
    return hyper.replace(weight_quant=hyper.weight_quant * ramp, act_quant=hyper.act_quant * ramp)


def train_step(
    cfg: Config,
    seams: Seams,
    state: TrainState,
    hyper: Hyper,
    batch: Batch,
    unigram_V: jax.Array,
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """One update of one replicate on a batch [B, L]: state, updates and numbers.

    The gradient is that of `seams.loss`; the loss in the numbers is the cross-entropy alone.
    Once the loss or a gradient is not finite the parameters no longer change, and `state.failed`
    holds the number of that update. The updates are None where `update_numbers` finds them again
    from the state, so that no step holds them as arrays of their own.
    """
    model = seams.transformer(cfg)
    now = at_step(hyper, state.step)

    def objective(params, batch):
        if seams.loss is loss.training_loss:
            readout = loss.Readout(batch)
            nats = model.apply({"params": params}, batch.inputs, now, readout=readout)
            return nats, nats
        logits_BLV = model.apply({"params": params}, batch.inputs, now)
        return seams.loss(logits_BLV, batch, hyper, unigram_V), loss.cross_entropy(
            logits_BLV, batch
        )

    def gradient(batch):
        (_, nats), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch)
        return nats, grads

    nats, grads = loss.accumulated(gradient, batch, cfg.data.accumulate)
    grad_norms = jax.tree.map(jnp.linalg.norm, grads)
    norm = optax.tree.norm(grad_norms)
    ok = jnp.isfinite(nats) & jnp.isfinite(norm) & (state.failed == 0)
    state, updates = _update(cfg, seams, hyper, state, grads, norm, ok)
    numbers = {
        "train/loss": nats,
        "train/grad_norm": norm,
        "grad_finite": jnp.stack([jnp.isfinite(g) for g in jax.tree.leaves(grad_norms)]),
    }
    return state, updates, numbers


def _update(cfg, seams, hyper, state, grads, norm, ok):
    """The state after the optimiser's update, and the updates or None, as in `train_step`."""
    params, groups = state.params, optim.param_groups(state.params)
    tx = seams.optimizer(cfg.optim, cfg.run, hyper, groups)
    # Zeroing what goes into and comes out of the optimiser fuses with it; selecting between the old
    # and the new state would cost another pass over all of it.
    grads = jax.tree.map(lambda g: jnp.where(ok, g, 0), grads)
    tx_updates, opt_state = tx.update(
        grads, state.opt_state, params, grad_norm=jnp.where(ok, norm, 0)
    )
    updates = tx_updates if tx.updates is None else tx.updates(params, opt_state)
    updates = jax.tree.map(lambda u: jnp.where(ok, u, 0), updates)
    n = state.step + 1
    failed = jnp.where(ok | (state.failed > 0), state.failed, n)
    params = optax.apply_updates(params, updates)
    after = state.replace(step=n, failed=failed, params=params, opt_state=opt_state)
    return after, updates if tx.updates is None else None


def update_numbers(cfg: Config, seams: Seams, hyper: Hyper, state: TrainState, updates) -> dict:
    """Size and direction of the last update of one replicate, and of decay's part of it.

    `state` and `updates` are those that `train_step` returned.
    """
    params, groups = state.params, optim.param_groups(state.params)
    tx = seams.optimizer(cfg.optim, cfg.run, hyper, groups)
    if updates is None:
        updates = tx.updates(params, state.opt_state, after=True)
        updates = jax.tree.map(lambda u: jnp.where(state.failed > 0, 0, u), updates)
    by_decay = tx.decay_part(optax.tree.sub(params, updates), state.opt_state)
    numbers = {
        "train/update_norm": optax.tree.norm(updates),
        "train/param_norm": optax.tree.norm(params),
        "train/lr": optim.learning_rate(hyper, state.step, cfg.run),
        "train/weight_decay": optim.by_stage(
            state.step,
            cfg.run,
            hyper.coupled_1 + hyper.decoupled_1,
            hyper.coupled_2 + hyper.decoupled_2,
        ),
    }
    weights, updates, decays = (by_group(x, groups) for x in (params, updates, by_decay))
    for group, w in weights.items():
        u, d = updates[group], decays[group]
        norm, decay_norm = optax.tree.norm(w), optax.tree.norm(d)
        rest = optax.tree.norm(optax.tree.sub(u, d))
        cosine = optax.tree.vdot(u, w) / jnp.maximum(optax.tree.norm(u) * norm, 1e-30)
        numbers |= {
            f"decay/update_weight_cosine_{group}": cosine,
            f"decay/update_share_{group}": decay_norm / jnp.maximum(decay_norm + rest, 1e-30),
            f"decay/norm_ratio_{group}": norm / state.init_norm[group],
        }
    return numbers


def matrices(params) -> dict[str, jax.Array]:
    """The ternary parameters by path."""
    groups = jax.tree.leaves(optim.param_groups(params))
    named = zip(jax.tree.leaves_with_path(params), groups, strict=True)
    return {optim.path_name(path): w for (path, w), group in named if group == "matrix"}


def codes(params) -> dict[str, jax.Array]:
    """int8 ternary codes of the quantised parameters by path."""
    return {
        name: quant.weight_codes(w, quant.weight_scale(w)).astype(jnp.int8)
        for name, w in matrices(params).items()
    }


def quant_numbers(params, codes_before: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Share of zero codes, share of codes that changed since `codes_before`, mean |w| by module."""
    now = codes(params)
    size = sum(q.size for q in now.values())
    scales: dict[str, list] = {}
    for name, w in matrices(params).items():
        scales.setdefault(name.split("/")[-2], []).append(jnp.mean(jnp.abs(w)))
    return {
        "quant/zero_rate": sum(jnp.sum(q == 0) for q in now.values()) / size,
        "quant/flip_rate": sum(jnp.sum(now[k] != codes_before[k]) for k in now) / size,
        **{f"quant/scale_{k}": jnp.mean(jnp.stack(v)) for k, v in scales.items()},
    }


def forward(cfg: Config, seams: Seams, params, hyper: Hyper, inputs, per_replicate=False):
    """Float32 logits [R, B, L, V] of R replicates on the same [B, L], or on their own [R, B, L]."""
    model = seams.transformer(cfg)

    def forward_1(params, hyper, inputs_BL):
        inputs_BL = sharding.split_batch(inputs_BL) if per_replicate else inputs_BL
        return model.apply({"params": params}, inputs_BL, hyper)

    axes = (0, 0, 0 if per_replicate else None)
    return jax.vmap(forward_1, in_axes=axes, spmd_axis_name="replicate")(params, hyper, inputs)


def pieces(blocks, n_rep: int, vocab: int):
    """Blocks [N, B, L, ...] as more and smaller ones, if a device would hold too many logits.

    A piece has as many windows for each device as MOST_LOGITS allows, at least one.
    """
    _, n_windows, length = jax.tree.leaves(blocks)[0].shape[:3]
    n_dev, fits = sharding.n_data(), max(1, MOST_LOGITS // (n_rep * length * vocab))
    each = -(-n_windows // n_dev)
    if each <= fits or n_windows % n_dev:
        return blocks
    size = n_dev * max(n for n in range(1, fits + 1) if each % n == 0)
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), blocks)


def evaluate(cfg: Config, seams: Seams, params, hyper: Hyper, evals: EvalData) -> dict:
    """The `eval/*`, `collapse/*` and `track/*` numbers of R replicates on the small block, [R].

    `hyper` is that of the step (`at_step`).
    """

    def stats(block, per_replicate=False):
        block = block if per_replicate else sharding.split_batch(block)
        logits_RBLV = forward(cfg, seams, params, hyper, block.inputs, per_replicate)
        return collapse.stats(logits_RBLV, block.targets, block.weights, evals.token_bytes_V)

    def tracked_stats(block_BLR):
        return stats(jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), block_BLR), per_replicate=True)

    shape = len(hyper.lr_peak), cfg.model.vocab_size
    held_out = collapse.merge(jax.lax.map(stats, pieces(evals.small, *shape)))
    if evals.tracked is None:
        return collapse.finalize(held_out, held_out, evals.unigram_V)
    tracked_NBLR = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1)[None], evals.tracked)
    tracked = collapse.merge(jax.lax.map(tracked_stats, pieces(tracked_NBLR, *shape)))
    return {
        **collapse.finalize(held_out, tracked, evals.unigram_V),
        "track/loss": tracked.nats / tracked.positions,
        "track/entropy": tracked.entropy / tracked.positions,
    }


def make_large_eval(cfg: Config, seams: Seams = STANDARD) -> Callable:
    """Return large_eval(state, hyper, evals) -> the `held_out/*` numbers [R] of the large block."""

    def large_eval(state: TrainState, hyper: Hyper, evals: EvalData):
        now = at_step(hyper, state.step)

        def stats(block):
            batch, nats_BLK = sharding.split_batch(block)
            logits_RBLV = forward(cfg, seams, state.params, now, batch.inputs)
            nats_KBL = jnp.moveaxis(nats_BLK, -1, 0)
            return collapse.stats(
                logits_RBLV, batch.targets, batch.weights, reference_nats_KBL=nats_KBL
            )

        def leak():
            inputs_BL = evals.large.inputs[0, :1]
            changed_BL, place = collapse.later_changed(inputs_BL, cfg.model.vocab_size)
            pairs = (forward(cfg, seams, state.params, now, x) for x in (inputs_BL, changed_BL))
            return collapse.future_leak(*(logits_RBLV[..., :place, :] for logits_RBLV in pairs))

        blocks = (evals.large, jnp.moveaxis(evals.large_nats_NKBL, 1, -1))
        blocks = pieces(blocks, len(hyper.lr_peak), cfg.model.vocab_size)
        numbers = collapse.finalize_large(collapse.merge(jax.lax.map(stats, blocks)))
        return numbers | {metrics.FUTURE_LEAK: leak()}

    return large_eval


def make_eval(cfg: Config, seams: Seams = STANDARD) -> Callable:
    """Return eval_step(state, hyper, evals) -> numbers [R]: a chunk's evaluation without steps."""

    def eval_step(state: TrainState, hyper: Hyper, evals: EvalData):
        now = at_step(hyper, state.step)
        numbers = evaluate(cfg, seams, state.params, now, evals)
        return numbers | jax.vmap(lambda p: quant_numbers(p, codes(p)))(state.params)

    return eval_step


def over_replicates(steps: Callable, n_rep: int) -> Callable:
    """vmap steps(state, hyper, shared, batches) -> (state, numbers) over R replicates.

    One replicate runs without the axis: XLA:CPU multiplies and reduces faster then.
    """
    if n_rep > 1:
        return jax.vmap(steps, in_axes=(0, 0, None, 0), spmd_axis_name="replicate")

    def steps_1(state, hyper, shared, batches):
        state, hyper, batches = jax.tree.map(lambda x: x[0], (state, hyper, batches))
        return jax.tree.map(lambda x: x[None], steps(state, hyper, shared, batches))

    return steps_1


def make_train_chunk(cfg: Config, windows: Windows, seams: Seams = STANDARD) -> Callable:
    """Return chunk(state, hyper, evals, tokens_N, batches) -> (state, train, eval numbers).

    `batches` is a Batch [R, K, B, L], or window ids [R, K, B] into `tokens_N`. Numbers are [R],
    those of training of the last step; besides, `losses` is [R, K] and `grad_finite`
    [R, K, parameters].
    """

    def steps(state, hyper, shared, batches_K):
        tokens_N, unigram_V = shared
        codes_before = codes(state.params)

        def body(carry, batch):
            if not isinstance(batch, Batch):
                batch = windows.cut(batch, tokens_N)
            batch = sharding.split_batch(batch)
            state, updates, numbers = train_step(cfg, seams, carry[0], hyper, batch, unigram_V)
            return (state, updates), numbers

        groups = optim.param_groups(state.params)
        found_again = seams.optimizer(cfg.optim, cfg.run, hyper, groups).updates is not None
        none = None if found_again else jax.tree.map(jnp.zeros_like, state.params)
        (state, updates), numbers_K = jax.lax.scan(body, (state, none), batches_K)
        train = {name: x[-1] for name, x in numbers_K.items() if "/" in name}
        train |= update_numbers(cfg, seams, hyper, state, updates)
        train |= {
            "failed": state.failed,
            "losses": numbers_K["train/loss"],
            "grad_finite": numbers_K["grad_finite"],
        }
        return state, (train, quant_numbers(state.params, codes_before))

    def chunk(state, hyper, evals, tokens_N, batches):
        steps_R = over_replicates(steps, state.step.shape[0])
        shared = tokens_N, evals.unigram_V
        state, (train, quantised) = steps_R(state, hyper, shared, batches)
        now = at_step(hyper, state.step)
        return state, train, evaluate(cfg, seams, state.params, now, evals) | quantised

    return chunk
