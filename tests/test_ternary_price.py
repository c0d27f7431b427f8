"""The price of ternary weights: its arms, and claims that follow from the rows."""

import pytest
from lab_rows import make_rows

from bitnet_jax import presets
from experiments import ternary_price as study
from experiments.lab import rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.studies import QUICK_B158

PRICES = dict(zip(study.WIDTHS, (0.15, 0.1, 0.05), strict=True))


def frame(prices=PRICES, lengths=(100, 300), start=3.0):
    """Three seeds; the unigram has 4 nats."""
    run_rows = []
    for steps in lengths:
        losses = {
            f"{width}, {kind}": [start + price * (kind == "ternary") + 0.1 * s for s in range(3)]
            for width, price in prices.items()
            for kind in study.ARITHMETICS
        }
        run_rows += make_rows(losses, steps=steps)
    return rows.frame(run_rows)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, {"learned": HOLDS, "price": HOLDS, "width": HOLDS, "gain": FAILS}),
        ({"prices": PRICES | {"twice the width": -0.1}}, {"gain": HOLDS, "width": HOLDS}),
        ({"start": 3.95}, {"learned": FAILS}),
        ({"prices": PRICES | {"the width": 0.3}}, {"price": FAILS, "width": HOLDS}),
        ({"prices": dict.fromkeys(PRICES, 0.1)}, {"width": FAILS}),
        ({"lengths": (100,)}, {"price": HOLDS, "width": UNDECIDED}),
    ],
)
def test_claims_follow_from_the_rows(numbers, expected):
    df = frame(**numbers)
    statuses = {claim.name: judge(claim, QUICK_B158, df).status for claim in study.CLAIMS}
    assert {name: statuses[name] for name in expected} == expected


def test_arms_differ_in_width_and_arithmetic_alone():
    cfg = presets.preset("quick")
    widths = [arm.fields["model.d_model"](cfg) for arm in study.ARMS]
    assert widths == [128, 128, 256, 256, 512, 512]
    assert [arm.numbers for arm in study.ARMS] == [*study.ARITHMETICS.values()] * 3
