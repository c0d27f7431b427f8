"""Schedules, decay rules, and a chain that is torch's Adam and AdamW, step by step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import optim, presets
from bitnet_jax.config import Hyper, ModelConfig, OptimConfig, RunConfig
from bitnet_jax.model import Transformer

RUN = RunConfig(steps=50)
HYPER = Hyper(
    warmup_steps=10.0,
    lr_peak=2e-2,
    lr_stage1_end=1e-2,
    lr_stage2_start=4e-3,
    lr_final=1e-4,
    logit_scale=1.0,
)
DECAYS = {
    "coupled, all": {"coupled_1": 0.1, "coupled_2": 0.05, "decay_rest": 1.0},
    "coupled, half of the rest": {"coupled_1": 0.1, "coupled_2": 0.02, "decay_rest": 0.5},
    "decoupled, matrices": {"decoupled_1": 0.1, "decoupled_2": 0.0},
    "decoupled, all": {"decoupled_1": 0.1, "decoupled_2": 0.05, "decay_rest": 1.0},
    "none": {},
}
SHAPES = {
    "block_0": {"attn": {"q": {"kernel": (3, 4)}}, "attn_norm": {"scale": (3,)}},
    "embed": {"embedding": (5, 3)},
    "head": {"kernel": (3, 5)},
    "output_bias": (5,),
}
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}


@pytest.fixture(scope="module")
def case():
    """Parameters and the gradients of 50 steps, float64 NumPy.

    Some gradients are clipped, some are not, and in half of the embedding rows every gradient is 0:
    there coupled decay is all that Adam sees.
    """
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(size=s), SHAPES, **IS_SHAPE)
    size_N = np.exp(random.normal(size=50)) / 5
    grads = jax.tree.map(
        lambda s: random.normal(size=(50, *s)) * size_N.reshape(-1, *(1 for _ in s)),
        SHAPES,
        **IS_SHAPE,
    )
    grads["embed"]["embedding"][:, ::2] = 0
    norms_N = [math.sqrt(sum((g[n] ** 2).sum() for g in jax.tree.leaves(grads))) for n in range(50)]
    assert 10 < sum(norm > 1 for norm in norms_N) < 40
    return params, grads


@functools.partial(jax.jit, static_argnums=3)
def train(hyper, params, grads, run=RUN):
    """The chain; per step parameters, updates, their decay part, and the updates found again, from
    the parameters before and after it."""
    cfg, groups = OptimConfig(), optim.param_groups(params)
    tx = optim.make_optimizer(cfg, run, hyper, groups)

    def body(carry, grad):
        params, opt_state = carry
        updates, opt_state = tx.update(grad, opt_state, params)
        by_decay, again = tx.decay_part(params, opt_state), tx.updates(params, opt_state)
        params = jax.tree.map(jnp.add, params, updates)
        again = again, tx.updates(params, opt_state, after=True)
        return (params, opt_state), (params, updates, by_decay, again)

    return jax.lax.scan(body, (params, tx.init(params)), grads)[1]


def as_dtype(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def train64(hyper, params, grads, run=RUN):
    """`train` in float64, hyper-parameters included; NumPy results."""
    with jax.enable_x64(True):
        args = (as_dtype(tree, jnp.float64) for tree in (hyper, params, grads))
        return jax.tree.map(np.asarray, train(*args, run))


def numpy_rate(n):
    """The two-stage schedule of HYPER over 50 steps."""
    if n <= 10:
        return 2e-2 * n / 10
    if n <= 25:
        return 2e-2 + (n - 10) / 15 * (1e-2 - 2e-2)
    return 4e-3 + (n - 25) / 25 * (1e-4 - 4e-3)


def torch_adam(params, grads, hyper):
    """torch.optim.Adam(weight_decay=coupled) and AdamW(weight_decay=decoupled) after clipping.

    Written from their documentation, one parameter at a time; both decays may be given. The bias
    has no decay.
    """
    paths = [optim.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    w, g_N = (dict(zip(paths, jax.tree.leaves(t), strict=True)) for t in (params, grads))
    w = {path: p.copy() for path, p in w.items()}
    m, v = ({path: np.zeros_like(p) for path, p in w.items()} for _ in range(2))
    for n in range(1, 51):
        norm = math.sqrt(sum((g[n - 1] ** 2).sum() for g in g_N.values()))
        for path in paths:
            share = 1 if path.startswith("block_0/attn/q") else hyper.decay_rest
            share = 0 if path == "output_bias" else share
            rate = numpy_rate(n)
            coupled = share * (hyper.coupled_1 if n <= 25 else hyper.coupled_2)
            decoupled = share * (hyper.decoupled_1 if n <= 25 else hyper.decoupled_2)
            g = g_N[path][n - 1] * min(1, 1 / norm) + coupled * w[path]
            w[path] *= 1 - rate * decoupled
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g * g
            direction = m[path] / (1 - 0.9**n) / (np.sqrt(v[path] / (1 - 0.95**n)) + 1e-8)
            w[path] -= rate * direction
    return jax.tree.unflatten(jax.tree.structure(params), [w[path] for path in paths])


@pytest.mark.parametrize("decay", DECAYS)
def test_chain_equals_torch_adam_and_adamw(case, decay):
    """50 steps over two stages of learning rate and decay, with clipping, in float64."""
    hyper = HYPER.replace(**DECAYS[decay])
    path_N, *_ = train64(hyper, *case)
    want = torch_adam(*case, hyper)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[-1], b, rtol=1e-6), path_N, want)


@pytest.mark.parametrize("decay", ["coupled, all", "decoupled, matrices"])
def test_chain_in_float32_stays_with_float64(case, decay):
    hyper = HYPER.replace(**DECAYS[decay])
    path_N, *_ = train(hyper, *(as_dtype(tree, jnp.float32) for tree in case))
    want = torch_adam(*case, hyper)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[-1], b, rtol=1e-5, atol=1e-5), path_N, want
    )


@pytest.mark.parametrize("decay", ["coupled, all", "decoupled, all"])
def test_without_gradients_the_whole_first_update_is_decay(case, decay):
    """The running mean of coupled decay is decay * w then; later it lags behind, by 10 updates."""
    params, grads = case
    hyper = HYPER.replace(**DECAYS[decay])
    _, updates_N, decay_N, _ = train64(hyper, params, jax.tree.map(np.zeros_like, grads))
    jax.tree.map(
        lambda d, u: np.testing.assert_allclose(d[0], u[0], rtol=1e-9, atol=1e-15),
        decay_N,
        updates_N,
    )


def test_without_decay_no_part_of_the_update_is_decay(case):
    _, updates_N, decay_N, _ = train64(HYPER.replace(decay_rest=1.0), *case)
    assert all(np.all(x == 0) for x in jax.tree.leaves(decay_N))
    assert all(np.any(x != 0) for x in jax.tree.leaves(updates_N))


@pytest.mark.parametrize("decay", ["coupled, all", "decoupled, all"])
def test_what_is_not_decay_in_an_update_comes_from_gradients(case, decay):
    """Twice the decay: its part doubles, within Adam's normaliser, and the rest hardly moves."""
    params, grads = case
    large = jax.tree.map(lambda g: 100 * g, grads)  # so that decay does not change the normaliser
    numbers = {k: v for k, v in DECAYS[decay].items() if k != "decay_rest"}
    single, two = (
        train64(
            HYPER.replace(decay_rest=1.0, **{k: v * times for k, v in numbers.items()}),
            params,
            large,
        )
        for times in (1e-3, 2e-3)
    )
    (_, u1_N, d1_N, _), (_, u2_N, d2_N, _) = (
        [tree["block_0"]["attn"]["q"]["kernel"] if isinstance(tree, dict) else tree for tree in run]
        for run in (single, two)
    )
    np.testing.assert_allclose(2 * d1_N[0], d2_N[0], rtol=1e-2)
    np.testing.assert_allclose((u1_N - d1_N)[0], (u2_N - d2_N)[0], rtol=1e-2)


def test_without_gradients_decoupled_decay_is_a_product_and_touches_matrices_only(case):
    """Stage 1: prod(1 - lr decay); stage 2 without decay, and all else: not one bit changes."""
    params, grads = case
    zeros = jax.tree.map(np.zeros_like, grads)
    hyper = HYPER.replace(**DECAYS["decoupled, matrices"])
    path_N, *_ = train64(hyper, params, zeros)
    matrix_N = path_N["block_0"]["attn"]["q"].pop("kernel")
    start = params["block_0"]["attn"]["q"]["kernel"]
    factor_N = np.cumprod([1 - 0.1 * numpy_rate(n) for n in range(1, 26)])
    np.testing.assert_allclose(matrix_N[:25], factor_N[:, None, None] * start, rtol=1e-6)
    np.testing.assert_array_equal(matrix_N[25:], np.broadcast_to(matrix_N[24], (25, 3, 4)))
    rest = {**params, "block_0": {**params["block_0"], "attn": {"q": {}}}}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape)), path_N, rest
    )


def test_without_gradients_coupled_decay_moves_weights_of_any_size_by_the_learning_rate(case):
    """The fault that collapses the report's model: Adam normalises the decay to a full step."""
    params, grads = case
    zeros = jax.tree.map(np.zeros_like, grads)
    path_N, *_ = train64(HYPER.replace(coupled_1=0.1, decay_rest=1.0), params, zeros)
    start, after = params["embed"]["embedding"], path_N["embed"]["embedding"][4]
    far = np.abs(start) > 0.3
    moved = np.abs(start[far]) - np.abs(after[far])
    np.testing.assert_allclose(moved, sum(numpy_rate(n) for n in range(1, 6)), rtol=0.1)


@pytest.mark.parametrize("recipe", presets.RECIPES)
def test_no_recipe_decays_the_output_bias(case, recipe):
    """Coupled or not: without a gradient not one bit of it changes in either stage."""
    params, grads = case
    zeros = jax.tree.map(np.zeros_like, grads)
    path_N, *_ = train64(presets.RECIPES[recipe](RunConfig(steps=50)), params, zeros)
    bias_N, start = path_N["output_bias"], params["output_bias"]
    np.testing.assert_array_equal(bias_N, np.broadcast_to(start, bias_N.shape))
    assert not np.array_equal(
        path_N["block_0"]["attn"]["q"]["kernel"][-1], params["block_0"]["attn"]["q"]["kernel"]
    )


@pytest.mark.parametrize("decays", DECAYS)
def test_the_updates_are_found_again_in_parameters_and_state(case, decays):
    """What a training step adds to the parameters is what the chain returned."""
    hyper = HYPER.replace(**DECAYS[decays])
    _, updates_N, _, recovered = train64(hyper, *case)
    for again_N in recovered:
        for leaf, wanted in zip(jax.tree.leaves(again_N), jax.tree.leaves(updates_N), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-11, atol=1e-15)


def test_a_changed_hyper_compiles_nothing(case):
    traces = []

    @jax.jit
    def step(hyper, params, grads):
        traces.append(None)
        tx = optim.make_optimizer(OptimConfig(), RUN, hyper, optim.param_groups(params))
        return tx.update(grads, tx.init(params), params)[0]

    params = as_dtype(case[0], jnp.float32)
    updates = [step(HYPER.replace(**decay), params, params) for decay in DECAYS.values()]
    faster = step(HYPER.replace(lr_peak=4e-2, warmup_steps=5.0), params, params)
    assert len(traces) == 1
    norms = [float(jnp.linalg.norm(u["head"]["kernel"])) for u in [*updates, faster]]
    assert norms[-1] == pytest.approx(4 * norms[-2])


@pytest.mark.parametrize(
    ("recipe", "n", "rate"),
    [
        ("coupled", 0, 0),
        ("coupled", 1, 1.5e-3 / 375),
        ("coupled", 375, 1.5e-3),
        ("coupled", 376, 1.5e-3 - 0.5e-3 / 125),
        ("coupled", 500, 1.0e-3),
        ("coupled", 501, 1.5e-6 + (1.0e-3 - 1.5e-6) * 499 / 500),
        ("coupled", 750, (1.0e-3 + 1.5e-6) / 2),
        ("coupled", 1000, 1.5e-6),
        ("published", 0, 0),
        ("published", 1, 1.5e-3 / 50),
        ("published", 50, 1.5e-3),
        ("published", 51, 1.5e-3 * 949 / 950),
        ("published", 500, 1.5e-3 * 500 / 950),
        ("published", 501, 1.0e-3 * 499 / 950),  # the drop by a third
        ("published", 1000, 0),
    ],
)
def test_learning_rate_of_the_recipes_at_1000_steps(recipe, n, rate):
    lr = optim.learning_rate(
        presets.RECIPES[recipe](RunConfig(steps=1000)), n, RunConfig(steps=1000)
    )
    assert float(lr) == pytest.approx(rate, rel=1e-5, abs=1e-12)


def test_a_late_schedule_is_that_of_the_update_before():
    """Update 1 has the peak and no decay; stage 1 lasts one update longer, in rate and decay."""
    run = RunConfig(steps=1000)
    late, n = RunConfig(steps=1000, late_schedule=True), np.arange(1, 1001)
    hyper = presets.RECIPES["coupled"](RunConfig(steps=1000))
    rates = np.asarray(optim.learning_rate(hyper, n, late))
    assert rates[0] == np.float32(1.5e-3)
    np.testing.assert_array_equal(rates[1:], optim.learning_rate(hyper, n[:-1], run))
    decays = np.asarray(optim.by_stage(n, late, 0.1, 0.05))
    np.testing.assert_array_equal(decays, np.float32([0] + [0.1] * 500 + [0.05] * 499))


def test_a_late_schedule_warms_up_along_one_line_at_every_length():
    for steps in (300, 1000, 20_000):
        cfg, _ = presets.override(presets.preset("report"), [f"run.steps={steps}"])
        (hyper, *_) = (rep.hyper for rep in presets.make_replicates(cfg, [0], {}))
        rate = optim.learning_rate(hyper, np.array([2, 101, 300]), cfg.run)
        np.testing.assert_allclose(rate, 1.5e-3 * np.array([1, 100, 299]) / 375, rtol=1e-6)


def test_learning_rate_without_warmup_starts_at_the_peak():
    hyper = Hyper(warmup_steps=0.0, lr_peak=2.0, lr_stage1_end=1.0)
    rates = optim.learning_rate(hyper, np.arange(0, 11), RunConfig(steps=20))
    np.testing.assert_allclose(rates[1:], 2 - np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 20])
@pytest.mark.parametrize("recipe", presets.RECIPES)
def test_every_update_of_a_short_run_has_a_rate_within_the_peak(recipe, steps):
    run, hyper = RunConfig(steps=steps), presets.RECIPES[recipe](RunConfig(steps=steps))
    rates = np.asarray(optim.learning_rate(hyper, np.arange(1, steps + 1), run))
    assert np.all(rates[:-1] > 0) and rates[-1] == np.float32(hyper.lr_final)
    assert rates.max() == np.float32(1.5e-3)


def test_stage_1_includes_the_boundary():
    """Of an odd number of steps the middle one belongs to stage 2."""
    values = optim.by_stage(np.arange(1, 8), RunConfig(steps=7), 1.0, 2.0)
    np.testing.assert_array_equal(values, [1, 1, 1, 2, 2, 2, 2])


DECAY_TABLES = {
    "b158": """\
block_0/attn/k/kernel                   32x32  matrix    decayed
block_0/attn/o/kernel                   32x32  matrix    decayed
block_0/attn/q/kernel                   32x32  matrix    decayed
block_0/attn/sub_norm/scale                32  norm      decay_rest
block_0/attn/v/kernel                   32x32  matrix    decayed
block_0/attn_norm/scale                    32  norm      decay_rest
block_0/ffn/down/kernel                 64x32  matrix    decayed
block_0/ffn/gate/kernel                 32x64  matrix    decayed
block_0/ffn/sub_norm/scale                 64  norm      decay_rest
block_0/ffn/up/kernel                   32x64  matrix    decayed
block_0/ffn_norm/scale                     32  norm      decay_rest
embed/embedding                        300x32  embedding decay_rest
final_norm/scale                           32  norm      decay_rest""",
    "report": """\
block_0/attn/o/kernel                   32x32  matrix    decayed
block_0/attn/o/norm/scale                  32  norm      decay_rest
block_0/attn/qkv/kernel                 32x96  matrix    decayed
block_0/attn/qkv/norm/scale                32  norm      decay_rest
block_0/attn_norm/scale                    32  norm      decay_rest
block_0/ffn/down/kernel                 64x32  matrix    decayed
block_0/ffn/down/norm/scale                64  norm      decay_rest
block_0/ffn/gate_up/kernel             32x128  matrix    decayed
block_0/ffn/gate_up/norm/scale             32  norm      decay_rest
block_0/ffn_norm/scale                     32  norm      decay_rest
embed/embedding                        300x32  embedding decay_rest
final_norm/scale                           32  norm      decay_rest
head/kernel                            32x300  head      decay_rest""",
}


@pytest.mark.parametrize("layout", DECAY_TABLES)
def test_decay_table_names_every_parameter(layout):
    sizes = {"vocab_size": 300, "d_model": 32, "n_layers": 1, "d_ff": 64}
    cfg = ModelConfig(layout=layout, tied_embedding=layout == "b158", **sizes)
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_BL, Hyper())["params"]
    assert optim.decay_table(params) == DECAY_TABLES[layout].split("\n")


@pytest.mark.parametrize(
    "path", ["kernel", "block_0/attn/q/bias", "block_0/kernel", "my_head/kernel"]
)
def test_a_parameter_without_a_decay_rule_is_refused_by_name(path):
    tree = functools.reduce(lambda leaf, key: {key: leaf}, reversed(path.split("/")), np.zeros(2))
    with pytest.raises(ValueError, match=rf"{path} matches decay rules \[\]"):
        optim.param_groups(tree)


def test_a_parameter_with_two_decay_rules_is_refused(monkeypatch):
    monkeypatch.setattr(optim, "DECAY_RULES", (*optim.DECAY_RULES, (r"head/.*", "matrix")))
    with pytest.raises(ValueError, match=r"head/kernel matches decay rules \['head', 'matrix'\]"):
        optim.param_groups({"head": {"kernel": np.zeros(2)}})
