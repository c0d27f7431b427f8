"""Several processes that train together: the same command on every host, and process 0 writes.

A process takes part when its environment says so: SLURM, Open MPI and Cloud TPU are recognised as
jax.distributed does, and everywhere else JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
JAX_PROCESS_ID.
"""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitnet_jax.fields import UserError, shown

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # processes that a launcher has started
HEARTBEAT = 10  # seconds without a sign of life after which a process counts as lost
MESSAGE = 1 << 10  # bytes of an error that all processes are told


class Lost(Exception):
    """Another process has ended."""

    exit_status = 1


def initialize() -> None:
    """Join the other processes, before the first array; nothing where the environment names none.

    Raises UserError when the environment does not say who takes part, or they do not appear.
    """
    given = {name: os.environ[name] for name in OURS if os.environ.get(name)}
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    launched = any(int(os.environ.get(name) or 1) > 1 for name in SIZES)
    if not (given or pod or launched) or jax.distributed.is_initialized():
        return
    numbers = {}
    if not (pod or launched):
        if missing := [name for name in OURS if name not in given]:
            raise UserError(f"{' and '.join(given)} is set, but not {' and '.join(missing)}")
        n, i = (given[name] for name in OURS[1:])
        if not (n.isdecimal() and i.isdecimal() and int(i) < int(n)):
            raise UserError(
                f"JAX_NUM_PROCESSES={shown(n)} and JAX_PROCESS_ID={shown(i)}: needs a number of "
                "processes, and one from 0 to below it"
            )
        numbers = {"num_processes": int(n), "process_id": int(i)}
    try:
        jax.distributed.initialize(
            **numbers,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes are not there: {shown(error, 300)}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open until the process ends


def is_first() -> bool:
    """Whether this process writes and shows what all compute."""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def wait(name: str) -> None:
    """Go on once every process has come to the point `name`."""
    if several():
        multihost_utils.sync_global_devices(name)


def agree(error: UserError | None) -> None:
    """Raise the first error that a process met in what only some of them do."""
    if not several():
        if error:
            raise error
        return
    text = np.zeros(MESSAGE, np.uint8)
    if error:
        raw = str(error).encode()[:MESSAGE]
        text[: len(raw)] = np.frombuffer(raw, np.uint8)
    for row in multihost_utils.process_allgather(text):
        if row.any():
            raise UserError(bytes(row).rstrip(b"\0").decode("utf-8", "replace"))


def greatest(value: int) -> int:
    """The greatest of the processes' values."""
    return int(multihost_utils.process_allgather(np.int32(value)).max()) if several() else value


def fetch(tree):
    """A tree of arrays in NumPy, whole, wherever they are kept; every process must ask for it."""
    if not several():
        return jax.device_get(tree)
    return jax.tree.map(_fetch, tree)


def _fetch(x):
    if isinstance(x, jax.Array) and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
