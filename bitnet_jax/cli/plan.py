"""Say what a run will need on devices that need not be here.

Memory per device and whether it fits, what travels between devices, FLOPs, a bound on the time of a
step, checkpoints, and which fields to change when it does not fit. Needs neither text nor tokenizer
nor network. For a TPU, where libtpu is installed (`make plan`), by its compiler, which takes
minutes; else by arithmetic, in seconds.

Topologies: v5e, v6e and v5p with a slice (v5e:1x1 to v5e:16x16, v5p:2x2x1 to v5p:8x8x16); gpu (H100
SXM), h200 and cpu with a number of devices (gpu:8).

    bitnet plan --preset 125m --topology v5e:2x4
    bitnet plan --preset 700m --topology gpu:16 --set data.batch_size=32
"""

import math

from bitnet_jax.cli import flags

LABEL = 22  # columns of a line's label
MIB, GIB = 1 << 20, 1 << 30


def main(argv: list[str]) -> int:
    parser = flags.Parser("bitnet plan", __doc__)
    flags.add_configuration(parser)
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="v5e:4x4, "
        "v6e:4x4, v5p:2x2x2, gpu:8, h200:8, cpu:1")  # fmt: skip
    parser.add_argument("--estimate", action="store_true", help="by arithmetic, in any case")
    args = parser.parse_args(argv)
    request = flags.resolve(args, "plan")

    import jax

    from bitnet_jax import chips, plan

    topology = chips.parse_topology(args.topology)
    jax.config.update("jax_platforms", "cpu")  # whatever devices are here
    compiling = chips.can_compile(topology) and not args.estimate
    planned = plan.make(request.cfg, request.replicates, topology, compiling)
    name = args.config or f"preset {request.preset}"
    print("\n".join([f"{name} on {topology.text}: {how(planned)}", "", *terminal_lines(planned)]))
    return 0


def how(plan) -> str:
    """Where the numbers are from."""
    if plan.compiled is None:
        return "estimate, by arithmetic"
    return f"compiled for it in {plan.compiled.seconds:.0f} s"


def terminal_lines(plan) -> list[str]:
    """What a plan says, in 80 columns."""
    text_lines = [*_program(plan), "", *_memory(plan)]
    if not plan.fits:
        text_lines += ["", *_remedies(plan)]
    return [
        *text_lines,
        "",
        *_traffic(plan),
        "",
        *_time(plan),
        "",
        *checkpoints(plan.program.cfg.run, plan.checkpoint),
    ]


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _program(plan) -> list[str]:
    import jax

    from bitnet_jax import sharding

    program, topology = plan.program, plan.topology
    n_rep, n_data = program.mesh.axis_sizes
    n_params = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    n_params //= len(program.replicates)
    data, many = program.cfg.data, len(program.replicates)
    each = f"{n_rep} for replicates x {n_data} for the batch"
    text_lines = [
        _line("parameters", f"{n_params:,}" + (f", {many} replicates" if many > 1 else "")),
        _line("batch", f"{data.batch_size} x {data.seq_len:,} tokens"),
        _line("devices", f"{topology.size} x {topology.chip.name}: {each}"),
    ]
    idle = sharding.idle_note(many, data.batch_size, data.accumulate, topology.size)
    return [*text_lines, _line("", idle)] if idle else text_lines


def _memory(plan) -> list[str]:
    """Memory by part; what the compiler does not tell apart stands beside its own number."""
    from bitnet_jax.plan import UNDERESTIMATED

    memory, compiled, whole = plan.memory, plan.compiled, plan.topology.chip.memory
    about = "about " if compiled else ""
    known = compiled is not None and not math.isnan(compiled.step)
    rows = [
        ("weights", memory.weights, "float32"),
        ("moments", memory.moments, "of Adam"),
        ("data", memory.data, "batches and held-out text"),
    ]
    if known:
        rows.append(("step", compiled.step, "of it, by arithmetic:"))
    rows += [
        ("  gradient", memory.gradient, about + "float32"),
        ("  gathered", memory.gathered, about + "embedding, head, weights of a block"),
        ("  activations", memory.activations, about + "what the backward pass reads"),
        ("  logits", memory.logits, about + "and their gradient"),
        ("evaluation", compiled.evaluation if known else memory.evaluation, "not at the same time"),
    ]
    verdict = "fits" if plan.fits else "does not fit"
    if plan.fits and not plan.certain:
        verdict = f"may fit (compiled: up to {UNDERESTIMATED} times)"
    unit, name = (GIB, "GiB") if plan.used >= GIB else (MIB, "MiB")
    return [
        _line("memory per device", f"{name:>10}"),
        *(_line(f"  {part}", f"{_in(size, unit)}  {text.strip()}") for part, size, text in rows),
        _line("  in all", f"{_in(plan.used, unit)}  of {whole / unit:,.2f}: {verdict}"),
    ]


def _in(size: float, unit: int) -> str:
    return f"{size / unit:10,.3f}"


def _remedies(plan) -> list[str]:
    from bitnet_jax.plan import remedies

    fixes = remedies(plan)
    if not fixes:
        return ["No single change makes it fit, by arithmetic: a smaller model, or other chips."]
    return ["It would fit, by arithmetic, with one of", *(f"  {_as_flag(text)}" for text in fixes)]


def _as_flag(change: str) -> str:
    return change if change.startswith("--") else f"--set {change.replace(' ', ' --set ')}"


def _mib(size: float) -> str:
    return f"{size / MIB:10,.1f}"


def _traffic(plan) -> list[str]:
    traffic = sorted(plan.traffic.items(), key=lambda item: -item[1].sent)
    if not traffic:
        return [_line("collectives", "none")]
    counted = plan.compiled is not None and plan.compiled.traffic is not None
    by = "" if counted else "by the rules of sharding"
    head = _line("collectives per step", f"{'count':>10}{'MiB':>10}{'sent':>10}  {by}".rstrip())
    return [head, *(
        _line(f"  {kind}", f"{t.count:10,.1f}{_mib(t.bytes)}{_mib(t.sent)}") for kind, t in traffic
    )]  # fmt: skip


def _time(plan) -> list[str]:
    flops = [_line("FLOPs per step", f"{plan.flops:.4g}, products alone")]
    bounds = plan.least_seconds
    if not bounds:
        return [
            *flops,
            _line("time per step", "not told: no published peak of this device"),
        ]
    cfg, least = plan.program.cfg, max(bounds.values())
    tokens = cfg.data.batch_size * cfg.data.seq_len * len(plan.program.replicates) / least
    hours = least * cfg.run.steps / 3600
    return [
        *flops,
        _line("time per step", f"above {_seconds(least)}: a bound, which no run reaches"),
        *(
            _line(f"  {name}", f"{_seconds(value)} at its peak")
            for name, value in bounds.items()
            if value
        ),
        _line("tokens per second", f"below {tokens:,.0f}"),
        _line("whole run", f"above {hours:,.2f} hours, {cfg.run.steps:,} steps"),
    ]


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms"


def checkpoints(run, size: int) -> list[str]:
    """Bytes of a checkpoint and of all that a run keeps."""
    from bitnet_jax.checkpoint import steps_at_end

    n = len(steps_at_end(run))
    return [
        _line("a checkpoint", f"{size:,} bytes"),
        _line("all at the end", f"{n * size:,} bytes: {n} checkpoints (run.keep={run.keep})"),
    ]
