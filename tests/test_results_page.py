"""`make report`: every experiment has rows, and the index is made from them."""

import importlib

import pytest

from bitnet_jax.config import UserError
from experiments import page, report


def entry(name, label, conclusion):
    study = page.Study("two arms", 3, "x is 1 [0, 2]", conclusion)
    return report.Entry(name, "Why?", label, study, f"python -m experiments.{name}", "2 min")


def test_the_index_has_one_section_per_experiment_and_every_study_in_it():
    text = report.markdown(
        [entry("a", "small", "it holds"), entry("a", "large", "it fails"), entry("b", "s", "no")]
    )
    assert text.count("### ") == 2
    assert text.index("It holds.") < text.index("It fails.") < text.index("### [`b`](b.py)")
    assert "x is 1 [0, 2]" in text
    assert "n = 3 seeds; 2 min" in text


def test_only_the_part_between_the_markers_is_replaced():
    begin, end = "<!-- rows: begin -->", "<!-- rows: end -->"
    old = f"above\n{begin}\nold\n{end}\nbelow <!-- answer: begin -->\n"
    new = report.replace_part(old, "rows", "new")
    assert new == f"above\n{begin}\n\nnew\n\n{end}\nbelow <!-- answer: begin -->\n"
    assert report.replace_part(new, "rows", "new") == new
    with pytest.raises(UserError, match="needs the lines <!-- answer: begin -->"):
        report.replace_part(old, "answer", "new")


def test_an_experiment_without_rows_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.results.FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"weight_bounds.jsonl has no rows"):
        report.entries("weight_bounds", tmp_path)


def test_every_experiment_of_the_report_asks_one_question_in_its_first_line():
    for name in report.NAMES:
        module = importlib.import_module(f"experiments.{name}")
        first = module.__doc__.strip().splitlines()[0]
        assert first.endswith("?"), name
        assert name == module.NAME
