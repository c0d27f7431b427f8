"""What ends the collapse? One line of the coupled recipe changed at a time, and the published one.

The coupled recipe beside itself with one line changed, and beside the published recipe in its own
layout, at three lengths. `learned`: a held-out loss below the unigram's beyond doubt, by use of the
context. A line that has not learned in the shortest runs may only be slow: what recovers, and when,
is asked of the longer ones. At full size the coupled rows are those of `reproduce_report`, copied.

    python -m experiments.end_collapse --lengths 1     # 15 min on 1 core
    python -m experiments.end_collapse --preset report --seeds 0-4 --lengths 1

Goes when the critical amount of coupled decay explains which line helps, and when.
"""

from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS, MUTUAL_INFORMATION
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.exhibits import change
from experiments.lab.experiment import experiment
from experiments.lab.measures import large_weights
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
LESS, DENSE = "a hundredth of the decay", "full precision"
LEAST = "a 500th of the decay"  # below the predicted edge of 10,000 steps at full size
TWIN, OFF = "published in full precision", {"weight_quant": 0.0, "act_quant": 0.0}
LINES = (ADAMW, LESS, LEAST, MATRICES, NONE, STAGE_1, DENSE)
OWN = {"model.layout": "b158", "model.tied_embedding": True, "model.rope_theta": 500_000.0}
ARMS = (
    Arm(COUPLED),
    Arm(ADAMW, "decoupled"),
    Arm(LESS, coupled_1=0.001, coupled_2=0.0005),
    Arm(LEAST, coupled_1=0.0002, coupled_2=0.0001, lengths=(10,)),
    Arm(MATRICES, decay_rest=0.0),
    Arm(NONE, coupled_1=0.0, coupled_2=0.0),
    Arm(STAGE_1, coupled_2=0.0),
    Arm(DENSE, **OFF),
    Arm(PUBLISHED, "published", fields=OWN),
    Arm(TWIN, "published", fields=OWN, lengths=(1,), **OFF),
)


def measure(run) -> dict[str, list]:
    return {"above_1.1": large_weights(run)}


def lengths(df, arm: str) -> list[int]:
    steps = sorted(set(df["steps"][df["arm"] == arm]))
    if not steps:
        raise NotEnough(f"no rows of {arm}")
    return steps


def always(df, arms: tuple[str, ...], first: int = 0) -> bool:
    """Whether every seed of the arms has learned at every length from the `first` on."""
    if len(lengths(df, COUPLED)) <= first:
        raise NotEnough("one length")
    return all(ended(df, arm, t).all() for arm in arms for t in lengths(df, COUPLED)[first:])


def never(df, arms: tuple[str, ...], *, shortest: bool = False) -> bool:
    """Whether no seed of the arms has learned, at any length or at the shortest."""
    steps = lengths(df, COUPLED)[: 1 if shortest else None]
    return not any(ended(df, arm, t).any() for arm in arms for t in steps)


def more_distinct_late(df) -> bool:
    runs = [of(df, PUBLISHED, steps) for steps in lengths(df, PUBLISHED)]
    return all((r["unique_stage2"] >= r["unique_stage1"]).all() for r in runs)


CLAIMS = (
    Claim(
        "coupled",
        "the coupled recipe has not learned in any run",
        lambda df: never(df, (COUPLED,)),
        *(FULL, BOOKS, QUICK),
    ),
    Claim(
        "lower",
        "AdamW, no decay, and decay on matrices only each lower the loss by 0.5 nats or more",
        lambda df: all(difference(df, x, COUPLED).high < -0.5 for x in (ADAMW, NONE, MATRICES)),
        *(FULL, BOOKS, QUICK),
    ),
    Claim(
        "large",
        "AdamW for Adam, or a hundredth of the decay, lowers the loss of 1000 steps by 1.5 nats",
        lambda df: all(difference(df, x, COUPLED).high < -1.5 for x in (ADAMW, LESS)),
        FULL,
    ),
    Claim(
        "adamw",
        "AdamW for Adam, alone, ends the collapse: it has learned in every seed of longer runs",
        lambda df: always(df, (ADAMW,), 1),
        BOOKS,
    ),
    Claim(
        "less",
        "a hundredth of the decay, alone, ends the collapse in every run",
        lambda df: always(df, (LESS,)),
        *(BOOKS, QUICK),
    ),
    Claim(
        "recover",
        "decay on matrices only, or none in stage 2: learned in every seed of the longer runs",
        lambda df: always(df, (MATRICES, STAGE_1), 1),
        BOOKS,
    ),
    Claim(
        "slow",
        "decay on matrices only, or none in stage 2: learned in no seed of 1000 steps",
        lambda df: never(df, (MATRICES, STAGE_1), shortest=True),
        BOOKS,
    ),
    Claim(
        "dense",
        "full precision, alone, does not end it in any run",
        lambda df: never(df, (DENSE,)),
        *(BOOKS, QUICK),
    ),
    Claim(
        "full-size",
        "after 1000 steps the published recipe has learned in some seeds, and not in all",
        lambda df: len(set(ended(df, PUBLISHED, 1000))) == 2,
        FULL,
    ),
    Claim(
        "published",
        "the published recipe has learned in every run",
        lambda df: always(df, (PUBLISHED,)),
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
        "ternary weights cost the published recipe less than 0.2 nats after 1000 steps",
        lambda df: difference(df, PUBLISHED, TWIN, LOSS, 1000).high < 0.2,
        QUICK,
    ),
)


def line_effects(df, steps: int) -> list[list[str]]:
    """What each line changed gives at a length."""
    at_length = df[df["steps"] == steps]
    table_rows = []
    for arm in (x for x in (COUPLED, *LINES, PUBLISHED) if x in set(at_length["arm"])):
        numbers = [
            mean(df, arm, key, steps).text(spec)
            for key, spec in ((LOSS, ".2f"), (ENTROPY, ".2f"), (MUTUAL_INFORMATION, ".3f"))
        ]
        effect = "" if arm == COUPLED else change(df, arm, COUPLED, LOSS, steps)
        good = learned(of(df, arm, steps))
        severe = severe_share(df, arm, steps).text(".1%")
        table_rows.append([arm, *numbers, effect, f"{good.sum()} of {len(good)}", severe])
    return table_rows


def show(df, exhibits) -> None:
    heads = ["one line changed", "loss", "entropy", "context MI", "change", "learned", "severe"]
    note = f"Change: paired with {COUPLED}; severe: share of all evaluations."
    for steps in lengths(df, COUPLED):
        exhibits.grid(f"Which line ends it, {steps} steps", heads, line_effects(df, steps), note)
    columns = (
        *(LOSS, ENTROPY, LOGIT_STD, DISTINCT),
        ("unique_stage1", "distinct, stage 1", ".1f"),
        ("unique_stage2", "stage 2", ".1f"),
        ("train_loss/mean", "training loss, mean", ".2f"),
        ("train_loss/final", "at the end", ".2f"),
        ("above_1.1/all", "|w| > 1.1", ",.0f"),
    )
    exhibits.table(df, columns)
    for steps in lengths(df, COUPLED):
        exhibits.dots(df[df["steps"] == steps], LOSS)
        exhibits.curves(df, LOSS, steps=steps)
        exhibits.curves(df, DISTINCT, steps=steps)


if __name__ == "__main__":
    experiment(
        __doc__, ARMS, measure, CLAIMS, show, quick=(*TRACKED, "run.steps=1000",
        "run.eval_every=50", "run.save_every=1000"), lengths="1,3,10",
    )  # fmt: skip
