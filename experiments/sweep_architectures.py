"""Would another architecture support vocabulary diversity?

The report's seventh recommendation: one change of the model at a time (width, logit scale, tied
embedding, quantisation, an auxiliary loss for vocabulary coverage), in the report's recipe (decay
coupled into Adam) and in the same recipe with decoupled decay. The base is the report's layout:
untied, ternary weights, int8 activations, logit scale 1. A change ends the collapse if every seed
gets below the unigram's loss with predictions that depend on the context.

The tied arm scales the logits by 1/sqrt(width): the layout draws its embedding from N(0, 1), and
without the factor the logits would start with a standard deviation of sqrt(width) rather than 1.
It still starts by predicting its input, since a token's embedding is most similar to itself.

Expected: no width, quantisation or auxiliary loss ends the collapse, full precision included, and
decoupling the decay ends it in every architecture. A larger logit scale undoes part of what the
decay does to the output matrix: 16 may lift the coupled recipe below the unigram, yet not near the
decoupled one, where the same scale makes the loss worse.

    python -m experiments.sweep_architectures --preset quick
    python -m experiments.sweep_architectures --preset report --set data.corpus=text:books/*.txt
"""

import math

from bitnet_jax import collapse
from bitnet_jax.config import Config
from experiments import common, compare, page, stats, sweep

NAME = "sweep_architectures"
QUICK = (*common.SMALL, "run.steps=250", "run.save_every=250")
KINDS = {"coupled": "report", "decoupled": "report_decoupled"}
LOSS, MI = "eval/loss", "collapse/mutual_information"
CONTEXT = collapse.BLIND
BASE, FULL_PRECISION = "base", "full precision"


def changes(cfg: Config) -> dict[str, tuple[dict, dict]]:
    """Changed numbers and changed fields of the model, by name of the change."""
    m = cfg.model
    return {
        BASE: ({}, {}),
        "half width": ({}, {"d_model": m.d_model // 2, "d_ff": m.d_ff // 2}),
        "double width": ({}, {"d_model": 2 * m.d_model, "d_ff": 2 * m.d_ff}),
        "logits x 4": ({"logit_scale": 4.0}, {}),
        "logits x 16": ({"logit_scale": 16.0}, {}),
        "tied embedding": ({"logit_scale": 1 / math.sqrt(m.d_model)}, {"tied_embedding": True}),
        FULL_PRECISION: ({"weight_quant": 0.0, "act_quant": 0.0}, {}),
        "ternary weights only": ({"act_quant": 0.0}, {}),
        "8-bit weights": ({}, {"weight_format": "int8"}),
        "4-bit weights": ({}, {"weight_format": "int4"}),
        "quantisation warm-up": ({"quant_warmup_steps": float(cfg.run.steps // 5)}, {}),
        "coverage loss": ({"coverage": 1.0}, {}),
    }


def arms(cfg: Config) -> list[sweep.Arm]:
    """Every change in both recipes."""
    return [
        sweep.Arm(f"{kind} {change}", recipe, hyper, model)
        for kind, recipe in KINDS.items()
        for change, (hyper, model) in changes(cfg).items()
    ]


def outcome(rows: list[dict], arm: str) -> str:
    """`learns`, `masked` (below the unigram, blind to the context), `collapsed` or `mixed`."""
    unigram = rows[0]["references"]["unigram"]["loss"]
    losses, context = compare.values(rows, arm, LOSS), compare.values(rows, arm, MI)
    below = [loss < unigram for loss in losses.values()]
    sees = [nats > CONTEXT for nats in context.values()]
    if all(below):
        return "learns" if all(sees) else "mixed" if any(sees) else "masked"
    return "mixed" if any(below) else "collapsed"


def analyse(rows: list[dict]) -> page.Study:
    """Effect of each change within a recipe, beside the effect of decoupling the decay."""
    n = compare.n_seeds(rows)
    names = [arm.removeprefix("coupled ") for arm in compare.by_arm(rows) if arm.startswith("cou")]
    found = {kind: {c: outcome(rows, f"{kind} {c}") for c in names} for kind in KINDS}
    effects = {c: _effect(rows, "coupled", c, LOSS) for c in names if c != BASE}
    best = min(effects, key=lambda c: effects[c].mean)
    decoupling = {
        c: compare.difference(rows, f"decoupled {c}", f"coupled {c}", LOSS) for c in names
    }
    helped = sum(d.effect and d.mean < 0 for d in decoupling.values())
    gap = compare.difference(rows, f"decoupled {BASE}", f"decoupled {FULL_PRECISION}", LOSS)
    left = compare.difference(rows, f"coupled {best}", f"decoupled {BASE}", LOSS)
    result = (
        f"held-out loss: best change within the coupled recipe, {best}: "
        f"{stats.effect_text(effects[best])}, {left.text('+.2f')} from the decoupled base; "
        f"decoupling the base: {stats.effect_text(decoupling[BASE])}; decoupled recipe, ternary "
        f"weights and int8 activations against full precision: {stats.effect_text(gap, '+.3f')}"
    )
    return page.Study(
        arms=f"{len(names)} architectures, decay coupled and decoupled",
        n=n,
        result=result,
        conclusion="; ".join(_told(found, decoupling[BASE], effects[best], left, best, helped, n)),
        tables=[_changes_table(rows, names, found, decoupling), compare.arm_table(rows)],
        figures=compare.dot_plots(rows, KINDS, names),
    )


def _effect(rows, kind, change, key):
    return compare.difference(rows, f"{kind} {change}", f"{kind} {BASE}", key)


def _told(found, decoupling, gain, left, best, helped, n) -> list[str]:
    """The sentences of the conclusion."""
    coupled, healthy = found["coupled"], found["decoupled"]
    by = {o: [c for c in coupled if coupled[c] == o and c != BASE] for o in set(coupled.values())}
    told = []
    if coupled[BASE] == "learns":
        told.append(f"the coupled base does not collapse here (n={n})")
    elif by.get("learns"):
        told.append(f"in the coupled recipe the collapse is ended by {_list(by['learns'])} (n={n})")
        if best in by["learns"]:
            told.append(f"{best} ends {left.text('+.2f')} from the decoupled base")
    else:
        told.append(
            f"none of {len(coupled) - 1} changes of the architecture ends the collapse of the "
            f"coupled recipe (n={n})"
        )
    if by.get("masked"):
        told.append(f"{_list(by['masked'])} only masks it: below the unigram, blind to the context")
    if by.get("mixed"):
        told.append(f"seeds differ for {_list(by['mixed'])}")
    told.append(
        f"loss of the base by decoupling its decay: {stats.effect_text(decoupling)}, by the best "
        f"change ({best}): {stats.effect_text(gain)}; decoupling lowers it in {helped} of "
        f"{len(coupled)} architectures"
    )
    failed = [c for c in healthy if healthy[c] != "learns"]
    if len(failed) == len(healthy):
        told.append("decoupled, none learns")
    elif failed:
        told.append(f"decoupled, all learn but {_list(failed)}")
    else:
        told.append("decoupled, every architecture learns")
    return told


def _list(names: list[str]) -> str:
    return ", ".join(names)


def _changes_table(rows, names, found, decoupling) -> page.Table:
    def text(interval, spec="+.2f"):
        return interval.text(spec) + ("" if interval.effect else " (no effect seen)")

    lines = []
    for c in names:
        cells = ["", "", ""]
        if c != BASE:
            cells = [
                text(_effect(rows, "coupled", c, LOSS)),
                text(_effect(rows, "coupled", c, MI), "+.3f"),
                text(_effect(rows, "decoupled", c, LOSS)),
            ]
        cells.append(text(decoupling[c]))
        lines.append([c, *cells, found["coupled"][c], found["decoupled"][c]])
    columns = ["change", "loss, coupled", "context MI, coupled", "loss, decoupled",
               "loss by decoupling", "coupled", "decoupled"]  # fmt: skip
    note = (
        "The first three columns of numbers: changed - base within the recipe; the fourth: "
        "decoupled - coupled within the architecture. All within seeds, with 95 % t intervals that "
        "are not adjusted for their number. learns: every seed below the unigram's loss with more "
        f"than {CONTEXT} nats of mutual information; masked: below the unigram without them."
    )
    return page.Table("Each change, and decoupling", columns, lines, note)


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, arms(request.cfg))
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
