"""Repetition of text: its experiment says what the rows say, and a checkpoint writes text."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax import presets, run
from bitnet_jax.config import UserError
from experiments import degeneration, generate

KEYS = ("unique", "distinct_1", "distinct_2", "distinct_3", "distinct_4", "rep_4", "loop")
UNIGRAM = 6.5


def row(arm, seed, loss, greedy, sampled=0.1):
    ways = {"greedy": greedy, "sampled": sampled, "nucleus": sampled, "text": 0.1}
    jitter = 0.001 * seed
    final = {"eval/loss": loss + jitter, "collapse/verdict": "v", "collapse/entropy": 5.0}
    numbers = {w: dict.fromkeys(KEYS, v) | {"loop_period": None} for w, v in ways.items()}
    for way in degeneration.WAYS:
        numbers[way]["rep_4"] += jitter * (1 if way == "greedy" else seed - 1)
    predictor = {"loss": UNIGRAM, "entropy": 6.0, "distinct": 1}
    return {
        "arm": arm,
        "seed": seed,
        "final": final,
        "decoding": numbers,
        "references": dict.fromkeys(("bigram", "unigram", "uniform"), predictor)
        | {"targets": {"distinct": 9}, "tracked_positions": 99},
    }


def study(**arms):
    return degeneration.analyse([row(arm, s, *v) for arm, v in arms.items() for s in range(3)])


def test_a_healthy_arm_that_repeats_greedily_is_said_to():
    told = study(bad=(7.5, 0.8), good=(6.0, 0.8)).conclusion
    assert told.startswith("a healthy small model repeats when decoded greedily (good, below")
    assert "+0.70 [+0.70, +0.70] (n=3)" in told and "when sampled by no effect seen (n=3)" in told
    assert "bad, above it, does not tell it from good in greedy seq-rep-4: no effect seen" in told


def test_repetition_of_the_collapsed_arm_alone_is_told_apart():
    told = study(bad=(7.5, 0.8), good=(6.0, 0.1)).conclusion
    assert told.startswith("no healthy model is seen to repeat more than the text")
    assert "differs from good in greedy seq-rep-4: +0.70" in told


def test_without_a_healthy_arm_nothing_is_said_about_healthy_models():
    told = study(bad=(7.5, 0.8), worse=(8.0, 0.9)).conclusion
    assert "none shows a healthy model" in told and "repeats" not in told


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_folder):
    """A finished run of 2 steps with two replicates."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text("\n".join(f"{n} cats, {n * n} dogs." for n in range(3000)))
    cfg = presets.preset("tiny")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, n_layers=1),
        data=dataclasses.replace(cfg.data, corpus=f"text:{folder / 'corpus.txt'}"),
        run=dataclasses.replace(cfg.run, steps=2, recipes=("report", "b158")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        run.run(cfg, presets.make_replicates(cfg, [0], {}), folder / "run")
        yield folder / "run"


def test_a_summary_has_numbers_of_its_continuations_and_of_the_text(trained):
    first, second = json.loads((trained / "summary.json").read_text())["replicates"]
    names = {f"decode/{way}_{key}" for way in ("greedy", "sampled", "text") for key in KEYS}
    assert set(first["decode"]) == names
    assert all(np.isfinite(v) for v in first["decode"].values())
    text = {k for k in names if "text" in k}
    assert all(first["decode"][k] == second["decode"][k] for k in text)
    assert any(first["decode"][k] != second["decode"][k] for k in names - text)
    assert [set(c) for c in first["continuations"]] == [{"prompt", "text", "sampled"}] * 3


def test_a_row_gets_numbers_of_every_way_of_decoding(trained):
    found = degeneration.decode(trained, None, 1)["decoding"]
    assert set(found) == {"greedy", "sampled", "nucleus", "text"}
    assert found["sampled"]["unique"] > found["greedy"]["unique"]
    assert len(json.dumps(found)) < 1000


def write(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["generate", *map(str, argv)])
    generate.body()
    return capsys.readouterr().out


def test_a_prompt_reads_the_same_streamed_and_among_others(trained, monkeypatch, capsys):
    """20 tokens are two chunks, of which the second is cut."""
    alone = write(monkeypatch, capsys, trained, "--prompt", "7 cats", "--tokens", 20)
    assert alone.startswith(f"{trained}@2:0 (report, seed 0): greedy\n\n7 cats")
    assert alone.endswith("\n[20 tokens]\n\n")
    both = write(
        monkeypatch, capsys, trained, "--prompt", "7 cats", "--prompt", "19 dogs.", "--tokens", 20
    )
    assert both.startswith(alone) and "\n\n19 dogs." in both


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["@2", "--prompt", ""], "--prompt is empty"),
        (["@2", "--prompt", "cats", "--tokens", "8192"], "and --tokens 8192 are more than 8192"),
        (["@7", "--prompt", "a"], r"no checkpoint of step 7; there: \[1, 2\]"),
        (["@2:5", "--prompt", "a"], "no replicate 5; the checkpoint has 0 to 1"),
        (["/none", "--prompt", "a"], "no checkpoints in"),
        (["@2", "--prompt", "a", "--tokens", "0"], "--tokens 0: needs at least 1"),
        (["@2", "--prompt", "a", "--seed", "-1"], "--seed -1: must be"),
        (["@2", "--prompt", "a", "--top-k", "5"], "add --temperature 1"),
        (["@2", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be finite"),
        (["@2", "--prompt", "a", "--top-k", "-1"], "--top-k -1: must be at least 0"),
        (["@2", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (["@2", "--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0: must"),
    ],
    ids=str,
)
def test_a_mistake_is_named_on_one_line(trained, monkeypatch, capsys, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        write(monkeypatch, capsys, f"{trained}{argv[0]}", *argv[1:])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_that_of_the_run_is_refused(trained, monkeypatch, capsys):
    """As after an edit of the text that it was trained on."""
    corpus = Path(trained).parent / "corpus.txt"
    before = corpus.read_text()
    corpus.write_text(re.sub("cats", "ants and bees", before))
    with pytest.raises(UserError, match="has changed since the run, and with it the tokenizer"):
        write(monkeypatch, capsys, trained, "--prompt", "a")
    corpus.write_text(before)
