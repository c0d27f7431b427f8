"""How long does a training step take, what does a run add to it, and how long does torch take?

One process measures in turns: the chunk of 20 steps that training dispatches, the small evaluation
at its end, the large block, the host's work for an evaluation, the whole loop, the same steps with
a dispatch each, the chunk by fake-quantised products, two replicates at once, and, where torch is
installed, transformers' BitNet from the same weights on the same batches, in layout b158 and the
precision of the preset: float32, or bfloat16 under autocast (`--compiled`: also through
torch.compile). Everything trains recipe `published`; steps and evaluations of the preset only say
what a whole run spends on what.

`--brief` leaves out all of ours but the chunk, its evaluation and the bound. Prints a table, and
without `--brief` the shares of a run; appends a row per measurement to
experiments/results/bench_train.jsonl. Beside a step stand its bound (bench_bounds.py), the share of
products and the ten largest costs, from a trace. Aims on a CPU: a step at most 1.75 times its
bound; torch takes at least twice as long in the same precision; small evaluations, one in 20 steps,
at most 3 % of the time at `quick` and 5 % at `report`; host code under 1 ms per evaluation.

    python -m experiments.bench_train
    python -m experiments.bench_train --preset report --set data.corpus=text:books/*.txt
    python -m experiments.bench_train --brief --compiled --set model.dtype=bfloat16
"""

import contextlib
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import data, presets, products, run
from bitnet_jax import program as programs
from bitnet_jax.cli import flags
from bitnet_jax.config import Config, RunConfig
from bitnet_jax.recorder import Recorder
from experiments import bench, bench_bounds, bench_peer
from experiments.bench import Skipped, show, spread
from experiments.bench_trainer import K, Trainer, make_single_steps, start

STEPS = 100_000  # length of the schedule, more than is measured
LOOP_CHUNKS = 2  # chunks in a window of the whole loop
LIMIT_S = 120  # a chunk that takes longer is not measured
CORE_FLOPS = 1.5e12  # per second, more than a core reaches: gives a lower bound of the time
LABELS = {
    "train_chunk": "a step, in chunks of 20",
    "evaluation": "the small evaluation; share of its chunk",
    "large_block": "the large block",
    "host": "rows, verdict and log of an evaluation",
    "host_code": "a step of the whole loop; share of host code",
    "single_steps": "a step, one dispatch each; ratio to chunks without evaluation",
    "plain_products": "a step by fake-quantised products; ratio to what is used",
    "two_replicates": "a step of one of two replicates; ratio to one alone",
    "torch": "a step of transformers on torch; ratio to ours without evaluation",
    "torchao": "the same with torchao's int8 products",
    "torch_compiled": "transformers through torch.compile; ratio to ours",
    "torchao_compiled": "torchao's through torch.compile; ratio to ours",
}
STEP_ROWS = ("train_chunk", "host_code", "single_steps", "plain_products", "two_replicates")
STEP_ROWS += bench_peer.MOVES


# What fits


def check_time(n_params: int, cfg: Config) -> None:
    """Raise Skipped if even ideal code would take too long for a chunk here."""
    seconds = 6 * n_params * K * cfg.data.batch_size * cfg.data.seq_len
    seconds /= CORE_FLOPS * len(os.sched_getaffinity(0))
    if jax.default_backend() == "cpu" and seconds > LIMIT_S:
        raise Skipped(f"a chunk of {K} steps takes more than {seconds:.0f} s on these cores")


def check_memory(memory_mb: float, n_params: int) -> None:
    """Raise Skipped if the program and four more copies of the parameters do not fit."""
    needed, free = memory_mb * 1e6 + 16 * n_params, bench.free_memory()
    if needed > free:
        raise Skipped(f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


# Measurements


def check_chunk(trainer: Trainer, n_params: int) -> dict[str, float]:
    """Raise Skipped if a chunk does not fit; the costs of its program, and the peak of memory."""
    check_memory(trainer.costs["memory_mb"], n_params)
    if (seconds := trainer.chunks(1)) > LIMIT_S:
        raise Skipped(f"a chunk of {K} steps takes {seconds:.0f} s")
    return trainer.costs | bench.peak_memory()


def measure_step(trainer: Trainer, most: int, rows: bench.Rows) -> None:
    """The chunk, its evaluation and the bound, and nothing else of ours."""
    n_params = rows.fixed["params"]
    compiled = check_chunk(trainer, n_params)
    moves = {"chunk": lambda: trainer.chunks(1), "evaluation": trainer.evaluation}
    taken = bench.rounds(moves | bounds_of(trainer), most)
    chunk, small = taken["chunk"], taken["evaluation"]
    add(rows, "train_chunk", chunk / K, **compiled, **cost_of_a_step(trainer, taken, n_params))
    add(rows, "evaluation", small, **spread("share", small / chunk))


def measure_ours(trainer: Trainer, two: Trainer, most: int, rows: bench.Rows, planned: RunConfig):
    """The chunk, and what stands around it; `planned` is the run that shares are told of."""
    n_params = rows.fixed["params"]
    compiled = check_chunk(trainer, n_params)
    check_memory(two.costs["memory_mb"], 2 * n_params)
    taken = take_turns(trainer, two, most)
    chunk, small, large = taken["chunk"], taken["evaluation"], taken["large"]
    steps = chunk - small
    compiled |= cost_of_a_step(trainer, taken, n_params)
    seconds = {"step": steps / K, "evaluation": small, "large_block": large, "host": taken["host"]}
    shares = run_shares(planned, {name: float(np.median(x)) for name, x in seconds.items()})
    add(rows, "train_chunk", chunk / K, of_run=shares["step"], **compiled)
    add(rows, "evaluation", small, of_run=shares["evaluation"], **spread("share", small / chunk))
    add(rows, "large_block", large, of_run=shares["large_block"])
    add(rows, "host", taken["host"], of_run=shares["host"])
    share = 1 - taken["alone"] / taken["loop"]
    add(rows, "host_code", taken["loop"] / (K * LOOP_CHUNKS), **spread("share", share))
    add(rows, "single_steps", taken["singles"] / K, **spread("ratio", taken["singles"] / steps))
    add(rows, "plain_products", taken["plain"] / K, **spread("ratio", taken["plain"] / chunk))
    ratio = spread("ratio", taken["two"] / (2 * chunk))
    add(rows, "two_replicates", taken["two"] / (2 * K), R=2, **ratio, **two.costs)


def bounds_of(trainer: Trainer) -> dict:
    """Ways to time the parts of the bound of its step."""
    shape = trainer.program.cfg.data
    return bench_bounds.make_moves(trainer.program.cfg.model, shape.batch_size * shape.seq_len)


def cost_of_a_step(trainer: Trainer, taken: dict, n_params: int) -> dict:
    """The bound of a step, how many times that it takes, and what it spends its time on."""
    seconds = (taken["chunk"] - taken["evaluation"]) / K
    data_ = trainer.program.cfg.data
    n_rows = data_.batch_size * data_.seq_len
    limit = bench_bounds.bound(trainer.program.cfg.model, n_rows, n_params, taken)
    share, largest = bench_bounds.product_share(trainer.chunk, lambda: trainer.chunks(1))
    times = spread("of_bound", 1000 * seconds / limit["bound_ms"])
    used = trainer.program.seams.products
    return limit | times | {"products": used, "product_share": round(share, 3), "costs": largest}


def take_turns(trainer: Trainer, two: Trainer, most: int) -> dict[str, np.ndarray]:
    """Seconds of everything that is ours, round by round."""
    single_steps = make_single_steps(trainer.program)
    seams = replace(trainer.program.seams, products=products.PLAIN)
    plain = (
        trainer if seams == trainer.program.seams else start(replace(trainer.program, seams=seams))
    )

    def singles():
        leaves, tree = jax.tree.flatten(trainer.batches(1)[0])
        steps = [jax.tree.unflatten(tree, [x[:, k] for x in leaves]) for k in range(K)]
        return trainer.window(single_steps, steps)

    with contextlib.ExitStack() as stack:
        recorders = []
        for _ in range(2):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            recorders.append(Recorder(trainer.program, Path(folder), 0))
            stack.callback(recorders[-1].close)
        moves = {
            "chunk": lambda: trainer.chunks(1),
            "evaluation": trainer.evaluation,
            "large": trainer.large_block,
            "singles": singles,
            "plain": lambda: plain.chunks(1),
            "two": lambda: two.chunks(1),
            "alone": lambda: trainer.chunks(LOOP_CHUNKS),
            "loop": lambda: trainer.loop(LOOP_CHUNKS, recorders[0]),
            "host": lambda: trainer.host(recorders[1]),
        }
        return bench.rounds(moves | bounds_of(trainer), most)


def measure_peers(ours: Trainer, names: Sequence[str], most: int, rows: bench.Rows) -> None:
    """Our step beside those of transformers on torch, and the losses that they reach."""
    program, losses = ours.program, {}
    params = jax.tree.map(lambda x: x[0], jax.device_get(ours.state.params))

    def beside(name):
        """Seconds of the batches that our chunk has just taken."""
        peer = bench_peer.make_trainer(program, params, name)

        def move():
            first = ours.step - K
            seed, n = program.replicates[0].seed, len(program.windows)
            ids_KB = data.window_ids(program.cfg.data, n, seed, first, ours.step)
            batch_KBL = program.windows.cut(ids_KB)
            begun = time.perf_counter()
            losses[name] = peer(batch_KBL, first)
            return time.perf_counter() - begun

        return move

    peers = {name: beside(name) for name in names}
    moves = {"ours": lambda: ours.chunks(1)} | peers | {"evaluation": ours.evaluation}
    taken = bench.rounds(moves, most)
    steps = taken["ours"] - taken["evaluation"]
    for name in names:
        add(
            rows,
            name,
            taken[name] / K,
            layout=program.cfg.model.layout,
            **spread("ratio", taken[name] / steps),
            **spread("ours_ms", 1000 * steps / K),
            **spread("ratio_with_evaluation", taken[name] / taken["ours"]),
            steps=ours.step,
            loss=round(losses[name], 4),
            ours_loss=round(float(ours.numbers[0]["train/loss"][0]), 4),
            peer_versions=bench_peer.versions(),
        )


def add(rows: bench.Rows, benchmark: str, seconds: np.ndarray, **values) -> None:
    """Append a row; `seconds` become milliseconds, and tokens per second of a step."""
    numbers = spread("ms", 1000 * seconds) | {"rounds": len(seconds)}
    if benchmark in STEP_ROWS:
        tokens = rows.fixed["B"] * rows.fixed["L"]
        numbers["tokens_per_second"] = round(tokens / float(np.median(seconds)))
    rows.add(benchmark, **numbers, **values)


def run_shares(planned: RunConfig, seconds: dict[str, float]) -> dict[str, float]:
    """What a run spends on steps, small evaluations, large blocks and host code; the sum is 1.

    `seconds` are those of one step, one small evaluation, one large block and the host's code for
    one evaluation. The start and every stop of the loop evaluate; the stage boundary and the end
    add a large block.
    """
    stops, step = 1, 0
    while step < planned.steps:
        step, stops = run.next_end(planned, step), stops + 1
    counts = {"step": planned.steps, "evaluation": stops, "large_block": 2, "host": stops}
    total = sum(n * seconds[name] for name, n in counts.items())
    return {name: float(f"{n * seconds[name] / total:.4g}") for name, n in counts.items()}


# What is told


def table(rows: list[dict]) -> str:
    """The rows in words, with [smallest, largest] over the rounds."""
    text_lines = [
        f"{LABELS[row['benchmark']]:62} {show(row, 'ms', 'ms'):28} "
        f"{show(row, 'ratio', 'x')}{show(row, 'share', '%', 100)}".rstrip()
        for row in rows
    ]
    for row in rows:
        if "compile_s" in row:
            text_lines.append(
                f"R={row['R']}: {row['tokens_per_second']:,} tokens/s per replicate; lowering "
                f"{row['lower_s']} s, compiling {row['compile_s']} s; {row['memory_mb']} MB"
            )
        if "bound_ms" in row:
            costs = ", ".join(f"{kind} {share:.1%}" for kind, share in row["costs"])
            text_lines.append(
                f"{show(row, 'of_bound', 'x the bound')} of {row['bound_ms']} ms: products "
                f"({row['gflop']} GFLOP) {row['bound_products_ms']}, Adam ({row['adam_mb']} MB at "
                f"{row['copy_gb_per_s']} GB/s) {row['bound_adam_ms']}; BitLinear: "
                f"{row['products']}\n"
                f"costs by a trace: {costs}"
            )
        if "ours_loss" in row:
            text_lines.append(
                f"{row['benchmark']}: layout {row['layout']}, {row['dtype']}; loss after "
                f"{row['steps']} steps {row['loss']:.3f}, ours {row['ours_loss']:.3f}; with our "
                f"evaluation {show(row, 'ratio_with_evaluation', 'x')}"
            )
    return "\n".join(text_lines)


def spending(rows: list[dict], preset: str, planned: RunConfig) -> str:
    """One line: what a run of the preset spends on what."""
    names = {"train_chunk": "steps", "evaluation": "small evaluations"}
    names |= {"large_block": "large blocks", "host": "host code"}
    shares = [f"{names[r['benchmark']]} {r['of_run']:.2%}" for r in rows if "of_run" in r]
    length = f"{planned.steps:,} steps, evaluated every {planned.eval_every}"
    return f"a run of {preset} ({length}): {', '.join(shares)}"


def parse(argv: list[str]) -> Namespace:
    """The command line; raises UserError for numbers that make no measurement."""
    parser = bench.parser("bench_train", __doc__, preset="quick", rounds=9)
    parser.add_argument(
        "--compiled", action="store_true", help="also torch's ways through torch.compile"
    )
    parser.add_argument(
        "--brief", action="store_true", help="of ours only the chunk, its evaluation and the bound"
    )
    args = parser.parse_args(argv)
    bench.check_counts(args, "rounds")
    return args


def measure(args: Namespace) -> None:
    """Measure, write and print what the command line asks for."""
    asked, hyper = bench.resolve(args)
    schedule = RunConfig(steps=STEPS, recipes=("published",), eval_every=K)
    cfg = replace(asked, run=schedule)
    replicates = presets.make_replicates(cfg, [args.seed, args.seed + 1], hyper)
    program = programs.build(cfg, replicates[:1])
    n_params = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    fixed = bench.shape_of(args.preset, program.cfg, n_params)
    fixed |= {"B": cfg.data.batch_size, "L": cfg.data.seq_len, "R": 1, "K": K}
    rows = bench.Rows("bench_train", fixed)
    print(rows.heading(), flush=True)
    try:
        check_time(n_params, cfg)
        trainer = start(program)
        if args.brief:
            measure_step(trainer, args.rounds, rows)
        else:
            two = start(programs.build(cfg, replicates))
            measure_ours(trainer, two, args.rounds, rows, asked.run)
            del two
        peer_cfg = replace(cfg, model=replace(cfg.model, layout="b158"))
        if reason := bench_peer.why_none(peer_cfg.model):
            raise Skipped(f"torch: {reason}")
        check_memory(2 * rows.rows[0]["memory_mb"], n_params)
        if peer_cfg == cfg:
            trainer.restart()
        else:
            trainer = start(programs.build(peer_cfg, replicates[:1]))
        measure_peers(trainer, bench_peer.ways(compiled=args.compiled), args.rounds, rows)
    except Skipped as reason:
        print(f"not measured: {reason}")
    if rows.rows:
        print(table(rows.rows))
        if not args.brief:
            print(spending(rows.rows, args.preset, asked.run))
        print(f"rows: {rows.path}")


def main() -> None:
    args = parse(sys.argv[1:])
    bench.prepare()
    measure(args)


if __name__ == "__main__":
    flags.guard(main)
