"""Where arrays live: a mesh of (replicate, data), one rule for state, batches split over `data`."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MIN_SHARDED = 2**18  # parameters with fewer elements are copied to every device of a replicate


def mesh_shape(n_replicates: int, batch_size: int, n_devices: int) -> tuple[int, int]:
    """Devices for replicates and for each one's batch: as many as both divide evenly."""
    sizes = [
        (n_rep, n_data)
        for n_rep in range(1, n_replicates + 1)
        for n_data in range(1, batch_size + 1)
        if n_replicates % n_rep == 0 == batch_size % n_data and n_rep * n_data <= n_devices
    ]
    return max(sizes, key=lambda size: (math.prod(size), size))


def make_mesh(n_replicates: int, batch_size: int, devices: list | None = None) -> Mesh:
    """Spread replicates, then each replicate's batch, over devices (`mesh_shape`).

    Axes are Auto: with the default Explicit axes `nn.Embed` needs an out_sharding.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(n_replicates, batch_size, len(devices))
    return jax.make_mesh(
        shape,
        ("replicate", "data"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: math.prod(shape)],
    )


def leaf_spec(shape: tuple[int, ...], n_data: int) -> P:
    """Leading axis over `replicate`; of large leaves the largest axis over `data`, if it divides.

    No smaller axis in its place: an embedding [V, D] that was split along D would be multiplied in
    parts, and the logits of the whole batch summed over all devices.
    """
    spec: list[str | None] = ["replicate"] + [None] * (len(shape) - 1)
    if math.prod(shape[1:]) >= MIN_SHARDED:
        largest = max(range(1, len(shape)), key=lambda i: shape[i])
        if shape[largest] % n_data == 0:
            spec[largest] = "data"
    return P(*spec)


def state_sharding(mesh: Mesh, abstract_state):
    """NamedShardings for a state of shapes [R, ...]."""
    n_data = mesh.shape["data"]
    return jax.tree.map(lambda x: NamedSharding(mesh, leaf_spec(x.shape, n_data)), abstract_state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def by_replicate(mesh: Mesh) -> NamedSharding:
    """Leading axis over the replicates' devices."""
    return NamedSharding(mesh, P("replicate"))


def put(tree, sharding: NamedSharding):
    """The arrays of a tree, the same in every process, as `sharding` places them."""

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def batches(mesh: Mesh) -> NamedSharding:
    """Arrays [R, K, B, ...] of batches: replicates and rows where they are needed."""
    return NamedSharding(mesh, P("replicate", None, "data"))


def split_batch(batch):
    """Split the leading axis of arrays over the `data` axis of the mesh, where it divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return batch

    def split(x):
        even = x.shape[0] % mesh.shape["data"] == 0
        return jax.lax.with_sharding_constraint(x, P("data")) if even else x

    return jax.tree.map(split, batch)
