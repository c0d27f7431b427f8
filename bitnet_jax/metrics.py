"""The one list of metrics: what each number of a run is called, measured in, and means.

Logs, tables, charts and pages read it, in this order. A key that ends in `_` is a family: its
members put a name behind it (`decay/norm_ratio_head`), and `metric` finds them.

eval/ collapse/ track/   every evaluation (the small block)
held_out/                the stage boundary and the end (the large block), with standard errors
train/ decay/ quant/     the last step before an evaluation
decode/                  continuations of held-out beginnings at the end of a run
"""

import difflib
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    `format` is a Python format specification. `better` is -1 where less is better, +1 where more
    is, 0 where neither is. `reference` is the field of each predictor in config.json's
    `references` that this number is compared with. `chart` is the title of its chart, `log`
    whether that has a logarithmic axis.
    """

    key: str
    title: str
    unit: str
    format: str
    better: int
    reference: str | None
    meaning: str
    chart: str = ""
    log: bool = False

    @property
    def chart_title(self) -> str:
        return self.chart or self.title[:1].upper() + self.title[1:]


LOSS, BITS_PER_BYTE = "eval/loss", "eval/bits_per_byte"
DISTINCT, DISTINCT_TARGETS = "collapse/unique_tokens", "collapse/unique_targets"
MODE_SHARE, TOP_1 = "collapse/mode_share", "collapse/concentration"
ENTROPY, OVERCONFIDENCE = "collapse/entropy", "collapse/overconfidence"
LOGIT_STD, UNIGRAM_KL = "collapse/logit_std", "collapse/unigram_kl"
MUTUAL_INFORMATION = "collapse/mutual_information"
TRACK_LOSS, TRACK_ENTROPY = "track/loss", "track/entropy"
HELD_OUT_LOSS, HELD_OUT_LOSS_SE = "held_out/loss", "held_out/loss_se"
MINUS_UNIGRAM, MINUS_UNIGRAM_SE = "held_out/minus_unigram", "held_out/minus_unigram_se"
MINUS_BIGRAM, MINUS_BIGRAM_SE = "held_out/minus_bigram", "held_out/minus_bigram_se"
HELD_OUT_MUTUAL_INFORMATION = "held_out/mutual_information"
HELD_OUT_POSITIONS, FUTURE_LEAK = "held_out/positions", "held_out/future_leak"
TRAIN_LOSS, GRAD_NORM, LEARNING_RATE = "train/loss", "train/grad_norm", "train/lr"
NORM_RATIO, UPDATE_SHARE = "decay/norm_ratio_", "decay/update_share_"
UPDATE_COSINE = "decay/update_weight_cosine_"
ZERO_RATE, FLIP_RATE, WEIGHT_SCALE = "quant/zero_rate", "quant/flip_rate", "quant/scale_"
GREEDY_REP_4, SAMPLED_REP_4 = "decode/greedy_rep_4", "decode/sampled_rep_4"
TEXT_REP_4 = "decode/text_rep_4"

NATS, TOKENS, SHARE = "nats per token", "tokens", "share"
_LIST = (
    Metric(
        *(LOSS, "loss", NATS, ".3f", -1, "loss"),
        "Cross-entropy on held-out text: below the unigram predictor's the model uses context, "
        "near the uniform one's it knows nothing.",
        chart="Held-out loss",
    ),
    Metric(
        *(BITS_PER_BYTE, "bits / byte", "bits per byte", ".3f", -1, None),
        "The same loss per byte of text: comparable between tokenizers.",
    ),
    Metric(
        *(HELD_OUT_LOSS, "loss, large block", NATS, ".4f", -1, None),
        "Cross-entropy on a larger part of the held-out text.",
    ),
    Metric(
        *(HELD_OUT_LOSS_SE, "SE of loss", NATS, ".4f", 0, None),
        "Standard error of that loss over windows of text.",
    ),
    Metric(
        *(MINUS_UNIGRAM, "loss - unigram", NATS, "+.3f", -1, None),
        "Loss above the unigram predictor's on the same windows: negative where more than word "
        "frequencies is known.",
    ),
    Metric(
        *(MINUS_UNIGRAM_SE, "SE of loss - unigram", NATS, ".4f", 0, None),
        "Standard error of that paired difference over windows.",
    ),
    Metric(
        *(MINUS_BIGRAM, "loss - bigram", NATS, "+.3f", -1, None),
        "Loss above the bigram predictor's on the same windows: negative where more than the "
        "last token is used.",
    ),
    Metric(
        *(MINUS_BIGRAM_SE, "SE of loss - bigram", NATS, ".4f", 0, None),
        "Standard error of that paired difference over windows.",
    ),
    Metric(
        *(HELD_OUT_MUTUAL_INFORMATION, "context MI, large block", "nats", ".3f", +1, None),
        "Mutual information of context and prediction on the large block.",
    ),
    Metric(
        *(HELD_OUT_POSITIONS, "positions", "positions", ",.0f", 0, None),
        "Scored positions of the large block.",
    ),
    Metric(
        *(FUTURE_LEAK, "future leak", "logit spreads", ".2g", -1, None),
        "How far changed later tokens move earlier logits: 0 in a causal model; above it, the loss "
        "says nothing.",
    ),
    Metric(
        *(DISTINCT, "distinct", TOKENS, ".0f", 0, "distinct"),
        "Different most likely tokens over the tracked positions: word frequencies alone give 1 "
        "and noise gives many, so it says nothing without the loss.",
        chart="Distinct predictions",
        log=True,
    ),
    Metric(
        *(DISTINCT_TARGETS, "distinct targets", TOKENS, ".0f", 0, None),
        "Different next tokens of the text over the same positions.",
    ),
    Metric(
        *(MODE_SHARE, "mode share", SHARE, ".2f", 0, None),
        "Share of the tracked positions that get the commonest of these predictions.",
    ),
    Metric(
        *(TOP_1, "top-1 prob.", "probability", ".3f", 0, None),
        "Mean probability of the most likely token.",
    ),
    Metric(
        *(ENTROPY, "entropy", "nats", ".2f", 0, "entropy"),
        "Mean entropy of the predictions: at the uniform line every token is equally likely.",
    ),
    Metric(
        *(OVERCONFIDENCE, "loss - entropy", "nats", "+.2f", 0, None),
        "0 is calibrated; above it the model is over-confident, below it larger logits would "
        "lower the loss.",
    ),
    Metric(
        *(LOGIT_STD, "logit std", "standard deviation", ".2f", 0, None),
        "Spread of the logits over the vocabulary: fading to zero where the output head, or what "
        "feeds it, is being erased.",
        chart="Logit spread",
    ),
    Metric(
        *(MUTUAL_INFORMATION, "context MI", "nats", ".3f", +1, None),
        "Mutual information of context and prediction: at 0 the context is ignored; before "
        "training it is noise.",
        chart="Use of context",
    ),
    Metric(
        *(UNIGRAM_KL, "KL to unigram", "nats", ".2f", -1, None),
        "From the word frequencies of the training text to the mean prediction.",
    ),
    Metric(
        *(TRACK_LOSS, "tracked loss", NATS, ".3f", -1, None),
        "Cross-entropy on the tracked positions.",
    ),
    Metric(
        *(TRACK_ENTROPY, "tracked entropy", "nats", ".2f", 0, None),
        "Mean entropy of the predictions at the tracked positions.",
    ),
    Metric(
        *(TRAIN_LOSS, "training loss", NATS, ".3f", -1, None),
        "Cross-entropy of the step's own batch.",
    ),
    Metric(
        *(GRAD_NORM, "gradient norm", "before clipping", ".3g", 0, None),
        "Norm of the gradient of the loss.",
        log=True,
    ),
    Metric(
        *("train/update_norm", "update norm", "L2 norm", ".3g", 0, None),
        "Norm of the change of all parameters in the step.",
    ),
    Metric(
        *("train/param_norm", "parameter norm", "L2 norm", ".4g", 0, None),
        "Norm of all parameters.",
    ),
    Metric(
        *(LEARNING_RATE, "learning rate", "per step", ".3g", 0, None),
        "The schedule as it was applied.",
    ),
    Metric(
        *("train/weight_decay", "weight decay", "coefficient", ".3g", 0, None),
        "The decay as it was applied, coupled and decoupled together.",
    ),
    Metric(
        *("train/tokens", "training tokens", TOKENS, ",.0f", 0, None),
        "Tokens that were trained on so far.",
    ),
    Metric(
        *(UPDATE_COSINE, "update against weight", "cosine", "+.2f", 0, None),
        "Cosine of update and weight: at -1 the update does nothing but shrink the weights.",
    ),
    Metric(
        *(UPDATE_SHARE, "decay's part of the update", SHARE, ".2f", 0, None),
        "Size of the decay's part of an update over the sizes of its and the gradient's: at 1 "
        "nothing but decay.",
    ),
    Metric(
        *(NORM_RATIO, "weight norm", "share of initial", ".2f", 0, None),
        "How much of the initial norm is left.",
    ),
    Metric(
        *(ZERO_RATE, "zeros", "share of weights", ".2f", 0, None),
        "Share of the ternary weights that are 0 (0.31 for Gaussian weights).",
        chart="Ternary zeros",
    ),
    Metric(
        *(FLIP_RATE, "flips", "share of weights", ".4f", 0, None),
        "Share of the ternary weights that changed since the evaluation before.",
        chart="Ternary flips",
    ),
    Metric(
        *(WEIGHT_SCALE, "weight scale", "mean absolute value", ".3g", 0, None),
        "Mean absolute value of the ternary matrices' latent weights: the size of a code.",
    ),
    Metric(
        *(GREEDY_REP_4, "greedy repeats", SHARE, ".2f", 0, None),
        "Repeated 4-grams in the most likely continuation, token by token; small healthy models "
        "repeat themselves, too.",
    ),
    Metric(
        *(SAMPLED_REP_4, "sampled repeats", SHARE, ".2f", 0, None),
        "Repeated 4-grams in sampled continuations.",
    ),
    Metric(
        *(TEXT_REP_4, "the text's repeats", SHARE, ".2f", 0, None),
        "Repeated 4-grams in the text's own continuations.",
    ),
    Metric(
        *("decode/greedy_", "greedy", "", ".2f", 0, None),
        "The most likely continuation, token by token.",
    ),
    Metric(
        *("decode/sampled_", "sampled", "", ".2f", 0, None),
        "Continuations sampled at temperature 1.",
    ),
    Metric(
        *("decode/text_", "the text", "", ".2f", 0, None),
        "The text's own continuations.",
    ),
)
METRICS: dict[str, Metric] = {m.key: m for m in _LIST}


def metric(key: str) -> Metric:
    """The metric of a key, also of a member of a family, which carries its own name.

    `metric("decay/norm_ratio_head").title` is `weight norm: head`. Raises KeyError with the
    nearest key.
    """
    if key in METRICS:
        return METRICS[key]
    families = [k for k in METRICS if k.endswith("_") and key.startswith(k)]
    if not families:
        near = difflib.get_close_matches(key, METRICS, 1)
        raise KeyError(f"{key}: no such metric" + (f"; {near[0]}?" if near else ""))
    family = METRICS[max(families, key=len)]
    name = key.removeprefix(family.key).replace("_", " ")
    chart = f"{family.chart}: {name}" if family.chart else ""
    return replace(family, key=key, title=f"{family.title}: {name}", chart=chart)
