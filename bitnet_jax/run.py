"""Train R replicates from start or resume to the page: start-up, loop, duties."""

import contextlib
import errno
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import (
    checkpoint,
    config,
    config_file,
    data,
    forecast,
    generate,
    hosts,
    log,
    page,
    restore,
    stopping,
)
from bitnet_jax.config import Config, Replicate
from bitnet_jax.fields import UserError
from bitnet_jax.program import Program, build
from bitnet_jax.recorder import Recorder
from bitnet_jax.train import STANDARD, Seams, TrainState
from bitnet_jax.workdir import check_same, describe, fork_command, occupied, write_config

N_PROMPTS = 16  # held-out beginnings that every replicate continues at the end
N_SHOWN = 3  # of them on the page
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR)


class Interrupted(Exception):
    """SIGINT or SIGTERM after the state was saved; exit status 128 + signal."""

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum, self.exit_status = signum, 128 + signum


def run(
    cfg: Config,
    replicates: list[Replicate],
    workdir: Path,
    *,
    resume: bool = False,
    seams: Seams = STANDARD,
    stop_when_collapsed: bool = False,
) -> dict:
    """Train all replicates and write the workdir; returns the content of summary.json.

    A replicate whose loss, gradient or update is not finite freezes, and its entry of the summary
    says where (`failed`); when all have, or with `stop_when_collapsed` all that go on have
    collapsed, the run ends early. A resumed run ends bitwise as one that was never stopped.
    Raises UserError for a mistake in the request, Interrupted after a signal.
    """
    log.check_tracker(cfg.run.tracker)
    try:
        with occupied(workdir, resume):
            program = build(cfg, replicates, seams)
            settings = config_file.to_json(program.cfg, replicates)
            check_same(workdir, settings, program.tokens.identity)
            path = workdir / "summary.json"
            if path.exists() and (summary := log.read_sealed(path)).get("finished"):
                place = f"{workdir}: finished before at step {summary.get('step')}"
                longer = {"run.steps": 2 * cfg.run.steps}
                print(f"{place}; to train longer: {fork_command(workdir, longer)}")
                restore.check_rows(workdir, summary["metrics"], "the run ended")
                if hosts.is_first():
                    page.write_page(workdir)
                return summary
            # float32 means float32: else a TPU multiplies it in bfloat16 and a GPU in TF32.
            precision = "float32" if program.cfg.model.dtype == "float32" else "default"
            with jax.set_mesh(program.mesh), jax.default_matmul_precision(precision):
                return _train(program, settings, workdir, stop_when_collapsed)
    except jax.errors.JaxRuntimeError as error:
        if hosts.several():
            raise hosts.Lost(f"another process has ended; --resume goes on: {error}") from error
        raise
    except OSError as error:
        if error.errno in UNWRITABLE:
            place = error.filename2 or workdir
            raise UserError(f"{place}: cannot write: {error.strerror}") from error
        raise


def _train(program: Program, settings: dict, workdir: Path, stop_when_collapsed: bool) -> dict:
    """Train from where the workdir stands to the end; returns the summary."""
    began, run = time.monotonic(), program.cfg.run
    state, start = restore.start_state(program, workdir)
    new = start == 0 and run.init is None
    warnings = (
        forecast.warnings(program.cfg, program.replicates, program.tokens.train_N) if new else []
    )
    described = describe(program, settings)
    with contextlib.ExitStack() as stack:
        manager = checkpoint.open_manager(workdir, run)
        stack.callback(manager.close)
        recorder = Recorder(program, workdir, start)
        stack.callback(recorder.close)

        def save(step, state):
            sealed = described | {"metrics": log.seal(workdir / "metrics.jsonl")}
            checkpoint.save(manager, step, state, sealed)

        with stopping.collected() as received:  # from the first file on, a signal saves
            write_config(program, described, workdir)
            for text in warnings:
                print(f"warning: {text}")
            state, step = _loop(
                program, state, start, recorder, save, received, stop_when_collapsed
            )
        try:
            with stopping.raised():
                summary = _finish(program, state, start, step, recorder, workdir, began)
        except KeyboardInterrupt as stop:
            text = f"stopped after step {step}, before the page was written, and saved"
            raise Interrupted(text, getattr(stop, "signum", signal.SIGINT)) from None
    return summary


def _finish(program, state, start: int, step: int, recorder, workdir: Path, began: float) -> dict:
    """Write summary.json, which is returned, and the page."""
    decoded = continuations(program, state)
    summary = {
        "step": step,
        "finished": step == program.cfg.run.steps or recorder.all_failed,
        "resumed_from": start,
        "wall_seconds": round(time.monotonic() - began, 1),
        "tokens_per_second": round(recorder.progress.tokens_per_second, 1),
        "metrics": log.seal(workdir / "metrics.jsonl"),
        "replicates": [a | b for a, b in zip(recorder.outcomes(), decoded, strict=True)],
    }
    if hosts.is_first():
        log.write_sealed(workdir / "summary.json", summary)
        page.write_page(workdir)
    hosts.wait("the page is written")
    return summary


def _loop(program, state, start: int, recorder, save, received, stop_when_collapsed) -> tuple:
    """Train chunk by chunk, save, and stop early where that is asked for: last state and step."""
    run, compiling = program.cfg.run, recorder.progress.compiling
    with ThreadPoolExecutor(max_workers=1) as prefetch:
        if not recorder.resumed:
            with compiling("the evaluation"):
                evaluated = hosts.fetch(program.evaluate(state))
            recorder.write(start, state, {}, evaluated)

        def fetch(step):
            if step < run.steps:
                return prefetch.submit(program.batches, step, next_end(run, step))

        def signalled():
            return hosts.greatest(received[0] if received else 0)

        recorder.progress.start()
        step, batches = start, fetch(start)
        while step < run.steps and not recorder.over(stop_when_collapsed):
            end = next_end(run, step)
            with compiling(f"{end - step} steps"):
                state, trained, evaluated = program.train_chunk(state, batches.result())
            if end in (run.boundary, run.steps):
                with compiling("the large block"):
                    evaluated = evaluated | program.evaluate_large(state)
            step, batches = end, fetch(end)
            recorder.expect(step, state, trained, evaluated)
            if signalled() or recorder.over(stop_when_collapsed) or is_save_step(run, step):
                recorder.flush(state)
                if not recorder.all_failed:
                    save(step, state)
                    if signum := signalled():
                        raise Interrupted(f"stopped at step {step} and saved", signum)
    return state, step


def next_end(run: config.RunConfig, step: int) -> int:
    """The next step after which the host looks: evaluation, checkpoint, boundary, end."""
    every = (run.eval_every, run.save_every, run.checkpoint_every)
    ends = [run.boundary, run.steps, *(step - step % n + n for n in every)]
    return min((end for end in ends if step < end <= run.steps), default=run.steps)


def is_save_step(run: config.RunConfig, step: int) -> bool:
    at = (run.boundary, run.steps)
    return step in at or step % run.save_every == 0 or step % run.checkpoint_every == 0


def continuations(program: Program, state: TrainState) -> list[dict]:
    """Continuations of held-out beginnings and how they degenerate, per replicate.

    `decode` holds `generate.degeneration` of the greedy, of the sampled and of the text's own ones.
    """
    tokenizer, held_out_N = program.tokens.tokenizer, program.tokens.validation_N
    n_prompt = program.cfg.data.seq_len // 2
    n_new, end = max(32, n_prompt), np.array(tokenizer.ends)  # loops need some length to be seen
    starts_B, lengths_B = data.beginnings(program.tokens, N_PROMPTS, n_prompt, n_new)
    windows_BL = starts_B[:, None] + np.arange(n_prompt + n_new)
    tokens_BL = held_out_N.take(windows_BL, mode="wrap").astype(np.int32)
    decode = partial(
        generate.generate,
        *(program.cfg, state.params, program.hyper, tokens_BL[:, :n_prompt]),
        *(lengths_B, n_new),
        seed=0,
        end_of_text=end,
    )
    greedy = generate.Sampling(n_tokens=tokenizer.vocab_size)
    greedy_RBN = hosts.fetch(decode(sampling=greedy))
    sampled_RBN = hosts.fetch(decode(sampling=greedy.replace(temperature=1.0)))
    entries = []
    for i in range(len(program.replicates)):
        kinds = {
            "greedy": greedy_RBN[i],
            "sampled": sampled_RBN[i],
            "text": np.take_along_axis(tokens_BL, lengths_B[:, None] + np.arange(n_new), axis=1),
        }
        decoded = {
            f"decode/{kind}_{name}": float(f"{value:.5g}")
            for kind, tokens_BN in kinds.items()
            for name, value in generate.degeneration(tokens_BN, end).items()
            if name != "loop_period"
        }
        texts = [
            {
                "prompt": tokenizer.decode(tokens_BL[b, : lengths_B[b]]),
                "text": tokenizer.decode(generate.until_end(greedy_RBN[i, b], end)),
                "sampled": tokenizer.decode(generate.until_end(sampled_RBN[i, b], end)),
            }
            for b in np.linspace(0, N_PROMPTS - 1, N_SHOWN).astype(int)
        ]
        entries.append({"decode": decoded, "continuations": texts})
    return entries
