"""Forks at the stage boundary: arms differ in stage 2 only, and the restored run repeats itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import checkpoint, config_file, log, optim, presets, program, restore
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import LOSS
from experiments import fork_transition as study
from experiments.fork_transition import (
    BOUNDARY_KEYS,
    CONTINUED,
    DECAY_ONLY,
    FORKS,
    KINDS,
    LR_ONLY,
    RESET,
    STAGE_2,
    UNFORKED,
)
from experiments.lab import arms, exhibits, rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.finished import RunFailed
from experiments.lab.studies import QUICK

STEPS, BOUNDARY = 8, 4
RUN = RunConfig(steps=1000)
COUPLED = presets.RECIPES["coupled"](RunConfig(steps=1000))


def schedule(fork):
    """Learning rate and decay of updates 1 .. 1000 of an arm of the coupled recipe."""
    n = np.arange(1, RUN.steps + 1)
    hyper = COUPLED.replace(**study.changes(fork, COUPLED))
    decay = optim.by_stage(n, RUN, hyper.coupled_1, hyper.coupled_2)
    return np.asarray(optim.learning_rate(hyper, n, RUN)), np.asarray(decay)


@pytest.mark.parametrize("fork", FORKS)
def test_arms_share_stage_1(fork):
    for mine, recipe in zip(schedule(fork), schedule(STAGE_2), strict=True):
        np.testing.assert_array_equal(mine[:500], recipe[:500])


@pytest.mark.parametrize(
    ("fork", "held", "decay"),
    [(STAGE_2, False, 0.05), (RESET, False, 0.05), (CONTINUED, True, 0.1), (LR_ONLY, False, 0.1),
     (DECAY_ONLY, True, 0.05)],
)  # fmt: skip
def test_stage_2_of_an_arm_has_the_rate_and_the_decay_of_its_name(fork, held, decay):
    rates, decays = schedule(fork)
    np.testing.assert_array_equal(decays[500:], np.float32(decay))
    if held:
        np.testing.assert_array_equal(rates[500:], np.float32(1e-3))
    else:
        np.testing.assert_array_equal(rates, schedule(STAGE_2)[0])


def test_numbers_of_stage_2_that_arms_set_are_refused():
    cfg = presets.preset("tiny")
    request = arms.Request("fork", "tiny", cfg, {"lr_final": 0.0}, [0], Path("unused"),
                           assigned=("hyper.lr_final",))  # fmt: skip
    with pytest.raises(UserError, match=r"hyper\.lr_final.*stage 1 continued"):
        study.train(request, list(study.ARMS), study.measure)


TWO = (STAGE_2, CONTINUED)


@pytest.fixture
def two_forks(monkeypatch):
    monkeypatch.setattr(study, "FORKS", TWO)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_folder):
    """A request for two forks of both recipes, their rows, and the workdir of what they fork."""
    folder = tmp_path_factory.mktemp("fork")
    text = "\n".join(f"the {n} cats sat on {n % 7} mats, and {n * n} dogs ran." for n in range(900))
    (folder / "corpus.txt").write_text(text)
    tiny = presets.preset("tiny")
    cfg = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, n_layers=1),
        data=dataclasses.replace(tiny.data, corpus=f"text:{folder / 'corpus.txt'}"),
        run=RunConfig(STEPS, eval_every=BOUNDARY, save_every=STEPS),
    )
    request = arms.Request("fork", "tiny", cfg, {}, [3], folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        with pytest.MonkeyPatch.context() as two:
            two.setattr(study, "FORKS", TWO)
            run_rows = study.train(request, list(study.ARMS), study.measure)
        (source,) = {
            request.workdir / row["id"].partition("/")[0]
            for row in run_rows
            if row["arm"].endswith(UNFORKED)
        }
        yield request, run_rows, source


def by_fork(run_rows, kind, fork):
    (row,) = (row for row in run_rows if row["arm"] == f"{kind} {fork}")
    return row


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_restored_run_repeats_the_one_not_stopped_and_others_share_its_past(trained, kind):
    """Every number of stage 2 in the log, and every bit of the state at the end."""
    _, run_rows, _ = trained
    whole, restored, continued = (
        by_fork(run_rows, kind, x) for x in (UNFORKED, STAGE_2, CONTINUED)
    )
    for key in ("final", "curve", "extra"):
        assert restored[key] == whole[key]
    past = whole["curve"]["step"].index(BOUNDARY) + 1
    assert continued["curve"][LOSS][:past] == whole["curve"][LOSS][:past]
    assert continued["extra"]["boundary"] == whole["extra"]["boundary"]
    prints = [row["extra"]["fingerprint"]["state"] for row in (continued, whole)]
    assert prints[0] != prints[1]


@pytest.mark.slow
def test_all_arms_are_of_one_study_and_a_repeated_command_trains_nothing(trained, two_forks):
    request, run_rows, source = trained
    assert len(rows.by_study(run_rows)) == 1 and len({rows.place(row) for row in run_rows}) == 6
    begun = (source / "metrics.jsonl").stat().st_mtime_ns
    assert study.train(request, list(study.ARMS), study.measure) == run_rows
    assert (source / "metrics.jsonl").stat().st_mtime_ns == begun


@pytest.mark.slow
def test_a_reset_starts_from_new_moments_and_the_old_schedule(trained):
    request, _, source = trained
    run = dataclasses.replace(
        request.cfg.run, init=f"fork:{source}@{BOUNDARY}", reset_optimizer=True
    )
    _, replicates = config_file.from_json(json.loads((source / "config.json").read_text()))
    built = program.build(dataclasses.replace(request.cfg, run=run), replicates)
    state, step = restore.start_state(built, source.parent / "nowhere")
    saved = checkpoint.restore(source, BOUNDARY, built.abstract_state)
    adam = saved.opt_state["adam"]
    assert step == BOUNDARY and np.asarray(adam.count).tolist() == [BOUNDARY, BOUNDARY]
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adam.mu))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state["adam"]))
    rest = [s.replace(opt_state={**s.opt_state, "adam": None}) for s in (state, saved)]
    for mine, theirs in zip(*map(jax.tree.leaves, rest), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_the_log_of_a_fork_is_not_begun_twice(trained, tmp_path):
    """A resumed fork keeps the rows that it has written."""
    _, _, source = trained
    study.begin_log(tmp_path / "fork", source, BOUNDARY)
    path = tmp_path / "fork" / "metrics.jsonl"
    assert {row["step"] for row in log.read_rows(path)} == {0, BOUNDARY}
    path.write_text(path.read_text() + json.dumps({"step": 6}) + "\n")
    study.begin_log(tmp_path / "fork", source, BOUNDARY)
    assert log.read_rows(path)[-1] == {"step": 6}


@pytest.mark.slow
def test_a_restored_run_that_differs_fails_the_command(trained, two_forks, monkeypatch):
    request, _, _ = trained
    monkeypatch.setattr(study, "differing", lambda df: ["coupled stage 2, seed 3"])
    with pytest.raises(RunFailed, match="coupled stage 2, seed 3"):
        study.train(request, list(study.ARMS), study.measure)


# ------------------------------------------------------------------------------- what rows bear out

LOSSES = {"coupled": 4.8, "decoupled": 3.0, f"coupled {CONTINUED}": 4.9,
          f"coupled {LR_ONLY}": 4.9}  # make_rows: unigram's loss 4  # fmt: skip


def make(losses=LOSSES, before=(5.2, 4.0), seeds=3):
    """Rows of all arms: the loss at T and, by recipe, at the boundary, plus a little per seed."""
    ends = {
        f"{kind} {fork}": losses.get(f"{kind} {fork}", losses[kind])
        for kind in KINDS
        for fork in (UNFORKED, *FORKS)
    }
    run_rows = make_rows(
        {arm: [loss + s / 100 for s in range(seeds)] for arm, loss in ends.items()}
    )
    for row in run_rows:
        at = dict.fromkeys(BOUNDARY_KEYS, 1.0)
        at[LOSS] = before[KINDS.index(row["arm"].split()[0])] + row["seed"] / 50
        row["extra"] |= {"boundary": at, "fingerprint": {"rows": "a", "state": "b"}}
        row["curve"] |= {"collapse/mutual_information": [0.0, 0.5]}
    return run_rows


def statuses(**more):
    df = rows.frame(make(**more))
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


def test_claims_hold_on_rows_made_to_bear_them():
    names = ("trigger", "before", "decay", "restored")
    assert statuses() == dict.fromkeys(names, HOLDS)


def test_claims_fail_on_rows_that_contradict_them():
    assert statuses(losses=LOSSES | {f"coupled {CONTINUED}": 3.0})["trigger"] == FAILS
    assert statuses(losses=LOSSES | {"decoupled": 4.5})["trigger"] == FAILS  # a young model
    assert statuses(before=(4.5, 4.0))["before"] == FAILS
    assert statuses(losses=LOSSES | {f"coupled {DECAY_ONLY}": 4.9})["decay"] == FAILS


def test_two_seeds_decide_nothing_but_the_restored_run():
    claim_statuses = statuses(seeds=2)
    assert claim_statuses.pop("restored") == HOLDS and set(claim_statuses.values()) == {UNDECIDED}


def test_a_restored_run_that_differs_is_found():
    run_rows = make()
    for row in run_rows:
        if (row["arm"], row["seed"]) == (f"decoupled {STAGE_2}", 2):
            row["extra"]["fingerprint"] = {"rows": "a", "state": "c"}
    assert study.differing(rows.frame(run_rows)) == ["decoupled stage 2, seed 2"]


def test_tables_pair_every_arm_with_stage_1_continued():
    df = rows.frame(make())
    shown = exhibits.Exhibits(df)
    study.show(df, shown)
    pairs = [row[0] for row in shown.tables[-1].rows]
    assert len(pairs) == 8 and all(pair.endswith(CONTINUED) for pair in pairs)
    assert shown.tables[0].rows[-1][1].startswith("+1.200")
