"""What more than one question measures of a finished run: one value per replicate."""

import jax
import numpy as np

from bitnet_jax import shrink
from bitnet_jax.metrics import LOSS
from experiments.lab.finished import Finished

THRESHOLD = 1.1  # of the magnitude of a weight: the troubleshooting report counted those above it


def large_weights(run: Finished) -> list[dict]:
    """Weights above THRESHOLD at the end: of all parameters, of the embedding, and as predicted.

    `predicted` is what coupled decay alone leaves of N(0, 1) entries of the embedding, else None.
    """
    large = jax.tree.map(
        lambda w: (np.abs(w) > THRESHOLD).reshape(len(w), -1).sum(1), run.states.params
    )
    embedding = run.states.params["embed"]["embedding"]
    cfg, everything = run.cfg, np.sum(jax.tree.leaves(large), axis=0)
    return [
        {
            "all": int(everything[i]),
            "embedding": int(large["embed"]["embedding"][i]),
            "predicted": shrink.count_above(
                THRESHOLD, embedding[i].size, cfg.optim, cfg.run, rep.hyper
            )
            if rep.hyper.coupled_1
            else None,
        }
        for i, rep in enumerate(run.replicates)
    ]


def first_below_unigram(run: Finished) -> list[int | None]:
    """First step with a held-out loss below that of word frequencies."""
    below = run.column(LOSS) < run.references["unigram"]["loss"]
    return [int(run.steps[np.argmax(row)]) if row.any() else None for row in below]
