"""The BitNet b1.58 quantisers: scales, codes, and the straight-through pair used in training.

Formulas: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm, 2024), computed in
float32 as in transformers' AutoBitLinear (`integrations/bitnet.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp

EPS = 1e-5


def weight_scale(w: jax.Array) -> jax.Array:
    """Return s = 1 / max(mean|w|, 1e-5) in float32, one number for the whole tensor."""
    return 1.0 / jnp.maximum(jnp.mean(jnp.abs(w.astype(jnp.float32))), EPS)


def weight_codes(w: jax.Array, scale: jax.Array) -> jax.Array:
    """Return clip(round(w * scale), -1, 1) in float32; halves round to even."""
    return jnp.clip(jnp.round(w.astype(jnp.float32) * scale), -1, 1)


def activation_scale(x: jax.Array) -> jax.Array:
    """Return t = 127 / max(max|x|, 1e-5) over the last axis, kept as size 1, in float32."""
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return 127.0 / jnp.maximum(absmax, EPS)


def int8_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return clip(round(x * scale), -128, 127) in float32; halves round to even."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) * scale), -128, 127)


def pack_ternary(codes_IO: jax.Array) -> jax.Array:
    """Four codes in {-1, 0, 1} to a byte: int8 [I, O] -> uint8 [I, O / 4].

    Planar along the outputs: byte column j holds outputs j, j + O/4, j + 2 O/4 and j + 3 O/4 in
    bits 0-1, 2-3, 4-5 and 6-7, as code + 1. This is the transpose of what `pack_weights` of
    transformers (`integrations/bitnet.py`) makes of [O, I]. ValueError unless 4 divides O.
    """
    if codes_IO.ndim != 2 or codes_IO.shape[1] % 4:
        raise ValueError(f"codes of shape {codes_IO.shape}: [I, O] with O divisible by 4 needed")
    planes = jnp.split((codes_IO + 1).astype(jnp.uint8), 4, axis=1)
    return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def unpack_ternary(packed: jax.Array) -> jax.Array:
    """Inverse of `pack_ternary`: uint8 [I, O / 4] -> int8 codes [I, O]."""
    planes = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
    return jnp.concatenate(planes, axis=1).astype(jnp.int8) - 1


def divide(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """codes / scale, rounded once: XLA would turn a broadcast divisor into its reciprocal."""
    return codes / (scale + 0 * codes)


def blend(x, q, strength):
    """(1 - strength) x + strength q: exactly x at strength 0 and exactly q at strength 1."""
    return (1 - strength) * x.astype(jnp.float32) + strength * q


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantize_weight(w: jax.Array, strength: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Ternary codes / s, cast to `dtype` once; identity gradient.

    A custom_vjp rather than `w + stop_gradient(q - w)`: in bfloat16 that sum rounds to six distinct
    values instead of three. `strength` in [0, 1] blends with the latent weights (quantisation
    warm-up) and receives no gradient.
    """
    scale = weight_scale(w)
    return blend(w, divide(weight_codes(w, scale), scale), strength).astype(dtype)


def _weight_fwd(w, strength, dtype):
    return quantize_weight(w, strength, dtype), (jnp.zeros((0,), w.dtype), strength)


def _weight_bwd(dtype, residuals, grad):
    like_w, strength = residuals
    return grad.astype(like_w.dtype), jnp.zeros_like(strength)


quantize_weight.defvjp(_weight_fwd, _weight_bwd)


def quantize_fully(w: jax.Array, strength: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`quantize_weight` where both strengths are known to be 1: BitLinear may multiply codes."""
    del strength
    return quantize_weight(w, jnp.ones(()), dtype)


@jax.custom_vjp
def quantize_activation(x: jax.Array, strength: jax.Array) -> jax.Array:
    """int8 codes / t per token (last axis), in the type of `x`; the gradient passes unchanged."""
    scale = activation_scale(x)
    return blend(x, divide(int8_codes(x, scale), scale), strength).astype(x.dtype)


def _activation_fwd(x, strength):
    return quantize_activation(x, strength), strength


def _activation_bwd(strength, grad):
    return grad, jnp.zeros_like(strength)


quantize_activation.defvjp(_activation_fwd, _activation_bwd)
