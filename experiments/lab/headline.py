"""The answer's tables and pictures: the coupled recipe, less decay, AdamW, the published one."""

import pandas as pd

from bitnet_jax import charts
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS
from experiments.end_collapse import ADAMW, COUPLED, LEAST, LESS, PUBLISHED
from experiments.lab import rows, studies
from experiments.lab.stats import mean

ARMS = (COUPLED, LESS, LEAST, ADAMW, PUBLISHED)
PICTURES = {1000: rows.FOLDER / "answer.svg", 10_000: rows.FOLDER / "answer-longer.svg"}  # steps


def read() -> pd.DataFrame:
    """The rows of the largest study."""
    return studies.FULL.frame("end_collapse")


def table(df, steps: int) -> tuple[list[str], list[list[str]]]:
    """The table of a length in the documents: heads and lines, arms that have rows of it."""
    known = df["references"].iloc[0]
    predictors = ("unigram", "bigram")
    n = {arm: int(((df["arm"] == arm) & (df["steps"] == steps)).sum()) for arm in ARMS}
    arms = [arm for arm in ARMS if n[arm]]
    table_rows = []
    for title, column, spec, reported, of_text in (
        ("distinct predictions, stage 2", "unique_stage2", ".1f", {1000: "3.6"}, "distinct"),
        ("training loss, last step", "train_loss/final", ".2f", {1000: "9.92", 10_000: "9.74"}, ""),
        ("held-out loss", LOSS, ".2f", {}, "loss"),
        ("entropy, last step", ENTROPY, ".2f", {1000: "10.7, collapsed"}, "entropy"),
        ("weights above 1.1", "above_1.1/all", ",.0f", {1000: "981,223"}, ""),
    ):
        cells = [mean(df, arm, column, steps).text(spec) for arm in arms]
        cells += [f"{known[x][of_text]:{spec}}" if of_text else "" for x in predictors]
        table_rows.append([title, reported.get(steps, ""), *cells])
    named = [f"{arm}, n = {n[arm]}" for arm in arms] + [f"{x} predictor" for x in predictors]
    return [f"after {steps:,} steps", "the report", *named], table_rows


def picture(df, steps: int) -> list[charts.Panel]:
    """The recipes' distinct predictions, spread of the logits and loss, a line per seed."""
    known, runs = df["references"].iloc[0], df[df["steps"] == steps]
    text = (("text", known["targets"]["distinct"]),)
    losses = tuple((name, known[name]["loss"]) for name in ("uniform", "unigram", "bigram"))
    panels = []
    for key, title, unit, references in (
        (DISTINCT, f"Distinct predictions of {known['tracked_positions']}", "tokens", text),
        (LOGIT_STD, "Spread of the logits", "standard deviation", ()),
        (LOSS, "Held-out loss", "nats per token", losses),
    ):
        series = [
            charts.Series(arm, curve["step"], curve[key])
            for arm in ARMS
            for curve in runs[runs["arm"] == arm]["curve"]
        ]
        is_log = key == LOGIT_STD
        panels.append(charts.Panel(series, title, unit, steps // 2, references, is_log))
    return panels
