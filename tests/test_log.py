"""Rows are written at once, survive a cut, and say where they came from."""

import json
import os
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from bitnet_jax import config, log
from bitnet_jax.fields import UserError

REPLICATES = [config.Replicate(name, 0, config.Hyper()) for name in ("coupled", "published")]


def row(step, replicate=0, **values):
    return {"step": step, "replicate": replicate, "kind": "eval"} | values


def jsonl(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def test_a_resumed_file_ends_at_the_step(tmp_path):
    """Rows that an interrupted run wrote after its last checkpoint, and half a row, go."""
    path = tmp_path / "metrics.jsonl"
    kept = jsonl(row(0), row(5), row(5, 1), row(10, **{"eval/loss": 0.1}))
    path.write_text(kept + jsonl(row(15), row(20)) + '{"step": 10, "repl')
    metrics = log.Metrics(tmp_path, 10, REPLICATES)
    assert jsonl(*metrics.rows) == kept == path.read_text()
    metrics.write([row(15, 1)])
    assert path.read_text() == kept + jsonl(row(15, 1))
    metrics.close()


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_a_tracker_gets_the_numbers_of_every_replicate(tmp_path, monkeypatch, kind):
    """As both packages take them: `init` gives a run with `log` and `finish`."""
    calls = []
    tracked = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("end")
    )
    begun = []
    fake = ModuleType(kind)
    fake.__spec__ = ModuleSpec(kind, None)
    fake.init = lambda **how: begun.append(how) or tracked
    monkeypatch.setitem(sys.modules, kind, fake)
    log.check_tracker(kind)
    for replicates, prefix in ((REPLICATES, "published 0/"), (REPLICATES[1:], "")):
        tracker = log.Tracker(kind, tmp_path, {"model": 1}, replicates)
        numbers = {"eval/loss": 2.5, "collapse/verdict": "slow", "collapse/warnings": ["x"]}
        tracker.write([row(5, len(replicates) - 1, **numbers)])
        tracker.close()
        assert calls[-2:] == [(5, {f"{prefix}eval/loss": 2.5}), "end"]
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow"
    assert ("id" in begun[0]) == (kind == "wandb") and begun[0]["name"].startswith(tmp_path.name)


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.tracker=trackio: not installed; pip"):
        log.check_tracker("trackio")
    log.check_tracker("none")


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
    logged = {}
    for folder in (tmp_path / "tb").iterdir():
        (file,) = folder.iterdir()
        logged[folder.name] = [
            (event.step, {value.tag: value.simple_value for value in event.summary.value})
            for event in events(file)
            if event.summary.value
        ]
    numbers = {"eval/loss": 2.5, "collapse/unique_tokens": 3.0}
    assert logged == {"0-coupled-0": [], "1-published-0": [(5, numbers)]}


def events(file):
    """The events of a file of TensorBoard: records of length, checksum, content, checksum."""
    content = file.read_bytes()
    while content:
        (size,) = struct.unpack_from("<Q", content)
        yield event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


@pytest.mark.parametrize("replicate", [-1, 2, None, "0"])
def test_a_row_of_another_run_is_named(tmp_path, replicate):
    (tmp_path / "metrics.jsonl").write_text(jsonl(row(0), row(0, replicate)))
    with pytest.raises(UserError, match=r"metrics.jsonl:2: no row of this run"):
        log.Metrics(tmp_path, 10, REPLICATES)


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


def test_a_sealed_object_is_read_as_written_in_any_layout_and_not_once_a_value_differs(tmp_path):
    path, tree = (
        tmp_path / "summary.json",
        {"step": 1, "loss": 1 / 3, "text": "\n\u00e9", "none": None},
    )
    log.write_sealed(path, tree)
    assert log.read_sealed(path) == tree
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(whole.items()))))
    assert log.read_sealed(path) == tree
    for edit in ({"step": 2}, {"more": 0}, {"sha256": "0" * 64}, {"sha256": None}):
        path.write_text(json.dumps(whole | edit))
        with pytest.raises(UserError, match=r"damaged or edited"):
            log.read_sealed(path)


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
