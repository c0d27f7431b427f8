"""Weights of a finished run at its kept steps, and what decay alone would have left of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import inspection, optim, train
from bitnet_jax.config import Config, Hyper
from experiments.lab.finished import Finished
from experiments.lab.measures import THRESHOLD

INIT_STD = {"report": 1.0, "b158": 0.02, "llama": 0.02}  # of the embedding, by layout
BIN, BINS = 0.25, 10  # of |w| / mean|w|, the last one open; a ternary code changes at 0.5


def sums_at(run: Finished, steps: list[int]) -> list[list[dict[str, tuple[str, dict]]]]:
    """By replicate and step: kind and sums of every tensor by path, with a histogram.

    Those of `inspection.all_sums`; codes that flipped are counted from one step to the next.
    """
    by_replicate, before = [[] for _ in run.replicates], None
    for step in steps:
        params = run.states_at(step).params
        for i, rep in enumerate(run.replicates):
            strength = float(train.at_step(rep.hyper, step).weight_quant)
            was = None if before is None else run.replicate(before, i)
            now = run.replicate(params, i)
            sums = inspection.all_sums(now, strength, was)
            for path, w in jax.tree.leaves_with_path(now):
                sums[optim.path_name(path)][1]["histogram"] = histogram(w)
            by_replicate[i].append(sums)
        before = params
    return by_replicate


def histogram(w) -> np.ndarray:
    """Counts [BINS] of |w| / mean|w|."""
    size = np.abs(np.asarray(w, np.float32))
    bins = np.minimum(size / max(size.mean(dtype=np.float64), 1e-30) / BIN, BINS - 1)
    return np.bincount(bins.astype(int).ravel(), minlength=BINS)


def without_gradient(cfg: Config, hyper: Hyper, start: np.ndarray) -> np.ndarray:
    """Embedding entries [T + 1, N] that start at `start` [N] and get decay but never a gradient.

    The run's own optimiser on zero gradients; coupled decay alone gives `shrink.starved_weight`.
    """
    params = {"embed": {"embedding": jnp.asarray(start, jnp.float32)}}
    params |= {} if cfg.model.tied_embedding else {"head": {"kernel": jnp.zeros(())}}
    tx = optim.make_optimizer(cfg.optim, cfg.run, hyper, optim.param_groups(params))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def update(carry, _):
        updates, state = tx.update(zeros, carry[1], carry[0])
        params = jax.tree.map(jnp.add, carry[0], updates)
        return (params, state), params["embed"]["embedding"]

    _, path = jax.lax.scan(update, (params, tx.init(params)), length=cfg.run.steps)
    return np.concatenate([np.asarray(start)[None], np.asarray(path)])


def counts_without_gradient(cfg: Config, hyper: Hyper, steps: list[int]) -> list[int]:
    """How many entries of the embedding are above THRESHOLD after each step without gradient."""
    start = np.linspace(THRESHOLD, 6, 491)
    path = without_gradient(cfg, hyper, start)
    size = cfg.model.vocab_size * cfg.model.d_model
    deviation = INIT_STD[cfg.model.layout] * math.sqrt(2)
    return [
        round(size * math.erfc(np.interp(THRESHOLD, path[s], start) / deviation)) for s in steps
    ]
