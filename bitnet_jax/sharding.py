"""Where arrays live: a mesh of (replicate, data), one rule for state, batches split over `data`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MIN_SHARDED = 2**18  # parameters with fewer elements are copied to every device of a replicate


def make_mesh(n_replicates: int, batch_size: int, devices: list | None = None) -> Mesh:
    """Spread replicates, then each replicate's batch, over as many devices as both divide evenly.

    Axes are Auto: with the default Explicit axes `nn.Embed` needs an out_sharding.
    """
    devices = jax.devices() if devices is None else devices
    n_rep, n_data = mesh_shape(n_replicates, batch_size, len(devices))
    return jax.make_mesh(
        (n_rep, n_data),
        ("replicate", "data"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: n_rep * n_data],
    )


def mesh_shape(n_replicates: int, batch_size: int, n_devices: int) -> tuple[int, int]:
    """The most devices as (n_rep, n_data) that divide replicates and batch; replicates first."""
    sizes = [
        (n_rep, n_data)
        for n_rep in range(1, n_replicates + 1)
        for n_data in range(1, min(batch_size, n_devices // n_rep) + 1)
        if n_replicates % n_rep == 0 == batch_size % n_data
    ]
    return max(sizes, key=lambda size: (math.prod(size), size))


def idle_note(n_replicates: int, batch_size: int, parts: int, n_devices: int) -> str | None:
    """How many of the devices a run uses, and the nearest batch sizes that use all; None: all.

    `parts` of a batch are computed one after another.
    """
    if (used := math.prod(mesh_shape(n_replicates, batch_size // parts, n_devices))) == n_devices:
        return None
    units = [  # a batch that is a multiple of one of these is split over all devices
        n_devices // n_rep * parts
        for n_rep in range(1, n_replicates + 1)
        if n_replicates % n_rep == 0 == n_devices % n_rep
    ]
    below = max(batch_size // unit * unit for unit in units)
    above = min((batch_size // unit + 1) * unit for unit in units)
    nearest = f"{below} or {above}" if below else above
    return f"{used} of {n_devices} devices are used; all with data.batch_size={nearest}"


def leaf_spec(shape: tuple[int, ...], n_data: int) -> P:
    """Leading axis over `replicate`; of large leaves the first axis that divides over `data`.

    Products never see it: they take a matrix whole (`gathered`). First, because the first axis of a
    matrix is padded least on a TPU: to a multiple of 8, the last to one of 128.
    """
    spec: list[str | None] = ["replicate"] + [None] * (len(shape) - 1)
    if math.prod(shape[1:]) >= MIN_SHARDED:
        divides = (i for i in range(1, len(shape)) if shape[i] % n_data == 0)
        if (axis := next(divides, None)) is not None:
            spec[axis] = "data"
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


def n_data() -> int:
    """Devices that share a batch in the mesh in use; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"]


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`x` placed by `spec` where several devices share a batch, and an axis it names divides."""
    n = n_data()
    even = all(size % n == 0 for size, name in zip(x.shape, spec, strict=False) if name)
    return jax.lax.with_sharding_constraint(x, spec) if n > 1 and even else x


def split_batch(batch):
    """Split the leading axis of arrays over the `data` axis of the mesh, where it divides them."""
    return jax.tree.map(lambda x: constrain(x, P("data")), batch)


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device."""
    return constrain(x, P())


def by_columns(x: jax.Array) -> jax.Array:
    """`x` split along its last axis."""
    return constrain(x, P(*[None] * (x.ndim - 1), "data"))


def as_state(x: jax.Array) -> jax.Array:
    """`x` as a leaf of the state of its shape is placed."""
    return constrain(x, P(*leaf_spec((1, *x.shape), n_data())[1:]))


def summed(x: jax.Array) -> jax.Array:
    """A gradient, of which each device has that of its rows, summed and placed `as_state`.

    Whole in between, which XLA makes a reduce-scatter of; asked for parts at once it would rather
    compute the product part by part.
    """
    return as_state(whole(x))


@jax.custom_vjp
def gathered(x: jax.Array) -> jax.Array:
    """`x` on every device, from the parts of a state; its gradient comes in such parts."""
    return whole(x)


gathered.defvjp(lambda x: (whole(x), None), lambda _, grad: (as_state(grad),))


def stacked(trees: list):
    """Trees of leaves of a state as one with a leading axis, each leaf split as it was."""

    def stack(*leaves):
        spec = leaf_spec((1, *leaves[0].shape), n_data())
        return constrain(jnp.stack(leaves), P(None, *spec[1:]))

    return jax.tree.map(stack, *trees)
