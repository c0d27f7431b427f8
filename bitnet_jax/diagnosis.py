"""What the history of another trainer's run says: references, verdict, and what would say more.

The definitions are those of `verdict`. A log of losses alone allows less than an evaluation of
ours: each test that lacks a number decides nothing, and is named with that number.
"""

import math
import textwrap
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from bitnet_jax import data, metrics, reference
from bitnet_jax.config import DataConfig
from bitnet_jax.elsewhere import couples
from bitnet_jax.fields import UserError
from bitnet_jax.history import ROLES, Column, History
from bitnet_jax.judging import Judge
from bitnet_jax.verdict import ALARM, LABELS, LARGE_BLOCK, LATE_STEPS, PREDICTORS, Verdict

# Means of training losses that are judged, at most: a loss that is read from text in its order, 512
# tokens a step, is called a regression at 13 of its first 300 steps with 20 means, never with 10.
BUCKETS = 10
WIDTH = 79  # columns of a terminal
ABOVE_UNIFORM = 1.0  # nats; the widest logits in use at initialisation add 0.5
ROLE_OF = {role.metric: name for name, role in ROLES.items()} | {metrics.NORM_RATIO: "head_norm"}
SHOWN = ("uniform", "unigram", "bigram")  # predictors
ALONE = ("nonfinite", "regression")  # what a loss says without any reference
NONFINITE_NEXT = "lower rate, longer warm-up, clipping; look at the step before"
BELOW_NEXT = "go on; a held-out loss would show whether it has learned"


@dataclass(frozen=True)
class Diagnosis:
    """A verdict, since which step it holds, and by role what a log that held it would allow."""

    verdict: Verdict
    since: int
    unknown: dict[str, str]
    notes: tuple[str, ...]

    @property
    def alarm(self) -> bool:
        return LABELS[self.verdict.name].severity == ALARM


def diagnose(history: History, references: dict) -> Diagnosis:
    """Judge a history, with the references that are known (see `of_text` and its siblings)."""
    notes = list(history.notes)
    if couples(history.settings):
        notes.append(
            f"{history.settings['optim']} puts its weight decay through Adam (L2), which shrinks "
            "whatever has small gradients; AdamW does not"
        )
    if history.broken:
        step, what = history.broken
        return Diagnosis(Verdict("nonfinite", what, NONFINITE_NEXT), step, {}, tuple(notes))
    rows = evaluations(history)
    known = {name: {"loss": math.nan} for name in PREDICTORS} | references
    if history.judged == "loss":
        known[LARGE_BLOCK] = {}  # it says no more than the few positions between large blocks
        if "unigram" in references:  # fitted to the text that this loss is of: its own entropy
            known["unigram"] = {"loss": references["unigram"]["entropy"]}
    judge = Judge(known, ())
    verdicts = [judge.update(row) for row in rows]
    missing = [name for name in PREDICTORS if name not in references]
    if missing:
        verdicts = [v if v.name in ALONE else _without(missing) for v in verdicts]
    else:
        notes += _scale(rows[0], references)
    last = verdicts[-1]
    if last.name == "below_unigram":
        last = replace(last, next=BELOW_NEXT)
    same = [v.name == last.name for v in verdicts]
    first = len(same) - next((i for i, x in enumerate(reversed(same)) if not x), len(same))
    return Diagnosis(last, int(rows[first]["step"]), _unknown(history, last), tuple(notes))


def _without(missing: list[str]) -> Verdict:
    evidence = f"the losses of {' and '.join(missing)} predictions are not known"
    advice = "give --text, --counts, or --vocab-size and --unigram-loss"
    return Verdict("insufficient_data", evidence, advice)


def _scale(first: dict, references: dict) -> list[str]:
    above = first[metrics.LOSS] - references["uniform"]["loss"]
    if above < ABOVE_UNIFORM:
        return []
    return [
        f"the first loss is {above:.1f} nats above that of uniform predictions: a sum over "
        "batches, bits, or another vocabulary?"
    ]


def evaluations(history: History) -> list[dict]:
    """An evaluation for each of the losses that are judged, as `judging.Judge` reads them.

    Every other number is the last one that was logged up to there. `sum_lr` takes the rates as
    constant between those that were logged.
    """
    judged = history.columns[history.judged].finite()
    if history.judged == "loss":
        judged = in_buckets(judged)
    columns = {"step": judged.steps_N, metrics.LOSS: judged.values_N}
    for role, column in history.columns.items():
        logged = column.finite()
        if role in ("loss", "eval_loss") or not len(logged.steps_N):
            continue
        if role == "head_norm":
            logged = replace(logged, values_N=logged.values_N / logged.values_N[0])
        if role == "lr":
            sums_N = np.cumsum(logged.values_N * np.diff(logged.steps_N, prepend=0.0))
            columns["sum_lr"] = replace(logged, values_N=sums_N).at(judged.steps_N)
        columns[ROLES[role].metric] = logged.at(judged.steps_N)
    return [
        {key: float(x) for key, x in zip(columns, numbers, strict=True) if not math.isnan(x)}
        for numbers in zip(*columns.values(), strict=True)
    ]


def in_buckets(column: Column) -> Column:
    """Means of at most BUCKETS stretches of a column, each at its last step."""
    n = len(column.steps_N)
    edges = np.linspace(0, n, min(n, BUCKETS) + 1).astype(int)
    means = [column.values_N[a:b].mean() for a, b in pairwise(edges)]
    return replace(column, steps_N=column.steps_N[edges[1:] - 1], values_N=np.array(means))


def _unknown(history: History, verdict: Verdict) -> dict[str, str]:
    """By role, what a log that held it, too, would allow to say of a run with this verdict."""
    if verdict.name == "insufficient_data":
        return {}
    below = verdict.name in ("healthy", "below_unigram")
    allowed: dict[str, list[str]] = {}
    for name, label in ({} if below else LABELS).items():
        for role in (ROLE_OF[key] for key in label.needs):
            if role not in history.columns:
                allowed.setdefault(role, []).append(name)
    more = {role: ", ".join(names) for role, names in allowed.items()}
    if history.judged == "loss":
        more["eval_loss"] = "healthy: a training loss does not show that anything was learned"
    if "lr" not in history.columns and not below:
        more["lr"] = f"whether it is late; without it, {LATE_STEPS} steps are"
    return {role: more[role] for role in ROLES if role in more}


def terminal_lines(
    history: History, diagnosis: Diagnosis, references: dict, prediction=()
) -> list[str]:
    """What a terminal shows: what was read, the verdict, lines of `elsewhere.prediction`, and what
    would say more."""
    log, verdict = history.log, diagnosis.verdict
    heights = [f"{name} {references[name]['loss']:.3f}" for name in SHOWN if name in references]
    settings = ", ".join(f"{k} {v}" for k, v in history.settings.items())
    facts = [
        ("columns", ", ".join(f"{r}={c.name}" for r, c in history.columns.items())),
        ("references", ", ".join(heights) or "none: give --text, --counts or --unigram-loss"),
        ("settings", settings or "none in the log; --optimizer and --weight-decay say them"),
        *(("note", note) for note in diagnosis.notes),
    ]
    shown = [f"{log.path} ({log.kind}, {len(log.rows):,} rows, last step {history.last_step:,})"]
    shown += [_hanging(name, text) for name, text in facts]
    since = "" if verdict.name == "insufficient_data" else f" since step {diagnosis.since:,}"
    shown += ["", f"{verdict.name}{since}: {LABELS[verdict.name].headline}", verdict.evidence]
    shown += [f"warning: {text}" for text in verdict.warnings]
    shown.append(f"next: {verdict.next}")
    shown += prediction
    if diagnosis.unknown:
        shown += ["", "not in the log, and what it would tell:"]
        shown += [_hanging(role, text, 20) for role, text in diagnosis.unknown.items()]
    return shown


def _hanging(name: str, text: str, indent: int = 12) -> str:
    """A name and a text of several lines beside it."""
    how = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(f"{name:{indent}}{text}", WIDTH, subsequent_indent=" " * indent, **how)


# ----------------------------------------------------------------------------------- references


def of_text(text: str, tokenizer: str) -> dict:
    """Uniform, unigram and bigram predictions, fitted on the files of a glob and scored on a part
    that was held out; raises UserError."""
    cfg = DataConfig(corpus=f"text:{text}", tokenizer=tokenizer)
    tokens = data.load(cfg)
    held_out = data.large_block(cfg, data.held_out_windows(cfg, tokens))
    predictors = reference.fit(tokens.train_N, tokens.tokenizer.vocab_size)
    return reference.references(predictors, held_out)


def of_counts(path: Path) -> dict:
    """Uniform and unigram predictions of counts of tokens, scored on the same counts.

    The file is one of `reference.read_counts`. Raises UserError.
    """
    counts_V = reference.read_counts(path)
    curve = reference.unigram_curve(counts_V / counts_V.sum(), counts_V, reference.CURVE_SCALES)
    unigram = curve["scale"].index(1.0)
    return of_numbers(len(counts_V), curve["loss"][unigram]) | {"curve": curve}


def of_numbers(vocab_size: int | None, unigram_loss: float | None) -> dict:
    """What a size of the vocabulary and a loss of the unigram prediction say, where they are known.

    Raises UserError for a unigram that is worse than uniform predictions.
    """
    references = {}
    if vocab_size is not None:
        uniform = math.log(vocab_size)
        references["uniform"] = {"loss": uniform, "entropy": uniform, "distinct": 1}
    if unigram_loss is not None:
        references["unigram"] = {"loss": unigram_loss, "entropy": unigram_loss, "distinct": 1}
    if len(references) == 2 and unigram_loss >= uniform:
        raise UserError(
            f"--unigram-loss {unigram_loss:g}: not below ln({vocab_size}) = {uniform:.3f}, the "
            "loss of uniform predictions; it is in nats per token"
        )
    return references
