"""What `reproduce_report` reads off a log."""

import pytest

from bitnet_jax.config import RunConfig
from experiments import ledger, reproduce_report


def log_of(steps, every):
    return [
        {
            "kind": "eval",
            "step": step,
            "collapse/unique_tokens": step,
            "eval/loss": step / 3,
            "collapse/logit_std": 0.1,
        }
        for step in sorted({*range(0, steps, every), steps})
    ]


@pytest.mark.parametrize(
    "base, steps, every, where",
    [
        (1000, 1000, 5, [5, 50, 100, 130, 140, 500, 600, 700]),
        (1000, 10_000, 20, [100, 500, 1000, 1500, 2000]),
        (200, 2000, 10, [20, 100, 200, 300, 400]),  # the same share of a run a fifth as long
        (200, 200, 300, [200] * 8),  # step 0 is none: the first and the last evaluation
    ],
)
def test_milestones_are_the_nearest_evaluations_after_the_start(base, steps, every, where):
    found = reproduce_report.milestones(
        base, RunConfig(steps, eval_every=every), log_of(steps, every)
    )
    length = 1000 * steps // base
    assert [m["step"] for m in found.values()] == where
    assert list(map(int, found)) == list(ledger.MILESTONES[length])
    assert all(m["unique"] == m["step"] for m in found.values())
