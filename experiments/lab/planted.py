"""Faults that were planted after triage was finished, each behind a number of `Hyper.extra`.

With all numbers 0 (`SOUND`) every function is the standard one, so that replicates of one program
have different faults and none. Two faults of the order of windows belong to seeds of their own.
"""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import audit, causes, config, data, loss, model, optim, program, quant
from bitnet_jax.subject import Subject
from bitnet_jax.train import STANDARD, Seams
from experiments.lab.arms import Arm

IN_LOSS = ("targets_rolled", "label_noise", "over_logits")
IN_OPTIMISER = ("norm_stuck", "embedding_l2", "micro_steps", "matrices_reversed", "block_still",
                "stale", "embedding_slow", "state_lost")  # fmt: skip
IN_LAYER = ("batch_scale", "dropout", "largest", "activation_gradient_lost")
SOUND = dict.fromkeys((*IN_LOSS, *IN_OPTIMISER, *IN_LAYER), 0.0)

MICRO_STEPS = 8  # micro-batches of an update
TWICE, FEW, FEW_WINDOWS = 31, 32, 300  # seeds; more windows than triage looks at
WINDOW_IDS = data.window_ids


def mixed(bits: jax.Array) -> jax.Array:
    """Numbers in [0, 1) that follow no visible rule from uint32 `bits`: MurmurHash3's finaliser."""
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return ((bits ^ bits >> 16) >> 8) / jnp.float32(1 << 24)


def training_loss(logits_BLV, batch, hyper, unigram_V):
    """`targets_rolled`: those of the window before in the batch; `label_noise`: this share is any
    token instead; `over_logits`: divided by the number of positions and of tokens once more."""
    extra, vocab = hyper.extra, logits_BLV.shape[-1]
    targets_BL = jnp.where(
        extra["targets_rolled"] > 0, jnp.roll(batch.targets, 1, axis=0), batch.targets
    )
    place_BL = jnp.cumsum(batch.inputs * 7919 + batch.targets, axis=-1).astype(jnp.uint32)
    any_BL = (vocab * mixed(place_BL + jnp.uint32(1))).astype(targets_BL.dtype)
    targets_BL = jnp.where(mixed(place_BL) < extra["label_noise"], any_BL, targets_BL)
    sound = loss.training_loss(logits_BLV, batch.replace(targets=targets_BL), hyper, unigram_V)
    return sound * jnp.where(extra["over_logits"] > 0, 1 / logits_BLV.size, 1.0)


def optimizer(cfg, run, hyper, groups) -> optim.Optimizer:
    """The standard one with the faults of `IN_OPTIMISER`, in the order of `faulty_updates`."""
    sound, extra = optim.make_optimizer(cfg, run, hyper, groups), hyper.extra

    def gradient(group, g, w):
        g = g * jnp.where(group == "matrix", 1 - 2 * extra["matrices_reversed"], 1.0)
        return g + extra["embedding_l2"] * w * (group == "embedding")

    def update(grads, state, params, **more):
        grads = jax.tree.map(gradient, groups, grads, params)
        updates, after = sound.update(grads, state, params, **more)
        n = after["lr"].count
        updates = faulty_updates(run, hyper, groups, updates, params, n)
        kept = jax.tree.map(lambda a, b: jnp.where(extra["state_lost"] > 0, a, b), state, after)
        return updates, kept

    return optim.Optimizer(sound.init, update, sound.decay_part)


def faulty_updates(run, hyper, groups, updates, params, n):
    """Update n: the schedule counts micro-batches; the embedding's rate is a hundredth; block 1
    stays; at 7/8 of the steps matrices become others; scales of norms are set to 0.1."""
    extra = hyper.extra
    counted = jnp.minimum(n * (1 + (MICRO_STEPS - 1) * extra["micro_steps"]), run.steps)
    rates = [optim.learning_rate(hyper, k, run) for k in (counted, n)]
    speed = jnp.where(extra["micro_steps"] > 0, rates[0] / jnp.maximum(rates[1], 1e-30), 1.0)

    def faulty(path, group, u, w):
        u = u * speed
        if group == "embedding":
            u = u * (1 - 0.99 * extra["embedding_slow"])
        if optim.path_name(path).startswith("block_1/"):
            u = u * (1 - extra["block_still"])
        if group == "matrix":
            is_stale = (extra["stale"] > 0) & (n == 7 * run.steps // 8)
            u = jnp.where(is_stale, w[::-1] - w, u)
        return jnp.where(extra["norm_stuck"] > 0, 0.1 - w, u) if group == "norm" else u

    return jax.tree.map_with_path(faulty, groups, updates, params)


def bit_linear(x, w_DF, hyper, quantize_weight=quant.quantize_weight):
    """`model.bit_linear` with `dropout`, this share of its inputs dropped, in evaluations, too;
    `largest`: weights in units of the largest, not of the mean; `batch_scale`: one activation
    scale for all tokens; `activation_gradient_lost`: none passes the activation quantiser."""
    extra = hyper.extra
    x_ND = x.reshape(-1, x.shape[-1])
    dropped = mixed(jax.lax.bitcast_convert_type(x_ND, jnp.uint32)) < extra["dropout"]
    x_ND = jnp.where(dropped, 0, x_ND / (1 - extra["dropout"]))
    scale = 127 / jnp.maximum(jnp.max(jnp.abs(x_ND)), quant.EPS)
    whole_ND = x_ND + jax.lax.stop_gradient(quant.int8_codes(x_ND, scale) / scale - x_ND)
    sound_ND = quant.quantize_activation(x_ND, hyper.act_quant)
    q_ND = jnp.where(extra["batch_scale"] > 0, whole_ND, sound_ND)
    q_ND = jnp.where(extra["activation_gradient_lost"] > 0, jax.lax.stop_gradient(q_ND), q_ND)
    largest = jnp.max(jnp.abs(w_DF))
    coarse = w_DF + jax.lax.stop_gradient(largest * jnp.round(w_DF / largest) - w_DF)
    sound = quantize_weight(w_DF, hyper.weight_quant, x.dtype)
    w_q = jnp.where(extra["largest"] > 0, coarse, sound)
    return model.product(q_ND, w_q, 0).astype(x.dtype).reshape(*x.shape[:-1], -1)


def window_ids(cfg, n_windows: int, seed: int, start: int, end: int) -> np.ndarray:
    """`data.window_ids`; of seed TWICE every batch twice, of seed FEW the first windows alone."""
    if seed == TWICE:
        return WINDOW_IDS(cfg, n_windows, seed, 0, (end + 1) // 2)[np.arange(start, end) // 2]
    return WINDOW_IDS(cfg, FEW_WINDOWS if seed == FEW else n_windows, seed, start, end)


PLANTED = Seams(loss=training_loss, optimizer=optimizer)


@contextlib.contextmanager
def in_place():
    """Have `bit_linear` and `window_ids` stand for those of the package."""
    with (
        mock.patch.object(model, "bit_linear", bit_linear),
        mock.patch.object(data, "window_ids", window_ids),
    ):
        yield


def planted_arm(name: str, changes=(), **numbers) -> Arm:
    return Arm(name, recipe="published", extra=SOUND | dict(changes), seams=PLANTED, **numbers)


# What is planted, the causes that are right (none: no detector), and the seed.
ANY: tuple[str, ...] = ()
FAULTS = {
    arm.name: (arm, right, seed)
    for arm, right, seed in (
        (planted_arm("scales of norms stuck at 0.1", {"norm_stuck": 1.0}),
         ("weights not updated",), 11),
        (planted_arm("targets of another window", {"targets_rolled": 1.0}), ("another loss",), 11),
        (planted_arm("every batch twice"), ("repeated batches",), TWICE),
        (planted_arm("one activation scale for a batch", {"batch_scale": 1.0}),
         ("later tokens are seen",), 11),
        (planted_arm("loss over the number of logits", {"over_logits": 1.0}),
         ("updates below Adam's eps", "another loss"), 11),
        (planted_arm("L2 of the embedding through Adam", {"embedding_l2": 0.1}),
         ("decay through Adam",), 11),
        (planted_arm("gradient lost in activations", {"activation_gradient_lost": 1.0}),
         ("no straight-through gradient", "weights not updated",
          "no gradient for the ternary weights"), 11),
        (planted_arm("schedule counts micro-batches", {"micro_steps": 1.0}), ANY, 11),
        (planted_arm("decay 100 times too large", decoupled_1=10.0, decoupled_2=10.0,
                     decay_rest=1.0), ANY, 11),
        (planted_arm("gradients of matrices reversed", {"matrices_reversed": 1.0}), ANY, 11),
        (planted_arm("second block not updated", {"block_still": 1.0}), ANY, 11),
        (planted_arm("other matrices loaded at 7/8", {"stale": 1.0}), ANY, 11),
        (planted_arm("dropout left on", {"dropout": 0.3}), ANY, 11),
        (planted_arm("weights in units of the largest", {"largest": 1.0}), ANY, 11),
        (planted_arm("300 windows over and over"), ANY, FEW),
        (planted_arm("30 % of the labels random", {"label_noise": 0.3}), ANY, 11),
        (planted_arm("embedding at a 100th of the rate", {"embedding_slow": 1.0}), ANY, 11),
        (planted_arm("optimiser state thrown away", {"state_lost": 1.0}), ANY, 11),
    )
}  # fmt: skip


def triage(run) -> dict[str, list]:
    """`causes` that triage names in the last checkpoint, best first, and the numbers it `measured`;
    None for the runs that it does not look at."""
    seams = PLANTED if run.replicates[0].hyper.extra else STANDARD
    built, starts = program.build(run.cfg, run.replicates[:1], seams), run.states_at(0)
    named, measured, seen = [], [], set()
    for i, replicate in enumerate(run.replicates):
        numbers, findings = None, None
        if replicate.name not in seen:
            seen.add(replicate.name)
            hyper = config.stack_hypers([replicate])
            own = dataclasses.replace(built, replicates=[replicate], hyper=hyper)
            state, start = (
                jax.tree.map(jnp.asarray, run.replicate(x, i)) for x in (run.states, starts)
            )
            numbers, _ = audit.measure(Subject(own, state.params, int(state.step), state, start))
            findings = [dataclasses.asdict(finding) for finding in causes.rank(numbers)]
            numbers = {key: float(f"{x:.5g}") for key, x in numbers.items()}
        named.append(findings)
        measured.append(numbers)
    return {"causes": named, "measured": measured}
