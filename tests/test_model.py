"""The transformer: all layouts equal their formulas, and start where the report's model starts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from bitnet_jax import presets
from bitnet_jax.config import Hyper, ModelConfig
from bitnet_jax.model import (
    Transformer,
    bit_linear,
    glu,
    kernel_init,
    rms_norm,
    rope,
    rope_factors,
)

LAYOUTS = ("b158", "llama", "report")
SMALL = {
    name: ModelConfig(
        layout=name,
        activation="silu" if name == "llama" else "relu2",
        vocab_size=23,
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=24,
        tied_embedding=name == "b158",
    )
    for name in LAYOUTS
}
FRESH = {
    name: dataclasses.replace(cfg, vocab_size=256, d_model=64, d_ff=96, n_layers=1)
    for name, cfg in SMALL.items()
}


@functools.cache
def forward(cfg):
    """One compiled forward pass per model; strengths and scales are arguments."""
    return jax.jit(lambda params, tokens_BL, hyper: apply(cfg, params, tokens_BL, hyper))


def apply(cfg, params, tokens_BL, hyper):
    return Transformer(cfg).apply({"params": params}, tokens_BL, hyper)


@functools.cache
def initialiser(cfg):
    """Compiled key -> fresh parameters."""
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(lambda key: Transformer(cfg).init(key, tokens_BL, Hyper())["params"])


@functools.cache
def excited(cfg):
    """Parameters unlike fresh ones: norms are not 1 and no layer is negligible."""
    random = np.random.default_rng(1)

    def draw(p):
        return jnp.asarray((p.ndim == 1) + 0.3 * random.normal(size=p.shape), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(initialiser(cfg), jax.random.key(0)))


def tokens(cfg, shape=(2, 8), seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, shape))


def numpy_quantise(x, codes_max, scale, strength):
    codes = np.clip(np.rint(x * scale), -codes_max, codes_max)
    return (1 - strength) * x + strength * codes / scale


def numpy_forward(cfg, params, tokens_BL, hyper):
    """The model of the module's docstring in NumPy float64, one attention head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    width, half = cfg.d_model // cfg.n_heads, cfg.d_model // cfg.n_heads // 2
    fused, sub_norms = cfg.layout == "report", cfg.layout == "b158"

    def norm(x, part):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.norm_eps) * part["scale"]

    def linear(x, part):
        x = norm(x, part["norm"]) if fused else x
        x = numpy_quantise(x, 127, 127 / np.abs(x).max(axis=-1, keepdims=True), hyper.act_quant)
        w = part["kernel"]
        return x @ numpy_quantise(w, 1, 1 / np.abs(w).mean(), hyper.weight_quant)

    def rotate(x):
        freq = cfg.rope_theta ** (-np.arange(half) / half)
        turn = np.exp(1j * np.arange(x.shape[1])[:, None] * freq)
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(x, part):
        if fused:
            kv = cfg.n_kv_heads * width
            q, k, v = np.split(linear(x, part["qkv"]), [cfg.d_model, cfg.d_model + kv], axis=-1)
        else:
            q, k, v = (linear(x, part[name]) for name in "qkv")
        heads = []
        for h in range(cfg.n_heads):
            g = h // (cfg.n_heads // cfg.n_kv_heads)
            q_h, k_h = rotate(q[..., h * width :][..., :width]), k[..., g * width :][..., :width]
            scores = q_h @ rotate(k_h).swapaxes(1, 2) / math.sqrt(width)
            scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            heads.append(weights @ v[..., g * width :][..., :width])
        y = np.concatenate(heads, axis=-1)
        return linear(norm(y, part["sub_norm"]) if sub_norms else y, part["o"])

    def feed_forward(x, part):
        if fused:
            gate, up = np.split(linear(x, part["gate_up"]), 2, axis=-1)
        else:
            gate, up = linear(x, part["gate"]), linear(x, part["up"])
        relu2 = cfg.activation == "relu2"
        h = (np.maximum(gate, 0) ** 2 if relu2 else gate / (1 + np.exp(-gate))) * up
        return linear(norm(h, part["sub_norm"]) if sub_norms else h, part["down"])

    x = p["embed"]["embedding"][np.asarray(tokens_BL)]
    for i in range(cfg.n_layers):
        block = p[f"block_{i}"]
        x = x + attention(norm(x, block["attn_norm"]), block["attn"])
        x = x + feed_forward(norm(x, block["ffn_norm"]), block["ffn"])
    head = p["embed"]["embedding"].T if cfg.tied_embedding else p["head"]["kernel"]
    return hyper.logit_scale * norm(x, p["final_norm"]) @ head


@pytest.mark.parametrize("strength", [0.0, 1.0], ids=["full precision", "ternary"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_a_numpy_transformer(layout, strength):
    cfg, hyper = SMALL[layout], Hyper(weight_quant=strength, act_quant=strength, logit_scale=0.5)
    params, tokens_BL = excited(cfg), tokens(cfg)
    want = numpy_forward(cfg, params, tokens_BL, hyper)
    logits = forward(cfg)(params, tokens_BL, hyper)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * want.std())


def test_an_output_bias_is_added_to_the_scaled_logits():
    cfg, hyper = dataclasses.replace(SMALL["b158"], output_bias=True), Hyper(logit_scale=0.5)
    params, tokens_BL = excited(cfg), tokens(cfg)
    bias_V = params["output_bias"]
    others = {name: part for name, part in params.items() if name != "output_bias"}
    want = forward(SMALL["b158"])(others, tokens_BL, hyper) + bias_V
    np.testing.assert_allclose(forward(cfg)(params, tokens_BL, hyper), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_token_changes_logits_from_its_position_on_and_none_before(layout, position):
    cfg = SMALL[layout]
    tokens_BL = tokens(cfg)
    other_BL = tokens_BL.at[0, position].set((tokens_BL[0, position] + 1) % cfg.vocab_size)
    before, after = (forward(cfg)(excited(cfg), t, Hyper()) for t in (tokens_BL, other_BL))
    changed_BL = np.any(before != after, axis=-1)
    np.testing.assert_array_equal(changed_BL[0], np.arange(8) >= position)
    assert not changed_BL[1].any()


PATHS = {
    "b158": [
        "block_0/attn/k/kernel 16x8",
        "block_0/attn/o/kernel 16x16",
        "block_0/attn/q/kernel 16x16",
        "block_0/attn/sub_norm/scale 16",
        "block_0/attn/v/kernel 16x8",
        "block_0/attn_norm/scale 16",
        "block_0/ffn/down/kernel 24x16",
        "block_0/ffn/gate/kernel 16x24",
        "block_0/ffn/sub_norm/scale 24",
        "block_0/ffn/up/kernel 16x24",
        "block_0/ffn_norm/scale 16",
        "embed/embedding 23x16",
        "final_norm/scale 16",
    ],
    "llama": [
        "block_0/attn/k/kernel 16x8",
        "block_0/attn/o/kernel 16x16",
        "block_0/attn/q/kernel 16x16",
        "block_0/attn/v/kernel 16x8",
        "block_0/attn_norm/scale 16",
        "block_0/ffn/down/kernel 24x16",
        "block_0/ffn/gate/kernel 16x24",
        "block_0/ffn/up/kernel 16x24",
        "block_0/ffn_norm/scale 16",
        "embed/embedding 23x16",
        "final_norm/scale 16",
        "head/kernel 16x23",
    ],
    "report": [
        "block_0/attn/o/kernel 16x16",
        "block_0/attn/o/norm/scale 16",
        "block_0/attn/qkv/kernel 16x32",
        "block_0/attn/qkv/norm/scale 16",
        "block_0/attn_norm/scale 16",
        "block_0/ffn/down/kernel 24x16",
        "block_0/ffn/down/norm/scale 24",
        "block_0/ffn/gate_up/kernel 16x48",
        "block_0/ffn/gate_up/norm/scale 16",
        "block_0/ffn_norm/scale 16",
        "embed/embedding 23x16",
        "final_norm/scale 16",
        "head/kernel 16x23",
    ],
}


def shapes(cfg) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by path, without computing any."""
    params = jax.eval_shape(initialiser(cfg), jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): p.shape
        for path, p in jax.tree.leaves_with_path(params)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_names_and_shapes_are_those_of_checkpoints(layout):
    param_shapes = shapes(dataclasses.replace(SMALL[layout], n_layers=1))
    assert [f"{path} {'x'.join(map(str, s))}" for path, s in param_shapes.items()] == PATHS[layout]


def test_the_report_preset_has_the_parameters_of_the_report():
    sizes = {path: math.prod(s) for path, s in shapes(presets.preset("report").model).items()}
    assert sum(sizes.values()) == 28_360_448
    assert sizes["embed/embedding"] == 12_865_792


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_receives_a_gradient(layout):
    cfg, tokens_BL = SMALL[layout], tokens(SMALL[layout])

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(apply(cfg, params, tokens_BL, Hyper()))[..., 3])

    grads = jax.jit(jax.grad(loss))(excited(cfg))
    dead = [path for path, g in jax.tree.leaves_with_path(grads) if not jnp.any(g != 0)]
    assert dead == []
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_values_have_the_documented_distributions(layout):
    """N(0, 0.02) throughout; report: N(0, 1) and U(+-1/sqrt(fan_in)); norms 1."""
    params = initialiser(FRESH[layout])(jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for path, p in jax.tree.leaves_with_path(params):
        p, name = np.asarray(p), path[-1].key
        if name == "scale":
            np.testing.assert_array_equal(p, 1)
        elif name == "kernel" and layout == "report":
            bound = p.shape[0] ** -0.5
            assert 0.99 * bound < np.abs(p).max() <= bound
            assert p.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        else:
            std = 1 if layout == "report" else 0.02
            assert p.std() == pytest.approx(std, rel=0.05)
            assert np.abs(p).max() > 2.5 * std  # no truncation
            assert abs(p.mean()) < 5 * std / math.sqrt(p.size)


def test_no_two_parameters_share_their_random_numbers():
    """Neither within a model, nor between seeds."""
    draws = [
        float(p.ravel()[0] / jnp.std(p))
        for seed in (0, 1)
        for p in jax.tree.leaves(initialiser(FRESH["b158"])(jax.random.key(seed)))
        if p.ndim == 2
    ]
    assert len(set(np.round(draws, 5))) == len(draws) == 2 * 8


def test_kernel_bound_depends_on_inputs_not_outputs():
    draw = kernel_init(SMALL["report"])
    wide, tall = (draw(jax.random.key(0), shape) for shape in ((4, 400), (400, 4)))
    assert 0.49 < jnp.max(jnp.abs(wide)) <= 0.5
    assert 0.049 < jnp.max(jnp.abs(tall)) <= 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_compute_keeps_float32_logits_near_those_of_float32(layout):
    cfg, tokens_BL = SMALL[layout], tokens(SMALL[layout])
    half = dataclasses.replace(cfg, dtype="bfloat16")
    want, bf16_logits = (forward(c)(excited(cfg), tokens_BL, Hyper()) for c in (cfg, half))
    assert want.dtype == bf16_logits.dtype == jnp.float32
    assert not np.array_equal(bf16_logits, bf16_logits.astype(jnp.bfloat16))
    assert 0 < np.linalg.norm(bf16_logits - want) < 0.05 * np.linalg.norm(want)


def test_grouped_queries_equal_repeated_keys_and_values():
    """Query heads 0 and 1 read key head 0, heads 2 and 3 key head 1."""
    cfg = SMALL["b158"]
    params = excited(cfg)
    width, repeats = cfg.d_model // cfg.n_heads, cfg.n_heads // cfg.n_kv_heads
    repeated = jax.tree.map(lambda p: p, params)
    for i in range(cfg.n_layers):
        for name in "kv":
            kernel_DGK = params[f"block_{i}"]["attn"][name]["kernel"].reshape(
                cfg.d_model, cfg.n_kv_heads, width
            )
            kernel = jnp.repeat(kernel_DGK, repeats, axis=1).reshape(cfg.d_model, -1)
            repeated[f"block_{i}"]["attn"][name]["kernel"] = kernel
    full = dataclasses.replace(cfg, n_kv_heads=cfg.n_heads)
    np.testing.assert_allclose(
        forward(full)(repeated, tokens(cfg), Hyper()),
        forward(cfg)(params, tokens(cfg), Hyper()),
        rtol=1e-4,
        atol=1e-5,
    )


def test_rotated_products_depend_only_on_the_distance():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 8)).astype(np.float32)
    q_LK, k_LK = (rope(jnp.tile(x, (1, 12, 1, 1)), 10_000.0)[0, :, 0] for x in (q, k))
    scores_LL = np.asarray(q_LK @ k_LK.T)
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores_LL, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
    assert np.ptp(scores_LL[0]) > 1
    np.testing.assert_array_equal(q_LK[0], q)
    np.testing.assert_allclose(jnp.linalg.norm(q_LK, axis=-1), np.linalg.norm(q), rtol=1e-5)


def test_rope_turns_pair_i_of_a_head_by_position_over_theta_to_the_i():
    x = jnp.zeros((1, 4, 1, 6)).at[..., :3].set(1.0)  # three pairs (1, 0), theta 10
    angle = 3 * 10.0 ** (-np.arange(3) / 3)
    want = np.concatenate([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(rope(x, 10.0)[0, 3, 0], want, rtol=1e-6)


def test_scaled_rotary_frequencies_by_hand():
    """Waves of 1, 4 and 16 positions times 2 pi; 8 pi positions: they fit 4 times, once, 1/4."""
    scaling = f"llama3:5,0.5,2,{8 * np.pi}"
    blend = (1 - 0.5) / (2 - 0.5)
    want = [1, 1 / ((1 - blend) / 5 + blend), 5]
    np.testing.assert_allclose(rope_factors(6, 64.0, scaling), want, rtol=1e-6)
    x = jnp.zeros((1, 4, 1, 6)).at[..., :3].set(1.0)
    angle = 3 * 64.0 ** (-np.arange(3) / 3) / np.array(want)
    np.testing.assert_allclose(
        rope(x, 64.0, scaling=scaling)[0, 3, 0],
        np.concatenate([np.cos(angle), np.sin(angle)]),
        rtol=1e-6,
    )


def test_rms_norm_and_relu2_by_hand():
    x = jnp.array([3.0, -4.0])
    scaled = rms_norm(x, jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(scaled, np.array([3, -8]) / 12.5**0.5, rtol=1e-6)
    np.testing.assert_array_equal(rms_norm(jnp.zeros(2), jnp.ones(2), 1e-5), 0)
    gate, up = jnp.array([3.0, -3.0]), jnp.array([-2.0, 5.0])
    np.testing.assert_array_equal(glu(gate, up, "relu2"), [-18, 0])


def test_activations_are_those_of_transformers_by_name():
    """Values from torch 2.13's own functions, at -1.5, -0.2 and 2."""
    x = jnp.array([-1.5, -0.2, 2.0])
    expected = {
        "relu2": [0, 0, 4],
        "silu": [-0.27363878, -0.09003321, 1.76159418],
        "gelu": [-0.10021086, -0.08414806, 1.95449972],
        "gelu_pytorch_tanh": [-0.10042843, -0.08414857, 1.95459771],
        "relu": [0, 0, 2],
    }
    assert tuple(expected) == ModelConfig.__dataclass_fields__["activation"].metadata["choices"]
    for name, values in expected.items():
        np.testing.assert_allclose(glu(x, jnp.ones(3), name), values, rtol=2e-6, atol=1e-7)


def test_without_quantisation_a_bit_linear_is_a_matmul():
    random = np.random.default_rng(0)
    x, w = random.normal(size=(4, 8)), random.normal(size=(8, 3))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    plain = bit_linear(x, w, Hyper(weight_quant=0.0, act_quant=0.0))
    np.testing.assert_array_equal(plain, x @ w)
    assert np.abs(bit_linear(x, w, Hyper()) - plain).max() > 0.1


def test_jit_changes_nothing_beyond_rounding():
    cfg = dataclasses.replace(SMALL["b158"], n_layers=1)
    params, tokens_BL = excited(cfg), tokens(cfg)
    np.testing.assert_allclose(
        forward(cfg)(params, tokens_BL, Hyper()),
        apply(cfg, params, tokens_BL, Hyper()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_one_program_serves_replicates_of_different_strength():
    """A batch of hypers under vmap gives each member what it gets alone."""
    cfg, tokens_BL = SMALL["report"], tokens(SMALL["report"])
    hypers = [Hyper(), Hyper(weight_quant=0.0, act_quant=0.0, logit_scale=3.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
    together = jax.vmap(forward(cfg), in_axes=(None, None, 0))(excited(cfg), tokens_BL, stacked)
    for logits, hyper in zip(together, hypers, strict=True):
        alone = forward(cfg)(excited(cfg), tokens_BL, hyper)
        np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def report_logits():
    """Logits [128, V] of a fresh model of the report, full size, on 4 x 32 random tokens."""
    cfg = presets.preset("report").model
    params = initialiser(cfg)(jax.random.key(0))
    logits_BLV = forward(cfg)(params, tokens(cfg, (4, 32)), Hyper())
    return np.asarray(logits_BLV).reshape(-1, 50257)


def test_logits_of_a_fresh_report_model_have_standard_deviation_0577(report_logits):
    """1/sqrt(3) at every width: a U(+-1/sqrt(d)) head on a vector of mean square 1."""
    assert report_logits.std(axis=-1).mean() == pytest.approx(3**-0.5, abs=0.02)


def test_loss_of_a_fresh_report_model_is_ln_v_plus_half_the_variance(report_logits):
    """In expectation over random targets, which is the mean over the vocabulary."""
    loss = np.mean(logsumexp(report_logits, axis=-1) - report_logits.mean(axis=-1))
    variance = report_logits.var(axis=-1).mean()
    assert loss == pytest.approx(math.log(50257) + variance / 2, abs=0.01)
