"""Charts as pure functions from series to SVG text, for the page of a run and the experiments."""

import hashlib
import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

# Okabe and Ito's palette: told apart by every common kind of colour vision.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
INK, MUTED, FAINT = "#1f2328", "#6b7280", "#e3e5e8"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MAX_POINTS = 500
STEPS = (1, 2, 2.5, 5, 10)  # distances of ticks
LEGEND_LINE = 12.8  # points
VARIANT_STYLE = {"lw": 0.8, "ls": (0, (3, 1.5)), "alpha": 0.75}


@dataclass(frozen=True)
class Series:
    """One line of a chart. Series of one label share its colour and its entry in the legend.

    A series with a `variant` ("training") is drawn thin and dashed beneath the others, and the
    legend names the variant once.
    """

    label: str
    x: list
    y: list
    variant: str = ""


@dataclass(frozen=True)
class Panel:
    """The content of one line chart; references are pairs of label and height."""

    series: list[Series]
    title: str
    ylabel: str
    boundary: int | None = None
    references: tuple[tuple[str, float], ...] = ()
    log_y: bool = False
    xlabel: str = "step"


def line_chart(
    series, *, title, ylabel, boundary=None, references=(), log_y=False, size=(3.9, 2.7)
) -> str:
    """Draw values against steps as one SVG element, to be placed inside a page."""
    panel = Panel(series, title, ylabel, boundary, tuple(references), log_y)
    return panels_svg([panel], size=size)


def save_figure(path: Path, panels: list[Panel]) -> Path:
    """Save panels side by side as an SVG file on white, for a README."""
    Path(path).write_text(panels_svg(panels, size=(4.6, 3.0), background="white") + "\n")
    return Path(path)


def panels_svg(panels: list[Panel], *, size=(3.9, 2.7), background="none") -> str:
    """Draw line charts side by side; `size` is that of one panel, in inches."""
    fig, axes = _figure(len(panels), size, background)
    for ax, panel in zip(axes, panels, strict=True):
        _draw_lines(ax, panel)
    return _svg(fig, " and ".join(panel.title for panel in panels))


def phase_portrait(series, curve=None, *, title="Entropy against loss") -> str:
    """Draw each run's path (x: held-out loss, y: entropy) and the tempered-unigram curve.

    On the diagonal a predictor is calibrated, since dCE/d ln(scale of the logits) = CE - entropy.
    """
    fig, (ax,) = _figure(1, (3.9, 2.7), "none")
    paths = [(s, *_points(s)) for s in series]
    values = np.concatenate([np.concatenate(points) for _, *points in paths])
    if curve:
        scale, x, y = (np.array(curve[k], float) for k in ("scale", "loss", "entropy"))
        shown = scale <= 1.0
        values = np.concatenate([values, x[shown], y[shown]])
        ax.plot(x, y, color=MUTED, lw=1.1, dashes=(3, 2), zorder=2)
        for wanted in (0.0, 0.25, 0.5, 1.0):
            i = int(np.argmin(abs(scale - wanted)))
            if abs(scale[i] - wanted) < 0.1:
                ax.plot(x[i], y[i], "o", ms=3, color=MUTED, zorder=2)
                ax.annotate(
                    f"s = {scale[i]:.2g}", (x[i], y[i]), (-5, 3), textcoords="offset points",
                    ha="right", fontsize=8, color=MUTED,
                )  # fmt: skip
    low, high = np.nanmin(values), np.nanmax(values)
    pad = 0.1 * (high - low) or 1.0
    limits = (low - pad, high + pad)
    ax.plot(limits, limits, color=MUTED, lw=0.8, zorder=1)
    ax.text(0.97, 0.03, "below the line: over-confident", transform=ax.transAxes, ha="right",
            fontsize=8, color=MUTED)  # fmt: skip
    ax.text(0.03, 0.95, "above: under-confident", transform=ax.transAxes, va="top", fontsize=8,
            color=MUTED)  # fmt: skip
    for s, x, y in paths:
        style = _style(s, series)
        ax.plot(x, y, zorder=3, **style)
        finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if len(finite):
            for i, face in ((finite[0], "white"), (finite[-1], style["color"])):
                ax.plot(x[i], y[i], "o", ms=5, mfc=face, mec=style["color"], zorder=4)
    ax.set(xlim=limits, ylim=limits, xlabel="held-out loss, nats")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=STEPS))
    _decorate(ax, _handles(series), title, "entropy, nats")
    return _svg(fig, title)


def dot_plot(rows, *, title, xlabel, references=()) -> str:
    """Draw means with their intervals as one SVG element, one line of the plot per row.

    `rows` are pairs of a label and {series: (mean, low, high)}, top first; references are pairs of
    label and value. An interval that is not finite (one seed) is left out.
    """
    fig, (ax,) = _figure(1, (4.6, 1.05 + 0.27 * len(rows)), "none")
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    for i, (_, values) in enumerate(rows):
        for name, (mean, low, high) in values.items():
            k = names.index(name)
            height = i + 0.3 * (k - (len(names) - 1) / 2) / max(1, len(names) - 1)
            color = PALETTE[k % len(PALETTE)]
            if np.isfinite([low, high]).all():
                ax.plot([low, high], [height] * 2, color=color, lw=2, alpha=0.55, zorder=2)
            ax.plot(mean, height, "o", ms=5, color=color, mec="white", mew=0.6, zorder=3)
    for _, value in references:
        ax.axvline(value, color=MUTED, lw=0.9, dashes=(3, 2), zorder=1)
    ax.margins(x=0.06)
    low, high = ax.get_xlim()
    free = 0.0  # labels in one line, pushed right where they would touch
    for label, value in sorted(references, key=lambda pair: pair[1]):
        free = max(free, (value - low) / (high - low) + 0.012)
        ax.text(free, -0.95, label, transform=ax.get_yaxis_transform(), va="center", fontsize=8,
                color=MUTED)  # fmt: skip
        free += 0.024 * len(label) + 0.02
    ax.set(ylim=(len(rows) - 0.4, -1.35 if references else -0.6), xlabel=xlabel)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    _decorate(ax, _handles([Series(name, [], []) for name in names]), title, "")
    ax.tick_params(axis="y", labelcolor=INK)
    return _svg(fig, title)


def fan_chart(fans, *, ylabel, boundary=None) -> str:
    """Draw percentiles against steps as nested bands, one above the other on one scale.

    A fan is (title, steps, {percentile: values}). Percentiles p and 100 - p bound a band; one
    without a partner is a line (50: the median, 100: the largest value).
    """
    fig, axes = _figure(len(fans), (3.9, 2.4), "none", stacked=True)
    for ax, (title, steps, values) in zip(axes, fans, strict=True):
        handles = []
        lows = sorted(p for p in values if p < 50 and 100 - p in values)
        for depth, p in enumerate(lows, 1):
            band = ax.fill_between(steps, values[p], values[100 - p], color=PALETTE[1], lw=0,
                                   alpha=0.6 * depth / len(lows) ** 1.5)  # fmt: skip
            band.set_label(f"p{p} to p{100 - p}")
            handles.append(band)
        for p in sorted(values.keys() - {q for low in lows for q in (low, 100 - low)}):
            name = {0: "smallest", 50: "median", 100: "largest"}.get(p, f"p{p}")
            color, dashes = (INK, (1, 0)) if p == 50 else (PALETTE[0], (3, 1.5))
            handles += ax.plot(steps, values[p], color=color, lw=1.4, dashes=dashes, label=name)
        ax.sharey(axes[0])
        _step_axis(ax, max(steps), boundary)
        _decorate(ax, handles, title, ylabel)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(top=high + 0.1 * (high - low))  # room for "stage 2"
    return _svg(fig, " and ".join(title for title, _, _ in fans))


def _figure(count, size, background, stacked=False):
    rows, columns = (count, 1) if stacked else (1, count)
    inches = (size[0] * columns, size[1] * rows)
    fig = Figure(inches, layout="constrained", facecolor=background)
    pad = 0.03 if background == "none" else 0.12
    fig.get_layout_engine().set(w_pad=pad, h_pad=pad, wspace=0.04, hspace=0.06)
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


def _points(series):
    """The points to draw: evenly thinned, first and last kept, None and inf as gaps."""
    x, y = np.array(series.x, float), np.array(series.y, float)
    if len(x) > MAX_POINTS:
        keep = np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)
        x, y = x[keep], y[keep]
    return np.where(np.isfinite(x), x, np.nan), np.where(np.isfinite(y), y, np.nan)


def _style(series, all_series):
    labels = list(dict.fromkeys(s.label for s in all_series))
    i, alone = labels.index(series.label), sum(not s.variant for s in all_series) <= len(labels)
    color = PALETTE[i % len(PALETTE)]
    if series.variant:
        return {"color": color, **VARIANT_STYLE}
    return {
        "color": color,
        "ls": ("-", "--", ":")[i // len(PALETTE) % 3],
        "lw": 1.8 if alone else 1.0,
    }


def _draw_lines(ax, panel):
    if panel.log_y:
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_minor_locator(LogLocator(subs=(), numticks=2))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    last = 0.0
    for s in panel.series:
        x, y = _points(s)
        style = _style(s, panel.series)
        marker = "o" if len(x) == 1 else None
        ax.plot(x, y, zorder=2.5 if s.variant else 3, marker=marker, ms=4, **style)
        last = max([last, *x])
    for _, value in panel.references:
        ax.axhline(value, color=MUTED, lw=0.9, dashes=(3, 2), zorder=2)
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.array(ax.get_ylim()))
    if panel.log_y:  # many powers of 10 leave no room for what lies between
        subs, most = ((1.0, 2.0, 5.0), 20) if high - low < 3 else ((1.0,), 6)
        ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=most))
    ax.set_ylim(top=scale.inverted().transform(high + 0.07 * (high - low)))  # room for "stage 2"
    _label_references(ax, panel.references)
    _step_axis(ax, last, panel.boundary, panel.xlabel)
    _decorate(ax, _handles(panel.series), panel.title, panel.ylabel)


def _step_axis(ax, last, boundary, label="step"):
    """Steps from 0 to `last`, with a mark where stage 2 begins."""
    ax.set_xlim(0, last or 1)
    if boundary is not None and boundary <= last:
        ax.axvline(boundary, color=MUTED, lw=0.8, zorder=1)
        ax.annotate("stage 2", (boundary, 1), (3, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top", fontsize=8, color=MUTED)  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(label)


def _label_references(ax, references):
    """Name the reference lines in the right margin, lowest first, pushed apart where they touch."""
    scale = ax.yaxis.get_transform().transform
    low, high = scale(np.array(ax.get_ylim()))
    heights = {label: (scale(np.array(v)) - low) / (high - low) for label, v in references}
    floor = -1.0
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        floor = max(height, floor + 0.085)
        ax.text(1.015, floor, label, transform=ax.transAxes, va="center", fontsize=8, color=MUTED)


def _handles(series):
    """One entry of the legend per label, and one per variant."""
    styles = {s.label: _style(s, series) | {"lw": 1.8} for s in series if not s.variant}
    styles |= {s.variant: {"color": MUTED, **VARIANT_STYLE} for s in series if s.variant}
    return [matplotlib.lines.Line2D([], [], label=k, **v) for k, v in styles.items()]


def _legend_shape(labels) -> tuple[int, int]:
    """Columns that fit above a panel, and lines of the legend then."""
    widest = max(map(len, labels), default=0)
    columns = max(1, min(3, 56 // (widest + 5)))
    return columns, -(-len(labels) // columns)


def _decorate(ax, handles, title, ylabel):
    columns, rows = _legend_shape([handle.get_label() for handle in handles])
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.015, 0.99), ncols=columns,
              frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.3, handletextpad=0.5,
              columnspacing=1.2, borderpad=0.2)  # fmt: skip
    pad = 6 + LEGEND_LINE * rows
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=pad)
    ax.set_title(ylabel, loc="right", fontsize=8.5, color=MUTED, pad=pad)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.grid(axis="y", color=FAINT, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0, axis="y")
    ax.tick_params(colors=MUTED, labelsize=8.5, length=3, axis="x")
    ax.xaxis.label.set(color=MUTED, fontsize=8.5)
    ax.patch.set_visible(False)


def _svg(fig, title):
    """Render as a bare <svg> element: text stays text, and ids are unique to the drawing."""
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes]
    legend_lines = max(_legend_shape(labels)[1] for labels in legends)
    more = LEGEND_LINE / 72 * max(0, legend_lines - 1) * fig.axes[0].get_gridspec().nrows
    fig.set_figheight(fig.get_figheight() + more)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        fig.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text).strip()
    key = "c" + hashlib.sha256(text.encode()).hexdigest()[:8] + "-"
    text = re.sub(r'((?:\bid=")|(?:href="#)|(?:url\(#))', lambda m: m[1] + key, text)
    head = f'<svg role="img" aria-label="{escape(title)}" font-family="{FONTS}" '
    return text.replace("<svg ", head, 1)
