"""The committed rows: each has a place of its own; those of full size give README's numbers."""

import pytest

from bitnet_jax.metrics import ENTROPY, LOSS
from experiments.lab import headline, rows, stats, studies


@pytest.mark.parametrize(
    ("arm", "column", "steps", "spec", "printed"),
    [
        ("coupled", LOSS, 1000, ".2f", "9.59 [9.49, 9.69]"),
        ("AdamW for Adam", LOSS, 1000, ".2f", "7.14 [6.60, 7.68]"),
        ("published", "unique_stage2", 1000, ".1f", "13.2 [8.7, 17.7]"),
        ("coupled", ENTROPY, 1000, ".2f", "10.66 [10.59, 10.73]"),
        ("coupled", "above_1.1/all", 1000, ",.0f", "979,294 [978,390, 980,197]"),
        ("coupled", LOSS, 10_000, ".2f", "9.94 [9.79, 10.08]"),
    ],
)
def test_means_of_the_headline_tables(arm, column, steps, spec, printed):
    assert stats.mean(headline.read(), arm, column, steps).text(spec) == printed


def test_a_paired_difference():
    difference = stats.difference(headline.read(), "AdamW for Adam", "coupled", LOSS)
    assert difference.text("+.2f") == "-2.45 [-2.87, -2.02]"


def test_every_committed_row_has_a_place_of_its_own_and_a_named_study():
    names = [p.stem for p in rows.FOLDER.glob("*.jsonl") if not p.stem.startswith("bench_")]
    for name in names:
        study_rows = rows.read(name)
        assert len({rows.place(row) for row in study_rows}) == len(study_rows)
        assert all(studies.named(identity) for identity, _ in rows.by_study(study_rows))
