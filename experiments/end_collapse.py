"""What ends the collapse? One line of the coupled recipe changed at a time, and the published one.

The coupled recipe beside itself with one line changed, at one length; and the published recipe in
its own layout, beside its twin in full precision, at three lengths. `learned`: a held-out loss
below the unigram's beyond doubt, by use of the context. The amount of coupled decay is not among
the lines: `shrink_law` varies it.

    python -m experiments.end_collapse                 # 20 min on 2 cores
    python -m experiments.end_collapse --preset report --seeds 0-4 --lengths 1

Goes when one study covers these lines, amounts and lengths together.
"""

from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS, MUTUAL_INFORMATION
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.exhibits import change
from experiments.lab.experiment import experiment
from experiments.lab.measures import first_below_unigram, large_weights
from experiments.lab.stats import (
    NotEnough,
    difference,
    ended,
    learned,
    mean,
    of,
    severe_share,
)
from experiments.lab.studies import BOOKS, FULL, TRACKED
from experiments.lab.studies import QUICK_TRACKED as QUICK

COUPLED, ADAMW, PUBLISHED = "coupled", "AdamW for Adam", "published"
MATRICES, NONE, STAGE_1 = "decay on matrices only", "no decay", "no decay in stage 2"
DENSE, TWIN = "full precision", "published in full precision"
LINES = (ADAMW, MATRICES, NONE, STAGE_1, DENSE)
OWN = {"model.layout": "b158", "model.tied_embedding": True, "model.rope_theta": 500_000.0}
OFF = {"weight_quant": 0.0, "act_quant": 0.0}
ARMS = (
    Arm(COUPLED),
    Arm(ADAMW, "decoupled", lengths=(1,)),
    Arm(MATRICES, decay_rest=0.0, lengths=(1,)),
    Arm(NONE, coupled_1=0.0, coupled_2=0.0, lengths=(1,)),
    Arm(STAGE_1, coupled_2=0.0, lengths=(1,)),
    Arm(DENSE, **OFF, lengths=(1,)),
    Arm(PUBLISHED, "published", fields=OWN),
    Arm(TWIN, "published", fields=OWN, **OFF),
)


def measure(run) -> dict[str, list]:
    return {"above_1.1": large_weights(run), "first_below_unigram": first_below_unigram(run)}


def lengths(df, arm: str) -> list[int]:
    found = sorted(set(df["steps"][df["arm"] == arm]))
    if not found:
        raise NotEnough(f"no rows of {arm}")
    return found


def at_longer(df, test) -> bool:
    """Whether a test of (df, steps) is true at every length but the shortest."""
    longer = lengths(df, PUBLISHED)[1:]
    if not longer:
        raise NotEnough("one length")
    return all(test(df, steps) for steps in longer)


def price(df, steps: int):
    """Loss of ternary weights and int8 activations above full precision, published recipe."""
    return difference(df, PUBLISHED, TWIN, LOSS, steps)


def more_distinct_late(df) -> bool:
    runs = [of(df, PUBLISHED, steps) for steps in lengths(df, PUBLISHED)]
    return all((r["unique_stage2"] >= r["unique_stage1"]).all() for r in runs)


CLAIMS = (
    Claim(
        "coupled",
        "the coupled recipe has not learned in any seed, at any length",
        lambda df: not any(ended(df, COUPLED, t).any() for t in lengths(df, COUPLED)),
        *(BOOKS, QUICK),
    ),
    Claim(
        "lower",
        "AdamW, no decay, and decay on matrices only each lower the loss by 0.5 nats or more",
        lambda df: all(difference(df, x, COUPLED).high < -0.5 for x in (ADAMW, NONE, MATRICES)),
        *(FULL, BOOKS, QUICK),
    ),
    Claim(
        "adamw",
        "AdamW for Adam, alone, ends the collapse in every seed",
        lambda df: ended(df, ADAMW).all(),
        *(BOOKS, QUICK),
    ),
    Claim(
        "dense",
        "full precision, alone, does not end it in any seed",
        lambda df: not ended(df, DENSE).any() and difference(df, DENSE, COUPLED).below,
        *(FULL, BOOKS, QUICK),
    ),
    Claim(
        "full-size",
        "after 1000 steps neither AdamW nor the published recipe is shown to have learned",
        lambda df: not (ended(df, ADAMW).any() or ended(df, PUBLISHED).any()),
        FULL,
    ),
    Claim(
        "published",
        "the published recipe has learned at every longer run, in every seed",
        lambda df: at_longer(df, lambda df, t: ended(df, PUBLISHED, t).all()),
        *(BOOKS, QUICK),
    ),
    Claim(
        "diverse",
        "the published recipe predicts as many distinct tokens in stage 2 as in stage 1 or more",
        more_distinct_late,
        *(FULL, BOOKS, QUICK),
    ),
    Claim(
        "price",
        "ternary weights cost the published recipe less than 0.2 nats at every length",
        lambda df: all(price(df, t).high < 0.2 for t in lengths(df, PUBLISHED)),
        *(FULL, BOOKS, QUICK),
    ),
)


def show(df, exhibits) -> None:
    first = int(df["steps"].min())
    there = set(df["arm"])
    lines = []
    for arm in (x for x in (COUPLED, *LINES, PUBLISHED) if x in there):
        rows = of(df, arm, first)
        cells = [
            mean(df, arm, key, first).text(spec)
            for key, spec in ((LOSS, ".2f"), (ENTROPY, ".2f"), (MUTUAL_INFORMATION, ".3f"))
        ]
        effect = "" if arm == COUPLED else change(df, arm, COUPLED, LOSS, first)
        good = f"{learned(rows).sum()} of {len(rows)}"
        severe = severe_share(df, arm, first).text(".1%")
        lines.append([arm, *cells, effect, good, severe])
    heads = ["one line changed", "loss", "entropy", "context MI", "change", "learned", "severe"]
    note = f"After {first} steps; change: paired with {COUPLED}; severe: share of all evaluations."
    exhibits.grid("Which line ends it", heads, lines, note)
    columns = (
        *(LOSS, ENTROPY, LOGIT_STD, DISTINCT),
        ("unique_stage1", "distinct, stage 1", ".1f"),
        ("unique_stage2", "stage 2", ".1f"),
        ("train_loss/mean", "training loss, mean", ".2f"),
        ("train_loss/final", "at the end", ".2f"),
        ("above_1.1/all", "|w| > 1.1", ",.0f"),
    )
    exhibits.table(df, columns)
    pairs = [(PUBLISHED, TWIN)]
    for steps in lengths(df, PUBLISHED) if PUBLISHED in there else ():
        title = f"The price of ternary weights, {steps} steps"
        exhibits.differences(df, pairs, (LOSS, MUTUAL_INFORMATION), title, steps)
    exhibits.dots(df[df["steps"] == first], LOSS)
    for steps in lengths(df, COUPLED):
        exhibits.curves(df, LOSS, steps=steps)
        exhibits.curves(df, DISTINCT, steps=steps)


if __name__ == "__main__":
    experiment(
        __doc__, ARMS, measure, CLAIMS, show, seeds="0-2", quick=(*TRACKED, "run.steps=200",
        "run.eval_every=10"), lengths="1,10,20",
    )  # fmt: skip
