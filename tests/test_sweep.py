"""A sweep: its arms become replicates and rows, and a repeated command repeats no training."""

import dataclasses
import json
import math

import pytest

from bitnet_jax import log, run
from bitnet_jax.config import UserError
from experiments import common, compare, page, results, sweep
from tests.conftest import tiny_config

ARMS = [
    sweep.Arm("coupled", "report"),
    sweep.Arm("slow", "b158", {"lr_peak": 1e-5, "lr_stage1_end": 1e-5}),
    sweep.Arm("wide", "b158", model={"d_model": 48}),
]


@pytest.fixture(scope="module")
def request_(tmp_path_factory, cache_folder):
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        tiny = tiny_config(folder)
        cfg = dataclasses.replace(tiny, run=dataclasses.replace(tiny.run, steps=4, eval_every=2))
        yield common.Request("tiny", cfg, [3, 5], {}, [], folder / "sweep", True, None)


@pytest.fixture(scope="module")
def trained(request_):
    return sweep.train_arms("trial", request_, ARMS, extra=lambda workdir, cfg, i: {"index": i})


def test_rows_come_by_arm_then_seed_whatever_program_trained_them(trained):
    assert [(row["arm"], row["seed"]) for row in trained] == [
        (arm.name, seed) for arm in ARMS for seed in (3, 5)
    ]
    assert [row["model"]["d_model"] for row in trained] == [32] * 4 + [48] * 2
    assert [row["index"] for row in trained] == [0, 1, 2, 3, 0, 1]
    assert trained[2]["hyper"]["lr_peak"] == 1e-5
    assert all(math.isfinite(row["final"]["eval/loss"]) for row in trained)
    assert len({row["id"] for row in trained}) == 6


def test_the_same_sweep_again_trains_nothing_and_gives_the_same_rows(
    request_, trained, monkeypatch
):
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert sweep.train_arms("trial", request_, ARMS) == trained


def test_a_sweep_goes_on_with_the_groups_that_are_missing(request_, trained, monkeypatch):
    """As after a kill in the second of two programs: only that one is trained."""
    groups = sorted(request_.workdir.iterdir(), key=lambda p: (p / "rows.json").stat().st_mtime)
    (groups[1] / "rows.json").unlink()
    calls = []

    def no_training(cfg, replicates, workdir, *, resume):
        calls.append((workdir, len(replicates), resume))
        raise run.Interrupted("stopped", 2)

    monkeypatch.setattr(run, "run", no_training)
    with pytest.raises(run.Interrupted):
        sweep.train_arms("trial", request_, ARMS)
    assert calls == [(groups[1], 2, True)]
    log.write_json(groups[1] / "rows.json", trained[4:])


def test_groups_hold_what_fits_and_no_more(request_):
    sizes = [
        [
            len(members)
            for _, members in sweep.groups(dataclasses.replace(request_, at_once=n), ARMS)
        ]
        for n in (1, 3, None)
    ]
    assert sizes == [[1] * 6, [3, 1, 2], [4, 2]]


def test_checkpoints_go_once_the_rows_are_written(trained, request_):
    groups = list(request_.workdir.iterdir())
    assert len(groups) == 2
    assert all((path / "rows.json").exists() for path in groups)
    assert not any((path / "checkpoints").exists() for path in groups)


def test_a_mistake_in_an_arm_names_the_arm(request_):
    with pytest.raises(UserError, match=r"arm odd: model.n_heads=2 must divide model.d_model=33"):
        sweep.train_arms("trial", request_, [sweep.Arm("odd", "b158", model={"d_model": 33})])


def test_appending_rows_twice_writes_them_once(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    results.append("trial", trained[:4])
    results.append("trial", trained)
    assert results.load("trial") == json.loads(json.dumps(trained))
    with pytest.raises(UserError, match=r"other.jsonl has no rows; run experiments.other"):
        results.load("other")


def test_studies_are_rows_of_one_size_corpus_and_length(trained):
    """A longer run is another study, unless lengths are what a study compares."""
    longer = [row | {"steps": 8, "id": "longer"} for row in trained]
    labels = list(results.by_study([*trained, *longer]))
    assert [label.rpartition(", ")[2] for label in labels] == ["4 steps", "8 steps"]
    lengths = [row | {"base": 4} for row in [*trained, *longer]]
    assert list(map(len, results.by_study(lengths).values())) == [12]


def test_the_command_of_a_row_names_files_without_their_folders():
    argv = [
        "/a/b/experiments/p2.py",
        "--set",
        "data.corpus=text:/x/y/books/*.txt",
        "--workdir",
        "w",
    ]
    assert results.command(argv) == "python -m experiments.p2 --set 'data.corpus=text:*.txt'"


def test_tables_give_arms_references_and_paired_differences(trained):
    table = compare.arm_table(trained)
    names = [row[0] for row in table.rows]
    assert names[:3] == ["coupled", "slow", "wide"]
    assert names[3:] == ["bigram predictor", "unigram predictor", "uniform predictor", "the text"]
    found = compare.difference(trained, "slow", "coupled", "eval/loss")
    losses = {(row["arm"], row["seed"]): row["final"]["eval/loss"] for row in trained}
    want = [losses["slow", s] - losses["coupled", s] for s in (3, 5)]
    assert found.mean == pytest.approx(sum(want) / 2)


def test_a_page_holds_its_studies_and_escapes_their_text(trained, tmp_path):
    table = page.Table("Numbers", ["arm", "x"], [["a < b", "1"]])
    study = page.Study("two arms", 2, "x rose", "a < b holds", [table], [("cap", "<svg></svg>")])
    path = page.write(tmp_path / "p.html", "trial", "Why?\n\nBecause.", {"small": study}, trained)
    text = path.read_text()
    for part in ("<h1>Why?</h1>", "A &lt; b holds.", "<svg></svg>", "a &lt; b</th>", "6 rows"):
        assert part in text
    assert "conclusion: A < b holds." in page.console("small", study)


def test_the_cost_of_a_resumed_run_counts_all_its_steps():
    whole = {"step": 1000, "resumed_from": 0, "wall_seconds": 80.0}
    assert results.wall_seconds(whole) == 80.0
    assert results.wall_seconds(whole | {"resumed_from": 750, "wall_seconds": 20.0}) == 80.0
    assert results.wall_seconds(whole | {"resumed_from": 1000, "wall_seconds": 1.0}) == 1.0
