"""The ledger of the troubleshooting report: what a status needs, and what our rows give."""

import pandas as pd
import pytest

from experiments.lab import ledger, studies
from experiments.lab.ledger import DIFFERENT, REPRODUCED, UNDECIDED, UNKNOWN, Entry


def frame(values, *, steps=1000, width=256) -> pd.DataFrame:
    config = {"model": {"d_model": width, "vocab_size": 50257}}
    return pd.DataFrame({"steps": steps, "numbers/x": values, "config": [config] * len(values)})


@pytest.mark.parametrize(
    ("values", "reported", "digits", "possible", "status"),
    [
        ([9.0, 9.1, 9.2], 9.5, 1, (0, 11), REPRODUCED),
        ([9.0, 9.1, 9.2], 9.64, 2, (0, 11), DIFFERENT),
        ([9.0, 9.0, 9.0], 9.005, 2, (0, 11), REPRODUCED),  # within the rounding
        ([9.0, 9.0, 9.0], 10, 0, (1, 128), DIFFERENT),  # a count is exact
        ([0.0, 0.1, 0.3], 0.2, 3, (0, 1), UNDECIDED),  # 1.5 wide, of 1 that is possible
        ([9.0], 9.0, 0, (0, 11), UNDECIDED),
        ([None, None], 140, 0, (5, 1000), DIFFERENT),  # it never comes
    ],
)
def test_a_measured_number(values, reported, digits, possible, status):
    entry = Entry("x", reported, digits, column="numbers/x", possible=possible)
    assert ledger.judge(entry, frame(values), full=True).status == status


def test_another_size_or_length_checks_no_number():
    entry = Entry("x", 9.0, column="numbers/x", possible=(0, 11))
    assert ledger.judge(entry, frame([9.0, 9.1]), full=False).status == UNKNOWN
    assert ledger.judge(entry, frame([]), full=True).status == UNKNOWN


def committed() -> list[ledger.Line]:
    return ledger.recompute(studies.FULL.frame("reproduce_report"))


def test_the_committed_rows_decide_every_number_of_1000_steps():
    for line in committed():
        if line.entry.kind == ledger.MEASURED and line.entry.steps == 1000:
            assert line.status in (REPRODUCED, DIFFERENT, UNDECIDED)


def test_kinds_are_counted_apart():
    by_kind = ledger.counts(committed())
    assert by_kind[ledger.ARITHMETIC] == {ledger.CONTRADICTORY: 6, ledger.CONSISTENT: 2}
    assert by_kind[ledger.BUILT] == {"holds": 1}
    assert by_kind[ledger.MEASURED][UNDECIDED] == 5 + 4 + 14  # of 5, 3 and 1 runs, by length
    assert sum(sum(statuses.values()) for statuses in by_kind.values()) == len(ledger.ENTRIES)


def test_large_weights_that_theory_does_not_predict_are_not_explained():
    df = pd.DataFrame({f"above_1.1/{k}": [x] for k, x in
                       (("all", 100), ("embedding", 100), ("predicted", 101))})  # fmt: skip
    assert ledger.large_weights(df)[1]
    assert not ledger.large_weights(df.assign(**{"above_1.1/predicted": 120}))[1]
    assert not ledger.large_weights(df.assign(**{"above_1.1/embedding": 50}))[1]
