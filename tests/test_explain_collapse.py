"""The factorial: its arms, and effects that are known of the rows it is given."""

import itertools

import pytest
from lab_rows import make_rows

from experiments import explain_collapse as study
from experiments.lab import rows
from experiments.lab.claims import FAILS, HOLDS, judge
from experiments.lab.studies import QUICK

# What each factor's other level takes off the loss, where nothing else is changed.
GAINS = dict(zip(study.NAMES, (1.0, 0.9, 0.1, 0.4, 0.3), strict=True))
COUPLED_HARM = 0.25  # that ternary weights add to 0.1 of coupled decay


def loss(levels, seed):
    changed = [f for f, level in zip(study.NAMES, levels, strict=True) if level not in study.REPORT]
    harm = COUPLED_HARM * (levels[:3] == study.REPORT[:3])
    return 9 - sum(GAINS[f] for f in changed) + harm + 0.1 * seed


def frame():
    losses = {
        ", ".join(levels): [loss(levels, seed) for seed in range(3)]
        for levels in itertools.product(*study.FACTORS.values())
    }
    run_rows = make_rows(losses | {name: [8.0, 8.1, 8.2] for name in study.RIVALS})
    for row in run_rows:
        counts = {name: 100 * 2**i for i, name in enumerate(study.RIVALS, 1)}
        row["extra"] |= {"above_1.1": {"all": counts.get(row["arm"], 100)}}
    return rows.frame(run_rows)


def test_every_combination_of_levels_is_an_arm():
    names = {arm.name for arm in study.ARMS}
    assert len(study.ARMS) == len(names) == 2**5 + len(study.RIVALS)
    coupled = next(arm for arm in study.ARMS if arm.name == ", ".join(study.REPORT))
    assert (coupled.numbers["coupled_1"], coupled.numbers["coupled_2"]) == (0.1, 0.05)


@pytest.mark.parametrize("factor", study.NAMES)
def test_effects_of_a_factor(factor):
    """Alone from the report's settings; averaged, the harm weighs as often as it is switched."""
    harm = COUPLED_HARM * (study.NAMES.index(factor) < 3)
    assert study.alone(frame(), factor).mean == pytest.approx(-GAINS[factor] - harm)
    assert study.averaged(frame(), factor).mean == pytest.approx(-GAINS[factor] - harm / 4)


def test_the_interaction_is_the_harm_that_ternary_weights_add():
    assert study.interaction(frame()).mean == pytest.approx(-COUPLED_HARM)
    assert study.interaction(frame(), "0.001").mean == pytest.approx(0, abs=1e-9)


def test_claims_follow_from_the_rows():
    df = frame()
    statuses = {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}
    assert statuses == {
        "most": HOLDS,
        "others": HOLDS,
        "amplified": HOLDS,
        "harmless": FAILS,  # here decoupling gains as much at the small amount
        "rivals": HOLDS,
    }
