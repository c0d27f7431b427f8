"""The ledger of the report's claims: a status follows from rows, and only at the report's size."""

import math

import numpy as np
import pytest

from experiments import ledger

REPORTED = {  # the report's own numbers at 1000, 10000 and 20000 steps
    "evaluations": (200, 2000, 4000),
    "unique_min": (1, 1, 1),
    "unique_max": (95, 98, 95),
    "unique_mean": (9.4, 9.0, 9.0),
    "unique_stage1": (15.1, 15.0, 15.0),
    "unique_stage2": (3.6, 3.0, 3.0),
    "unique_final": (8, 5, 6),
    "severe_share": (0.285, 0.3, 0.3),
    "partial_unique_mean": (9.4, 28.6, 26.4),
    "partial_severe_share": (0.285, 0.007, 0.077),
    "partial_loss_mean": (9.6, 10.52, 10.50),
    "first_severe": (130, 130, 130),
    "first_complete": (140, 140, 140),
    "recoveries": (0, 0, 0),
    "count_recoveries": (2, 2, 2),
    "loss_min": (8.23, 8.71, 8.57),
    "loss_max": (10.94, 11.01, 10.93),
    "loss_mean": (9.6, 9.6, 9.6),
    "loss_final": (9.92, 9.74, 9.76),
    "start_loss": (10.99, 10.99, 10.99),
    "start_logit_std": (0.58, 0.58, 0.58),
    "late_entropy": (10.7, 10.7, 10.7),
}


def milestones(length, gone=True):
    """The report's counts; at step 1000 of the longer runs the logits are gone, or they are not."""
    dead = {"loss": 10.82, "logit_std": 0.0002 if gone else 0.5}
    alive = {"loss": 9.7, "logit_std": 0.06}
    return {
        str(step): {"step": step, "unique": unique} | (dead if step == 1000 else alive)
        for step, unique in ledger.MILESTONES[length].items()
    }


def runs(d_model=256, lengths=ledger.FULL, spread=0.01, gone=True, **changed):
    """Rows of three seeds around the report's numbers, or around changed ones."""
    numbers = REPORTED | {k: (v,) * 3 for k, v in changed.items()}
    return [
        [
            {
                "steps": steps,
                "vocab_size": ledger.VOCABULARY,
                "model": {"d_model": d_model},
                "references": {"uniform": {"loss": math.log(ledger.VOCABULARY)}},
                "numbers": {
                    k: v[i] if v[i] is None or k == "evaluations" else v[i] + (seed - 1) * spread
                    for k, v in numbers.items()
                }
                | {"milestones": milestones(told, gone)},
                "above_1.1": {"all": 979_000, "embedding": 978_990, "predicted": 979_330.0},
            }
            for seed in range(3)
        ]
        for i, (steps, told) in enumerate(zip(lengths, ledger.FULL, strict=True))
    ]


def status(found, claim):
    (entry,) = [e for e in found if e.claim == claim]
    return entry.status


def test_runs_that_give_the_reports_numbers_reproduce_them():
    found = ledger.recompute(runs())
    assert len(found) >= 22
    assert [e.claim for e in found if e.status == ledger.DIFFERENT] == []
    assert status(found, "average distinct predictions, stage 1, 1000 steps") == ledger.REPRODUCED


def test_a_number_outside_the_prediction_interval_is_not_reproduced():
    found = ledger.recompute(runs(loss_final=9.0))
    assert status(found, "loss at the end, 1000 steps") == ledger.DIFFERENT
    found = ledger.recompute(runs(loss_final=9.0, spread=0.5))
    assert status(found, "loss at the end, 1000 steps") == ledger.REPRODUCED


def test_a_reported_number_is_as_exact_as_its_last_digit_and_a_count_is_exact():
    found = ledger.recompute(runs(loss_final=9.916, unique_final=8.4, spread=1e-5))
    assert status(found, "loss at the end, 1000 steps") == ledger.REPRODUCED
    assert status(found, "distinct predictions at the end, 1000 steps") == ledger.DIFFERENT


@pytest.mark.parametrize(
    "recoveries, counts, expected",
    [(0, 2, f"{ledger.EXPLAINED}: the count rises with noise"), (2, 0, ledger.REPRODUCED),
     (0, 0, ledger.DIFFERENT)],
)  # fmt: skip
def test_a_recovery_needs_the_loss_too(recoveries, counts, expected):
    found = ledger.recompute(runs(recoveries=recoveries, count_recoveries=counts))
    claim = 'recoveries ("recovers slightly", to 5 at steps 500 and 700)'
    assert status(found, claim) == expected


def test_a_collapse_that_never_comes_is_not_reproduced():
    found = ledger.recompute(runs(first_complete=None))
    assert status(found, "first complete collapse at step, 1000 steps") == ledger.DIFFERENT


@pytest.mark.parametrize("other", [{"d_model": 128}, {"lengths": (200, 1000, 2000)}])
def test_another_size_or_length_checks_no_number(other):
    found = ledger.recompute(runs(**other))
    reproduced = [e.claim for e in found if e.status == ledger.REPRODUCED]
    assert len(reproduced) == 2  # arithmetic on the report's own numbers
    assert status(found, "loss at the end, 1000 steps") == f"{ledger.UNKNOWN}: another size"


def test_large_weights_that_theory_does_not_predict_are_not_explained():
    rows = runs()
    for row in rows[0]:
        row["above_1.1"]["predicted"] = 0.0
    assert status(ledger.recompute(rows), "weights outside [-1, 1]") == ledger.DIFFERENT


def test_the_reports_own_statements_are_checked_without_rows():
    contradictions = [e for e in ledger.recompute(runs()) if e.status == ledger.CONTRADICTION]
    assert len(contradictions) == 6


def test_a_count_along_the_run_outside_its_interval_is_named():
    rows = runs()
    for row in rows[0]:
        row["numbers"]["milestones"]["130"]["unique"] = 30
    claim = "distinct predictions at steps 5, 50, 100, 130, 140, 500, 600, 700 of 1000"
    assert status(ledger.recompute(rows), claim) == f"{ledger.DIFFERENT}: at 130"


def test_a_rising_count_of_logits_that_are_gone_is_explained_and_of_others_not():
    claim = '"RECOVERY! Model learns diversity", step 1000 of 10000'
    assert status(ledger.recompute(runs()), claim).startswith(ledger.EXPLAINED)
    assert status(ledger.recompute(runs(gone=False)), claim) == ledger.DIFFERENT


def test_the_prediction_interval_is_that_of_one_more_value():
    """Of normal samples, 95 % of next values lie inside."""
    random = np.random.default_rng(0)
    samples = random.normal(size=(4000, 6))
    inside = [
        low <= x[-1] <= high for x in samples for low, high in [ledger.prediction_interval(x[:-1])]
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert ledger.prediction_interval([1.0]) == (-math.inf, math.inf)
