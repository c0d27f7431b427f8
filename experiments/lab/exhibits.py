"""What a question shows of one study: tables and figures, for a terminal and for a page."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bitnet_jax import charts, verdict
from bitnet_jax.metrics import (
    DISTINCT,
    ENTROPY,
    GREEDY_REP_4,
    LOGIT_STD,
    LOSS,
    METRICS,
    MUTUAL_INFORMATION,
    Metric,
    metric,
)
from experiments.lab import stats

VERDICT = "collapse/verdict"
CORE = (LOSS, ENTROPY, MUTUAL_INFORMATION, LOGIT_STD, DISTINCT, GREEDY_REP_4)
PREDICTORS = ("bigram", "unigram", "uniform")
Column = str | tuple[str, str, str]  # the key of a metric, or a column's key, title and format


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first column is the line's name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Exhibits:
    """The tables and figures of one study, in the order in which `show` makes them."""

    def __init__(self, df: pd.DataFrame):
        self.df = df
        self.tables: list[Table] = []
        self.figures: list[tuple[str, str]] = []  # caption and <svg> element

    def grid(self, title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
        """A table of text."""
        self.tables.append(Table(title, columns, rows, note))

    def table(
        self,
        df: pd.DataFrame,
        columns: Iterable[Column] = CORE,
        control: str | None = None,
        title: str = "At the last step",
    ) -> None:
        """Means and 95 % intervals over seeds by arm and length; below, what the text gives.

        With a control, the paired difference of the held-out loss from it stands beside.
        """
        shown = [c for c in map(specify, columns) if c[0] in df]
        table_rows = []
        for arm, steps in arms(df):
            cells = [stats.mean(df, arm, key, steps).text(spec) if has(df, arm, key, steps) else ""
                     for key, _, spec in shown]  # fmt: skip
            if control is not None:
                cells.append("" if arm == control else change(df, arm, control, LOSS, steps))
            table_rows.append([label(df, arm, steps), *cells, verdicts(stats.of(df, arm, steps))])
        heads = [title for _, title, _ in shown] + [f"loss - {control}"] * (control is not None)
        for name in (*PREDICTORS, "the text"):
            cells = [given(df, name, key, spec) for key, _, spec in shown]
            cells += [""] * (len(heads) - len(shown))
            table_rows.append([f"{name} predictor" if name in PREDICTORS else name, *cells, ""])
        note = (
            f"Mean [95 % t interval] over n = {stats.seeds(df)} seeds; (0): the interval includes "
            "zero. Distinct predictions: 1 for word frequencies alone, many for noise; alone they "
            "say nothing."
        )
        self.grid(title, ["arm", *heads, "verdicts"], table_rows, note)

    def differences(
        self,
        df: pd.DataFrame,
        pairs: Iterable[tuple[str, str]],
        columns: Iterable[Column] = CORE,
        title: str = "Differences",
        steps: int | None = None,
    ) -> None:
        """Paired differences arm - control of every pair that has rows."""
        shown = [c for c in map(specify, columns) if c[0] in df]
        present = set(df["arm"])
        table_rows = [
            [f"{a} - {b}", *(change(df, a, b, key, steps, spec) for key, _, spec in shown)]
            for a, b in pairs
            if {a, b} <= present
        ]
        note = "Within seeds, with 95 % t intervals; (0): the interval includes zero."
        self.grid(title, ["difference", *(title for _, title, _ in shown)], table_rows, note)

    def dots(
        self, df: pd.DataFrame, column: Column = LOSS, *, title: str = "", caption: str = ""
    ) -> None:
        """Means and intervals of an arm a line, a colour per length, beside the predictors."""
        key, name, _ = specify(column)
        lengths = sorted(set(df["steps"]))
        points: dict[str, dict] = {}
        for arm, steps in arms(df):
            if has(df, arm, key, steps):
                interval = stats.mean(df, arm, key, steps)
                point = interval.mean, interval.low, interval.high
                points.setdefault(arm, {})[f"{steps} steps"] = point
        marks = [(p, df[p].iloc[0]) for p in PREDICTORS] if key == LOSS else []
        if key == MUTUAL_INFORMATION:
            marks = [("context-blind", verdict.BLIND)]
        svg = charts.dot_plot(
            list(points.items()), title=title or name, xlabel=unit(key), references=marks
        )
        legend = f"Mean and 95 % interval over n = {stats.seeds(df)} seeds"
        self.figures.append((caption or f"{legend}, {', '.join(map(str, lengths))} steps.", svg))

    def curves(
        self,
        df: pd.DataFrame,
        key: str = LOSS,
        *,
        title: str = "",
        steps: int | None = None,
        caption: str = "One line per seed.",
    ) -> None:
        """A number along the runs of one length (none: the longest), a line per seed."""
        steps = int(df["steps"].max()) if steps is None else steps
        runs = df[(df["steps"] == steps) & df["curve"].map(bool)]
        series = [
            charts.Series(arm, curve["step"], curve[key])
            for arm, curve in zip(runs["arm"], runs["curve"], strict=True)
        ]
        marks = tuple((p, df[p].iloc[0]) for p in PREDICTORS) if key == LOSS else ()
        if key == DISTINCT:
            marks = (("text", df["references"].iloc[0]["targets"]["distinct"]),)
        title = title or METRICS[key].chart_title
        panel = charts.Panel(series, title, unit(key), steps // 2, marks)
        self.panels([panel], caption)

    def panels(self, panels: list[charts.Panel], caption: str = "") -> None:
        """Line charts of one's own, side by side."""
        self.figures.append((caption, charts.panels_svg(panels)))

    def drawing(self, svg: str, caption: str = "") -> None:
        """Any <svg> element."""
        self.figures.append((caption, svg))


def specify(column: Column) -> tuple[str, str, str]:
    """Key, title and format of a column."""
    if isinstance(column, tuple):
        return column
    definition: Metric = metric(column)
    return column, definition.title, definition.format


def unit(key: str) -> str:
    return METRICS[key].unit if key in METRICS else ""


def arms(df: pd.DataFrame) -> list[tuple[str, int]]:
    """Pairs of arm and length in the order of the rows."""
    return list(dict.fromkeys(zip(df["arm"], map(int, df["steps"]), strict=True)))


def label(df: pd.DataFrame, arm: str, steps: int) -> str:
    """The arm, with its length where the study has several."""
    return arm if df["steps"].nunique() == 1 else f"{arm}, {steps} steps"


def has(df: pd.DataFrame, arm: str, key: str, steps: int) -> bool:
    return bool(stats.of(df, arm, steps)[key].notna().any())


def change(
    df: pd.DataFrame, arm: str, control: str, key: str, steps: int | None, spec: str = ".2f"
) -> str:
    """The paired difference, with (0) where no effect is seen; empty without a common seed."""
    try:
        interval = stats.difference(df, arm, control, key, steps)
    except stats.NotEnough:
        return ""
    return signed(interval, spec)


def signed(interval: stats.Interval, spec: str = ".2f") -> str:
    """A difference with its sign, and (0) where no effect is seen; empty for no seed."""
    text = interval.text("+" + spec.lstrip("+"))
    return text if interval.effect or not interval.n else f"{text} (0)"


def given(df: pd.DataFrame, name: str, key: str, spec: str) -> str:
    """What a predictor of the same text gives for a metric, or the text itself."""
    references = df["references"].iloc[0]
    if name == "the text":
        return f"{references['targets']['distinct']:{spec}}" if key == DISTINCT else ""
    field = METRICS[key].reference if key in METRICS else None
    return f"{references[name][field]:{spec}}" if field else ""


def verdicts(rows: pd.DataFrame) -> str:
    """`healthy 3` or `underscaled 2, slow 1`."""
    counts = rows[VERDICT].value_counts(sort=False)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def triple(interval: stats.Interval) -> tuple[float, float, float]:
    """An interval as a dot plot takes it."""
    return interval.mean, interval.low, interval.high


def text_table(table: Table) -> str:
    """The table in columns of equal width."""
    all_rows = [table.columns, *table.rows]
    widths = np.max([[len(cell) for cell in row] for row in all_rows], axis=0)
    shown = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in all_rows
    ]
    return "\n".join([table.title, *shown, *([table.note] if table.note else [])])
