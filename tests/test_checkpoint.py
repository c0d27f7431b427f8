"""A checkpoint gives back what was saved, anywhere, or says in one line why it cannot."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from bitnet_jax import checkpoint, config, config_file, presets, restore, sharding, train
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError

RUN = RunConfig(steps=50, checkpoint_every=20)


def tiny_config(**model):
    cfg = presets.preset("tiny")
    return replace(cfg, model=replace(cfg.model, **{"vocab_size": 300, "n_layers": 1} | model))


def abstract(cfg, mesh, n_rep=2):
    """Shapes and places of the state of R replicates."""
    hyper = jax.tree.map(lambda _: jax.ShapeDtypeStruct((n_rep,), jnp.float32), config.Hyper())
    seeds = jax.ShapeDtypeStruct((n_rep,), jnp.uint32)
    init = jax.vmap(lambda hyper, seed: train.init_state(cfg, hyper, seed))
    shapes = jax.eval_shape(init, hyper, seeds)
    places = sharding.state_sharding(mesh, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )


def random_state(shapes):
    """A state with a different number in every place, negative zeros, NaNs and infinities."""
    rng = np.random.default_rng(0)

    def leaf(x):
        bits = rng.integers(0, 2**32, x.shape, np.uint32)
        return jax.device_put(bits.view(x.dtype), x.sharding)

    return jax.tree.map(leaf, shapes)


def assert_same(a, b):
    assert type(a) is type(b) is train.TrainState
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def mesh_of(devices, n_rep=2):
    return sharding.make_mesh(n_rep, 4, jax.devices()[:devices])


def save(workdir, state, *steps, run=RUN, settings=None):
    manager = checkpoint.open_manager(workdir, run)
    for step in steps:
        checkpoint.save(manager, step, state, settings or {"replicates": [{}, {}]})
    manager.close()


@pytest.fixture(scope="module", autouse=True)
def spread():
    """Leaves of a tiny model are split over the devices of a replicate, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED", 2**10)
        yield


@pytest.fixture(scope="module")
def wanted(spread):
    return abstract(tiny_config(), mesh_of(8))


@pytest.fixture(scope="module")
def state(wanted):
    return random_state(wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A workdir with steps 10 and 20; tests that change it copy it."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, state, 10, 20)
    return workdir


@pytest.fixture
def changed(saved, tmp_path):
    """A copy to damage; returns the workdir and the folder of step 20."""
    folder = tmp_path / "copy" / "checkpoints"
    for path in sorted((saved / "checkpoints").rglob("*")):
        target = folder / path.relative_to(saved / "checkpoints")
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy", folder / "20"


def error_of(workdir, step, wanted):
    with pytest.raises(UserError) as caught:
        checkpoint.restore(workdir, step, wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip_is_bitwise(saved, state, wanted):
    restored = checkpoint.restore(saved, 20, wanted)
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, wanted
    )


@pytest.mark.parametrize(("source_devices", "here"), [(1, 8), (8, 1), (8, 2)])
def test_restores_on_another_number_of_devices(tmp_path, source_devices, here):
    cfg = tiny_config()
    state = random_state(abstract(cfg, mesh_of(source_devices)))
    save(tmp_path, state, 1)
    restored = checkpoint.restore(tmp_path, 1, abstract(cfg, mesh_of(here)))
    assert_same(restored, state)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {here}


def test_one_replicate_is_its_slice(saved, state, wanted):
    abstract_replicate = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), wanted)
    for i in (0, 1):
        expected = jax.tree.map(lambda x, i=i: np.asarray(x)[i], state)  # a slice would flush
        assert_same(checkpoint.restore_replicate(saved, 10, i, abstract_replicate), expected)
    with pytest.raises(UserError, match=r"no replicate 2; the checkpoint has 0 to 1$"):
        checkpoint.restore_replicate(saved, 10, 2, abstract_replicate)


def test_keeps_the_last_two_the_regular_ones_and_the_boundary(tmp_path):
    state = {"w": jnp.arange(3.0)}
    save(tmp_path, state, 5, 10, 15, 20)
    assert checkpoint.kept_steps(tmp_path) == [15, 20]
    save(tmp_path, state, 25, 30, 35, 40, 45, 50)
    assert checkpoint.kept_steps(tmp_path) == [20, 25, 40, 45, 50]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "20",
        "25",
        "40",
        "45",
        "50",
    ]


@pytest.mark.parametrize(
    ("keep", "end"),
    [
        (0, [25, 45, 50]),
        (1, [25, 40, 45, 50]),  # 20 and 40 are regular: every second one
        (2, [20, 25, 40, 45, 50]),
        (9, [20, 25, 40, 45, 50]),
    ],
)
def test_what_is_left_at_the_end_is_known_beforehand(tmp_path, keep, end):
    run = replace(RUN, save_every=5, keep=keep)
    assert checkpoint.steps_at_end(run) == end
    save(tmp_path, {"w": jnp.arange(3.0)}, *range(5, 51, 5), run=run)
    assert checkpoint.kept_steps(tmp_path) == end


def test_no_preset_keeps_more_than_thirteen():
    for name, cfg in presets.PRESETS.items():
        assert len(checkpoint.steps_at_end(cfg.run)) <= cfg.run.keep + 3 == 13, name
    last = checkpoint.steps_at_end(presets.PRESETS["700m"].run)
    assert last == [*range(10_000, 100_000, 10_000), 99_500, 100_000]


class Bucket(DirFileSystem):
    """What gcsfs gives for gs://, on a folder."""

    protocol = ("gs", "gcs")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://BUCKET/... is a folder, for epath and for tensorstore: no network, no account."""
    files = Bucket(str(tmp_path / "cloud"), LocalFileSystem())

    def kvstore(path):
        return {"driver": "file", "path": str(tmp_path / "cloud" / path.removeprefix("gs://"))}

    monkeypatch.setattr(fsspec_backend, "fs", lambda path: files)
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    (tmp_path / "cloud" / "bucket").mkdir(parents=True)
    return tmp_path / "cloud" / "bucket"


def started(workdir, run):
    """A workdir whose run has begun."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"run": {"checkpoints": run.checkpoints}}))


def test_checkpoints_in_a_bucket(bucket, tmp_path, state, wanted):
    """Saved, kept by the rule, restored through the workdir and from the bucket; nothing local."""
    run, workdir = replace(RUN, checkpoints="gs://bucket/run"), tmp_path / "run"
    started(workdir, run)
    save(workdir, state, 10, 15, 20, run=run)
    assert checkpoint.kept_steps(workdir) == [15, 20] == checkpoint.kept_steps("gs://bucket/run")
    assert (bucket / "run" / "20" / checkpoint.MANIFEST).exists()
    assert not (bucket / "run" / "10").exists()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert_same(checkpoint.restore(workdir, 20, wanted), state)
    assert_same(checkpoint.restore("gs://bucket/run", 15, wanted), state)
    assert checkpoint.load_config("gs://bucket/run", 15) == {"replicates": [{}, {}]}
    place, step, index = restore.checkpoint_place("gs://bucket/run@15:1")
    assert (str(place), step, index) == ("gs://bucket/run", 15, 1)


def test_a_damaged_checkpoint_in_a_bucket_is_named(bucket, tmp_path, state, wanted):
    run = replace(RUN, checkpoints="gs://bucket/run")
    started(tmp_path / "run", run)
    save(tmp_path / "run", state, 10, 15, run=run)
    path = max((bucket / "run" / "15").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"damaged checkpoint: {path.relative_to(bucket / 'run' / '15')}" in error_of(
        tmp_path / "run", 15, wanted
    )
    (bucket / "run" / "15" / checkpoint.MANIFEST).unlink()  # a save that was cut off
    save(tmp_path / "run", state, 15, run=run)
    assert_same(checkpoint.restore(tmp_path / "run", 15, wanted), state)


def test_a_new_run_does_not_write_where_another_has(tmp_path):
    run = replace(RUN, checkpoints=str(tmp_path / "disk"))
    started(tmp_path / "one", run)
    save(tmp_path / "one", {"w": jnp.zeros(1)}, 10, run=run)
    assert checkpoint.kept_steps(tmp_path / "one") == [10]
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        checkpoint.open_manager(tmp_path / "two", run)


def test_a_place_that_cannot_be_used_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^run.checkpoints=s3://x: use an absolute folder or gs:"):
        replace(RUN, checkpoints="s3://x")

    def no_library(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec_backend, "fs", no_library)
    with pytest.raises(UserError, match="pip install gcsfs"):
        checkpoint.kept_steps("gs://bucket/run")


def test_a_checkpoint_is_complete_when_save_returns(tmp_path, wanted):
    """The caller donates the state next."""
    state = random_state(wanted)
    expected = jax.device_get(state)
    manager = checkpoint.open_manager(tmp_path, RUN)
    checkpoint.save(manager, 1, state, {})
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert_same(jax.device_get(checkpoint.restore(tmp_path, 1, wanted)), expected)
    manager.close()


def test_config_rebuilds_the_run(tmp_path):
    cfg = tiny_config(dtype="bfloat16")
    replicates = presets.make_replicates(cfg, [0, 3], {"lr_peak": 0.1})
    save(tmp_path, {"w": jnp.zeros(1)}, 1, settings=config_file.to_json(cfg, replicates))
    assert config_file.from_json(checkpoint.load_config(tmp_path, 1)) == (cfg, replicates)


def test_missing_step_lists_the_others(saved, wanted, tmp_path):
    assert error_of(saved, 15, wanted) == f"{saved}: no checkpoint of step 15; there: [10, 20]"
    assert "no checkpoint of step 10; there: []" in error_of(tmp_path / "none", 10, wanted)
    assert checkpoint.kept_steps(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("model", "n_rep", "name"),
    [
        ({"n_layers": 2}, 2, "opt_state/adam/mu/block_1/attn/k/kernel is None there and (2, 32"),
        ({"d_ff": 128}, 2, "ffn/down/kernel is (2, 64, 32) there and (2, 128, 32)"),
        ({"layout": "report"}, 2, "attn/k/kernel is (2, 32, 32) there and None"),
        ({}, 4, "is (2,) there and (4,)"),
    ],
)
def test_another_shape_is_named(saved, model, n_rep, name):
    message = error_of(saved, 20, abstract(tiny_config(**model), mesh_of(1), n_rep))
    assert "checkpoint of another shape" in message and name in message


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        _flip,
        lambda path: path.unlink(),
    ],
    ids=["truncated", "flipped", "missing"],
)
def test_damaged_file_is_named(changed, wanted, damage):
    workdir, folder = changed
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(path)
    message = error_of(workdir, 20, wanted)
    assert f"damaged checkpoint: {path.relative_to(folder)}" in message
    assert "remove this folder" in message
    checkpoint.restore(workdir, 10, wanted)


@pytest.mark.parametrize("content", ["", '{"state/_METADATA": 12', "null", "[]", "[" * 100_000])
def test_damaged_manifest_is_one_line(changed, wanted, content):
    workdir, folder = changed
    (folder / checkpoint.MANIFEST).write_text(content)
    assert "20" in error_of(workdir, 20, wanted)


def test_unfinished_saves_do_not_count(changed, wanted, state):
    """A killed process leaves a step without manifest, or orbax' temporary folder."""
    workdir, folder = changed
    (folder / checkpoint.MANIFEST).unlink()
    temporary = folder.with_name("30.orbax-checkpoint-tmp")
    (temporary / "state").mkdir(parents=True)
    assert checkpoint.kept_steps(workdir) == [10]
    assert "there: [10]" in error_of(workdir, 20, wanted)
    save(workdir, state, 20, 30)
    assert checkpoint.kept_steps(workdir) == [20, 30]
    assert_same(checkpoint.restore(workdir, 20, wanted), state)
