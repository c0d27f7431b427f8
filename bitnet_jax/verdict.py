"""What a history of evaluations means: one definition of every word, each beside its threshold.

A row holds the keys of an evaluation and of the training step before it, `step` and `sum_lr` (of
the learning rates so far). `references` are those of `reference.references`. Distinct predictions
decide nothing: they are few in young healthy models and many in noise. A row of another trainer's
log may have the loss alone: a test decides only where a row has the numbers that it `needs`.

The state is the first label, in the order below, whose test passes. Where a threshold was measured,
"healthy" are 13 runs of up to 1000 steps whose decay does not pass through Adam, with and without a
tied embedding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bitnet_jax import metrics
from bitnet_jax.metrics import ENTROPY, LOGIT_STD, LOSS, UNIGRAM_KL
from bitnet_jax.metrics import MUTUAL_INFORMATION as MI

FINE, CAUTION, ALARM = range(3)
LARGE_BLOCK = "held_out"  # the entry of `references` that a run with large blocks has
PREDICTORS = ("uniform", "unigram")
ROW_KEYS = ("collapse/verdict", "collapse/evidence", "collapse/next", "collapse/warnings")


class Label(NamedTuple):
    """Severity, what a headline says of a run in this state, what to look at or run next.

    `needs` are the numbers of a row without which its test cannot decide.
    """

    severity: int
    headline: str
    next: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A key of LABELS, the numbers beside it, what to look at next, early warnings.

    A state without fault that is warned of has the advice of the alarm that the warning precedes.
    `stuck` is late and not learned.
    """

    name: str
    evidence: str
    next: str
    warnings: tuple[str, ...] = ()
    stuck: bool = False

    def as_row(self) -> dict:
        """The `collapse/*` entries of an evaluation row."""
        values = (self.name, self.evidence, self.next, list(self.warnings))
        return dict(zip(ROW_KEYS, values, strict=True))


SEVERE = 3  # the report's word: "severe" are evaluations with fewer distinct predictions


def severe(row: dict) -> bool:
    """Whether there are fewer than 3 distinct predictions on the tracked positions."""
    return row[metrics.DISTINCT] < SEVERE


ERRORS = 2  # standard errors of the paired difference; one-sided, 2.3 % of models at the unigram
# Two standard deviations of (model - unigram) over samples of 512 tokens: 0.07 to 0.09 nats.
BELOW_WITHOUT_ERROR = 0.16
BLIND = 0.1  # mutual information, nats; healthy and late: 0.17 and more


def learned(row: dict, references: dict) -> bool:
    """Whether a model knows more than word frequencies, beyond noise.

    Its loss is below the unigram's by more than two standard errors of the paired difference over
    the large block, where the row has one, and by 0.16 nats where not; and its mutual information
    of context and prediction is above 0.1. Where that is not known the loss decides alone: to be d
    nats below the best prediction without context takes d nats of information from the context.
    """
    if metrics.MINUS_UNIGRAM in row:
        below = row[metrics.MINUS_UNIGRAM] < -ERRORS * row[metrics.MINUS_UNIGRAM_SE]
        return below and row[metrics.HELD_OUT_MUTUAL_INFORMATION] > BLIND
    below = above_unigram(row, references) < -BELOW_WITHOUT_ERROR
    return below and row.get(MI, math.inf) > BLIND


def above_unigram(row: dict, references: dict) -> float:
    """Nats above the unigram's loss: on the large block where the row has it."""
    return row.get(metrics.MINUS_UNIGRAM, row[LOSS] - references["unigram"]["loss"])


def ended(history: Sequence[dict], references: dict) -> bool:
    """Whether a run has ended its collapse: learned at the last step."""
    return learned(history[-1], references)


def healthy(verdict: Verdict) -> bool:
    """Learned and no alarm."""
    return verdict.name == "healthy"


# Alarms that say why a model has not learned. All but `regression` are late by their tests.
MECHANISMS = (
    *("underscaled_decayed", "underscaled_head_frozen", "underscaled"),
    *("regression", "dead", "context_blind"),
)


def collapsed(verdict: Verdict) -> bool:
    """Late and not learned, by one of the named mechanisms."""
    return verdict.stuck and verdict.name in MECHANISMS


LATE = 0.05  # sum of learning rates: how far weights can have moved; healthy: transit ends by 0.03
LATE_STEPS = 1000  # where no learning rate is known: that sum at 5e-5, transformers' default
PERSIST, PERSIST_BLIND = 3, 5  # evaluations in a row; healthy and tied: blind around step 20 alone
FAR = 1.0  # nats above the unigram, at most half of the way to uniform; healthy and late: to 0.59
CUSUM_DRIFT = 0.05  # nats an evaluation by which a loss may stay above its best


def beside(difference: float) -> str:
    """`0.12 above` or `0.12 below`."""
    return f"{abs(difference):.2f} {'above' if difference > 0 else 'below'}"


def confidence(row: dict) -> float:
    """loss - entropy: below 0 larger logits would lower the loss; NaN where it is not known."""
    return row[LOSS] - row.get(ENTROPY, math.nan)


def output(row: dict) -> str:
    """The group of the matrix that makes the logits: the head, or the tied embedding."""
    return "head" if f"{metrics.NORM_RATIO}head" in row else "embedding"


def norm(row: dict) -> float:
    """Share that is left of that matrix's initial norm; NaN where it is not known."""
    return row.get(metrics.NORM_RATIO + output(row), math.nan)


LABELS: dict[str, Label] = {}  # in order of precedence
TESTS: dict[str, Callable[..., bool]] = {}  # of a `judging.Judge` that has seen the history


def label(severity: int, headline: str, advice: str, *needs: str):
    """Register the test `_NAME` of a label behind those before it."""

    def register(test):
        name = test.__name__.removeprefix("_")
        LABELS[name] = Label(severity, headline, advice, needs)
        TESTS[name] = test
        return test

    return register


HOLE = 10  # times the mean distance of evaluations; steps of saving between them make it 2


@label(CAUTION, "cannot be judged", "rows and references that are missing")
def _insufficient_data(judge):
    """A hole among the evaluations; or, before any test, numbers or references are missing."""
    n, widest, steps = judge.gaps, judge.widest_gap, judge.row["step"] - judge.first["step"]
    return n > HOLE and widest * (n - 1) > HOLE * (steps - widest)


@label(ALARM, "diverged", "the first tensor that is not finite")
def _nonfinite(judge):
    """Loss or entropy is NaN or inf."""
    return not all(math.isfinite(judge.row.get(key, 0.0)) for key in (LOSS, ENTROPY))


LEAK = 1e-3  # of the logits' spread; causal models: 0, masks that are missing: 0.2 and more


@label(ALARM, "sees later tokens", "attention mask: position t may see x[0] to x[t] alone")
def _sees_later_tokens(judge):
    """A changed token moves logits before it, on the last large block: the loss says nothing."""
    return judge.future_leak > LEAK


DECAYED = 0.5  # share of the initial norm; healthy 0.99 and more, coupled decay 0.02 to 0.16


@label(
    ALARM,
    "collapsed",
    "is decay coupled into Adam, or not times the learning rate?",
    metrics.NORM_RATIO,
)
def _underscaled_decayed(judge):
    """Late and above the unigram's loss; the output matrix is below half of its initial norm."""
    return judge.stuck and judge.above > 0 and norm(judge.row) < DECAYED


REGRESSION, REGRESSION_KL = 0.5, 0.3  # nats above the best; unscaled decay: loss 7.97 to 9.80


@label(ALARM, "lost what it had learned", "gradient norm at the best loss; fork from there")
def _regression(judge):
    """Loss and distance from the word frequencies are above their best, three times in a row.

    Where that distance is not known, the loss alone.
    """
    lost, lost_kl = judge.best_loss + REGRESSION, judge.best_kl + REGRESSION_KL

    def worse(row):
        return row[LOSS] > lost and (UNIGRAM_KL not in row or row[UNIGRAM_KL] > lost_kl)

    return judge.lasts(PERSIST, worse)


INITIAL = 0.1  # nats from ln V + std^2 / 2, the loss of Gaussian logits; fresh models: to 0.05
SLOW_STEPS = 300  # loss 9.6 at a sum of learning rates of 0.007; healthy runs are below 8 by then


@label(FINE, "has not started to learn", "wait")
def _init(judge):
    """Neither late nor after 300 steps; loss and logits as at initialisation."""
    uniform, std = judge.references["uniform"]["loss"], judge.row.get(LOGIT_STD)
    if std is None:  # the spread of a fresh model's logits only adds to the loss
        return not judge.started and judge.row[LOSS] > uniform - INITIAL
    return not judge.started and abs(judge.row[LOSS] - (uniform + std**2 / 2)) < INITIAL


OVERCONFIDENT = 1.0  # loss - entropy; 10 times the learning rate 6.1; healthy to 2.4, but not far


@label(ALARM, "diverged", "lower learning rate, longer warm-up, larger batches", ENTROPY)
def _overconfident(judge):
    """Far above the unigram's loss, which is more than 1 nat above the entropy."""
    return judge.far() and judge.lasts(PERSIST, lambda row: confidence(row) > OVERCONFIDENT)


UNDERCONFIDENT = -0.3  # loss - entropy; faults -0.9 and less; healthy -0.06 and more once late
FROZEN_NORM, FROZEN_STD = 1e-3, 0.02  # relative changes; a head that is not updated: 0 and 0


@label(
    *(ALARM, "collapsed", "triage: is the head updated at all?"),
    *(ENTROPY, LOGIT_STD, metrics.NORM_RATIO),
)
def _underscaled_head_frozen(judge):
    """Underscaled, with the output matrix and the spread of the logits as at initialisation."""
    first, row = judge.first[LOGIT_STD], judge.row
    same_std = abs(row[LOGIT_STD] - first) < FROZEN_STD * first
    return _underscaled(judge) and same_std and abs(norm(row) - 1) < FROZEN_NORM


@label(ALARM, "collapsed", "triage: temperature fit, norm of the head", ENTROPY)
def _underscaled(judge):
    """Late, far, and the loss below the entropy: larger logits would lower the loss."""
    return judge.stuck and judge.far() and confidence(judge.row) < UNDERCONFIDENT


@label(ALARM, "collapsed", "triage: gradients by group, order of the targets", ENTROPY)
def _dead(judge):
    """Late and far, with confidence about right."""
    return judge.stuck and judge.far()


@label(ALARM, "collapsed", "triage: norms, attention mask, order of the targets", MI)
def _context_blind(judge):
    """Late, and predictions do not depend on the context, five times in a row."""
    return judge.stuck and judge.lasts(PERSIST_BLIND, lambda row: row[MI] < BLIND)


@label(ALARM, "collapsed", "log the entropy: it says whether the logits are too small")
def _unlearned(judge):
    """Late and far, and nothing is known that says why."""
    return judge.stuck and judge.far()


PROGRESS = 0.05  # nats by which healthy runs above the unigram fall while their steps double


@label(ALARM, "is stuck at word frequencies", "decay inside Adam? rate, masks, order of targets")
def _stalled(judge):
    """Late, not learned, and since half of the steps no lower by 0.05 nats.

    Only where the mutual information is not known, which tells whether the context is used.
    """
    stands = judge.row["step"] >= 2 * judge.progress_step and len(judge.rows) == PERSIST_BLIND
    return judge.stuck and stands and MI not in judge.row


@label(FINE, "learned", "go on")
def _healthy(judge):
    """Learned; in a run with large blocks only they say so."""
    return judge.learned and (
        LARGE_BLOCK not in judge.references or metrics.MINUS_UNIGRAM in judge.row
    )


@label(FINE, "is below word frequencies", "go on; the next large block tells whether it learned")
def _below_unigram(judge):
    """As healthy, by the few positions of an evaluation between large blocks."""
    return judge.learned


@label(FINE, "is not clearly below word frequencies", "train longer; sum of learning rates")
def _slow(judge):
    """Late or after 300 steps, and none of these."""
    return judge.started


@label(FINE, "is still learning word frequencies", "wait")
def _unigram_transit(judge):
    """What healthy models pass through: few distinct predictions, logits too small."""
    return True


SHRINKING_COSINE, SHRINKING_NORM = -0.7, 0.99  # coupled decay -0.87 at once, healthy above -0.13


def _updates_shrink_the_output(judge) -> str:
    rows, key = list(judge.rows)[-PERSIST:], metrics.UPDATE_COSINE + output(judge.row)
    falls = norm(judge.row) < SHRINKING_NORM
    falls &= all(norm(a) > norm(b) for a, b in pairwise(rows))
    shrinks = judge.lasts(PERSIST, lambda row: row.get(key, math.nan) < SHRINKING_COSINE)
    if not (judge.above > 0 and falls and shrinks):
        return ""
    return f"updates do little but shrink the {output(judge.row)}: cosine {judge.row[key]:.2f}"


def _norm_is_down(judge) -> str:
    text = f"{output(judge.row)} norm is down to {norm(judge.row):.2g} of initial"
    return text if judge.above > 0 and norm(judge.row) < DECAYED else ""


UNDERCONFIDENT_ABOVE = 0.3  # nats above the unigram; healthy runs leave this by a sum of 0.03


def _logits_too_small(judge) -> str:
    gap = confidence(judge.row)
    small = judge.late and judge.above > UNDERCONFIDENT_ABOVE and gap < UNDERCONFIDENT
    return f"logits too small: entropy {beside(-gap)} the loss" if small else ""


# Nats of mutual information; summed learning rate and nats above the unigram by which healthy runs
# have left it, those with a tied embedding by step 40.
BLIND_WARNING, PAST_UNIGRAM, NEAR_UNIGRAM = 0.01, 0.03, 1.5


def _context_ignored(judge) -> str:
    def blind(row):
        near = above_unigram(row, judge.references) < NEAR_UNIGRAM
        return near and row.get(MI, math.nan) < BLIND_WARNING

    ignored = judge.row.get("sum_lr", 0.0) >= PAST_UNIGRAM and judge.lasts(PERSIST_BLIND, blind)
    return f"context is ignored: mutual information {judge.row[MI]:.4f}" if ignored else ""


CUSUM_KL = 0.1  # nats above the best KL to the word frequencies; healthy to 0.04


def _loss_drifts_up(judge) -> str:
    away = judge.best_kl + CUSUM_KL
    lost = judge.lasts(PERSIST, lambda row: row.get(UNIGRAM_KL, 0.0) > away)
    lost &= judge.drift > REGRESSION
    return f"loss drifts up: {judge.row[LOSS]:.2f}, was {judge.best_loss:.2f}" if lost else ""


WARNINGS = (  # the alarm that a warning precedes; for one alarm only the last text is said
    ("underscaled_decayed", _updates_shrink_the_output),
    ("underscaled_decayed", _norm_is_down),
    ("underscaled", _logits_too_small),
    ("context_blind", _context_ignored),
    ("regression", _loss_drifts_up),
)
