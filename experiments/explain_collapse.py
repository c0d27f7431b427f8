"""What collapses the report's run: which factor, and by how much more than any other?

Full factorial, the same batches and seeds in every arm: decay {coupled, decoupled} x weights and
activations {quantised, full precision} x decay on {everything, matrices} x stage-2 decay {0.05, 0}
x peak learning rate {1.5e-3, 5e-4}; and the rivals, each alone on the decoupled recipe: a head that
is never updated, a learning rate 100 times too low, a decay that is not multiplied by the learning
rate. Three readings: every factor changed alone from the report's recipe; its main effect over all
settings of the others; and which rival shows the report's signature (loss, entropy, and the number
of weights above 1.1, which the report counted).

Expected: decoupling, or sparing the embedding and the head, each ends the collapse; quantisation,
the stage-2 decay and the learning rate do not.

    python -m experiments.explain_collapse --preset quick
    python -m experiments.explain_collapse --preset report --seeds 0-4 --set data.tokenizer=gpt2 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz
"""

import itertools

from bitnet_jax import charts
from experiments import common, compare, page, stats, sweep
from experiments.weight_bounds import THRESHOLD, count_large

NAME = "explain_collapse"
# Each factor: the report's level first. A level is its name in an arm, and what it sets.
FACTORS = {
    "decay enters": ("coupled", "decoupled"),
    "arithmetic": ("ternary", "full"),
    "decay on": ("all", "matrices"),
    "stage-2 decay": ("0.05", "0"),
    "peak rate": ("1.5e-3", "5e-4"),
}
CHANGES = {  # what a factor's second level is, in words
    "decay enters": "decoupling the decay",
    "arithmetic": "full precision instead of ternary",
    "decay on": "decay on matrices only",
    "stage-2 decay": "no decay in stage 2",
    "peak rate": "a third of the learning rate",
}
REPORT = tuple(levels[0] for levels in FACTORS.values())
HEALTHY = ("decoupled", *REPORT[1:])
RIVALS = {
    "head frozen": {"head_lr": 0.0},
    "rate 100x low": {"lr_peak": 1.5e-5, "lr_stage1_end": 1e-5, "lr_stage2_start": 1e-5,
                      "lr_final": 1.5e-8},
    "decay without rate": {"unscaled_1": 0.1, "unscaled_2": 0.05, "decoupled_1": 0.0,
                           "decoupled_2": 0.0},
}  # fmt: skip
OUTCOMES = (
    ("eval/loss", "held-out loss", "+.2f"),
    ("collapse/entropy", "entropy", "+.2f"),
    ("collapse/mutual_information", "context MI", "+.3f"),
    ("collapse/logit_std", "logit std", "+.2f"),
    ("collapse/unique_tokens", "distinct", "+.0f"),
)
LOSS = "eval/loss"


def arm_name(levels: tuple[str, ...]) -> str:
    return ", ".join(levels)


def make_arm(levels: tuple[str, ...]) -> sweep.Arm:
    """The arm of one combination of levels."""
    kind, arithmetic, target, decay_2, rate = levels
    hyper = {
        f"{kind}_1": 0.1,
        f"{kind}_2": float(decay_2),
        "decay_rest": float(target == "all"),
        "weight_quant": float(arithmetic == "ternary"),
        "act_quant": float(arithmetic == "ternary"),
    }
    share = float(rate) / 1.5e-3
    rates = {"lr_peak": 1.5e-3, "lr_stage1_end": 1e-3, "lr_stage2_start": 1e-3, "lr_final": 1.5e-6}
    recipe = "report" if kind == "coupled" else "report_decoupled"
    return sweep.Arm(arm_name(levels), recipe, hyper | {k: v * share for k, v in rates.items()})


ARMS = [make_arm(levels) for levels in itertools.product(*FACTORS.values())]
ARMS += [sweep.Arm(name, "report_decoupled", hyper) for name, hyper in RIVALS.items()]


def swapped(levels: tuple[str, ...], factor: int) -> tuple[str, ...]:
    """`levels` with one factor at its other level."""
    both = list(FACTORS.values())[factor]
    other = both[1 - both.index(levels[factor])]
    return (*levels[:factor], other, *levels[factor + 1 :])


def alone(rows: list[dict], factor: int, key: str) -> stats.Interval:
    """Paired effect of changing one factor, and nothing else, from the report's recipe."""
    return compare.difference(rows, arm_name(swapped(REPORT, factor)), arm_name(REPORT), key)


def main_effect(rows: list[dict], factor: int, key: str) -> stats.Interval:
    """Effect of a factor averaged over all settings of the others: one number per seed."""
    per_seed: dict[int, list[float]] = {}
    for levels in itertools.product(*FACTORS.values()):
        if levels[factor] != REPORT[factor]:
            continue
        other = compare.values(rows, arm_name(swapped(levels, factor)), key)
        for seed, value in compare.values(rows, arm_name(levels), key).items():
            per_seed.setdefault(seed, []).append(other[seed] - value)
    return stats.interval(sum(changes) / len(changes) for changes in per_seed.values())


def ending(rows: list[dict]) -> list[str]:
    """Factors whose change alone brings the report's recipe below the unigram's loss everywhere."""
    unigram = rows[0]["references"]["unigram"]["loss"]
    return [
        name
        for i, name in enumerate(FACTORS)
        if max(compare.values(rows, arm_name(swapped(REPORT, i)), LOSS).values()) < unigram
    ]


def analyse(rows: list[dict]) -> page.Study:
    """Effects of the factors, and the rivals beside the report's recipe."""
    n, names = compare.n_seeds(rows), list(FACTORS)
    unigram = rows[0]["references"]["unigram"]["loss"]
    single = {name: alone(rows, i, LOSS) for i, name in enumerate(names)}
    spread = {name: main_effect(rows, i, LOSS) for i, name in enumerate(names)}
    found = ending(rows)
    baseline = stats.interval(compare.values(rows, arm_name(REPORT), LOSS).values())

    def told(effects, chosen):
        return ", ".join(f"{CHANGES[k]} ({stats.effect_text(effects[k])})" for k in chosen)

    ranked = sorted(names, key=lambda name: spread[name].mean)
    result = (
        f"held-out loss of the report's recipe {baseline.text()}, unigram {unigram:.2f}; its "
        f"change by one factor alone: {told(single, names)}; averaged over all settings of the "
        f"others: {told(spread, ranked)}"
    )
    rest = [name for name in names if name not in found]
    if not found:
        conclusion = (
            f"no single change brings the report's recipe below the unigram's loss in all {n} "
            f"seeds: {told(single, names)}"
        )
    else:
        which = "each alone ends" if len(found) > 1 else "one change alone ends"
        conclusion = f"{which} the collapse in all {n} seeds: {told(single, found)}"
        if rest:
            conclusion += f"; none of these does: {told(single, rest)}"
    return page.Study(
        arms="2^5 factorial and three rivals",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[effect_table(rows), signature_table(rows), compare.arm_table(rows)],
        figures=[(
            "Effect on the held-out loss of each factor, with 95 % intervals over seeds.",
            charts.dot_plot(
                title="Effect of each factor",
                rows=[
                    (f"{name}: {FACTORS[name][0]} to {FACTORS[name][1]}", {
                        "alone, from the report's recipe": _triple(single[name]),
                        "averaged over the others": _triple(spread[name]),
                    })
                    for name in names
                ],
                references=[("no effect", 0.0)],
                xlabel="change of held-out loss, nats",
            ),
        )],
    )  # fmt: skip


def _triple(interval):
    return interval.mean, interval.low, interval.high


def effect_table(rows: list[dict]) -> page.Table:
    """Both effects of every factor on every outcome."""
    lines = []
    for i, (name, (before, after)) in enumerate(FACTORS.items()):
        for kind, effect in (("alone", alone), ("main effect", main_effect)):
            told = []
            for key, _, spec in OUTCOMES:
                found = effect(rows, i, key)
                told.append(found.text(spec) + ("" if found.effect else " (0)"))
            lines.append([f"{name}: {before} to {after}, {kind}", *told])
    note = (
        f"Paired within n = {compare.n_seeds(rows)} seeds, 95 % t intervals; (0): no effect seen. "
        "Alone: from the report's recipe. Main effect: averaged over the settings of the others."
    )
    return page.Table("Effects", ["change", *(o[1] for o in OUTCOMES)], lines, note)


def signature_table(rows: list[dict]) -> page.Table:
    """The report's recipe, the same decoupled, and the rivals, in the numbers that tell them."""
    lines = []
    for label, arm in (
        ("the report's recipe", arm_name(REPORT)),
        ("the same, decoupled", arm_name(HEALTHY)),
        *((name, name) for name in RIVALS),
    ):
        members = [row for row in rows if row["arm"] == arm]
        told = [
            stats.interval(row["final"][key] for row in members).text(spec.lstrip("+"))
            for key, _, spec in OUTCOMES
        ]
        counted = stats.interval(row["above_1.1"]["all"] for row in members).text(",.0f")
        lines.append([label, *told, counted, compare.verdicts(members)])
    predicted = next(r["above_1.1"]["predicted"] for r in rows if r["arm"] == arm_name(REPORT))
    note = f"Predicted for weights that receive nothing but coupled decay: {predicted:,.0f}."
    columns = ["arm", *(o[1] for o in OUTCOMES), f"|w| > {THRESHOLD}", "verdicts"]
    return page.Table("Rivals", columns, lines, note)


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS, extra=count_large)
    rows = [{k: v for k, v in row.items() if k != "curve"} for row in rows]  # of 35 arms
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=common.SMALL, sweep=True)
