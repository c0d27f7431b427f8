"""Collapse statistics: additive sums over positions, turned into numbers once at the end.

And the verdict: what a history of these numbers means beside the reference predictors.

Definitions. z: float32 logits of a position, q = softmax z, a = argmax z (ties to the lowest id).

unique_tokens       distinct a over the tracked positions (the report's number)
unique_targets      distinct next tokens of the text over the same positions
concentration       mean of max q over the tracked positions (the report's number)
mode_share          share of tracked positions that predict the most frequent a
entropy             mean entropy of q over the scored held-out positions, nats
logit_std           mean over positions of the standard deviation of z over the vocabulary
mutual_information  H(mean q) - mean H(q), nats: how much the prediction depends on the context
unigram_kl          KL(unigram of the training text || mean q), nats
overconfidence      loss - entropy; d loss / d ln(scale of z) at scale 1, so negative means that
                    larger logits would lower the loss
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Stats:
    """Sums over positions, each [R] or [R, V]; two batches merge with `+` leaf by leaf.

    `all_*` run over every position, the others over the scored ones.
    """

    all_positions: jax.Array
    all_top1: jax.Array
    all_argmax: jax.Array
    all_targets: jax.Array
    positions: jax.Array
    nats: jax.Array
    bytes: jax.Array
    entropy: jax.Array
    logit_std: jax.Array
    probs: jax.Array


def stats(
    logits_RBLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, token_bytes_V: jax.Array
) -> Stats:
    """Sum the statistics of one batch, seen by R replicates, in one pass over the logits.

    `weights_BL` marks the scored positions with 1; `token_bytes_V` gives each token's bytes.
    Replicates and positions are flattened to rows because XLA:CPU reduces two-dimensional arrays
    faster than vmapped ones.
    """
    n_rep, vocab = logits_RBLV.shape[0], logits_RBLV.shape[-1]
    z = logits_RBLV.reshape(-1, vocab).astype(jnp.float32)  # [R * N, V]
    w_N, y_N = weights_BL.reshape(-1), targets_BL.reshape(-1)
    w, y = jnp.tile(w_N, n_rep), jnp.tile(y_N, n_rep)

    top = jax.lax.optimization_barrier(jnp.max(z, axis=-1, keepdims=True))
    exp = jax.lax.optimization_barrier(jnp.exp(z - top))
    total = jnp.sum(exp, axis=-1)
    log_total = top[:, 0] + jnp.log(total)
    entropy = log_total - jnp.sum(exp * z, axis=-1) / total
    nats = log_total - jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]
    mean = jnp.mean(z, axis=-1)
    variance = jnp.mean(jnp.square(z - mean[:, None]), axis=-1)
    # The first argmax by a float reduction, which vectorises where jnp.argmax does not; exact for
    # vocabularies below 2^24.
    countdown_V = jnp.arange(vocab, 0, -1, dtype=jnp.float32)
    argmax = vocab - jnp.max(jnp.where(z == top, countdown_V, 0), axis=-1).astype(jnp.int32)

    def total_by_replicate(x):
        return jnp.sum(x.reshape(n_rep, -1), axis=1)

    rows = jnp.kron(jnp.eye(n_rep), w_N[None]) / total  # [R, R * N]
    replicate = jnp.repeat(jnp.arange(n_rep), y_N.size)
    counts = jnp.zeros((n_rep, vocab))
    return Stats(
        all_positions=jnp.full(n_rep, y_N.size, jnp.float32),
        all_top1=total_by_replicate(1 / total),
        all_argmax=counts.at[replicate, argmax].add(1),
        all_targets=counts.at[replicate, y].add(1),
        positions=total_by_replicate(w),
        nats=total_by_replicate(nats * w),
        bytes=total_by_replicate(token_bytes_V[y] * w),
        entropy=total_by_replicate(entropy * w),
        logit_std=total_by_replicate(jnp.sqrt(variance) * w),
        probs=rows @ exp,
    )


def merge(batches: Stats) -> Stats:
    """Sum statistics that are stacked along a leading axis."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), batches)


def finalize(held_out: Stats, tracked: Stats, unigram_V: jax.Array) -> dict[str, jax.Array]:
    """Turn sums into the flat `eval/*` and `collapse/*` numbers, each [R]."""
    loss, entropy = held_out.nats / held_out.positions, held_out.entropy / held_out.positions
    mean_q = held_out.probs / held_out.positions[:, None]
    log_q = jnp.log(jnp.maximum(mean_q, 1e-30))
    return {
        "eval/loss": loss,
        "eval/bits_per_byte": held_out.nats / jnp.log(2.0) / held_out.bytes,
        "collapse/unique_tokens": jnp.sum(tracked.all_argmax > 0, axis=-1),
        "collapse/unique_targets": jnp.sum(tracked.all_targets > 0, axis=-1),
        "collapse/concentration": tracked.all_top1 / tracked.all_positions,
        "collapse/mode_share": jnp.max(tracked.all_argmax, axis=-1) / tracked.all_positions,
        "collapse/entropy": entropy,
        "collapse/logit_std": held_out.logit_std / held_out.positions,
        "collapse/mutual_information": -jnp.sum(mean_q * log_q, axis=-1) - entropy,
        "collapse/unigram_kl": jnp.sum(unigram_V * (jnp.log(unigram_V) - log_q), axis=-1),
        "collapse/overconfidence": loss - entropy,
    }


# Measured on the recipes report and b158: healthy is 13 runs with decoupled decay, to 1000 steps.
LATE, PAST_UNIGRAM = 0.05, 0.03  # sum of the learning rates: how far weights can have moved
SLOW_STEPS = 300
PERSIST, PERSIST_BLIND = 3, 5  # evaluations in a row
FAR = 1.0  # nats above the unigram, at most half of the way to uniform; healthy and late: to 0.59
UNDERCONFIDENT, OVERCONFIDENT = -0.3, 1.0  # loss - entropy; a healthy 128-token batch: up to 2.38
BLIND, BLIND_WARNING = 0.1, 0.01  # mutual information, nats; healthy and late: 0.17 and more
DECAYED = 0.5  # share of the initial norm; healthy 0.99 and more, coupled decay 0.02 to 0.16
SHRINKING_COSINE, SHRINKING_NORM = -0.7, 0.99  # coupled decay -0.87 at once, healthy above -0.13
FROZEN_NORM, FROZEN_STD = 1e-3, 0.02  # relative change of the norm and of the logits' spread
REGRESSION, REGRESSION_KL = 0.5, 0.3  # nats above the best loss, and above the best KL
CUSUM_DRIFT, CUSUM_KL = 0.05, 0.1  # nats an evaluation; nats, healthy to 0.04
RANK_LOST, REPEATED, LAST_TOKEN_ONLY = 0.15, 0.5, 0.02
HOLE = 10  # times the mean distance of evaluations

FINE, CAUTION, ALARM = range(3)
LABELS = {  # severity, what the headline says of a run that ends so, what to look at or run next
    "healthy": (FINE, "learned", "go on"),
    "init": (FINE, "has not started to learn", "wait"),
    "unigram_transit": (FINE, "is still learning word frequencies", "wait"),
    "slow": (
        FINE,
        "has not passed word frequencies",
        "train longer; schedule: sum of learning rates",
    ),
    "insufficient_data": (CAUTION, "cannot be judged", "rows and references that are missing"),
    "repetitive": (CAUTION, "learned but repeats itself", "decoding: sample instead of greedy"),
    "overconfident": (ALARM, "diverged", "lower learning rate, longer warm-up, larger batches"),
    "bigram_only": (ALARM, "learned word pairs alone", "triage: straight-through gradient, flips"),
    "rank_collapse": (ALARM, "collapsed", "triage: norms and attention logits of the last blocks"),
    "context_blind": (ALARM, "collapsed", "triage: norms, attention mask, order of the targets"),
    "dead": (ALARM, "collapsed", "triage: gradients by group, order of the targets"),
    "underscaled": (ALARM, "collapsed", "triage: temperature fit, norm of the head, decay audit"),
    "underscaled_head_frozen": (ALARM, "collapsed", "triage: is the head updated at all?"),
    "underscaled_decayed": (
        *(ALARM, "collapsed"),
        "decay audit: is decay coupled into Adam, or not scaled by the learning rate?",
    ),
    "regression": (ALARM, "collapsed", "gradient norm where the loss was best; fork from there"),
    "nonfinite": (ALARM, "diverged", "the first tensor that is not finite"),
}
LOSS, MI, KL = "eval/loss", "collapse/mutual_information", "collapse/unigram_kl"
LAST_TOKEN, RANK, REP_4 = "collapse/last_token_only_loss_change", "collapse/rankme", "decode/rep_4"


@dataclass(frozen=True)
class Verdict:
    """A key of LABELS, the numbers beside it, what to look at next, early warnings."""

    name: str
    evidence: str
    next: str
    warnings: tuple[str, ...] = ()


def verdict(history: Sequence[dict], references: dict) -> Verdict:
    """Name what the evaluations of one replicate, oldest first, show; pure.

    A row holds `step`, `sum_lr` (of the learning rates so far), the keys of `finalize` and, where
    known, the `decay/*` keys of the step, LAST_TOKEN, RANK and REP_4. `references` are those of
    `reference.references`. Distinct tokens decide nothing. First match; late: sum_lr >= 0.05, far:
    loss 1 nat above the unigram's or half of the way to the uniform one's, 3x: three times in a row

    insufficient_data        no row, no reference, or a hole among the evaluations
    nonfinite                loss or entropy is NaN or inf
    underscaled_decayed      loss above the unigram's, output matrix below half of its initial norm
                             (late or 3x)
    regression               loss 0.5 above its best and KL to the unigram 0.3 (3x)
    init                     not late; loss and logits as at initialisation: ln V + std^2 / 2
    overconfident            far, and loss more than 1 nat above the entropy (3x)
    underscaled              late, far (3x), loss below the entropy: larger logits would help
    underscaled_head_frozen  the same, output matrix and spread of the logits as at initialisation
    dead                     late, far (3x), confidence about right
    context_blind            late, predictions do not depend on the context (5x)
    bigram_only              late, they do, yet the last token alone predicts as well
    rank_collapse            late, hidden states lost their rank (5x; not with a tied embedding)
    repetitive               as healthy, yet greedy text repeats itself
    healthy                  loss below the unigram's, predictions depend on the context
    slow                     late or after 300 steps, and none of these
    unigram_transit          word frequencies are being learned
    """
    name = _name(history, references)
    if name in ("insufficient_data", "nonfinite"):
        return Verdict(name, f"{len(history)} evaluations", LABELS[name][-1])
    row, unigram = history[-1], references["unigram"]["loss"]
    above, gap = row[LOSS] - unigram, _confidence(row)
    evidence = [
        f"loss {row[LOSS]:.2f} is {_beside(above)} the unigram's {unigram:.2f}",
        f"entropy {row['collapse/entropy']:.2f} is {_beside(-gap)} the loss",
        f"mutual information {row[MI]:.3f}",
        *(f"{key} {row[key]:.3g}" for key in (LAST_TOKEN, RANK, REP_4) if key in row),
    ]
    if _norm(row) < 1 + FROZEN_NORM:
        evidence.append(f"{_output(row)} norm {_norm(row):.2g} of initial")
    if name == "slow":
        evidence.append(f"sum of learning rates {row['sum_lr']:.2g}")
    return Verdict(name, "; ".join(evidence), LABELS[name][-1], _warnings(history, unigram))


def _name(history, references) -> str:
    if not history or not {"uniform", "unigram"} <= references.keys() or _has_hole(history):
        return "insufficient_data"
    row = history[-1]
    loss, late = row[LOSS], row["sum_lr"] >= LATE
    if not (math.isfinite(loss) and math.isfinite(row["collapse/entropy"])):
        return "nonfinite"
    uniform, unigram = references["uniform"]["loss"], references["unigram"]["loss"]
    if loss > unigram and _lasts(history, 1 if late else PERSIST, lambda r: _norm(r) < DECAYED):
        return "underscaled_decayed"
    lost, lost_kl = (min(r[key] for r in history) for key in (LOSS, KL))
    lost, lost_kl = lost + REGRESSION, lost_kl + REGRESSION_KL
    if _lasts(history, PERSIST, lambda r: r[LOSS] > lost and r[KL] > lost_kl):
        return "regression"
    started = late or row["step"] >= SLOW_STEPS
    if not started and abs(loss - uniform - row["collapse/logit_std"] ** 2 / 2) < 0.1:
        return "init"
    limit = unigram + min(FAR, (uniform - unigram) / 2)
    far = _lasts(history, PERSIST, lambda r: r[LOSS] > limit)
    if far and _lasts(history, PERSIST, lambda r: _confidence(r) > OVERCONFIDENT):
        return "overconfident"
    fault = _late_fault(history, loss - unigram, far) if late else None
    if fault or loss >= unigram or row[MI] < BLIND:
        return fault or ("slow" if started else "unigram_transit")
    repeats = loss < unigram - 0.5 and row.get(REP_4, 0) > REPEATED
    return "repetitive" if repeats else "healthy"


def _late_fault(history, above: float, far: bool) -> str | None:
    """What is wrong although the weights had time to move."""
    first, row = history[0], history[-1]
    if far and _confidence(row) < UNDERCONFIDENT:
        change = row["collapse/logit_std"] - first["collapse/logit_std"]
        same_std = abs(change) < FROZEN_STD * first["collapse/logit_std"]
        frozen = same_std and abs(_norm(row) - 1) < FROZEN_NORM
        return "underscaled_head_frozen" if frozen else "underscaled"
    if far:
        return "dead"
    if _lasts(history, PERSIST_BLIND, lambda r: r[MI] < BLIND):
        return "context_blind"
    if above < 0.7 and row[MI] > 0.1 and row.get(LAST_TOKEN, math.inf) < LAST_TOKEN_ONLY:
        return "bigram_only"
    least = RANK_LOST * first.get(RANK, 0)
    lost = _lasts(history, PERSIST_BLIND, lambda r: r.get(RANK, math.inf) < least)
    # With a tied embedding the rank is low in healthy runs, too.
    return "rank_collapse" if lost and above < 1 and _output(row) == "head" else None


def _warnings(history, unigram: float) -> tuple[str, ...]:
    """What goes wrong before the loss shows it; nothing in healthy runs."""
    row = history[-1]
    above, late = row[LOSS] - unigram, row["sum_lr"] >= LATE
    name, norm, norms = _output(row), _norm(row), [_norm(r) for r in history[-PERSIST:]]
    falls = norm < SHRINKING_NORM and all(a > b for a, b in pairwise(norms))
    best, best_kl = (min(r[key] for r in history) for key in (LOSS, KL))
    found = {
        f"{name} norm is down to {norm:.2g} of initial": above > 0 and norm < DECAYED,
        f"updates do little but shrink the {name}: cosine {_cosine(row):.2f}": above > 0
        and falls
        and _lasts(history, PERSIST, lambda r: _cosine(r) < SHRINKING_COSINE),
        f"logits too small: entropy {_beside(-_confidence(row))} the loss": late
        and above > 0.3
        and _confidence(row) < UNDERCONFIDENT,
        f"context is ignored: mutual information {row[MI]:.4f}": row["sum_lr"] >= PAST_UNIGRAM
        and _lasts(
            history, PERSIST_BLIND, lambda r: r[MI] < BLIND_WARNING and r[LOSS] < unigram + 1.5
        ),
        f"loss drifts up: {row[LOSS]:.2f}, was {best:.2f}": _cusum(history) > REGRESSION
        and _lasts(history, PERSIST, lambda r: r[KL] > best_kl + CUSUM_KL),
    }
    return tuple(text for text, fires in found.items() if fires)


def _cusum(history) -> float:
    """One-sided cumulative sum of the loss above its best, less a drift; 0 at each new best."""
    best, total = math.inf, 0.0
    for loss in (row[LOSS] for row in history):
        total = max(0.0, total + loss - best - CUSUM_DRIFT) if loss >= best else 0.0
        best = min(best, loss)
    return total


def _has_hole(history) -> bool:
    gaps = [b["step"] - a["step"] for a, b in pairwise(history)]
    return len(gaps) > HOLE and max(gaps) * (len(gaps) - 1) > HOLE * (sum(gaps) - max(gaps))


def _lasts(history, n: int, test) -> bool:
    """Whether each of the last n evaluations passes."""
    return len(history) >= n and all(test(row) for row in history[-n:])


def _beside(difference: float) -> str:
    return f"{abs(difference):.2f} {'above' if difference > 0 else 'below'}"


def _output(row) -> str:
    """The group of the matrix that makes the logits."""
    return "head" if "decay/norm_ratio_head" in row else "embedding"


def _norm(row) -> float:
    return row.get(f"decay/norm_ratio_{_output(row)}", math.nan)


def _cosine(row) -> float:
    return row.get(f"decay/update_weight_cosine_{_output(row)}", math.nan)


def _confidence(row) -> float:
    return row[LOSS] - row["collapse/entropy"]
