"""The page of the answer: its verdict follows from the factorial, its table from rows."""

import itertools

import pytest

from bitnet_jax.config import UserError
from experiments import answer, end_collapse, explain_collapse

UNIGRAM = 6.5
REFERENCES = {
    "tracked_positions": 128,
    "targets": {"distinct": 96},
    "uniform": {"loss": 7.6, "entropy": 7.6, "distinct": 1},
    "unigram": {"loss": UNIGRAM, "entropy": 6.4, "distinct": 1},
    "bigram": {"loss": 5.0, "entropy": 4.5, "distinct": 40},
}


def factorial(heals):
    """Two seeds of every combination; a run learns where `heals(levels)`."""
    return [
        {
            "arm": explain_collapse.arm_name(levels),
            "seed": seed,
            "references": REFERENCES,
            "final": {"eval/loss": 5.0 if heals(levels) else 7.0},
        }
        for levels in itertools.product(*explain_collapse.FACTORS.values())
        for seed in range(2)
    ]


@pytest.mark.parametrize(
    ("heals", "told"),
    [
        (lambda levels: levels[0] == "decoupled", "No: the collapse is neither structural"),
        (lambda levels: levels[1] == "full", "Yes: without ternary weights"),
        (lambda levels: "decoupled" in levels or "full" in levels, "Both count"),
        (lambda levels: levels[3] == "0", "Open: neither"),
    ],
)
def test_the_verdict_can_go_every_way(heals, told):
    assert answer.verdict([factorial(heals)]).startswith(told)


def test_the_verdict_needs_every_study():
    good = factorial(lambda levels: levels[0] == "decoupled")
    bad = factorial(lambda levels: False)
    assert answer.verdict([good, good]).startswith("No: ")
    assert answer.verdict([good, bad]).startswith("Open: ")


def ended(steps=100):
    def row(arm, seed, shift):
        return {
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "references": REFERENCES,
            "numbers": {
                "unique_stage1": 20.0 + shift,
                "unique_stage2": 5.0 + shift,
                "unique_final": 4 + shift,
                "loss_mean": 9.0,
                "loss_final": 8.0 + seed,
            },
            "final": {
                "eval/loss": 7.0,
                "collapse/entropy": 7.4,
                "collapse/logit_std": 0.1,
            },
            "above_1.1": {"all": 1000 + shift},
            "curve": {"step": [0, steps], "collapse/unique_tokens": [90, 5], "eval/loss": [8, 7]},
        }

    arms = (
        end_collapse.report_arm(steps),
        end_collapse.line_arm("AdamW for Adam", steps),
        end_collapse.b158_arms(steps)[0],
    )
    return [row(arm, seed, 10 * i) for i, arm in enumerate(arms) for seed in range(2)]


def test_the_headline_table_stands_beside_what_the_report_said_and_what_the_text_has():
    table = answer.headline_table(ended())
    cells = {row[0]: row[1:] for row in table.rows}
    assert len(table.columns) == 6
    assert cells["stage 2"][:2] == ["3.6", "5.0 [5.0, 5.0]"]
    assert cells["distinct predictions of 128, stage 1"][-1] == "96 / 40 / 1"
    assert cells["training loss, last step"][1] == "8.50 [2.15, 14.85]"
    assert cells["weights above 1.1 in magnitude"] == [
        "981,223", "1,000 [1,000, 1,000]", "1,010 [1,010, 1,010]", "1,020 [1,020, 1,020]", ""
    ]  # fmt: skip


def test_an_arm_that_was_not_trained_has_no_column():
    rows = [r for r in ended() if "b158" not in r["arm"]]
    assert len(answer.headline_table(rows).columns) == 5
    assert {s.label for s in answer.picture(rows)[0].series} == {answer.COUPLED, answer.DECOUPLED}


def test_the_findings_stand_beside_each_other_for_every_text_and_size():
    """Two places: in the second only the report's recipe and AdamW ran, and one run learned."""

    def seen(rows, corpus, vocab):
        return [r | {"corpus": corpus, "vocab_size": vocab} for r in rows]

    small = seen(ended(), "books", 300)
    for row in small:
        row["numbers"] |= {"transit": 40, "severe_after_transit": row["seed"]}
    large = seen([r for r in ended() if "b158" not in r["arm"]], "books", 500)
    better = {"eval/loss": 5.0, "collapse/mutual_information": 0.5}
    for row in [*small, *large]:
        row["final"] |= better if "AdamW" in row["arm"] else {"collapse/mutual_information": 0.0}
    large[0] |= {"final": large[0]["final"] | better}
    explained = seen(factorial(lambda levels: levels[0] == "decoupled"), "books", 300)
    reproduced = [row for row in [*small, *large] if row["arm"] == end_collapse.report_arm(100)]
    table = answer.holds(reproduced, explained, [*small, *large])
    cells = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ["", "books, 500 tokens", "books, 300 tokens"]
    assert cells["runs of the report's recipe that end above the unigram's loss"] == [
        "1 of 2 (T = 100)", "2 of 2 (T = 100)"
    ]  # fmt: skip
    assert cells["AdamW for Adam, alone"][1] == "-2.00 [-2.00, -2.00] (n=2), ended in 2 of 2"
    assert cells["full precision, alone"] == ["not run", "not run"]
    assert cells["decoupling, averaged over the factorial"] == [
        "not run", "-2.00 [-2.00, -2.00] (n=2)"
    ]  # fmt: skip
    assert cells["published recipe: severe evaluations once below the unigram's loss"] == [
        "not run", "1 in 2 runs (T = 100)"
    ]  # fmt: skip


def test_the_largest_study_is_the_one_with_the_largest_vocabulary_then_the_longest():
    def row(vocab, steps):
        seen = {"preset": "tiny", "corpus": "books", "batch": [4, 16]}
        return seen | {"vocab_size": vocab, "steps": steps}

    _, chosen = answer.largest([row(300, 900), row(500, 100), row(500, 200)])
    assert chosen == [row(500, 200)]


def test_the_richest_study_has_most_arms():
    def row(arm, vocab):
        seen = {"preset": "tiny", "corpus": "books", "batch": [4, 16], "steps": 9}
        return seen | {"arm": arm, "vocab_size": vocab}

    many = [row("a", 300), row("b", 300)]
    assert answer.richest([*many, row("a", 500)])[1] == many


def test_an_answer_without_rows_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.results.FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"reproduce_report.jsonl has no rows"):
        answer.write(tmp_path / "answer.html")
