"""How fast is a training step, what does the rest of the loop cost, and what does torch need?

One process measures in turn, round after round, so that a slow minute hits everything alike: the
chunk of 20 steps that training dispatches, its evaluation, the host code around it, the same steps
one dispatch each, two replicates at once, and, where torch is installed, transformers' BitNet
(AutoBitLinear, online quantisation) on the same batches, weights and schedule. The last runs in
float32 with layout b158, the only one that transformers can express. All train recipe b158:
recipes are data and cost nothing.

Prints a table and appends a row per measurement to experiments/results/bench_train.jsonl.
Expected on a CPU: torch takes at least 1.5 times as long, evaluation 5 % of the time or less, host
code less than 5 %. On two cores `quick` takes 3 minutes, `report` 6.

    python -m experiments.bench_train
    python -m experiments.bench_train --preset report --set data.corpus=text:books/*.txt
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import jax
import numpy as np

from bitnet_jax import config, data, log, optim, run, train
from bitnet_jax import program as programs
from experiments import common

RESULTS = Path(__file__).parent / "results" / "bench_train.jsonl"
K = 20  # steps in a chunk
STEPS = 2000  # length of the schedule; the measurements take fewer
LOOP_CHUNKS = 2  # chunks in a window of the whole loop
ROUNDS, QUICK_ROUNDS = 5, 9  # the latter where a chunk takes less than a second
LIMIT_S = 120  # a longer chunk is not measured
CORE_FLOPS = 1.5e11  # float32, more than a core reaches: for a lower bound of the time


class Skipped(Exception):
    """A measurement that does not fit this machine, and why."""


@dataclasses.dataclass
class Trainer:
    """A program and its state, which every window moves on."""

    program: programs.Program
    state: train.TrainState
    step: int = 0

    def window(self, move, batches) -> float:
        """Seconds that `move(state, batches) -> state` takes, until the new parameters exist."""
        with jax.set_mesh(self.program.mesh):
            start = time.perf_counter()
            self.state = move(self.state, batches)
            jax.block_until_ready(self.state.params)
            return time.perf_counter() - start

    def batches(self, chunks: int) -> list:
        """Batches of the next chunks."""
        starts = [self.step + K * i for i in range(chunks)]
        self.step += K * chunks
        return [jax.block_until_ready(self.program.batches(n, n + K)) for n in starts]

    def chunks(self, count: int) -> float:
        """Seconds of chunks whose batches lie ready."""

        def move(state, batches):
            for batch in batches:
                state, *_ = self.program.train_chunk(state, batch)
            return state

        return self.window(move, self.batches(count))

    def evaluation(self) -> float:
        """Seconds of one evaluation."""
        with jax.set_mesh(self.program.mesh):
            start = time.perf_counter()
            jax.block_until_ready(self.program.evaluate(self.state))
            return time.perf_counter() - start

    def loop(self, metrics: log.Metrics, count: int) -> float:
        """Seconds of chunks with the host's work around them, as `run.run` does it."""
        make_rows = run._row_maker(self.program)
        ends = [self.step + K * (i + 1) for i in range(count)]
        self.step = ends[-1]

        def emit(step, trained, evaluated):
            metrics.write(make_rows(step, *jax.device_get((trained, evaluated))))

        def move(state, prefetch):
            pending = None
            batches = prefetch.submit(self.program.batches, ends[0] - K, ends[0])
            for end in ends:
                state, *numbers = self.program.train_chunk(state, batches.result())
                if end < ends[-1]:
                    batches = prefetch.submit(self.program.batches, end, end + K)
                if pending:
                    emit(*pending)
                pending = (end, *numbers)
            emit(*pending)
            return state

        with ThreadPoolExecutor(max_workers=1) as prefetch:
            return self.window(move, prefetch)


def make_trainer(cfg: config.Config, replicates: list[config.Replicate]) -> Trainer:
    """Build the program and its first state."""
    program = programs.build(cfg, replicates)
    with jax.set_mesh(program.mesh):
        return Trainer(program, program.init())


def make_singles(program: programs.Program):
    """Return move(state, batches) that dispatches every step of a chunk on its own."""
    end_of_text = program.tokens.tokenizer.end_of_text

    def one(state, hyper, tokens_N, batch):
        cut = tokens_N is None
        windows_BL = batch if cut else data.gather(tokens_N, batch, program.cfg.data.seq_len)
        return train.train_step(program.cfg, state, hyper, windows_BL, end_of_text)

    compiled = jax.jit(
        jax.vmap(one, in_axes=(0, 0, None, 0)),
        donate_argnums=0,
        out_shardings=(program.state_sharding, None),
    )

    def move(state, batches):
        for batch in batches:
            state, _ = compiled(state, program.hyper, program.train_N, batch)
        return state

    return move


def compile_chunk(trainer: Trainer) -> dict:
    """Compile the chunk that training dispatches; its seconds, and the bytes it needs in MB."""
    program = trainer.program
    abstract = jax.eval_shape(lambda: program.batches(0, K))
    batches = jax.ShapeDtypeStruct(
        abstract.shape, abstract.dtype, sharding=program.batches(0, 1).sharding
    )
    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        lowered = program.lower_chunk(batches)
        middle = time.perf_counter()
        memory = lowered.compile().memory_analysis()
        end = time.perf_counter()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return {
        "lower_s": round(middle - start, 2),
        "compile_s": round(end - middle, 2),
        "memory_mb": round(needed / 1e6, 1),
    }
