"""BitLinear by products of codes, and where they pay.

Codes are exact in int8 and in bfloat16, and so is the sum of their products in int32: only the
other operand of a gradient needs more than one bfloat16 part to be as good as float32.

Shapes: N rows (tokens), D inputs, F outputs.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from bitnet_jax import quant, sharding
from bitnet_jax.config import Hyper

# How BitLinear multiplies: codes where every strength is 1, or fake-quantised in the model's type.
CODES, PLAIN = "codes", "plain"
# Chosen once and never at start: a resumed run multiplies as before. With AMX a training step by
# fake-quantised products takes 1.03 [0.94, 1.17] (quick, 4 rounds) and 1.12 [1.11, 1.12] (report,
# 2) of one by codes (2 cores, jax 0.10.2, python -m experiments.bench_train).
# Decoding by codes is faster there (python -m experiments.bench_decode).
TABLE = {"cpu with AMX": CODES, "cpu": PLAIN, "gpu": PLAIN, "tpu": PLAIN}  # gpu, tpu: not measured
# Of a float32 gradient: 8 bits each, so two leave an error of 2^-17 of an element, of which a sum
# of hundreds keeps about what float32's own rounding adds to it.
N_PARTS = 2
CPU_INFO = Path("/proc/cpuinfo")
AMX = {"amx_int8", "amx_bf16"}


def machine() -> str:
    """The row of TABLE for the first device; a CPU whose instructions are capped has no AMX."""
    backend = jax.default_backend()
    capped = "--xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", "")
    if backend == "cpu" and not capped and CPU_INFO.exists():
        flags = CPU_INFO.read_text().partition("\nflags")[2].partition("\n")[0].split()
        return "cpu with AMX" if set(flags) >= AMX else "cpu"
    return backend


def full_strength(hyper: Hyper) -> bool:
    """Whether a replicate quantises weights and activations in full at every step."""
    return (hyper.weight_quant, hyper.act_quant, hyper.quant_warmup_steps) == (1, 1, 0)


def choose(hypers: Iterable[Hyper], *, standard: bool, on: str | None = None) -> str:
    """How a program of these replicates multiplies: by codes only if all have full strength.

    `standard`: BitLinear has the package's own quantiser of weights. `on` is a row of TABLE, that
    of this machine by default.
    """
    by_codes = standard and all(map(full_strength, hypers))
    return TABLE.get(on or machine(), PLAIN) if by_codes else PLAIN


def dot(a, b, axis_a: int, axis_b: int, result=jnp.float32) -> jax.Array:
    """Contract one axis of each of two matrices; narrow types are exact, so in one pass.

    XLA:CPU has a fast product of two narrow rows and none of a single one, so it gets that twice.
    """
    contracted = (((axis_a,), (axis_b,)), ((), ()))
    one_pass = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if one_pass and (axis_a, len(a)) == (1, 1) and platform() == "cpu":
        twice = jnp.concatenate([a, a])
        return jax.lax.dot_general(twice, b, contracted, one_pass, result)[:1]
    return jax.lax.dot_general(a, b, contracted, one_pass, result)


def beside(matrices) -> jax.Array:
    """Matrices side by side."""
    return jnp.concatenate(matrices, axis=1)


def platform() -> str:
    """Where a program that is being traced will run: of its mesh, else of the first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def transposed(x: jax.Array) -> jax.Array:
    """`x` transposed, for the gradient of weights; on CPUs as a copy.

    XLA:CPU would fold the transposition into the product, which leaves its fast path. Of narrow
    types it does so through a barrier, too, but not when the copy comes in two halves.
    """
    if platform() != "cpu" or sharding.n_data() > 1:  # halves would change devices
        return x.T
    if x.dtype == jnp.float32:
        return jax.lax.optimization_barrier(x.T)
    half = len(x) // 2
    return beside([jax.lax.optimization_barrier(part.T) for part in (x[:half], x[half:])])


def parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays whose sum is `x`: exactly for bfloat16, to 8 bits a part for float32.

    By `reduce_precision`, since XLA may leave out a conversion to bfloat16 and back.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    terms = []
    for _ in range(N_PARTS):
        top = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(top.astype(jnp.bfloat16))
        x = x - top
    return terms


@jax.custom_vjp
def code_linear(x_ND: jax.Array, w_DF: jax.Array) -> jax.Array:
    """BitLinear at full strength by codes: [N, F] in the type of `x`.

    int8 times ternary codes, summed in int32, then both scales: what quantised activations times
    quantised weights are before float32 rounds. Both quantisers have identity gradients, their
    scales are constant.
    """
    return _code_linear_fwd(x_ND, w_DF)[0]


def _code_linear_fwd(x_ND, w_DF):
    t_N1, s = quant.activation_scale(x_ND), quant.weight_scale(w_DF)
    q_ND = quant.int8_codes(x_ND, t_N1).astype(jnp.int8)
    c_DF = sharding.whole(quant.weight_codes(w_DF, s).astype(jnp.int8))  # a byte a weight travels
    sums_NF = dot(q_ND, c_DF, 1, 0, jnp.int32).astype(jnp.float32)
    y_NF = (sums_NF * (1 / (s * t_N1))).astype(x_ND.dtype)
    return y_NF, (q_ND, t_N1, c_DF, s, jnp.zeros((0,), w_DF.dtype))


def _code_linear_bwd(residuals, g_NF):
    q_ND, t_N1, c_DF, s, like_w = residuals
    dtype = g_NF.dtype  # scales come last, or first on the other operand: codes stay exact
    g_parts, scaled_parts = parts(g_NF), parts((g_NF / t_N1).astype(dtype))
    c_DF, q_DN = c_DF.astype(jnp.bfloat16), transposed(q_ND).astype(jnp.bfloat16)
    grad_x = sum(dot(g, c_DF, 1, 1) for g in g_parts) / s
    grad_w = dot(beside([q_DN] * len(g_parts)), jnp.concatenate(scaled_parts), 1, 0)
    return grad_x.astype(dtype), sharding.summed(grad_w.astype(like_w.dtype))


code_linear.defvjp(_code_linear_fwd, _code_linear_bwd)
