"""The page of another trainer's run: its curves beside the reference lines, and what they say."""

import os
from pathlib import Path

from markupsafe import Markup

from bitnet_jax import page
from bitnet_jax.charts import Series, line_chart, phase_portrait
from bitnet_jax.diagnosis import SHOWN, Diagnosis, evaluations
from bitnet_jax.fields import UserError
from bitnet_jax.history import ROLES, History
from bitnet_jax.metrics import ENTROPY, LOSS, metric
from bitnet_jax.verdict import LABELS

LOSS_MEANING = (
    "Below the unigram predictor's the model uses context; near the uniform one's it knows nothing."
)
LOSSES = {"eval_loss": "held-out", "loss": "training"}


def write_page(
    path: Path, history: History, diagnosis: Diagnosis, references: dict, prediction=()
) -> None:
    """Write one self-contained HTML file; raises UserError where it cannot be written."""
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_text(render(history, diagnosis, references, prediction), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"--page {path}: cannot be written: {error.strerror}") from error


def render(history: History, diagnosis: Diagnosis, references: dict, prediction=()) -> str:
    """Build the page, with lines of `elsewhere.prediction`; the same input gives the same bytes."""
    verdict, log = diagnosis.verdict, history.log
    severity, headline, *_ = LABELS[verdict.name]
    named = [(role, column.name) for role, column in history.columns.items()]
    heights = [
        (f"{name}, nats per token", f"{references[name]['loss']:.3f}")
        for name in SHOWN
        if name in references
    ]
    template = page.TEMPLATES.get_template("history.html.jinja")
    return template.render(
        title=log.path.resolve().name,
        colors={},
        headline=headline,
        facts=[log.kind, f"{len(log.rows):,} rows", f"last step {history.last_step:,}"],
        state=page.state(verdict.name, severity),
        since=diagnosis.since,
        verdict=verdict.name,
        evidence=verdict.evidence,
        next=verdict.next,
        warnings=verdict.warnings,
        notes=diagnosis.notes,
        prediction=tuple(prediction),
        charts=draw_charts(history, references),
        tables=(
            ("What would say more, if it were logged", list(diagnosis.unknown.items())),
            ("Simple predictions", heights),
            ("Columns", named),
            ("Settings", [(k, str(v)) for k, v in history.settings.items()]),
        ),
    )


def draw_charts(history: History, references: dict) -> list[tuple[Markup, str]]:
    """Pairs of SVG and caption: the losses, then every other number; entropy against loss."""
    losses = {LOSSES[r]: history.columns[r] for r in LOSSES if r in history.columns}
    known = [name for name in SHOWN if name in references]
    heights = [(name, references[name]["loss"]) for name in known]
    drawn = [_chart(losses, "Loss", metric(LOSS).unit, LOSS_MEANING, heights, size=(4.2, 2.8))]
    for role, column in history.columns.items():
        if role not in LOSSES:
            shown, (*_, meaning) = metric(ROLES[role].metric), ROLES[role]
            heights = [(name, references[name]["entropy"]) for name in known if role == "entropy"]
            title = shown.chart_title if role != "head_norm" else "Norm of the output matrix"
            unit = shown.unit if role != "head_norm" else "as logged"
            caption = shown.meaning if role == "entropy" else f"{meaning[0].upper()}{meaning[1:]}."
            drawn.append(_chart({role: column}, title, unit, caption, heights, shown.log))
    if "entropy" in history.columns and history.judged == "eval_loss":
        rows = [row for row in evaluations(history) if ENTROPY in row]
        path = Series("entropy", [r[LOSS] for r in rows], [r[ENTROPY] for r in rows])
        drawn.append((Markup(phase_portrait([path], references.get("curve"))), page.PHASE_MEANING))
    return drawn


def _chart(columns, title, unit, caption, heights, log_y=False, **more) -> tuple[Markup, str]:
    """One chart of columns by their labels. A value that is not finite is a gap."""
    series = [Series(label, c.steps_N, c.values_N) for label, c in columns.items()]
    log_y = log_y and any((c.finite().values_N > 0).any() for c in columns.values())
    svg = line_chart(series, title=title, ylabel=unit, references=heights, log_y=log_y, **more)
    return Markup(svg), caption
