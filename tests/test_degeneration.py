"""Repetition of text: what a finished run measures, and what its rows bear out."""

import dataclasses
import json
import types

import jax
import numpy as np
from lab_rows import make_rows

from bitnet_jax import presets, program
from experiments import degeneration as study
from experiments.lab import exhibits, rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.studies import QUICK

KEYS = [key for key, _, _ in study.NUMBERS]
GREEDY = {"coupled": 0.95, "decoupled": 0.75, "published": 0.7}
LOSSES = {"coupled": 5.0, "decoupled": 3.0, "published": 3.1}  # make_rows: unigram's loss 4


def make(greedy=GREEDY, sampled=0.02, losses=LOSSES, seeds=3):
    run_rows = make_rows(
        {arm: [loss + s / 100 for s in range(seeds)] for arm, loss in losses.items()}
    )
    for row in run_rows:
        ways = {"greedy": greedy[row["arm"]], "sampled": sampled, "nucleus": sampled, "text": 0.1}
        row["extra"]["decoding"] = {
            way: dict.fromkeys(KEYS, x + 0.001 * row["seed"] * (way == "greedy"))
            for way, x in ways.items()
        }
    return rows.frame(run_rows)


def statuses(**more):
    df = make(**more)
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


def test_claims_hold_fail_and_lack_rows():
    assert statuses() == dict.fromkeys(("greedy", "sampled", "collapsed"), HOLDS)
    assert statuses(greedy=GREEDY | {"published": 0.3})["greedy"] == FAILS
    assert statuses(greedy=dict.fromkeys(GREEDY, 0.8))["collapsed"] == FAILS
    assert statuses(sampled=0.2)["sampled"] == FAILS
    assert statuses(losses=LOSSES | {"decoupled": 4.5})["greedy"] == FAILS  # none that has learned
    assert set(statuses(seeds=2).values()) == {UNDECIDED}


def test_the_text_stands_below_the_recipes():
    df = make()
    shown = exhibits.Exhibits(df)
    study.show(df, shown)
    table_rows = shown.tables[1].rows
    assert len(table_rows) == 10 and table_rows[-1] == ["the text", "0.1", "0.10", "0.10", "0.10"]
    assert shown.tables[2].rows[0][3] == "+0.85 [+0.85, +0.85]"


def test_every_way_of_decoding_is_measured_and_the_text_is_the_same_for_all(tiny):
    """Of weights as they start, which sample nearly at random and repeat when greedy."""
    cfg = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, n_layers=1))
    replicates = presets.make_replicates(cfg, [0, 1], {})[:2]
    built = program.build(cfg, replicates)
    states = jax.device_get(built.init())
    run = types.SimpleNamespace(
        cfg=built.cfg, replicates=replicates, states=states, tokens=built.tokens
    )
    first, second = study.measure(run)["decoding"]
    assert set(first) == {*study.WAYS, "text"} and first["text"] == second["text"]
    assert first["greedy"] != second["greedy"]
    for decoding in (first, second):
        assert decoding["sampled"]["unique"] > decoding["greedy"]["unique"]
        assert decoding["sampled"]["rep_4"] < 0.1 < decoding["greedy"]["rep_4"]
    assert np.isfinite([first["text"][key] for key in KEYS]).all() and json.dumps(first)
