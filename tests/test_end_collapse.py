"""Which line ends the collapse: effects known by construction, and what the text then says."""

from dataclasses import replace

import pytest

from bitnet_jax import presets
from bitnet_jax.config import UserError
from experiments import common, compare
from experiments import end_collapse as study

REFERENCES = {
    "tracked_positions": 128,
    "targets": {"distinct": 96},
    "uniform": {"loss": 7.6, "entropy": 7.6, "distinct": 1},
    "unigram": {"loss": 6.5, "entropy": 6.4, "distinct": 1},
    "bigram": {"loss": 5.0, "entropy": 4.5, "distinct": 40},
}
LENGTHS = (100, 1000)


def row(arm, steps, seed, loss, severe=0, transit=60, seen=("tiny", "books")):
    preset, corpus = seen
    return {
        "id": f"{arm}/{seed}",
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "base": 100,
        "preset": preset,
        "corpus": corpus,
        "vocab_size": 300,
        "batch": [4, 16],
        "references": REFERENCES,
        "final": {
            "eval/loss": loss + seed / 100,
            "collapse/entropy": 6.0,
            "collapse/mutual_information": 0.5 if loss < 6.5 else 0.01,
            "collapse/logit_std": 1.0,
            "collapse/unique_tokens": 20,
            "collapse/verdict": "slow",
        },
        "numbers": {
            "unique_stage1": 20.0,
            "unique_stage2": 25.0,
            "unique_final": 24,
            "transit": transit,
            "severe_after_transit": severe,
        },
        "curve": {
            "step": [0, steps],
            "eval/loss": [7.6, loss],
            "collapse/unique_tokens": [9, 20],
        },
        "sample": {"prompt": "It was", "text": "the the", "sampled": "a dog"},
    }


def rows(lines=(), **b158):
    """Three seeds: the report's recipe at 7.4, the named lines at 5.5, the other lines at 7.2."""
    found = []
    for seed in range(3):
        found += [row(study.report_arm(t), t, seed, 7.4, transit=None) for t in LENGTHS]
        found += [
            row(study.line_arm(x, 100), 100, seed, 5.5 if x in lines else 7.2) for x in study.LINES
        ]
        for steps in LENGTHS:
            ternary, full = study.b158_arms(steps)
            found += [row(ternary, steps, seed, 5.4, **b158), row(full, steps, seed, 5.3)]
    return found


def test_arms_are_one_line_each_at_the_shortest_length_and_b158_at_all(tmp_path):
    cfg = presets.preset("tiny")
    data = replace(cfg.data, track="first_batch")
    cfg = replace(cfg, data=data, run=replace(cfg.run, steps=20))
    request = common.Request("tiny", cfg, [0], {}, [], tmp_path, True, None, (1, 10))
    arms = study.arms(request)
    assert [arm.run["steps"] for arm in arms] == [20] * 5 + [20, 20, 200, 200]
    reported = presets.RECIPES["report"](20)
    changed = {
        arm.name: sum(
            a != b
            for a, b in zip(
                vars(presets.RECIPES[arm.recipe](20).replace(**arm.hyper)).values(),
                vars(reported).values(),
                strict=True,
            )
        )
        for arm in arms[:5]
    }
    assert changed[study.line_arm("decay on matrices only", 20)] == 1
    assert changed[study.line_arm("no decay in stage 2", 20)] == 1
    assert min(changed.values()) > 0


def test_another_tracking_is_refused(tmp_path):
    request = common.Request(
        "tiny", presets.preset("tiny"), [0], {}, [], tmp_path, True, None, (1,)
    )
    with pytest.raises(UserError, match=r"data.track=validation: the report tracks its first"):
        study.arms(request)


def test_lines_that_end_it_in_every_seed_are_named_and_the_others_too():
    told = study.analyse(rows(lines=("AdamW for Adam", "no decay"))).conclusion
    assert "in every seed: AdamW for Adam or no decay" in told
    assert "decay on matrices only and no decay in stage 2 and full precision do not" in told


def test_no_line_that_ends_it_is_told_as_such():
    assert "none of 5 one-line changes ends" in study.analyse(rows()).conclusion


def test_a_loss_below_the_unigrams_without_use_of_context_is_no_end():
    found = rows(lines=("AdamW for Adam",))
    for r in found:
        r["final"]["collapse/mutual_information"] = 0.01
    assert study.ends(found, study.line_arm("AdamW for Adam", 100)) == (0, 3)


def test_a_severe_evaluation_after_the_transit_is_told():
    assert "no severe evaluation once below" in study.analyse(rows()).conclusion
    assert "severe evaluations, or never below" in study.analyse(rows(severe=1)).conclusion
    assert "severe evaluations, or never below" in study.analyse(rows(transit=None)).conclusion


def test_the_gap_to_full_precision_is_paired():
    assert study.gap(rows(), 1000) == "+0.100 [+0.100, +0.100] (n=3)"
    without = [r for r in rows() if "full precision, 1000" not in r["arm"]]
    assert study.gap(without, 1000) == "not run"


def test_the_stages_and_the_price_of_ternary_weights_are_told_at_every_length():
    found = rows()
    found[-2]["numbers"]["unique_stage2"] = 19.0
    told = study.analyse(found).conclusion
    assert "as many distinct predictions as stage 1 or more in 5 of 6 runs" in told
    price = "+0.10 [+0.10, +0.10] (n=3)"
    assert f"weights in nats: {price} at T = 100, {price} at T = 1000" in told


def test_arms_that_were_not_trained_are_left_out():
    found = [r for r in rows(lines=("AdamW for Adam",)) if "b158" not in r["arm"]]
    found = [r for r in found if "decay" not in r["arm"]]
    told = study.analyse(found)
    assert "in every seed: AdamW for Adam (by most" in told.conclusion
    assert "full precision does not" in told.conclusion
    assert "published recipe: not run" in told.result


def test_one_line_changes_that_were_not_trained_are_not_judged():
    found = [r for r in rows() if " with " not in r["arm"]]
    assert study.analyse(found).conclusion.startswith("one-line changes: not run; the published")


def test_control_rows_are_those_of_the_same_study_lengths_and_seeds():
    trained = [r for r in rows() if not r["arm"].startswith("report,")]
    reported = [row(f"{t} steps", t, seed, 7.4) for t in (100, 1000, 2000) for seed in range(4)] + [
        row("100 steps", 100, 0, 7.4, seen=("tiny", "stdlib"))
    ]
    found = study.with_control(trained, reported)
    control = [r for r in found if r["arm"].startswith("report,")]
    assert sorted((r["steps"], r["seed"]) for r in control) == [
        (t, seed) for t in LENGTHS for seed in range(3)
    ]
    assert all(r["corpus"] == "books" for r in control)
    assert len(compare.by_arm(found)) == 2 + 5 + 4
    with pytest.raises(UserError, match=r"no row of reproduce_report for seeds \[2\]"):
        study.with_control(trained, [r for r in reported if r["seed"] < 2])
