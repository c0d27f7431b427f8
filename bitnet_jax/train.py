"""State, one training step, one evaluation, and the compiled chunk of both. Pure: no I/O.

A chunk runs K steps (`lax.scan`) and the evaluation at their end, over R replicates (`vmap`), as
one dispatch on donated state.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bitnet_jax import collapse, data, optim, quant, sharding
from bitnet_jax.config import Config, Hyper
from bitnet_jax.loss import next_token_loss, regularisation
from bitnet_jax.model import Transformer


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
    """What evaluations look at; the same for all replicates."""

    held_out_NBL: jax.Array  # windows of L + 1 tokens
    tracked_BL: jax.Array | None  # the first training batch, or None to track the held-out ones
    unigram_V: jax.Array
    token_bytes_V: jax.Array


def init_state(
    cfg: Config, hyper: Hyper, seed: jax.Array, unigram_V: jax.Array | None = None
) -> TrainState:
    """Initialise one replicate from its seed; an output bias starts at log `unigram_V`."""
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    params = Transformer(cfg.model).init(jax.random.key(seed), tokens_BL, hyper)["params"]
    if cfg.model.output_bias and unigram_V is not None:
        params = params | {"output_bias": jnp.log(unigram_V)}
    groups = optim.param_groups(params)
    opt_state = optim.make_optimizer(cfg.optim, cfg.run, hyper, groups).init(params)
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
    state: TrainState,
    hyper: Hyper,
    windows_BL: jax.Array,
    end_of_text: int,
    regularisers: tuple[str, ...] = (),
    unigram_V: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of one replicate on windows of L + 1 tokens.

    The gradient is that of the cross-entropy plus the named `regularisers`; the loss in the
    scalars is the cross-entropy alone.
    Once the loss or a gradient is not finite the parameters no longer change, and `state.failed`
    holds the number of that update.
    """
    model = Transformer(cfg.model)
    groups = optim.param_groups(state.params)
    tx = optim.make_optimizer(cfg.optim, cfg.run, hyper, groups)
    weights_BL = data.score_weights(windows_BL, end_of_text, cfg.data.score_last)

    now = at_step(hyper, state.step)

    def loss_fn(params):
        logits_BLV = model.apply({"params": params}, windows_BL[:, :-1], now)
        loss = next_token_loss(logits_BLV, windows_BL[:, 1:], weights_BL)
        extra = regularisation(regularisers, logits_BLV, windows_BL, weights_BL, unigram_V, hyper)
        return loss + extra, loss

    (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    grad_norms = jax.tree.map(jnp.linalg.norm, grads)
    n = state.step + 1
    norm = optax.tree.norm(grad_norms)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.failed == 0)
    # Zeroing what goes into and comes out of the optimiser fuses with it; selecting between the old
    # and the new state would cost another pass over all of it.
    grads = jax.tree.map(lambda g: jnp.where(ok, g, 0), grads)
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, grad_norm=jnp.where(ok, norm, 0)
    )
    updates = jax.tree.map(lambda u: jnp.where(ok, u, 0), updates)
    params = optax.apply_updates(state.params, updates)
    failed = jnp.where(ok | (state.failed > 0), state.failed, n)
    scalars = {
        "loss": loss,
        "grad_norm": norm,
        "grad_finite": jnp.stack([jnp.isfinite(g) for g in jax.tree.leaves(grad_norms)]),
    }
    return TrainState(n, failed, params, opt_state, state.init_norm), scalars


def update_scalars(cfg: Config, state: TrainState, hyper: Hyper) -> dict[str, jax.Array]:
    """Size and direction of the update that led to `state`."""
    groups = optim.param_groups(state.params)
    updates, by_decay = optim.last_update(
        cfg.optim, cfg.run, hyper, groups, state.params, state.opt_state, state.step
    )
    parts_w, parts_u = by_group(state.params, groups), by_group(updates, groups)
    parts_d = by_group(by_decay, groups)
    out = {
        "train/update_norm": optax.tree.norm(updates),
        "train/param_norm": optax.tree.norm(state.params),
        "train/lr": optim.learning_rate(hyper, state.step, cfg.run),
        "train/weight_decay": optim.by_stage(
            state.step,
            cfg.run,
            hyper.coupled_1 + hyper.decoupled_1 + hyper.unscaled_1,
            hyper.coupled_2 + hyper.decoupled_2 + hyper.unscaled_2,
        ),
    }
    for group, w in parts_w.items():
        u = parts_u[group]
        norms = optax.tree.norm(u) * optax.tree.norm(w)
        out[f"decay/update_weight_cosine_{group}"] = optax.tree.vdot(u, w) / jnp.maximum(
            norms, 1e-30
        )
        d = parts_d[group]
        by_decay_norm, rest = optax.tree.norm(d), optax.tree.norm(optax.tree.sub(u, d))
        out[f"decay/update_share_{group}"] = by_decay_norm / jnp.maximum(
            by_decay_norm + rest, 1e-30
        )
        out[f"decay/norm_ratio_{group}"] = optax.tree.norm(w) / state.init_norm[group]
    return out


def matrices(params) -> dict[str, jax.Array]:
    """The ternary parameters by path."""
    groups = jax.tree.leaves(optim.param_groups(params))
    named = zip(jax.tree.leaves_with_path(params), groups, strict=True)
    return {optim.path_name(path): w for (path, w), group in named if group == "matrix"}


def codes(params, weight_format: str) -> dict[str, jax.Array]:
    """int8 codes of the quantised parameters by path."""
    largest = quant.LARGEST_CODE[weight_format]
    return {
        name: quant.weight_codes(w, quant.weight_scale(w, largest), largest).astype(jnp.int8)
        for name, w in matrices(params).items()
    }


def quant_scalars(params, codes_before: dict[str, jax.Array], weight_format: str) -> dict:
    """Share of zero codes, share of codes that changed since `codes_before`, mean |w| by module."""
    now = codes(params, weight_format)
    size = sum(q.size for q in now.values())
    scales: dict[str, list] = {}
    for name, w in matrices(params).items():
        scales.setdefault(name.split("/")[-2], []).append(jnp.mean(jnp.abs(w)))
    return {
        "quant/zero_rate": sum(jnp.sum(q == 0) for q in now.values()) / size,
        "quant/flip_rate": sum(jnp.sum(now[k] != codes_before[k]) for k in now) / size,
        **{f"quant/scale_{k}": jnp.mean(jnp.stack(v)) for k, v in scales.items()},
    }


def evaluate(
    cfg: Config, params, hyper: Hyper, evals: EvalData, end_of_text: int
) -> dict[str, jax.Array]:
    """The `eval/*`, `collapse/*` and `track/*` numbers of R replicates, each [R].

    `hyper` is that of the step (`at_step`).
    """
    model = Transformer(cfg.model)

    def forward(params, hyper, tokens_BL):
        return model.apply({"params": params}, tokens_BL, hyper)

    forward_R = jax.vmap(forward, in_axes=(0, 0, None), spmd_axis_name="replicate")

    def batch_stats(windows_BL):
        logits_RBLV = forward_R(params, hyper, windows_BL[:, :-1])
        weights_BL = data.score_weights(windows_BL, end_of_text, True)
        return collapse.stats(logits_RBLV, windows_BL[:, 1:], weights_BL, evals.token_bytes_V)

    if evals.tracked_BL is None:
        held_out = collapse.merge(jax.lax.map(batch_stats, evals.held_out_NBL))
        return collapse.finalize(held_out, held_out, evals.unigram_V)
    blocks_NBL = jnp.concatenate([evals.tracked_BL[None], evals.held_out_NBL])
    batches = jax.lax.map(batch_stats, blocks_NBL)
    tracked = jax.tree.map(lambda x: x[0], batches)
    held_out = collapse.merge(jax.tree.map(lambda x: x[1:], batches))
    return {
        **collapse.finalize(held_out, tracked, evals.unigram_V),
        "track/loss": tracked.nats / tracked.positions,
        "track/entropy": tracked.entropy / tracked.positions,
    }


def make_eval(cfg: Config, end_of_text: int) -> Callable:
    """Return eval_step(state, hyper, evals) -> numbers [R]: a chunk's evaluation without steps."""

    def eval_step(state: TrainState, hyper: Hyper, evals: EvalData):
        now = at_step(hyper, state.step)
        scalars = evaluate(cfg, state.params, now, evals, end_of_text)
        fmt = cfg.model.weight_format
        return scalars | jax.vmap(lambda p: quant_scalars(p, codes(p, fmt), fmt))(state.params)

    return eval_step


def over_replicates(steps: Callable, n_rep: int) -> Callable:
    """vmap steps(state, hyper, shared, batches) over R replicates.

    One replicate runs without the axis: XLA:CPU multiplies and reduces faster then.
    """
    if n_rep > 1:
        return jax.vmap(steps, in_axes=(0, 0, None, 0), spmd_axis_name="replicate")

    def steps_1(state, hyper, shared, batches):
        state, hyper, batches = jax.tree.map(lambda x: x[0], (state, hyper, batches))
        return jax.tree.map(lambda x: x[None], steps(state, hyper, shared, batches))

    return steps_1


def make_train_chunk(cfg: Config, end_of_text: int, regularisers: tuple[str, ...] = ()) -> Callable:
    """Return chunk(state, hyper, evals, tokens_N, batches) -> (state, train, eval numbers).

    `batches` is [R, K, B] window ids into `tokens_N`, or, when `tokens_N` is None, the windows
    themselves [R, K, B, L + 1]. Numbers are [R], those of training of the last step; besides,
    `losses` is [R, K] and `grad_finite` [R, K, parameters].
    """

    fmt = cfg.model.weight_format

    def steps(state, hyper, shared, batches_KB):
        tokens_N, unigram_V = shared
        codes_before = codes(state.params, fmt)

        def body(state, batch):
            on_host = tokens_N is None
            windows_BL = batch if on_host else data.gather(tokens_N, batch, cfg.data.seq_len)
            windows_BL = sharding.split_batch(windows_BL)
            return train_step(cfg, state, hyper, windows_BL, end_of_text, regularisers, unigram_V)

        state, scalars = jax.lax.scan(body, state, batches_KB)
        train = {
            "train/loss": scalars["loss"][-1],
            "train/grad_norm": scalars["grad_norm"][-1],
            **update_scalars(cfg, state, hyper),
            "failed": state.failed,
            "losses": scalars["loss"],
            "grad_finite": scalars["grad_finite"],
        }
        return state, train, quant_scalars(state.params, codes_before, fmt)

    def chunk(state, hyper, evals, tokens_N, batches):
        steps_R = over_replicates(steps, batches.shape[0])
        state, train, quantised = steps_R(state, hyper, (tokens_N, evals.unigram_V), batches)
        now = at_step(hyper, state.step)
        return state, train, evaluate(cfg, state.params, now, evals, end_of_text) | quantised

    return chunk
