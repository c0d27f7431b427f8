"""What a run makes of its numbers: rows, verdicts, a display; which replicate failed, and how."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import config, config_file, hosts, judging, log, metrics, optim, terminal, verdict
from bitnet_jax.program import Program
from bitnet_jax.train import TrainState

RATE_BLOCK = 1 << 16  # steps whose learning rates are summed at once


class Recorder:
    """Makes rows and verdicts of the numbers of chunks, writes and shows them; notes who failed.

    The verdict of an evaluation looks back at all before it, those of a resumed run too. The
    numbers of a chunk are read while the next one runs.
    """

    def __init__(self, program: Program, workdir: Path, step: int):
        self.program, self.workdir, self.pending = program, workdir, None
        reps, cfg = program.replicates, program.cfg
        self.metrics, self.tracker = log.Metrics(workdir, step, reps), None
        if cfg.run.tracker != "none" and hosts.is_first():
            described = config_file.to_json(cfg, reps)
            self.tracker = log.Tracker(cfg.run.tracker, workdir, described, reps)
        tokens = len(reps) * cfg.data.batch_size * cfg.data.seq_len
        self.progress = terminal.Progress(
            reps, step, cfg.run.steps, tokens, silent=not hosts.is_first()
        )
        self.judges = [judging.Judge(program.references) for _ in reps]
        self.sum_lr = [rate_sum(rep.hyper, cfg.run) for rep in reps]
        self.verdicts: dict[int, verdict.Verdict] = {}
        self.failed: dict[int, dict] = {}
        self.trained: dict[int, dict] = {}  # the last row of training that no evaluation followed
        self.last: dict[int, dict] = {}  # the last evaluation
        for row in self.metrics.rows:
            self._judge(row)
        self.resumed = bool(self.metrics.rows)

    @property
    def all_failed(self) -> bool:
        return len(self.failed) == len(self.program.replicates)

    def over(self, when_collapsed: bool) -> bool:
        """Whether all have failed, or, if asked for, all that have not have collapsed."""
        if self.all_failed:
            return True
        live = [v for i, v in self.verdicts.items() if i not in self.failed]
        return when_collapsed and all(map(verdict.collapsed, live))

    def expect(self, step: int, state: TrainState, trained: dict, evaluated: dict) -> None:
        """Write the numbers that were expected before, and expect those of `step`."""
        self.flush(state)
        self.pending = (step, trained, evaluated)

    def flush(self, state: TrainState) -> None:
        """Write the numbers that are expected; `state` is the last one there is."""
        if self.pending:
            step, trained, evaluated = self.pending
            self.pending = None
            self.write(step, state, *hosts.fetch((trained, evaluated)))

    def write(self, step: int, state: TrainState, trained: dict, evaluated: dict) -> None:
        """Write and show the rows of a step; a replicate that fails gets a last one."""
        live = [i for i in range(len(self.judges)) if i not in self.failed]
        for i in live:
            failure = describe_failure(self.program, state, i, step, trained, evaluated)
            if failure:
                self.failed[i] = failure
        rows = [self._row(step, i, "train", trained) for i in live if trained]
        rows = [row for row in rows if row["replicate"] not in self.failed]
        for row in rows:
            self._judge(row)
        for i in live:
            row = self._row(step, i, "eval", evaluated)
            row |= {"failed": self.failed[i]} if i in self.failed else {}
            rows.append(row | self._judge(row).as_row())
        self.metrics.write(rows)
        if self.tracker:
            self.tracker.write(rows)
        self.progress.update(step, rows)

    def _row(self, step: int, i: int, kind: str, numbers: dict) -> dict:
        """What is finite of the numbers of one replicate, as plain values of seven digits."""
        row = {"step": step, "replicate": i, "kind": kind}
        for key in sorted(key for key in numbers if "/" in key):
            number = numbers[key][i]
            if np.issubdtype(number.dtype, np.integer):
                row[key] = int(number)
            elif np.isfinite(number):
                row[key] = float(f"{number:.7g}")
        if kind == "train":
            data = self.program.cfg.data
            row["train/tokens"] = step * data.batch_size * data.seq_len
        return row

    def _judge(self, row: dict) -> verdict.Verdict | None:
        """Remember a row; the verdict after it where it is an evaluation."""
        i = row["replicate"]
        if row["kind"] == "train":
            self.trained[i] = row
            return None
        self.last[i] = row
        if "failed" in row:
            self.failed[i] = row["failed"]
            advice = verdict.LABELS["nonfinite"].next
            self.verdicts[i] = verdict.Verdict("nonfinite", failure_text(row["failed"]), advice)
        else:
            row = self.trained.pop(i, {}) | row | {"sum_lr": self.sum_lr[i](row["step"])}
            self.verdicts[i] = self.judges[i].update(row)
        return self.verdicts[i]

    def outcomes(self) -> list[dict]:
        """How each replicate stands, as JSON values."""
        unigram = self.program.references["unigram"]["loss"]
        return [
            {"name": rep.name, "seed": rep.seed}
            | {key.rpartition("/")[2]: x for key, x in self.verdicts[i].as_row().items()}
            | {"held_out": _held_out(self.last[i], unigram), "failed": self.failed.get(i)}
            for i, rep in enumerate(self.program.replicates)
        ]

    def close(self) -> None:
        self.metrics.close()
        if self.tracker:
            self.tracker.close()
        self.progress.end_line()


def _held_out(row: dict, unigram: float) -> dict:
    """The last held-out loss of a replicate and the unigram's: of the large block where known."""
    if metrics.MINUS_UNIGRAM in row:
        loss = row[metrics.HELD_OUT_LOSS]
        return {"loss": loss, "unigram": loss - row[metrics.MINUS_UNIGRAM]}
    return {"loss": row.get(metrics.LOSS), "unigram": unigram}


def rate_sum(hyper: config.Hyper, run: config.RunConfig):
    """step -> sum of the learning rates of steps 1 to it, whatever the length of the run."""
    sums, block = [0.0], {}  # at the starts of blocks; the last block asked for

    def rates(n):
        steps = np.arange(n * RATE_BLOCK + 1, min((n + 1) * RATE_BLOCK, run.steps) + 1)
        return np.asarray(optim.learning_rate(hyper, steps, run), np.float64)

    def total(step):
        n, rest = divmod(step, RATE_BLOCK)
        while len(sums) <= n:
            sums.append(sums[-1] + rates(len(sums) - 1).sum())
        if n not in block:
            block.clear()
            block[n] = np.concatenate([[0.0], np.cumsum(rates(n))])
        return float(sums[n] + block[n][rest])

    return total


@jax.jit
def magnitudes(params):
    """The largest magnitude of every parameter, [R] each."""
    return jax.tree.map(lambda x: jnp.abs(x).max(axis=range(1, x.ndim)), params)


def describe_failure(program, state, i: int, end: int, trained, evaluated) -> dict | None:
    """Step, tensor and learning rate of the first update of replicate i that was not finite.

    None while all is well. A failed replicate keeps the parameters that met the failure: where they
    are not finite themselves, the update before made them so. The gradient flows from the output
    back, so of several bad ones the one nearest to the output is named.
    """
    step = int(trained["failed"][i]) if trained else 0
    if not step and np.isfinite(evaluated[metrics.LOSS][i]):
        return None
    names = [optim.path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)]
    sizes_R = hosts.fetch(magnitudes(state.params))
    sizes = [float(x[i]) for x in jax.tree.leaves(sizes_R)]
    infinite = [name for name, size in zip(names, sizes, strict=True) if not np.isfinite(size)]
    what = "the held-out loss"
    if step:
        k = trained["losses"].shape[1] - 1 - (end - step)
        bad = [n for n, ok in zip(names, trained["grad_finite"][i, k], strict=True) if not ok]
        what = f"the gradient of {bad[-1]}" if bad else "the update"
        if infinite and step > 1:
            step, what = step - 1, f"the update of {infinite[0]}"
        elif not np.isfinite(trained["losses"][i, k]):
            largest = int(np.argmax(sizes))
            what = f"the loss (largest parameter: {names[largest]}, {sizes[largest]:.3g})"
    elif infinite:
        what = f"the update of {infinite[0]}"
    lr = float(optim.learning_rate(program.replicates[i].hyper, step or end, program.cfg.run))
    return {"step": step or end, "what": what, "lr": float(f"{lr:.6g}")}


def failure_text(failure: dict) -> str:
    """One line of what `describe_failure` gives."""
    return "step {step}: {what} is not finite; learning rate {lr:g}".format(**failure)
