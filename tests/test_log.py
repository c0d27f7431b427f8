"""Rows are written at once, survive a cut, and say where they came from."""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from bitnet_jax import config, log
from bitnet_jax.config import UserError

REPLICATES = [config.Replicate(name, 0, config.Hyper()) for name in ("coupled", "published")]


def row(step, replicate=0, **values):
    return {"step": step, "replicate": replicate, "kind": "eval"} | values


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def test_a_resumed_file_ends_at_the_step(tmp_path):
    """Rows that an interrupted run wrote after its last checkpoint, and half a row, go."""
    path = tmp_path / "metrics.jsonl"
    kept = lines(row(0), row(5), row(5, 1), row(10, **{"eval/loss": 0.1}))
    path.write_text(kept + lines(row(15), row(20)) + '{"step": 10, "repl')
    metrics = log.Metrics(tmp_path, 10, REPLICATES)
    assert lines(*metrics.rows) == kept == path.read_text()
    metrics.write([row(15, 1)])
    assert path.read_text() == kept + lines(row(15, 1))
    metrics.close()


def test_a_new_file_is_empty(tmp_path):
    metrics = log.Metrics(tmp_path, 0, REPLICATES)
    assert metrics.rows == [] and (tmp_path / "metrics.jsonl").read_text() == ""
    metrics.close()


def test_numbers_reach_the_board_of_their_replicate(tmp_path):
    """One event for all of a row's numbers; what is no number stays in metrics.jsonl."""
    metrics = log.Metrics(tmp_path, 0, REPLICATES)
    values = {"eval/loss": 2.5, "collapse/verdict": "slow", "collapse/unique_tokens": 3}
    values |= {"collapse/warnings": ["loss drifts up"], "collapse/next": "wait"}
    metrics.write([row(5, 1, **values)])
    metrics.close()
    found = {}
    for folder in (tmp_path / "tb").iterdir():
        (file,) = folder.iterdir()
        found[folder.name] = [
            (event.step, {value.tag: value.simple_value for value in event.summary.value})
            for event in events(file)
            if event.summary.value
        ]
    numbers = {"eval/loss": 2.5, "collapse/unique_tokens": 3.0}
    assert found == {"0-coupled-0": [], "1-published-0": [(5, numbers)]}


def events(file):
    """The events of a file of TensorBoard: records of length, checksum, content, checksum."""
    content = file.read_bytes()
    while content:
        (size,) = struct.unpack_from("<Q", content)
        yield event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


@pytest.mark.parametrize("replicate", [-1, 2, None, "0"])
def test_a_row_of_another_run_is_named(tmp_path, replicate):
    (tmp_path / "metrics.jsonl").write_text(lines(row(0), row(0, replicate)))
    with pytest.raises(UserError, match=r"metrics.jsonl:2: no row of this run"):
        log.Metrics(tmp_path, 10, REPLICATES)


# Progress


def evaluation(i, name, loss, *warnings):
    keys = {"collapse/verdict": name, "collapse/warnings": list(warnings)}
    return row(40, i, **keys) | ({"eval/loss": loss} if loss else {})


def line(width, *states, places=("40/500, 3:05 left, 12,345 tok/s", "40/500")):
    rows = {i: evaluation(i, *state) for i, state in enumerate(states)}
    labels = [f"coupled {i}" for i in rows]
    return log.progress_line(labels, rows, list(places), width)


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
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    display = log.Progress(REPLICATES, 0, 100, 64)
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
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True, raising=False)
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
    assert log.printable(text) == shown


def test_a_long_value_is_cut_in_its_middle():
    text = log.one_line("error: data.corpus=" + "x\n" * 5000 + ": unknown corpus", 100)
    assert len(text) < 110 and "\n" not in text
    assert text.startswith("error: data.corpus=x") and text.endswith(": unknown corpus")


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"", b"\xff", b"[" * 100000, None])
def test_a_file_that_holds_no_object_is_named(tmp_path, content):
    path = tmp_path / "summary.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        log.read_json(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_read_rows_drops_a_cut_last_line_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert log.read_rows(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert log.read_rows(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("bad", ['{"a": ', "", "[1]", "7", "\x00\x00"])
def test_read_rows_names_a_bad_line(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + bad + '\n{"a": 3}\n')
    with pytest.raises(UserError) as caught:
        log.read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: not a JSON object")
    assert "\n" not in str(caught.value)


def test_write_json_replaces_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    log.write_json(path, {"step": 1})
    moves = []

    def replace(source, target):
        moves.append((json.loads(Path(source).read_text()), json.loads(target.read_text())))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    log.write_json(path, {"step": 2})
    assert moves == [({"step": 2}, {"step": 1})]
    assert json.loads(path.read_text()) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "summary.json"
    log.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        log.write_json(path, {"step": np.float32(2)})
    assert json.loads(path.read_text()) == {"step": 1}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit; the package seems to lie in it."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "log.py").write_text("")
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", "-C", folder, *command], check=True, capture_output=True)
    monkeypatch.setattr(log, "__file__", str(folder / "package" / "log.py"))
    return folder


def test_provenance_in_a_repository(checkout):
    here = log.provenance()
    assert len(here["git_commit"]) == 40 and here["git_dirty"] is False
    (checkout / "package" / "log.py").write_text("changed")
    assert log.provenance() == here | {"git_dirty": True, "started": log.provenance()["started"]}
    assert set(log.PACKAGES) < set(here["versions"])
    json.dumps(here)


def test_a_repository_that_does_not_track_the_package_is_not_its_own(checkout, monkeypatch):
    """As of a package in the virtual environment of something else."""
    installed = checkout / "venv" / "log.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(log, "__file__", str(installed))
    assert log.provenance()["git_commit"] is None and log.provenance()["git_dirty"] is False


def test_provenance_without_a_repository_or_git(tmp_path, monkeypatch, checkout):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(log, "__file__", str(tmp_path / "log.py"))
    assert log.provenance()["git_commit"] is None
    monkeypatch.setattr(log, "__file__", str(checkout / "package" / "log.py"))
    assert log.provenance()["git_commit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert log.provenance()["git_commit"] is None and log.provenance()["git_dirty"] is False
