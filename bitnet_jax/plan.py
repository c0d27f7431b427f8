"""What a run will need on devices that need not be here: memory, traffic, time, checkpoints.

Nothing is trained and nothing read: neither text nor tokenizer nor network. Bytes of the state and
FLOPs are exact. Memory and collectives are the compiler's own where libtpu can be imported, which
compiles for TPUs on any machine; else they come by arithmetic from the rules of `sharding` and the
shapes of the model, and are said to be estimates (`estimate` says how good).

A time is a bound by published peaks (`chips`), which no run reaches.
"""

import contextlib
import math
import re
import time
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from bitnet_jax import chips, costs, data, loss, presets, shapes, sharding, train
from bitnet_jax.chips import Topology
from bitnet_jax.config import Config, Replicate
from bitnet_jax.costs import Traffic
from bitnet_jax.program import Program

USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
# Times the memory of `estimate` that XLA:TPU of jax 0.10.2, on a CPU machine, took for a chunk:
# 1.1 for 125m on v5e:1x1, 1.9 for make plan PRESET=2b TOPOLOGY=v6e:2x2 SET=data.batch_size=4.
UNDERESTIMATED = 1.9
PER_LOGIT = 10  # bytes while it is made: float32, its gradient in float32 and in bfloat16


# --------------------------------------------------------------------------------- by arithmetic


def step_flops(program: Program) -> int:
    """FLOPs of the products of one training step of all replicates.

    Layers are alike: counted are models of one and of two.
    """
    cfg = program.cfg
    hyper = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), program.hyper)
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = data.Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32))

    def count(n_layers):
        small = replace(cfg, model=replace(cfg.model, n_layers=n_layers))

        def step(hyper, seed, batch, unigram_V):
            state = train.init_state(small, hyper, seed, unigram_V)
            return train.train_step(small, program.seams, state, hyper, batch, unigram_V)

        seed, unigram_V = jax.ShapeDtypeStruct((), jnp.uint32), program.evals.unigram_V
        with jax.sharding.use_abstract_mesh(_abstract(program.mesh)):
            traced = jax.make_jaxpr(step)(hyper, seed, batch, unigram_V)
        return costs.flops(costs.needed(traced))

    first = count(1)
    return len(program.replicates) * (first + (cfg.model.n_layers - 1) * (count(2) - first))


def _abstract(mesh) -> AbstractMesh:
    return mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; state and data are exact, what a step and an evaluation need is not."""

    weights: int
    moments: int
    data: int
    gradient: float
    gathered: float
    activations: float
    logits: float
    evaluation: float

    @property
    def used(self) -> float:
        """In all, at the fuller of two moments: in a step, or in an evaluation."""
        step = self.gradient + self.activations + self.logits
        held = self.weights + self.moments + self.data + self.gathered
        return held + max(step, self.evaluation)


def estimate(program: Program, state) -> Memory:
    """Memory by the shapes of a model.

    `state` has its shapes and places. Of each layer the backward pass keeps about
    12 D + 6 F + 2 H L numbers per position in the type of the model, with `model.remat` only its
    input. XLA:TPU took 2.44 GiB for a step where this says 2.42 (125m, one layer, v5e:2x4).
    """
    cfg, (_, n_data) = program.cfg, program.mesh.axis_sizes
    model, local = cfg.model, len(program.replicates) // program.mesh.shape["replicate"]
    rows = cfg.data.batch_size // cfg.data.accumulate * cfg.data.seq_len // n_data
    layer = 12 * model.d_model + 6 * model.d_ff + 2 * model.n_heads * cfg.data.seq_len
    kept = model.n_layers * model.d_model + layer if model.remat else model.n_layers * layer
    with jax.sharding.use_abstract_mesh(_abstract(program.mesh)):
        _, width = loss._blocks(rows * n_data, model.vocab_size)
    item, weights = jnp.dtype(model.dtype).itemsize, shapes.size_on_device(state.params)
    return Memory(
        weights,
        shapes.size_on_device(state.opt_state),
        shapes.size_on_device((program.evals, shapes.batches_of(program))),
        weights,
        local * _gathered(state.params) * item,
        local * rows * kept * item,
        local * rows * PER_LOGIT * width,
        local * _evaluated(program) * PER_LOGIT * model.vocab_size,
    )


def _gathered(params) -> int:
    """Elements of what a device gathers at once: embedding, head and the matrices of one block."""
    n_elements = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        first = path[0].key
        if "data" in leaf.sharding.spec and (first == "block_0" or not first.startswith("block_")):
            n_elements += leaf.size // leaf.shape[0]
    return n_elements


def _evaluated(program: Program) -> float:
    """Positions whose logits a device makes at once in an evaluation (`train.pieces`)."""
    cfg, local = program.cfg, len(program.replicates) // program.mesh.shape["replicate"]
    with jax.sharding.use_abstract_mesh(_abstract(program.mesh)):
        blocks = jax.eval_shape(
            lambda x: train.pieces(x, local, cfg.model.vocab_size), program.evals.large.inputs
        )
    _, n_windows, length = blocks.shape
    n_data = program.mesh.shape["data"]
    return n_windows * length / (n_data if n_windows % n_data == 0 else 1)


def expected_traffic(program: Program) -> dict[str, Traffic]:
    """Collectives of a step by the rules of `sharding`.

    Split parameters are gathered for the forward and for the backward pass in the type of the model
    and their gradients, float32, reduced and scattered; gradients of the others are reduced.
    """
    n_data, traffic = program.mesh.shape["data"], {}
    if n_data == 1:
        return traffic
    item, parts = jnp.dtype(program.cfg.model.dtype).itemsize, program.cfg.data.accumulate
    n_rep = len(program.replicates)

    def add(kind, size, count):
        new = costs.collective(kind, size, n_data, count)
        traffic[kind] = traffic[kind] + new if kind in traffic else new

    for leaf in jax.tree.leaves(program.abstract_state.params):
        local = leaf.size // n_rep * (n_rep // program.mesh.shape["replicate"])
        if "data" in leaf.sharding.spec:
            add("all-gather", item * local, 2 * parts)
            add("reduce-scatter", 4 * local, parts)
        else:
            add("all-reduce", 4 * local, parts)
    return traffic


# ------------------------------------------------------------------------------- by the compiler


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of the two programs of a run, in bytes per device."""

    step: float  # temporary, of a chunk of steps and its evaluation
    evaluation: float  # temporary, of the large block
    used: float  # in all, of the program that needs more; more than there is: it does not compile
    traffic: dict[str, Traffic] | None  # of a step, with its share of the evaluation
    seconds: float  # that it took to compile


def compile_program(program: Program) -> Compiled:
    """Compile the chunk and the large evaluation of a run for the devices of its mesh."""
    began, everywhere = time.monotonic(), sharding.replicated(program.mesh)
    large = jax.jit(train.make_large_eval(program.cfg, program.seams), out_shardings=everywhere)
    arguments = program.abstract_state, program.hyper, program.evals
    try:
        with _settings(program):
            evaluation = large.lower(*arguments).compile().memory_analysis()
        chunk = compile_chunk(program)
    except jax.errors.JaxRuntimeError as error:
        if not (used := USED.search(str(error))):
            raise
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
        needed = float(used[1]) * unit[used[2]]
        return Compiled(math.nan, math.nan, needed, None, time.monotonic() - began)
    step = chunk.memory_analysis()
    n = jax.tree.leaves(shapes.batches_of(program))[0].shape[1]
    return Compiled(
        step.temp_size_in_bytes,
        evaluation.temp_size_in_bytes,
        max(_used(step), _used(evaluation)),
        {kind: traffic.over(n) for kind, traffic in costs.traffic(chunk.as_text()).items()},
        time.monotonic() - began,
    )


def compile_chunk(program: Program):
    """The compiled chunk of steps that training dispatches, for the devices of the mesh."""
    arguments = program.abstract_state, program.hyper, program.evals, None
    with _settings(program):
        return program.jitted_chunk.lower(*arguments, shapes.batches_of(program)).compile()


@contextlib.contextmanager
def _settings(program: Program):
    """Devices and precision of products, as in `run.run`."""
    precision = "float32" if program.cfg.model.dtype == "float32" else "default"
    with jax.set_mesh(program.mesh), jax.default_matmul_precision(precision):
        yield


def _used(memory) -> int:
    in_all = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return in_all + memory.temp_size_in_bytes - memory.alias_size_in_bytes


# --------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """What a run needs on a topology."""

    topology: Topology
    program: Program
    memory: Memory  # by arithmetic
    compiled: Compiled | None

    @property
    def used(self) -> float:
        """Bytes on each device."""
        return self.compiled.used if self.compiled else self.memory.used

    @cached_property
    def flops(self) -> int:
        """Of a step."""
        return step_flops(self.program)

    @property
    def fits(self) -> bool:
        return self.used <= self.topology.chip.memory

    @property
    def certain(self) -> bool:
        """Whether what a compiler would take more than the arithmetic says fits, too."""
        margin = 1 if self.compiled else UNDERESTIMATED
        return margin * self.used <= self.topology.chip.memory

    @cached_property
    def traffic(self) -> dict[str, Traffic]:
        """Collectives of a step by kind; the compiler's where it got so far."""
        traffic = self.compiled.traffic if self.compiled else None
        return expected_traffic(self.program) if traffic is None else traffic

    @cached_property
    def least_seconds(self) -> dict[str, float]:
        """What a step takes at least, were each of these the only one; empty: peaks not known.

        Memory: state and gradient are read and written once, weights in the type of the model read
        for both passes, activations and logits written and read.
        """
        chip, model, memory = self.topology.chip, self.program.cfg.model, self.memory
        if not chip.flops:
            return {}
        peak = chip.flops * (chip.float32 if model.dtype == "float32" else 1)
        whole = (
            shapes.size_of(self.program.abstract_state.params)
            // self.program.mesh.shape["replicate"]
        )
        whole = whole // 4 * jnp.dtype(model.dtype).itemsize
        parts = self.program.cfg.data.accumulate
        touched = 2 * (memory.weights + memory.moments + memory.gradient)
        touched += parts * (2 * whole + 2 * memory.activations + 2 * memory.logits)
        return {
            "products": self.flops / self.program.mesh.size / peak,
            "memory": touched / chip.memory_rate,
            "links": sum(t.sent for t in self.traffic.values()) / chip.link_rate,
        }

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return shapes.size_of(self.program.abstract_state)


def make(cfg: Config, replicates: list[Replicate], topology: Topology, compiling: bool) -> Plan:
    """Plan a run; with `compiling`, by the compiler of the devices."""
    n_rep, chip = len(replicates), topology.chip
    mesh = shapes.abstract_mesh(cfg, n_rep, topology.size)
    if compiling:
        mesh = sharding.make_mesh(
            n_rep, mesh.size // mesh.shape["replicate"], chips.devices_of(topology)
        )
    program = shapes.abstract_program(cfg, replicates, mesh, chip.platform)
    compiled = compile_program(program) if compiling else None
    memory = estimate(program, program.abstract_state)
    return Plan(topology, program, memory, compiled)


def remedies(plan: Plan) -> list[str]:
    """Single changes, as `--set` takes them, after which a run fits; all of them if none is enough.

    By arithmetic, which is scaled to what the compiler said of the run as it is.
    """
    cfg, levers = plan.program.cfg, _levers(plan.program.cfg)
    single = [_first_that_fits(plan, [[change] for change in lever]) for lever in levers]
    options = [" ".join(changes) for changes in single if changes]
    if len(plan.program.replicates) > 1 and len(cfg.run.recipes) > 1:
        one_fits = _fits(plan, [], replicates=plan.program.replicates[:1])
        options += [f"run.recipes={cfg.run.recipes[0]}"] if one_fits else []
    bigger = [t for t in chips.larger(plan.topology) if _fits(plan, [], topology=t)]
    options += [f"--topology {bigger[0].text}"] if bigger else []
    if options:
        return options
    together = [lever[-1] for lever in levers if not lever[-1].startswith("data.batch_size")]
    return [" ".join(together)] if together and _fits(plan, together) else []


def _levers(cfg: Config) -> list[list[str]]:
    """Changes of one kind each, mildest first."""
    sizes = [cfg.data.batch_size >> n for n in range(1, 20)]
    levers = []
    if not cfg.model.remat:
        levers.append(["model.remat=true"])
    parts = [cfg.data.accumulate << n for n in range(1, 20)]
    levers.append([f"data.accumulate={n}" for n in parts if cfg.data.batch_size % n == 0])
    if cfg.model.dtype == "float32":
        levers.append(["model.dtype=bfloat16"])
    levers.append([f"data.batch_size={n}" for n in sizes if n and n % cfg.data.accumulate == 0])
    return [lever for lever in levers if lever]


def _first_that_fits(plan: Plan, changes: list[list[str]]) -> list[str] | None:
    return next((change for change in changes if _fits(plan, change)), None)


def _fits(plan: Plan, changes: list[str], replicates=None, topology=None) -> bool:
    """Whether the run fits after `--set` changes, or with other replicates or devices."""
    cfg, _ = presets.override(plan.program.cfg, changes)
    replicates, topology = replicates or plan.program.replicates, topology or plan.topology
    mesh = shapes.abstract_mesh(cfg, len(replicates), topology.size)
    program = shapes.abstract_program(cfg, replicates, mesh, topology.chip.platform)
    state = jax.tree.map(  # changes leave the shapes of a replicate
        lambda x: jax.ShapeDtypeStruct((len(replicates), *x.shape[1:]), x.dtype),
        plan.program.abstract_state,
    )
    scale = plan.used / plan.memory.used
    return scale * estimate(program, shapes.placed(state, mesh)).used <= topology.chip.memory
