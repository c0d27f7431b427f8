"""Tests of one model that need its optimiser or its start: decay, updates, batches, displacement.

As in `audit`, which lists them: each gives flat numbers that its docstring names, `_G` stands for a
parameter group, losses are in nats.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitnet_jax import optim, train
from bitnet_jax.config import Config, Hyper
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy
from bitnet_jax.program import Program
from bitnet_jax.subject import (
    Subject,
    arrays,
    codes_by_path,
    fixed,
    norm,
    rms,
    served,
    train_steps,
)

AUDIT_STEPS, AUDIT_SAMPLE = 100, 4096  # updates without gradients; weights of each parameter
REPLAYED = 20  # updates on the first batches at the peak rate
SERVED_STEPS = 32  # batches in which windows are compared
OVERFIT_LOSS, OVERFIT_STEPS = 2.0, 25  # nats; steps between looks
SPREAD = 3.0  # spread of the logits at which losses of different targets are nats apart
OFFSETS = (0, 1, 2, 3)  # k of the target x[t + k]
LABEL_BATCHES = 4  # in which an offset has to explain the loss
RUN = 16  # equal tokens in a row that are padding


def schedule(s: Subject) -> dict:
    """`step`, `steps`, `lr_peak`; `sum_lr`, `planned_lr`: learning rates summed so far, in all."""
    run, hyper = s.program.cfg.run, s.program.replicates[0].hyper
    rates = np.asarray(optim.learning_rate(hyper, np.arange(1, run.steps + 1), run), np.float64)
    numbers = {"step": s.step, "steps": run.steps, "lr_peak": float(hyper.lr_peak)}
    return numbers | {"sum_lr": float(rates[: s.step].sum()), "planned_lr": float(rates.sum())}


def decay(s: Subject) -> dict:
    """What AUDIT_STEPS updates with zero gradients around the stage boundary do to weights:
    `decay_factor_G`, norm after over before; `decay_expected_G`, prod(1 - lr decay) with all decay
    of the recipe; `decay_spread_G`, standard deviation of w_after / w_before, 0 where the decay
    multiplies weights; `decay_unscaled_G`, relative change of the norm at learning rate 0."""
    hyper = arrays(s.program.replicates[0].hyper)
    return decay_numbers(s.program, hyper, s.params)


def decay_numbers(program: Program, hyper: Hyper, params) -> dict:
    """The numbers of `decay`, on a sample of the weights, since updates are elementwise."""
    run, groups = program.cfg.run, optim.param_groups(params)
    sample = jax.tree.map(lambda w: jnp.ravel(w)[:AUDIT_SAMPLE], params)
    rates = ("lr_peak", "lr_stage1_end", "lr_stage2_start", "lr_final")
    still = hyper.replace(**dict.fromkeys(rates, jnp.zeros(())))
    first = max(0, min(run.boundary - AUDIT_STEPS // 2, run.steps - AUDIT_STEPS))
    last = min(first + AUDIT_STEPS, run.steps)
    fixed_ = (program.cfg, program.seams.optimizer, first, last)
    shrunk, unscaled = (_starved(*fixed_, h, sample) for h in (hyper, still))
    n = np.arange(first + 1, last + 1)
    lr = np.asarray(optim.learning_rate(hyper, n, run), np.float64)
    rate = np.asarray(
        optim.by_stage(
            n, run, hyper.coupled_1 + hyper.decoupled_1, hyper.coupled_2 + hyper.decoupled_2
        )
    )
    numbers = {}
    parts = [train.by_group(tree, groups) for tree in (sample, shrunk, unscaled)]
    for group in parts[0]:
        w, v, u = (np.concatenate(part[group]).astype(np.float64) for part in parts)
        share = {"matrix": 1.0, "bias": 0.0}.get(group, float(hyper.decay_rest))
        size = max(np.linalg.norm(w), 1e-30)
        numbers |= {
            f"decay_factor_{group}": float(np.linalg.norm(v) / size),
            f"decay_expected_{group}": float(np.prod(1 - lr * rate * share)),
            f"decay_spread_{group}": float(np.std(v[w != 0] / w[w != 0])) if w.any() else 0.0,
            f"decay_unscaled_{group}": abs(1 - float(np.linalg.norm(u) / size)) * bool(w.any()),
        }
    return numbers


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _starved(cfg: Config, optimizer: Callable, first: int, last: int, hyper: Hyper, params):
    """Parameters after the updates first + 1 .. last with zero gradients."""
    tx = optimizer(cfg.optim, cfg.run, hyper, optim.param_groups(params))
    counts = jax.tree.map(lambda x: x + first * (x.dtype == jnp.int32), tx.init(params))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def update(_, carry):
        updates, state = tx.update(zeros, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(first, last, update, (params, counts))[0]


class Shadow(NamedTuple):
    """State of `shadowed`: the optimiser's own, and what the last updates were."""

    own: Any
    free: Any  # of the same optimiser, which sees no parameters and so no decay
    gradients: Any
    squares: Any  # sum of the squares of clipped gradients
    updates: Any
    free_updates: Any


@functools.cache
def shadowed(make: Callable) -> Callable:
    """The optimiser of a seam beside its twin that gets zeros for parameters: without decay."""

    def optimizer(cfg, run, hyper, groups):
        tx = make(cfg, run, hyper, groups)

        def init(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return Shadow(tx.init(params), tx.init(params), zeros, zeros, zeros, zeros)

        def update(gradients, state, params, *, grad_norm):
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, own = tx.update(gradients, state.own, params, grad_norm=grad_norm)
            free_updates, free = tx.update(gradients, state.free, zeros, grad_norm=grad_norm)
            factor = cfg.clip_norm / jnp.maximum(grad_norm, cfg.clip_norm)
            squares = jax.tree.map(
                lambda q, g: q + jnp.square(factor * g), state.squares, gradients
            )
            return updates, Shadow(own, free, gradients, squares, updates, free_updates)

        return optim.Optimizer(init, update, lambda params, state: state.updates)

    return optimizer


def updates(s: Subject) -> dict:
    """From REPLAYED steps on the run's first batches at its peak rate with new moments, the last:
    `gradient_G` RMS of the gradient, `zeros_G` share of exact zeros, `update_G` RMS of the update
    over that of the weights, `decay_share_G` norm of the part of the update that comes from decay
    over that norm plus the rest's, `below_eps_G` share of the weights with a gradient whose root
    mean square is below Adam's eps; `clip_factor`, what clipping leaves of the gradient."""
    cfg, groups = s.program.cfg, optim.param_groups(s.params)
    seams = replace(s.program.seams, optimizer=shadowed(s.program.seams.optimizer))
    tx = seams.optimizer(cfg.optim, cfg.run, s.peak, groups)
    zero = jnp.zeros((), jnp.int32)
    state = s.state.replace(step=zero, failed=zero, opt_state=tx.init(s.params))
    batches, unigram_V = served(s.program, REPLAYED), s.program.evals.unigram_V
    after, numbers = train_steps(cfg, seams, state, s.peak, batches, unigram_V)
    last = jax.device_get(after.opt_state)
    by_decay = jax.tree.map(np.subtract, last.updates, last.free_updates)
    trees = (after.params, last.gradients, last.squares, last.updates, by_decay, last.free_updates)
    parts = [train.by_group(tree, groups) for tree in trees]
    clip = min(1.0, cfg.optim.clip_norm / max(float(numbers["train/grad_norm"]), 1e-30))
    statistics = {"clip_factor": clip}
    for group in parts[0]:
        w, g, squares, u, d, rest = (part[group] for part in parts)
        root = np.concatenate([np.sqrt(x / REPLAYED).ravel() for x in squares])
        small = ((root > 0) & (root < cfg.optim.eps)).sum() / max((root > 0).sum(), 1)
        statistics |= {
            f"gradient_{group}": rms(g),
            f"zeros_{group}": float(np.mean(np.concatenate([x.ravel() for x in g]) == 0)),
            f"update_{group}": rms(u) / max(rms(w), 1e-30),
            f"decay_share_{group}": norm(d) / max(norm(d) + norm(rest), 1e-30),
            f"below_eps_{group}": float(small),
        }
    return statistics


def batches(s: Subject) -> dict:
    """Of the first batches as they are served: `repeated`, share of windows that came before in the
    same epoch; `padding_scored`, share of the scored targets that are an end of text after another
    one, or a token in a run of RUN equal ones."""
    cfg, end = s.program.cfg.data, s.program.tokens.tokenizer.end_of_text
    epoch = len(s.program.windows) // cfg.batch_size
    batch = served(s.program, max(1, min(SERVED_STEPS, epoch)))
    inputs, targets, weights = (
        np.asarray(x).reshape(-1, x.shape[-1]) for x in (batch.inputs, batch.targets, batch.weights)
    )
    windows = np.concatenate([inputs, targets[:, -1:]], axis=1)
    same = inputs == targets
    run = np.zeros(same.shape, int)
    for t in range(same.shape[1]):
        run[:, t] = same[:, t] * (1 + (run[:, t - 1] if t else 0))
    padding = (same & (targets == end)) | (run >= RUN - 1)
    return {
        "repeated": 1 - len(np.unique(windows, axis=0)) / len(windows),
        "padding_scored": float((weights * padding).sum() / max(weights.sum(), 1)),
    }


def labels(s: Subject) -> dict:
    """Which targets give the loss that training minimises on the first LABEL_BATCHES batches, with
    logits scaled to a spread of SPREAD where they are smaller, so that offsets differ by nats where
    predictions differ: `offset` k of the x[t + k] whose cross-entropy is nearest, `offset_error`
    its distance, `loss_error` that of k = 1, the sound one, each the largest of the batches."""
    batches = jax.tree.map(np.asarray, served(s.program, LABEL_BATCHES))
    errors_NK = [
        _label_errors(s, jax.tree.map(lambda x, n=n: x[n], batches)) for n in range(LABEL_BATCHES)
    ]
    errors = np.max(errors_NK, axis=0)
    best = int(np.argmin(errors))
    return {
        "offset": OFFSETS[best],
        "offset_error": float(errors[best]),
        "loss_error": float(errors[1]),
    }


def _label_errors(s: Subject, batch: Batch) -> list[float]:
    """Distance of the training loss of a batch from the cross-entropy of each of OFFSETS."""
    z_BLV = s.logits(batch.inputs, s.peak)
    z_BLV = z_BLV * max(1.0, SPREAD / max(float(jnp.mean(jnp.std(z_BLV, axis=-1))), 1e-30))
    hyper, unigram_V = arrays(s.program.replicates[0].hyper), s.program.evals.unigram_V
    trained = float(s.program.seams.loss(z_BLV, batch, hyper, unigram_V))
    tokens_BL = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
    errors = []
    for k in OFFSETS:
        n = min(batch.inputs.shape[1], tokens_BL.shape[1] - k)  # positions that have a target
        targets_BL, weights_BL = np.zeros_like(batch.targets), np.zeros_like(batch.weights)
        targets_BL[:, :n] = tokens_BL[:, k : k + n]
        weights_BL[:, :n] = batch.weights[:, max(k - 1, 0) :][:, :n]
        nats = cross_entropy(z_BLV, Batch(batch.inputs, targets_BL, weights_BL))
        errors.append(abs(float(nats) - trained))
    return errors


def logit_gain(s: Subject) -> float:
    """Spread of the logits at the start over that of a hidden state of RMS 1 times the output
    matrix: about 1, where the last norm's scale is 1 and the matrix knows no hidden state."""
    params = s.start.params
    z_BLV = s.logits(s.held_out.inputs, train.at_step(s.peak, 0), params)
    spread = float(jnp.mean(jnp.std(z_BLV, axis=-1)))
    matrix = params["head"] if "head" in params else params["embed"]
    return spread / (rms(matrix) * s.program.cfg.model.d_model**0.5)


def displacement(s: Subject) -> dict:
    """`moved_G` distance from the start and `norm_G` norm, both over the norm at the start;
    `codes_changed` share of codes; `start_latent` mean |w| of ternary matrices and `start_gain` the
    number of `logit_gain`, at the start."""
    matrices = train.matrices(s.start.params).values()
    numbers = moved(s.params, s.start.params)
    numbers["start_latent"] = float(np.mean([np.abs(np.asarray(w)).mean() for w in matrices]))
    return numbers | {"start_gain": logit_gain(s)}


def moved(params, start) -> dict:
    """`moved_G`, `norm_G` and `codes_changed` of `displacement`."""
    groups = optim.param_groups(params)
    distance = train.by_group(jax.tree.map(lambda a, b: np.asarray(a) - b, params, start), groups)
    now, then = train.by_group(params, groups), train.by_group(start, groups)
    numbers = {}
    for group in now:
        unit = max(rms(then[group]), 1e-30)
        numbers[f"moved_{group}"] = rms(distance[group]) / unit
        numbers[f"norm_{group}"] = rms(now[group]) / unit
    now, then = codes_by_path(params), codes_by_path(start)
    changed = sum(int((now[k] != then[k]).sum()) for k in now)
    return numbers | {"codes_changed": changed / sum(q.size for q in now.values())}


def overfit(s: Subject, windows: int = 2) -> dict:
    """`overfit_loss` on a few windows after `overfit_steps` steps from the start on them alone at
    the peak learning rate; it stops below `overfit_limit`."""
    first = jax.tree.map(lambda x: x[0, :windows], served(s.program, 1))
    repeated = jax.tree.map(lambda x: jnp.repeat(x[None], OVERFIT_STEPS, axis=0), first)
    state, loss, done = s.start, np.inf, 0
    while done < s.overfit_steps and loss > OVERFIT_LOSS:
        args = (state, s.peak, repeated, s.program.evals.unigram_V)
        state, numbers = train_steps(*fixed(s.program), *args)
        loss, done = float(numbers["train/loss"]), done + OVERFIT_STEPS
    return {"overfit_loss": loss, "overfit_steps": done, "overfit_limit": OVERFIT_LOSS}
