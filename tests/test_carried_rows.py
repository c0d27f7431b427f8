"""Numbers that README and the index printed at 55a2c4a, from the rows as they are kept now."""

import numpy as np
import pytest

from bitnet_jax.metrics import ENTROPY, LOSS
from experiments import explain_collapse
from experiments.lab import rows, stats, studies
from experiments.lab.studies import BOOKS, FULL, QUICK, QUICK_B158, QUICK_TRACKED


def of_study(name, study):
    return next(
        rows.frame(members)
        for identity, members in rows.by_study(rows.read(name))
        if studies.named(identity) == study
    )


@pytest.mark.parametrize(
    ("study", "arm", "column", "spec", "printed"),
    [
        (FULL, "coupled", LOSS, ".2f", "9.42 [9.29, 9.55]"),
        (FULL, "AdamW for Adam", LOSS, ".2f", "7.03 [7.01, 7.05]"),
        (FULL, "published", "unique_stage1", ".1f", "8.3 [8.0, 8.6]"),
        (FULL, "coupled", ENTROPY, ".2f", "10.50 [10.45, 10.56]"),
        (FULL, "coupled", "above_1.1/all", ",.0f", "979,300 [978,397, 980,202]"),
        (FULL, "published", "numbers/loss_mean", ".2f", "6.33 [6.28, 6.37]"),
    ],
)
def test_means_of_the_headline_table(study, arm, column, spec, printed):
    assert stats.mean(of_study("end_collapse", study), arm, column).text(spec) == printed


@pytest.mark.parametrize(
    ("name", "study", "arm", "control", "steps", "printed"),
    [
        ("end_collapse", FULL, "AdamW for Adam", "coupled", None, "-2.39 [-2.51, -2.26]"),
        ("end_collapse", BOOKS, "decay on matrices only", "coupled", None, "-0.85 [-0.88, -0.82]"),
        ("end_collapse", QUICK_TRACKED, "full precision", "coupled", None, "-0.37 [-0.46, -0.29]"),
        ("end_collapse", BOOKS, "published", "published in full precision", 20_000,
         "+0.12 [+0.07, +0.17]"),
        ("fork_transition", QUICK, "coupled stage 2", "coupled stage 1 continued", None,
         "-0.28 [-0.40, -0.16]"),
        ("warmup_from_dense", QUICK_B158, "no warm-up", "from scratch", None,
         "-0.60 [-0.62, -0.57]"),
    ],
)  # fmt: skip
def test_paired_differences(name, study, arm, control, steps, printed):
    df = of_study(name, study)
    assert stats.difference(df, arm, control, LOSS, steps).text("+.2f") == printed


@pytest.mark.parametrize(
    ("study", "factor", "printed"),
    [
        (BOOKS, "decay enters", "-0.33 [-0.36, -0.31]"),
        (QUICK, "arithmetic", "-0.17 [-0.20, -0.15]"),
    ],
)
def test_main_effects_of_the_factorial(study, factor, printed):
    found = explain_collapse.averaged(of_study("explain_collapse", study), factor)
    assert found.text("+.2f") == printed


def test_counts_of_runs():
    df = of_study("reproduce_report", BOOKS)
    assert ((df[LOSS] > df["unigram"]).sum(), len(df)) == (15, 15)
    faults = of_study("faults", QUICK)
    usual = stats.prediction_interval(stats.values(faults, "healthy", LOSS))[1]
    faulty = faults[faults["arm"] != "healthy"]
    assert set(faulty["arm"][faulty[LOSS] <= usual]) == {"learning rate 10x high", "no warm-up"}
    assert "{:.0%} to {:.0%}".format(*stats.wilson(10, 10)) == "72% to 100%"


def test_shares_of_the_shrink_law():
    run = stats.of(of_study("shrink_law", QUICK), "coupled")
    shares = [
        np.array(share)[np.array(steps) <= end].mean()
        for share, steps, end in zip(
            run["shrink/share/head"],
            run["shrink/share/step"],
            run["shrink/half_step_predicted"],
            strict=True,
        )
    ]
    assert stats.interval(shares).text(".1%") == "75.0% [74.8%, 75.2%]"
    half = stats.mean(of_study("shrink_law", BOOKS), "coupled", "shrink/half_step")
    assert half.text(".0f") == "152 [152, 153]"


def test_numbers_of_the_other_questions():
    run = stats.of(of_study("degeneration", QUICK), "decoupled")
    excess = run["decoding/greedy/rep_4"] - run["decoding/text/rep_4"]
    assert stats.interval(excess).text("+.2f") == "+0.64 [+0.61, +0.67]"
    df = of_study("training_length", QUICK)
    gain = stats.values(df, "coupled", LOSS, 400) - stats.values(df, "coupled", LOSS, 40)
    assert stats.interval(gain).text("+.2f") == "-0.51 [-0.60, -0.42]"
    df = of_study("sweep_stage2_decay", FULL)
    coupled = [arm for arm in df["arm"].unique() if arm.startswith("coupled")]
    best = min((stats.mean(df, arm, LOSS) for arm in coupled), key=lambda found: found.mean)
    assert best.text() == "8.81 [8.62, 9.00]"
    logits = stats.of(of_study("logit_distribution", QUICK), "coupled")["logits/entropy"]
    assert stats.interval(x[-1] for x in logits).text() == "7.41 [7.36, 7.46]"


def test_every_committed_row_has_a_place_of_its_own_and_a_named_study():
    names = [p.stem for p in rows.FOLDER.glob("*.jsonl") if not p.stem.startswith("bench_")]
    for name in names:
        made = rows.read(name)
        assert len({rows.place(row) for row in made}) == len(made)
        assert all(studies.named(identity) for identity, _ in rows.by_study(made))
