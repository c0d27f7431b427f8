"""Edges of rows that are so by construction, and what counts as a right prediction."""

import pytest

from bitnet_jax import metrics
from experiments import critical_decay as study
from experiments.lab import edges, rows


def test_onset_is_where_the_middle_seed_halves_its_spread():
    least = [[0.9, 0.6, 0.4], [0.9, 0.6, 0.4], [0.9, 0.9, 0.9]]
    assert edges.onset([0.01, 0.1, 1.0], least) == pytest.approx(10**-0.5)
    assert edges.onset([0.01, 0.1, 1.0], [[0.4, 0.3, 0.2]]) == 0


def test_outcome_is_where_half_of_the_seeds_have_not_learned():
    learned = [[True, True, False], [True, False, False], [True, True, False]]
    assert edges.outcome([0.01, 0.1, 1.0], learned) == pytest.approx(10**-0.75)
    assert edges.outcome([0.01, 0.1, 1.0], [[True] * 3]) is None


def test_blind_is_half_way_from_the_unigram_to_uniform():
    assert edges.blind([0.01, 0.1], [[6.0, 8.0]], 6.0, 8.0) == pytest.approx(10**-1.5)
    assert edges.blind([0.01, 0.1], [[7.5, 8.0]], 6.0, 8.0) == 0


@pytest.mark.parametrize(("predicted", "right"), [(0.051, True), (0.199, True), (0.049, False)])
def test_an_edge_is_right_within_a_factor_of_2(predicted, right):
    assert edges.right_edge(predicted, 0.1, [0.01, 1.0]) is right


def test_an_edge_beyond_the_decays_that_were_run_can_only_be_told_wrong():
    assert edges.right_edge(None, 0.1, [0.01, 1.0]) is False
    assert edges.right_edge(0.1, None, [0.01, 1.0]) is False
    assert edges.right_edge(0.6, None, [0.01, 1.0]) is None
    assert edges.right_edge(0.1, 0.0, [0.01, 1.0]) is False
    assert edges.right_edge(0.015, 0.0, [0.01, 1.0]) is None


TOLD = {
    "onset": 0.01,
    "outcome": None,
    "blind": 0.1,
    "decays": {
        "0.01": {"half_step": 50.0, "loss": 6.0, "expected": "no collapse by decay"},
        "0.1": {"half_step": 40.0, "loss": 7.0, "expected": "collapse"},
    },
}
FOUND = {
    "onset": 0.015,
    "outcome": 0.02,
    "blind": 0.3,
    "unigram": 6.0,
    "decays": {
        "0.01": {"half_step": None, "loss": 5.5, "learned": 1.0},
        "0.1": {"half_step": 43.0, "loss": 7.4, "learned": 1.0},
    },
}


def test_a_point_is_judged_kind_by_kind():
    marks = edges.judged(TOLD, FOUND)
    assert marks["onset"] == [True] and marks["outcome"] == [False] and marks["blind"] == [False]
    assert marks["half_step"] == [True] and marks["loss"] == [False]
    assert marks["verdict"] == [True, False]
    heads, table_rows = edges.table({"here": (TOLD, FOUND)})
    assert {len(line) for line in table_rows} == {len(heads)}
    assert [line[1:4] for line in table_rows[-2:]] == [
        ["1 of 1", "0 of 1", "0 of 1"],  # predicted
        ["1 of 1", "1 of 1", "0 of 1"],  # the centre's for all
    ]


def test_every_point_has_arms_and_the_names_say_point_and_decay():
    for point in study.POINTS:
        names = [edges.split(arm.name) for arm in study.arms_of(point)]
        assert [name for name, _ in names] == [point] * len(names)
        assert [decay for _, decay in names] == pytest.approx(study.decays(point), rel=1e-5)


def test_the_committed_rows_give_the_edges_of_their_points():
    df = rows.frame(rows.read("critical_decay"))
    measured = edges.measure(df, "centre")
    assert {name: measured[name] for name in edges.EDGES} == edges.CENTRE
    assert measured["onset"] < measured["blind"] and measured["outcome"] < measured["blind"]
    losses = [at["loss"] for at in measured["decays"].values()]
    assert losses == sorted(losses) and metrics.HELD_OUT_LOSS in df
