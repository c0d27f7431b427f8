"""What do ternary weights and int8 activations cost, by width and length?

The published recipe beside its twin in full precision, the same seeds and batches, at three widths
and three lengths: the paired difference of their held-out losses. Learning rate and decay are those
of the recipe at every width and in both arithmetics; a rate tuned for each could move the price.

    python -m experiments.ternary_price --seeds 0-4    # 30 min on 1 core

Goes when the price is measured at a size that somebody would use.
"""

from bitnet_jax import charts
from bitnet_jax.metrics import LOSS
from experiments.lab.arms import Arm, times_width
from experiments.lab.claims import Claim
from experiments.lab.exhibits import signed, triple
from experiments.lab.experiment import experiment
from experiments.lab.stats import NotEnough, difference, ended
from experiments.lab.studies import QUICK_B158, SIZE

WIDTHS = {"half the width": 0.5, "the width": 1.0, "twice the width": 2.0}
ARITHMETICS = {"ternary": {}, "full precision": {"weight_quant": 0.0, "act_quant": 0.0}}


ARMS = tuple(
    Arm(f"{width}, {arithmetic}", "published", fields=times_width(factor), **numbers)
    for width, factor in WIDTHS.items()
    for arithmetic, numbers in ARITHMETICS.items()
)


def price(df, width: str, steps: int):
    """Held-out loss of ternary above full precision, paired."""
    return difference(df, *(f"{width}, {x}" for x in ARITHMETICS), LOSS, steps)


def lengths(df) -> list[int]:
    return sorted(set(df["steps"]))


def learned_all(df) -> bool:
    return all(ended(df, arm.name, steps).all() for arm in ARMS for steps in lengths(df))


def below(df, most: float) -> bool:
    return all(price(df, width, t).high < most for width in WIDTHS for t in lengths(df))


def wider_is_cheaper(df) -> bool:
    """Whether twice the width pays less than half of it, at the longest length."""
    if len(lengths(df)) < 2:
        raise NotEnough("one length")
    narrow, _, wide = (price(df, width, lengths(df)[-1]) for width in WIDTHS)
    return wide.high < narrow.low


CLAIMS = (
    Claim("learned", "every run has learned, ternary or not", learned_all, QUICK_B158),
    Claim(
        "price",
        "ternary weights cost less than 0.2 nats at every width and length",
        lambda df: below(df, 0.2),
        QUICK_B158,
    ),
    Claim(
        "width",
        "after 3000 steps ternary weights cost less at twice the width than at half of it",
        wider_is_cheaper,
        QUICK_B158,
    ),
    Claim(
        "gain",
        "3000 steps, twice the width: ternary ends below full precision, at one learning rate",
        lambda df: price(df, "twice the width", lengths(df)[-1]).below,
        QUICK_B158,
    ),
)


def show(df, exhibits) -> None:
    heads = ["width", *(f"{steps} steps" for steps in lengths(df))]
    prices = {w: [price(df, w, steps) for steps in lengths(df)] for w in WIDTHS}
    cells = [[w, *(signed(x, ".3f") for x in by_length)] for w, by_length in prices.items()]
    note = "Held-out loss, nats: ternary less full precision, paired; 95 % intervals over seeds."
    exhibits.grid("The price", heads, cells, note)
    for steps in lengths(df):
        exhibits.table(df[df["steps"] == steps], title=f"{steps} steps")
    dots = [
        (w, {f"{t} steps": triple(x) for t, x in zip(lengths(df), by_length, strict=True)})
        for w, by_length in prices.items()
    ]
    svg = charts.dot_plot(
        dots, title="Price of ternary weights", references=[("none", 0.0)], xlabel="nats"
    )
    exhibits.drawing(svg, "95 % intervals over seeds.")


if __name__ == "__main__":
    quick = (*SIZE, "run.steps=300", "run.eval_every=50")
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=quick, lengths="1,3,10")
