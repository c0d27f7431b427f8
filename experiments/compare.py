"""Tables of arms: means over seeds, and paired differences from a control arm."""

from bitnet_jax import charts, collapse
from experiments import stats
from experiments.page import Table

# Key of a row's final numbers, heading, format, and whether less (-1) or more (+1) is better; 0
# where neither is: a count of distinct tokens is high for noise and low for a young healthy model.
METRICS = (
    ("eval/loss", "held-out loss", ".3f", -1),
    ("collapse/entropy", "entropy", ".2f", 0),
    ("collapse/mutual_information", "context MI", ".3f", +1),
    ("collapse/logit_std", "logit std", ".2f", 0),
    ("collapse/unique_tokens", "distinct", ".0f", 0),
    ("decode/greedy_rep_4", "greedy repeats", ".2f", -1),
)
SPECS = {key: spec for key, _, spec, _ in METRICS}


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each arm, in the order of their first appearance."""
    arms: dict[str, list[dict]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def n_seeds(rows: list[dict]) -> int:
    """The smallest number of seeds that an arm has."""
    return min(len({row["seed"] for row in arm}) for arm in by_arm(rows).values())


def values(rows: list[dict], arm: str, key: str) -> dict[int, float]:
    """Final number of each seed of an arm."""
    return {row["seed"]: row["final"][key] for row in rows if row["arm"] == arm}


def difference(rows: list[dict], arm: str, control: str, key: str) -> stats.Interval:
    """Paired difference arm - control of a final number."""
    return stats.paired(values(rows, arm, key), values(rows, control, key))


def verdicts(rows: list[dict]) -> str:
    """`healthy 3` or `underscaled 2, slow 1`."""
    names = [row["final"]["collapse/verdict"] for row in rows]
    return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names))


def arm_table(rows: list[dict], title: str = "At the last step") -> Table:
    """Means and 95 % intervals over seeds by arm; below, what the text and its n-grams give."""
    keys = [m for m in METRICS if m[0] in rows[0]["final"]]
    lines = []
    for arm, members in by_arm(rows).items():
        told = [stats.interval(r["final"][k] for r in members).text(s) for k, _, s, _ in keys]
        lines.append([arm, *told, verdicts(members)])
    reference = rows[0]["references"]
    for name in ("bigram", "unigram", "uniform"):
        r = {"eval/loss": reference[name]["loss"], "collapse/entropy": reference[name]["entropy"]}
        r["collapse/unique_tokens"] = reference[name]["distinct"]
        told = [f"{r[k]:{s}}" if k in r else "" for k, _, s, _ in keys]
        lines.append([f"{name} predictor", *told, ""])
    told = {"collapse/unique_tokens": str(reference["targets"]["distinct"])}
    lines.append(["the text", *(told.get(k, "") for k, _, _, _ in keys), ""])
    n = n_seeds(rows)
    note = (
        f"Mean [95 % t interval] over n = {n} seeds. Distinct predictions of "
        f"{reference['tracked_positions']} positions: 1 for word frequencies alone, many for "
        "noise; alone they say nothing."
    )
    return Table(title, ["arm", *(m[1] for m in keys), "verdicts"], lines, note)


def difference_table(rows: list[dict], pairs: list[tuple[str, str]], title: str) -> Table:
    """Paired differences of each (arm, control)."""
    keys = [m for m in METRICS if m[0] in rows[0]["final"]]
    lines = []
    for arm, control in pairs:
        told = []
        for key, _, spec, _ in keys:
            d = difference(rows, arm, control, key)
            told.append(d.text("+" + spec) + ("" if d.effect else " (0)"))
        lines.append([f"{arm} - {control}", *told])
    note = (
        f"Differences are within seeds (n = {n_seeds(rows)}), with 95 % t intervals; (0): the "
        "interval includes zero, no effect seen."
    )
    return Table(title, ["difference", *(m[1] for m in keys)], lines, note)


def dot_plots(rows: list[dict], kinds, changes) -> list[tuple[str, str]]:
    """Held-out loss and mutual information of the arms `KIND CHANGE`, a line per change."""

    def point(arm, key):
        found = stats.interval(values(rows, arm, key).values())
        return found.mean, found.low, found.high

    def points(key):
        return [(c, {kind: point(f"{kind} {c}", key) for kind in kinds}) for c in changes]

    reference = rows[0]["references"]
    loss = charts.dot_plot(
        points("eval/loss"),
        title="Held-out loss",
        xlabel="nats per token",
        references=[(name, reference[name]["loss"]) for name in ("bigram", "unigram", "uniform")],
    )
    context = charts.dot_plot(
        points("collapse/mutual_information"),
        title="Dependence on the context",
        xlabel="mutual information, nats",
        references=[("context-blind", collapse.BLIND)],
    )
    caption = "Mean and 95 % interval over seeds. Left of the unigram, a model uses more than word "
    return [
        (caption + "frequencies, or a scale or bias that hides that it does not.", loss),
        ("Left of the mark, predictions hardly depend on what was read.", context),
    ]
