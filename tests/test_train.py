"""Training learns, repeats, does not depend on devices or companions, and stops at a NaN."""

import copy as copying
import functools
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seam_faults

from bitnet_jax import (
    config,
    data,
    loss,
    metrics,
    optim,
    presets,
    products,
    sharding,
    train,
    verdict,
)
from bitnet_jax import program as programs

STEPS, EVERY = 40, 5  # of a chunk
TEXT = "\n".join(f"the {n} cats sat on the {n % 7} mats, and {n * n} dogs ran." for n in range(900))


@dataclass
class Setup:
    """A program and its chunk compiled with the hyper-parameters as an argument."""

    program: programs.Program

    def __post_init__(self):
        p, self.inits = self.program, {}
        everywhere = sharding.replicated(p.mesh)
        self.chunk = jax.jit(
            train.make_train_chunk(p.cfg, p.windows, p.seams),
            donate_argnums=0,
            out_shardings=(p.state_sharding, everywhere, everywhere),
        )

    def init(self, *seeds):
        """A state to donate, from the program's seeds or from others."""
        if seeds not in self.inits:
            program = self.program
            if seeds:
                pairs = zip(program.replicates, seeds, strict=True)
                program = replace(program, replicates=[replace(r, seed=s) for r, s in pairs])
            with jax.set_mesh(program.mesh):
                self.inits[seeds] = program.init()
        return copy(self.inits[seeds])

    def of_seed(self, seed):
        """The same compiled chunk for one replicate of another seed."""
        other = copying.copy(self)
        replicates = [replace(rep, seed=seed) for rep in self.program.replicates]
        other.program, other.inits = replace(self.program, replicates=replicates), {}
        return other

    def run(self, state, start=0, end=EVERY, hyper=None):
        """Train `state` (donated); returns the new one and the numbers of each chunk."""
        p, numbers = self.program, []
        hyper = p.hyper if hyper is None else hyper
        with jax.set_mesh(p.mesh):
            for step in range(start, end, EVERY):
                batches = p.batches(step, step + EVERY)
                state, *scalars = self.chunk(state, hyper, p.evals, p.train_N, batches)
                numbers.append(jax.device_get(scalars[0] | scalars[1]))
        return state, numbers


def copy(state):
    """A copy to donate."""
    return jax.tree.map(jnp.copy, state)


def hyper_of(program, **changes):
    """The program's hyper-parameters with some fields set to numbers or to [R] arrays."""
    old = program.hyper
    arrays = {k: np.broadcast_to(np.float32(v), old.lr_peak.shape) for k, v in changes.items()}
    return jax.device_put(old.replace(**arrays), sharding.by_replicate(program.mesh))


def assert_close(a, b, rtol):
    """Every leaf agrees to `rtol` of its largest value."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(), 1e-12))


def assert_same(a, b):
    """Every leaf is bitwise equal."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def take(tree, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


@pytest.fixture(scope="module")
def build(tmp_path_factory, cache_folder):
    """Build a program of the tiny model with one block: two recipes, two seeds, eight devices."""
    corpus = tmp_path_factory.mktemp("text") / "corpus.txt"
    corpus.write_text(TEXT)
    cfg = presets.preset("tiny")
    cfg = replace(
        cfg,
        model=replace(cfg.model, n_layers=1),
        data=replace(cfg.data, corpus=f"text:{corpus}"),
        optim=replace(cfg.optim, eps=1e-5),  # else Adam turns rounding errors into whole updates
        run=replace(cfg.run, steps=STEPS),
    )

    def build(
        recipes=("coupled", "published"),
        seeds=(0, 1),
        devices=8,
        *,
        seams=None,
        model=None,
        **changes,
    ):
        arm = replace(cfg, data=replace(cfg.data, **changes), run=replace(cfg.run, recipes=recipes))
        arm = replace(arm, model=replace(arm.model, **(model or {})))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
            some = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
            patch.setattr(sharding, "make_mesh", some)
            patch.setattr(sharding, "MIN_SHARDED", 2**10)  # so that leaves of a tiny model split
            # Tests below lower the strengths of quantisation in the compiled program.
            patch.setattr(products, "TABLE", {})
            replicates = presets.make_replicates(arm, list(seeds), {})
            setup = Setup(programs.build(arm, replicates, seams or train.STANDARD))
        return setup

    return build


@pytest.fixture(scope="module")
def four(build):
    """Four replicates on eight devices."""
    return build()


@pytest.fixture(scope="module")
def trained(four):
    """The state after 20 steps of the four, and the numbers on the way."""
    return four.run(four.init(), end=20)


@pytest.fixture(scope="module")
def one_device(build):
    """The same four on one device."""
    return build(devices=1)


@pytest.fixture(scope="module")
def alone(build):
    """One replicate on one device."""
    return build(("published",), (0,), devices=1)


@pytest.mark.slow
def test_learns_a_small_text(four):
    lr = hyper_of(
        four.program,
        lr_peak=1e-2,
        lr_stage1_end=1e-2,
        lr_stage2_start=1e-2,
        coupled_1=0,
        coupled_2=0,
        decoupled_1=0,
        decoupled_2=0,
    )
    _, numbers = four.run(four.init(), end=STEPS, hyper=lr)
    unigram = four.program.references["unigram"]["loss"]
    assert (numbers[-1]["eval/loss"] < unigram - 0.3).all()
    assert (numbers[-1]["train/loss"] < numbers[0]["train/loss"] - 1).all()


def test_two_runs_are_bitwise_equal(four, trained):
    with jax.set_mesh(four.program.mesh):
        again = four.program.init()
    assert_same(trained, four.run(again, end=20))


SMOOTH = {"weight_quant": 0, "act_quant": 0}  # a rounding error that crosses a tie is no longer one


def assert_runs_close(run, expected):
    """Parameters and losses of runs of equal length agree to 1e-5."""
    assert_close(run[0].params, expected[0].params, 1e-5)
    for key in ("train/loss", "train/grad_norm", "eval/loss", "collapse/entropy"):
        losses = [[row[key] for row in numbers] for _, numbers in (run, expected)]
        np.testing.assert_allclose(*losses, rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_replicates_equal_single_runs(one_device, alone):
    """Four at once are the four one by one: vmap adds nothing and replicates do not mix."""
    hyper = hyper_of(one_device.program, **SMOOTH)
    many, numbers = one_device.run(one_device.init(), end=20, hyper=hyper)
    for i, rep in enumerate(one_device.program.replicates):
        values = {name: getattr(rep.hyper, name) for name in config.HYPER_FIELDS} | SMOOTH
        single = alone.of_seed(rep.seed)
        single = single.run(single.init(), end=20, hyper=hyper_of(single.program, **values))
        assert_runs_close((take(many, [i]), take(numbers, [i])), single)


def test_one_device_equals_eight(four, one_device):
    runs = [
        setup.run(setup.init(), end=20, hyper=hyper_of(setup.program, **SMOOTH))
        for setup in (one_device, four)
    ]
    assert_runs_close(*runs)


def test_one_device_equals_eight_quantised(one_device, trained):
    """Nearly: an activation or a weight that rounds the other way changes the loss a little."""
    _, (row,) = one_device.run(one_device.init())
    _, numbers = trained
    for key in ("train/loss", "eval/loss"):
        np.testing.assert_allclose(row[key], numbers[0][key], rtol=3e-5)


def test_state_is_spread_over_the_devices(four, trained):
    """A replicate's large leaves are halved over its two devices; no device holds another's."""
    assert dict(four.program.mesh.shape) == {"replicate": 4, "data": 2}
    state, _ = trained
    embedding = state.params["embed"]["embedding"]
    for leaf in (embedding, state.opt_state["adam"].mu["embed"]["embedding"]):
        shards = leaf.addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert {shard.data.size * 8 for shard in shards} == {leaf.size}
    norm = state.params["final_norm"]["scale"]
    assert {shard.data.shape for shard in norm.addressable_shards} == {(1, norm.shape[1])}
    assert len(norm.sharding.device_set) == 8


def test_windows_cut_on_the_host_train_the_same(build, alone):
    host = build(("published",), (0,), devices=1, gather="host")
    assert host.program.train_N is None and alone.program.train_N is not None
    assert_same(host.run(host.init(), end=20), alone.run(alone.init(), end=20))


def test_a_seed_sets_the_order_of_the_data(four):
    """Recipes of one seed share their batches, seeds do not, and step n has its own."""
    batches_RKB = np.asarray(four.program.batches(3, 8))
    assert [rep.seed for rep in four.program.replicates] == [0, 1, 0, 1]
    assert batches_RKB.shape == (4, 5, four.program.cfg.data.batch_size)
    assert_same(batches_RKB[:2], batches_RKB[2:])
    assert (batches_RKB[0] != batches_RKB[1]).any()
    assert_same(batches_RKB[:, 2:4], np.asarray(four.program.batches(5, 7)))


def test_donated_state_is_deleted(four):
    state = four.init()
    four.run(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state["adam"]))


def test_other_hyper_values_compile_nothing(four, trained):
    state, _ = trained
    for name in config.HYPER_FIELDS:
        values = np.asarray(getattr(four.program.hyper, name)) * 0.5 + 0.25
        four.run(copy(state), 20, 25, hyper=hyper_of(four.program, **{name: values}))
        assert four.chunk._cache_size() == 1, name


TRAIN_KEYS = {
    "train": ["grad_norm", "loss", "lr", "param_norm", "update_norm", "weight_decay"],
    "decay": ["norm_ratio_{}", "update_share_{}", "update_weight_cosine_{}"],
}
EVAL_KEYS = [
    "collapse/concentration",
    "collapse/entropy",
    "collapse/logit_std",
    "collapse/mode_share",
    "collapse/mutual_information",
    "collapse/overconfidence",
    "collapse/unigram_kl",
    "collapse/unique_targets",
    "collapse/unique_tokens",
    "eval/bits_per_byte",
    "eval/loss",
    "quant/flip_rate",
    "quant/zero_rate",
]


def abstract_chunk(cfg, n_rep=2):
    """A chunk and the shapes of its arguments, without a corpus."""
    d, vocab = cfg.data, cfg.model.vocab_size

    def shape(dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def batch(*dims):
        dims = (*dims, d.batch_size, d.seq_len)
        return data.Batch(shape(dims, jnp.int32), shape(dims, jnp.int32), shape(dims))

    hyper = jax.tree.map(lambda _: shape((n_rep,)), config.Hyper())
    init = jax.vmap(lambda hyper, seed: train.init_state(cfg, hyper, seed))
    state = jax.eval_shape(init, hyper, shape((n_rep,), jnp.uint32))
    tracked = batch(n_rep) if d.track == "first_batch" else None
    small = batch(d.eval_batches)
    nats = shape((d.eval_batches, 2, d.batch_size, d.seq_len))
    evals = train.EvalData(small, small, nats, tracked, shape((vocab,)), shape((vocab,)))
    tokens, ids = shape((999,), jnp.uint16), shape((n_rep, 3, d.batch_size), jnp.int32)
    windows = data.Windows(np.zeros(999, np.uint16), d.seq_len, 0, True, True)
    return train.make_train_chunk(cfg, windows), (state, hyper, evals, tokens, ids)


def layout(name, track="validation", dtype="float32"):
    cfg = presets.preset("tiny")
    tied = name == "b158"
    model = replace(
        cfg.model, layout=name, vocab_size=300, tied_embedding=tied, dtype=dtype, n_layers=1
    )
    return replace(cfg, model=model, data=replace(cfg.data, track=track))


@pytest.mark.parametrize(
    ("name", "track", "groups", "modules", "tracked"),
    [
        ("b158", "validation", "embedding matrix norm", "down gate k o q up v", []),
        (
            "report",
            "first_batch",
            "embedding head matrix norm",
            "down gate_up o qkv",
            ["track/entropy", "track/loss"],
        ),
    ],
)
def test_metric_keys(name, track, groups, modules, tracked):
    chunk, arguments = abstract_chunk(layout(name, track))
    _, trained, evaluated = jax.eval_shape(chunk, *arguments)
    keys = [f"train/{k}" for k in TRAIN_KEYS["train"]]
    keys += [f"decay/{k.format(g)}" for k in TRAIN_KEYS["decay"] for g in groups.split()]
    assert sorted(k for k in trained if "/" in k) == sorted(keys)
    scales = [f"quant/scale_{m}" for m in modules.split()]
    assert sorted(evaluated) == sorted(EVAL_KEYS + scales + tracked)
    assert {x.shape for k, x in (trained | evaluated).items() if "/" in k} == {(2,)}


def test_evaluation_of_a_chunk_is_that_of_its_state(four, trained):
    p, (state, numbers) = four.program, trained
    with jax.set_mesh(p.mesh):
        alone = jax.device_get(p.evaluate(state))
    assert set(alone) <= set(numbers[-1])
    assert (alone.pop("quant/flip_rate") == 0).all()
    for key, value in alone.items():
        np.testing.assert_allclose(value, numbers[-1][key], rtol=2e-5, atol=1e-6, err_msg=key)


def test_codes_flip_only_when_weights_move(four, trained):
    state, numbers = trained
    assert all((row["quant/flip_rate"] > 0).all() for row in numbers)
    still = hyper_of(four.program, lr_stage2_start=0, lr_final=0)
    after, (row,) = four.run(copy(state), 20, 25, hyper=still)
    assert (row["quant/flip_rate"] == 0).all() and (row["train/update_norm"] == 0).all()
    assert_same(after.params, state.params)


def test_nan_in_a_parameter_freezes_its_replicate_alone(four):
    init = four.init()
    scale = init.params["final_norm"]["scale"]
    bad = jax.device_put(scale.at[1, 3].set(jnp.nan), scale.sharding)
    poisoned = init.replace(params={**init.params, "final_norm": {"scale": bad}})
    before = jax.device_get(poisoned.params)
    healthy, _ = four.run(copy(init))
    state, (row,) = four.run(poisoned)
    assert state.failed.tolist() == row["failed"].tolist() == [0, 1, 0, 0]
    assert_same(take(state.params, 1), take(before, 1))
    others = [0, 2, 3]
    assert_same(take(state.params, others), take(healthy.params, others))
    assert state.step.tolist() == [EVERY] * 4


def test_failed_is_the_update_that_met_it(four, trained):
    """Update 21 of replicate 2 is infinite, so update 22 meets it, in the middle of a chunk."""
    state, _ = trained
    healthy, _ = four.run(copy(state), 20, 30)
    peaks = np.array(four.program.hyper.lr_stage2_start)
    peaks[2] = np.inf
    hyper = hyper_of(four.program, lr_stage2_start=peaks)
    failed, (row,) = four.run(copy(state), 20, 25, hyper=hyper)
    assert row["failed"].tolist() == [0, 0, 22, 0]
    assert row["grad_finite"][:, :2].all(axis=-1).tolist() == [[True, True]] * 2 + [
        [True, False],
        [True, True],
    ]
    frozen = jax.device_get(take(failed.params, 2))
    later, (row,) = four.run(failed, 25, 30, hyper=hyper)
    assert row["failed"].tolist() == [0, 0, 22, 0]
    assert_same(take(later.params, 2), frozen)
    assert_same(take(later.params, [0, 1, 3]), take(healthy.params, [0, 1, 3]))


@pytest.mark.parametrize(("name", "dtype"), [("b158", "float32"), ("report", "bfloat16")])
def test_chunk_lowers_for_accelerators(name, dtype):
    chunk, arguments = abstract_chunk(layout(name, dtype=dtype))
    exported = jax.export.export(jax.jit(chunk), platforms=["cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cuda", "tpu")
    out = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.map(lambda x: x.dtype, out[0]) == jax.tree.map(lambda x: x.dtype, arguments[0])


def test_windows_of_a_batch_are_the_ones_trained_on(four):
    """Window ids on the device cut the same tokens as the host does."""
    p = four.program
    ids_KB = p.batches(0, 3)[0]
    assert_same(p.windows.cut(ids_KB, p.train_N), p.windows.cut(np.asarray(ids_KB)))


def test_evaluation_sees_the_validation_split_and_training_the_other(four):
    """Every evaluated window stands in the held-out text and none in what is trained on."""
    p, length = four.program, four.program.cfg.data.seq_len

    def windows_of(tokens_N):
        return {bytes(w) for w in np.lib.stride_tricks.sliding_window_view(tokens_N, length)}

    held_out, trained_on = windows_of(p.tokens.validation_N), windows_of(p.tokens.train_N)
    dtype = p.tokens.train_N.dtype
    for block in (p.evals.small, p.evals.large):
        rows = np.asarray(block.inputs).astype(dtype).reshape(-1, length)
        assert {bytes(row) for row in rows} <= held_out - trained_on
    served = p.windows.cut(np.asarray(p.batches(0, 4)))
    rows = served.inputs.astype(dtype).reshape(-1, length)
    assert {bytes(row) for row in rows} <= trained_on


def test_the_large_block_tells_a_model_that_sees_later_tokens(four):
    p = four.program

    def leak_R():
        with jax.set_mesh(p.mesh):
            large_eval = jax.jit(train.make_large_eval(p.cfg, p.seams))
            return large_eval(four.init(), p.hyper, p.evals)[metrics.FUTURE_LEAK]

    np.testing.assert_array_equal(leak_R(), 0)
    with mock.patch.object(jax.nn, "dot_product_attention", seam_faults.attention_to_all):
        assert all(leak_R() > verdict.LEAK)


def first_step(setup):
    """State and numbers after one update, without quantisation, by the program's own chunk."""
    p = replace(setup.program, hyper=hyper_of(setup.program, **SMOOTH))
    with jax.set_mesh(p.mesh):
        state, *numbers = p.train_chunk(setup.init(), p.batches(0, 1))
        return state, jax.device_get(numbers[0] | numbers[1])


def doubled_loss(logits_BLV, batch, hyper, unigram_V):
    """Twice the cross-entropy."""
    return 2 * loss.cross_entropy(logits_BLV, batch)


def test_the_loss_that_is_logged_is_the_cross_entropy_alone(build, alone):
    """Another objective moves the gradient, not the number."""
    seams = train.Seams(loss=doubled_loss)
    _, numbers = first_step(build(("published",), (0,), devices=1, seams=seams))
    _, plain = first_step(alone)
    np.testing.assert_allclose(numbers["train/loss"], plain["train/loss"], rtol=1e-6)
    np.testing.assert_allclose(numbers["train/grad_norm"], 2 * plain["train/grad_norm"], rtol=1e-5)


def scaled_loss(logits_BLV, batch, hyper, unigram_V):
    return hyper.extra["factor"] * loss.cross_entropy(logits_BLV, batch)


def test_arms_of_one_loss_share_a_program_and_differ_by_their_numbers():
    """`Hyper.extra` reaches the loss as data: other values compile nothing."""
    cfg = layout("b158")
    state = train.init_state(cfg, config.Hyper(), 0)
    step = jax.jit(
        functools.partial(train.train_step, cfg, train.Seams(loss=scaled_loss), unigram_V=None)
    )
    norms = [
        float(step(state, config.Hyper(extra={"factor": x}), random_batch())[2]["train/grad_norm"])
        for x in (1.0, 3.0)
    ]
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)
    assert step._cache_size() == 1


def random_batch():
    windows_BL = jax.random.randint(jax.random.key(0), (2, 9), 1, 300)
    return data.Batch(windows_BL[:, :-1], windows_BL[:, 1:], jnp.ones((2, 8)))


def test_numbers_of_the_update_are_those_of_the_moved_parameters():
    """Found again from the state, or of the updates of an optimiser that cannot find them again."""
    cfg = layout("b158")
    state = train.init_state(cfg, config.Hyper(), 0)
    hyper = config.Hyper(coupled_1=0.1, decoupled_1=0.3, decay_rest=1.0)

    def of(seams):
        step = jax.jit(functools.partial(train.train_step, cfg, seams, unigram_V=None))
        after, updates, _ = step(state, hyper, random_batch())
        moved = jax.tree.map(jnp.subtract, after.params, state.params)
        numbers = train.update_numbers(cfg, seams, hyper, after, updates)
        assert float(numbers["train/update_norm"]) == pytest.approx(
            float(optax.tree.norm(moved)), rel=1e-4
        )
        return after, updates, numbers

    after, nothing, numbers = of(train.STANDARD)
    same, updates, kept = of(seam_faults.HOLDS_ITS_UPDATES)
    assert nothing is None and updates is not None
    assert_same(after, same)
    assert {k: float(x) for k, x in numbers.items()} == pytest.approx(
        {k: float(x) for k, x in kept.items()}, rel=1e-3, abs=1e-6
    )


def test_a_failed_update_moves_nothing():
    """The numbers of an update that was not made are 0, whatever the moments are."""
    cfg, hyper = layout("b158"), config.Hyper(decoupled_1=0.1)
    state = train.init_state(cfg, hyper, 0)
    step = jax.jit(functools.partial(train.train_step, cfg, train.STANDARD, unigram_V=None))
    state, *_ = step(state, hyper, random_batch())
    broken, updates, _ = step(
        state, hyper, random_batch().replace(weights=jnp.full((2, 8), jnp.nan))
    )
    assert_same(broken.params, state.params)
    assert float(broken.failed) == 2
    numbers = train.update_numbers(cfg, train.STANDARD, hyper, broken, updates)
    assert float(numbers["train/update_norm"]) == 0


def test_an_output_bias_starts_at_the_unigram(build):
    """At step 0 the loss is about the unigram's, and every bias is its log probability."""
    setup = build(("coupled",), (0,), devices=1, model={"output_bias": True})
    p = setup.program
    state = setup.init()
    log_unigram_V = np.log(np.asarray(p.evals.unigram_V))
    np.testing.assert_allclose(state.params["output_bias"][0], log_unigram_V, rtol=1e-6)
    with jax.set_mesh(p.mesh):
        numbers = jax.device_get(p.evaluate(state))
    unigram, uniform = (p.references[name]["loss"] for name in ("unigram", "uniform"))
    assert uniform - unigram > 0.5
    assert numbers["eval/loss"][0] == pytest.approx(unigram, abs=0.02)
    assert numbers["collapse/mutual_information"][0] < 0.02
    assert numbers["collapse/unigram_kl"][0] < 0.02
    group = optim.param_groups(state.params)["output_bias"]
    assert group == "bias" and group not in optim.DECAYED_IN_PART


@pytest.mark.parametrize(
    ("warmup", "step", "share"),
    [(0, 0, 1), (0, 7, 1), (8, 0, 0), (8, 2, 0.25), (8, 8, 1), (8, 9, 1)],
)
def test_quantisation_warm_up_is_a_line_from_nothing(warmup, step, share):
    """Both strengths after `step` updates, so the first update is not quantised at all."""
    hyper = config.Hyper(quant_warmup_steps=float(warmup), weight_quant=0.5, act_quant=1.0)
    now = train.at_step(hyper, jnp.array(step))
    assert float(now.weight_quant) == 0.5 * share and float(now.act_quant) == share
    assert now.replace(weight_quant=0.5, act_quant=1.0) == hyper


def test_a_step_in_quantisation_warm_up_has_the_strength_of_its_step():
    """Update 3 of a warm-up of 4 is the step of a run with both strengths at 1/2."""
    cfg, batch = layout("b158"), random_batch()
    state = train.init_state(cfg, config.Hyper(), 0).replace(step=jnp.array(2))
    step = jax.jit(functools.partial(train.train_step, cfg, train.STANDARD, unigram_V=None))
    after, *_ = step(state, config.Hyper(quant_warmup_steps=4.0), batch)
    assert_same(after, step(state, config.Hyper(weight_quant=0.5, act_quant=0.5), batch)[0])
    full, *_ = step(state, config.Hyper(), batch)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.opt_state, full.opt_state)
    assert max(jax.tree.leaves(moved["adam"].mu)) > 1e-4
