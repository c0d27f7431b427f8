"""Does vocabulary regularisation prevent the collapse?

The fifth recommendation of the troubleshooting report and its four options, beside three known from
the literature and a bias, each added to the report's model with decoupled decay (healthy) and with
its own coupled decay (collapses). `experiments/regularisers.py` has the formulas:

    label_smoothing 0.1     the report's first option and weight
    frequency_penalty 0.1   its second: 0.1 nats for each nat of a prediction's log frequency
    entropy_bonus 1         its third, 1 - entropy / ln V: 1 / ln V = 0.13 a nat of entropy with
                            2048 tokens, near the 0.1 of the confidence penalty
    diversity_bonus 0.5     its fourth: half a nat for the probability of tokens seen in the window
    coverage 1              KL(unigram || mean prediction), on the scale of the cross-entropy
    z_loss 0.0001           PaLM's
    unlikelihood 1          alpha of arXiv 1908.04319
    unigram_bias            no term: a bias of the logits that starts at the log unigram

The report gives no weight for its options 2 to 4; those above are choices. What raises the number
of distinct tokens and does not lower the loss is cosmetic; what brings the loss to the unigram's
while predictions ignore the context masks the collapse.

    python -m experiments.sweep_regularisers --seeds 0-4           # 21 min on 1 core

Goes when nobody proposes a term of the loss against this collapse any more.
"""

import math

import scipy.stats

from bitnet_jax import verdict
from bitnet_jax.metrics import DISTINCT, GREEDY_REP_4, LOSS, MUTUAL_INFORMATION
from bitnet_jax.train import Seams
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import SEEDS, cured, difference, holm, interval, of, seeds, values
from experiments.lab.studies import QUICK, SMALL
from experiments.regularisers import regularised_loss

WEIGHTS = {  # the report's four options first
    "label_smoothing": 0.1,
    "frequency_penalty": 0.1,
    "entropy_bonus": 1.0,
    "diversity_bonus": 0.5,
    "coverage": 1.0,
    "z_loss": 1e-4,
    "unlikelihood": 1.0,
}
KINDS, BIAS = ("decoupled", "coupled"), "unigram_bias"
HEALTHY, COLLAPSED = "decoupled none", "coupled none"
REGULARISED = Seams(loss=regularised_loss)


def arms(kind: str) -> list[Arm]:
    """A recipe without a regulariser, with each of the terms, and with the bias."""
    return [
        Arm(f"{kind} none", kind, seams=REGULARISED),
        *(
            Arm(f"{kind} {name}", kind, extra={name: weight}, seams=REGULARISED)
            for name, weight in WEIGHTS.items()
        ),
        Arm(f"{kind} {BIAS}", kind, fields={"model.output_bias": True}, seams=REGULARISED),
    ]


ARMS = tuple(arm for kind in KINDS for arm in arms(kind))
PAIRS = [(f"{kind} {name}", f"{kind} none") for kind in KINDS for name in (*WEIGHTS, BIAS)]


def ended_by_none(df) -> bool:
    arms_ = [f"coupled {name}" for name in ("none", *WEIGHTS, BIAS)]
    return not any(cured(df, arm, HEALTHY).any() for arm in arms_)


def terms_are_small(df) -> bool:
    changes = [difference(df, f"coupled {name}", COLLAPSED) for name in WEIGHTS]
    return all(change.within(-0.2, 0.2) for change in changes) and difference(
        df, HEALTHY, COLLAPSED
    ).within(-math.inf, -1)


def masked(df) -> bool:
    """Whether the bias brings the coupled recipe below the unigram's loss, blind to the context."""
    arm = f"coupled {BIAS}"
    if cured(df, arm, HEALTHY).any():
        return False
    excess = interval(values(df, arm, LOSS) - of(df, arm)["unigram"])
    return excess.below and (values(df, arm, MUTUAL_INFORMATION) < verdict.BLIND).all()


CLAIMS = (
    Claim(
        "none",
        "no added term, nor a unigram bias, ends the coupled collapse by when AdamW has learned",
        ended_by_none,
        QUICK,
    ),
    Claim(
        "small",
        "each of seven terms moves the coupled loss by less than 0.2 nats, AdamW by more than 1",
        terms_are_small,
        QUICK,
    ),
    Claim(
        "masked",
        "a bias that starts at the unigram masks the collapse: below the unigram, blind to context",
        masked,
        QUICK,
    ),
    Claim(
        "healthy",
        "with AdamW, no regulariser moves the loss by more than 0.15 nats",
        lambda df: all(difference(df, a, b).within(-0.15, 0.15) for a, b in PAIRS if b == HEALTHY),
        QUICK,
    ),
)


def p_values(df) -> dict[str, float]:
    """Holm-adjusted p of every change of the loss that has rows, by paired t tests."""
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= set(df["arm"])]
    changes = [(values(df, a, LOSS) - values(df, b, LOSS)).dropna() for a, b in pairs]
    p = [float(scipy.stats.ttest_1samp(change, 0.0).pvalue) for change in changes]
    return dict(zip((a for a, _ in pairs), holm(p), strict=True))


def show(df, exhibits) -> None:
    keys = (LOSS, MUTUAL_INFORMATION, DISTINCT, GREEDY_REP_4)
    exhibits.differences(df, PAIRS, keys, "Against the same recipe without")
    if seeds(df) >= SEEDS:
        table_rows = [[arm, f"{p:.3f}"] for arm, p in p_values(df).items()]
        exhibits.grid("The change of the loss", ["arm", "p (Holm)"], table_rows, "Paired t tests.")
    exhibits.table(df)
    exhibits.dots(df, LOSS)
    exhibits.dots(df, MUTUAL_INFORMATION)


if __name__ == "__main__":
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=SMALL)
