"""The committed rows: each has a place of its own; those of before give what was told of them."""

import pytest

from bitnet_jax.metrics import ENTROPY, LOSS
from experiments.lab import rows, stats, studies
from experiments.lab.studies import FULL_BEFORE


def of_study(name, study):
    return next(
        rows.frame(members)
        for identity, members in rows.by_study(rows.read(name))
        if studies.named(identity) == study
    )


@pytest.mark.parametrize(
    ("arm", "column", "spec", "printed"),
    [
        ("coupled", LOSS, ".2f", "9.42 [9.29, 9.55]"),
        ("AdamW for Adam", LOSS, ".2f", "7.03 [7.01, 7.05]"),
        ("published", "unique_stage1", ".1f", "8.3 [8.0, 8.6]"),
        ("coupled", ENTROPY, ".2f", "10.50 [10.45, 10.56]"),
        ("coupled", "above_1.1/all", ",.0f", "979,300 [978,397, 980,202]"),
        ("published", "numbers/loss_mean", ".2f", "6.33 [6.28, 6.37]"),
    ],
)
def test_means_of_the_headline_table(arm, column, spec, printed):
    mean = stats.mean(of_study("end_collapse", FULL_BEFORE), arm, column)
    assert mean.text(spec) == printed


def test_a_paired_difference():
    df = of_study("end_collapse", FULL_BEFORE)
    difference = stats.difference(df, "AdamW for Adam", "coupled", LOSS)
    assert difference.text("+.2f") == "-2.39 [-2.51, -2.26]"


def test_every_committed_row_has_a_place_of_its_own_and_a_named_study():
    names = [p.stem for p in rows.FOLDER.glob("*.jsonl") if not p.stem.startswith("bench_")]
    for name in names:
        study_rows = rows.read(name)
        assert len({rows.place(row) for row in study_rows}) == len(study_rows)
        assert all(studies.named(identity) for identity, _ in rows.by_study(study_rows))
