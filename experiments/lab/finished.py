"""A finished run, read once: what `measure` of a question looks at."""

import functools
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import (
    checkpoint,
    config,
    config_file,
    data,
    log,
    recorder,
    reference,
    restore,
    train,
    verdict,
)
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS, MUTUAL_INFORMATION, TRAIN_LOSS
from experiments.lab.rows import without_folders

CURVE_POINTS = 50
CURVE_KEYS = (LOSS, DISTINCT, ENTROPY, LOGIT_STD, MUTUAL_INFORMATION)


class RunFailed(Exception):
    """A replicate met a number that is not finite, so a question lacks a row: one line."""

    exit_status = 1


class Finished:
    """A run of R replicates; lists have an entry for each, arrays a leading axis [R].

    `evals` and `trains` are the rows of metrics.jsonl by replicate, `references` the predictors of
    the same text, `summary` the content of summary.json.
    """

    def __init__(self, workdir: Path):
        self.workdir = Path(workdir)
        self.config = json.loads((self.workdir / "config.json").read_text())
        self.cfg, self.replicates = config_file.from_json(self.config)
        self.references = self.config["references"]
        self.summary = json.loads((self.workdir / "summary.json").read_text())
        logged = log.read_rows(self.workdir / "metrics.jsonl")
        self.evals, self.trains = (
            [[r for r in logged if (r["replicate"], r["kind"]) == (i, kind)]
             for i in range(len(self.replicates))]
            for kind in ("eval", "train")
        )  # fmt: skip

    @functools.cached_property
    def states(self):
        """The last checkpoint, NumPy [R, ...]."""
        return self.states_at(self.cfg.run.steps)

    def states_at(self, step: int):
        """A kept checkpoint, or the initialisation at step 0, NumPy [R, ...]; raises UserError.

        Only an output bias, which starts at log frequencies, needs the text for its initialisation.
        """
        if step == 0 and self.cfg.run.init is None:
            return jax.device_get(initial(self))
        return restore.load_replicates(self.workdir, step)[2]

    @property
    def kept_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        return checkpoint.kept_steps(self.workdir)

    @functools.cached_property
    def tokens(self) -> data.TokenData:
        """The text that it was trained and evaluated on."""
        return data.load(self.cfg.data)

    def column(self, key: str, kind: str = "eval") -> np.ndarray:
        """A logged number [R, evaluations]."""
        logged = self.evals if kind == "eval" else self.trains
        return np.array([[row[key] for row in rows] for rows in logged])

    @property
    def steps(self) -> np.ndarray:
        """Steps of the evaluations, 0 first."""
        return np.array([row["step"] for row in self.evals[0]])

    def replicate(self, tree, index: int):
        """One replicate's part of a tree [R, ...]."""
        return jax.tree.map(lambda x: x[index], tree)

    def rows(self, bases: list[dict], preset: str) -> list[dict]:
        """The rows of its replicates, without what a question measures.

        Raises RunFailed for a replicate that failed, UserError when the log lacks evaluations.
        """
        for rep, outcome in zip(self.replicates, self.summary["replicates"], strict=True):
            if outcome["failed"]:
                what = recorder.failure_text(outcome["failed"])
                raise RunFailed(f"{self.workdir}: {rep.name}, seed {rep.seed}: {what}")
        return [self._row(i, base, preset) for i, base in enumerate(bases)]

    def _row(self, i: int, base: dict, preset: str) -> dict:
        evals, run = self.evals[i], self.cfg.run
        expected = {0, run.steps, run.boundary, *range(run.eval_every, run.steps, run.eval_every)}
        missing = expected - {row["step"] for row in evals}
        if missing:
            raise UserError(f"{self.workdir}: no evaluation at step {min(missing)}; log has holes")
        keep = np.unique(np.linspace(0, len(evals) - 1, CURVE_POINTS).astype(int))
        provenance, rep = self.config["provenance"], self.replicates[i]
        sections = {k: dict(self.config[k]) for k in ("model", "data", "optim", "run")}
        hyper = self.config["replicates"][i]["hyper"]
        decoded = self.summary["replicates"][i].get("decode", {})
        return {
            "id": f"{self.workdir.name}/{i}",
            "arm": rep.name,
            "seed": rep.seed,
            "command": command(provenance["argv"]),
            "config": {k: without_folders(v) for k, v in sections.items()} | {"hyper": hyper},
            "base": without_folders(base),
            "references": {k: v for k, v in self.references.items() if k != "curve"}
            | {"text_sha256": self.config["corpus"]["sha256"]},
            "final": {k: v for k, v in evals[-1].items() if _is_recorded(k, v)} | decoded,
            "curve": {"step": [evals[j]["step"] for j in keep]}
            | {k: [evals[j][k] for j in keep] for k in CURVE_KEYS},
            "extra": self._stages(i),
            "preset": preset,
            "seconds": round(wall_seconds(self.summary) / len(self.replicates), 1),
            "device": provenance["device"],
            "cores": provenance["cores"],
            "commit": provenance["git_commit"],
            "versions": {k: provenance["versions"][k] for k in ("python", "jax", "flax", "optax")},
        }

    def _stages(self, i: int) -> dict:
        """Counts and averages over the evaluations after step 0; the boundary is of stage 1."""
        end = self.cfg.run.boundary
        distinct = {row["step"]: row[DISTINCT] for row in self.evals[i] if row["step"]}
        losses = [row[TRAIN_LOSS] for row in self.trains[i]]
        return {
            "unique_stage1": float(np.mean([u for s, u in distinct.items() if s <= end])),
            "unique_stage2": float(np.mean([u for s, u in distinct.items() if s > end])),
            "severe": sum(u < verdict.SEVERE for u in distinct.values()),
            "evaluations": len(distinct),
            "train_loss": {
                "min": min(losses),
                "max": max(losses),
                "mean": float(np.mean(losses)),
                "final": losses[-1],
            },
        }


def initial(run: Finished):
    """The states [R, ...] that a run started from, made anew from its seeds."""
    cfg, unigram_V = run.cfg, None
    if cfg.model.output_bias:
        predictors = reference.fit(run.tokens.train_N, cfg.model.vocab_size)
        unigram_V = np.float32(predictors.unigram_V)
    seeds = np.array([rep.seed for rep in run.replicates], np.uint32)
    init = jax.vmap(functools.partial(train.init_state, cfg), in_axes=(0, 0, None))
    return jax.jit(init)(config.stack_hypers(run.replicates), seeds, unigram_V)


def _is_recorded(key: str, value) -> bool:
    """Whether an entry of the last evaluation goes into the row: its numbers and its verdict."""
    return ("/" in key and isinstance(value, int | float)) or key == "collapse/verdict"


def command(argv: list[str]) -> str:
    """The command line of a run without its --workdir and without the folders of files."""
    words = [re.sub(r"[^=:\s]*/", "", word) for word in argv[1:]]
    if "--workdir" in words:
        at = words.index("--workdir")
        del words[at : at + 2]
    return shlex.join(["python", "-m", f"experiments.{Path(argv[0]).stem}", *words])


def wall_seconds(summary: dict) -> float:
    """Seconds of a run; of a resumed one those of its last part, scaled to all its steps."""
    last = summary["step"] - summary["resumed_from"]
    return summary["wall_seconds"] * (summary["step"] / last if last else 1.0)
