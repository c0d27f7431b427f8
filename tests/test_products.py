"""Products by codes and by bfloat16 parts: exact where they say so, near float64 elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import products, quant
from bitnet_jax.config import Hyper
from bitnet_jax.model import bit_linear
from bitnet_jax.products import CODES, PLAIN

N, D, F = 24, 40, 17


@pytest.fixture(scope="module")
def operands():
    """x [N, D], w [D, F] and a gradient [N, F] with elements of many sizes."""
    random = np.random.default_rng(0)
    spread = np.exp(random.normal(size=(N, F)) * 3)
    arrays = random.normal(size=(N, D)), random.normal(size=(D, F)), random.normal(size=(N, F))
    return [jnp.asarray(x, jnp.float32) for x in (*arrays[:2], arrays[2] * spread)]


def codes(x, w):
    """Codes (int64) and scales (float64) of both operands."""
    t_N1, s = quant.activation_scale(x), quant.weight_scale(w)
    q, c = quant.int8_codes(x, t_N1), quant.weight_codes(w, s)
    return [np.asarray(a).astype(np.int64) for a in (q, c)], [
        np.asarray(a, np.float64) for a in (t_N1, s)
    ]


def test_the_sums_of_codes_are_those_of_64_bit_integers(operands):
    x, w, _ = operands
    (q, c), (t_N1, s) = codes(x, w)
    sums = products.dot(jnp.int8(q), jnp.int8(c), 1, 0, jnp.int32)
    np.testing.assert_array_equal(sums, q @ c)
    y = jax.jit(products.code_linear)(x, w)
    np.testing.assert_allclose(y, (q @ c) / (s * t_N1), rtol=3e-7)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 5e-6), ("bfloat16", 5e-3)])
def test_gradients_are_those_of_the_fake_quantised_form(operands, dtype, error):
    x, w, g = operands
    x, g = x.astype(dtype), g.astype(dtype)
    y, vjp = jax.vjp(jax.jit(products.code_linear), x, w)
    grad_x, grad_w = vjp(g)
    (q, c), (t_N1, s) = codes(x, w)
    exact = np.asarray(g, np.float64)
    assert (y.dtype, grad_x.dtype, grad_w.dtype) == (x.dtype, x.dtype, w.dtype)
    for gradient, wanted in ((grad_x, exact @ c.T / s), (grad_w, (q / t_N1).T @ exact)):
        off = np.linalg.norm(np.asarray(gradient, np.float64) - wanted)
        assert off <= error * np.linalg.norm(wanted)


def test_both_forms_of_a_bit_linear_agree(operands):
    x, w, g = operands

    def both(quantize_weight):
        y, vjp = jax.vjp(lambda x, w: bit_linear(x, w, Hyper(), quantize_weight), x, w)
        return y, *vjp(g)

    for array, wanted in zip(both(quant.quantize_fully), both(quant.quantize_weight), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_parts_add_up_to_the_number(operands):
    g = operands[2]
    pieces = products.parts(g)
    total = sum(np.asarray(p, np.float64) for p in pieces)
    assert len(pieces) == products.N_PARTS
    assert (np.abs(total - g) <= 2.0 ** (-8 * len(pieces) - 1) * np.abs(g)).all()


def test_codes_need_full_strengths_all_along_and_the_package_s_quantiser(monkeypatch):
    monkeypatch.setattr(products, "machine", lambda: "cpu with AMX")
    sound = Hyper(), Hyper(lr_peak=1.0)
    assert products.choose(sound, standard=True) == CODES
    for odd in ({"weight_quant": 0.5}, {"act_quant": 0.0}, {"quant_warmup_steps": 3.0}):
        assert products.choose((*sound, Hyper(**odd)), standard=True) == PLAIN
    assert products.choose(sound, standard=False) == PLAIN
    monkeypatch.setattr(products, "machine", lambda: "a backend of the future")
    assert products.choose(sound, standard=True) == PLAIN


@pytest.mark.parametrize(
    ("flags", "capped", "row"),
    [
        ("sse amx_int8 amx_bf16 amx_tile", "", "cpu with AMX"),
        ("sse amx_bf16", "", "cpu"),
        ("sse", "", "cpu"),
        ("sse amx_int8 amx_bf16", "--xla_cpu_max_isa=AVX2", "cpu"),
    ],
)
def test_a_cpu_has_amx_with_both_of_its_types(tmp_path, monkeypatch, flags, capped, row):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", capped)
    assert products.machine() == row
