"""What a person sees fits the line, tells the worst first, and is text and nothing else."""

import pytest

from bitnet_jax import config, terminal

REPLICATES = [config.Replicate(name, 0, config.Hyper()) for name in ("coupled", "published")]


def row(step, replicate=0, **values):
    return {"step": step, "replicate": replicate, "kind": "eval"} | values


def evaluation(i, name, loss, *warnings):
    keys = {"collapse/verdict": name, "collapse/warnings": list(warnings)}
    return row(40, i, **keys) | ({"eval/loss": loss} if loss else {})


def line(width, *states, places=("40/500, 3:05 left, 12,345 tok/s", "40/500")):
    rows = {i: evaluation(i, *state) for i, state in enumerate(states)}
    labels = [f"coupled {i}" for i in rows]
    return terminal.progress_line(labels, rows, list(places), width)


HEALTHY, SLOW, BLIND = ("healthy", 5.0), ("slow", 7.5), ("context_blind", 6.0)


def test_a_line_shows_every_state_the_worst_first():
    assert line(200, HEALTHY, BLIND, SLOW) == (
        "coupled 1 context_blind 6.00 | coupled 2 slow 7.50 | coupled 0 healthy 5.00 | "
        "40/500, 3:05 left, 12,345 tok/s"
    )
    assert line(200, HEALTHY, ("slow", 5.0, "loss drifts up")).startswith("coupled 1 slow! 5.00 |")
    assert line(200, HEALTHY, ("nonfinite", None)).startswith("coupled 1 nonfinite | coupled 0")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("width", [64, 79, 120])
def test_a_line_fits_and_tells_all_states_or_their_counts(n, width):
    states = [("underscaled_decayed", 9.71, "a warning"), *[HEALTHY] * (n - 1)]
    text = line(width, *states)
    assert len(text) <= width and text.startswith("coupled 0 underscaled_decayed!")
    assert "40/500" in text
    assert text.count("coupled") == n or n == 1 or f"{n - 1} healthy" in text


@pytest.fixture
def progress(monkeypatch):
    """A display of two replicates whose clock the test sets."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    display = terminal.Progress(REPLICATES, 0, 100, 64)
    display.now = now
    return display


def both(loss=5.0, *warnings):
    return [evaluation(i, "healthy", loss, *warnings) for i in (0, 1)]


def test_compilation_is_no_part_of_the_rate(progress, capsys):
    progress.start()
    with progress.compiling("20 steps"):
        progress.now[0] += 30
    progress.now[0] += 2
    progress.update(20, both())
    assert progress.tokens_per_second == 20 * 64 / 2
    assert capsys.readouterr().err.splitlines() == [
        "compiling 20 steps ... 30.0 s",
        "coupled 0 healthy 5.00 | published 0 healthy 5.00 | 20/100, 0:08 left, 640 tok/s",
    ]


def test_a_pipe_gets_whole_lines_and_seldom(progress, capsys):
    """First and last, after half a minute, and where the worst state changes."""
    progress.start()
    for step in range(10, 101, 10):
        progress.now[0] += 4
        rows = both()
        if step == 50:
            rows[1] = evaluation(1, "dead", 9.0)
        progress.update(step, rows)
    out = capsys.readouterr().err
    assert "\r" not in out and out.endswith("\n")
    steps = [text.rpartition(" | ")[2].partition("/")[0] for text in out.splitlines()]
    assert steps == ["10", "50", "60", "100"]


def test_a_terminal_gets_one_line_that_is_redrawn(progress, capsys, monkeypatch):
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    progress.start()
    progress.now[0] += 4
    progress.update(10, both())
    progress.update(20, both(4.0, "loss drifts up: 4.00, was 3.00"))
    progress.update(30, both(4.5, "loss drifts up: 4.50, was 3.00"))
    progress.end_line()
    out = capsys.readouterr().err
    first, warned, last = out.split("\n")[:3]
    assert warned == "step 20: loss drifts up: 4.00, was 3.00 (coupled 0, published 0)"
    assert first.startswith("\r") and len(first) == 80 and "healthy 5.00" in first
    assert last.count("\r") == 2 and all(len(part) in (0, 79) for part in last.split("\r"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tab\tand\nbreak", "tab\tand\nbreak"),
        ("\x1b]0;title\x07\x1b[31mred", "\\x1b]0;title\\x07\\x1b[31mred"),
        ("caf\u00e9 \u732b \U0001f408\u200d\u2b1b", "caf\u00e9 \u732b \U0001f408\u200d\u2b1b"),
        ("\x9b31m\x7f\r", "\\x9b31m\\x7f\\r"),
        ("\u202eevil", "\\u202eevil"),
        (b"\xff.txt".decode("utf-8", "surrogateescape"), "\\udcff.txt"),
    ],
)
def test_a_terminal_is_shown_text_and_obeys_none(text, shown):
    assert terminal.printable(text) == shown


def test_a_long_value_is_cut_in_its_middle():
    text = terminal.one_line("error: data.corpus=" + "x\n" * 5000 + ": unknown corpus", 100)
    assert len(text) < 110 and "\n" not in text
    assert text.startswith("error: data.corpus=x") and text.endswith(": unknown corpus")
