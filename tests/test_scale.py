"""Remat, scanned layers, accumulation and sharding change where and when, not what is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax import (
    checkpoint,
    config,
    config_file,
    data,
    loss,
    presets,
    program,
    run,
    sharding,
    train,
)
from bitnet_jax.fields import UserError
from bitnet_jax.products import CODES

V, B, L, K = 101, 8, 16, 2  # a vocabulary that nothing divides, K steps
SMOOTH = {"weight_quant": 0.0, "act_quant": 0.0}  # nothing rounds the other way


def config_of(*changes):
    """The tiny model, of V tokens."""
    sets = (f"model.vocab_size={V}", f"data.batch_size={B}", "optim.eps=1e-5", *changes)
    return presets.override(presets.preset("tiny"), list(sets))[0]


def batch_of(seed):
    """Windows [B, L] of which many positions are not scored, and all of the first window."""
    random = np.random.default_rng(seed)
    inputs, targets = random.integers(0, V, (2, B, L), np.int32)
    weights = (random.random((B, L)) < 0.6).astype(np.float32)
    weights[0] = 0
    return data.Batch(inputs, targets, weights)


def placed(cfg, n_devices):
    """A mesh of so many devices, and one replicate there at step 0."""
    mesh = sharding.make_mesh(1, B // cfg.data.accumulate, jax.devices()[:n_devices])
    state = train.init_state(cfg, config.Hyper(), 0)
    where = sharding.state_sharding(mesh, jax.tree.map(lambda x: x[None], state))
    specs = jax.tree.map(lambda s: NamedSharding(mesh, P(*s.spec[1:])), where)
    return mesh, jax.device_put(state, specs), specs


def trained(cfg, n_devices=1, seams=train.STANDARD, **numbers):
    """State and numbers after K steps of one replicate on so many devices."""
    hyper = presets.make_replicates(cfg, [0], numbers)[0].hyper
    unigram_V = np.full(V, 1 / V, np.float32)
    mesh, state, specs = placed(cfg, n_devices)

    def step(state, hyper, batch):
        batch = sharding.split_batch(batch)
        state, updates, numbers = train.train_step(cfg, seams, state, hyper, batch, unigram_V)
        return state, numbers | train.update_numbers(cfg, seams, hyper, state, updates)

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, out_shardings=(specs, sharding.replicated(mesh)))
        for batch in (batch_of(seed) for seed in range(K)):
            state, metrics = compiled(state, hyper, batch)
    return state, jax.device_get(metrics)


def evaluated(cfg, n_devices=1):
    """Numbers of the small, the tracked and the large block at step 0."""
    blocks = jax.tree.map(lambda *x: np.stack(x), batch_of(0), batch_of(1))
    uniform_V, nats_NKBL = np.full(V, 1 / V, np.float32), np.full((2, 2, B, L), 4, np.float32)
    tracked = jax.tree.map(lambda x: x[None], batch_of(2))
    evals = train.EvalData(blocks, blocks, nats_NKBL, tracked, uniform_V, np.ones(V))
    mesh, state, _ = placed(cfg, n_devices)
    state, hyper = jax.tree.map(lambda x: jnp.asarray(x)[None], (state, config.Hyper(**SMOOTH)))

    def both(*arguments):
        makers = train.make_eval, train.make_large_eval
        small, large = (make(cfg)(*arguments) for make in makers)
        return small | large

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(both)(state, hyper, evals))


def assert_close(actual, expected, rtol=2e-5):
    """Every leaf agrees to `rtol` of its largest value, or of 1."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        atol = rtol * max(np.abs(y).max(), 1)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(autouse=True, scope="module")
def small():
    """Leaves of a tiny model are split, and its head is read in blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED", 2**10)
        patch.setattr(loss, "MOST_LOGITS", 2**9)
        patch.setattr(loss, "NARROWEST", 40)
        yield


@pytest.fixture(scope="module")
def plain():
    """Nothing set, one device, without rounding."""
    return trained(config_of(), **SMOOTH)


REMAT, SCAN, HALVES = "model.remat=true", "model.scan_layers=true", "data.accumulate=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "n_devices"),
    [
        ([REMAT], 1),
        ([SCAN], 1),
        (["data.accumulate=4"], 1),
        ([], 8),
        ([REMAT, SCAN, HALVES], 4),
    ],
)
def test_a_setting_or_a_mesh_changes_no_number(plain, changes, n_devices):
    assert_close(trained(config_of(*changes), n_devices, **SMOOTH), plain)


@pytest.mark.slow
def test_remat_and_scan_quantise_alike():
    """At full strength, where another rounding would show."""
    assert_close(trained(config_of(REMAT, SCAN)), trained(config_of()), 1e-3)


@pytest.mark.slow
def test_codes_travel_instead_of_weights():
    by_codes = dataclasses.replace(train.STANDARD, products=CODES)
    single, eight = (trained(config_of(), n, by_codes) for n in (1, 8))
    assert_close(eight, single, 1e-3)


@pytest.mark.slow
def test_a_report_model_with_its_own_head_is_split_too():
    changes = "model.layout=report", "model.tied_embedding=false", "model.output_bias=true"
    single, eight = (trained(config_of(*changes), n, **SMOOTH) for n in (1, 8))
    assert_close(eight, single)
    assert eight[0].params["head"]["kernel"].sharding.spec == P("data", None)


def test_a_vocabulary_that_does_not_divide_is_split_along_the_width():
    state, _ = trained(config_of(), 8, **SMOOTH)
    for leaf in (state.params, state.opt_state["adam"].nu):
        embedding = leaf["embed"]["embedding"]
        assert embedding.shape == (V, 32)
        assert {s.data.shape for s in embedding.addressable_shards} == {(V, 4)}


@pytest.mark.slow
def test_evaluations_in_pieces_and_on_many_devices_give_the_same_numbers(monkeypatch):
    whole = evaluated(config_of())
    assert_close(evaluated(config_of(REMAT, SCAN), 4), whole)
    monkeypatch.setattr(train, "MOST_LOGITS", 2 * L * V)
    blocks = jax.tree.map(lambda x: x[None], batch_of(0))
    assert jax.tree.leaves(train.pieces(blocks, 1, V))[0].shape == (4, 2, L)
    assert jax.tree.leaves(train.pieces(blocks, 9, V))[0].shape == (8, 1, L)
    assert_close(evaluated(config_of()), whole)


def test_parts_without_a_scored_position_count_nothing():
    """The mean over the scored positions, also when a part has none or less than one in all."""
    values_BL = np.arange(B * L, dtype=np.float32).reshape(B, L)
    for weights_BL in (np.zeros((B, L)), np.eye(B, L), np.eye(B, L) * [[1.0], *[[0.1]] * 7]):
        batch = data.Batch(values_BL, values_BL, weights_BL.astype(np.float32))

        def mean(part):
            value = loss.scored_mean(part.inputs, part.weights)
            return value, {"grad": 2 * value}

        whole = mean(batch)
        for n in (1, 2, 4, 8):
            averaged = loss.accumulated(mean, batch, n)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), averaged, whole)


def test_the_state_is_that_of_the_unrolled_model():
    unrolled, other = (
        jax.eval_shape(lambda cfg=cfg: train.init_state(cfg, config.Hyper(), 0))
        for cfg in (config_of(), config_of(SCAN, REMAT))
    )
    assert unrolled == other


def test_accumulation_must_divide_the_batch_and_needs_a_mean(tiny):
    with pytest.raises(UserError, match=r"data.accumulate=3 must divide data.batch_size=8"):
        config_of("data.accumulate=3")
    cfg, _ = presets.override(tiny, [HALVES])
    own = dataclasses.replace(train.STANDARD, loss=lambda *_: 0.0)
    with pytest.raises(UserError, match="not with an experiment's own loss"):
        program.build(cfg, presets.make_replicates(cfg, [0], {}), own)


def test_2b_is_the_published_shape():
    cfg = presets.preset("2b")
    params = jax.eval_shape(lambda: train.init_state(cfg, config.Hyper(), 0)).params
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_412_820_480


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ((1, 8, 1, 8), None),
        ((2, 4, 1, 8), None),
        ((1, 4, 1, 8), "4 of 8 devices are used; all with data.batch_size=8"),
        ((1, 12, 1, 8), "6 of 8 devices are used; all with data.batch_size=8 or 16"),
        ((1, 8, 4, 8), "2 of 8 devices are used; all with data.batch_size=32"),
        ((6, 9, 1, 8), "6 of 8 devices are used; all with data.batch_size=8 or 12"),
    ],
)
def test_idle_devices_are_told_with_the_nearest_batches_that_use_all(asked, note):
    assert sharding.idle_note(*asked) == note


@pytest.mark.slow
def test_a_run_in_scanned_layers_resumes_bitwise_and_only_as_it_was(tiny, tmp_path, capsys):
    cfg, _ = presets.override(tiny, [SCAN, HALVES, REMAT, "run.recipes=published"])
    replicates = presets.make_replicates(cfg, [0], {})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run.run(cfg, replicates, whole)
    assert "note: 2 of 8 devices are used; all with data.batch_size=16" in capsys.readouterr().out

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        original = checkpoint.save

        def save(manager, step, state, described):
            original(manager, step, state, described)
            raise KeyError("stopped")

        patch.setattr(checkpoint, "save", save)
        run.run(cfg, replicates, parts)
    unrolled, _ = presets.override(cfg, ["model.scan_layers=false"])
    with pytest.raises(UserError, match=r"scan_layers=True, not False; to go on .*fork:"):
        run.run(unrolled, replicates, parts, resume=True)
    run.run(cfg, replicates, parts, resume=True)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_configuration_without_the_settings_has_them_off():
    cfg = config_of()
    tree = config_file.to_json(cfg, presets.make_replicates(cfg, [0], {}))
    del tree["model"]["remat"], tree["model"]["scan_layers"], tree["data"]["accumulate"]
    assert config_file.from_json(tree)[0] == cfg
