"""Rows: one JSON object per finished replicate, and the data frame that every table reads.

A row holds `id, arm, seed, command`, the resolved `config` with its `hyper` (folders left out),
`base` (fields that the arm changed, as they were before), `references`, `final` (the last
evaluation), `curve`, `extra` (what the question measured), and cost, commit and versions.

Rows belong to one study when the configuration before the arms' changes is the same, the text too,
whatever seed, length, recipe and bookkeeping. A row that is made again replaces the old one.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import pandas as pd

from bitnet_jax import log
from bitnet_jax.config import SECTIONS, Hyper, RunConfig
from bitnet_jax.fields import UserError

FOLDER = Path(__file__).parents[1] / "results"
# Not of a study: its length, its arms' recipes, and what the digest of the text stands for.
APART = ("run.steps", "run.recipes", "data.corpus", "data.feature")
TEXT_DIGITS = 8  # of a text's sha256


def read(name: str) -> list[dict]:
    """Rows of an experiment; raises UserError when there are none."""
    rows = log.read_rows(FOLDER / f"{name}.jsonl")
    if not rows:
        raise UserError(f"experiments/results/{name}.jsonl has no rows; run experiments.{name}")
    return rows


def append(name: str, rows: list[dict]) -> None:
    """Add rows to the committed ones; each replaces that of its study, arm, seed and length."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    kept = {place(row): row for row in [*log.read_rows(path), *rows]}
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(
        "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept.values())
    )
    os.replace(draft, path)


def place(row: dict) -> tuple:
    """What only one row can have: study, arm, seed and length."""
    key = json.dumps(study(row), sort_keys=True)
    return key, row["arm"], row["seed"], row["config"]["run"]["steps"]


def study(row: dict) -> dict:
    """The study of a row: fields that its arms share before they change them, and the text.

    A field that is younger than the row has today's default.
    """
    text = row["references"]["text_sha256"][:TEXT_DIGITS]
    return identity(row["config"], row["base"], text)


def identity(config: dict, base: dict, text: str) -> dict:
    """Fields of a configuration by `section.field`, and the digest of the text.

    `config` has sections of plain values, `base` values by `section.field` that stand above them;
    numbers that `--set hyper.*` gave to every arm stand in `base`, too.
    """
    fields = {}
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            path = f"{section}.{field.name}"
            if path in APART or field.metadata["bookkeeping"]:
                continue
            value = base.get(path, config[section].get(field.name, field.default))
            fields[path] = list(value) if isinstance(value, tuple) else value
    numbers = {path: value for path, value in base.items() if path.startswith("hyper.")}
    return without_folders(fields | numbers | {"text": text})


def without_folders(tree):
    """A tree of plain values in which `text:FOLDER/NAME` and the like have lost their folders."""
    if isinstance(tree, dict):
        return {key: without_folders(value) for key, value in tree.items()}
    if isinstance(tree, str):
        return re.sub(r"^((?:text|gpt2|hf|fork):).*/", r"\1", tree)
    return tree


def by_study(rows: list[dict]) -> list[tuple[dict, list[dict]]]:
    """Pairs of study and rows, in the order of their first rows."""
    studies: dict[str, tuple[dict, list[dict]]] = {}
    for row in rows:
        key = study(row)
        studies.setdefault(json.dumps(key, sort_keys=True), (key, []))[1].append(row)
    return list(studies.values())


def frame(rows: list[dict]) -> pd.DataFrame:
    """One line per row: arm, seed, steps, finals by key, and every number of `extra` by its path.

    `extra` {"count": {"all": 3}} gives column `count/all`; lists stay as they are. `curve`,
    `config` and `references` hold dicts, `unigram`, `bigram` and `uniform` losses in nats.
    """
    records = []
    for row in rows:
        predictors = {k: row["references"][k]["loss"] for k in ("unigram", "bigram", "uniform")}
        run, whole = row["config"]["run"], ("config", "references", "curve", "id", "commit")
        record = {"arm": row["arm"], "seed": row["seed"], "steps": run["steps"]}
        record |= {"eval_every": run["eval_every"]} | predictors
        records.append(record | row["final"] | flat(row["extra"]) | {k: row.get(k) for k in whole})
    return pd.DataFrame(records)


def schedule(config: dict) -> tuple[RunConfig, Hyper]:
    """What the schedules of a row's configuration are made of."""
    fields = config["run"] | {"recipes": tuple(config["run"]["recipes"])}
    return RunConfig(**fields), Hyper(**config["hyper"])


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dicts as one, with `/` between the names."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}/")
        else:
            out[f"{prefix}{key}"] = value
    return out


def commands(rows: list[dict]) -> list[str]:
    """The distinct commands that gave the rows, in their order."""
    return list(dict.fromkeys(row["command"] for row in rows))


def cost(rows: list[dict]) -> str:
    """Hardware and time that the rows took; a run that was suspended has none."""
    devices = sorted({f"{row['device']}, {row['cores']} cores" for row in rows})
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    rest = f", without a time: {len(rows) - len(known)}" if len(known) < len(rows) else ""
    return f"{'; '.join(devices)}: {sum(known) / 60:.0f} min{rest}"
