"""What does a training step become on an accelerator that is not at hand?

XLA compiles for an H200 and for TPUs on any machine: the chunk of steps that training dispatches,
by fake-quantised products and by products of codes. Counted in the compiled program: operations of
a step (kernels, on a GPU; those of a loop over blocks of the vocabulary once), its products by the
type of their operands, and bytes of arguments and of temporaries. Without the device no kernel is
chosen by trying it, so this says nothing of speed.

For the H200 it takes `pip install "jax[cuda12]"`, for TPUs `"jax[tpu]"`. Prints a table; appends a
row per program to experiments/results/bench_compile.jsonl.

    python -m experiments.bench_compile --topology h200:1 --preset report
    python -m experiments.bench_compile --topology v5e:1x1 --preset report
"""

import os
import re
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import jax

from bitnet_jax import chips, presets, products, shapes, sharding
from bitnet_jax.cli import flags
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError
from bitnet_jax.program import Program
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
KERNELS = "fusion custom-call copy sort scatter dot convolution reduce dynamic-update-slice iota"
CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
DEFINED = re.compile(r"%?([\w.\-]+) = \(?(\w+)\[")
OPERATION = re.compile(r"= (?:\([^=]*\)|\S+) ([\w\-]+)\(%?([\w.\-]*)")


def h200_devices(n: int) -> list:
    """Descriptions of `n` H200s; raises UserError where XLA:GPU is not installed."""
    from jax._src import xla_bridge
    from jax.experimental import topologies

    known = xla_bridge.canonicalize_platform
    # jax 0.10 looks for the devices that are here, and knows no "gpu" without one (jax#23971).
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else known(name)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology=f"1x1x{n}", target_config=H200
        )
    except (RuntimeError, NotImplementedError) as error:
        raise UserError('--topology h200: needs pip install "jax[cuda12]"') from error
    return list(found.devices)


def devices(topology: chips.Topology) -> list:
    """To compile for; raises UserError for what has no compiler here."""
    if topology.text.startswith("h200"):
        return h200_devices(topology.size)
    if not chips.can_compile(topology):
        accepted = 'h200:1 with "jax[cuda12]", or a TPU such as v5e:1x1 with "jax[tpu]"'
        raise UserError(f"--topology {topology.text}: no compiler for it here; use {accepted}")
    return chips.devices_of(topology)


def compiled(program: Program):
    """The chunk that training dispatches."""
    precision = "float32" if program.cfg.model.dtype == "float32" else "default"
    state, rest = program.abstract_state, (program.hyper, program.evals)
    with jax.set_mesh(program.mesh), jax.default_matmul_precision(precision):
        batches = shapes.batches_of(program)
        return program.jitted_chunk.lower(state, *rest, None, batches).compile()


def bodies(hlo: str) -> dict[str, list[str]]:
    """Lines of every computation of a compiled program, by name."""
    found, name = {}, ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reachable(by_name: dict[str, list[str]], first: str, *, fused: bool) -> dict[str, list[str]]:
    """The computation `first` and those that it runs; `fused`: also the insides of its kernels."""
    waiting, found = [first], {}
    while waiting:
        if (name := waiting.pop()) in found or name not in by_name:
            continue
        found[name] = by_name[name]
        for line in by_name[name]:
            if fused or re.search(r" (?:call|while|conditional)\(", line):
                inside = " ".join(BRANCHES.findall(line))
                waiting += CALLED.findall(line) + re.findall(r"[\w.\-]+", inside)
    return found


def count(hlo: str) -> dict:
    """Operations of the largest loop, which is that over steps."""
    by_name = bodies(hlo)
    loops = re.findall(r" while\(.*body=%?([\w.\-]+)", hlo)
    step = max(loops, key=lambda loop: sum(map(len, reachable(by_name, loop, fused=True).values())))
    kinds, operands = Counter(), Counter()
    for lines in reachable(by_name, step, fused=False).values():
        kinds.update(found[1] for line in lines if (found := OPERATION.search(line)))
    for lines in reachable(by_name, step, fused=True).values():
        types = dict(found.groups() for line in lines if (found := DEFINED.search(line)))
        for line in lines:
            found = OPERATION.search(line)
            if found and found[1] in ("dot", "convolution"):
                operands[types.get(found[2], "?")] += 1
    return {
        "operations": sum(kinds[kind] for kind in KERNELS.split()),
        "products": dict(operands.most_common()),
    }


def parse(argv: list[str]) -> Namespace:
    """The command line."""
    parser = bench.parser("bench_compile", __doc__, preset="report", rounds=1)
    parser.add_argument("--topology", default="h200:1", help="h200:1, v5e:1x1 (default: h200:1)")
    return parser.parse_args(argv)


def run(args: Namespace) -> None:
    """Compile, write and print."""
    topology = chips.parse_topology(args.topology)
    found = devices(topology)
    asked, hyper = bench.resolve(args)
    cfg = replace(asked, run=RunConfig(steps=100_000, recipes=("published",), eval_every=K))
    replicates = presets.make_replicates(cfg, [args.seed], hyper)
    mesh = sharding.make_mesh(1, cfg.data.batch_size, found)
    program = shapes.abstract_program(cfg, replicates, mesh, topology.chip.platform)
    n_params = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    fixed = bench.shape_of(args.preset, program.cfg, n_params)
    fixed |= {"topology": topology.text, "B": cfg.data.batch_size, "L": cfg.data.seq_len}
    rows = bench.Rows("bench_compile", fixed)
    for form in (products.PLAIN, products.CODES):
        chunk = compiled(replace(program, seams=replace(program.seams, products=form)))
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
    run(args)


if __name__ == "__main__":
    flags.guard(main)
