"""Does coupled decay shrink the logits as theory says, and is the collapse that shrinking?

Theory (`bitnet_jax/shrink.py`), without a free parameter: where the loss gradient of a weight is
small, coupled decay moves it towards 0 by the learning rate at every update. So the spread of the
logits falls as (1 - S / b)^1.5, with S the summed learning rate and b the bound of the head's
initialisation; it is halved at a step that depends on the warm-up, and not on the amount of decay;
the entropy is ln V - s^2 / 2; embedding entries without gradient follow a scalar Adam recursion.
Measured: the report's recipe with other warm-ups and other amounts of coupled decay, and decoupled;
and, at every evaluation, the part of each parameter group's update that is decay.

Expected: the law holds until the gradient stops the shrinking, in all arms with coupled decay of
0.01 and more; decoupled, decay is a negligible part of every update.

    python -m experiments.shrink_law --preset quick
    python -m experiments.shrink_law --preset report --seeds 0-2 --set data.tokenizer=gpt2 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz
"""

import json
import math
from pathlib import Path

import numpy as np

from bitnet_jax import charts, log, shrink
from bitnet_jax.config import Config, Hyper, UserError
from experiments import common, compare, page, stats, sweep, trajectory
from experiments.weight_bounds import count_large

NAME = "shrink_law"
QUICK = (*common.SMALL, "run.eval_every=5")
REPORTED, DECOUPLED = "the report's", "decoupled"
WARMUPS = (0.025, 0.4)  # shares of T
DECAYS = (0.001, 0.01, 1.0)  # of stage 1; half of it in stage 2
GROUPS = ("embedding", "head", "matrix")
LAW_HOLDS = 0.1  # largest distance of a spread ratio from the law
POINTS = 50
SHARES = (
    "Decay's part of each update, by parameter group: all of it at 1, as much as the gradient's at "
    "0.5. The dip after the switch: Adam remembers the larger decay."
)


def arms(request: common.Request) -> list[sweep.Arm]:
    """The report's recipe, one number changed at a time."""
    if request.cfg.model.layout != "report":
        raise UserError(
            "model.layout: the law is for the uniform initialisation of layout report; got "
            f"{request.cfg.model.layout}"
        )
    warmups = [max(1, round(share * request.cfg.run.steps)) for share in WARMUPS]
    return [
        sweep.Arm(REPORTED, "report"),
        *(sweep.Arm(f"warm-up {w}", "report", {"warmup_steps": float(w)}) for w in warmups),
        *(
            sweep.Arm(f"decay {d:g}", "report", {"coupled_1": d, "coupled_2": d / 2})
            for d in DECAYS
        ),
        sweep.Arm(DECOUPLED, "report_decoupled"),
    ]


def measure(workdir: Path, cfg: Config, index: int) -> dict:
    """The law and what the log says, for one replicate."""
    rows = [r for r in log.read_rows(workdir / "metrics.jsonl") if r["replicate"] == index]
    evals = [r for r in rows if r["kind"] == "eval"]
    train = [r for r in rows if r["kind"] == "train"]
    saved = json.loads((workdir / "config.json").read_text())
    hyper = Hyper(**saved["replicates"][index]["hyper"])
    bound = cfg.model.d_model**-0.5
    steps = np.array([r["step"] for r in evals])
    std = np.array([r["collapse/logit_std"] for r in evals])
    entropy = np.array([r["collapse/entropy"] for r in evals])
    loss = np.array([r["eval/loss"] for r in evals])
    vocab = saved["model"]["vocab_size"]
    law = shrink.spread_ratio(shrink.summed_rate(cfg.run, hyper)[steps], bound)
    ratio = std / std[0]
    expected = shrink.half_spread_step(cfg.run, hyper, bound)
    early = law >= 0.5
    late = steps > 0.3 * cfg.run.steps
    gap = entropy - [shrink.gaussian_entropy(vocab, s) for s in std]
    keep = np.unique(np.linspace(0, len(train) - 1, POINTS).astype(int))
    ends = np.unique(np.linspace(0, len(evals) - 1, POINTS).astype(int))
    shares = {g: [_short(train[i][f"decay/update_share_{g}"]) for i in keep] for g in GROUPS}
    found = {
        "half_step": trajectory.half_step(steps, ratio),
        "half_step_predicted": None if expected is None else _short(expected),
        "law_error": _short(np.abs(ratio - law)[early].max()),
        "late_std": _short(std[late].mean()),
        "late_entropy": _short(entropy[late].mean()),
        "late_entropy_gap": _short(gap[late].mean()),
        "late_slope": _short(shrink.scale_slope(loss[1:], entropy[1:]).mean()),
        "share": {"step": [train[i]["step"] for i in keep], **shares},
        "mean_share": {
            g: _short(np.mean([r[f"decay/update_share_{g}"] for r in train])) for g in GROUPS
        },
        "spread": {
            "step": steps[ends].tolist(),
            "measured": [_short(x) for x in ratio[ends]],
            "law": [_short(x) for x in law[ends]],
        },
    }
    return {"shrink": found} | count_large(workdir, cfg, index)


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def numbers(rows: list[dict], arm: str, key: str) -> list[float]:
    """A number of each seed of an arm; NaN where there is none."""
    found = [r["shrink"][key] for r in rows if r["arm"] == arm]
    return [math.nan if x is None else x for x in found]


def follows(rows: list[dict], arm: str) -> bool:
    """Whether every seed of an arm stays within LAW_HOLDS of the law until half the spread."""
    return max(numbers(rows, arm, "law_error")) <= LAW_HOLDS


def onset(rows: list[dict], arm: str) -> tuple[str, str]:
    """Predicted and measured step of half the spread."""
    measured, predicted = numbers(rows, arm, "half_step"), numbers(rows, arm, "half_step_predicted")
    there = [x for x in measured if not math.isnan(x)]
    told = stats.interval(there).text(".0f") if there else "never"
    told += f" ({len(there)} of {len(measured)})" if 0 < len(there) < len(measured) else ""
    return ("never" if math.isnan(predicted[0]) else f"{predicted[0]:.0f}"), told


def analyse(rows: list[dict]) -> page.Study:
    """The law against the log, arm by arm."""
    n, names = compare.n_seeds(rows), list(compare.by_arm(rows))
    coupled = [name for name in names if name != DECOUPLED]
    holding = [name for name in coupled if follows(rows, name)]
    others = [name for name in coupled if name not in holding]
    worst = max(x for name in holding or coupled for x in numbers(rows, name, "law_error"))
    pairs = "; ".join("{}: {} predicted, {}".format(name, *onset(rows, name)) for name in names)
    early = {name: early_share(rows, name, "head") for name in (REPORTED, DECOUPLED)}
    rare = {name: _share(rows, name, "embedding") for name in (REPORTED, DECOUPLED)}
    gap = stats.interval(numbers(rows, REPORTED, "late_entropy_gap"))
    counted = [r["above_1.1"] for r in rows if r["arm"] == REPORTED]
    off = max(abs(c["embedding"] - c["predicted"]) / max(c["predicted"], 1) for c in counted)
    result = (
        f"step at which the spread of the logits is halved, predicted without a free parameter and "
        f"measured: {pairs}; largest distance of the spread ratio from the law until then "
        f"{worst:.3f} in {len(holding)} of {len(coupled)} coupled arms; part of the head's updates "
        f"that is decay, until then: {early[REPORTED].text('.1%')} in the report's recipe, "
        f"{early[DECOUPLED].text('.2%')} decoupled; of the embedding's, over the run: "
        f"{rare[REPORTED].text('.1%')}, {rare[DECOUPLED].text('.1%')}; entropy of the report's "
        f"recipe after 0.3 T is "
        f"{gap.text('+.3f')} from ln V - s^2 / 2; embedding entries above 1.1 within {off:.2%} of "
        "the scalar recursion"
    )
    if REPORTED in holding:
        conclusion = (
            f"the logits of the report's recipe shrink as (1 - summed rate / bound)^1.5, which has "
            f"no free parameter (at most {worst:.3f} of the initial spread off until it is halved, "
            f"in {len(holding)} of {len(coupled)} arms"
            + (f", not in {', '.join(others)})" if others else ")")
            + f"; until then decay is {early[REPORTED].mean:.0%} of the head's updates (decoupled "
            f"{early[DECOUPLED].mean:.1%}), and over the whole run {rare[REPORTED].mean:.0%} of "
            f"the embedding's ({rare[DECOUPLED].mean:.0%})"
        )
    else:
        error = max(numbers(rows, REPORTED, "law_error"))
        conclusion = (
            f"the logits of the report's recipe do not shrink as the law says: {error:.3f} of the "
            "initial spread off before it is halved"
        )
    return page.Study(
        arms="the report's recipe, 2 other warm-ups, 3 other coupled decays, and decoupled",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[law_table(rows), share_table(rows), compare.arm_table(rows)],
        figures=[
            *((SHARES, charts.panels_svg([panel])) for panel in share_panels(rows)),
            ("Spread of the logits over that at the start: every seed, and the law.",
             charts.panels_svg([spread_panel(rows, coupled[:3], "Warm-ups")])),
            ("The law has no amount of decay in it; it is for decay that outweighs the gradient.",
             charts.panels_svg([spread_panel(rows, [REPORTED, *coupled[3:]], "Amounts of decay")])),
        ],
    )  # fmt: skip


def _share(rows: list[dict], arm: str, group: str) -> stats.Interval:
    return stats.interval(r["shrink"]["mean_share"][group] for r in rows if r["arm"] == arm)


def early_share(rows: list[dict], arm: str, group: str) -> stats.Interval:
    """Mean part of a group's update that is decay, until half the spread is predicted."""
    found = []
    for row in rows:
        if row["arm"] == arm:
            share, end = row["shrink"]["share"], row["shrink"]["half_step_predicted"]
            steps = np.array(share["step"])
            found.append(np.array(share[group])[steps <= (end or steps[-1])].mean())
    return stats.interval(found)


def law_table(rows: list[dict]) -> page.Table:
    """Onset, distance from the law, and the collapsed phase, by arm."""
    lines = []
    for arm, members in compare.by_arm(rows).items():
        predicted, measured = onset(rows, arm)
        told = [
            stats.interval(numbers(rows, arm, key)).text(spec)
            for key, spec in (
                ("law_error", ".3f"),
                ("late_std", ".3f"),
                ("late_entropy", ".2f"),
                ("late_entropy_gap", "+.3f"),
                ("late_slope", "+.2f"),
            )
        ]
        counts = [r["above_1.1"] for r in members]
        count = stats.interval(c["embedding"] for c in counts).text(",.0f")
        expected = f"{counts[0]['predicted']:,.0f}" if counts[0]["predicted"] else ""
        lines.append([arm, predicted, measured, *told, count, expected])
    columns = ["arm", "half spread at step, predicted", "measured", "distance from the law",
               "logit std after 0.3 T", "entropy", "entropy - (ln V - s^2/2)",
               "loss - entropy = d loss / d ln s", "embedding |w| > 1.1", "predicted"]  # fmt: skip
    note = (
        "Distance: largest |measured - predicted| spread ratio until half the spread is predicted. "
        f"Mean [95 % t interval] over n = {compare.n_seeds(rows)} seeds. The prediction is for "
        "coupled decay that outweighs the gradient; decoupled, it is shown for contrast. Mean of "
        "d loss / d ln s after step 0: negative where larger logits would lower the loss."
    )
    return page.Table("The law and the log", columns, lines, note)


def share_table(rows: list[dict]) -> page.Table:
    """Mean part of each group's update that is decay."""
    lines = [
        [arm, *(_share(rows, arm, group).text(".2%") for group in GROUPS)]
        for arm in compare.by_arm(rows)
    ]
    note = (
        "Norm of the decay's part over the sum of its norm and that of the gradient's part; mean "
        "over the run. matrix: the ternary weights' latents."
    )
    return page.Table("Part of the update that is decay", ["arm", *GROUPS], lines, note)


def share_panels(rows: list[dict]) -> list[charts.Panel]:
    """Decay's part of the update against step: coupled and decoupled, a line per group and seed."""
    out = []
    for arm, title in ((REPORTED, "Coupled"), (DECOUPLED, "Decoupled")):
        series = [
            charts.Series(group, r["shrink"]["share"]["step"], r["shrink"]["share"][group])
            for r in rows
            if r["arm"] == arm
            for group in GROUPS
        ]
        boundary = next(r["steps"] for r in rows) // 2
        out.append(charts.Panel(series, title, "decay's part", boundary,
                                (("all decay", 1.0), ("none", 0.0))))  # fmt: skip
    return out


def spread_panel(rows: list[dict], chosen: list[str], title: str) -> charts.Panel:
    """Measured spread ratio of every seed, and the law, of some arms."""
    series = []
    for arm in chosen:
        members = [r["shrink"]["spread"] for r in rows if r["arm"] == arm]
        series += [charts.Series(arm, s["step"], s["measured"]) for s in members]
    laws = {}
    for arm in chosen:
        spread = next(r["shrink"]["spread"] for r in rows if r["arm"] == arm)
        laws.setdefault(tuple(spread["law"]), spread["step"])
    series += [charts.Series("law", steps, list(law)) for law, steps in laws.items()]
    return charts.Panel(series, title, "logit std over initial")


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, arms(request), extra=measure)
    rows = [{k: v for k, v in row.items() if k != "curve"} for row in rows]  # `shrink` has its own
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
