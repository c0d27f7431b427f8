"""The signature of each cause: which numbers of `audit` point to it, and how strongly. Pure.

A cause is one of three kinds.

IDENTITY   sound code obeys it, and breaking it has a measured effect; judged always
MECHANISM  keeps a model from learning; judged while the model has not learned
SYMPTOM    what a mechanism leads to; judged once weights have had time to move
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitnet_jax import metrics, verdict

IDENTITY, MECHANISM, SYMPTOM = range(3)

NEEDED_RATE = 0.02  # sum of learning rates that a healthy run needs to learn word frequencies
ROUNDING = 1e-3  # relative error of a factor or of a loss that rounding does not explain
LABEL_MARGIN = 0.1  # nats between the offset that is nearest to the loss and the sound one
SAME_LOSS = 1e-4  # nats within which an offset gives the loss itself and needs hardly a margin
# Share of ternary matrices' update that is decay. Width 64, 400 steps: coupled 0.1 0.5 (context
# lost), 0.01 0.39, 0.001 0.26, 0.0001 0.05 (learned); decoupled 0.1 0.03.
DECAY_SHARE, DECAY_FULL = 0.1, 0.45
UNUSED_MASS = 0.1  # probability on tokens that the text does not have
EARLIER_TOKENS = 0.02  # nats that the tokens before the last one are worth, in a model that reads


@dataclass(frozen=True)
class Cause:
    """What may be wrong, from the numbers `m` of `audit.measure`; `score` is 0 where it is not."""

    name: str
    kind: int
    next: str  # what to do about it
    needs: tuple[str, ...]  # numbers that score and evidence read
    score: Callable[[dict], float]
    evidence: Callable[[dict], str]
    explains: tuple[str, ...] = ()  # causes that follow from this one


def learned(m: dict) -> bool:
    """`verdict.learned` of the large block."""
    keys = (metrics.MINUS_UNIGRAM, metrics.MINUS_UNIGRAM_SE, metrics.HELD_OUT_MUTUAL_INFORMATION)
    return bool(verdict.learned({key: m[key.partition("/")[2]] for key in keys}, {}))


def late(m: dict) -> bool:
    """Whether weights had time to move; a model without a schedule counts as finished."""
    return m.get("sum_lr", math.inf) >= verdict.LATE


def by_group(m: dict, prefix: str) -> dict[str, float]:
    """The numbers of one kind by parameter group: `by_group(m, "update")["head"]`."""
    return {k.removeprefix(f"{prefix}_"): x for k, x in m.items() if k.startswith(f"{prefix}_")}


def output_group(m: dict) -> str:
    """The group of the matrix that makes the logits."""
    return "head" if "update_head" in m else "embedding"


def decay_effect(m: dict) -> float:
    """0, or how much of the update of the ternary matrices is decay, 1 from DECAY_FULL on: rows of
    embedding and head whose tokens are rare get little but decay, harmlessly, and do not count."""
    share = m["decay_share_matrix"]
    return share / DECAY_FULL if share > DECAY_SHARE else 0.0


def coupled(m: dict) -> float:
    """Without gradients, weights change by unequal factors, with an effect."""
    unequal = max(by_group(m, "decay_spread").values()) > ROUNDING
    return decay_effect(m) if unequal else 0.0


def unscaled(m: dict) -> float:
    """Weights change at learning rate 0, with an effect."""
    moves = max(by_group(m, "decay_unscaled").values()) > ROUNDING
    return decay_effect(m) if moves else 0.0


def decay_evidence(m: dict) -> str:
    return (
        f"{m['decay_share_matrix']:.0%} of the update of the ternary matrices is decay; updates "
        f"without gradients leave {m['decay_factor_matrix']:.3g} of them"
    )


def shifted(m: dict) -> bool:
    """Another offset gives the loss in every batch, to the digit or by a margin; 1 does not."""
    offset_error, margin = m["offset_error"], m["loss_error"] - m["offset_error"]
    needed = 100 * SAME_LOSS if offset_error < SAME_LOSS else LABEL_MARGIN
    return m["offset"] != 1 and margin > needed and offset_error < 0.1 * margin


def output_still(m: dict) -> bool:
    """The output matrix gets hardly an update although the ternary weights do."""
    return m[f"update_{output_group(m)}"] < ROUNDING * m["update_matrix"]


def still_groups(m: dict) -> list[str]:
    """Groups without any update, unless nothing is updated; the output matrix has its own cause."""
    updates, output = by_group(m, "update"), output_group(m)
    return [g for g, x in updates.items() if x == 0 < max(updates.values()) and g != output]


def out_of_reach(m: dict) -> float:
    reach = m["planned_lr"] / m["start_latent"]
    return reach < 1 <= m["planned_lr"] / NEEDED_RATE and math.log(1 / reach, 4)


def below_eps(m: dict) -> float:
    return max(m["below_eps_matrix"], m[f"below_eps_{output_group(m)}"])


def quantiser_error(m: dict) -> float:
    return max(m["ste_weight"], m["ste_activation"])


def context_ignored(m: dict) -> bool:
    return m["mutual_information"] < verdict.BLIND / 2 and m["earlier_tokens"] < EARLIER_TOKENS


SYMPTOMS = (
    "probability on unused tokens",
    "learning rate too high",
    "logits too small",
    "context ignored",
    "only the last token used",
    "cannot overfit one batch",
)
BLOCKED = (*SYMPTOMS, "no gradient for the ternary weights")  # what follows when nothing is learned
DECAYED = ("dead ternary matrices", "updates below Adam's eps", "stifling clip", *BLOCKED)

DATA = (
    Cause(
        "weights are not finite",
        IDENTITY,
        "find the first step with a NaN in the log; fork from the checkpoint before it",
        ("nonfinite",),
        lambda m: m["nonfinite"] > 0,
        lambda m: f"{m['nonfinite']:.2%} of the weights are NaN or infinite",
        ("dead ternary matrices", *BLOCKED),
    ),
    Cause(
        "repeated batches",
        IDENTITY,
        "look at how batches follow from the step; train on fresh windows",
        ("repeated",),
        lambda m: m["repeated"] > 0.1 and m["repeated"] / 0.5,
        lambda m: f"{m['repeated']:.0%} of the windows of the first batches were served before",
        ("repeated text", *BLOCKED),
    ),
    Cause(
        "shifted labels",
        IDENTITY,
        "look where targets are cut from the window: shift them once",
        ("offset", "offset_error", "loss_error"),
        shifted,
        lambda m: (
            f"the training loss is that of x[t + {m['offset']}], and {m['loss_error']:.2g} nats "
            "from that of x[t + 1]"
        ),
        ("another loss", *BLOCKED),
    ),
    Cause(
        "padding is scored",
        IDENTITY,
        "give padding weight 0 in the loss",
        ("padding_scored",),
        lambda m: m["padding_scored"] > 0.02 and m["padding_scored"] / 0.1,
        lambda m: f"{m['padding_scored']:.0%} of the scored targets are padding",
        ("another loss", "repeated text", *BLOCKED),
    ),
    Cause(
        "repeated text",
        MECHANISM,
        "remove copies from the text; hold out documents, not windows",
        ("repeated_text", "overconfidence"),
        lambda m: m["repeated_text"] > 0.4 and m["overconfidence"] > 0.5 and 0.5,
        lambda m: f"{m['repeated_text']:.0%} of the windows of the training text are copies",
        ("learning rate too high",),
    ),
)
MODEL = (
    Cause(
        "later tokens are seen",
        IDENTITY,
        "look at the attention mask: position t may see x[0] to x[t] alone",
        ("future_leak",),
        lambda m: m["future_leak"] > verdict.LEAK,
        lambda m: f"a changed token moves earlier logits by {m['future_leak']:.2g} of their spread",
        BLOCKED,
    ),
    Cause(
        "another loss",
        MECHANISM,
        "compare the loss of a step with the cross-entropy of x[t + 1], term by term",
        ("loss_error",),
        lambda m: 0.5 * (m["loss_error"] > 10 * ROUNDING),
        lambda m: f"the training loss is {m['loss_error']:.2g} nats from the one computed here",
    ),
    Cause(
        "no straight-through gradient",
        IDENTITY,
        "give the quantiser its identity gradient",
        ("ste_weight", "ste_activation"),
        lambda m: quantiser_error(m) > ROUNDING and 10 * quantiser_error(m),
        lambda m: f"the gradient of the quantiser is off by {quantiser_error(m):.2g}",
        ("weights not updated", *BLOCKED),
    ),
    Cause(
        "dead ternary matrices",
        IDENTITY,
        "look at the latent weights and scales of the named matrices; inspect lists them",
        ("dead_matrices", "zero_rate_most"),
        lambda m: m["dead_matrices"] > 0 and 0.5 + 0.5 * m["dead_matrices"],
        lambda m: (
            f"{m['dead_matrices']:.0%} of the ternary matrices have one code; the largest share "
            f"of zeros is {m['zero_rate_most']:.1%}"
        ),
        BLOCKED,
    ),
    Cause(
        "logits scaled down",
        MECHANISM,
        "remove the factor on the logits, or the division by sqrt(d)",
        ("start_gain", "scale"),
        lambda m: m["start_gain"] < 0.5 and math.log(1 / m["start_gain"], 4),
        lambda m: (
            f"at the start logits spread {m['start_gain']:.3g} times as far as hidden state and "
            f"output matrix give; their best scale now is {m['scale']:.2g}"
        ),
        BLOCKED,
    ),
)
OPTIMISER = (
    Cause(
        "decay through Adam",
        MECHANISM,
        "decouple: add the decay after Adam (optax.adamw), not to the gradient; or take a smaller",
        ("decay_share_matrix", "decay_spread_matrix"),
        coupled,
        lambda m: decay_evidence(m) + ", and of small weights less than of large ones",
        DECAYED,
    ),
    Cause(
        "decay not scaled by the learning rate",
        MECHANISM,
        "multiply the decay by the learning rate",
        ("decay_share_matrix", "decay_unscaled_matrix"),
        unscaled,
        lambda m: (
            decay_evidence(m)
            + f", and at learning rate 0 move them by {m['decay_unscaled_matrix']:.2g}"
        ),
        DECAYED,
    ),
    Cause(
        "output matrix not updated",
        IDENTITY,
        "look for the output matrix in the optimiser's masks and rates",
        ("update_matrix",),
        output_still,
        lambda m: (
            f"the next update of the {output_group(m)} is {m[f'update_{output_group(m)}']:.2g} of "
            f"its size, that of the ternary weights {m['update_matrix']:.2g}"
        ),
        BLOCKED,
    ),
    Cause(
        "weights not updated",
        IDENTITY,
        "look for these parameters in the optimiser's masks, and for a stop_gradient before them",
        ("update_matrix",),
        lambda m: 0.8 * bool(still_groups(m)),
        lambda m: f"the next update of {' and '.join(still_groups(m))} is 0",
        BLOCKED,
    ),
    Cause(
        "latent weights out of reach",
        MECHANISM,
        "initialise latent weights near 1/sqrt(fan-in) or 0.02",
        ("planned_lr", "start_latent", "codes_changed"),
        out_of_reach,
        lambda m: (
            f"all learning rates sum to {m['planned_lr'] / m['start_latent']:.2g} of the mean "
            f"latent weight at the start; {m['codes_changed']:.1%} of the codes have changed"
        ),
        ("only the last token used", "cannot overfit one batch", "context ignored"),
    ),
    Cause(
        "learning rate too small",
        MECHANISM,
        "raise the peak rate or train longer; print the schedule's sum",
        ("planned_lr",),
        lambda m: (
            m["planned_lr"] < NEEDED_RATE
            and (m["planned_lr"] <= 0 or math.log(NEEDED_RATE / m["planned_lr"], 4))
        ),
        lambda m: (
            f"all learning rates sum to {m['planned_lr']:.2g}, {NEEDED_RATE} are needed for word "
            "frequencies alone"
        ),
        BLOCKED,
    ),
    Cause(
        "stifling clip",
        MECHANISM,
        "raise optim.clip_norm: gradients are scaled to it whatever their size",
        ("clip_factor", "below_eps_matrix", "update_matrix"),
        lambda m: m["clip_factor"] < 0.01 and max(0.3, below_eps(m)),
        lambda m: (
            f"clipping leaves {m['clip_factor']:.2g} of the gradient; {below_eps(m):.0%} of the "
            "weights are then below Adam's eps"
        ),
        ("updates below Adam's eps", *BLOCKED),
    ),
    Cause(
        "updates below Adam's eps",
        MECHANISM,
        "lower optim.eps, or look for what makes gradients small",
        ("below_eps_matrix", "update_matrix"),
        lambda m: below_eps(m) > 0.5 and below_eps(m),
        lambda m: f"the root of the second moment is below eps for {below_eps(m):.0%} of a matrix",
        BLOCKED,
    ),
    Cause(
        "no gradient for the ternary weights",
        MECHANISM,
        "look for a stop_gradient or dead activations",
        ("zeros_matrix",),
        lambda m: 0.4 * (m["zeros_matrix"] > 0.99),
        lambda m: f"the gradient of {m['zeros_matrix']:.0%} of them is exactly zero",
        SYMPTOMS,
    ),
)
OUTCOME = (
    Cause(
        "learning rate too high",
        SYMPTOM,
        "lower the peak rate, lengthen the warm-up, enlarge the batch",
        ("overconfidence",),
        lambda m: 0.4 * (m["minus_unigram"] > 0 and m["overconfidence"] > 0.5),
        lambda m: (
            f"loss is {m['overconfidence']:.2f} above the entropy, "
            f"{m['minus_unigram']:.2f} above the unigram's"
        ),
    ),
    Cause(
        "logits too small",
        SYMPTOM,
        "look at what decays or scales the output matrix; compare norms with the start",
        ("scale", "scale_gain"),
        lambda m: 0.3 * (m["minus_unigram"] > 0 and m["scale"] > 1 and m["scale_gain"] > 0.3),
        lambda m: f"logits times {m['scale']:.2g} gain {m['scale_gain']:.2f} nats",
        ("context ignored",),
    ),
    Cause(
        "context ignored",
        SYMPTOM,
        "look at norms, attention mask and order of the targets",
        ("mutual_information", "earlier_tokens"),
        lambda m: 0.3 * context_ignored(m),
        lambda m: (
            f"mutual information {m['mutual_information']:.3f} nats, other tokens before the last "
            f"one cost {m['earlier_tokens']:.3f}"
        ),
    ),
    Cause(
        "only the last token used",
        SYMPTOM,
        "look at attention and at code flips: is the trunk learning?",
        ("mutual_information", "earlier_tokens"),
        lambda m: (
            0.2 * (m["mutual_information"] > verdict.BLIND and m["earlier_tokens"] < EARLIER_TOKENS)
        ),
        lambda m: f"other tokens before the last one cost {m['earlier_tokens']:.3f} nats",
    ),
    Cause(
        "cannot overfit one batch",
        SYMPTOM,
        "switch parts off until 200 steps on one batch end below 2 nats",
        ("overfit_loss", "overfit_limit", "overfit_steps"),
        lambda m: 0.2 * (m["overfit_loss"] > m["overfit_limit"]),
        lambda m: f"loss {m['overfit_loss']:.2f} after {m['overfit_steps']} steps on it alone",
    ),
    Cause(
        "probability on unused tokens",
        SYMPTOM,
        "train a tokenizer on this text, or use more text",
        ("unused_vocabulary", "unused_mass"),
        lambda m: 0.3 * (m["unused_mass"] > UNUSED_MASS),
        lambda m: (
            f"{m['unused_mass']:.0%} of the probability goes to the {m['unused_vocabulary']:.0%} "
            "of the vocabulary that never occur in the text"
        ),
    ),
)
CAUSES = (*DATA, *MODEL, *OPTIMISER, *OUTCOME)
