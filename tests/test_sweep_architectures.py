"""The architecture sweep: one change at a time, weight formats that are exact, claims on rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lab import make_rows

from bitnet_jax import presets, quant, train
from bitnet_jax.config import Hyper, RunConfig
from experiments import sweep_architectures as study
from experiments.lab import arms, rows
from experiments.lab.arms import Request
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.exhibits import Exhibits
from experiments.lab.studies import QUICK

TINY = presets.preset("tiny")
LARGEST = {"int4": 7, "int8": 127}


# -------------------------------------------------------------------------------------------- arms


def test_every_change_makes_a_valid_model_of_one_changed_factor():
    request = Request("toy", "tiny", TINY, {}, [0], workdir="unused", at_once=9)
    factors = {"d_ff": "d_model", "act_quant": "weight_quant"}  # move together
    for arm in study.ARMS:
        cfg, (rep,), base = arms.replicates(request, arm, 1)
        plain = presets.RECIPES[arm.recipe](RunConfig(steps=20))
        moved = {
            n for n in vars(plain) if n != "extra" and getattr(plain, n) != getattr(rep.hyper, n)
        }
        moved |= {n for n in vars(TINY.model) if getattr(TINY.model, n) != getattr(cfg.model, n)}
        moved = {factors.get(name, name) for name in moved} | set(arm.extra)
        moved |= {"weight format"} if "-bit" in arm.name else set()
        name = arm.name.partition(" ")[2]
        # TINY is tied already, so that this arm moves the scale of its logits alone.
        assert len(moved) == (name != "base"), arm.name
        assert set(base) == set(arm.fields)


def test_both_recipes_have_every_change():
    names = [arm.name for arm in study.ARMS]
    assert len(set(names)) == len(names) == 24
    assert {arm.name.partition(" ")[0] for arm in study.ARMS if arm.recipe == "coupled"} == {
        "coupled"
    }


def test_widths_scale_together():
    request = Request("toy", "tiny", TINY, {}, [0], workdir="unused", at_once=9)
    by_name = {arm.name: arm for arm in study.ARMS}
    cfg = arms.replicates(request, by_name["coupled half width"], 1)[0]
    assert (cfg.model.d_model, cfg.model.d_ff) == (16, 32)
    rep = arms.replicates(request, by_name["coupled tied embedding"], 1)[1][0]
    assert rep.hyper.logit_scale == 32**-0.5


# ---------------------------------------------------------------------------------- weight formats


def dyadic(seed, shape, step=2.0**-10):
    """Multiples of `step` of magnitude up to 1, so float32 sums of them are exact in any order."""
    random = np.random.default_rng(seed)
    return (random.integers(-1024, 1025, shape) * step).astype(np.float32)


def quantised(w, name, strength=1.0, dtype=jnp.float32):
    return np.asarray(study.QUANTISERS[name](jnp.asarray(w), strength, dtype), np.float32)


@pytest.mark.parametrize("name", LARGEST)
def test_weight_formats_have_their_number_of_levels(name):
    """Symmetric integers times one scale; the largest weight is kept."""
    w = np.random.default_rng(0).uniform(-1, 1, (64, 512)).astype(np.float32)
    weights, step = quantised(w, name), np.abs(w).max() / LARGEST[name]
    codes = np.rint(weights / step)
    np.testing.assert_array_equal(np.unique(codes), np.arange(-LARGEST[name], LARGEST[name] + 1))
    assert len(np.unique(weights)) == 2 * LARGEST[name] + 1
    np.testing.assert_allclose(weights, codes * step, rtol=1e-6)
    np.testing.assert_array_equal(codes, np.rint(w / step))
    assert np.abs(weights).max() == pytest.approx(np.abs(w).max(), rel=1e-6)


@pytest.mark.parametrize("name", LARGEST)
def test_every_level_of_a_format_is_kept_exactly(name):
    """Codes -largest .. largest times a power of two come back bit for bit."""
    w = np.arange(-LARGEST[name], LARGEST[name] + 1, dtype=np.float32)[None] / 16
    np.testing.assert_array_equal(quantised(w, name), w)


def test_all_zero_weights_stay_zero():
    np.testing.assert_array_equal(quantised(np.zeros((2, 3), np.float32), "int4"), 0)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_more_levels_mean_less_noise(draw):
    """Ternary < int4 < int8; uniform weights in steps of 1 / 127 lose 20 log10(254) dB."""
    random = np.random.default_rng(0)
    shape = (256, 256)
    w = random.normal(size=shape) if draw == "normal" else random.uniform(-1, 1, shape)
    w = w.astype(np.float32)
    ternary = np.asarray(quant.quantize_weight(jnp.asarray(w), 1.0, jnp.float32))
    decibels = [
        10 * np.log10(np.mean(w**2) / np.mean((w.astype(np.float64) - q) ** 2))
        for q in (ternary, quantised(w, "int4"), quantised(w, "int8"))
    ]
    assert decibels[0] + 6 < decibels[1] and decibels[1] + 20 < decibels[2]
    if draw == "uniform":
        assert decibels[2] == pytest.approx(20 * np.log10(254), abs=0.2)


@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_gradient_passes_unchanged_and_strength_has_none(name, strength):
    w, c = dyadic(0, (4, 8)), dyadic(1, (4, 8))

    def total(w, strength):
        return jnp.sum(c * study.QUANTISERS[name](w, strength, jnp.float32))

    for gradient in (jax.grad(total, (0, 1)), jax.jit(jax.grad(total, (0, 1)))):
        of_w, of_strength = gradient(jnp.asarray(w), strength)
        np.testing.assert_array_equal(of_w, c)
        assert of_strength == 0


@pytest.mark.parametrize("name", LARGEST)
def test_a_bfloat16_cotangent_reaches_float32_weights_exactly(name):
    w, c = jnp.asarray(dyadic(0, (4, 8))), jnp.asarray(dyadic(1, (4, 8)), jnp.bfloat16)
    grad = jax.grad(lambda w: jnp.sum(c * study.QUANTISERS[name](w, 1.0, jnp.bfloat16)))(w)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, c)


def test_strength_blends_from_the_input_to_the_codes():
    w = dyadic(2, (8, 8))
    np.testing.assert_array_equal(quantised(w, "int4", 0.0), w)
    middle = (w + quantised(w, "int4")) / 2
    np.testing.assert_allclose(quantised(w, "int4", 0.5), middle, rtol=1e-6, atol=1e-7)


def test_under_vmap_every_replicate_has_its_own_scale():
    w = jnp.stack([dyadic(0, (8, 8)), 8 * dyadic(1, (8, 8))])
    weights = jax.vmap(lambda w: study.QUANTISERS["int4"](w, 1.0, jnp.float32))(w)
    for replicate_w, alone in zip(weights, w, strict=True):
        np.testing.assert_array_equal(replicate_w, quantised(alone, "int4"))


def test_each_format_reaches_the_model_through_the_seam():
    """Logits differ from the ternary model's and from each other's."""
    cfg = presets.override(TINY, ["model.vocab_size=300", "model.n_layers=1"])[0]
    hyper, tokens_BL = Hyper(), np.arange(8, dtype=np.int32)[None]
    params = train.init_state(cfg, hyper, 0).params
    formats = [train.STANDARD] + [
        arm.seams
        for arm in study.ARMS
        if arm.name in ("coupled 8-bit weights", "coupled 4-bit weights")
    ]
    stacked, hypers = (jax.tree.map(lambda x: jnp.asarray(x)[None], t) for t in (params, hyper))
    forwards = [jax.jit(partial(train.forward, cfg, seams)) for seams in formats]
    logits = [forward(stacked, hypers, tokens_BL) for forward in forwards]
    gaps = [
        float(jnp.abs(a - b).max()) for a, b in zip(logits, logits[1:] + logits[:1], strict=True)
    ]
    assert min(gaps) > 1e-3


# ------------------------------------------------------------------------------------------ claims

COUPLED, HEALTHY = 5.0, 3.0  # losses; the unigram's is 4


def make(**losses):
    """Three seeds; `losses` by arm, with _ for what a Python name cannot hold."""
    numbers = {}
    for arm in study.ARMS:
        usual = COUPLED if arm.recipe == "coupled" else HEALTHY
        name = arm.name.replace(" ", "_").replace("-", "_")
        numbers[arm.name] = [losses.get(name, usual) + 0.1 * seed for seed in range(3)]
    return make_rows(numbers)


STANDARD = {
    "coupled_logits_x_16": 3.3,
    "decoupled_logits_x_16": 3.9,
    "decoupled_tied_embedding": 3.9,
}


def statuses(**losses):
    df = rows.frame(make(**STANDARD | losses))
    return {claim.name: judge(claim, QUICK, df).status for claim in study.CLAIMS}


@pytest.mark.parametrize(
    ("losses", "changed"),
    [
        ({}, {}),
        ({"coupled_full_precision": 3.0}, {"none": FAILS, "decoupling": FAILS, "bits": FAILS}),
        ({"coupled_4_bit_weights": 4.8}, {"bits": FAILS}),
        ({"coupled_logits_x_16": 5.0}, {"scale": FAILS}),
        ({"coupled_logits_x_16": 2.9}, {"scale": FAILS}),
        ({"decoupled_half_width": 4.5}, {"none": UNDECIDED, "healthy": FAILS}),
        ({"decoupled_tied_embedding": 3.0}, {"healthy": FAILS}),
        ({"decoupled_base": 4.5}, {"none": UNDECIDED, "scale": UNDECIDED, "healthy": FAILS}),
    ],
)  # fmt: skip
def test_claims_follow_from_the_rows(losses, changed):
    outcomes = statuses(**losses)
    assert {name: status for name, status in outcomes.items() if status != HOLDS} == changed


def test_changes_and_decoupling_have_a_line_each():
    df = rows.frame(make())
    shown = Exhibits(df)
    study.show(df, shown)
    assert [len(table.rows) for table in shown.tables] == [11, 11, 12, 24 + 4]
    assert len(shown.figures) == 2
