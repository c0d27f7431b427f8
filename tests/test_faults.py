"""Faults are what their names say, and triage is judged by the faults that do harm."""

import jax
import numpy as np
import pytest
from lab_rows import make_rows

from bitnet_jax import data, model, presets, program, quant
from bitnet_jax.config import RunConfig
from bitnet_jax.loss import training_loss
from bitnet_jax.signatures import CAUSES
from experiments import faults as study
from experiments.lab import arms, exhibits, rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.studies import QUICK


def windows(kind=data.Windows):
    return kind(np.arange(100, dtype=np.uint16), 8, 1, True, False)


def test_every_cause_is_one_that_triage_knows():
    known = {"none"} | {cause.name for cause in CAUSES}
    assert {fault.cause for fault in study.FAULTS} <= known


def test_padding_fills_the_second_half_of_a_window_and_is_scored():
    sound, padded = (windows(x).cut(np.array([2])) for x in (data.Windows, study.PaddedWindows))
    np.testing.assert_array_equal(padded.inputs[0], [*range(16, 20), 1, 1, 1, 1])
    np.testing.assert_array_equal(padded.targets[0], [*range(17, 20), 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(padded.weights, np.ones((1, 8)))
    np.testing.assert_array_equal(sound.targets[0], range(17, 25))


def test_the_first_batch_is_served_at_every_step_while_the_fault_is_in_place():
    cfg = presets.preset("tiny").data
    first = data.window_ids(cfg, 50, 3, 0, 1)
    with study.BY_ARM["one repeated batch"].patch:
        np.testing.assert_array_equal(data.window_ids(cfg, 50, 3, 7, 9), np.repeat(first, 2, 0))
    assert (data.window_ids(cfg, 50, 3, 1, 2) != first).any()


def test_a_program_is_built_with_the_fault_that_is_in_place(tiny):
    replicates = presets.make_replicates(tiny, [0], {})[:1]
    with study.BY_ARM["padding scored"].patch:
        built = program.build(tiny, replicates)
    assert isinstance(built.windows, study.PaddedWindows)
    assert not isinstance(program.build(tiny, replicates).windows, study.PaddedWindows)


def test_wide_latents_are_those_of_the_ternary_matrices_alone():
    cfg = presets.override(presets.preset("tiny"), ["model.vocab_size=300"])[0].model
    with study.BY_ARM["N(0, 1) latent weights"].patch:
        init = model.kernel_init(cfg)
    matrix, head = (init(jax.random.key(0), shape) for shape in ((32, 64), (32, 300)))
    assert 0.9 < matrix.std() < 1.1 and head.std() < 0.05


def test_rounding_alone_gives_the_same_weights_and_another_gradient():
    w = jax.random.normal(jax.random.key(0), (8, 4))
    for strength in (0.0, 1.0):
        mine, sound = (
            q(w, strength, "float32") for q in (study.rounding_alone, quant.quantize_weight)
        )
        np.testing.assert_allclose(mine, sound, rtol=1e-6)
    mine, sound = (
        jax.grad(lambda w, q=q: q(w, 1.0, "float32").sum())(w)
        for q in (study.rounding_alone, quant.quantize_weight)
    )
    np.testing.assert_allclose(sound, np.ones((8, 4)))
    assert abs(mine - sound).max() > 0.1


def test_the_shifted_loss_scores_the_token_after_the_next():
    batch = windows().cut(np.array([0]))
    after_next = batch.targets[0] + 1
    logits = 50.0 * jax.nn.one_hot(after_next, 100)[None]  # sure of x[t + 2]
    hyper, unigram_V = presets.RECIPES["decoupled"](RunConfig(steps=10)), np.ones(100) / 100
    assert study.shifted_loss(logits, batch, hyper, unigram_V) < 1e-3
    assert training_loss(logits, batch, hyper, unigram_V) > 10


def test_faults_are_trained_from_the_first_seed_in_place_and_the_healthy_recipe_from_all(
    monkeypatch,
):
    cfg = presets.preset("tiny")
    request = arms.Request("toy", "tiny", cfg, {}, [4, 5], "unused", at_once=9,
                           only=("healthy", "repeated", "frozen"))  # fmt: skip
    trained = []

    def train_group(request, group, measure):
        for rep in group.replicates:
            trained.append((rep.name, rep.seed, data.window_ids is study.first_ids))
        assert measure.keywords["seams"] == group.seams
        return []

    monkeypatch.setattr(study, "train_group", train_group)
    study.train(request, list(study.ARMS), study.measure)
    assert trained == [("healthy", 4, False), ("healthy", 5, False), ("frozen head", 4, False),
                       ("one repeated batch", 4, True)]  # fmt: skip


def make(losses=(), named=(), alarm=False, seeds=5):
    """The right cause first for every fault; the rate 10 times too high does no harm."""
    ends = {arm.name: [6.0] for arm in study.ARMS} | {"learning rate 10x high": [4.0]}
    ends |= {study.HEALTHY: [5.0 + s / 100 for s in range(seeds)]} | dict(losses)
    run_rows = make_rows(ends)
    for row in run_rows:
        cause = {arm: fault.cause for arm, fault in study.BY_ARM.items()} | dict(named)
        finding = {"name": cause[row["arm"]], "score": 1.0, "evidence": ""}
        silent = row["arm"] == study.HEALTHY and not alarm
        row["extra"]["causes"] = [] if silent else [finding]
    return rows.frame(run_rows)


def statuses(**more):
    df = make(**more)
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, set()),
        ({"named": {"frozen head": "context ignored"}}, {"named"}),
        ({"named": {"learning rate 10x high": "context ignored"}}, set()),  # it does no harm
        ({"alarm": True}, {"silent"}),
        ({"losses": {"learning rate 10x high": [5.01]}}, {"rate"}),
    ],
)
def test_claims_fail_on_rows_that_contradict_them(changed, wrong):
    claim_statuses = statuses(**changed)
    assert claim_statuses == {name: FAILS if name in wrong else HOLDS for name in claim_statuses}


def test_two_healthy_seeds_decide_nothing():
    assert set(statuses(seeds=2).values()) == {UNDECIDED}


def test_what_does_no_harm_is_not_judged():
    df = make()
    shown = exhibits.Exhibits(df)
    study.show(df, shown)
    cells = {row[0]: row[3:] for row in shown.tables[0].rows}
    assert cells["learning rate 10x high"] == ["no", "learning rate too high (1.00)", ""]
    assert cells["frozen head"] == ["yes", "output matrix not updated (1.00)", "yes"]
    assert cells[study.HEALTHY] == ["", "", ""]
