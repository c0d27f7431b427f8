"""Placement: which devices a run uses, and that state and batches really are spread over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax import config, presets, sharding, train


@pytest.mark.parametrize(
    ("n_replicates", "batch_size", "n_devices", "mesh_shape"),
    [
        (1, 4, 1, (1, 1)),
        (1, 4, 8, (1, 4)),  # four devices idle: a fifth has no window
        (1, 8, 8, (1, 8)),
        (2, 4, 8, (2, 4)),  # replicates first, then the batch
        (8, 4, 8, (8, 1)),
        (4, 3, 8, (2, 3)),
        (6, 4, 8, (2, 4)),
        (3, 6, 6, (3, 2)),
        (1, 3, 8, (1, 3)),
    ],
)
def test_mesh_spreads_replicates_first_then_the_batch(
    n_replicates, batch_size, n_devices, mesh_shape
):
    mesh = sharding.make_mesh(n_replicates, batch_size, jax.devices()[:n_devices])
    assert mesh.devices.shape == mesh_shape
    assert mesh.axis_names == ("replicate", "data")


def test_mesh_takes_all_devices_unless_told():
    assert sharding.make_mesh(2, 4).devices.size == jax.device_count() == 8


@pytest.mark.parametrize(
    ("shape", "n_data", "spec"),
    [
        ((2,), 4, P("replicate")),
        ((2, 256), 4, P("replicate", None)),  # small: copied
        ((2, 512, 511), 4, P("replicate", None, None)),  # just below the limit
        ((2, 512, 512), 4, P("replicate", "data", None)),
        ((2, 512, 1024), 4, P("replicate", "data", None)),  # the first axis, not the largest
        ((2, 50257, 512), 4, P("replicate", None, "data")),  # the first that divides
        ((2, 513, 513), 4, P("replicate", None, None)),
        ((512, 512, 1), 4, P("replicate", None, None)),  # replicates do not make a leaf large
    ],
)
def test_large_leaves_split_their_first_axis_that_divides(shape, n_data, spec):
    assert sharding.leaf_spec(shape, n_data) == spec


def test_every_leaf_of_a_state_is_placed_by_the_rule():
    """Vocabulary 8192 x width 32 reaches the limit, all else is small: embedding and moments."""
    cfg, _ = presets.override(presets.preset("tiny"), ["model.vocab_size=8192"])
    replicates = presets.make_replicates(cfg, [0], {})
    hyper = config.stack_hypers(replicates)
    state = jax.eval_shape(jax.vmap(lambda h, s: train.init_state(cfg, h, s)), hyper, jnp.arange(2))
    mesh = sharding.make_mesh(2, 4)
    placed = sharding.state_sharding(mesh, state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    leaves = jax.tree.leaves(placed)
    assert all(s.mesh == mesh and s.spec[0] == "replicate" for s in leaves)
    assert sum("data" in s.spec for s in leaves) == 3
    assert placed.params["embed"]["embedding"].spec == P("replicate", "data", None)


def test_a_large_leaf_really_is_split_over_the_data_axis():
    mesh = sharding.make_mesh(2, 4)
    shapes = {"large": jnp.zeros((2, 512, 512)), "small": jnp.zeros((2, 8, 8))}
    placed = jax.device_put(shapes, sharding.state_sharding(mesh, jax.eval_shape(lambda: shapes)))
    pieces = {k: [s.data.shape for s in x.addressable_shards] for k, x in placed.items()}
    assert pieces == {"large": [(1, 128, 512)] * 8, "small": [(1, 8, 8)] * 8}


def test_replicated_and_by_replicate_place_what_their_names_say():
    mesh = sharding.make_mesh(2, 4)
    x = np.arange(4.0).reshape(2, 2)
    whole = jax.device_put(x, sharding.replicated(mesh)).addressable_shards
    halves = jax.device_put(x, sharding.by_replicate(mesh)).addressable_shards
    assert [s.data.shape for s in whole] == [(2, 2)] * 8
    assert [float(s.data[0, 0]) for s in halves] == [0.0] * 4 + [2.0] * 4


def test_a_batch_is_split_over_the_mesh_in_use():
    mesh = sharding.make_mesh(2, 4)
    windows_BL = jnp.arange(20).reshape(4, 5)
    assert sharding.split_batch(windows_BL) is windows_BL  # no mesh: nothing to do
    with jax.set_mesh(mesh):
        split_BL = jax.jit(sharding.split_batch)(windows_BL)
    assert split_BL.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    np.testing.assert_array_equal(split_BL, windows_BL)
