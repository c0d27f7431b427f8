"""The optimiser: two-stage schedules, decay rules, the optax chain.

Update n = 1..T; stage 1 is n <= T // 2. Everything numeric comes from `Hyper`, so a changed
learning rate, decay or coupling compiles nothing.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bitnet_jax.config import Hyper, OptimConfig, RunConfig

# Every parameter matches exactly one rule. Only `matrix` parameters are ternary, and only they are
# decayed in full; the output bias is never decayed; the other groups get `hyper.decay_rest` of it.
DECAY_RULES = (
    (r"embed/embedding", "embedding"),
    (r"head/kernel", "head"),
    (r"block_\d+/(attn|ffn)/\w+/kernel", "matrix"),
    (r"(\w+/)*\w*norm/scale", "norm"),
    (r"output_bias", "bias"),
)
DECAYED_IN_PART = ("embedding", "head", "norm")
GROUPS = tuple(group for _, group in DECAY_RULES)


def path_name(path) -> str:
    """`block_0/attn/q/kernel` of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_groups(params) -> dict:
    """Map every parameter to its group; raises ValueError unless exactly one rule matches."""

    def group(path, _):
        matches = [g for pattern, g in DECAY_RULES if re.fullmatch(pattern, path_name(path))]
        if len(matches) != 1:
            raise ValueError(f"parameter {path_name(path)} matches decay rules {matches}; needs 1")
        return matches[0]

    return jax.tree.map_with_path(group, params)


def output_group(groups) -> str:
    """The group of the output matrix: the head, or the embedding when they are tied."""
    return "head" if "head" in jax.tree.leaves(groups) else "embedding"


def decay_table(params) -> list[str]:
    """One line per parameter: path, shape, group and whether it is decayed."""
    shapes = jax.tree.leaves_with_path(params)
    groups = jax.tree.leaves(param_groups(params))
    return [
        f"{path_name(path):32} {'x'.join(map(str, p.shape)):>12}  {group:9} "
        f"{ {'matrix': 'decayed', 'bias': 'not decayed'}.get(group, 'decay_rest') }"
        for (path, p), group in zip(shapes, groups, strict=True)
    ]


def learning_rate(hyper: Hyper, n: jax.Array, run: RunConfig) -> jax.Array:
    """Learning rate of update n: warm-up, a line to the boundary, a line to the last step.

    With `run.late_schedule` that of update n - 1, and the peak at update 1.
    """
    half, last = run.boundary, run.steps
    n = jnp.asarray(n, jnp.float32) - run.late_schedule
    warm = hyper.lr_peak * n / jnp.maximum(hyper.warmup_steps, 1.0)
    left = (half - n) / jnp.maximum(half - hyper.warmup_steps, 1.0)
    stage1 = hyper.lr_stage1_end + left * (hyper.lr_peak - hyper.lr_stage1_end)
    left = (last - n) / (last - half)
    stage2 = hyper.lr_final + left * (hyper.lr_stage2_start - hyper.lr_final)
    rate = jnp.where(n <= hyper.warmup_steps, warm, jnp.where(n <= half, stage1, stage2))
    return jnp.where(n == 0, hyper.lr_peak, rate) if run.late_schedule else rate


def by_stage(n: jax.Array, run: RunConfig, stage1: jax.Array, stage2: jax.Array) -> jax.Array:
    """The decay of update n; with `run.late_schedule` that of update n - 1, and 0 at update 1."""
    n = n - run.late_schedule
    decay = jnp.where(n <= run.boundary, stage1, stage2)
    return jnp.where(n == 0, 0.0, decay) if run.late_schedule else decay


def _decay(rate: Callable, rest: jax.Array, groups) -> optax.GradientTransformation:
    """Add rate * w to the updates of matrices and rest * rate * w to all others."""
    matrix = jax.tree.map(lambda g: g == "matrix", groups)
    other = jax.tree.map(lambda g: g in DECAYED_IN_PART, groups)
    return optax.chain(
        optax.add_decayed_weights(rate, mask=matrix),
        optax.add_decayed_weights(lambda count: rest * rate(count), mask=other),
    )


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm with the norm as an argument: the step has computed it already."""

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = max_norm / jnp.maximum(norm, max_norm)
        return jax.tree.map(lambda g: factor * g, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class Optimizer(NamedTuple):
    """An optax transformation that can say which part of its updates is weight decay.

    `decay_part(params, opt_state)`, of the parameters before and the state after an update, is that
    part as a tree like `params`. `updates(params, opt_state, after=False)`, of the same or of the
    parameters after it, is all of it: what `update` returned, to rounding. Without it a step holds
    the updates as an array of their own.
    """

    init: Callable
    update: Callable
    decay_part: Callable
    updates: Callable | None = None


def make_optimizer(cfg: OptimConfig, run: RunConfig, hyper: Hyper, groups) -> Optimizer:
    """clip -> coupled decay -> Adam -> decoupled decay -> learning rate.

    `update` takes the gradients' global norm as `grad_norm`, and computes it if it is not given.

    Before Adam's normaliser the decay is torch's `Adam(weight_decay=)`: a weight whose gradient is
    smaller than decay * w moves towards 0 by about the learning rate per step. After it, the decay
    is AdamW's (arXiv 1711.05101): w shrinks by lr * decay * w.
    """

    def coupled(count):
        return by_stage(count + 1, run, hyper.coupled_1, hyper.coupled_2)

    def decoupled(count):
        return by_stage(count + 1, run, hyper.decoupled_1, hyper.decoupled_2)

    def lr(count):
        return learning_rate(hyper, count + 1, run)

    chain = optax.named_chain(
        ("clip", _clip(cfg.clip_norm)),
        ("coupled", _decay(coupled, hyper.decay_rest, groups)),
        ("adam", optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)),
        ("decoupled", _decay(decoupled, hyper.decay_rest, groups)),
        ("lr", optax.scale_by_learning_rate(lr)),
    )
    shares = {"matrix": 1.0, "bias": 0.0} | dict.fromkeys(DECAYED_IN_PART, hyper.decay_rest)
    return Optimizer(*chain, *_read_back(cfg, groups, shares, coupled, decoupled, lr))


def _read_back(cfg: OptimConfig, groups, shares: dict, coupled, decoupled, lr):
    """`decay_part` and `updates` of an Optimizer, from its moments; schedules are of the count."""

    def decay_part(params, opt_state):
        """-lr (decoupled + coupled / (sqrt(v) + eps)) * w, v Adam's second moment.

        Adam's first moment is linear, so coupled decay's part of it is the running mean of
        decay * w; that is taken as decay * w, which is exact for a weight that does not change.
        """
        adam = opt_state["adam"]
        count = opt_state["lr"].count - 1  # of the schedules at this update
        nu = optax.tree.bias_correction(adam.nu, cfg.beta2, adam.count)

        def part(group, w, v):
            rate = decoupled(count) + coupled(count) / (jnp.sqrt(v) + cfg.eps)
            return -lr(count) * shares[group] * rate * w

        return jax.tree.map(part, groups, params, nu)

    def updates(params, opt_state, after=False):
        """-lr (m / (sqrt(v) + eps) + decoupled * w), m and v Adam's moments without their bias.

        Of the weights after the update, w + u, the same over 1 - lr * decoupled.
        """
        adam = opt_state["adam"]
        count = opt_state["lr"].count - 1
        mu = optax.tree.bias_correction(adam.mu, cfg.beta1, adam.count)
        nu = optax.tree.bias_correction(adam.nu, cfg.beta2, adam.count)

        def of_weight(group, w, m, v):
            decay = shares[group] * decoupled(count)
            update = -lr(count) * (m / (jnp.sqrt(v) + cfg.eps) + decay * w)
            return update / (1 - lr(count) * decay) if after else update

        return jax.tree.map(of_weight, groups, params, mu, nu)

    return decay_part, updates
