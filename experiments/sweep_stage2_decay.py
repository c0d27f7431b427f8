"""Does more weight decay in stage 2 prevent the collapse?

The report's second recommendation, as it was made and as a diagnosis: stage-2 decay of 0 to 0.5,
coupled into Adam as in the report's code, and decoupled (AdamW). Stage 1 has decay 0.1 of the same
kind in every arm, so arms of one kind differ from step T/2 on.

Expected: decoupled, it changes next to nothing; coupled, no value ends the collapse, since Adam's
normaliser turns any decay that outweighs the gradient into steps of the learning rate.

    python -m experiments.sweep_stage2_decay --preset quick
    python -m experiments.sweep_stage2_decay --preset report --set data.corpus=text:books/*.txt
"""

from bitnet_jax import charts
from experiments import common, compare, page, stats, sweep

NAME = "sweep_stage2_decay"
DECAYS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
KINDS = {"coupled": "report", "decoupled": "report_decoupled"}
LOSS = "eval/loss"
ARMS = [
    sweep.Arm(f"{kind} {decay:g}", recipe, {f"{kind}_2": decay})
    for kind, recipe in KINDS.items()
    for decay in DECAYS
]


def analyse(rows: list[dict]) -> page.Study:
    """Effect of each stage-2 decay against the report's 0.05, and of decoupling at 0.05."""
    n = compare.n_seeds(rows)
    unigram = rows[0]["references"]["unigram"]["loss"]
    pairs = [(f"{k} {d:g}", f"{k} 0.05") for k in KINDS for d in DECAYS if d != 0.05]
    pairs.append(("decoupled 0.05", "coupled 0.05"))
    told, best, steepest = {}, {}, {}
    for kind in KINDS:
        changes = {d: compare.difference(rows, f"{kind} {d:g}", f"{kind} 0.05", LOSS)
                   for d in DECAYS if d != 0.05}  # fmt: skip
        largest = max(changes, key=lambda d: abs(changes[d].mean))
        steepest[kind] = stats.effect_text(changes[max(DECAYS)])
        told[kind] = f"{stats.effect_text(changes[largest])} at {largest:g}"
        losses = {d: stats.interval(compare.values(rows, f"{kind} {d:g}", LOSS).values())
                  for d in DECAYS}  # fmt: skip
        best[kind] = min(losses.values(), key=lambda i: i.mean)
    coupling = compare.difference(rows, "decoupled 0.05", "coupled 0.05", LOSS)
    result = (
        f"largest change of held-out loss by stage-2 decay: coupled {told['coupled']}, decoupled "
        f"{told['decoupled']}; decoupling at 0.05: {stats.effect_text(coupling)}; unigram "
        f"{unigram:.2f}, best coupled arm {best['coupled'].text()}"
    )
    cured = best["coupled"].mean < unigram
    conclusion = (
        f"{'a' if cured else 'no'} stage-2 decay brings the coupled recipe below the unigram's "
        f"loss (best of {len(DECAYS)}: {best['coupled'].text()} against {unigram:.2f}, n={n}); "
        f"raising it from 0.05 to {max(DECAYS)} changes the loss by {steepest['coupled']} coupled "
        f"and by {steepest['decoupled']} decoupled, decoupling at 0.05 by "
        f"{stats.effect_text(coupling)}"
    )
    return page.Study(
        arms=f"stage-2 decay {', '.join(f'{d:g}' for d in DECAYS)}, coupled and decoupled",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            compare.arm_table(rows),
            compare.difference_table(rows, pairs, "Against the report's stage-2 decay of 0.05"),
        ],
        figures=[
            *compare.dot_plots(rows, KINDS, [f"{d:g}" for d in DECAYS]),
            *((caption, charts.panels_svg([panel])) for caption, panel in panels(rows)),
        ],
    )


def panels(rows: list[dict]) -> list[tuple[str, charts.Panel]]:
    """Held-out loss of the coupled and of the decoupled arms against the step."""
    reference = rows[0]["references"]
    lines = tuple((name, reference[name]["loss"]) for name in ("uniform", "unigram", "bigram"))
    out = []
    for kind in KINDS:
        series = [
            charts.Series(r["arm"], r["curve"]["step"], r["curve"][LOSS])
            for r in rows
            if r["arm"].startswith(kind)
        ]
        title = f"Held-out loss, {kind}"
        panel = charts.Panel(series, title, "nats per token", rows[0]["steps"] // 2, lines)
        out.append((f"One line per seed; colour is the stage-2 decay, {kind}.", panel))
    return out


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=common.SMALL, sweep=True)
