"""Triage measures what it says, and its ranking follows from the numbers."""

import contextlib
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import checkpoint, config, optim, presets, reference, train, triage
from bitnet_jax import program as programs
from experiments import faults
from experiments import triage as script


def build(cfg, recipe="report_decoupled", **hyper):
    cfg = replace(cfg, run=replace(cfg.run, recipes=(recipe,)))
    return programs.build(cfg, presets.make_replicates(cfg, [0], hyper))


def start_of(program):
    return jax.tree.map(lambda x: x[0], program.init())


@pytest.fixture
def untied(tiny):
    """The tiny preset in the report's layout, and long enough to sum up to some learning."""
    model = replace(tiny.model, layout="report", tied_embedding=False, n_layers=1)
    return replace(tiny, model=model, run=replace(tiny.run, steps=100))


def test_rescue_finds_the_scale_and_the_bias_that_were_taken_away():
    """z = log q / 4 costs least at scale 4 and needs no bias; z = 0 needs log pi."""
    key = jax.random.key(0)
    z_BLV = 2 * jax.random.normal(key, (64, 32, 12)) + jnp.linspace(-3, 3, 12)
    log_q_BLV = jax.nn.log_softmax(z_BLV)
    targets_BL = jax.random.categorical(jax.random.key(1), log_q_BLV)
    ones_BL, pi_V = jnp.ones((64, 32)), reference.unigram_probs(targets_BL.ravel(), 12)
    scaled = triage.rescue(log_q_BLV / 4, targets_BL, ones_BL, pi_V)
    assert scaled["scale"] == pytest.approx(4, rel=0.1) and scaled["scale_gain"] > 0.3
    assert abs(scaled["bias"]) < 0.2
    flat = triage.rescue(0 * log_q_BLV, targets_BL, ones_BL, pi_V)
    assert flat["bias"] == pytest.approx(1, abs=1e-2)
    entropy = -np.sum(pi_V * np.log(pi_V))
    assert flat["bias_gain"] == pytest.approx(np.log(12) - entropy, abs=1e-3)


def test_displacement_of_doubled_and_of_unchanged_weights(untied):
    start = start_of(build(untied)).params
    moved = start | {"head": jax.tree.map(lambda w: 2 * w, start["head"])}
    found = triage.displacement(moved, start, "ternary")
    assert (found["moved_head"], found["norm_head"]) == (1, 2)
    assert found["moved_matrix"] == found["moved_embedding"] == found["codes_changed"] == 0
    flipped = {k: jax.tree.map(jnp.negative, v) for k, v in start.items()}
    codes = train.codes(start, "ternary")
    zeros = sum(int(jnp.sum(q == 0)) for q in codes.values()) / sum(q.size for q in codes.values())
    changed = triage.displacement(flipped, start, "ternary")["codes_changed"]
    assert changed == pytest.approx(1 - zeros)


def audit(cfg, **hyper):
    program = build(cfg, decoupled_1=0, decoupled_2=0, **hyper)
    rep = program.replicates[0]
    return triage.decay_audit(cfg.optim, cfg.run, rep.hyper, start_of(program).params)


def test_decay_audit_of_decoupled_decay_is_the_product(untied):
    program = build(untied, decoupled_1=0.5, decoupled_2=0.25, decay_rest=0.1)
    hyper, run = program.replicates[0].hyper, untied.run
    found = triage.decay_audit(untied.optim, run, hyper, start_of(program).params)
    n = np.arange(1, 101)
    lr = np.asarray(optim.learning_rate(hyper, n, run), np.float64)
    decay = np.where(n <= 50, 0.5, 0.25)
    assert found["matrix"]["expected"] == pytest.approx(np.prod(1 - lr * decay))
    assert found["head"]["expected"] == pytest.approx(np.prod(1 - lr * decay * 0.1))
    for group in found.values():
        assert group["factor"] == pytest.approx(group["expected"], rel=1e-5)
        assert group["spread"] < 1e-5


def test_decay_audit_tells_unscaled_from_coupled(untied):
    """The one multiplies all weights by prod(1 - decay), the other subtracts about lr from each."""
    unscaled = audit(untied, unscaled_1=0.02, unscaled_2=0.01)["matrix"]
    assert unscaled["factor"] == pytest.approx(0.98**50 * 0.99**50, rel=1e-4)
    assert unscaled["spread"] < 1e-5 and unscaled["expected"] > 0.99
    coupled = audit(untied, coupled_1=0.1, coupled_2=0.05)["matrix"]
    assert coupled["factor"] < 0.9 < coupled["expected"] and coupled["spread"] > 0.01


def test_gradient_audit_equals_gradients_and_sees_a_frozen_head(untied):
    program = build(untied, head_lr=0.0)
    state = start_of(program)
    found = triage.gradient_audit(program, state)
    windows_BL = triage.served(program, 1)[0]
    weights_BL = jnp.ones(windows_BL[:, 1:].shape).at[:, -1].set(untied.data.score_last)

    def loss(params):
        z_BLV = triage.logits(program.cfg, params, triage.numbers(program), windows_BL[:, :-1])
        return triage.next_token_loss(z_BLV, windows_BL[:, 1:], weights_BL)

    value, gradient = jax.value_and_grad(loss)(state.params)
    assert found["train_loss"] == pytest.approx(float(value), rel=1e-6)
    assert found["gradient_head"] == pytest.approx(triage.rms(gradient["head"]), rel=1e-4)
    assert found["update_head"] == 0 < found["update_matrix"]
    assert found["zeros_embedding"] > 0.5 > found["zeros_matrix"]


def test_straight_through_is_exact_and_formulas_alone_are_not():
    assert triage.straight_through() == {"ste_weight": 0, "ste_activation": 0}
    assert triage.straight_through(127)["ste_weight"] == 0
    with faults.without_straight_through():
        assert triage.straight_through()["ste_weight"] > 0.1


def test_only_the_first_token_of_a_window_has_no_earlier_ones(untied):
    """With windows of one token, context is worth exactly nothing."""
    program = build(untied)
    params = start_of(program).params
    assert triage.earlier_tokens(program, params, 0) != 0
    short = replace(program.evals, held_out_NBL=program.evals.held_out_NBL[..., :2])
    program = replace(program, evals=short)
    assert triage.earlier_tokens(program, params, 0) == pytest.approx(0, abs=1e-6)


def test_overfit_stops_once_the_loss_is_low(untied):
    found = triage.overfit(build(untied), start_of(build(untied)), windows=1, steps=1000)
    assert found["overfit_loss"] < triage.OVERFIT_LOSS and found["overfit_steps"] < 1000
    held = build(untied, lr_peak=0.0)
    assert triage.overfit(held, start_of(held), 1, 50)["overfit_loss"] > triage.OVERFIT_LOSS


@pytest.fixture(scope="module")
def healthy():
    """Numbers of a healthy run of 200 steps (experiments.faults, seed 0), groups left out."""
    m = {"loss": 5.905, "entropy": 5.951, "overconfidence": -0.046, "mutual_information": 0.496}
    m |= {"unigram_loss": 6.486, "scale": 1.01, "scale_gain": 0.0003, "bias": 0, "bias_gain": 0}
    m |= {"sum_lr": 0.165, "planned_lr": 0.165, "start_gain": 0.998, "start_latent": 0.041}
    m |= {"ste_weight": 0.0, "ste_activation": 0.0, "repeated": 0.0, "end_of_text_scored": 0.0}
    m |= {"offset": 1, "loss_error": 2e-6, "overfit_loss": 0.18, "overfit_steps": 25}
    m |= {"earlier_tokens": 0.126, "codes_changed": 0.177, "target_entropy": 6.18}
    for group, moved, update in (("matrix", 0.375, 0.007), ("head", 0.92, 0.008)):
        m |= {f"moved_{group}": moved, f"update_{group}": update, f"norm_{group}": 1.1}
        m |= {f"decay_factor_{group}": 0.9924, f"decay_expected_{group}": 0.9924}
        m |= {f"decay_spread_{group}": 3e-7, f"zeros_{group}": 0.0}
    return m


CHANGED = {
    "repeated batches": {"repeated": 0.97, "overconfidence": 2.1, "loss": 8.1},
    "shifted labels": {"offset": 2, "loss_error": 0.8},
    "padding is scored": {"end_of_text_scored": 0.5, "loss_error": 3.0},
    "another loss": {"loss_error": 0.1},
    "no straight-through gradient": {"ste_weight": 3.0},
    "logits scaled down": {"start_gain": 128**-0.5, "scale_gain": 0.4, "loss": 6.75},
    "decay through Adam": {"decay_factor_head": 0.2, "decay_spread_head": 0.4, "scale_gain": 1.0},
    "decay not scaled by the learning rate": {"decay_factor_head": 5e-4, "loss": 7.6},
    "output matrix not updated": {"moved_head": 0.0, "update_head": 0.0},
    "latent weights out of reach": {"start_latent": 0.8, "codes_changed": 0.01},
    "learning rate too small": {"planned_lr": 1.65e-3, "sum_lr": 1.65e-3, "moved_head": 0.01},
    "no gradient for the ternary weights": {"zeros_matrix": 1.0},
    "learning rate too high": {"overconfidence": 3.0, "loss": 9.2},
    "logits too small": {"scale_gain": 1.5, "scale": 6.0, "loss": 9.8},
    "context ignored": {"mutual_information": 0.001, "earlier_tokens": 0.0},
    "only the last token used": {"earlier_tokens": 0.001},
    "cannot overfit one batch": {"overfit_loss": 4.0},
}


@pytest.mark.parametrize("cause", script.NEXT)
def test_each_cause_follows_from_its_own_signature(healthy, cause):
    ranked = script.rank_causes(healthy | CHANGED[cause])
    assert ranked[0].name == cause
    assert all(0 < c.score <= 1 for c in ranked)


def test_a_healthy_run_has_no_cause_and_neither_has_a_young_one(healthy):
    assert script.rank_causes(healthy) == []
    young = {"sum_lr": 0.01, "loss": 7.3, "scale_gain": 0.6, "mutual_information": 0.01}
    assert script.rank_causes(healthy | young) == []


def test_the_ranking_names_neither_faults_nor_recipes(healthy):
    """Only measured numbers decide: further keys change nothing."""
    named = healthy | {"name": "coupled", "arm": "frozen head", "unique_tokens": 1.0}
    assert script.rank_causes(named) == []


@contextlib.contextmanager
def fresh(code):
    jax.clear_caches()
    with code():
        yield
    jax.clear_caches()


@pytest.mark.parametrize("fault", [f for f in faults.FAULTS if f.code], ids=lambda f: f.name)
def test_faulty_code_is_seen_before_training(untied, fault):
    """The tests of code and batches need no trained weights."""
    cfg = replace(untied, data=replace(untied.data, gather="host")) if fault.on_host else untied
    with fresh(fault.code):
        program = build(cfg)
        numbers = triage.measure(program, start_of(program), steps=25)
    assert script.rank_causes(numbers)[0].name == fault.cause


def test_command_writes_and_prints_the_causes(untied, tmp_path, capsys):
    """A checkpoint of the report's recipe: decay through Adam comes first."""
    program = build(untied, "report")
    manager = checkpoint.open_manager(tmp_path / "run", untied.run)
    checkpoint.save(manager, 3, program.init(), config.to_json(program.cfg, program.replicates))
    manager.close()
    script.main([f"{tmp_path / 'run'}@3:0"])
    printed = capsys.readouterr().out
    assert "1. decay through Adam (1.00)" in printed and "next: decouple" in printed
    [found] = json.loads((tmp_path / "run" / "triage.json").read_text())
    assert found["causes"][0]["name"] == "decay through Adam"
    assert found["measured"]["moved_head"] == 0
    with pytest.raises(config.UserError, match="no checkpoints in"):
        script.main([str(tmp_path / "nothing")])
    with pytest.raises(config.UserError, match="no replicate 4"):
        script.main([f"{tmp_path / 'run'}@3:4"])


def row_of(arm, seed, loss, *causes):
    made = [{"name": name, "score": 1.0, "evidence": ""} for name in causes]
    return {"arm": arm, "seed": seed, "final": {"eval/loss": loss}, "causes": made}


def test_analysis_counts_expressed_faults_and_false_alarms():
    healthy = [row_of(faults.HEALTHY, i, 5.9 + i / 100) for i in range(5)]
    right = row_of("frozen head", 0, 7.0, "output matrix not updated", "context ignored")
    wrong = row_of("coupled decay", 0, 7.0, "context ignored", "decay through Adam")
    harmless = row_of("no warm-up", 0, 5.92)
    study = faults.analyse([*healthy, right, harmless])
    assert "first for 1 of 1 expressed" in study.result and "alarms on 0 of 5" in study.result
    assert "names the fault" in study.conclusion and "no warm-up" in study.conclusion
    study = faults.analyse([*healthy, right, wrong, harmless])
    assert "does not yet name" in study.conclusion and "missed: coupled decay" in study.conclusion
    alarmed = [*healthy[:4], row_of(faults.HEALTHY, 4, 5.94, "context ignored")]
    assert "does not yet name" in faults.analyse([*alarmed, right]).conclusion


def test_prediction_interval_is_wider_than_that_of_the_mean_and_infinite_for_one_seed():
    assert faults.limit([1.0]) == np.inf
    two = faults.limit([0.0, 2.0])  # mean 1, std sqrt(2), t_0.975(1) = 12.706
    assert two == pytest.approx(1 + 12.706 * np.sqrt(2) * np.sqrt(1.5), rel=1e-4)


def test_every_fault_names_a_cause_that_triage_knows():
    assert {fault.cause for fault in faults.FAULTS} <= script.NEXT.keys()
    assert len(faults.CAUSES) == len(faults.FAULTS) == 12
