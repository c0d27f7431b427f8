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
    labels = words(charts.panels_svg([share]))
    assert "% of the run" in labels and "step" not in labels


def test_long_series_keep_their_ends():
    series = charts.Series("a", list(range(4001)), [0.0] * 4000 + [9.0])
    x, y = charts._points(series)
    assert (len(x), x[0], x[-1], y[-1]) == (charts.MAX_POINTS, 0, 4000, 9.0)


def test_charts_keep_text_and_label_stage_and_references(tmp_path):
    series = [charts.Series("a & b", [0, 10], [1.0, 2.0]), charts.Series("c", [], [])]
    references = (("unigram", 1.5),)
    panel = charts.Panel(series, "Loss", "nats", 5, references)
    drawn = charts.line_chart(
        series, title="Loss", ylabel="nats", boundary=5, references=references
    )
    saved = charts.save_figure(tmp_path / "figure.svg", [panel, panel]).read_text()
    for svg in (drawn, saved):
        assert {"a &amp; b", "c", "Loss", "nats", "stage 2", "unigram"} <= words(svg)


@pytest.mark.parametrize(("boundary", "marks"), [(9, [9]), (10, [10]), (11, [])])
def test_the_second_stage_is_marked_from_the_step_on_that_ends_the_first(drawn, boundary, marks):
    series = [charts.Series("a", [0, 10], [1.0, 2.0])]
    (ax,) = charts.line_chart(series, title="Loss", ylabel="nats", boundary=boundary).axes
    assert [text.xy[0] for text in ax.texts if text.get_text() == "stage 2"] == marks


def test_a_variant_is_dashed_in_the_colour_of_its_label_and_named_once(drawn):
    series = [charts.Series(label, [0, 1], [1, 2], variant)
              for variant in ("", "training") for label in "ab"]  # fmt: skip
    (ax,) = charts.line_chart(series, title="Loss", ylabel="nats").axes
    a, b, thin_a, thin_b = ax.lines
    assert [thin_a.get_color(), thin_b.get_color()] == [a.get_color(), b.get_color()]
    assert (a.get_linestyle(), thin_a.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "training"]


def test_the_phase_portrait_has_the_loss_across_and_the_entropy_upwards(drawn):
    (ax,) = charts.phase_portrait([charts.Series("a", [8.0, 5.0], [8.0, 4.0])]).axes
    ends = [(float(x.get_xdata()[0]), float(x.get_ydata()[0]))
            for x in ax.lines if x.get_marker() == "o"]  # fmt: skip
    assert ends == [(8.0, 8.0), (5.0, 4.0)]
    assert "loss" in ax.get_xlabel() and "entropy" in ax.get_title(loc="right")


@pytest.mark.parametrize(("least", "ticks"), [(0.05, {"0.1", "0.2", "0.5"}), (1e-8, {"0.01"})])
def test_a_logarithmic_axis_has_no_more_ticks_than_it_has_room_for(least, ticks):
    panel = charts.Panel([charts.Series("a", [0, 1], [1.0, least])], "Spread", "", log_y=True)
    labels = words(charts.panels_svg([panel]))
    assert ticks <= labels and len(labels) < 16
