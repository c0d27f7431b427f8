"""What ends the collapse: which one line of the report's recipe, and does the published one hold?

Two parts, beside the rows of the report's own recipe (`reproduce_report`, same text, same seeds).
First, the report's recipe with one line changed: its decay decoupled (AdamW for Adam), its coupled
decay kept off the embedding, head and norms, no decay, no decay in stage 2, full precision. Second,
the published recipe and layout (`b158`) at the report's three lengths, and its twin in full
precision: severe evaluations once it is below the unigram's loss, the distinct predictions of its
two stages, its loss against the twin's, and what it writes.

Expected: the first three lines end the collapse, each alone; the other two do not. The published
recipe never collapses, and ternary weights cost it little.

    python -m experiments.end_collapse --preset quick
    python -m experiments.end_collapse --preset report --seeds 0-4 --set data.tokenizer=gpt2 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz
"""

import functools

from bitnet_jax import charts, collapse
from bitnet_jax.config import UserError
from experiments import common, compare, page, reproduce_report, results, stats, sweep
from experiments.reproduce_report import LENGTHS, QUICK

NAME = "end_collapse"
LOSS, CONTEXT = "eval/loss", "collapse/mutual_information"
LINES = {
    "AdamW for Adam": ("report_decoupled", {}),
    "decay on matrices only": ("report", {"decay_rest": 0.0}),
    "no decay": ("report", {"coupled_1": 0.0, "coupled_2": 0.0}),
    "no decay in stage 2": ("report", {"coupled_2": 0.0}),
    "full precision": ("report", {"weight_quant": 0.0, "act_quant": 0.0}),
}
PUBLISHED = {"layout": "b158", "tied_embedding": True, "rope_theta": 500_000.0}
TWIN = {"weight_quant": 0.0, "act_quant": 0.0}


def report_arm(steps: int) -> str:
    return f"report, {steps} steps"


def line_arm(line: str, steps: int) -> str:
    return f"report with {line}, {steps} steps"


def b158_arms(steps: int) -> tuple[str, str]:
    return f"b158, {steps} steps", f"b158 in full precision, {steps} steps"


def arms(request: common.Request) -> list[sweep.Arm]:
    """The one-line changes at the shortest length; the published recipe and its twin at all."""
    reproduce_report.check_tracking(request.cfg)
    lengths = [k * request.cfg.run.steps for k in request.lengths]
    found = [
        sweep.Arm(line_arm(name, lengths[0]), recipe, hyper, run={"steps": lengths[0]})
        for name, (recipe, hyper) in LINES.items()
    ]
    for steps in lengths:
        ternary, full = b158_arms(steps)
        found.append(sweep.Arm(ternary, "b158", {}, PUBLISHED, {"steps": steps}))
        found.append(sweep.Arm(full, "b158", TWIN, PUBLISHED, {"steps": steps}))
    return found


def with_control(trained: list[dict], rows: list[dict]) -> list[dict]:
    """`trained` with the rows of `reproduce_report` of the same study, seeds and lengths.

    Raises UserError when the shortest length lacks one.
    """
    (label,) = results.by_study(trained)
    lengths, seeds = {r["steps"] for r in trained}, {r["seed"] for r in trained}
    control = [
        row | {"arm": report_arm(row["steps"])}
        for row in results.by_study(rows).get(label, [])
        if row["steps"] in lengths and row["seed"] in seeds
    ]
    missing = seeds - {row["seed"] for row in control if row["steps"] == min(lengths)}
    if missing:
        raise UserError(
            f"no row of reproduce_report for seeds {sorted(missing)} of {label}; run "
            "experiments.reproduce_report with the same flags and then this again (its runs are "
            "kept)"
        )
    return control + trained


def ends(rows: list[dict], arm: str) -> tuple[int, int]:
    """In how many seeds an arm is below the unigram's loss and uses its context; of how many."""
    members = [row for row in rows if row["arm"] == arm]
    unigram = rows[0]["references"]["unigram"]["loss"]
    good = [r["final"][LOSS] < unigram and r["final"][CONTEXT] > collapse.BLIND for r in members]
    return sum(good), len(good)


def analyse(rows: list[dict]) -> page.Study:
    """Which line ends it, and how the published recipe does at every length."""
    n = compare.n_seeds(rows)
    names = list(compare.by_arm(rows))
    first = min(row["steps"] for row in rows)
    tried = [line for line in LINES if line_arm(line, first) in names]
    effects = {
        line: compare.difference(rows, line_arm(line, first), report_arm(first), LOSS)
        for line in tried
    }
    counts = {line: ends(rows, line_arm(line, first)) for line in tried}
    ending = [line for line, (good, of) in counts.items() if good == of]
    best = min(ending, key=lambda line: effects[line].mean, default=None)
    lengths = sorted({r["steps"] for r in rows if r["arm"] == b158_arms(r["steps"])[0]})
    published = [published_line(rows, steps) for steps in lengths] or ["not run"]
    told = "; ".join(
        f"{line} {stats.effect_text(effects[line])}, {counts[line][0]} of {counts[line][1]} ended"
        for line in tried
    )
    result = (
        f"change of held-out loss at {first} steps by one line of the report's recipe: {told}; "
        f"published recipe: {'; '.join(published)}; unigram "
        f"{rows[0]['references']['unigram']['loss']:.2f}"
    )
    if ending:
        lost = [line for line in tried if line not in ending]
        conclusion = (
            f"one line ends the collapse of the report's recipe in every seed: "
            f"{' or '.join(ending)} (by most: {best}, {stats.effect_text(effects[best])} nats)"
            + (f"; {' and '.join(lost)} do{'es' * (len(lost) == 1)} not" if lost else "")
        )
    elif tried:
        conclusion = f"none of {len(tried)} one-line changes ends the collapse in every seed"
    else:
        conclusion = "one-line changes: not run"
    if lengths:
        conclusion += f"; the published recipe: {published_summary(rows, lengths)}"
    return page.Study(
        arms=f"the report's recipe; it with one line changed: {', '.join(tried)}"
        + (f"; b158 and its twin, {', '.join(map(str, lengths))} steps" if lengths else ""),
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            line_table(rows, first),
            *([published_table(rows, lengths)] if lengths else []),
            sample_table(rows),
            compare.arm_table(rows),
        ],
        figures=figures(rows, first, lengths),
    )


def healthy(rows: list[dict], steps: int) -> bool:
    """No severe evaluation of b158 after the transit, in any seed, and all passed the transit."""
    members = [r["numbers"] for r in rows if r["arm"] == b158_arms(steps)[0]]
    return all(m["transit"] is not None and m["severe_after_transit"] == 0 for m in members)


def gap(rows: list[dict], steps: int, spec: str = "+.3f") -> str:
    """Paired difference of held-out loss, ternary - full precision."""
    ternary, full = b158_arms(steps)
    if not any(row["arm"] == full for row in rows):
        return "not run"
    return stats.effect_text(compare.difference(rows, ternary, full, LOSS), spec)


def published_line(rows: list[dict], steps: int) -> str:
    members = [r["numbers"] for r in rows if r["arm"] == b158_arms(steps)[0]]
    severe = sum(m["severe_after_transit"] for m in members)
    return (
        f"{steps} steps: {severe} severe evaluations after the transit, stage averages "
        f"{stats.interval(m['unique_stage1'] for m in members).text('.1f')} and "
        f"{stats.interval(m['unique_stage2'] for m in members).text('.1f')}, against full "
        f"precision {gap(rows, steps)}"
    )


def published_summary(rows: list[dict], lengths: list[int]) -> str:
    """One clause about all lengths."""
    good = [steps for steps in lengths if healthy(rows, steps)]
    told = ", ".join(f"{steps}" for steps in good)
    if good == lengths:
        text = f"no severe evaluation once below the unigram's loss (T = {told})"
    elif good:
        text = f"no severe evaluation once below the unigram's loss at T = {told} only"
    else:
        text = "severe evaluations, or never below the unigram's loss, at every length"
    numbers = [r["numbers"] for r in rows if r["arm"] == b158_arms(r["steps"])[0]]
    diverse = sum(m["unique_stage2"] >= m["unique_stage1"] for m in numbers)
    prices = ", ".join(f"{gap(rows, steps, '+.2f')} at T = {steps}" for steps in lengths)
    return (
        f"{text}; stage 2 has as many distinct predictions as stage 1 or more in {diverse} of "
        f"{len(numbers)} runs; the price of ternary weights in nats: {prices}"
    )


def line_table(rows: list[dict], steps: int) -> page.Table:
    """The one-line changes beside the report's recipe."""
    unigram = rows[0]["references"]["unigram"]["loss"]
    lines = []
    for label, arm in (
        ("the report's recipe", report_arm(steps)),
        *((x, line_arm(x, steps)) for x in LINES if line_arm(x, steps) in compare.by_arm(rows)),
    ):
        d = compare.difference(rows, arm, report_arm(steps), LOSS)
        good, of = ends(rows, arm)
        change = "" if arm == report_arm(steps) else d.text("+.2f") + ("" if d.effect else " (0)")
        told = [
            stats.interval(compare.values(rows, arm, key).values()).text(spec)
            for key, spec in ((LOSS, ".2f"), ("collapse/entropy", ".2f"), (CONTEXT, ".3f"))
        ]
        lines.append([label, *told, change, f"{good} of {of}"])
    note = (
        f"After {steps} steps; ended: below the unigram's loss ({unigram:.2f}) with a context "
        f"information above {collapse.BLIND}. Differences are paired; (0): no effect seen."
    )
    columns = ["one line changed", "held-out loss", "entropy", "context MI", "change", "ended"]
    return page.Table("Which line ends it", columns, lines, note)


def published_table(rows: list[dict], lengths: list[int]) -> page.Table:
    """The published recipe, its twin, and the report's recipe at every length."""
    lines = []
    for steps in lengths:
        for arm in (report_arm(steps), *b158_arms(steps)):
            members = [r for r in rows if r["arm"] == arm]
            if not members:
                continue
            numbers = [r["numbers"] for r in members]
            told = [
                stats.interval(m[key] for m in numbers).text(spec)
                for key, spec in (("unique_stage1", ".1f"), ("unique_stage2", ".1f"))
            ]
            transits = [m["transit"] for m in numbers]
            passed = [t for t in transits if t is not None]
            severe = sum(m["severe_after_transit"] for m in numbers) if passed else "-"
            loss = stats.interval(compare.values(rows, arm, LOSS).values()).text(".3f")
            against = gap(rows, steps) if arm == b158_arms(steps)[0] else ""
            lines.append([
                arm, f"{max(passed)} ({len(passed)} of {len(transits)})" if passed else "never",
                str(severe), *told, str(numbers[0]["unique_final"]), loss, against,
            ])  # fmt: skip
    reference = rows[0]["references"]
    lines.append(["the text", "", "", *[str(reference["targets"]["distinct"])] * 3, "", ""])
    for name in ("bigram", "unigram"):
        count, loss = str(reference[name]["distinct"]), f"{reference[name]['loss']:.3f}"
        lines.append([f"{name} predictor", "", "", *[count] * 3, loss, ""])
    note = (
        "Transit: first evaluation with a held-out loss below the unigram's (the latest seed's); "
        "severe: evaluations with fewer than 3 distinct predictions after it, summed over seeds. "
        "Distinct: mean over the evaluations of a stage; last of the first seed."
    )
    columns = ["arm", "transit", "severe after it", "distinct, stage 1", "stage 2", "last",
               "held-out loss", "against full precision"]  # fmt: skip
    return page.Table("The published recipe at the report's lengths", columns, lines, note)


def sample_table(rows: list[dict]) -> page.Table:
    """What the first seed of every arm writes after the same words."""
    seed = min(row["seed"] for row in rows)
    members = [row for row in rows if row["seed"] == seed]
    lines = [
        [r["arm"], " ".join(r["sample"]["text"].split()), " ".join(r["sample"]["sampled"].split())]
        for r in members
    ]
    prompt = " ".join(members[0]["sample"]["prompt"].split())
    columns = ["arm", "greedy", "sampled at temperature 1"]
    return page.Table(f'After "... {prompt}"', columns, lines, f"Seed {seed}.")


def figures(rows: list[dict], first: int, lengths: list[int]) -> list[tuple[str, str]]:
    """Loss of every one-line change, and the curves of the longest common length."""
    reference = rows[0]["references"]

    def point(arm):
        found = stats.interval(compare.values(rows, arm, LOSS).values())
        return found.mean, found.low, found.high

    listed = [("the report's recipe", report_arm(first)), *((x, line_arm(x, first)) for x in LINES)]
    listed.append(("the published recipe", b158_arms(first)[0]))
    there = compare.by_arm(rows)
    dots = charts.dot_plot(
        [(label, {f"{first} steps": point(arm)}) for label, arm in listed if arm in there],
        title="One line changed",
        xlabel="held-out loss, nats per token",
        references=[(name, reference[name]["loss"]) for name in ("unigram", "uniform")],
    )
    caption = "Left of the unigram, a model knows more than word frequencies. 95 % intervals."
    return [
        (caption, dots),
        *(
            ("One line per seed.", charts.panels_svg([panel]))
            for t in lengths
            for panel in curve_panels(rows, t)
        ),
    ]


def curve_panels(rows: list[dict], steps: int) -> list[charts.Panel]:
    """Held-out loss and distinct predictions of the report's and the published recipe."""
    reference = rows[0]["references"]
    chosen = [report_arm(steps), line_arm("AdamW for Adam", steps), *b158_arms(steps)]
    out = []
    for key, title, ylabel, lines in (
        ("eval/loss", f"Held-out loss, {steps} steps", "nats per token",
         tuple((name, reference[name]["loss"]) for name in ("uniform", "unigram"))),
        ("collapse/unique_tokens", f"Distinct predictions, {steps} steps", "tokens",
         (("text", reference["targets"]["distinct"]),)),
    ):  # fmt: skip
        series = [
            charts.Series(r["arm"].rpartition(",")[0], r["curve"]["step"], r["curve"][key])
            for arm in chosen
            for r in rows
            if r["arm"] == arm
        ]
        out.append(charts.Panel(series, title, ylabel, steps // 2, lines))
    return out


def body(request: common.Request) -> None:
    extra = functools.partial(reproduce_report.numbers, request.cfg.run.steps)
    trained = sweep.train_arms(NAME, request, arms(request), extra=extra)
    rows = with_control(trained, results.load(reproduce_report.NAME))
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True,
                lengths=LENGTHS)  # fmt: skip
