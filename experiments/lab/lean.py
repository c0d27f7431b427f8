"""Rows of many small runs without workdirs: what a sweep of hundreds of replicates can afford.

A group of replicates is one program, as everywhere; nothing is written but its rows, and nothing is
kept of a run but its curve of the logit spread, its last evaluation and sums over its weights.
"""

import sys
import time

import jax
import numpy as np

from bitnet_jax import config_file, forecast, log, metrics, program, run, shrink, train
from experiments.lab import finished, rows
from experiments.lab.arms import Group

CURVE_KEYS = (metrics.LOSS, metrics.LOGIT_STD, metrics.GRAD_NORM)
CURVE_POINTS = 21
FINAL = (metrics.LOSS, metrics.ENTROPY, metrics.LOGIT_STD, metrics.DISTINCT)


def train_rows(group: Group, preset: str) -> list[dict]:
    """Train a group and return a row per replicate."""
    began = time.monotonic()
    built = program.build(group.cfg, group.replicates, group.seams)
    with jax.set_mesh(built.mesh), jax.default_matmul_precision("float32"):
        state = built.init()
        first_RV = output_norms(state)
        evals = [jax.device_get(built.evaluate(state))]
        steps, cfg = [0], group.cfg.run
        while steps[-1] < cfg.steps:
            end = run.next_end(cfg, steps[-1])
            state, trained, evaluated = built.train_chunk(state, built.batches(steps[-1], end))
            evals.append(jax.device_get(trained) | jax.device_get(evaluated))
            steps.append(end)
        large = jax.device_get(built.evaluate_large(state))
    alive_RV = output_norms(state) > shrink.ALIVE * first_RV.mean(axis=1, keepdims=True)
    seconds = (time.monotonic() - began) / len(group.replicates)
    about = _about(built, group, preset, seconds)
    unigram_V = np.asarray(built.evals.unigram_V)
    return [
        about(i)
        | {
            "final": {k: _short(evals[-1][k][i]) for k in FINAL}
            | {k: _short(x[i]) for k, x in large.items()},
            "curve": curve(steps, evals, i),
            "extra": spread(steps, evals, i, cfg.boundary)
            | {
                "alive": int(alive_RV[i].sum()),
                "alive_mass": _short(unigram_V[alive_RV[i]].sum()),
            },
        }
        for i in range(len(group.replicates))
    ]


def output_norms(state: train.TrainState) -> np.ndarray:
    """Norms of the rows of the output matrix, one per token: [R, V]."""
    if "head" in state.params:
        return np.asarray(np.linalg.norm(np.asarray(state.params["head"]["kernel"]), axis=1))
    return np.asarray(np.linalg.norm(np.asarray(state.params["embed"]["embedding"]), axis=2))


def curve(steps: list[int], evals: list[dict], i: int) -> dict:
    """CURVE_POINTS of the curves of one replicate."""
    keep = np.unique(np.linspace(0, len(steps) - 1, CURVE_POINTS).astype(int))
    return {"step": [steps[j] for j in keep]} | {
        key: [_short(evals[j][key][i], 4) if key in evals[j] else None for j in keep]
        for key in CURVE_KEYS
    }


def spread(steps: list[int], evals: list[dict], i: int, boundary: int) -> dict:
    """Least share of the first logit spread in stage 1, and the step at which it is halved."""
    std = np.array([row[metrics.LOGIT_STD][i] for row in evals], float)
    ratio = std / std[0]
    step = forecast.halved(np.array(steps), ratio)
    stage_1 = ratio[np.array(steps) <= boundary]
    return {
        "least_spread": _short(stage_1.min()),
        "half_step": None if step is None else _short(step),
    }


def _about(built: program.Program, group: Group, preset: str, seconds: float):
    """i -> what a row says of its replicate besides its numbers."""
    settings = config_file.to_json(built.cfg, built.replicates)
    provenance = log.provenance()
    text = built.tokens.identity["sha256"]
    references = {k: v for k, v in built.references.items() if k != "curve"}

    def about(i: int) -> dict:
        rep = built.replicates[i]
        sections = {k: dict(settings[k]) for k in ("model", "data", "optim", "run")}
        hyper = settings["replicates"][i]["hyper"]
        return {
            "id": f"{rep.name}/{rep.seed}",
            "arm": rep.name,
            "seed": rep.seed,
            "command": finished.command(sys.argv),
            "config": rows.without_folders(sections) | {"hyper": hyper},
            # Arms with tokenizers of their own belong to one study: none of them sets the size.
            "base": rows.without_folders(group.bases[i] | {"model.vocab_size": None}),
            "references": references | {"text_sha256": text},
            "preset": preset,
            "seconds": round(seconds, 1),
            "device": provenance["device"],
            "cores": provenance["cores"],
            "commit": provenance["git_commit"],
            "versions": {k: provenance["versions"][k] for k in ("python", "jax", "flax", "optax")},
        }

    return about


def _short(x, digits: int = 5) -> float:
    return float(f"{float(x):.{digits}g}")
