"""What does a training step become on an accelerator that is not at hand?

XLA compiles for an H200 and for TPUs on any machine: the chunk of steps that training dispatches,
by fake-quantised products and by products of codes. Counted in the compiled program: operations of
a step (kernels, on a GPU), those in a loop as often as it turns; its products by the type of their
operands, without those that are calls of a library; bytes of arguments and of temporaries. Without
the device no kernel is chosen by trying it, so this says nothing of speed.

For the H200 it takes `pip install "jax[cuda12]"`, for TPUs `"jax[tpu]"`. Prints a line, and appends
a row to experiments/results/bench_compile.jsonl, per program.

    python -m experiments.bench_compile --topology h200:1 --set data.tokenizer=gpt2:FOLDER
    python -m experiments.bench_compile --topology v5e:1x1 --set data.tokenizer=gpt2:FOLDER
"""

import importlib.util
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax

from bitnet_jax import chips, costs, plan, presets, products, shapes, sharding
from bitnet_jax.cli import flags
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError
from experiments import bench

K = 20  # steps in a chunk
# What XLA:GPU asks of the card: Nvidia's data sheet of the H200, and compute capability 9.0.
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
device_description_str: "NVIDIA H200"
"""
KERNELS = {"fusion", "custom-call", "copy", "sort", "scatter", "dot", "convolution", "reduce"}
KERNELS |= {"dynamic-update-slice", "iota"}
LOOP = re.compile(r" while\(.*body=%([\w.-]+)")
OPERATION = re.compile(r" ([a-z][\w-]*)\(%?([\w.-]*)")
INSIDES = re.compile(r"calls=%[\w.-]+")  # of a fusion


def h200_devices(n: int) -> list:
    """Descriptions of `n` H200s; raises UserError where XLA:GPU is not installed."""
    from jax._src import xla_bridge
    from jax.experimental import topologies

    if not any(importlib.util.find_spec(f"jax_{cuda}_plugin") for cuda in ("cuda12", "cuda13")):
        raise UserError('--topology h200: needs pip install "jax[cuda12]"')
    known = xla_bridge.canonicalize_platform
    # jax 0.10 looks for the devices that are here, and knows no "gpu" without one (jax#23971).
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else known(name)
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology=f"1x1x{n}", target_config=H200
    )
    return list(described.devices)


def devices(topology: chips.Topology) -> list:
    """To compile for; raises UserError for what has no compiler here."""
    if topology.text.startswith("h200"):
        return h200_devices(topology.size)
    if not chips.can_compile(topology):
        accepted = 'h200:1 with "jax[cuda12]", or a TPU such as v5e:1x1 with "jax[tpu]"'
        raise UserError(f"--topology {topology.text}: no compiler for it here; use {accepted}")
    return chips.devices_of(topology)


def operations(computations: dict, entry: str) -> Iterator[tuple[float, str, str]]:
    """How often, kind and first operand of every operation when `entry` runs once."""
    for name, times in costs.executions(computations, entry).items():
        for key, text in computations.get(name, {}).items():
            if key != costs.ROOT and (match := OPERATION.search(text)):
                yield times, match[1], match[2]


def count(hlo: str) -> dict:
    """Kernels and products of a turn of the largest loop, which is that over steps."""
    types, computations, _ = costs.parse_hlo(hlo)
    step = max(LOOP.findall(hlo), key=lambda body: len(costs.executions(computations, body)))
    whole = {  # fusions are kernels, and what is inside them is not
        name: {key: INSIDES.sub("", x) if " fusion(" in x else x for key, x in instructions.items()}
        for name, instructions in computations.items()
    }
    operands: Counter = Counter()
    for times, kind, operand in operations(computations, step):
        if kind in ("dot", "convolution"):
            operands[re.match(r"\w+", types[operand])[0]] += times
    return {
        "operations": round(sum(n for n, kind, _ in operations(whole, step) if kind in KERNELS)),
        "products": {kind: round(n) for kind, n in operands.most_common()},
    }


def parse(argv: list[str]) -> Namespace:
    """The command line."""
    parser = bench.parser("bench_compile", __doc__, preset="report", rounds=None)
    parser.add_argument("--topology", default="h200:1", help="h200:1, v5e:1x1 (default: h200:1)")
    return parser.parse_args(argv)


def run(args: Namespace) -> None:
    """Compile, write and print."""
    topology = chips.parse_topology(args.topology)
    mesh_devices = devices(topology)
    asked, hyper = bench.resolve(args)
    cfg = replace(asked, run=RunConfig(steps=100_000, recipes=("published",), eval_every=K))
    replicates = presets.make_replicates(cfg, [args.seed], hyper)
    mesh = sharding.make_mesh(1, cfg.data.batch_size, mesh_devices)
    program = shapes.abstract_program(cfg, replicates, mesh, topology.chip.platform)
    n_params = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    fixed = bench.shape_of(args.preset, program.cfg, n_params)
    fixed |= {"topology": topology.text, "B": cfg.data.batch_size, "L": cfg.data.seq_len}
    rows = bench.Rows("bench_compile", fixed)
    for form in (products.PLAIN, products.CODES):
        seams = replace(program.seams, products=form)
        chunk = plan.compile_chunk(replace(program, seams=seams))
        memory = chunk.memory_analysis()
        row = rows.add(
            form,
            **count(chunk.as_text()),
            arguments_mb=round(memory.argument_size_in_bytes / 1e6, 1),
            temporary_mb=round(memory.temp_size_in_bytes / 1e6, 1),
        )
        by_type = ", ".join(f"{n} {kind}" for kind, n in row["products"].items())
        print(
            f"{topology.text} {args.preset} {row['dtype']} by {form}: {row['operations']} "
            f"operations a step; products: {by_type}; "
            f"{row['arguments_mb']} + {row['temporary_mb']} MB",
            flush=True,
        )
    print(f"rows: {rows.path}")


def main() -> None:
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    args = parse(sys.argv[1:])
    bench.prepare()
    jax.config.update("jax_platforms", "cpu")  # where arrays live meanwhile
    run(args)


if __name__ == "__main__":
    flags.guard(main)
