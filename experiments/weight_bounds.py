"""Why do 981,223 weights lie outside [-1, 1] although the model is ternary?

The report's first recommendation: weights before and after quantisation, by kind of matrix and over
training (`bitnet_jax inspect` shows each layer). Counted are |w| > 1 and |w| > 1.1, as the report's
tool did over all weights, |w| above the matrix's scale mean|w|, and values of the forward pass that
are none of -1, 0, 1 times the scale. The arms train the report's layout, whose embedding starts
N(0, 1). Beside its count stands what the optimiser leaves of entries that get no gradient but the
decay: coupled, they move towards 0 by about the learning rate a step (979,330 after the report's
1000 steps).

    python -m experiments.weight_bounds                # 1 min on 2 cores
    python -m experiments.weight_bounds --preset report --set run.checkpoint_every=100 \
        --set data.corpus=text:books.train.txt.xz

Goes when `inspect` shows the same over the steps of a run.
"""

import numpy as np

from bitnet_jax import charts, inspection
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import each, interval, of
from experiments.lab.studies import QUICK, SMALL
from experiments.lab.weights import BIN, BINS, counts_without_gradient, sums_at

COUPLED, DECOUPLED, PUBLISHED = ARM_NAMES = ("coupled", "decoupled", "published")
ARMS = tuple(Arm(name, name) for name in ARM_NAMES)
COUNTS = ("above_1", "above_1.1", "outside")
SHARES = ("above_scale", "zero_rate", "flip_rate", "sqnr")
GROUPS = ("embedding", "head", "norm", "ternary")  # of the counts
FIRST_LAST, NONE = "weights/first_last/", np.full(2, np.nan)
QUANTISED = ("above_scale", "std", "scale", "zero_rate", "sqnr")


def measure(run) -> dict[str, list]:
    """Weights at initialisation and at every kept step.

    `counts` and `ternary` hold a list over steps, `first_last` those of the first and last one.
    """
    steps = [0, *run.kept_steps]
    predicted = [counts_without_gradient(run.cfg, rep.hyper, steps) for rep in run.replicates]
    return {
        "weights": [
            {"step": steps, "predicted": counts} | over_steps(sums)
            for counts, sums in zip(predicted, sums_at(run, steps), strict=True)
        ]
    }


def over_steps(history: list[dict[str, tuple[str, dict]]]) -> dict:
    """The numbers of one replicate from the sums of its tensors at every step."""
    sums = [inspection.by_kind(tensor_sums) for tensor_sums in history]
    ternary = [kind for kind in sums[0] if kind not in inspection.FULL_PRECISION]
    groups = {k: [k] for k in sums[0] if k not in ternary} | {"ternary": ternary}
    by_group = {
        name: [inspection.numbers(inspection.add([at_step[k] for k in parts])) for at_step in sums]
        for name, parts in groups.items()
    }
    matrices = [kind for kind in sums[0] if kind not in ("norm", "bias")]
    return {
        "counts": {
            name: {key: [x[key] for x in steps] for key in COUNTS if key in steps[0]}
            for name, steps in by_group.items()
        },
        "ternary": {
            key: [short(x[key]) for x in by_group["ternary"] if key in x] for key in SHARES
        },
        "first_last": {kind: first_last(sums[0][kind], sums[-1][kind]) for kind in matrices},
    }


def first_last(*ends: dict) -> dict[str, list]:
    """Numbers and histograms, in thousandths, of the sums of a kind at two steps."""
    first, _ = pair = [inspection.numbers(sums) for sums in ends]
    shares = [sums["histogram"] / sums["histogram"].sum() for sums in ends]
    return {key: [short(x[key]) for x in pair] for key in QUANTISED if key in first} | {
        "histogram": [np.rint(1000 * share).astype(int).tolist() for share in shares]
    }


def short(x: float) -> float:
    """Three significant digits."""
    return float(f"{x:.3g}")


def counts(df, arm: str, group: str, key: str = "above_1.1") -> np.ndarray:
    """Weights of a group over seeds and steps [N, S]."""
    return np.stack(each(df, arm, f"weights/counts/{group}/{key}"))


def total(df, group: str, key: str) -> int:
    return sum(int(counts(df, arm, group, key).sum()) for arm in ARM_NAMES)


def off(df, arm: str) -> np.ndarray:
    """Relative distance of the embedding's last count from the predicted one, by seed."""
    predicted = np.stack(each(df, arm, "weights/predicted"))[:, -1]
    return counts(df, arm, "embedding")[:, -1] / predicted - 1


def zeros(df, arm: str, kind: str | None = None):
    """Share of zero codes at the last step: of all ternary matrices, or of one kind."""
    place = f"first_last/{kind}" if kind else "ternary"
    return interval(rates[-1] for rates in each(df, arm, f"weights/{place}/zero_rate"))


CLAIMS = (
    Claim(
        "codes",
        "no value of the forward pass lies outside the ternary codes, in any arm, at any step",
        lambda df: total(df, "ternary", "outside") == 0,
        QUICK,
    ),
    Claim(
        "latents",
        "no latent weight of a ternary matrix is above 1, in any arm, at any step",
        lambda df: total(df, "ternary", "above_1") == 0,
        QUICK,
    ),
    Claim(
        "embedding",
        "all weights above 1.1 that the coupled recipe ends with are entries of the embedding",
        lambda df: (
            counts(df, COUPLED, "embedding")[:, -1].all()
            and not any(counts(df, COUPLED, g)[:, -1].any() for g in ("head", "norm", "ternary"))
        ),
        QUICK,
    ),
    Claim(
        "predicted",
        "in every arm the embedding's entries above 1.1 are within 1 % of what decay alone leaves",
        lambda df: all((abs(off(df, arm)) < 0.01).all() for arm in ARM_NAMES),
        QUICK,
    ),
    Claim(
        "zeros",
        "over 80 % of the coupled recipe's ternary codes end as zeros; of the others' under 30 %",
        lambda df: (
            zeros(df, COUPLED).low > 0.8
            and max(zeros(df, DECOUPLED).high, zeros(df, PUBLISHED).high) < 0.3
        ),
        QUICK,
    ),
    Claim(
        "feed-forward",
        "over 99.9 % of the codes of the coupled recipe's feed-forward matrices end as zeros",
        lambda df: min(zeros(df, COUPLED, kind).low for kind in ("gate_up", "down")) > 0.999,
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    kinds = [c.split("/")[2] for c in df if c.startswith(FIRST_LAST) and c.endswith("/std")]
    heads = ["", "embedding", "head", "norms", "ternary", "embedding, by decay alone"]
    note = "Means over seeds. SQNR of a normal distribution: 5.79 dB, of a uniform one 8.06."
    for arm in dict.fromkeys(df["arm"]):
        run = of(df, arm)
        steps, predicted = run["weights/step"].iloc[0], run["weights/predicted"].iloc[0]
        groups = [run[f"weights/counts/{g}/above_1.1"] for g in GROUPS]
        table = [
            [f"step {step}", *(interval(x[i] for x in group).text(",.0f") for group in groups),
             f"{predicted[i]:,}"]
            for i, step in enumerate(steps)
        ]  # fmt: skip
        exhibits.grid(f"Weights above 1.1: {arm}", heads, table)
        table = [[f"{kind}, step {steps[i]}", *(cell(x[i]) for x in means(run, kind, QUANTISED))]
                 for kind in kinds for i in (0, -1)]  # fmt: skip
        exhibits.grid(f"Matrices by kind: {arm}", ["", *QUANTISED], table, note)
        series = [charts.Series("measured", steps, curve) for curve in groups[0]]
        series.append(charts.Series("decay alone", steps, predicted))
        half = int(run["steps"].iloc[0]) // 2
        exhibits.panels([charts.Panel(series, arm, "embedding |w| > 1.1", half)])
        for kind in kinds:
            (shares,), centres = means(run, kind, ["histogram"]), BIN * (np.arange(BINS) + 0.5)
            series = [charts.Series(f"step {steps[i]}", centres, shares[i]) for i in (0, -1)]
            panel = charts.Panel(series, f"{arm}: {kind}", "thousandths", xlabel="|w| / mean|w|")
            exhibits.panels([panel], "Means over seeds; the last bin is open.")


def cell(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.3g}"


def means(run, kind: str, keys) -> list[np.ndarray]:
    """Means over seeds of numbers of a kind at the first and the last step; NaN where there is
    none."""
    columns = [f"{FIRST_LAST}{kind}/{key}" for key in keys]
    return [np.mean(np.stack(run[c]), axis=0) if c in run else NONE for c in columns]


if __name__ == "__main__":
    experiment(__doc__, ARMS, measure, CLAIMS, show,
               quick=(*SMALL, "run.checkpoint_every=50", "run.save_every=50"))  # fmt: skip
