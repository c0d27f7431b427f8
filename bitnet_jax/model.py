"""The BitNet b1.58 transformer: maths in functions, Linen modules that own parameters and names.

Three layouts from one set of functions, with an activation f of the gate (relu2: relu squared):

b158    x += o(sub_norm(attention(q, k, v of norm(x))));  x += down(sub_norm(f(gate) * up))
        (BitNet b1.58 2B4T, arXiv 2504.12285; transformers `models/bitnet`)
llama   x += o(attention(q, k, v of norm(x)));  x += down(f(gate) * up)
        (transformers `models/llama`, whose linear layers bitnet quantisation replaces)
report  x += o'(attention(qkv'(norm(x))));  x += down'(f(gate) * up), with l'(x) = l(norm_l(x))
        (github.com/dcgrigsby/bitnet at 5f80475: a norm inside every BitLinear, fused projections)

Given `position_BL`, the attention reads and writes the collection "cache" (`empty_cache`): token
[b, l] goes to slot `position_BL[b, l]` of row b and attends to the slots up to its own.

With `weight_format` codes or packed, a BitLinear holds ternary codes in 8 or 2 bits and their scale
(`pack_params`) and multiplies integers.

Shapes: B batch, L position, D width, H query heads, G key/value heads, K head width,
F feed-forward, V vocabulary, S slots of the cache.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax import products, quant
from bitnet_jax.config import Hyper, ModelConfig, rope_scaling_numbers
from bitnet_jax.fields import UserError
from bitnet_jax.sharding import by_columns, gathered, split_batch, stacked, summed, whole


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean x^2 + eps) * scale over the last axis, in float32, cast back."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y * scale_D).astype(x.dtype)


def rope_factors(width: int, theta: float, scaling: str) -> np.ndarray:
    """What each rotary frequency of a head is divided by under `model.rope_scaling`: float32 [K/2].

    1 for waves that fit HIGH times into the original length, FACTOR for those that do not fit LOW
    times, between them a blend (transformers 5.23 `modeling_rope_utils.py`).
    """
    factor, low, high, length = rope_scaling_numbers(scaling)
    fits_K = length * theta ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    kept_K = np.clip((fits_K - low) / (high - low), 0, 1)
    return (1 / ((1 - kept_K) / factor + kept_K)).astype(np.float32)


def rope(x_BLHK: jax.Array, theta: float, position_BL=None, scaling=None) -> jax.Array:
    """Rotate (first half, second half) pairs of each head by position (arXiv 2104.09864).

    Positions [B, L] are 0 .. L - 1 unless given; `scaling` is `model.rope_scaling`.
    """
    length, width = x_BLHK.shape[1], x_BLHK.shape[-1]
    freq_K = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling:
        freq_K = freq_K / rope_factors(width, theta, scaling)
    position = jnp.arange(length) if position_BL is None else position_BL
    angle = position.astype(jnp.float32)[..., None] * freq_K
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


NOTHING = jax.checkpoint_policies.nothing_saveable  # of a block with `remat`, besides its input
ACTIVATIONS = {  # by the names of transformers' `activations.ACT2FN`
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


def glu(gate_BLF: jax.Array, up_BLF: jax.Array, activation: str) -> jax.Array:
    """activation(gate) * up, gated as in arXiv 2002.05202."""
    return ACTIVATIONS[activation](gate_BLF) * up_BLF


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_ND: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """Rows times a matrix [D, F] (axis 0) or [F, D] (axis 1): float32 [N, F].

    A custom_vjp on rows, because XLA:CPU computes the derived gradient of a matrix transposed and
    copies it, which costs most for the head of a large vocabulary. Devices that share a batch sum
    that gradient in float32.
    """
    return products.dot(x_ND, w, 1, axis)


def _product_fwd(x_ND, w, axis):
    return product(x_ND, w, axis), (x_ND, w)


def _product_bwd(axis, residuals, grad_NF):
    x_ND, w = residuals
    grad_NF = grad_NF.astype(x_ND.dtype)
    pair = (x_ND, grad_NF) if axis == 0 else (grad_NF, x_ND)
    grad_x, grad_w = products.dot(grad_NF, w, 1, 1 - axis), products.dot(*pair, 0, 0)
    return grad_x.astype(x_ND.dtype), summed(grad_w).astype(w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def bit_linear(
    x: jax.Array, w_DF: jax.Array, hyper: Hyper, quantize_weight: Callable = quant.quantize_weight
) -> jax.Array:
    """Quantised activations times quantised weights, in the type of `x`.

    With `quant.quantize_fully` by codes (`products.code_linear`), which leaves out the rounding of
    quotients and sums.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    if quantize_weight is quant.quantize_fully:
        return products.code_linear(x_ND, w_DF).reshape(*x.shape[:-1], -1)
    w_q = gathered(quantize_weight(w_DF, hyper.weight_quant, x.dtype))
    x_ND = quant.quantize_activation(x_ND, hyper.act_quant)
    return product(x_ND, w_q, 0).astype(x.dtype).reshape(*x.shape[:-1], -1)


def integer_linear(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Int8 activation codes times ternary codes, then both scales; in the type of `x`.

    `codes` are int8 [D, F] or packed uint8 [D, F / 4]. Equals `bit_linear` at full strength up to
    the rounding of its quotients: the sum of int8 times ternary products is exact, an integer below
    2^31 (and below 2^24 for D < 2^24 / 127 = 132,104, so float32 holds it).
    """
    x_ND = x.reshape(-1, x.shape[-1])
    activation_scale_N1 = quant.activation_scale(x_ND)
    q_ND = quant.int8_codes(x_ND, activation_scale_N1).astype(jnp.int8)
    if codes.dtype == jnp.uint8:
        sums_NF = packed_product(q_ND, codes)
    else:
        sums_NF = products.dot(q_ND, codes, 1, 0, jnp.int32)
    y_NF = sums_NF.astype(jnp.float32) * scale / activation_scale_N1
    return y_NF.astype(x.dtype).reshape(*x.shape[:-1], -1)


def packed_product(codes_ND: jax.Array, packed: jax.Array) -> jax.Array:
    """Int8 codes [N, D] times packed ternary codes of [D, F] (`quant.pack_ternary`): int32 [N, F].

    A loop over the four planes, one unpacked at a time, rather than a product with
    `quant.unpack_ternary`, which XLA:CPU would unpack for all layers before it starts on the first,
    and unpacked bytes do not fit its cache.
    """

    def plane(shift):
        w_DP = (packed >> shift & 3).astype(jnp.int8) - 1
        return products.dot(codes_ND, w_DP, 1, 0, jnp.int32)

    sums_4NP = jax.lax.map(plane, jnp.arange(0, 8, 2, dtype=jnp.uint8))
    return jnp.moveaxis(sums_4NP, 0, 1).reshape(len(codes_ND), -1)


def lookup(embedding_VD: jax.Array, tokens_BL: jax.Array, dtype) -> jax.Array:
    """Rows of the embedding [B, L, D]; of all tokens of a split batch, on devices that share D."""
    x_BLD = jnp.take(by_columns(embedding_VD), whole(tokens_BL), axis=0).astype(dtype)
    return split_batch(by_columns(x_BLD))


def kernel_init(cfg: ModelConfig):
    """Initialiser of linear layers: N(0, 0.02), or U(+-1/sqrt(fan_in)) in the report layout."""
    if cfg.layout != "report":
        return nn.initializers.normal(0.02)

    def uniform(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(shape[0])
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform


def embedding_init(cfg: ModelConfig):
    """Initialiser of the embedding: N(0, 0.02), or N(0, 1) in the report layout."""
    return nn.initializers.normal(1.0 if cfg.layout == "report" else 0.02)


class RMSNorm(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        return rms_norm(x, scale_D, self.cfg.norm_eps)


class BitLinear(nn.Module):
    cfg: ModelConfig
    features: int
    quantize_weight: Callable = quant.quantize_weight

    @nn.compact
    def __call__(self, x, hyper):
        if self.cfg.layout == "report":
            x = RMSNorm(self.cfg, name="norm")(x)
        if (form := self.cfg.weight_format) != "ternary":
            if self.is_initializing():
                raise UserError(f"model.weight_format={form}: {form} weights cannot be trained")
            codes, scale = (self.get_variable("params", name) for name in (form, "scale"))
            return integer_linear(x, codes, scale)
        shape = (x.shape[-1], self.features)
        w_DF = self.param("kernel", kernel_init(self.cfg), shape, jnp.float32)
        return bit_linear(x, w_DF, hyper, self.quantize_weight)


class Attention(nn.Module):
    cfg: ModelConfig
    quantize_weight: Callable = quant.quantize_weight

    @nn.compact
    def __call__(self, x_BLD, hyper, position_BL=None):
        cfg, width = self.cfg, self.cfg.d_model // self.cfg.n_heads
        linear = partial(BitLinear, cfg, quantize_weight=self.quantize_weight)
        sizes = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads}
        if cfg.layout == "report":
            fused = linear(sum(sizes.values()) * width, name="qkv")(x_BLD, hyper)
            ends = (cfg.n_heads * width, (cfg.n_heads + cfg.n_kv_heads) * width)
            parts = jnp.split(fused, ends, axis=-1)
        else:
            parts = [linear(n * width, name=k)(x_BLD, hyper) for k, n in sizes.items()]
        q_BLHK, k_BLGK, v_BLGK = (p.reshape(*p.shape[:2], -1, width) for p in parts)
        q_BLHK = rope(q_BLHK, cfg.rope_theta, position_BL, cfg.rope_scaling)
        k_BLGK = rope(k_BLGK, cfg.rope_theta, position_BL, cfg.rope_scaling)
        if position_BL is None:
            y_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True)
        else:
            k_BSGK = self._remember("k", k_BLGK, position_BL)
            v_BSGK = self._remember("v", v_BLGK, position_BL)
            seen_BLS = jnp.arange(k_BSGK.shape[1]) <= position_BL[..., None]
            y_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BSGK, v_BSGK, mask=seen_BLS[:, None])
        y_BLD = y_BLHK.reshape(x_BLD.shape)
        if cfg.layout == "b158":
            y_BLD = RMSNorm(cfg, name="sub_norm")(y_BLD)
        return linear(cfg.d_model, name="o")(y_BLD, hyper)

    def _remember(self, name, x_BLGK, position_BL):
        """Write keys or values into their slots of the cache; returns all of it."""
        slot = (jnp.arange(x_BLGK.shape[0])[:, None], position_BL)
        cache_BSGK = self.get_variable("cache", name).at[slot].set(x_BLGK, unique_indices=True)
        self.put_variable("cache", name, cache_BSGK)
        return cache_BSGK


class FeedForward(nn.Module):
    cfg: ModelConfig
    quantize_weight: Callable = quant.quantize_weight

    @nn.compact
    def __call__(self, x_BLD, hyper):
        cfg, linear = self.cfg, partial(BitLinear, self.cfg, quantize_weight=self.quantize_weight)
        if cfg.layout == "report":
            fused = linear(2 * cfg.d_ff, name="gate_up")(x_BLD, hyper)
            h_BLF = glu(*jnp.split(fused, 2, axis=-1), cfg.activation)
        else:
            gate_BLF = linear(cfg.d_ff, name="gate")(x_BLD, hyper)
            up_BLF = linear(cfg.d_ff, name="up")(x_BLD, hyper)
            h_BLF = glu(gate_BLF, up_BLF, cfg.activation)
            if cfg.layout == "b158":
                h_BLF = RMSNorm(cfg, name="sub_norm")(h_BLF)
        return linear(cfg.d_model, name="down")(h_BLF, hyper)


class Block(nn.Module):
    cfg: ModelConfig
    quantize_weight: Callable = quant.quantize_weight

    @nn.compact
    def __call__(self, x_BLD, hyper, position_BL=None):
        h_BLD = RMSNorm(self.cfg, name="attn_norm")(x_BLD)
        x_BLD = x_BLD + Attention(self.cfg, self.quantize_weight, name="attn")(
            h_BLD, hyper, position_BL
        )
        h_BLD = RMSNorm(self.cfg, name="ffn_norm")(x_BLD)
        y_BLD = FeedForward(self.cfg, self.quantize_weight, name="ffn")(h_BLD, hyper)
        return split_batch(x_BLD + y_BLD)


def logits(x_BLD, head: jax.Array, axis: int, scale: jax.Array, bias_V) -> jax.Array:
    """What a Transformer gives unless it is asked for something else: float32 logits [B, L, V].

    `head` is [D, V] (axis 0) or [V, D] (axis 1); logits are scale * x . head + bias (or None).
    """
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits_NV = product(x_ND, gathered(head.astype(x_BLD.dtype)), axis)
    logits_BLV = scale * logits_NV.reshape(*x_BLD.shape[:-1], -1)
    return logits_BLV if bias_V is None else logits_BLV + bias_V


class Transformer(nn.Module):
    """tokens [B, L] -> float32 logits [B, L, V]; with positions [B, L], through the cache.

    `quantize_weight(w, strength, dtype)` makes the weights that a BitLinear multiplies with.
    `readout` makes something else than logits of the same arguments (`loss.Readout`).
    """

    cfg: ModelConfig
    quantize_weight: Callable = quant.quantize_weight

    @nn.compact
    def __call__(self, tokens_BL, hyper, position_BL=None, readout=logits):
        cfg = self.cfg
        shape = (cfg.vocab_size, cfg.d_model)
        embed = nn.Embed(*shape, embedding_init=embedding_init(cfg), name="embed")
        x_BLD = lookup(embed.embedding, tokens_BL, cfg.dtype)
        block = nn.remat(Block, policy=NOTHING) if cfg.remat and position_BL is None else Block
        if cfg.scan_layers and position_BL is None and not self.is_initializing():
            x_BLD = self._scan(block(cfg, self.quantize_weight, parent=None), x_BLD, hyper)
        else:
            for i in range(cfg.n_layers):
                layer = block(cfg, self.quantize_weight, name=f"block_{i}")
                x_BLD = layer(x_BLD, hyper, position_BL)
        x_BLD = RMSNorm(cfg, name="final_norm")(x_BLD)
        head = embed.embedding if cfg.tied_embedding else Head(cfg, name="head")()
        bias_V, shape = None, (cfg.vocab_size,)
        if cfg.output_bias:
            bias_V = self.param("output_bias", nn.initializers.zeros, shape, jnp.float32)
        return readout(x_BLD, head, int(cfg.tied_embedding), hyper.logit_scale, bias_V)

    def _scan(self, block, x_BLD, hyper):
        """A loop over all blocks: their parameters keep their names, and are stacked here."""
        layers = [self.get_variable("params", f"block_{i}") for i in range(self.cfg.n_layers)]

        def body(x_BLD, layer):
            return block.apply({"params": layer}, x_BLD, hyper), None

        return jax.lax.scan(body, x_BLD, stacked(layers))[0]


class Head(nn.Module):
    """The untied output matrix; full precision, as the embedding."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self):
        shape = (self.cfg.d_model, self.cfg.vocab_size)
        return self.param("kernel", kernel_init(self.cfg), shape, jnp.float32)


def empty_cache(cfg: ModelConfig, n_rows: int, n_slots: int) -> dict:
    """The collection "cache" of a Transformer: keys and values [B, S, G, K] of every block."""
    shape = (n_rows, n_slots, cfg.n_kv_heads, cfg.d_model // cfg.n_heads)
    zeros = {"k": jnp.zeros(shape, cfg.dtype), "v": jnp.zeros(shape, cfg.dtype)}
    return {f"block_{i}": {"attn": zeros} for i in range(cfg.n_layers)}


def pack_params(params, cfg: ModelConfig, hyper: Hyper, form: str = "packed"):
    """Parameters of a ternary Transformer as those of one with this `weight_format`.

    Each BitLinear's `kernel` [D, F] becomes `codes` int8 [D, F] or `packed` uint8 [D, F / 4], and
    float32 `scale` [], the value that code 1 stands for (1 / `quant.weight_scale`); embedding and
    head become `cfg.dtype`, the type they are used in; the rest stays. A leading replicate axis is
    kept. Of packed parameters the codes and scales stay: ternary weights are never quantised again.
    Raises UserError where such weights would not be what `cfg` and `hyper` evaluate.
    """
    for name in ("weight_quant", "act_quant"):
        strength = np.min(getattr(hyper, name))
        if strength != 1:
            raise UserError(
                f"{name} is {strength:g} at this step: {form} weights and int8 activations need "
                "full quantisation, 1"
            )

    def pack(w_DF):
        inverse = quant.weight_scale(w_DF)
        codes_DF = quant.weight_codes(w_DF, inverse).astype(jnp.int8)
        return quant.pack_ternary(codes_DF) if form == "packed" else codes_DF, 1 / inverse

    packed = {}
    for path, leaf in flatten_dict(params).items():
        if path[0].startswith("block_") and path[-1] == "kernel":
            if form == "packed" and leaf.shape[-1] % 4:
                raise UserError(
                    f"{'/'.join(path)} has {leaf.shape[-1]} outputs; packing needs a multiple of 4"
                )
            over_replicates = jax.vmap(pack) if leaf.ndim == 3 else pack
            packed[*path[:-1], form], packed[*path[:-1], "scale"] = over_replicates(leaf)
        elif path[0] in ("embed", "head"):
            packed[path] = leaf.astype(cfg.dtype)
        else:
            packed[path] = leaf
    return unflatten_dict(packed)
