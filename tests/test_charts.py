"""Charts show what they are given: words as text, marks where the values are."""

import math
import re

import pytest
from matplotlib.figure import Figure

from bitnet_jax import charts

ROWS = [
    ("base", {"coupled": (7.0, 6.9, 7.1), "decoupled": (5.0, 4.9, 5.1)}),
    ("full & wide", {"coupled": (7.2, -math.inf, math.inf)}),
]
FAN = {p: [v, 2 * v] for p, v in zip((1, 25, 50, 75, 99, 100), (-3, -1, 0, 1, 3, 9), strict=True)}


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of their SVG text."""
    monkeypatch.setattr(charts, "_svg", lambda fig, title: fig)


def words(svg):
    return {m.strip() for m in re.findall(r">([^<>]+)</text>", svg)}


def test_dot_plot_names_rows_series_and_references():
    svg = charts.dot_plot(ROWS, title="Loss", xlabel="nats", references=[("unigram", 6.5)])
    wanted = {"base", "full &amp; wide", "coupled", "decoupled", "Loss", "nats", "unigram"}
    assert wanted <= words(svg)
    assert svg.startswith("<svg ") and svg.endswith("</svg>")


def test_dot_plot_draws_means_and_finite_intervals_in_the_order_of_the_rows(drawn):
    (ax,) = charts.dot_plot(ROWS, title="Loss", xlabel="nats").axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    spans = [line for line in ax.lines if line.get_marker() == "None"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [7.0, 5.0, 7.2]
    assert [tuple(span.get_xdata()) for span in spans] == [(6.9, 7.1), (4.9, 5.1)]
    assert dots[0].get_color() == dots[2].get_color() != dots[1].get_color()
    top, below = (ax.transData.transform((0, dot.get_ydata()[0]))[1] for dot in dots[::2])
    assert top > below


def test_fan_chart_pairs_percentiles_into_bands_and_draws_the_rest_as_lines(drawn):
    fig = charts.fan_chart([("a", [0, 10], FAN), ("b", [0, 10], FAN)], ylabel="logit", boundary=5)
    assert isinstance(fig, Figure)
    for ax in fig.axes:
        assert [c.get_label() for c in ax.collections] == ["p1 to p99", "p25 to p75"]
        bands = [c.get_paths()[0].get_extents() for c in ax.collections]
        assert [(b.ymin, b.ymax) for b in bands] == [(-6, 6), (-2, 2)]
        assert {"median", "largest"} <= {line.get_label() for line in ax.lines}


def test_fans_share_one_scale(drawn):
    large = {p: [10 * v for v in values] for p, values in FAN.items()}
    first, second = charts.fan_chart(
        [("a", [0, 1], FAN), ("b", [0, 1], large)], ylabel="logit"
    ).axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] >= 180


def test_a_legend_of_many_arms_grows_the_figure_instead_of_shrinking_the_panel():
    """The layout warns (an error here) when a legend leaves no room."""
    names = [f"decoupled quantisation warm-up {i}" for i in range(24)]

    def height(labels):
        series = [charts.Series(label, [0, 1], [1, 2]) for label in labels]
        svg = charts.line_chart(series, title="Loss", ylabel="nats")
        assert set(labels) <= words(svg)
        return float(re.search(r'height="([\d.]+)pt"', svg)[1])

    assert height(names) - height(names[:1]) == pytest.approx(23 * charts.LEGEND_LINE, abs=1)


def test_a_panel_names_its_own_axis():
    series = [charts.Series("a", [0, 100], [1.0, 2.0])]
    plain = charts.Panel(series, "Loss", "nats")
    share = charts.Panel(series, "Loss", "nats", xlabel="% of the run")
    assert "step" in words(charts.panels_svg([plain]))
    told = words(charts.panels_svg([share]))
    assert "% of the run" in told and "step" not in told
