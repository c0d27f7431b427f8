"""A run ends bitwise the same however often it is stopped, and says in one line why it cannot."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bitnet_jax import checkpoint, collapse, config, log, optim, presets, run
from bitnet_jax import program as programs
from bitnet_jax.config import UserError

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
    expected = "config.json metrics.jsonl checkpoints tb summary.json report.html"
    assert names == set(expected.split())
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (summary["step"], summary["finished"]) == (STEPS, True)
    assert [r["name"] for r in summary["replicates"]] == ["report", "b158"]
    described = json.loads((workdir / "config.json").read_text())
    written, replicates = config.from_json(described)
    assert replicates == replicates_of(cfg)
    assert written == programs.resolve_vocab(cfg, 300)
    assert {"provenance", "corpus", "references", "n_params", "decay_table"} <= set(described)
    assert checkpoint.kept_steps(workdir) == [SAVE, STEPS]
    assert [len(list(board.iterdir())) for board in (workdir / "tb").iterdir()] == [1, 1]


def test_rows_are_complete_and_valid_json(finished):
    def forbid(token):
        raise AssertionError(f"{token} is not JSON")

    workdir, _ = finished
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=forbid) for line in lines]
    places = [(row["step"], row["kind"], row["replicate"]) for row in rows]
    assert places == [(0, "eval", 0), (0, "eval", 1)] + [
        (step, kind, i) for step in ENDS for kind in ("train", "eval") for i in (0, 1)
    ]
    tokens = {row["step"]: row["train/tokens"] for row in rows if row["kind"] == "train"}
    assert tokens == {step: step * 4 * 16 for step in ENDS}


def test_rows_and_summary_hold_the_verdict_of_the_history(cfg, finished):
    """Recomputed from the rows: those of a step's training belong to its evaluation."""
    workdir, summary = finished
    rows = rows_of(workdir)
    references = json.loads((workdir / "config.json").read_text())["references"]
    for i, rep in enumerate(replicates_of(cfg)):
        sum_lr = np.cumsum(optim.learning_rate(rep.hyper, np.arange(STEPS + 1), cfg.run))
        history, train = [], {}
        for row in (row for row in rows if row["replicate"] == i):
            if row["kind"] == "train":
                train = row
                continue
            history.append(train | row | {"sum_lr": float(sum_lr[row["step"]])})
            want = collapse.verdict(history, references)
            found = [row[f"collapse/{key}"] for key in ("verdict", "evidence", "next", "warnings")]
            assert found == [want.name, want.evidence, want.next, list(want.warnings)]
        last = summary["replicates"][i]
        assert [last[key] for key in ("verdict", "evidence", "next", "warnings")] == found
    assert "decay/norm_ratio_embedding" in history[-1]


def test_a_resumed_run_judges_by_the_rows_before(cfg, finished):
    """As bytes too, in the tests below; here the history is long enough to tell."""
    program = programs.build(cfg, replicates_of(cfg))
    far = 1e3 + np.arange(2)
    numbers = {f"collapse/{k}": far for k in ("mutual_information", "unigram_kl", "logit_std")}
    numbers |= {"eval/loss": far, "collapse/entropy": far - 5}
    whole, written = run.row_maker(program), []
    for step in (5, 10, 15, 20):
        rows = whole(step, {"train/lr": far}, numbers)
        assert run.row_maker(program, written)(step, {"train/lr": far}, numbers) == rows
        written += json.loads(json.dumps(rows))
    assert [row["collapse/verdict"] for row in written if row["kind"] == "eval"] == [
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
        ("data.seed=1", "data.seed=0, not 1"),
        ("data.seq_len=8", "data.seq_len=16, not 8"),
        ("optim.beta2=0.9", "optim.beta2=0.95, not 0.9"),
        ("run.recipes=b158", "run.recipes=['report', 'b158'], not ['b158']"),
    ],
)
def test_resuming_with_other_settings_is_refused(cfg, finished, assignment, message):
    workdir, _ = finished
    before = contents(workdir)
    other, _ = presets.override(cfg, [assignment])
    assert f"was started with {message}" in error_of(UserError, other, workdir, resume=True)
    assert contents(workdir) == before


def test_resuming_with_other_replicates_is_refused(cfg, finished):
    workdir, _ = finished
    for others in (presets.make_replicates(cfg, [1], {}), replicates_of(cfg, lr_peak=1e-3)):
        with pytest.raises(UserError, match="other recipes, seeds or hyper"):
            run.run(cfg, others, workdir, resume=True)


def test_resuming_on_another_corpus_is_refused(cfg, finished, tmp_path):
    """The same path with another text in it would go on with other tokens."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    moved = replace(cfg, data=replace(cfg.data, corpus=f"text:{corpus}"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    described = json.loads((finished[0] / "config.json").read_text())
    described["data"]["corpus"] = moved.data.corpus
    (workdir / "config.json").write_text(json.dumps(described))
    corpus.write_text(TEXT.replace("cats", "cows"))
    assert "corpus" in error_of(UserError, moved, workdir, resume=True)


def test_vocab_mismatch_names_both_sizes(cfg, tmp_path):
    other = replace(cfg, model=replace(cfg.model, vocab_size=299))
    message = error_of(UserError, other, tmp_path / "run")
    assert "model.vocab_size=299" in message and "bpe:300 has 300 tokens" in message
    assert not any((tmp_path / "run").iterdir())


def interrupt_at(monkeypatch, signum, step):
    """Deliver a signal to this process while the rows of `step` are written."""
    write = log.Metrics.write

    def write_and_kill(self, rows):
        write(self, rows)
        if rows[0]["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(log.Metrics, "write", write_and_kill)


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
    found, want = (json.loads((w / "summary.json").read_text()) for w in (workdir, reference))
    assert found["replicates"] == want["replicates"]


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
    state, step = programs.start_state(program, tmp_path)
    assert step == SAVE
    assert jax.tree.map(lambda x: x.sharding, state) == program.state_sharding
    one = jax.tree.map(lambda x: x[1], state_at(cfg, reference, SAVE))
    for i in (0, 1):
        assert_same(jax.tree.map(lambda x, i=i: np.asarray(x[i]), state), one)


def test_a_fork_without_a_step_takes_the_last(cfg, finished, tmp_path):
    reference, _ = finished
    longer = replace(cfg, run=replace(cfg.run, steps=2 * STEPS))
    program = programs.build(with_init(longer, reference), replicates_of(longer))
    state, step = programs.start_state(program, tmp_path)
    assert step == STEPS
    assert_same(jax.device_get(state), state_at(cfg, reference, STEPS))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{none}", "no checkpoints in"),
        ("{none}@15", "no checkpoints in"),
        ("{run}@last", "write it as WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@15:b158", "write it as WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@-15", "write it as WORKDIR[@STEP[:REPLICATE]]"),
        ("{run}@7", "no checkpoint of step 7; there: [15, 30]"),
        ("{run}", "step 30 is past run.steps=30"),
        ("{run}@15:2", "no replicate 2; the checkpoint has 0 to 1"),
    ],
)
def test_a_fork_that_cannot_be_is_named(cfg, finished, tmp_path, source, message):
    """Nothing stays in the workdir, so the corrected command is not refused."""
    workdir = tmp_path / "fork"
    source = source.format(run=finished[0], none=tmp_path / "none")
    assert message in error_of(UserError, with_init(cfg, source), workdir)
    assert not any(workdir.iterdir())


def test_a_fork_of_another_shape_is_named(cfg, finished, tmp_path):
    wider = replace(cfg, model=replace(cfg.model, d_ff=128))
    message = error_of(UserError, with_init(wider, f"{finished[0]}@{SAVE}"), tmp_path / "fork")
    assert "checkpoint of another shape" in message


def test_failure_names_step_replicate_and_tensor(cfg, finished, tmp_path):
    """The first update of stage 2 is infinite for the second replicate; the next one meets it."""
    reference, _ = finished
    report, b158 = replicates_of(cfg)
    b158 = replace(b158, hyper=b158.hyper.replace(lr_stage2_start=float("inf")))
    with pytest.raises(run.TrainingFailed) as caught:
        run.run(cfg, [report, b158], tmp_path / "run")
    message = str(caught.value)
    assert f"step {SAVE + 2}, replicate 1 (b158, seed 0): parameter block_0/attn/k/ker" in message
    assert message.endswith(f"is not finite; last good checkpoint: step {SAVE}")
    assert "\n" not in message
    assert checkpoint.kept_steps(tmp_path / "run") == [SAVE]
    assert_same(state_at(cfg, tmp_path / "run", SAVE), state_at(cfg, reference, SAVE))
    assert {row["step"] for row in rows_of(tmp_path / "run")} == {0, 5, 10, 15}


# Whole processes


class Command:
    """`python -m experiments.train` on a small model, with compilations shared by all processes."""

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
        self.arguments = ["-m", "experiments.train", "--preset", "tiny", "--workdir", str(workdir)]
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
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output

    def rows(self):
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def state(self):
        step = checkpoint.kept_steps(self.workdir)[-1]
        assert step == 180
        cfg, replicates = config.from_json(checkpoint.load_config(self.workdir, step))
        return jax.device_get(
            checkpoint.restore(self.workdir, step, programs.build(cfg, replicates).abstract_state)
        )


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """The command, run to its end without a stop."""
    command = Command(shared, tmp_path_factory.mktemp("whole"))
    command.finish()
    return command


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
            assert output.splitlines()[-1] == (
                f"stopped at step {step} and saved; go on with --resume --workdir {command.workdir}"
            )
    command.finish()
    assert command.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(command.state(), whole.state())
