"""A finished run, as questions read it."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from bitnet_jax import data, presets, program
from experiments.lab.finished import Finished


def run_of(built, **more):
    """What a Finished run knows of itself."""
    return types.SimpleNamespace(cfg=built.cfg, replicates=built.replicates, **more)


def assert_same_start(built, run):
    same = jax.tree.map(np.array_equal, Finished.states_at(run, 0), built.init())
    assert all(jax.tree.leaves(same)), same


def test_step_0_is_the_initialisation_without_the_text(tiny, monkeypatch):
    built = program.build(tiny, presets.make_replicates(tiny, [3, 4], {}))
    monkeypatch.setattr(data, "load", lambda cfg: pytest.fail("reads the text"))
    assert_same_start(built, run_of(built))


def test_an_output_bias_starts_at_the_frequencies_of_the_text(tiny):
    model = dataclasses.replace(tiny.model, output_bias=True)
    cfg = dataclasses.replace(tiny, model=model)
    built = program.build(cfg, presets.make_replicates(cfg, [3], {}))
    assert_same_start(built, run_of(built, tokens=built.tokens))
