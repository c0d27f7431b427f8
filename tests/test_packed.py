"""Packed ternary weights: the same model in 2 bits, with exact integer products."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import generate, presets, products, quant, restore, train
from bitnet_jax.config import Config, Hyper, ModelConfig
from bitnet_jax.fields import UserError
from bitnet_jax.model import (
    Transformer,
    bit_linear,
    integer_linear,
    pack_params,
    packed_product,
)

SHAPES = {
    "b158, tied": {},
    "b158, untied, grouped queries": {"n_kv_heads": 2, "tied_embedding": False},
    "report, untied": {"layout": "report", "tied_embedding": False},
    "report, tied, bias": {"layout": "report", "output_bias": True},
}


def config(**shape):
    sizes = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    return ModelConfig(**{**sizes, "d_ff": 48, **shape})


def random_params(cfg, seed=0):
    """Norms unlike 1, and weights of a size at which no layer is negligible."""
    init = Transformer(cfg).init
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), tokens_BL, Hyper())["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: ((x.ndim == 1) + 0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


def as_packed(cfg):
    return replace(cfg, weight_format="packed")


def forward(cfg, params, tokens_BL, hyper=Hyper()):  # noqa: B008
    return np.asarray(
        jax.jit(lambda p: Transformer(cfg).apply({"params": p}, tokens_BL, hyper))(params)
    )


@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 48, 32), (70, 128, 20)])
def test_integer_products_equal_numpy_int64(shape):
    """All of int8 and of ternary, with sums past the range of int16."""
    n, n_in, n_out = shape
    rng = np.random.default_rng(0)
    x_ND = rng.integers(-128, 128, (n, n_in), np.int8)
    w_DF = rng.integers(-1, 2, (n_in, n_out), np.int8)
    x_ND[0], w_DF[:, 0] = -128, 1
    packed = jax.jit(packed_product)(x_ND, quant.pack_ternary(w_DF))
    codes = jax.jit(lambda x, w: products.dot(x, w, 1, 0, jnp.int32))(x_ND, w_DF)
    for product in (packed, codes):
        assert product.dtype == jnp.int32
        np.testing.assert_array_equal(product, x_ND.astype(np.int64) @ w_DF.astype(np.int64))


def test_a_packed_linear_layer_by_hand():
    """Codes 127 and -64 (63.5 to even) times a column of ones, and scales of 1/2 and 127/4."""
    w_DF = np.array([[1, 0, 0, -1], [1, 1, 0, 0]], np.int8)
    y = integer_linear(jnp.array([4.0, -2.0]), quant.pack_ternary(w_DF), jnp.float32(0.5))
    expected = np.array([63, -64, 0, -127]) * 0.5 * 4 / 127
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_packed_linear_layer_equals_the_fake_quantised_one(dtype):
    """To float32 rounding; in bfloat16 to that of its operands, which codes do not have."""
    rng = np.random.default_rng(0)
    w_DF = rng.normal(size=(64, 32)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), dtype)
    scale = quant.weight_scale(w_DF)
    packed = quant.pack_ternary(quant.weight_codes(w_DF, scale).astype(jnp.int8))
    output, expected = integer_linear(x, packed, 1 / scale), bit_linear(x, w_DF, Hyper())
    assert output.dtype == dtype and output.shape == expected.shape
    size = float(jnp.std(expected.astype(jnp.float32)))
    tolerance = size * (2e-6 if dtype == jnp.float32 else 2e-2)
    output, expected = (np.asarray(y, np.float32) for y in (output, expected))
    np.testing.assert_allclose(output, expected, rtol=1e-2 * (dtype != jnp.float32), atol=tolerance)


@pytest.mark.parametrize("form", ["codes", "packed"])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_logits_and_their_argmax_equal_those_of_master_weights(name, form):
    cfg = config(**SHAPES[name])
    params = random_params(cfg)
    tokens_BL = np.random.default_rng(1).integers(0, cfg.vocab_size, (3, 16))
    expected_BLV = forward(cfg, params, tokens_BL)
    packed = pack_params(params, cfg, Hyper(), form)
    found_BLV = forward(replace(cfg, weight_format=form), packed, tokens_BL)
    np.testing.assert_allclose(found_BLV, expected_BLV, atol=2e-4 * expected_BLV.std(), rtol=1e-4)
    np.testing.assert_array_equal(found_BLV.argmax(-1), expected_BLV.argmax(-1))
    assert len(np.unique(found_BLV.argmax(-1))) > 5


def test_models_decode_from_codes_where_their_products_pay_and_weights_are_ternary(monkeypatch):
    dense, params = Hyper(weight_quant=0.0, act_quant=0.0), random_params(config())
    for machine, hyper, shape, asked, form in (
        ("cpu with AMX", Hyper(), config(), False, "codes"),
        ("cpu with AMX", Hyper(), config(), True, "packed"),
        ("cpu with AMX", dense, config(), False, "ternary"),
        ("cpu with AMX", Hyper(), as_packed(config()), False, "packed"),
        ("gpu", Hyper(), config(), False, "ternary"),
        ("gpu", Hyper(), config(), True, "packed"),
    ):
        monkeypatch.setattr(products, "machine", lambda machine=machine: machine)
        model = restore.Model("m", Config(model=shape), hyper, params, None)
        decoding_model = generate.for_decoding(model, packed=asked)
        assert decoding_model.cfg.model.weight_format == form
        layer = decoding_model.params["block_0"]["ffn"]["down"]
        if form == shape.weight_format:
            assert decoding_model is model
        else:
            assert set(layer) == {form, "scale"}


def test_packed_parameters_are_two_bits_a_weight_and_a_scale_per_matrix():
    """The scale is the value of code 1, and norms, embedding and head stay float32 as they are."""
    cfg = config(layout="report", tied_embedding=False)
    params = random_params(cfg)
    packed = pack_params(params, cfg, Hyper())
    assert set(packed["block_0"]["attn"]["qkv"]) == {"norm", "packed", "scale"}
    layer, w = packed["block_0"]["ffn"]["down"], params["block_0"]["ffn"]["down"]["kernel"]
    assert layer["packed"].dtype == jnp.uint8 and layer["packed"].shape == (48, 32 // 4)
    assert layer["scale"].dtype == jnp.float32 and layer["scale"].shape == ()
    np.testing.assert_allclose(layer["scale"], np.abs(w).mean(), rtol=1e-6)
    codes = quant.weight_codes(w, quant.weight_scale(w))
    np.testing.assert_array_equal(quant.unpack_ternary(layer["packed"]), codes)
    for part in ("embed", "head", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, packed[part], params[part])


def test_in_bfloat16_embedding_and_head_are_kept_as_they_are_used():
    """Casting them before the model does leaves every logit as it is."""
    cfg = config(tied_embedding=False, dtype="bfloat16")
    packed = pack_params(random_params(cfg), cfg, Hyper())
    uncast = pack_params(random_params(cfg), replace(cfg, dtype="float32"), Hyper())
    assert packed["embed"]["embedding"].dtype == packed["head"]["kernel"].dtype == jnp.bfloat16
    tokens_BL = np.arange(12).reshape(2, 6)
    logits, expected = (forward(as_packed(cfg), p, tokens_BL) for p in (packed, uncast))
    np.testing.assert_array_equal(logits, expected)


def test_packed_parameters_are_not_packed_again():
    """Quantising ternary values once more would shrink their scale by the share of zeros."""
    cfg = config()
    packed = pack_params(random_params(cfg), cfg, Hyper())
    jax.tree.map(
        np.testing.assert_array_equal, pack_params(packed, as_packed(cfg), Hyper()), packed
    )


def test_replicates_are_packed_with_scales_of_their_own():
    cfg = config()
    params = random_params(cfg)
    stacked = jax.tree.map(lambda w: np.stack([w, 3 * w]), params)
    hyper = jax.tree.map(lambda x: np.full(2, x), Hyper())
    packed = pack_params(stacked, cfg, hyper)["block_1"]["attn"]["o"]
    single = pack_params(params, cfg, Hyper())["block_1"]["attn"]["o"]
    np.testing.assert_array_equal(packed["packed"], np.stack([single["packed"]] * 2))
    np.testing.assert_allclose(packed["scale"], single["scale"] * np.array([1, 3]), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "hyper", "message"),
    [
        ({}, {"weight_quant": 0.5}, "weight_quant is 0.5"),
        ({}, {"act_quant": 0.0}, "act_quant is 0"),
        ({"d_ff": 50}, {}, "block_0/ffn/(gate|up)/kernel has 50 outputs"),
    ],
)
def test_what_packing_would_change_is_refused_by_name(shape, hyper, message):
    cfg = config(**shape)
    with pytest.raises(UserError, match=message):
        pack_params(random_params(cfg), cfg, Hyper(**hyper))


def test_packed_weights_are_not_trained():
    cfg = presets.preset("tiny")
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=61, weight_format="packed"))
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: train.init_state(cfg, Hyper(), 0))
    assert str(error.value) == "model.weight_format=packed: packed weights cannot be trained"


def decoding_memory(weight_format, n_layers):
    """Bytes of temporary memory of a compiled loop of decoding."""
    cfg = config(d_model=64, d_ff=256, vocab_size=16, n_layers=n_layers)
    params = jax.tree.map(lambda x: x[None], random_params(cfg))
    hyper = jax.tree.map(lambda x: np.full(1, x, np.float32), Hyper())
    if weight_format == "packed":
        params, cfg = pack_params(params, cfg, hyper), as_packed(cfg)
    cfg = replace(presets.preset("tiny"), model=cfg)
    args = (params, hyper, jnp.zeros((1, 2), jnp.int32), jnp.array([2]))
    state = jax.eval_shape(lambda *args: generate.begin(cfg, *args, 4, 0), *args)
    run = generate.extend.lower(cfg, params, hyper, state, 4, generate.Sampling(), 99)
    return run.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_weights_stay_packed_while_decoding():
    """More layers need no more temporary memory, so no unpacked copy of them all exists.

    With master weights the loop keeps their quantised float32 values beside them.
    """
    growth = {
        name: decoding_memory(name, 3) - decoding_memory(name, 1) for name in ("ternary", "packed")
    }
    n_weights = 2 * (4 * 64 * 64 + 3 * 64 * 256)  # of two blocks
    assert growth["packed"] < 0.25 * n_weights < 4 * n_weights <= growth["ternary"]
