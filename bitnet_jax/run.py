"""Train R replicates from start or resume to the report page: start-up, loop, duties."""

import contextlib
import errno
import itertools
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import checkpoint, collapse, config, generate, log, optim, page, restore
from bitnet_jax.config import Config, Replicate, UserError
from bitnet_jax.program import Program, build
from bitnet_jax.train import STANDARD, Seams

N_PROMPTS = 16  # held-out beginnings that every replicate continues at the end
N_SHOWN = 3  # of them on the page
VERDICT_KEYS = ("collapse/verdict", "collapse/evidence", "collapse/next", "collapse/warnings")


class TrainingFailed(Exception):
    """A loss or gradient that is not finite: shown as one line, exit status 1."""


class Interrupted(Exception):
    """SIGINT or SIGTERM after the state was saved; exit status 128 + signal."""

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def run(
    cfg: Config,
    replicates: list[Replicate],
    workdir: Path,
    *,
    resume: bool = False,
    seams: Seams = STANDARD,
) -> dict:
    """Train all replicates and write the workdir; returns the content of summary.json.

    Raises UserError for a mistake in the request, TrainingFailed on NaN or inf, Interrupted after a
    signal. A resumed run ends bitwise as one that was never stopped.
    """
    prepare_workdir(workdir, resume)
    try:
        program = build(cfg, replicates, seams)
        settings = config.to_json(program.cfg, replicates)
        check_same(workdir, settings, program.tokens.identity)
        if (workdir / "summary.json").exists():
            print(f"{workdir}: finished before; remove it to train again")
            page.write_page(workdir)
            return json.loads((workdir / "summary.json").read_text())
        # float32 means float32: by default a TPU multiplies it in bfloat16 and a GPU in TF32.
        precision = "float32" if program.cfg.model.dtype == "float32" else "default"
        with jax.set_mesh(program.mesh), jax.default_matmul_precision(precision):
            return _train(program, settings, workdir)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"{workdir}: cannot write: {error.strerror}") from error
        raise


def prepare_workdir(workdir: Path, resume: bool) -> None:
    """Create the folder; refuse one in use unless resuming."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        used = any(workdir.iterdir())
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise UserError(f"{workdir}: cannot be used as workdir: {error.strerror}") from error
    if used and not resume:
        raise UserError(f"{workdir}: not empty; add --resume to go on, or give another --workdir")


def check_same(workdir: Path, settings: dict, corpus: dict) -> None:
    """Raise UserError naming the first setting in which a resumed run differs from its workdir."""
    if not (workdir / "config.json").exists():
        return
    saved = json.loads((workdir / "config.json").read_text())
    for section in ("model", "data", "optim", "run"):
        for name, value in settings[section].items():
            if saved[section].get(name) != value:
                raise UserError(
                    f"{workdir}: was started with {section}.{name}={saved[section].get(name)}, "
                    f"not {value}; resume with the same settings"
                )
    if saved["replicates"] != settings["replicates"]:
        raise UserError(f"{workdir}: was started with other recipes, seeds or hyper.* values")
    if saved["corpus"] != corpus:
        raise UserError(f"{workdir}: data.corpus={corpus['source']} has changed since the start")


def chunk_ends(run: config.RunConfig) -> list[int]:
    """Steps after which the host looks: evaluations, checkpoints, the boundary and the end."""
    ends = {run.boundary, run.steps}
    for every in (run.eval_every, run.save_every, run.checkpoint_every):
        ends.update(range(every, run.steps, every))
    return sorted(ends)


def _train(program: Program, settings: dict, workdir: Path) -> dict:
    cfg, began = program.cfg, time.monotonic()
    state, start = restore.start_state(program, workdir)
    manager = checkpoint.open_manager(workdir, cfg.run)
    _describe(program, settings, workdir)
    metrics = log.Metrics(workdir, start, program.replicates)
    tokens_per_step = len(program.replicates) * cfg.data.batch_size * cfg.data.seq_len
    progress = log.Progress(start, cfg.run.steps, tokens_per_step)
    make_rows = row_maker(program, log.read_rows(metrics.path))

    def emit(step, trained, evaluated):
        trained, evaluated = jax.device_get((trained, evaluated))
        if trained and (trained["failed"].any() or not np.isfinite(evaluated["eval/loss"]).all()):
            raise TrainingFailed(
                _describe_failure(program, workdir, trained, evaluated, state, step)
            )
        rows = make_rows(step, trained, evaluated)
        metrics.write(rows)
        progress.update(step, rows)

    ends = [end for end in chunk_ends(cfg.run) if end > start]
    spans = list(itertools.pairwise([start, *ends]))
    pending = None  # the numbers of a chunk are read while the next one runs
    with contextlib.ExitStack() as stack:
        for resource in (metrics, progress, manager):
            stack.callback(resource.close)
        stopped = stack.enter_context(_signals())
        prefetch = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        if not metrics.resumed:
            emit(start, {}, program.evaluate(state))
        batches = prefetch.submit(program.batches, *spans[0]) if spans else None
        for i, (_, end) in enumerate(spans):
            state, trained, evaluated = program.train_chunk(state, batches.result())
            if i + 1 < len(spans):
                batches = prefetch.submit(program.batches, *spans[i + 1])
            if pending:
                emit(*pending)
            pending = (end, trained, evaluated)
            if stopped or _is_save_step(cfg.run, end):
                emit(*pending)
                pending = None
                checkpoint.save(manager, end, state, settings)
            if stopped and end < cfg.run.steps:
                raise Interrupted(f"stopped at step {end} and saved", stopped[0])
    summary = {
        "step": cfg.run.steps,
        "finished": True,
        "resumed_from": start,
        "wall_seconds": round(time.monotonic() - began, 1),
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "replicates": _final(program, state, workdir),
    }
    log.write_json(workdir / "summary.json", summary)
    page.write_page(workdir)
    return summary


def _is_save_step(run: config.RunConfig, step: int) -> bool:
    at = (run.boundary, run.steps)
    return step in at or step % run.save_every == 0 or step % run.checkpoint_every == 0


@contextlib.contextmanager
def _signals():
    """Collect SIGINT and SIGTERM in a list instead of dying; a second one of a kind kills."""
    received: list[int] = []

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _describe(program: Program, settings: dict, workdir: Path) -> None:
    """Write config.json, and print what will be trained."""
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), program.abstract_state.params
    )
    n_params = sum(x.size for x in jax.tree.leaves(one))
    table = optim.decay_table(one)
    print("\n".join(table))
    tokens = len(program.tokens.train_N)
    print(
        f"{len(program.replicates)} replicates of {n_params:,} parameters on {program.mesh.size} x "
        f"{jax.devices()[0].device_kind}; {tokens:,} training tokens; {workdir}"
    )
    if not (workdir / "config.json").exists():
        described = settings | {
            "provenance": log.provenance(),
            "corpus": program.tokens.identity,
            "references": program.references,
            "n_params": n_params,
            "decay_table": table,
        }
        log.write_json(workdir / "config.json", described)


def row_maker(program: Program, written: Sequence[dict] = ()):
    """Return a function from the numbers of one chunk to rows of plain values.

    The verdict of an evaluation looks back at all before it: those of a resumed run are `written`.
    """
    cfg, replicates = program.cfg, program.replicates
    histories, train_rows = [[] for _ in replicates], {}
    steps = np.arange(cfg.run.steps + 1)
    sum_lr = [np.cumsum(optim.learning_rate(r.hyper, steps, cfg.run)) for r in replicates]

    def plain(x):
        return int(x) if np.issubdtype(x.dtype, np.integer) else float(f"{x:.7g}")

    def remember(row):
        i = row["replicate"]
        if row["kind"] == "train":
            train_rows[i] = row
        else:
            total = {"sum_lr": float(sum_lr[i][row["step"]])}
            histories[i].append(train_rows.pop(i, {}) | row | total)

    def make_rows(step, trained, evaluated):
        rows = []
        for kind, numbers in (("train", trained), ("eval", evaluated)):
            for i in range(len(replicates) if numbers else 0):
                values = {k: plain(v[i]) for k, v in sorted(numbers.items()) if "/" in k}
                if kind == "train":
                    values["train/tokens"] = step * cfg.data.batch_size * cfg.data.seq_len
                row = {"step": step, "replicate": i, "kind": kind} | values
                remember(row)
                if kind == "eval":
                    found = collapse.verdict(histories[i], program.references)
                    row |= dict(zip(VERDICT_KEYS, astuple(found), strict=True))
                rows.append(row)
        return rows

    for row in written:
        remember(row)
    return make_rows


def _describe_failure(program, workdir, trained, evaluated, state, end: int) -> str:
    """One line: step, replicate, first tensor that is not finite, last good checkpoint.

    The parameters are still those that met the failure. The gradient flows from the output back, so
    of several bad gradients the one nearest to the output is named.
    """
    i = int(np.argmax((trained["failed"] > 0) | ~np.isfinite(evaluated["eval/loss"])))
    step = int(trained["failed"][i]) or end
    k = trained["losses"].shape[1] - 1 - (end - step)
    rep = program.replicates[i]
    names = [optim.path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)]
    leaves = [np.asarray(x[i]) for x in jax.tree.leaves(state.params)]
    bad = [name for name, leaf in zip(names, leaves, strict=True) if not np.isfinite(leaf).all()]
    finite = trained["grad_finite"][i, k]
    if bad:
        what = f"parameter {bad[0]}"
    elif np.isfinite(trained["losses"][i, k]) and not finite.all():
        what = f"the gradient of {[n for n, ok in zip(names, finite, strict=True) if not ok][-1]}"
    else:
        largest = max(zip(names, leaves, strict=True), key=lambda pair: np.abs(pair[1]).max())
        what = f"the loss (largest parameter: {largest[0]}, {np.abs(largest[1]).max():.3g})"
    steps = checkpoint.kept_steps(workdir)
    kept = f"last good checkpoint: step {steps[-1]}" if steps else "no checkpoint yet"
    return f"step {step}, replicate {i} ({rep.name}, seed {rep.seed}): {what} is not finite; {kept}"


def _final(program: Program, state, workdir: Path) -> list[dict]:
    """Last verdict and continuations of held-out beginnings, per replicate.

    `decode` holds `generate.degeneration` of the greedy, of the sampled and of the text's own ones.
    """
    tokenizer, held_out_N = program.tokens.tokenizer, program.tokens.validation_N
    n_prompt = program.cfg.data.seq_len // 2
    n_new, end = max(32, n_prompt), tokenizer.end_of_text  # loops need some length to be seen
    starts_B = np.linspace(0, max(0, len(held_out_N) - n_prompt - n_new), N_PROMPTS).astype(int)
    windows_BL = starts_B[:, None] + np.arange(n_prompt + n_new)
    tokens_BL = held_out_N.take(windows_BL, mode="wrap").astype(np.int32)
    decode = partial(
        generate.generate,
        *(program.cfg, state.params, program.hyper, tokens_BL[:, :n_prompt]),
        *(np.full(N_PROMPTS, n_prompt), n_new),
        seed=0,
        end_of_text=end,
    )
    greedy_RBN = jax.device_get(decode(sampling=generate.Sampling()))
    sampled_RBN = jax.device_get(decode(sampling=generate.Sampling(temperature=1.0)))
    rows = log.read_rows(workdir / "metrics.jsonl")
    final = []
    for i, rep in enumerate(program.replicates):
        evals = [row for row in rows if row["kind"] == "eval" and row["replicate"] == i]
        verdict = {key.removeprefix("collapse/"): evals[-1][key] for key in VERDICT_KEYS}
        kinds = {
            "greedy": greedy_RBN[i],
            "sampled": sampled_RBN[i],
            "text": tokens_BL[:, n_prompt:],
        }
        decoded = {
            f"decode/{kind}_{name}": float(f"{value:.5g}")
            for kind, tokens_BN in kinds.items()
            for name, value in generate.degeneration(tokens_BN, end).items()
            if name != "loop_period"
        }
        texts = [
            {
                "prompt": tokenizer.decode(tokens_BL[b, :n_prompt]),
                "text": tokenizer.decode(generate.until_end(greedy_RBN[i, b], end)),
                "sampled": tokenizer.decode(generate.until_end(sampled_RBN[i, b], end)),
            }
            for b in np.linspace(0, N_PROMPTS - 1, N_SHOWN).astype(int)
        ]
        told = {"decode": decoded, "continuations": texts}
        final.append({"name": rep.name, "seed": rep.seed} | verdict | told)
    return final
