"""Stage-2 decay: its arms, and claims that follow from the rows."""

import pytest
from test_lab import make_rows

from experiments import sweep_stage2_decay as study
from experiments.lab import rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.exhibits import Exhibits
from experiments.lab.studies import QUICK


def frame(coupled=5.0, decoupled=3.0, slope=(1.0, 0.01)):
    """Three seeds of every arm; the loss of a kind rises by its slope with the decay. Unigram 4."""
    starts = dict(zip(study.KINDS, (coupled, decoupled), strict=True))
    slopes = dict(zip(study.KINDS, slope, strict=True))
    return rows.frame(
        make_rows(
            {
                f"{kind} {decay:g}": [
                    starts[kind] + slopes[kind] * decay + 0.1 * s for s in range(3)
                ]
                for kind in study.KINDS
                for decay in study.DECAYS
            }
        )
    )


def statuses(df):
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


def test_arms_differ_in_the_decay_of_stage_2_alone():
    assert len(study.ARMS) == 12
    for arm in study.ARMS:
        kind, _, decay = arm.name.partition(" ")
        assert (arm.recipe, arm.numbers) == (kind, {f"{kind}_2": float(decay)})


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, {"none": HOLDS, "harm": HOLDS, "decoupled": HOLDS}),
        ({"coupled": 3.0}, {"none": FAILS, "harm": HOLDS}),
        ({"decoupled": 4.5}, {"none": UNDECIDED, "harm": HOLDS}),  # too short to judge a cure
        ({"slope": (-1.0, 0.01)}, {"harm": FAILS}),
        ({"slope": (1.0, 1.0)}, {"decoupled": FAILS}),
    ],
)
def test_claims_follow_from_the_rows(numbers, expected):
    found = statuses(frame(**numbers))
    assert {name: found[name] for name in expected} == expected


def test_a_decay_that_does_not_raise_the_loss_is_seen_anywhere_in_the_row():
    made = frame()
    made.loc[made["arm"] == "coupled 0.3", "eval/loss"] = made.loc[
        made["arm"] == "coupled 0.2", "eval/loss"
    ].to_numpy()
    assert statuses(made)["harm"] == FAILS


def test_changes_are_shown_beside_a_line_per_arm():
    shown = Exhibits(frame())
    study.show(frame(), shown)
    changes, arms = shown.tables
    assert len(changes.lines) == 2 * 5 + 1 and len(arms.lines) == 12 + 4
    assert changes.lines[0][:2] == ["coupled 0 - coupled 0.05", "-0.050 [-0.050, -0.050]"]
