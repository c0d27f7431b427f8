"""Stage-2 decay: its arms, and claims that follow from the rows."""

import pytest
from test_lab import make_rows

from experiments import sweep_stage2_decay as study
from experiments.lab import rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.exhibits import Exhibits
from experiments.lab.studies import BOOKS


def frame(coupled=6.0, decoupled=3.0, slope=0.01, zero=3.5):
    """Three seeds of every arm; a decoupled loss rises by `slope` with the decay.

    Unigram 4, uniform 6. `zero` is that of the coupled runs whose stage 2 has no decay.
    """
    losses = {f"coupled {x:g}": coupled for x in study.DECAYS} | {"coupled 0": zero}
    losses |= {f"decoupled {x:g}": decoupled + slope * x for x in study.DECAYS}
    return rows.frame(make_rows({arm: [x, x, x] for arm, x in losses.items()}))


def statuses(df):
    return {claim.name: judge(claim, BOOKS, df).status for claim in study.CLAIMS}


def test_arms_differ_in_the_decay_of_stage_2_alone():
    assert len(study.ARMS) == 12
    for arm in study.ARMS:
        kind, _, decay = arm.name.partition(" ")
        assert (arm.recipe, arm.numbers) == (kind, {f"{kind}_2": float(decay)})


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, {"none": HOLDS, "zero": HOLDS, "harm": HOLDS, "decoupled": HOLDS}),
        ({"coupled": 3.0}, {"none": FAILS, "zero": HOLDS, "harm": FAILS}),
        ({"decoupled": 4.5}, {"none": UNDECIDED, "zero": UNDECIDED, "harm": HOLDS}),  # too short
        ({"zero": 5.0}, {"none": HOLDS, "zero": FAILS}),
        ({"zero": 3.2}, {"zero": FAILS}),
        ({"coupled": 5.99}, {"none": HOLDS, "harm": FAILS}),
        ({"slope": 1.0}, {"decoupled": FAILS}),
    ],
)
def test_claims_follow_from_the_rows(numbers, expected):
    outcomes = statuses(frame(**numbers))
    assert {name: outcomes[name] for name in expected} == expected


def test_changes_are_shown_beside_a_line_per_arm():
    shown = Exhibits(frame())
    study.show(frame(), shown)
    changes, arms = shown.tables
    assert len(changes.rows) == 2 * 5 + 1 and len(arms.rows) == 12 + 4
    assert changes.rows[0][:2] == ["coupled 0 - coupled 0.05", "-2.500 [-2.500, -2.500]"]
