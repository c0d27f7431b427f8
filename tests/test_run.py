"""A run ends bitwise the same however often it is stopped, and says in one line why it cannot."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bitnet_jax import (
    checkpoint,
    config_file,
    data,
    judging,
    log,
    optim,
    presets,
    restore,
    run,
    verdict,
    workdir,
)
from bitnet_jax import program as programs
from bitnet_jax.cli import flags
from bitnet_jax.fields import UserError
from bitnet_jax.recorder import RATE_BLOCK, Recorder, describe_failure, rate_sum

ROOT = Path(__file__).parents[1]
TEXT = "\n".join(f"the {n} cats sat on the {n % 7} mats, and {n * n} dogs ran." for n in range(900))
STEPS, EVERY, SAVE = 30, 5, 15  # SAVE is the stage boundary, too
ENDS = range(EVERY, STEPS + 1, EVERY)
KILLS = 5


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory, cache_folder):
    """A corpus, and compilations that are shared by all runs; yields their folder."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "corpus.txt").write_text(TEXT)
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def cfg(shared):
    tiny = presets.preset("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, n_layers=1),
        data=replace(tiny.data, corpus=f"text:{shared / 'corpus.txt'}"),
        run=replace(
            tiny.run, steps=STEPS, eval_every=EVERY, save_every=SAVE, checkpoint_every=1000
        ),
    )


def replicates_of(cfg, **hyper):
    return presets.make_replicates(cfg, [0], hyper)


def start(cfg, workdir, **options):
    return run.run(cfg, replicates_of(cfg), workdir, **options)


@pytest.fixture(scope="module")
def finished(cfg, tmp_path_factory):
    """The workdir of a run that was never stopped; `summary` is what it returned."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, start(cfg, workdir)


def state_at(cfg, workdir, step):
    program = programs.build(cfg, replicates_of(cfg))
    return jax.device_get(checkpoint.restore(workdir, step, program.abstract_state))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.tobytes() == y.tobytes()


def rows_of(workdir):
    return log.read_rows(workdir / "metrics.jsonl")


def contents(workdir):
    """Bytes and times of all files."""
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def error_of(kind, cfg, workdir, **options):
    with pytest.raises(kind) as caught:
        start(cfg, workdir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_workdir_of_a_finished_run(cfg, finished):
    workdir, summary = finished
    names = {p.name for p in workdir.iterdir()}
    expected = "config.json tokenizer metrics.jsonl checkpoints tb summary.json report.html"
    assert names == set(expected.split())
    assert log.read_sealed(workdir / "summary.json") == summary
    assert (summary["step"], summary["finished"]) == (STEPS, True)
    assert [r["name"] for r in summary["replicates"]] == ["coupled", "published"]
    described = json.loads((workdir / "config.json").read_text())
    written, replicates = config_file.from_json(described)
    assert replicates == replicates_of(cfg)
    assert written == programs.resolve_vocab(cfg, 300)
    assert {"provenance", "corpus", "references", "n_params", "decay_table"} <= set(described)
    assert checkpoint.kept_steps(workdir) == [SAVE, STEPS]
    assert [len(list(board.iterdir())) for board in (workdir / "tb").iterdir()] == [1, 1]


def test_the_beginnings_that_are_continued_are_held_out(cfg, finished):
    _, summary = finished
    tokens = data.load(cfg.data)
    held_out = tokens.tokenizer.decode(tokens.validation_N)
    for entry in summary["replicates"]:
        assert all(shown["prompt"] in held_out for shown in entry["continuations"])


def test_rows_are_complete_and_valid_json(finished):
    def forbid(token):
        raise AssertionError(f"{token} is not JSON")

    workdir, _ = finished
    log_lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=forbid) for line in log_lines]
    places = [(row["step"], row["kind"], row["replicate"]) for row in rows]
    assert places == [(0, "eval", 0), (0, "eval", 1)] + [
        (step, kind, i) for step in ENDS for kind in ("train", "eval") for i in (0, 1)
    ]
    tokens = {row["step"]: row["train/tokens"] for row in rows if row["kind"] == "train"}
    assert tokens == {step: step * 4 * 16 for step in ENDS}


def test_rows_and_summary_hold_the_verdict_of_the_history(cfg, finished):
    """Recomputed from the rows: those of a step's training belong to its evaluation."""
    folder, summary = finished
    rows = rows_of(folder)
    references = json.loads((folder / "config.json").read_text())["references"]
    for i, rep in enumerate(replicates_of(cfg)):
        rates = np.asarray(optim.learning_rate(rep.hyper, np.arange(1, STEPS + 1), cfg.run))
        sum_lr = np.cumsum([0.0, *rates.astype(float)])
        judge, train = judging.Judge(references), {}
        for row in (row for row in rows if row["replicate"] == i):
            if row["kind"] == "train":
                train = row
                continue
            judged = train | row | {"sum_lr": float(sum_lr[row["step"]])}
            want = judge.update(judged).as_row()
            assert {key: row[key] for key in want} == want
        entry = summary["replicates"][i]
        assert {f"collapse/{key}": entry[key] for key in ("verdict", "evidence", "next")} == {
            key: want[key] for key in want if key != "collapse/warnings"
        }
        assert entry["held_out"]["loss"] == row.get("held_out/loss", row["eval/loss"])
        assert entry["failed"] is None
    assert "decay/norm_ratio_embedding" in judged


def test_the_sum_of_learning_rates_does_not_depend_on_the_order_of_questions(cfg):
    """Also where it crosses the blocks it is made of."""
    long = replace(cfg.run, steps=2 * RATE_BLOCK + 9)
    hyper = replicates_of(cfg)[0].hyper
    whole = np.asarray(optim.learning_rate(hyper, np.arange(1, long.steps + 1), long), np.float64)
    total = rate_sum(hyper, long)
    for step in (long.steps, 0, RATE_BLOCK, RATE_BLOCK + 1, 7):
        assert total(step) == pytest.approx(whole[:step].sum(), rel=1e-12)


def test_a_resumed_run_judges_by_the_rows_before(cfg, finished, tmp_path):
    """As bytes too, in the tests below; here the history is long enough to tell."""
    program = programs.build(cfg, replicates_of(cfg))
    far = 1e3 + np.arange(2)
    numbers = {f"collapse/{k}": far for k in ("mutual_information", "unigram_kl", "logit_std")}
    numbers |= {"eval/loss": far, "collapse/entropy": far - 5}
    trained = {"train/lr": far, "failed": np.zeros(2, int)}
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        folder.mkdir()
    whole = Recorder(program, tmp_path / "whole", 0)
    for step in (5, 10, 15, 20):
        whole.write(step, None, trained, numbers)
        part = Recorder(program, tmp_path / "parts", step - 5)
        part.write(step, None, trained, numbers)
        part.close()
    whole.close()
    rows = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "parts") == rows
    assert [row["collapse/verdict"] for row in rows if row["kind"] == "eval"] == [
        *["unigram_transit"] * 4,
        *["overconfident"] * 4,
    ]


def test_a_workdir_in_use_is_refused_and_left_alone(cfg, finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (workdir, tmp_path):
        before = contents(folder)
        assert "not empty; add --resume" in error_of(UserError, cfg, folder)
        assert contents(folder) == before


def test_resuming_a_finished_run_changes_no_result(cfg, finished):
    workdir, summary = finished
    before = contents(workdir)
    before.pop(workdir / "report.html")
    assert start(cfg, workdir, resume=True) == summary
    after = contents(workdir)
    after.pop(workdir / "report.html")
    assert after == before


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("run.steps=40", "run.steps=30, not 40"),
        ("run.eval_every=3", "run.eval_every=5, not 3"),
        ("model.d_ff=128", "model.d_ff=64, not 128"),
        ("data.seq_len=8", "data.seq_len=16, not 8"),
        ("optim.beta2=0.9", "optim.beta2=0.95, not 0.9"),
        ("run.recipes=published", "run.recipes=['coupled', 'published'], not ['published']"),
    ],
)
def test_resuming_with_other_settings_is_refused(cfg, finished, assignment, message):
    workdir, _ = finished
    before = contents(workdir)
    other, _ = presets.override(cfg, [assignment])
    assert f"was started with {message}" in error_of(UserError, other, workdir, resume=True)
    assert contents(workdir) == before


def test_resuming_with_other_replicates_names_the_first_number_that_differs(cfg, finished):
    for others, named in (
        (presets.make_replicates(cfg, [1], {}), "--seeds=0, not 1"),
        (presets.make_replicates(cfg, [0, 1], {}), "--seeds=0, not 0,1"),
        (replicates_of(cfg, lr_peak=1e-3), "replicates[0].hyper.lr_peak=0.0015, not 0.001"),
    ):
        with pytest.raises(UserError) as caught:
            run.run(cfg, others, finished[0], resume=True)
        assert f"was started with {named};" in str(caught.value)


def test_resuming_on_another_corpus_is_refused(cfg, finished, tmp_path):
    """The same path with another text in it would go on with other tokens."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    moved = replace(cfg, data=replace(cfg.data, corpus=f"text:{corpus}"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    described = log.read_sealed(finished[0] / "config.json")
    described["data"]["corpus"] = moved.data.corpus
    log.write_sealed(workdir / "config.json", described)
    corpus.write_text(TEXT.replace("cats", "cows"))
    assert "corpus" in error_of(UserError, moved, workdir, resume=True)


def test_vocab_mismatch_names_both_sizes(cfg, tmp_path):
    for size in (299, 301):
        other = replace(cfg, model=replace(cfg.model, vocab_size=size))
        message = error_of(UserError, other, tmp_path / "run")
        assert f"model.vocab_size={size}" in message and "bpe:300 has 300 tokens" in message
    assert not (tmp_path / "run").exists()


def interrupt_at(monkeypatch, signum, step):
    """Deliver a signal to this process while the rows of `step` are written."""
    write = log.Metrics.write

    def write_and_kill(self, rows):
        write(self, rows)
        if rows[0]["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(log.Metrics, "write", write_and_kill)


@pytest.mark.slow
def test_interrupted_runs_end_bitwise_the_same(cfg, finished, tmp_path, monkeypatch):
    """Stopped before the first save, then at one; half a row and rows without a state are left."""
    reference, _ = finished
    workdir = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for signum, step, stopped in ((signal.SIGTERM, 0, EVERY), (signal.SIGINT, SAVE, SAVE)):
        with monkeypatch.context() as patch, pytest.raises(run.Interrupted) as caught:
            interrupt_at(patch, signum, step)
            start(cfg, workdir, resume=step > 0)
        assert caught.value.signum == signum
        assert f"stopped at step {stopped} and saved" in str(caught.value)
        assert checkpoint.kept_steps(workdir)[-1] == stopped
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert not (workdir / "summary.json").exists()
    metrics = workdir / "metrics.jsonl"
    late = json.dumps(rows_of(workdir)[-1] | {"step": SAVE + 1})
    metrics.write_text(metrics.read_text() + late + "\n" + late[:40])
    start(cfg, workdir, resume=True)
    assert metrics.read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert_same(state_at(cfg, workdir, STEPS), state_at(cfg, reference, STEPS))


@pytest.mark.slow
def test_a_signal_in_the_last_chunk_stops_before_the_page(cfg, finished, tmp_path, monkeypatch):
    reference, summary = finished
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(run.Interrupted):
        interrupt_at(patch, signal.SIGTERM, STEPS)
        start(cfg, workdir)
    assert checkpoint.kept_steps(workdir)[-1] == STEPS and not (workdir / "summary.json").exists()
    assert start(cfg, workdir, resume=True)["replicates"] == summary["replicates"]
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_a_first_write_that_was_cut_is_written_again(cfg, finished, tmp_path):
    """Killed while the rows of step 0 went out: those of one replicate are there."""
    reference, _ = finished
    metrics = (reference / "metrics.jsonl").read_text()
    first, second, *_ = metrics.splitlines(keepends=True)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((reference / "config.json").read_bytes())
    (workdir / "metrics.jsonl").write_text(first + second[:50])
    start(cfg, workdir, resume=True)
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_a_run_killed_after_its_last_checkpoint_writes_the_same_summary(cfg, finished, tmp_path):
    reference, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "summary.json").unlink()
    start(cfg, workdir, resume=True)
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    summary, want = (json.loads((w / "summary.json").read_text()) for w in (workdir, reference))
    assert summary["replicates"] == want["replicates"]


def with_init(cfg, source):
    return replace(cfg, run=replace(cfg.run, init=f"fork:{source}"))


def test_a_fork_with_the_same_numbers_goes_on_bitwise(cfg, finished, tmp_path):
    reference, _ = finished
    start(with_init(cfg, f"{reference}@{SAVE}"), tmp_path / "fork")
    later = [row for row in rows_of(reference) if row["step"] > SAVE]
    rows = rows_of(tmp_path / "fork")
    assert [row for row in rows if row["step"] > SAVE] == later
    assert [(r["step"], r["kind"]) for r in rows if r["step"] <= SAVE] == [(SAVE, "eval")] * 2
    assert_same(state_at(cfg, tmp_path / "fork", STEPS), state_at(cfg, reference, STEPS))


def test_a_fork_of_one_replicate_copies_it_to_all(cfg, finished, tmp_path):
    reference, _ = finished
    forked = with_init(cfg, f"{reference}@{SAVE}:1")
    program = programs.build(forked, replicates_of(forked))
    state, step = restore.start_state(program, tmp_path)
    assert step == SAVE
    assert jax.tree.map(lambda x: x.sharding, state) == program.state_sharding
    replicate_state = jax.tree.map(lambda x: x[1], state_at(cfg, reference, SAVE))
    for i in (0, 1):
        assert_same(jax.tree.map(lambda x, i=i: np.asarray(x[i]), state), replicate_state)


def test_a_fork_with_a_new_optimiser_keeps_the_place_in_the_schedules(cfg, finished, tmp_path):
    forked = with_init(cfg, f"{finished[0]}@{SAVE}")
    forked = replace(forked, run=replace(forked.run, reset_optimizer=True))
    program = programs.build(forked, replicates_of(forked))
    state, _ = restore.start_state(program, tmp_path)
    kept = state_at(cfg, finished[0], SAVE)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state["adam"]))
    assert any(np.any(x) for x in jax.tree.leaves(kept.opt_state["adam"]))
    adam = {"adam": kept.opt_state["adam"]}
    assert_same(jax.device_get(state.replace(opt_state=state.opt_state | adam)), kept)


def test_a_fork_without_a_step_takes_the_last(cfg, finished, tmp_path):
    reference, _ = finished
    longer = replace(cfg, run=replace(cfg.run, steps=2 * STEPS))
    program = programs.build(with_init(longer, reference), replicates_of(longer))
    state, step = restore.start_state(program, tmp_path)
    assert step == STEPS
    assert_same(jax.device_get(state), state_at(cfg, reference, STEPS))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{none}", "no checkpoints in"),
        ("{none}@15", "no checkpoints in"),
        ("{run}@last", "write WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@15:published", "write WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@-15", "write WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@7", "no checkpoint of step 7; there: [15, 30]"),
        ("{run}", "step 30 is past run.steps=30"),
        ("{run}@15:2", "no replicate 2; the checkpoint has 0 to 1"),
    ],
)
def test_a_fork_that_cannot_be_is_named(cfg, finished, tmp_path, source, message):
    """No folder stays."""
    workdir = tmp_path / "new" / "fork"
    source = source.format(run=finished[0], none=tmp_path / "none")
    assert message in error_of(UserError, with_init(cfg, source), workdir)
    assert not (tmp_path / "new").exists()


def test_a_fork_of_another_shape_is_named(cfg, finished, tmp_path):
    wider = replace(cfg, model=replace(cfg.model, d_ff=128))
    message = error_of(UserError, with_init(wider, f"{finished[0]}@{SAVE}"), tmp_path / "fork")
    assert "checkpoint of another shape" in message


def broken(rep):
    """A replicate whose matrices grow a billionfold in each step of stage 2."""
    numbers = {"lr_stage2_start": 1e3, "lr_final": 1e3, "decoupled_2": 1e6}
    return replace(rep, hyper=rep.hyper.replace(**numbers))


@pytest.mark.slow
def test_a_replicate_that_diverges_freezes_and_the_others_go_on(cfg, finished, tmp_path):
    reference, whole = finished
    coupled, published = replicates_of(cfg)
    summary = run.run(cfg, [coupled, broken(published)], tmp_path / "run")
    good, bad = summary["replicates"]
    assert good == whole["replicates"][0] and summary["finished"] and summary["step"] == STEPS
    assert bad["verdict"] == "nonfinite"
    assert SAVE < bad["failed"]["step"] <= SAVE + 6 and bad["failed"]["lr"] == 1e3
    assert bad["failed"]["what"] == "the gradient of embed/embedding"
    rows, want = rows_of(tmp_path / "run"), rows_of(reference)
    assert [r for r in rows if not r["replicate"]] == [r for r in want if not r["replicate"]]
    last = [row for row in rows if row["replicate"]][-1]
    assert (last["kind"], last["failed"]) == ("eval", bad["failed"])
    assert last["step"] in (SAVE + EVERY, SAVE + 2 * EVERY)
    assert state_at(cfg, tmp_path / "run", STEPS).failed.tolist() == [0, bad["failed"]["step"]]


@pytest.mark.parametrize(
    ("parameters", "failed", "loss", "finite", "want"),
    [
        ([1, 1], 0, 2.0, [True, True], None),
        ([1, 1], 18, 2.0, [True, False], (18, "the gradient of b")),
        ([1, 1], 18, 2.0, [False, False], (18, "the gradient of b")),
        ([1, 9], 18, np.nan, [False, False], (18, "the loss (largest parameter: b, 9)")),
        ([np.inf, 1], 18, np.nan, [False, False], (17, "the update of a")),
        ([1, np.inf], 0, 2.0, [True, True], (20, "the update of b")),
    ],
)
def test_the_first_step_and_tensor_that_broke_are_named(
    cfg, parameters, failed, loss, finite, want
):
    """Of steps 16 to 20 of one replicate with parameters a and b."""
    program = SimpleNamespace(cfg=cfg, replicates=replicates_of(cfg))
    state = SimpleNamespace(params={k: np.array([x]) for k, x in zip("ab", parameters)})  # noqa: B905
    trained = {
        "failed": np.array([failed]),
        "losses": np.array([[2.0, 2.0, loss, 2.0, 2.0]]),
        "grad_finite": np.array([[[True, True]] * 2 + [finite] + [[True, True]] * 2]),
    }
    evaluated = {"eval/loss": np.array([2.0 if np.isfinite(parameters).all() else np.nan])}
    failure = describe_failure(program, state, 0, 20, trained, evaluated)
    assert (failure and (failure["step"], failure["what"])) == want
    if failure:
        rate = optim.learning_rate(program.replicates[0].hyper, failure["step"], cfg.run)
        assert failure["lr"] == pytest.approx(float(rate), rel=1e-5)


@pytest.mark.slow
def test_a_run_with_a_failed_replicate_resumes_bitwise(cfg, tmp_path, monkeypatch):
    coupled, published = replicates_of(cfg)
    replicates = [coupled, broken(published)]
    run.run(cfg, replicates, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(run.Interrupted):
        interrupt_at(patch, signal.SIGTERM, SAVE + EVERY)
        run.run(cfg, replicates, tmp_path / "run")
    summary = run.run(cfg, replicates, tmp_path / "run", resume=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert summary["replicates"][1]["failed"]["lr"] == 1e3


@pytest.mark.slow
def test_one_replicate_alone_stops_when_it_fails(cfg, tmp_path):
    summary = run.run(cfg, [broken(replicates_of(cfg)[1])], tmp_path / "run")
    assert summary["finished"] and SAVE < summary["step"] < STEPS
    assert checkpoint.kept_steps(tmp_path / "run") == [SAVE]
    assert all(np.isfinite(x) for row in rows_of(tmp_path / "run") for x in row.values()
               if isinstance(x, float))  # fmt: skip
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_run_stops_when_all_have_collapsed_and_can_go_on(cfg, finished, tmp_path, monkeypatch):
    reference, whole = finished
    monkeypatch.setattr(verdict, "collapsed", lambda judgement: judgement.name != "init")
    summary = start(cfg, tmp_path / "run", stop_when_collapsed=True)
    assert not summary["finished"]
    assert checkpoint.kept_steps(tmp_path / "run")[-1] == summary["step"] < STEPS
    summary = start(cfg, tmp_path / "run", resume=True)
    assert summary["finished"] and summary["replicates"] == whole["replicates"]
    assert rows_of(tmp_path / "run") == rows_of(reference)


def test_a_signal_after_training_is_told_and_the_page_comes_with_a_resume(
    cfg, finished, tmp_path, monkeypatch
):
    def stop(workdir):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "summary.json").unlink()
    (folder / "report.html").unlink()
    with monkeypatch.context() as patch, pytest.raises(run.Interrupted) as caught:
        patch.setattr(run.page, "write_page", stop)
        start(cfg, folder, resume=True)
    assert caught.value.exit_status == 130
    assert start(cfg, folder, resume=True)["replicates"] == finished[1]["replicates"]
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("assignment", ["run.steps=40", "hyper.lr_peak=0.001", "data.seq_len=8"])
def test_the_command_that_is_told_goes_on_from_a_finished_run(cfg, finished, tmp_path, assignment):
    """With the number that the resumed run was refused for."""
    workdir, _ = finished
    other, hyper = presets.override(cfg, [assignment])
    with pytest.raises(UserError) as caught:
        run.run(other, presets.make_replicates(other, [0], hyper), workdir, resume=True)
    words = shlex.split(str(caught.value).partition("bitnet train ")[2])
    parser = flags.Parser("bitnet train", "")
    flags.add_run(parser, place="")
    asked = flags.resolve(parser.parse_args([*words, "--set", "run.eval_every=5"]), "train")
    name, value = assignment.partition("=")[::2]
    section, field = name.split(".")
    part = asked.replicates[1].hyper if section == "hyper" else getattr(asked.cfg, section)
    assert getattr(part, field) == float(value) and asked.cfg.run.steps > STEPS
    program = programs.build(asked.cfg, asked.replicates)
    assert restore.start_state(program, asked.workdir)[1] == STEPS


# The workdir


def test_two_cannot_hold_a_workdir(tmp_path):
    folder = tmp_path / "runs" / "run"
    with (
        workdir.occupied(folder, resume=False),
        pytest.raises(UserError) as caught,
        workdir.occupied(folder, resume=True),
    ):
        pass
    assert f"{folder}: in use by process {os.getpid()} on " in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_lock_that_a_dead_process_left_holds_nothing(tmp_path):
    (tmp_path / workdir.LOCK).write_text("process 1 on elsewhere")
    with workdir.occupied(tmp_path, resume=False):
        pass
    assert not any(tmp_path.iterdir())


def test_what_was_there_before_a_failed_start_stays(tmp_path):
    with pytest.raises(KeyError), workdir.occupied(tmp_path / "runs" / "run", resume=False):
        (tmp_path / "runs" / "other").mkdir()
        raise KeyError
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_page_that_cannot_be_written_is_named(cfg, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert f"{folder / 'report.html'}: " in error_of(UserError, cfg, folder, resume=True)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"", b"\xff\xfe", b"{}", None])
def test_a_damaged_file_of_a_workdir_is_one_line_or_made_again(
    cfg, finished, tmp_path, name, content
):
    """None: a folder stands in its place."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "summary.json").rename(tmp_path / "summary.json")
    path = folder / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content + b"\n")
    try:
        summary = start(cfg, folder, resume=True)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert name != "config.json" and summary["finished"]


@pytest.mark.parametrize("step", [SAVE, STEPS])
def test_a_checkpoint_has_the_evaluations_up_to_it(finished, step):
    rows = restore.evaluations(finished[0], step, 1)
    assert [row["step"] for row in rows] == [0, *range(EVERY, step + 1, EVERY)]
    assert {(row["kind"], row["replicate"]) for row in rows} == {("eval", 1)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.json", '"n_params": '),
        ("summary.json", '"loss": '),
        ("metrics.jsonl", '"eval/loss": '),
    ],
)
def test_a_value_that_was_edited_is_not_shown(cfg, finished, tmp_path, name, value):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    text = (folder / name).read_text()
    (folder / name).write_text(text[::-1].replace(value[::-1], f"{value}1"[::-1], 1)[::-1])
    page = (folder / "report.html").read_bytes()
    assert str(folder / name) in error_of(UserError, cfg, folder, resume=True)
    assert (folder / "report.html").read_bytes() == page


# Whole processes


class Command:
    """`python -m bitnet_jax train` on a small model; all processes share compilations."""

    def __init__(self, shared, workdir):
        self.workdir = workdir
        self.metrics = workdir / "metrics.jsonl"
        fields = {
            "model.n_layers": 1,
            "data.corpus": f"text:{shared / 'corpus.txt'}",
            "run.steps": 180,
            "run.eval_every": 5,
            "run.save_every": 15,
            "run.checkpoint_every": 100,
        }
        self.arguments = ["-m", "bitnet_jax", "train", "--preset", "tiny"]
        self.arguments += ["--workdir", str(workdir)]
        for name, value in fields.items():
            self.arguments += ["--set", f"{name}={value}"]
        self.env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
        }

    def start(self):
        return subprocess.Popen(
            [sys.executable, *self.arguments, "--resume"],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def signal_after(self, signum, rows, delay):
        """Start or resume, send a signal once there are so many rows; returns status and output."""
        process = self.start()
        while process.poll() is None and self.rows() < rows:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    def rows(self):
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def state(self):
        step = checkpoint.kept_steps(self.workdir)[-1]
        assert step == 180
        cfg, replicates = config_file.from_json(checkpoint.load_config(self.workdir, step))
        return jax.device_get(
            checkpoint.restore(self.workdir, step, programs.build(cfg, replicates).abstract_state)
        )


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """The command, run to its end without a stop."""
    command = Command(shared, tmp_path_factory.mktemp("whole"))
    command.finish()
    return command


@pytest.mark.slow
def test_stopped_again_and_again(shared, whole, tmp_path):
    """Signals between and inside chunks and saves, from the first rows to nearly the last."""
    command = Command(shared, tmp_path / "run")
    rng = random.Random(0)
    stops = [signal.SIGKILL] * KILLS
    stops[1:1] = [signal.SIGINT]
    stops[-1:-1] = [signal.SIGTERM]
    places = [0.01, *sorted(rng.uniform(0.1, 0.9) for _ in stops[1:])]
    for signum, place in zip(stops, places, strict=True):
        rows = int(place * whole.rows())
        delay = rng.uniform(0, 0.1) if signum == signal.SIGKILL else 0
        status, output = command.signal_after(signum, rows, delay)
        if signum == signal.SIGKILL:
            assert status == -signal.SIGKILL, output
        else:
            assert status == 128 + signum and "Traceback" not in output
            step = checkpoint.kept_steps(command.workdir)[-1]
            last = output.splitlines()[-1]
            assert last.startswith(f"stopped at step {step} and saved; go on with: bitnet train ")
            assert last.endswith(f"--resume --workdir {command.workdir}")
    command.finish()
    assert command.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(command.state(), whole.state())
