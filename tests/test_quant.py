"""The quantisers: exact codes, exactly three values, and an identity for a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import quant

ONE = np.float32(1)


def dyadic(seed, shape, step=2.0**-10):
    """Multiples of `step` of magnitude up to 1, so float32 sums of them are exact in any order."""
    random = np.random.default_rng(seed)
    return (random.integers(-1024, 1025, shape) * step).astype(np.float32)


def numpy_weight(w):
    """The weight quantiser in NumPy float32: codes and what the model multiplies by."""
    scale = ONE / np.maximum(np.mean(np.abs(w), dtype=np.float32), np.float32(1e-5))
    codes = np.clip(np.rint(w * scale), -1, 1)
    return codes, codes / scale


def numpy_activation(x):
    """The activation quantiser in NumPy float32: codes and what the model multiplies."""
    absmax = np.max(np.abs(x), axis=-1, keepdims=True)
    scale = np.float32(127) / np.maximum(absmax, np.float32(1e-5))
    codes = np.clip(np.rint(x * scale), -128, 127)
    return codes, codes / scale


def weight_codes(w):
    return quant.weight_codes(w, quant.weight_scale(w))


def activation_codes(x):
    return quant.int8_codes(x, quant.activation_scale(x))


@pytest.mark.parametrize(
    ("w", "scale", "codes"),
    [
        ([[3.0, -1.0], [0.0, 0.0]], 1.0, [[1, -1], [0, 0]]),
        ([[0.5, -0.5], [1.5, -1.5]], 1.0, [[0, 0], [1, -1]]),  # 0.5 rounds to 0, not to 1
        ([[0.25, -0.25], [0.25, 0.25]], 4.0, [[1, -1], [1, 1]]),
        ([[8.0, 0.0], [0.0, 0.0]], 0.5, [[1, 0], [0, 0]]),  # 4 clips to 1
    ],
)
def test_ternary_codes_by_hand(w, scale, codes):
    w = jnp.array(w)
    assert quant.weight_scale(w) == scale
    np.testing.assert_array_equal(weight_codes(w), codes)
    np.testing.assert_array_equal(
        quant.quantize_weight(w, 1.0, jnp.float32), np.array(codes) / scale
    )


def test_int8_codes_by_hand_round_halves_to_even():
    x = jnp.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0])
    np.testing.assert_array_equal(activation_codes(x), [127, 0, 2, 2, 0, -2, -2, -127])
    np.testing.assert_array_equal(activation_codes(x / 4), activation_codes(x))


def test_all_zero_tensors_stay_zero():
    """The floor 1e-5 under the mean and under the maximum keeps both scales finite."""
    zeros = jnp.zeros((2, 3))
    assert quant.weight_scale(zeros) == 1e5
    np.testing.assert_array_equal(quant.activation_scale(zeros), np.full((2, 1), 127e5, np.float32))
    np.testing.assert_array_equal(quant.quantize_weight(zeros, 1.0, jnp.float32), zeros)
    np.testing.assert_array_equal(quant.quantize_activation(zeros, 1.0), zeros)


@pytest.mark.parametrize("seed", range(3))
def test_quantised_weights_equal_numpy_bit_for_bit(seed):
    w = dyadic(seed, (16, 32))
    codes, quantised = numpy_weight(w)
    np.testing.assert_array_equal(jax.jit(weight_codes)(w), codes)
    np.testing.assert_array_equal(quant.quantize_weight(w, 1.0, jnp.float32), quantised)


def test_quantised_activations_equal_numpy_bit_for_bit():
    """Including the division, which XLA would replace by a product with the reciprocal."""
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    codes, quantised = numpy_activation(x)
    np.testing.assert_array_equal(jax.jit(activation_codes)(x), codes)
    activations = jax.jit(quant.quantize_activation)(x, 1.0)
    np.testing.assert_array_equal(np.asarray(activations), quantised)


def test_bfloat16_input_is_quantised_in_float32_and_cast_once():
    """Without the upcast 8 % of the int8 codes would be off by one."""
    x = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    x32 = np.asarray(x, np.float32)
    np.testing.assert_array_equal(activation_codes(x), numpy_activation(x32)[0])
    output = quant.quantize_activation(x, 1.0)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output, jnp.asarray(numpy_activation(x32)[1], jnp.bfloat16))
    w = jnp.asarray(dyadic(0, (16, 16)))
    output = quant.quantize_weight(w, 1.0, jnp.bfloat16)
    np.testing.assert_array_equal(output, jnp.asarray(numpy_weight(np.asarray(w))[1], jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_take_exactly_three_values(dtype):
    w = jax.random.normal(jax.random.key(0), (64, 64))
    values = np.unique(np.asarray(quant.quantize_weight(w, 1.0, dtype), np.float32))
    assert len(values) == 3
    np.testing.assert_array_equal(values, [-values[2], 0, values[2]])


def test_the_stop_gradient_idiom_has_more_than_three_values_in_bfloat16():
    """Why the quantiser is a custom_vjp: w + (q - w) rounds differently for every w."""
    w = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    q = quant.quantize_weight(w, 1.0, jnp.bfloat16)
    naive = w + jax.lax.stop_gradient(q - w)
    assert len(np.unique(np.asarray(naive, np.float32))) > 3
    assert len(np.unique(np.asarray(q, np.float32))) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_token_reaches_127_and_none_minus_128(dtype):
    x = jax.random.normal(jax.random.key(1), (512, 32), dtype) * jnp.logspace(-4, 4, 512)[:, None]
    codes = np.asarray(activation_codes(x.astype(dtype)))
    np.testing.assert_array_equal(np.abs(codes).max(axis=-1), 127)


def transforms():
    """How a gradient is taken in practice; each maps (loss, w) to d loss / d w."""

    def scan(loss, w):
        def total(w):
            return jax.lax.scan(lambda carry, row: (carry + loss(row), None), 0.0, w[None])[0]

        return jax.grad(total)(w)

    return {
        "plain": lambda loss, w: jax.grad(loss)(w),
        "jit": lambda loss, w: jax.jit(jax.grad(loss))(w),
        "vmap": lambda loss, w: jax.vmap(jax.grad(loss))(w[None])[0],
        "scan": scan,
        "remat": lambda loss, w: jax.grad(jax.checkpoint(loss))(w),
    }


@pytest.mark.parametrize("transform", transforms())
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_gradient_passes_both_quantisers_unchanged(transform, strength):
    """Also for clipped weights, for the maximum of a token, and at any strength."""
    w, c = dyadic(0, (4, 8)) * 4, dyadic(1, (4, 8))
    gradient = transforms()[transform]
    for quantise in (
        lambda w: quant.quantize_weight(w, strength, jnp.float32),
        lambda x: quant.quantize_activation(x, strength),
    ):
        grad = gradient(lambda w, quantise=quantise: jnp.sum(c * quantise(w)), jnp.asarray(w))
        np.testing.assert_array_equal(grad, c)


def test_a_bfloat16_cotangent_reaches_float32_weights_exactly():
    w, c = jnp.asarray(dyadic(0, (4, 8))), jnp.asarray(dyadic(1, (4, 8)), jnp.bfloat16)
    grad = jax.grad(lambda w: jnp.sum(c * quant.quantize_weight(w, 1.0, jnp.bfloat16)))(w)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, c)


def test_strength_receives_no_gradient():
    w = jnp.asarray(dyadic(0, (4, 8)))
    assert jax.grad(lambda s: jnp.sum(quant.quantize_weight(w, s, jnp.float32)))(0.5) == 0
    assert jax.grad(lambda s: jnp.sum(quant.quantize_activation(w, s)))(0.5) == 0


def test_strength_blends_from_the_input_to_the_codes():
    """Exactly the input at 0, exactly the quantised tensor at 1, the middle at 1/2."""
    w = jax.random.normal(jax.random.key(2), (8, 8))
    for quantise in (
        lambda w, s: quant.quantize_weight(w, s, jnp.float32),
        quant.quantize_activation,
    ):
        full = quantise(w, 1.0)
        np.testing.assert_array_equal(quantise(w, 0.0), w)
        np.testing.assert_allclose(quantise(w, 0.5), (w + full) / 2, rtol=1e-6, atol=1e-7)
        assert not np.array_equal(full, w)
    codes = weight_codes(w) / quant.weight_scale(w)
    np.testing.assert_array_equal(quant.quantize_weight(w, 1.0, jnp.float32), codes)


@pytest.mark.parametrize("factor", [2.0**-3, 2.0, 2.0**5])
def test_quantising_commutes_with_scaling_by_powers_of_two(factor):
    w = jax.random.normal(jax.random.key(3), (16, 16))
    for quantise in (
        lambda w: quant.quantize_weight(w, 1.0, jnp.float32),
        lambda x: quant.quantize_activation(x, 1.0),
    ):
        np.testing.assert_array_equal(quantise(factor * w), factor * quantise(w))


@pytest.mark.parametrize(
    ("draw", "zero_rate", "decibels"), [("normal", 0.310, 5.79), ("uniform", 0.250, 8.06)]
)
def test_zero_rate_and_noise_of_known_distributions(draw, zero_rate, decibels):
    """P(|w| < mean|w| / 2) and 10 log10(E w^2 / E (w - Qw)^2), both known in closed form."""
    random = np.random.default_rng(0)
    shape = (512, 512)
    w = random.normal(size=shape) if draw == "normal" else random.uniform(-1, 1, shape)
    w = w.astype(np.float32)
    q = np.asarray(quant.quantize_weight(w, 1.0, jnp.float32), np.float64)
    assert np.mean(q == 0) == pytest.approx(zero_rate, abs=0.003)
    noise = np.mean((w.astype(np.float64) - q) ** 2)
    assert 10 * np.log10(np.mean(w.astype(np.float64) ** 2) / noise) == pytest.approx(
        decibels, abs=0.05
    )


def test_under_vmap_every_replicate_has_its_own_scale_and_strength():
    w = jnp.stack([dyadic(0, (8, 8)), 8 * dyadic(1, (8, 8)), dyadic(2, (8, 8))])
    strength = jnp.array([1.0, 1.0, 0.0])
    weights = jax.vmap(quant.quantize_weight, in_axes=(0, 0, None))(w, strength, jnp.float32)
    np.testing.assert_array_equal(weights[0], numpy_weight(np.asarray(w[0]))[1])
    np.testing.assert_array_equal(weights[1], numpy_weight(np.asarray(w[1]))[1])
    np.testing.assert_array_equal(weights[2], w[2])


def test_a_byte_holds_outputs_a_quarter_apart_low_bits_first():
    """code + 1 of columns j, j + 2, j + 4, j + 6 of eight: 2 + 4 * 1 + 16 * 0 + 64 * 2 = 134."""
    codes = np.array([[1, 0, 0, 1, -1, 0, 1, -1], [-1] * 8, [0] * 8, [1] * 8], np.int8)
    packed = quant.pack_ternary(codes)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, [[134, 25], [0, 0], [85, 85], [170, 170]])
    np.testing.assert_array_equal(quant.unpack_ternary(packed), codes)


@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 36), (16, 64)])
def test_packing_is_undone_exactly_and_never_writes_the_code_3(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    packed = np.asarray(jax.jit(quant.pack_ternary)(codes))
    assert packed.shape == (shape[0], shape[1] // 4)
    for shift in (0, 2, 4, 6):
        assert (packed >> shift & 3).max() <= 2
    unpacked = jax.jit(quant.unpack_ternary)(packed)
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, codes)


def test_every_byte_of_four_codes_is_a_different_one():
    """All 81 combinations of four codes, each packed into its own byte in base 4."""
    codes = np.stack(np.meshgrid(*[[-1, 0, 1]] * 4, indexing="ij"), axis=-1).reshape(81, 4)
    packed = np.asarray(quant.pack_ternary(codes.astype(np.int8)))
    np.testing.assert_array_equal(packed[:, 0], (codes + 1) @ 4 ** np.arange(4))


@pytest.mark.parametrize("n_outputs", [1, 2, 3, 6])
def test_outputs_that_do_not_fill_bytes_are_refused_by_shape(n_outputs):
    with pytest.raises(ValueError, match=rf"\(2, {n_outputs}\).*divisible by 4"):
        quant.pack_ternary(np.zeros((2, n_outputs), np.int8))
