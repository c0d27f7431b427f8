"""The factorial: its arms, effects that are known by construction, and what the text says."""

import itertools

import pytest

from experiments import explain_collapse as study

REFERENCES = {
    "tracked_positions": 128,
    "targets": {"distinct": 90},
    "uniform": {"loss": 7.6, "entropy": 7.6, "distinct": 1},
    "unigram": {"loss": 6.5, "entropy": 6.4, "distinct": 1},
    "bigram": {"loss": 5.0, "entropy": 4.5, "distinct": 40},
}


def rows(loss):
    """Rows of three seeds whose held-out loss is `loss(levels)` plus the seed / 100."""

    def row(arm, seed, value):
        final = {key: value for key, _, _ in study.OUTCOMES} | {"collapse/verdict": "slow"}
        return {
            "arm": arm,
            "seed": seed,
            "final": final,
            "references": REFERENCES,
            "above_1.1": {"all": 1000, "predicted": 990.0},
        }

    found = [
        row(study.arm_name(levels), seed, loss(levels) + seed / 100)
        for levels in itertools.product(*study.FACTORS.values())
        for seed in range(3)
    ]
    return found + [row(rival, seed, 7.0) for rival in study.RIVALS for seed in range(3)]


def collapse_by_coupling(levels):
    """7.5 where coupled decay reaches the embedding and the head, else 5.5; the rate adds 0.1."""
    kind, _, target, _, rate = levels
    return (7.5 if (kind, target) == ("coupled", "all") else 5.5) + 0.1 * (rate == "5e-4")


def test_every_combination_is_an_arm_once_and_the_first_is_the_reports():
    names = [arm.name for arm in study.ARMS]
    assert len(names) == len(set(names)) == 2**5 + 3
    assert study.ARMS[0].name == study.arm_name(study.REPORT)
    hyper = study.ARMS[0].hyper
    assert (hyper["coupled_1"], hyper["coupled_2"], hyper["decay_rest"]) == (0.1, 0.05, 1.0)
    assert (hyper["weight_quant"], hyper["lr_peak"]) == (1.0, 1.5e-3)


def test_effects_of_a_known_table():
    found = rows(collapse_by_coupling)
    single = [study.alone(found, i, study.LOSS).mean for i in range(5)]
    assert single == pytest.approx([-2, 0, -2, 0, 0.1])
    spread = [study.main_effect(found, i, study.LOSS).mean for i in range(5)]
    assert spread == pytest.approx([-1, 0, -1, 0, 0.1])


def test_the_conclusion_names_what_ends_the_collapse_and_what_does_not():
    told = study.analyse(rows(collapse_by_coupling)).conclusion
    ends, others = told.split("; none of these does: ")
    assert ends.startswith(
        "each alone ends the collapse in all 3 seeds: decoupling the decay (-2.0"
    )
    assert "decay on matrices only (-2.00" in ends
    assert "full precision instead of ternary (no effect seen (n=3)" in others
    assert "a third of the learning rate (+0.10" in others


def test_where_nothing_helps_it_says_so():
    told = study.analyse(rows(lambda levels: 7.5)).conclusion
    assert told.startswith(
        "no single change brings the report's recipe below the unigram's loss in all 3 seeds: "
        "decoupling the decay (no effect seen (n=3)"
    )
