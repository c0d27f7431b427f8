"""Result rows: one small JSON object per finished replicate, appended once, read by every table."""

import json
import re
import shlex
from pathlib import Path

import numpy as np

from bitnet_jax import log
from bitnet_jax.config import UserError

FOLDER = Path(__file__).parent / "results"
CURVE_POINTS = 50
FINAL_KEYS = (
    "eval/loss",
    "eval/bits_per_byte",
    "collapse/unique_tokens",
    "collapse/concentration",
    "collapse/mode_share",
    "collapse/entropy",
    "collapse/logit_std",
    "collapse/mutual_information",
    "collapse/unigram_kl",
    "collapse/overconfidence",
    "collapse/verdict",
    "quant/zero_rate",
    "quant/flip_rate",
)
CURVE_KEYS = (
    "eval/loss",
    "collapse/unique_tokens",
    "collapse/entropy",
    "collapse/logit_std",
    "collapse/mutual_information",
)


def load(name: str) -> list[dict]:
    """Committed rows of an experiment; raises UserError when there are none."""
    rows = log.read_rows(FOLDER / f"{name}.jsonl")
    if not rows:
        raise UserError(f"experiments/results/{name}.jsonl has no rows; run experiments.{name}")
    return rows


def append(name: str, rows: list[dict]) -> None:
    """Append the rows whose `id` is not there yet."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    known = {row["id"] for row in log.read_rows(path)}
    with path.open("a") as file:
        for row in rows:
            if row["id"] not in known:
                file.write(json.dumps(row) + "\n")


def by_study(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows by what must be equal for a comparison: preset, corpus, size and length.

    Rows of a study of lengths share a `base`, its shortest length, instead of their steps.
    """
    studies: dict[str, list[dict]] = {}
    for row in rows:
        batch, vocab = row["batch"], row["vocab_size"]
        label = (
            f"{row['preset']}: {row['corpus']}, {vocab:,} tokens in the vocabulary, "
            f"batches of {batch[0]} x {batch[1]}, "
            + (f"{row['base']} steps and more" if "base" in row else f"{row['steps']} steps")
        )
        studies.setdefault(label, []).append(row)
    return studies


def own(name: str, rows: list[dict]) -> list[dict]:
    """The rows that an experiment trained, without those that it took from another for contrast."""
    return [row for row in rows if row["id"].startswith(f"{name}-")]


def command(argv: list[str]) -> str:
    """The command line of a run without its --workdir and without the folders of files."""
    words = [re.sub(r"[^=:\s]*/", "", word) for word in argv[1:]]
    if "--workdir" in words:
        at = words.index("--workdir")
        del words[at : at + 2]
    return shlex.join(["python", "-m", f"experiments.{Path(argv[0]).stem}", *words])


def commands(rows: list[dict]) -> list[str]:
    """The distinct commands that gave the rows, in their order."""
    return list(dict.fromkeys(row["command"] for row in rows))


def cost(rows: list[dict]) -> str:
    """Hardware and time that a study's rows took."""
    seconds = sum(row.get("seconds", 0) for row in rows)
    devices = sorted({f"{row['device']}, {row['cores']} cores" for row in rows})
    return f"{'; '.join(devices)}: {seconds / 60:.0f} min"


def wall_seconds(summary: dict) -> float:
    """Seconds of a run; of a resumed one those of its last part, scaled to all its steps."""
    last = summary["step"] - summary["resumed_from"]
    return summary["wall_seconds"] * (summary["step"] / last if last else 1.0)


def summarise(workdir: Path, index: int) -> dict:
    """The row of one finished replicate: identity, final values, stage averages, thinned curves.

    Averages run over the evaluations after step 0; the one at the boundary belongs to stage 1.
    Raises UserError when the log lacks evaluations.
    """
    config = json.loads((workdir / "config.json").read_text())
    rows = log.read_rows(workdir / "metrics.jsonl")
    mine = [row for row in rows if row["replicate"] == index]
    evals = [row for row in mine if row["kind"] == "eval"]
    losses = [row["train/loss"] for row in mine if row["kind"] == "train"]
    steps, run = config["run"]["steps"], config["run"]
    expected = {0, steps, *range(run["eval_every"], steps, run["eval_every"])}
    missing = expected - {row["step"] for row in evals}
    if missing:
        raise UserError(f"{workdir}: no evaluation at step {min(missing)}; the log has holes")
    unique = {row["step"]: row["collapse/unique_tokens"] for row in evals if row["step"]}
    stage1 = [u for step, u in unique.items() if step <= steps // 2]
    stage2 = [u for step, u in unique.items() if step > steps // 2]
    replicate, final = config["replicates"][index], evals[-1]
    summary = json.loads((workdir / "summary.json").read_text())
    decoded = summary["replicates"][index].get("decode", {})
    keep = np.unique(np.linspace(0, len(evals) - 1, CURVE_POINTS).astype(int))
    versions = config["provenance"]["versions"]
    return {
        "id": f"{workdir.name}/{index}",
        "arm": replicate["name"],
        "seed": replicate["seed"],
        "hyper": replicate["hyper"],
        "steps": steps,
        "model": config["model"],
        "vocab_size": config["model"]["vocab_size"],
        "batch": [config["data"]["batch_size"], config["data"]["seq_len"]],
        "corpus": config["corpus"]["source"].rpartition("/")[2],
        "corpus_sha256": config["corpus"]["sha256"],
        "references": {k: v for k, v in config["references"].items() if k != "curve"},
        "unique_stage1": float(np.mean(stage1)),
        "unique_stage2": float(np.mean(stage2)),
        "unique_min_after_100": min((u for s, u in unique.items() if s > 100), default=None),
        "severe": sum(u < 3 for u in unique.values()),
        "evaluations": len(unique),
        "train_loss": {
            "min": min(losses),
            "max": max(losses),
            "mean": float(np.mean(losses)),
            "final": losses[-1],
        },
        "final": {k: v for k, v in final.items() if k in FINAL_KEYS} | decoded,
        "curve": {"step": [evals[i]["step"] for i in keep]}
        | {k: [evals[i][k] for i in keep] for k in CURVE_KEYS},
        "command": command(config["provenance"]["argv"]),
        "seconds": round(wall_seconds(summary) / len(config["replicates"]), 1),
        "git_commit": config["provenance"]["git_commit"],
        "device": config["provenance"]["device"],
        "cores": config["provenance"]["cores"],
        "versions": {k: versions[k] for k in ("python", "jax", "flax", "optax")},
    }
