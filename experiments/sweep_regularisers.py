"""Does vocabulary regularisation prevent the collapse?

The report's fifth recommendation and its four options, beside four that are known from the
literature, each added to the report's model with decoupled decay (healthy) and with its own coupled
decay (collapses):

    label_smoothing 0.1     the report's first option and weight
    frequency_penalty 0.1   its second: 0.1 nats for each nat of a prediction's log frequency
    entropy_bonus 1         its third, 1 - entropy / ln V: 1 / ln V = 0.13 a nat of entropy with
                            2048 tokens, near the 0.1 of the confidence penalty (arXiv 1701.06548)
    diversity_bonus 0.5     its fourth: half a nat for the probability of tokens seen in the window
    coverage 1              KL(unigram || mean prediction), on the scale of the cross-entropy
    z_loss 0.0001           PaLM's
    unlikelihood 1          alpha of arXiv 1908.04319
    unigram_bias            no term: a bias of the logits that starts at the log unigram

The report gives no weight for its options 2 to 4; those above are choices. Every arm is judged by
held-out loss, by the mutual information of context and prediction, and by the repetition of greedy
text, never by distinct tokens alone: what raises those and does not lower the loss is cosmetic, and
what brings the loss to the unigram's while predictions ignore the context masks the collapse.

Expected: none cures; the unigram bias masks. Collapse is a fault of the optimiser's scale, and all
these terms act through the same gradient that the coupled decay outweighs.

    python -m experiments.sweep_regularisers --preset quick
    python -m experiments.sweep_regularisers --preset report --set data.corpus=text:books/*.txt
"""

import math

import numpy as np
import scipy.stats

from bitnet_jax import collapse
from experiments import common, compare, page, stats, sweep
from experiments.stats import Interval

NAME = "sweep_regularisers"
QUICK = (*common.SMALL, "run.steps=300", "run.save_every=300")
KINDS = {"decoupled": "report_decoupled", "coupled": "report"}
REPORTS = {
    "label_smoothing": 0.1,
    "frequency_penalty": 0.1,
    "entropy_bonus": 1.0,
    "diversity_bonus": 0.5,
}
OTHERS = {"coverage": 1.0, "z_loss": 1e-4, "unlikelihood": 1.0}
WEIGHTS = REPORTS | OTHERS
BIAS = "unigram_bias"
LOSS, MI, UNIQUE = "eval/loss", "collapse/mutual_information", "collapse/unique_tokens"
REPEATS = "decode/greedy_rep_4"
ARMS = [
    sweep.Arm(f"{kind} {name}", recipe, hyper, model)
    for kind, recipe in KINDS.items()
    for name, hyper, model in (
        ("none", {}, {}),
        *((name, {name: weight}, {}) for name, weight in WEIGHTS.items()),
        (BIAS, {}, {"output_bias": True}),
    )
]

CURES, MASKS, PARTLY, HELPS = "cures", "masks", "helps, not a cure", "helps"
MIXED, COSMETIC, HURTS = "mixed", "cosmetic", "hurts"
MEANING = {
    CURES: "at least half as far below the unigram's loss as decoupled decay, context in use",
    MASKS: "word frequencies given, context still not learned",
    PARTLY: "loss lower, the collapse remains",
    HELPS: "loss lower, or as it was with less repetition",
    MIXED: "loss lower, but less use of the context or more repetition",
    COSMETIC: "more distinct tokens, loss not lower",
    HURTS: "loss higher or more repetition",
}


def judge(
    loss: Interval,
    mi: Interval,
    unique: Interval,
    repeats: Interval | None,
    *,
    excess: Interval,
    control_excess: Interval,
    healthy_excess: Interval,
    own_mi: Interval,
    healthy_mi: Interval,
) -> str:
    """What a regulariser does: a key of MEANING, or `no effect seen (n=...)`.

    The first four are paired differences from the same recipe without it, of the held-out loss, the
    mutual information (nats), the distinct tokens and the repeated 4-grams of greedy text (None
    where nothing was decoded). `excess` is the loss above the unigram's (negative below it), that
    of the control in `control_excess`; `own_mi` is the arm's mutual information; the healthy ones
    are those of decoupled decay alone. An interval that includes zero shows nothing. The control is
    collapsed where its excess lies above zero. Cured is what then gets half as far below the
    unigram, and half as much mutual information, as the healthy run: given the unigram, even
    collapsing runs end a little below it.
    """
    repeats = repeats or Interval(0.0, -math.inf, math.inf, loss.n)
    if loss.high < 0 and control_excess.low > 0:
        if mi.low > 0 and own_mi.mean > max(collapse.BLIND, healthy_mi.mean / 2):
            return CURES if excess.high < min(0, healthy_excess.mean / 2) else PARTLY
        return MASKS if excess.mean < control_excess.mean / 2 else PARTLY
    if loss.high < 0:
        return MIXED if mi.high < 0 or repeats.low > 0 else HELPS
    if unique.low > 0:
        return COSMETIC
    if loss.low > 0 or repeats.low > 0:
        return HURTS
    return HELPS if repeats.high < 0 else f"no effect seen (n={loss.n})"


def judgements(rows: list[dict]) -> dict[str, str]:
    """Judgement of every arm but the controls."""
    unigram = rows[0]["references"]["unigram"]["loss"]
    decoded = all(REPEATS in row["final"] for row in rows)

    def excess(arm):
        return stats.interval(x - unigram for x in compare.values(rows, arm, LOSS).values())

    def own_mi(arm):
        return stats.interval(compare.values(rows, arm, MI).values())

    out = {}
    for arm, control in pairs():
        changes = [compare.difference(rows, arm, control, key) for key in (LOSS, MI, UNIQUE)]
        out[arm] = judge(
            *changes,
            compare.difference(rows, arm, control, REPEATS) if decoded else None,
            excess=excess(arm),
            control_excess=excess(control),
            healthy_excess=excess("decoupled none"),
            own_mi=own_mi(arm),
            healthy_mi=own_mi("decoupled none"),
        )
    return out


def pairs() -> list[tuple[str, str]]:
    """Every arm with its control."""
    arms = ((arm.name, arm.name.split()[0]) for arm in ARMS)
    return [(name, f"{kind} none") for name, kind in arms if not name.endswith(" none")]


def holm_p(rows: list[dict]) -> dict[str, float]:
    """Holm-adjusted p of the loss differences by paired t tests; empty for one seed."""
    if compare.n_seeds(rows) < 2:
        return {}
    p_values = []
    for arm, control in pairs():
        a, b = (compare.values(rows, name, LOSS) for name in (arm, control))
        seeds = sorted(a.keys() & b.keys())
        test = scipy.stats.ttest_1samp(np.array([a[s] - b[s] for s in seeds]), 0.0)
        p_values.append(float(test.pvalue))
    return dict(zip((arm for arm, _ in pairs()), stats.holm(p_values), strict=True))


def analyse(rows: list[dict]) -> page.Study:
    """Judge every regulariser on both recipes."""
    n, found, adjusted = compare.n_seeds(rows), judgements(rows), holm_p(rows)
    unigram = rows[0]["references"]["unigram"]["loss"]
    control = {k: stats.interval(compare.values(rows, f"{k} none", LOSS).values()) for k in KINDS}
    collapsed = control["coupled"].low > unigram
    best = {}
    for kind in KINDS:
        arms = [arm for arm, _ in pairs() if arm.startswith(f"{kind} ")]
        changes = {arm: compare.difference(rows, arm, f"{kind} none", LOSS) for arm in arms}
        arm = min(changes, key=lambda a: changes[a].mean)
        best[kind] = f"{_name(arm)} {stats.effect_text(changes[arm])}"
    result = "; ".join(
        f"{kind}: loss {control[kind].text()} without (unigram {unigram:.2f}), largest decrease "
        f"{best[kind]}; judged {_counts(found, kind)}"
        for kind in KINDS
    )
    return page.Study(
        arms=f"{', '.join(WEIGHTS)}, {BIAS} and none, with decoupled and coupled decay",
        n=n,
        result=result,
        conclusion=_conclusion(found, adjusted, collapsed, control, unigram),
        tables=[
            _judgement_table(found, adjusted, n),
            compare.arm_table(rows),
            compare.difference_table(rows, pairs(), "Against the same recipe without"),
        ],
        figures=compare.dot_plots(rows, KINDS, ("none", *REPORTS, *OTHERS, BIAS)),
    )


def _name(arm):
    return arm.partition(" ")[2]


def _of(found, kind, judgement):
    """Names of the arms of a recipe that are judged so."""
    return [_name(a) for a, j in found.items() if a.startswith(f"{kind} ") and j == judgement]


def _counts(found, kind):
    kinds = [j for arm, j in found.items() if arm.startswith(f"{kind} ")]
    return ", ".join(f"{j}: {kinds.count(j)}" for j in dict.fromkeys(kinds))


def _conclusion(found, adjusted, collapsed, control, unigram):
    cures, masks = (_of(found, "coupled", j) for j in (CURES, MASKS))
    coupled, healthy = control["coupled"], control["decoupled"]
    if not collapsed:
        return (
            f"the coupled recipe alone is not shown to end above the unigram's loss "
            f"({coupled.text()} against {unigram:.2f}, n={coupled.n}): prevention cannot be judged"
        )
    if healthy.high >= unigram:
        return (
            f"the decoupled recipe alone is not shown to end below the unigram's loss "
            f"({healthy.text()} against {unigram:.2f}, n={healthy.n}): a collapse cannot be told "
            "from a young model, so prevention cannot be judged"
        )
    told = [
        f"prevented by {', '.join(cures)}"
        if cures
        else f"no regulariser prevents the collapse ({len(WEIGHTS) + 1} tried, n={coupled.n})"
    ]
    if masks:
        told.append(f"{', '.join(masks)} masks it: {MEANING[MASKS]}")
    for judgement in (PARTLY, COSMETIC):
        if names := _of(found, "coupled", judgement):
            told.append(f"{judgement}: {', '.join(names)}")
    helps = _of(found, "decoupled", HELPS)
    helps = [name for name in helps if adjusted[f"decoupled {name}"] < 0.05]
    told.append(f"on the healthy recipe {', '.join(helps) or 'none'} lowers the loss (Holm)")
    return "; ".join(told)


def _judgement_table(found, adjusted, n):
    lines = []
    for name in (*WEIGHTS, BIAS):
        cells = []
        for kind in KINDS:
            arm = f"{kind} {name}"
            cells += [found[arm], f"{adjusted[arm]:.3f}" if adjusted else "one seed"]
        weight = f"{WEIGHTS[name]:g}" if name in WEIGHTS else ""
        lines.append([f"{name} {weight}".strip(), *cells])
    columns = ["regulariser"]
    for kind in KINDS:
        columns += [f"{kind} decay", "p of loss (Holm)"]
    note = ". ".join(f"{k}: {v}" for k, v in MEANING.items() if k in found.values())
    note += (
        f". Judged by 95 % t intervals of differences within seeds (n = {n}), "
        f"not adjusted; p by paired t tests of the loss, adjusted over all {len(found)}."
    )
    return page.Table("What each regulariser does", columns, lines, note.lstrip(". "))


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
