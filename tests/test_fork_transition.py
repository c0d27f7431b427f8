"""Forks at the stage boundary: arms differ in stage 2 only, and the restored run repeats itself."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bitnet_jax import checkpoint, log, optim, presets
from bitnet_jax import program as programs
from bitnet_jax.config import Config, RunConfig, UserError
from experiments import common, fork_transition, stats, sweep, training_length
from experiments.fork_transition import (
    CONTINUED,
    DECAY_ONLY,
    FORKS,
    FULL,
    KINDS,
    LOSS,
    LR_ONLY,
    RESET,
    UNFORKED,
)

STEPS, BOUNDARY = 8, 4
RUN = RunConfig(steps=1000)
REPORT = presets.RECIPES["report"](1000)


def schedule(fork):
    """Learning rate and decay of updates 1 .. 1000 of an arm of the report's recipe."""
    n = np.arange(1, RUN.steps + 1)
    hyper = fork_transition.numbers(fork, REPORT)
    decay = optim.by_stage(n, RUN, hyper.coupled_1, hyper.coupled_2)
    return np.asarray(optim.learning_rate(hyper, n, RUN)), np.asarray(decay)


@pytest.mark.parametrize("fork", FORKS)
def test_arms_share_stage_1(fork):
    for mine, recipe in zip(schedule(fork), schedule(FULL), strict=True):
        np.testing.assert_array_equal(mine[:500], recipe[:500])


@pytest.mark.parametrize(
    ("fork", "held", "decay"),
    [(FULL, False, 0.05), (RESET, False, 0.05), (CONTINUED, True, 0.1), (LR_ONLY, False, 0.1),
     (DECAY_ONLY, True, 0.05)],
)  # fmt: skip
def test_stage_2_of_an_arm_has_the_rate_and_the_decay_of_its_name(fork, held, decay):
    rates, decays = schedule(fork)
    np.testing.assert_array_equal(decays[500:], np.float32(decay))
    if held:
        np.testing.assert_array_equal(rates[500:], np.float32(1e-3))
    else:
        np.testing.assert_array_equal(rates, schedule(FULL)[0])
        np.testing.assert_allclose(rates[-1], 1.5e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Forks are runs of one program: compiled once for all of them."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for chosen in (settings, before):
        for name, value in chosen.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if chosen is settings:
            yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_folder, compilations):
    """A request, the rows of its runs that were not stopped, and their workdir."""
    folder = tmp_path_factory.mktemp("fork")
    text = "\n".join(f"the {n} cats sat on {n % 7} mats, and {n * n} dogs ran." for n in range(900))
    (folder / "corpus.txt").write_text(text)
    tiny = presets.preset("tiny")
    cfg = Config(
        dataclasses.replace(tiny.model, n_layers=1),
        dataclasses.replace(tiny.data, corpus=f"text:{folder / 'corpus.txt'}"),
        run=RunConfig(STEPS, eval_every=2, save_every=STEPS),
    )
    arms = [sweep.Arm(f"{kind} {UNFORKED}", recipe) for kind, recipe in KINDS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        request = common.Request("tiny", cfg, [3], {}, [], folder / "sweep", True, None)
        rows = sweep.train_arms(
            "fork", request, arms, extra=fork_transition.details, keep_checkpoints=True
        )
        (source,) = {request.workdir / row["id"].rpartition("/")[0] for row in rows}
        yield request, rows, source


def test_the_restored_run_repeats_the_one_not_stopped(trained):
    """Every number of stage 2 in the log, and every bit of the state at the end."""
    request, rows, source = trained
    forked = fork_transition.train_fork(request, source, FULL)
    assert [(row["arm"], row["seed"]) for row in forked] == [(f"{k} {FULL}", 3) for k in KINDS]
    assert fork_transition.differing(rows + forked) == []
    for key in ("final", "boundary", "curve", "unique_stage1", "fingerprint"):
        assert [row[key] for row in forked] == [row[key] for row in rows]


def test_an_arm_with_other_numbers_shares_the_past_and_ends_elsewhere(trained):
    request, rows, source = trained
    arms = fork_transition.train_fork(request, source, CONTINUED)
    for row, whole in zip(arms, rows, strict=True):
        past = row["curve"]["step"].index(BOUNDARY) + 1
        assert row["curve"][LOSS][:past] == whole["curve"][LOSS][:past]
        assert row["boundary"] == whole["boundary"]
        assert row["fingerprint"]["state"] != whole["fingerprint"]["state"]
    assert fork_transition.train_fork(request, source, CONTINUED) == arms


def test_a_reset_starts_from_new_moments_and_the_old_schedule(trained):
    request, _, source = trained
    run = dataclasses.replace(
        request.cfg.run, init=f"fork:{source}@{BOUNDARY}", reset_optimizer=True
    )
    _, members = programs.config.from_json(json.loads((source / "config.json").read_text()))
    program = programs.build(dataclasses.replace(request.cfg, run=run), members)
    state, step = programs.start_state(program, source.parent / "nowhere")
    saved = checkpoint.restore(source, BOUNDARY, program.abstract_state)
    adam = saved.opt_state["adam"]
    assert step == BOUNDARY and np.asarray(adam.count).tolist() == [BOUNDARY, BOUNDARY]
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adam.mu))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state["adam"]))
    assert np.asarray(state.opt_state["lr"].count).tolist() == [BOUNDARY, BOUNDARY]
    rest = [s.replace(opt_state={**s.opt_state, "adam": None}) for s in (state, saved)]
    for mine, theirs in zip(*map(jax.tree.leaves, rest), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_only_a_fork_can_reset():
    with pytest.raises(UserError, match=r"run.reset_optimizer=true: only a fork can"):
        RunConfig(reset_optimizer=True)


def test_a_source_without_the_boundary_is_named_in_one_line(trained, tmp_path):
    """And a corrected command goes on."""
    request, _, source = trained
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    shutil.rmtree(copy / "checkpoints" / str(BOUNDARY))
    other = dataclasses.replace(request, workdir=tmp_path / "sweep")
    with pytest.raises(UserError, match=r"no checkpoint of the stage boundary \(step 4\)") as error:
        fork_transition.train_fork(other, copy, FULL)
    assert "\n" not in str(error.value)
    assert not other.workdir.exists()


def test_the_log_of_a_fork_is_not_begun_twice(trained, tmp_path):
    """A resumed fork keeps the rows that it has written."""
    _, _, source = trained
    fork_transition.begin_log(tmp_path / "fork", source, BOUNDARY)
    path = tmp_path / "fork" / "metrics.jsonl"
    assert {row["step"] for row in log.read_rows(path)} == {0, 2, 4}
    path.write_text(path.read_text() + json.dumps({"step": 6}) + "\n")
    fork_transition.begin_log(tmp_path / "fork", source, BOUNDARY)
    assert log.read_rows(path)[-1] == {"step": 6}


def test_a_run_that_stops_early_is_the_beginning_of_the_longer_one(trained, tmp_path):
    """What `training_length` reads off its longest run; a number of the log that is off is found.

    Tested here because a finished run is at hand.
    """
    _, _, source = trained
    assert training_length.stops_identically(source, BOUNDARY) == [True, True]
    rows = log.read_rows(source / "metrics.jsonl")
    for row in rows:
        if (row["step"], row["replicate"], row["kind"]) == (2, 1, "eval"):
            row[LOSS] += 1e-6
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(source / "config.json", tmp_path)
    assert training_length.stops_identically(tmp_path, BOUNDARY) == [True, False]


# What is concluded from rows


def made_rows(losses, before=(8.0, 7.0), seeds=3):
    """Rows of all arms: {(kind, fork): loss at T} plus a little per seed; unigram's loss 7."""
    rows = []
    for k, kind in enumerate(KINDS):
        for fork in (UNFORKED, *FORKS):
            for seed in range(seeds):
                loss = losses.get((kind, fork), losses[kind]) + 0.01 * seed
                final = {
                    LOSS: loss,
                    "collapse/entropy": 5.0,
                    "collapse/mutual_information": 8 - loss,
                    "collapse/logit_std": 1.0,
                    "collapse/unique_tokens": 9,
                    "collapse/verdict": "healthy",
                }
                boundary = {key: final[key] for key in fork_transition.BOUNDARY_KEYS}
                curve = {"step": [0, 5, 10], LOSS: [8, 8, loss]}
                rows.append(
                    {
                        "arm": f"{kind} {fork}",
                        "seed": seed,
                        "steps": 10,
                        "final": final,
                        "boundary": boundary | {LOSS: before[k] + 0.02 * seed},
                        "fingerprint": {"rows": "a", "state": "b"},
                        "curve": curve | {"collapse/mutual_information": [0, 0, 8 - loss]},
                        "references": {
                            **{
                                name: {"loss": x, "entropy": x, "distinct": 1}
                                for name, x in (("uniform", 8), ("unigram", 7), ("bigram", 5))
                            },
                            "targets": {"distinct": 30},
                            "tracked_positions": 128,
                        },
                    }
                )
    return rows


def test_a_collapse_with_and_without_the_transition_is_not_triggered_by_it():
    rows = made_rows({"coupled": 7.8, "decoupled": 6.0, ("coupled", CONTINUED): 7.9})
    study = fork_transition.analyse(rows)
    coupled, decoupled, on_coupled, on_decoupled, before = study.conclusion.split("; ")
    assert "above the unigram's loss with the transition or not, so it is no trigger" in coupled
    assert "below the unigram's loss with the transition or not: no collapse" in decoupled
    assert "coupled recipe's loss: -0.10 [-0.10, -0.10] (n=3)" in on_coupled
    assert "no effect seen (n=3)" in on_decoupled
    assert before == "of coupling, before the transition: +1.00 [+1.00, +1.00] (n=3)"
    assert "restored run bit-identical to the one not stopped: 6 of 6" in study.result


def test_runs_too_short_for_the_healthy_recipe_show_no_collapse():
    study = fork_transition.analyse(made_rows({"coupled": 7.8, "decoupled": 7.5}))
    assert "a collapse cannot be told from a young model" in study.conclusion
    assert "trigger" not in study.conclusion


def test_a_collapse_only_with_the_transition_is_triggered_by_it():
    losses = {"coupled": 7.8, "decoupled": 6.0, ("coupled", CONTINUED): 6.5}
    assert "only with the transition, which triggers it" in (
        fork_transition.analyse(made_rows(losses)).conclusion
    )


@pytest.mark.parametrize(
    ("with_", "without", "told"),
    [((-1, -0.5), (0.5, 1), "which ends it"), ((-1, 1), (0.5, 1), "cannot be judged with n=3"),
     ((-1, -0.5), (-1, -0.5), "no collapse")],
)  # fmt: skip
def test_judgement_needs_intervals_that_exclude_the_unigram(with_, without, told):
    intervals = [stats.Interval((a + b) / 2, a, b, 3) for a, b in (with_, without)]
    assert told in fork_transition.judge(*intervals)


def test_one_seed_shows_no_effect():
    study = fork_transition.analyse(made_rows({"coupled": 7.8, "decoupled": 6.0}, seeds=1))
    assert study.n == 1 and "cannot be told" in study.conclusion
    assert "no effect seen (n=1)" in study.conclusion


def test_a_restored_run_that_differs_is_found():
    rows = made_rows({"coupled": 7.8, "decoupled": 6.0})
    for row in rows:
        if (row["arm"], row["seed"]) == (f"decoupled {FULL}", 2):
            row["fingerprint"] = {"rows": "a", "state": "c"}
    assert fork_transition.differing(rows) == ["decoupled, seed 2"]
    assert "5 of 6" in fork_transition.analyse(rows).result


def test_tables_pair_every_arm_with_both_controls():
    study = fork_transition.analyse(
        made_rows({"coupled": 7.8, "decoupled": 6.0, ("coupled", LR_ONLY): 7.3})
    )
    against = {table.title: table for table in study.tables}
    for control in (CONTINUED, FULL):
        names = {line[0] for line in against[f"Against {control}"].rows}
        assert names == {
            f"{kind} {fork} - {kind} {control}"
            for kind in KINDS
            for fork in FORKS
            if fork != control
        }
    (line,) = [
        line
        for line in against[f"Against {FULL}"].rows
        if line[0] == f"coupled {LR_ONLY} - coupled {FULL}"
    ]
    assert line[1] == "-0.500 [-0.500, -0.500]"
    assert "smallest p that n = 3 seeds can give is 0.25" in study.tables[-1].note
