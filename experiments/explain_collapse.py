"""What collapses the coupled recipe: which factor, and by how much more than any other?

Full factorial, the same seeds and batches in every arm: decay {coupled, decoupled} x its amount
{0.1, 0.001} x weights and activations {quantised, full precision} x decay on {everything, matrices}
x decay in stage 2 {half of stage 1's, none}; and the rivals, each alone on the decoupled recipe: a
head that is never updated, a learning rate 100 times too low, a decay that is not multiplied by the
learning rate. Two effects of a factor: changed alone from the coupled recipe, and averaged over all
settings of the others. The interaction of ternary weights and coupling is an effect of its own.

    python -m experiments.explain_collapse --seeds 0-4             # 54 min on 1 core

Goes when the critical amount of coupled decay explains the factors.
"""

import itertools

from bitnet_jax import charts
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS, MUTUAL_INFORMATION, metric
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.exhibits import signed, triple
from experiments.lab.experiment import experiment
from experiments.lab.faulty import FAULTY, SOUND, rates
from experiments.lab.measures import large_weights
from experiments.lab.stats import difference, interval, mean, values
from experiments.lab.studies import BOOKS, QUICK, SMALL

# Each factor: the report's level first. A level is its name in an arm.
FACTORS = {
    "decay enters": ("coupled", "decoupled"),
    "amount": ("0.1", "0.001"),
    "arithmetic": ("ternary", "full"),
    "decay on": ("all", "matrices"),
    "stage-2 decay": ("half", "none"),
}
NAMES = tuple(FACTORS)
REPORT = tuple(levels[0] for levels in FACTORS.values())
HEALTHY = ("decoupled", *REPORT[1:])
RIVALS = ("head frozen", "rate 100x low", "decay without rate")
OUTCOMES = (LOSS, ENTROPY, MUTUAL_INFORMATION, LOGIT_STD, DISTINCT)


def make_arm(levels: tuple[str, ...]) -> Arm:
    kind, amount, arithmetic, target, late = levels
    quantised, decay = float(arithmetic == "ternary"), float(amount)
    return Arm(
        ", ".join(levels),
        kind,
        decay_rest=float(target == "all"),
        weight_quant=quantised,
        act_quant=quantised,
        **{f"{kind}_1": decay, f"{kind}_2": decay / 2 if late == "half" else 0.0},
    )


def rival(name: str, extra: dict, **numbers) -> Arm:
    return Arm(name, "decoupled", extra=SOUND | extra, seams=FAULTY, **numbers)


ARMS = (
    *(make_arm(levels) for levels in itertools.product(*FACTORS.values())),
    rival("head frozen", {"head_frozen": 1.0}),
    rival("rate 100x low", {}, **rates(0.01)),
    rival("decay without rate", {"unscaled_1": 0.1, "unscaled_2": 0.05}, decoupled_1=0.0,
          decoupled_2=0.0),
)  # fmt: skip


def measure(run) -> dict[str, list]:
    return {"above_1.1": large_weights(run)}


def swapped(levels: tuple[str, ...], factor: str) -> tuple[str, ...]:
    """`levels` with one factor at its other level."""
    at, both = NAMES.index(factor), FACTORS[factor]
    return (*levels[:at], both[1 - both.index(levels[at])], *levels[at + 1 :])


def alone(df, factor: str, key: str = LOSS):
    """Paired effect of changing one factor, and nothing else, of the coupled recipe."""
    return difference(df, ", ".join(swapped(REPORT, factor)), ", ".join(REPORT), key)


def averaged(df, factor: str, key: str = LOSS):
    """Effect of a factor averaged over all settings of the others: one number per seed."""
    first = [x for x in itertools.product(*FACTORS.values()) if x[NAMES.index(factor)] in REPORT]
    changes = [
        values(df, ", ".join(swapped(levels, factor)), key) - values(df, ", ".join(levels), key)
        for levels in first
    ]
    return interval(sum(changes) / len(changes))


def interaction(df, amount: str = "0.1"):
    """How much more decoupling changes the loss of the ternary than of the full-precision model."""
    levels = (REPORT[0], amount, *REPORT[2:])
    ternary, full = (
        values(df, ", ".join(swapped(x, "decay enters")), LOSS) - values(df, ", ".join(x), LOSS)
        for x in (levels, swapped(levels, "arithmetic"))
    )
    return interval(ternary - full)


def large(df, arm: str) -> float:
    return mean(df, arm, "above_1.1/all").mean


def most(df) -> bool:
    """Whether each of two factors lowers the loss, on average, by more than any other."""
    first, others = NAMES[:2], NAMES[2:]
    return max(averaged(df, f).high for f in first) < min(averaged(df, f).low for f in others)


CLAIMS = (
    Claim(
        "most",
        "of five factors, decoupling the decay and 1/100 of it lower the loss by most, on average",
        most,
        *(BOOKS, QUICK),
    ),
    Claim(
        "others",
        "sparing embedding and head, no stage-2 decay and full precision each lower the loss, too",
        lambda df: all(alone(df, f).below for f in ("decay on", "stage-2 decay", "arithmetic")),
        *(BOOKS, QUICK),
    ),
    Claim(
        "amplified",
        "ternary weights amplify the harm of coupled decay of 0.1, by more than 0.1 nats",
        lambda df: interaction(df).high < -0.1,
        *(BOOKS, QUICK),
    ),
    Claim(
        "harmless",
        "of an amount of 0.001, how it enters moves the loss by under 0.15 nats, ternary or not",
        lambda df: all(
            difference(df, ", ".join(swapped(x, "decay enters")), ", ".join(x)).within(-0.15, 0.15)
            for x in itertools.product(("coupled",), ("0.001",), *list(FACTORS.values())[2:])
        ),
        *(BOOKS, QUICK),
    ),
    Claim(
        "rivals",
        "each rival fault leaves another number of weights above 1.1, by a quarter or more",
        lambda df: all(abs(large(df, r) / large(df, ", ".join(REPORT)) - 1) > 0.25 for r in RIVALS),
        *(BOOKS, QUICK),
    ),
)


def show(df, exhibits) -> None:
    table_rows = []
    for factor, (before, after) in FACTORS.items():
        for kind, effect in (("alone", alone), ("averaged", averaged)):
            cells = [signed(effect(df, factor, key), metric(key).format) for key in OUTCOMES]
            table_rows.append([f"{factor}: {before} to {after}, {kind}", *cells])
    exhibits.grid("Effects", ["change", *(metric(key).title for key in OUTCOMES)], table_rows)
    table_rows = [[amount, signed(interaction(df, amount), ".2f")] for amount in FACTORS["amount"]]
    note = (
        "What decoupling changes of the ternary model's loss, less what it does in full precision."
    )
    exhibits.grid("Ternary weights x coupling", ["amount of decay", "nats"], table_rows, note)
    shown = df[df["arm"].isin([", ".join(REPORT), ", ".join(HEALTHY), *RIVALS])]
    exhibits.table(shown, (*OUTCOMES, ("above_1.1/all", "|w| > 1.1", ",.0f")), title="Rivals")
    exhibits.table(df)
    dots = [
        (f, {"alone": triple(alone(df, f)), "averaged": triple(averaged(df, f))}) for f in NAMES
    ]
    svg = charts.dot_plot(dots, title="Effect of each factor", references=[("none", 0.0)],
                          xlabel="change of held-out loss, nats")  # fmt: skip
    exhibits.drawing(svg, "95 % intervals over seeds.")


if __name__ == "__main__":
    experiment(__doc__, ARMS, measure, CLAIMS, show, seeds="0-2", quick=SMALL)
