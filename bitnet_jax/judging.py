"""Judges histories of evaluations, of our runs and of others' logs: which label of `verdict` holds.

A replicate is judged evaluation by evaluation, at a cost that does not grow with the run.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

from bitnet_jax import metrics
from bitnet_jax.metrics import ENTROPY, LOGIT_STD, LOSS, UNIGRAM_KL
from bitnet_jax.metrics import MUTUAL_INFORMATION as MI
from bitnet_jax.verdict import (
    CUSUM_DRIFT,
    FAR,
    FINE,
    FROZEN_NORM,
    LABELS,
    LATE,
    LATE_STEPS,
    PERSIST,
    PERSIST_BLIND,
    PREDICTORS,
    PROGRESS,
    SLOW_STEPS,
    TESTS,
    WARNINGS,
    Verdict,
    above_unigram,
    beside,
    confidence,
    learned,
    norm,
    output,
)

OF_A_RUN = ("sum_lr", ENTROPY, LOGIT_STD, MI, UNIGRAM_KL)  # what an evaluation of ours has


class Judge:
    """Judges one replicate, evaluation by evaluation, at a cost that does not grow with the run.

    `required` are the numbers, besides step and loss, without which a row cannot be judged.
    """

    def __init__(self, references: dict, required: Sequence[str] = OF_A_RUN):
        self.references, self.required = references, ("step", LOSS, *required)
        self.first: dict = {}
        self.rows: deque[dict] = deque(maxlen=PERSIST_BLIND)
        self.best_loss = self.best_kl = math.inf
        self.drift = self.future_leak = 0.0
        self.gaps = self.widest_gap = 0
        self.progress_loss, self.progress_step = math.inf, 0  # when the loss fell by PROGRESS last

    def update(self, row: dict) -> Verdict:
        """The verdict after one more evaluation; a number that is not there may be None."""
        row = {key: value for key, value in row.items() if value is not None}
        missing = [f"{name} predictor" for name in PREDICTORS if name not in self.references]
        missing += [key for key in self.required if key not in row]
        if missing:
            evidence, name = f"without {', '.join(missing)}", "insufficient_data"
            return Verdict(name, evidence, LABELS[name].next)
        self._remember(row)
        name = next(name for name, test in TESTS.items() if not self.lacks(name) and test(self))
        ahead = {alarm: text for alarm, test in WARNINGS if (text := test(self)) and alarm != name}
        warned = ahead and LABELS[name].severity == FINE
        advice = LABELS[next(iter(ahead)) if warned else name].next
        return Verdict(name, _evidence(self, name), advice, tuple(ahead.values()), self.stuck)

    def lacks(self, name: str) -> list[str]:
        """The numbers that the last row does not have and a label's test needs."""
        families = {metrics.NORM_RATIO: metrics.NORM_RATIO + output(self.row)}
        return [key for key in LABELS[name].needs if families.get(key, key) not in self.row]

    def _remember(self, row: dict) -> None:
        if self.rows:
            self.gaps += 1
            self.widest_gap = max(self.widest_gap, row["step"] - self.row["step"])
        self.first = self.first or row
        self.rows.append(row)
        self.row, self.above = row, above_unigram(row, self.references)
        self.future_leak = row.get(metrics.FUTURE_LEAK, self.future_leak)
        self.late = row["sum_lr"] >= LATE if "sum_lr" in row else row["step"] >= LATE_STEPS
        self.learned = learned(row, self.references)
        self.stuck = self.late and not self.learned
        self.started = self.late or row["step"] >= SLOW_STEPS
        # One-sided cumulative sum of the loss above its best, less a drift; 0 at each new best.
        above_best = row[LOSS] - self.best_loss
        self.drift = max(0.0, self.drift + above_best - CUSUM_DRIFT) if above_best >= 0 else 0.0
        if row[LOSS] < self.progress_loss - PROGRESS:
            self.progress_loss, self.progress_step = row[LOSS], row["step"]
        self.best_loss = min(self.best_loss, row[LOSS])
        self.best_kl = min(self.best_kl, row.get(UNIGRAM_KL, math.inf))

    def lasts(self, n: int, test: Callable[[dict], bool]) -> bool:
        """Whether each of the last n evaluations passes."""
        return len(self.rows) >= n and all(test(row) for row in list(self.rows)[-n:])

    def far(self) -> bool:
        """Far above the unigram's loss, some evaluations in a row."""
        uniform, unigram = (self.references[name]["loss"] for name in PREDICTORS)
        limit = min(FAR, (uniform - unigram) / 2)
        return self.lasts(PERSIST, lambda row: above_unigram(row, self.references) > limit)


def verdict(
    history: Sequence[dict], references: dict, required: Sequence[str] = OF_A_RUN
) -> Verdict:
    """The verdict on a replicate's evaluations, oldest first: `Judge` over all of them."""
    judge = Judge(references, required)
    return [judge.update(row) for row in history or [{}]][-1]


def _evidence(judge: Judge, name: str) -> str:
    row = judge.row
    if name == "insufficient_data":
        return f"{judge.widest_gap} steps without an evaluation"
    if name == "nonfinite":
        entropy = f", entropy {row[ENTROPY]:.2f}" if ENTROPY in row else ""
        return f"loss {row[LOSS]:.2f}{entropy}"
    loss, unigram = row[LOSS], f"{judge.references['unigram']['loss']:.2f}"
    if metrics.MINUS_UNIGRAM in row:
        loss = row[metrics.HELD_OUT_LOSS]
        unigram = f"(standard error {row[metrics.MINUS_UNIGRAM_SE]:.3f})"
    parts = [f"loss {loss:.2f} is {beside(judge.above)} the unigram's {unigram}"]
    if ENTROPY in row:
        parts.append(f"entropy {row[ENTROPY]:.2f} is {beside(-confidence(row))} the loss")
    if MI in row:
        parts.append(f"mutual information {row[MI]:.3f}")
    if norm(row) < 1 + FROZEN_NORM:
        parts.append(f"{output(row)} norm {norm(row):.2g} of initial")
    if name == "sees_later_tokens":
        leak = f"{judge.future_leak:.2g} of their spread"
        parts.insert(0, f"later tokens move earlier logits by {leak}")
    if name == "stalled":
        parts.append(f"no lower by {PROGRESS} since step {judge.progress_step:,.0f}")
    if name == "regression":
        parts.append(f"the best was {judge.best_loss:.2f}")
    if "sum_lr" in row and name == "slow":
        parts.append(f"sum of learning rates {row['sum_lr']:.2g}")
    return "; ".join(parts)
