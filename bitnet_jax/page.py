"""Turn the files of a workdir into one self-contained HTML page.

Nothing here reads a model: every number comes from config.json, metrics.jsonl and summary.json.
"""

import json
import math
import os
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from bitnet_jax import metrics
from bitnet_jax.charts import MAX_POINTS, PALETTE, Series, line_chart, phase_portrait
from bitnet_jax.fields import UserError
from bitnet_jax.log import Rows, read_sealed, read_thinned
from bitnet_jax.metrics import METRICS, metric
from bitnet_jax.verdict import ALARM, LABELS

HERO = (metrics.LOSS, metrics.DISTINCT)  # drawn larger, side by side
PHASE = "phase"
CHARTS = (  # a family shows the matrix that makes the logits: the head, or the tied embedding
    *HERO,
    metrics.LOGIT_STD,
    PHASE,
    metrics.MUTUAL_INFORMATION,
    metrics.UPDATE_COSINE,
    metrics.UPDATE_SHARE,
    metrics.NORM_RATIO,
    metrics.FLIP_RATE,
    metrics.LEARNING_RATE,
    metrics.GRAD_NORM,
)
PHASE_MEANING = (
    "From start (open) to end (filled); on the straight line a model is calibrated. "
    "Dashed: the unigram predictor with its logits scaled by s."
)
STANDARD_ERRORS = {  # number -> its standard error, shown beside it
    metrics.HELD_OUT_LOSS: metrics.HELD_OUT_LOSS_SE,
    metrics.MINUS_UNIGRAM: metrics.MINUS_UNIGRAM_SE,
    metrics.MINUS_BIGRAM: metrics.MINUS_BIGRAM_SE,
}
PREDICTORS = ("unigram", "bigram", "uniform", "targets")  # keys of config.json's references
PREDICTOR_NAMES = {"targets": "text"}
SHOWN_LINE_BREAKS = 2
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


# -------------------------------------------------------------------------------------- the files


def write_page(workdir: Path) -> Path:
    """Write report.html from the files of a workdir, finished or not.

    Raises UserError where there is no run, or where a file is damaged.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: holds no config.json, so there is no run to show")
    config, ending = read_sealed(workdir / "config.json"), workdir / "summary.json"
    summary = read_sealed(ending) if ending.exists() else {}
    rows = read_thinned(workdir / "metrics.jsonl", MAX_POINTS)
    path = workdir / "report.html"
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(render(workdir, config, rows, summary), encoding="utf-8")
    os.replace(draft, path)
    return path


# --------------------------------------------------------------------------------------- the page


def render(workdir: Path, config: dict, rows: Rows, summary: dict) -> str:
    """Build the page; the same input gives the same bytes."""
    names = list(dict.fromkeys(rep["name"] for rep in config["replicates"]))
    charts = draw_charts(config, rows)
    groups = outcomes(workdir, config, rows, summary)
    return TEMPLATES.get_template("run.html.jinja").render(
        title=workdir.resolve().name,
        colors={name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)},
        headline=", ".join(f"{group['name']} {group['outcome']}" for group in groups),
        facts=_facts(config, rows, summary),
        resume=None if summary.get("finished") else f"train --workdir {workdir} --resume",
        outcomes=groups,
        hero=[chart for chart in charts if chart[0] in HERO],
        charts=[chart for chart in charts if chart[0] not in HERO],
        table=results_table(config, rows, summary),
        prompts=continuations(summary.get("replicates") or []),
        hypers=hyper_table(config["replicates"]),
        sections={k: _flat(config[k]) for k in ("model", "data", "optim", "run") if k in config},
        origin={k: _flat(config[k]) for k in ("corpus", "provenance") if config.get(k)},
    )


def _facts(config, rows, summary):
    """Short facts beside the name: progress, size, speed, device."""
    step = max([summary.get("step", 0), *(row["step"] for row in rows.last.values())])
    device = (config.get("provenance") or {}).get("device")
    facts = [
        f"step {step:,} of {config['run']['steps']:,}",
        f"{config['n_params']:,} parameters" if config.get("n_params") else "",
        f"{summary['wall_seconds'] / 60:.1f} min" if summary.get("wall_seconds") else "",
        f"{summary['tokens_per_second']:,.0f} tokens/s" if summary.get("tokens_per_second") else "",
        str(device or ""),
    ]
    return [fact for fact in facts if fact]


# ----------------------------------------------------------------------------------- the verdicts


def outcomes(workdir: Path, config: dict, rows: Rows, summary: dict) -> list[dict]:
    """Replicates of one recipe and one verdict together, in the order of the configuration.

    Each group has the verdict, what it means, what to do next and with which command; each of its
    replicates its seed, evidence and warnings.
    """
    at_end = dict(enumerate(summary.get("replicates") or []))
    groups: dict[tuple, dict] = {}
    for i, rep in enumerate(config["replicates"]):
        if i not in rows.last and i not in at_end:
            continue
        judged = _judged(rows.last.get(i, {}), at_end.get(i, {}))
        name = judged["verdict"]
        severity, outcome, advice, _ = LABELS.get(name, LABELS["insufficient_data"])
        group = {
            "name": rep["name"],
            "verdict": name,
            "outcome": outcome,
            "state": state(name, severity),
            "next": judged["next"] or advice,
            "command": _command(workdir, config, summary, name, i),
            "replicates": [],
        }
        group = groups.setdefault((rep["name"], name), group)
        group["replicates"].append({"seed": rep["seed"], **judged})
    return list(groups.values())


def _judged(row, at_end) -> dict:
    """The verdict of the end, or of the last evaluation; of a replicate that failed, why."""
    keys = ("verdict", "evidence", "next", "warnings")
    judged = {key: at_end.get(key) or row.get(f"collapse/{key}") for key in keys}
    failed = at_end.get("failed")
    if failed:
        why = f"step {failed['step']}: {failed['what']}"
        return {"verdict": "nonfinite", "evidence": why, "next": None, "warnings": []}
    if row and not math.isfinite(_number(row.get(metrics.LOSS))):
        judged |= {"verdict": "nonfinite", "next": None}
    return judged


def state(name, severity) -> str:
    """One of good, open, caution, alarm: how the page colours a verdict."""
    return "good" if name == "healthy" else ("open", "caution", "alarm")[severity]


def _command(workdir, config, summary, name, replicate) -> str | None:
    """What to run next on a replicate whose last state was saved; None: nothing to run."""
    severity, *_ = LABELS.get(name, LABELS["insufficient_data"])
    if not summary or (severity != ALARM and name != "healthy"):
        return None
    source = f"{workdir}"
    if len(config["replicates"]) > 1:
        source += f"@{summary['step']}:{replicate}"
    return f"triage {source}" if severity == ALARM else f'generate {source} --prompt "..."'


# ------------------------------------------------------------------------------------- the charts


def draw_charts(config: dict, rows: Rows) -> list[tuple[str, Markup, str]]:
    """(key, SVG, caption) by entry of CHARTS; a chart without a single number is left out."""
    present = sorted({key for row in rows.drawn for key in row}, key=lambda k: ("head" not in k, k))
    drawn = []
    for key in CHARTS:
        if key.endswith("_"):
            key = next((name for name in present if name.startswith(key)), key)
        svg = _phase(config, rows) if key == PHASE else _lines_over_steps(config, rows, key)
        if svg:
            drawn.append((key, Markup(svg), PHASE_MEANING if key == PHASE else metric(key).meaning))
    return drawn


def _lines_over_steps(config, rows, key):
    shown, series = metric(key), _series(config, rows, key)
    if not any(math.isfinite(y) and (y > 0 or not shown.log) for s in series for y in s.y):
        return None
    title = shown.chart_title
    if key == metrics.LOSS:
        title = "Loss"
        training = _series(config, rows, metrics.TRAIN_LOSS, variant="training")
        series += [s for s in training if s.y]
    heights: dict[float, str] = {}  # a predictor that equals one before it is not drawn
    for name in PREDICTORS if shown.reference else ():
        height = _number(_reference(config, name, shown.reference))
        heights.setdefault(height, _predictor(name))
    return line_chart(
        series,
        title=title,
        ylabel=shown.unit,
        boundary=config["run"]["steps"] // 2,
        references=[(name, y) for y, name in heights.items() if math.isfinite(y)],
        log_y=shown.log,
        size=(4.2, 2.8) if key in HERO else (3.9, 2.7),
    )


def _phase(config, rows):
    x, y = (_series(config, rows, key) for key in (metrics.LOSS, metrics.ENTROPY))
    series = [Series(a.label, a.y, b.y) for a, b in zip(x, y, strict=True) if len(a.y) == len(b.y)]
    if not any(math.isfinite(a + b) for s in series for a, b in zip(s.x, s.y, strict=True)):
        return None
    return phase_portrait(series, (config.get("references") or {}).get("curve"))


def _series(config, rows, key, variant=""):
    series = [Series(rep["name"], [], [], variant) for rep in config["replicates"]]
    for row in rows.drawn:
        if key in row:
            series[row["replicate"]].x.append(row["step"])
            series[row["replicate"]].y.append(_number(row[key]))
    return series


# ------------------------------------------------------------------------------------- the tables


def results_table(config: dict, rows: Rows, summary: dict) -> dict:
    """Metrics as rows, replicates and simple predictors as columns: {heads, groups}.

    A head is a replicate's name and seed, or a predictor's name without one. A group has a title
    and rows of (metric, cells); a cell is its text and, for a tooltip, the value in full.
    """
    replicates = [i for i in range(len(config["replicates"])) if i in rows.last]
    judged = summary.get("replicates") or []
    decoded = {i: judged[i].get("decode") or {} for i in replicates if i < len(judged)}
    last = {i: {**rows.trained.get(i, {}), **rows.last[i]} for i in replicates}
    predictors = [name for name in PREDICTORS if (config.get("references") or {}).get(name)]
    text = {"targets": next(iter(decoded.values()), {}).get(metrics.TEXT_REP_4)}

    def block(title, keys, values, references=None):
        shown = []
        for key in keys:
            if any(values.get(i, {}).get(key) is not None for i in replicates):
                own = [_cell(values.get(i, {}), key) for i in replicates]
                beside = references or _references(config, key)
                shown.append(
                    (METRICS[key], own + [_cell({key: beside.get(p)}, key) for p in predictors])
                )
        return [{"title": title, "rows": shown}] if shown else []

    in_chart = {metrics.DISTINCT_TARGETS} if "targets" in predictors else set()
    small = [key for key in METRICS if key.startswith(("eval/", "collapse/", "track/", "quant/"))]
    small = [key for key in small if key not in in_chart]
    large = [
        metrics.HELD_OUT_LOSS,
        metrics.MINUS_UNIGRAM,
        metrics.MINUS_BIGRAM,
        metrics.HELD_OUT_MUTUAL_INFORMATION,
    ]
    heads = [(config["replicates"][i]["name"], config["replicates"][i]["seed"]) for i in replicates]
    return {
        "heads": heads + [(_predictor(name), None) for name in predictors],
        "groups": block(_large_title(rows.large), large, rows.large)
        + block(_small_title(config, rows.last), [*small, metrics.TRAIN_LOSS], last)
        + block("Continuations", (metrics.GREEDY_REP_4, metrics.SAMPLED_REP_4), decoded, text),
    }


def _large_title(large):
    row = next(iter(large.values()), {})
    positions = _number(row.get(metrics.HELD_OUT_POSITIONS))
    where = f", {positions:,.0f} positions" if math.isfinite(positions) else ""
    return f"Large block of held-out text{where}, step {row.get('step', 0):,}"


def _small_title(config, last):
    tracked = (config.get("references") or {}).get("tracked_positions")
    where = f", {tracked:,} tracked positions" if tracked else ""
    return f"Last evaluation{where}, step {min((r['step'] for r in last.values()), default=0):,}"


def _references(config, key) -> dict:
    """What each predictor gives for a metric."""
    if key == metrics.OVERCONFIDENCE:
        return {
            name: _number(_reference(config, name, "loss"))
            - _number(_reference(config, name, "entropy"))
            for name in PREDICTORS
        }
    field = METRICS[key].reference
    return {name: _reference(config, name, field) for name in PREDICTORS} if field else {}


def _reference(config, name, field):
    return ((config.get("references") or {}).get(name) or {}).get(field)


def _predictor(name):
    return PREDICTOR_NAMES.get(name, name)


def _cell(values, key) -> dict:
    """Text of a number, of its standard error where there is one, and both in full."""
    number, error = _number(values.get(key)), _number(values.get(STANDARD_ERRORS.get(key)))
    if not math.isfinite(number):
        return {"text": "", "error": "", "full": ""}
    text = f"{number:{METRICS[key].format}}"
    if not math.isfinite(error):
        return {"text": text, "error": "", "full": repr(values[key])}
    return {"text": text, "error": f"\u00b1 {error:.3f}", "full": f"{number!r} \u00b1 {error!r}"}


def hyper_table(replicates: list[dict]) -> dict:
    """Hyper-parameters side by side: {heads, differ, same, zero}.

    Replicates that differ in the seed alone share a column.
    """
    groups: dict[str, list[dict]] = {}
    for rep in replicates:
        groups.setdefault(json.dumps([rep["name"], rep.get("hyper")]), []).append(rep)
    heads = [(g[0]["name"], ", ".join(str(rep["seed"]) for rep in g)) for g in groups.values()]
    hypers = [dict(_leaves(group[0].get("hyper") or {})) for group in groups.values()]
    parts = {"differ": [], "same": [], "zero": []}
    for name in dict.fromkeys(name for hyper in hypers for name in hyper):
        values = [hyper.get(name) for hyper in hypers]
        same = all(value == values[0] for value in values)
        part = "differ" if not same else "zero" if values[0] == 0 else "same"
        parts[part].append((name, values if part == "differ" else values[:1]))
    return {"heads": heads, **parts}


def continuations(replicates: list[dict]) -> list[dict]:
    """What each replicate made of each prompt: {prompt, rows of name, seed, text, sampled}."""
    prompts: dict[str, list[dict]] = {}
    for rep in replicates:
        for continuation in rep.get("continuations") or ():
            texts = {k: cap_line_breaks(continuation.get(k) or "") for k in ("text", "sampled")}
            row = {"name": rep["name"], "seed": rep["seed"], **texts}
            prompts.setdefault(cap_line_breaks(continuation["prompt"]), []).append(row)
    return [{"prompt": prompt, "rows": rows} for prompt, rows in prompts.items()]


def cap_line_breaks(text: str) -> str:
    """Shorten runs of empty lines to how many they are, and drop space at the end."""

    def shorten(run):
        breaks = run[0].count("\n")
        return run[0] if breaks <= SHOWN_LINE_BREAKS else f"\n[{breaks} line breaks]\n"

    return re.sub(r"\n(?:[ \t\r]*\n)+", shorten, text).strip("\n").rstrip()


def _leaves(tree, prefix=""):
    """Nested dicts as pairs of dotted name and value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flat(tree):
    """Nested dicts as pairs of dotted name and text."""
    return [(name, _text(value)) for name, value in _leaves(tree)]


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)


def _number(value) -> float:
    return math.nan if value is None else float(value)
