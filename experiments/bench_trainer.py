"""A program and its state, moved on in windows that are timed."""

import contextlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax

from bitnet_jax import train
from bitnet_jax.data import Batch
from bitnet_jax.program import Program
from bitnet_jax.recorder import Recorder
from bitnet_jax.train import TrainState
from experiments import bench

K = 20  # steps in a chunk


@contextlib.contextmanager
def settings(program: Program):
    """Devices and precision as `run.run` sets them."""
    with jax.set_mesh(program.mesh), bench.precision(program.cfg.model):
        yield


@dataclass
class Trainer:
    """A program and its state, which every window moves on."""

    program: Program
    state: TrainState
    chunk: Callable  # the compiled program of `Program.train_chunk`
    costs: dict[str, float]  # of `compile_chunk`
    step: int = 0
    numbers: tuple = ()  # of training and of the evaluation at the end of the last chunk

    def restart(self) -> None:
        """Go back to step 0."""
        with settings(self.program):
            self.state, self.step, self.numbers = self.program.init(), 0, ()

    def train_chunk(self, state, batches) -> tuple:
        """As `Program.train_chunk`."""
        fixed = self.program
        return self.chunk(state, fixed.hyper, fixed.evals, fixed.train_N, batches)

    def window(self, move, batches) -> float:
        """Seconds that `move(state, batches) -> state` takes, until the new parameters exist."""
        with settings(self.program):
            start = time.perf_counter()
            self.state = move(self.state, batches)
            jax.block_until_ready(self.state.params)
            return time.perf_counter() - start

    def batches(self, n_chunks: int) -> list:
        """Batches of the next chunks, ready on the device."""
        starts = [self.step + K * i for i in range(n_chunks)]
        self.step += K * n_chunks
        return [jax.block_until_ready(self.program.batches(n, n + K)) for n in starts]

    def chunks(self, n_chunks: int) -> float:
        """Seconds of chunks alone."""

        def move(state, batches):
            for batch in batches:
                state, *self.numbers = self.train_chunk(state, batch)
            return state

        return self.window(move, self.batches(n_chunks))

    def evaluation(self) -> float:
        """Seconds of a small evaluation alone."""
        with settings(self.program):
            return bench.timed(lambda: self.program.evaluate(self.state))

    def large_block(self) -> float:
        """Seconds of the large block."""
        with settings(self.program):
            return bench.timed(lambda: self.program.evaluate_large(self.state))

    def loop(self, n_chunks: int, recorder: Recorder) -> float:
        """Seconds of chunks with the host's work around them, as `run.run` does it."""
        ends = [self.step + K * i for i in range(1, n_chunks + 1)]
        self.step = ends[-1]

        def move(state, prefetch):
            batches = prefetch.submit(self.program.batches, ends[0] - K, ends[0])
            for end in ends:
                state, *numbers = self.train_chunk(state, batches.result())
                if end < ends[-1]:
                    batches = prefetch.submit(self.program.batches, end, end + K)
                recorder.expect(end, state, *numbers)
            recorder.flush(state)
            return state

        with quiet(), ThreadPoolExecutor(max_workers=1) as prefetch:
            return self.window(move, prefetch)

    def host(self, recorder: Recorder) -> float:
        """Seconds that the numbers of an evaluation take from the device's memory to the log."""
        numbers = jax.block_until_ready(self.numbers)
        step = recorder.progress.step + K
        with quiet():
            start = time.perf_counter()
            recorder.write(step, self.state, *jax.device_get(numbers))
            return time.perf_counter() - start


def quiet():
    """Without the lines of progress."""
    return contextlib.redirect_stderr(io.StringIO())


def start(program: Program) -> Trainer:
    """Start a program at step 0, with its chunk of K steps compiled."""
    with settings(program):
        state = program.init()
        return Trainer(program, state, *compile_chunk(program, state))


def compile_chunk(program: Program, state: TrainState) -> tuple[Callable, dict[str, float]]:
    """The chunk that training dispatches; how long it took to compile, and the memory it needs."""
    begun = time.perf_counter()
    lowered = program.jitted_chunk.lower(
        *(state, program.hyper, program.evals, program.train_N, program.batches(0, K))
    )
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    m = compiled.memory_analysis()
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    costs = {
        "lower_s": round(middle - begun, 2),
        "compile_s": round(end - middle, 2),
        "memory_mb": round((needed + m.temp_size_in_bytes) / 1e6, 1),
    }
    return compiled, costs


def make_single_steps(program: Program):
    """Return move(state, batches) -> state with a dispatch for every batch [R, B]."""

    def step(state, hyper, shared, batch):
        tokens_N, unigram_V = shared
        if not isinstance(batch, Batch):
            batch = program.windows.cut(batch, tokens_N)
        return train.train_step(program.cfg, program.seams, state, hyper, batch, unigram_V)[0]

    step_R = train.over_replicates(step, len(program.replicates))
    compiled = jax.jit(step_R, donate_argnums=0, out_shardings=program.state_sharding)
    shared = program.train_N, program.evals.unigram_V

    def move(state, batches):
        for batch in batches:
            state = compiled(state, program.hyper, shared, batch)
        return state

    return move
