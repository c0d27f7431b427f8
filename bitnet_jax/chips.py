"""Devices that need not be here: what they have, slices of them, and their compiler.

Peak FLOP/s (bfloat16, dense), memory and bandwidths are the makers' published numbers. Google:
cloud.google.com/tpu/docs/v5e, /v5p and /v6e; Nvidia: data sheets of the H100 SXM and the H200. Of a
link between chips one direction counts.
"""

import importlib.util
import math
import os
from dataclasses import dataclass, replace

import jax

from bitnet_jax.fields import UserError, shown

GIB = 1 << 30
SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
MOST_DEVICES = 4096
TPU_ENVIRONMENT = {  # libtpu looks for no TPU and no metadata server
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


class Busy(Exception):
    """libtpu serves one process at a time."""

    exit_status = 1


@dataclass(frozen=True)
class Chip:
    name: str
    platform: str
    memory: float  # bytes that a program can use; 0: not known
    flops: float = 0  # a second, bfloat16; 0: not known
    memory_rate: float = 0  # bytes a second
    link_rate: float = 0  # bytes a second that a chip sends to others
    float32: float = 1 / 6  # of `flops`: a TPU multiplies float32 in six passes of bfloat16
    shapes: tuple[str, ...] = ()  # slices, of TPUs


CHIPS = {  # of a TPU what its compiler lets a program use; of a GPU the 75 % that JAX takes
    "v5e": Chip("TPU v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 200e9, shapes=SQUARE),
    "v6e": Chip("TPU v6e", "tpu", 31.25 * GIB, 918e12, 1600e9, 400e9, shapes=SQUARE),
    "v5p": Chip("TPU v5p", "tpu", 95 * GIB, 459e12, 2765e9, 600e9, shapes=CUBE),
    "gpu": Chip("H100 SXM", "gpu", 0.75 * 80e9, 989e12, 3350e9, 450e9, 67 / 989),
    "h200": Chip("H200", "gpu", 0.75 * 141e9, 989e12, 4800e9, 450e9, 67 / 989),
    "cpu": Chip("CPU", "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
}


@dataclass(frozen=True)
class Topology:
    text: str
    chip: Chip
    size: int  # devices


def parse_topology(text: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x2`, `gpu:8`; raises UserError that says what is accepted."""
    kind, _, shape = text.partition(":")
    chip = CHIPS.get(kind)
    if chip and shape in chip.shapes:
        return Topology(text, chip, math.prod(map(int, shape.split("x"))))
    number = int(shape) if shape.isascii() and shape.isdecimal() and len(shape) < 9 else 0
    if chip and not chip.shapes and 1 <= number <= MOST_DEVICES:
        return Topology(text, chip, number)
    if chip and chip.shapes:
        accepted = f"of {kind}: {', '.join(chip.shapes)}"
    elif chip:
        accepted = f"{kind}:1 to {kind}:{MOST_DEVICES}"
    else:
        accepted = "v5e:4x4, v6e:4x4, v5p:2x2x2, gpu:8, h200:8, cpu:1 and the like"
    raise UserError(f"--topology {shown(text)}: unknown; use {accepted}")


def can_compile(topology: Topology) -> bool:
    """Whether the compiler of these devices is installed."""
    return topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is not None


def devices_of(topology: Topology) -> list:
    """Devices to compile for; raises Busy while another process does."""
    from jax.experimental import topologies

    os.environ |= TPU_ENVIRONMENT
    host_bounds = {"chips_per_host_bounds": [1, 1, 1]} if topology.size == 1 else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.text, **host_bounds
        ).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise Busy("another process uses libtpu: wait for it, or add --estimate") from error
    return list(devices)


def larger(topology: Topology) -> list[Topology]:
    """Topologies of the same chip with more devices, smallest first."""
    kind, doubled = topology.text.partition(":")[0], [topology.size << n for n in range(1, 13)]
    shapes = topology.chip.shapes or [n for n in doubled if n <= MOST_DEVICES]
    candidates = [parse_topology(f"{kind}:{shape}") for shape in shapes]
    return [replace(t, chip=topology.chip) for t in candidates if t.size > topology.size]
