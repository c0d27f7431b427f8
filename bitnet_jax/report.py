"""Turn the files of a workdir into one self-contained HTML page and a headline.

Nothing here reads a model: every number on the page comes from the rows.
"""

import json
import math
import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from bitnet_jax.charts import PALETTE, Series, line_chart, phase_portrait
from bitnet_jax.collapse import LABELS
from bitnet_jax.config import UserError
from bitnet_jax.log import read_rows

COLUMNS = (  # key of the row, heading, format; the template holds what they mean
    ("eval/loss", "loss", ".2f"),
    ("eval/bits_per_byte", "bits / byte", ".2f"),
    ("collapse/unique_tokens", "distinct", ".0f"),
    ("collapse/mode_share", "mode share", ".2f"),
    ("collapse/concentration", "top-1 prob.", ".3f"),
    ("collapse/entropy", "entropy", ".2f"),
    ("collapse/overconfidence", "loss - entropy", "+.2f"),
    ("collapse/logit_std", "logit std", ".2f"),
    ("collapse/mutual_information", "context MI", ".3f"),
    ("collapse/unigram_kl", "KL to unigram", ".2f"),
    ("quant/zero_rate", "zeros", ".2f"),
    ("quant/flip_rate", "flips", ".4f"),
)
REFERENCE_FIELDS = {
    "eval/loss": "loss",
    "collapse/entropy": "entropy",
    "collapse/unique_tokens": "distinct",
}
PHASE = "phase"
HERO = ("collapse/unique_tokens", "eval/loss")  # drawn larger, side by side
CHARTS = (  # key, or its prefix ending in _; title; unit; reference lines; log axis
    ("collapse/unique_tokens", "Distinct predictions", "tokens", "targets bigram unigram", True),
    ("eval/loss", "Held-out loss", "nats per token", "uniform unigram bigram", False),
    ("collapse/entropy", "Entropy", "nats", "uniform unigram", False),
    ("collapse/logit_std", "Logit spread", "standard deviation", "", False),
    (PHASE, "Loss against entropy", "entropy, nats", "", False),
    ("collapse/mutual_information", "Use of context", "nats", "", False),
    ("decay/update_weight_cosine_", "Update against weight", "cosine", "", False),
    ("decay/update_share_", "Decay's part of the update", "share", "", False),
    ("decay/norm_ratio_", "Weight norm", "share of initial", "", False),
    ("quant/flip_rate", "Ternary flips", "share of weights", "", False),
    ("train/lr", "Learning rate", "per step", "", False),
    ("train/grad_norm", "Gradient norm", "before clipping", "", True),
)


# ---------------------------------------------------------------------------------- the headline


def outcome(row: dict) -> str:
    """Say how a run ended by the verdict of its last row."""
    if not math.isfinite(_number(row.get("eval/loss"))):
        return "diverged"
    _, told, _ = LABELS.get(row.get("collapse/verdict"), LABELS["insufficient_data"])
    return told


def sentences(config: dict, finals: list[dict]) -> list[tuple[str, str]]:
    """One sentence for each recipe, from the last evaluation row of each replicate."""
    groups: dict[str, list[dict]] = {}
    for row in finals:
        groups.setdefault(config["replicates"][row["replicate"]]["name"], []).append(row)
    return [(name, _sentence(config, name, rows)) for name, rows in groups.items()]


def headline(config: dict, finals: list[dict]) -> str:
    """Say what happened, recipe by recipe; pure, and derived from the rows alone."""
    if not finals:
        return "No evaluation yet."
    return progress(config, finals) + " ".join(text for _, text in sentences(config, finals))


def progress(config: dict, finals: list[dict]) -> str:
    """'At step 240 of 500: ' while rows are missing, nothing once the last step was evaluated."""
    step, steps = min(row["step"] for row in finals), config["run"]["steps"]
    return f"At step {step} of {steps}: " if step < steps else ""


def _sentence(config, name, rows):
    outcomes = [outcome(row) for row in rows]
    if len(set(outcomes)) == 1:
        told = f"{name} {outcomes[0]}" + (f" (n = {len(rows)} seeds)" if len(rows) > 1 else "")
    else:
        counts = {text: outcomes.count(text) for text in dict.fromkeys(outcomes)}
        told = f"{name} (n = {len(rows)} seeds): " + ", ".join(
            f"{n} {o}" for o, n in counts.items()
        )
    losses = [x for x in (_number(r.get("eval/loss")) for r in rows) if math.isfinite(x)]
    parts = [_loss_part(config, losses)] if losses else ["held-out loss is not finite"]
    unique = [_number(row.get("collapse/unique_tokens")) for row in rows]
    unique = [x for x in unique if math.isfinite(x)]
    if unique:
        parts.append(_unique_part(config, unique, rows[0].get("collapse/unique_targets")))
    return f"{told}: {', '.join(parts)}."


def _loss_part(config, losses):
    mean = sum(losses) / len(losses)
    text = f"{'mean ' * (len(losses) > 1)}held-out loss {_mean_and_range(losses, '.2f')}"
    unigram, bigram = (_reference(config, k, "loss") for k in ("unigram", "bigram"))
    if mean >= unigram:
        return f"{text} is {mean - unigram:.2f} above the unigram reference ({unigram:.2f})"
    if mean < bigram:
        return f"{text} is {bigram - mean:.2f} below the bigram reference ({bigram:.2f})"
    if mean < unigram:
        text += f" is {unigram - mean:.2f} below the unigram reference ({unigram:.2f})"
    if mean >= bigram:
        text += f" and {mean - bigram:.2f} above the bigram reference ({bigram:.2f})"
    return text


def _unique_part(config, unique, targets):
    text = f"{_mean_and_range(unique, '.0f', '.1f')} distinct prediction"
    text += "" if unique == [1] else "s"
    beside = {
        "the text has": _reference(config, "targets", "distinct", targets),
        "a bigram predictor": _reference(config, "bigram", "distinct"),
        "a unigram one": _reference(config, "unigram", "distinct"),
    }
    known = [f"{who} {count:.0f}" for who, count in beside.items() if math.isfinite(count)]
    if not known:
        return text
    return f"{text} where " + " and ".join([", ".join(known[:-1])] * (len(known) > 1) + known[-1:])


def _mean_and_range(values, spec, mean_spec=None):
    if min(values) == max(values):
        return f"{values[0]:{spec}}"
    mean = sum(values) / len(values)
    return f"{mean:{mean_spec or spec}} ({min(values):{spec}} to {max(values):{spec}})"


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _reference(config, name, field, default=None) -> float:
    return _number(((config.get("references") or {}).get(name) or {}).get(field, default))


# -------------------------------------------------------------------------------------- the page


def write_report(workdir: Path) -> Path:
    """Write report.html from the files of a workdir, finished or not."""
    workdir = Path(workdir)
    config, summary = _read_json(workdir / "config.json"), _read_json(workdir / "summary.json")
    if config is None:
        raise UserError(f"{workdir}: holds no config.json, so there is no run to report on")
    rows = read_rows(workdir / "metrics.jsonl")
    path = workdir / "report.html"
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(render(workdir.resolve().name, config, rows, summary or {}), encoding="utf-8")
    os.replace(draft, path)
    return path


def render(title: str, config: dict, rows: list[dict], summary: dict) -> str:
    """Build the page; the same input gives the same bytes."""
    evals = [row for row in rows if row.get("kind") == "eval"]
    last = {row["replicate"]: row for row in evals}
    finals = [last[i] for i in sorted(last)]
    names = list(dict.fromkeys(rep["name"] for rep in config["replicates"]))
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    columns, table = final_table(config, finals)
    charts = _charts(config, rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        colors=colors,
        progress=progress(config, finals) if finals else "",
        sentences=sentences(config, finals),
        facts=_facts(config, summary),
        hero=[chart for chart in charts if chart[0] in HERO],
        charts=[chart for chart in charts if chart[0] not in HERO],
        columns=columns,
        table=table,
        tracked=(config.get("references") or {}).get("tracked_positions"),
        continuations=[r for r in summary.get("replicates") or [] if r.get("continuations")],
        sections={k: config[k] for k in ("model", "data", "optim", "run") if k in config},
        hypers=hyper_table(config["replicates"]),
        corpus=_flat(config.get("corpus") or {}),
        provenance=_flat(config.get("provenance") or {}),
    )


def final_table(config: dict, finals: list[dict]) -> tuple[list[tuple], list[dict]]:
    """Columns that hold any value, and one row for each replicate and reference predictor."""
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in finals)]
    table = []
    for row in finals:
        rep = config["replicates"][row["replicate"]]
        cells = [_cell(row.get(key), spec) for key, _, spec in columns]
        parts = {k: row.get(f"collapse/{k}") for k in ("verdict", "evidence", "next", "warnings")}
        severity, *_ = LABELS.get(parts["verdict"], LABELS["insufficient_data"])
        head = {"name": rep["name"], "seed": rep["seed"], "severity": severity, **parts}
        table.append({**head, "cells": cells, "reference": False})
    references = config.get("references") or {}
    known = {f"{k} predictor": references.get(k) for k in ("uniform", "unigram", "bigram")}
    for name, values in {**known, "the text itself": references.get("targets")}.items():
        values = dict(values or {})
        row = {key: values.get(field) for key, field in REFERENCE_FIELDS.items()}
        if row["eval/loss"] is not None and row["collapse/entropy"] is not None:
            row["collapse/overconfidence"] = row["eval/loss"] - row["collapse/entropy"]
        cells = [_cell(row.get(key), spec) for key, _, spec in columns]
        head = {"name": name, "seed": "", "verdict": ""}
        if values:
            table.append({**head, "cells": cells, "reference": True})
    return columns, table


def hyper_table(replicates: list[dict]) -> dict:
    """Hyper-parameters side by side; replicates that differ in the seed alone share a column."""
    groups: dict[str, list[dict]] = {}
    for rep in replicates:
        groups.setdefault(json.dumps([rep["name"], rep.get("hyper")]), []).append(rep)
    first = [group[0] for group in groups.values()]
    heads = [(g[0]["name"], ", ".join(str(rep["seed"]) for rep in g)) for g in groups.values()]
    names = dict.fromkeys(name for rep in first for name in rep.get("hyper") or {})
    rows = [(name, [(rep.get("hyper") or {}).get(name) for rep in first]) for name in names]
    rows.append(("data_seed", [rep.get("data_seed") for rep in first]))
    return {"heads": heads, "rows": [(n, v, len({str(x) for x in v}) > 1) for n, v in rows]}


def _charts(config, rows):
    """SVG by entry of CHARTS; a chart without a single number is left out."""
    # Of the parameter groups, the matrix that makes the logits: the head, or the tied embedding.
    keys = sorted({key for row in rows for key in row}, key=lambda k: ("head" not in k, k))
    drawn = {}
    for entry, title, ylabel, references, log_y in CHARTS:
        if entry == PHASE:
            drawn[PHASE] = _phase(config, rows)
            continue
        key = entry
        if entry.endswith("_"):
            key = next((name for name in keys if name.startswith(entry)), entry)
            title = f"{title}: {key.removeprefix(entry)}"
        series = _series(config, rows, key)
        if not any(math.isfinite(y) and (y > 0 or not log_y) for s in series for y in s.y):
            continue
        names = references.split()
        lines = [(name, _reference(config, name, REFERENCE_FIELDS[key])) for name in names]
        drawn[entry] = Markup(
            line_chart(
                series,
                title=title,
                ylabel=ylabel,
                boundary=config["run"]["steps"] // 2,
                references=[("text" if k == "targets" else k, y) for k, y in lines if y == y],
                log_y=log_y,
                size=(4.2, 2.8) if entry in HERO else (3.9, 2.7),
            )
        )
    return [(entry, drawn[entry]) for entry, *_ in CHARTS if drawn.get(entry)]


def _phase(config, rows):
    evals = [row for row in rows if row.get("kind") == "eval"]
    x, y = (_series(config, evals, key) for key in ("eval/loss", "collapse/entropy"))
    series = [Series(a.label, a.y, b.y) for a, b in zip(x, y, strict=True) if len(a.y) == len(b.y)]
    if not any(math.isfinite(a + b) for s in series for a, b in zip(s.x, s.y, strict=True)):
        return None
    return Markup(phase_portrait(series, (config.get("references") or {}).get("curve")))


def _series(config, rows, key):
    series = [Series(rep["name"], [], []) for rep in config["replicates"]]
    for row in rows:
        if key in row and isinstance(row[key], int | float | None):
            series[row["replicate"]].x.append(row["step"])
            series[row["replicate"]].y.append(_number(row[key]))
    return series


def _facts(config, summary):
    """Short facts under the title: size, progress, speed, device."""
    device = (config.get("provenance") or {}).get("device")
    facts = [
        f"{config['n_params']:,} parameters" if config.get("n_params") else "",
        f"{summary.get('step', 0):,} of {config['run']['steps']:,} steps" if summary else "",
        f"{summary['wall_seconds'] / 60:.1f} min" if summary.get("wall_seconds") else "",
        f"{summary['tokens_per_second']:,.0f} tokens/s" if summary.get("tokens_per_second") else "",
        str(device or ""),
    ]
    return [fact for fact in facts if fact]


def _cell(value, spec):
    """The text of a table cell and, for its tooltip, the value in full."""
    number = _number(value)
    return (f"{number:{spec}}", repr(value)) if math.isfinite(number) else ("\u2013", "")


def _flat(tree, prefix=""):
    """Nested dicts as rows of dotted name and text."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            rows.append((f"{prefix}{key}", f"{text:,}" if type(text) is int else str(text)))
    return rows


def _read_json(path):
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
