"""The answer to the report on one page, and the head of the README: built from rows alone.

Called by `make report`. For each of the four investigations that make the answer the study with the
largest model is shown; a table says whether the same holds on the other texts and sizes.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from bitnet_jax import charts
from experiments import (
    compare,
    end_collapse,
    explain_collapse,
    ledger,
    page,
    reproduce_report,
    results,
    shrink_law,
    stats,
)

PICTURE = results.FOLDER / "answer.svg"
COUPLED, DECOUPLED, PUBLISHED = "the report's recipe", "one line changed: AdamW", "published recipe"
PARTS = (  # title, experiment, which of its pictures
    ("Reproduced", reproduce_report, ()),
    ("Explained: which factor", explain_collapse, (0,)),
    ("Explained: how", shrink_law, (0, 1)),  # decay's part of each update, coupled and decoupled
    ("Ended", end_collapse, (0,)),
)


@dataclass(frozen=True)
class Part:
    """One of the four steps of the answer: its study and pictures."""

    title: str
    name: str
    label: str
    study: page.Study
    figures: list[tuple[str, Markup]]
    commands: list[str]
    cost: str


def largest(rows: list[dict]) -> tuple[str, list[dict]]:
    """Label and rows of the study with the largest vocabulary, then with most steps."""
    studies = results.by_study(rows)
    return max(
        studies.items(),
        key=lambda study: (study[1][0]["vocab_size"], max(row["steps"] for row in study[1])),
    )


def richest(rows: list[dict]) -> tuple[str, list[dict]]:
    """Label and rows of the study with most arms, then the largest."""
    studies = results.by_study(rows)
    most = max(len(compare.by_arm(members)) for members in studies.values())
    return largest([
        row
        for members in studies.values()
        if len(compare.by_arm(members)) == most
        for row in members
    ])  # fmt: skip


def part(title: str, module, shown: tuple[int, ...]) -> Part:
    """Analyse the committed rows of an experiment; raises UserError when there are none.

    Shown is the study of the largest model, but of the one-line changes that with most of them.
    """
    rows = results.load(module.NAME)
    label, chosen = richest(rows) if module is end_collapse else largest(rows)
    study = module.analyse(chosen)
    figures = [(caption, Markup(svg)) for caption, svg in (study.figures[i] for i in shown)]
    mine = results.own(module.NAME, chosen)
    commands, cost = results.commands(mine), results.cost(mine)
    return Part(title, module.NAME, label, study, figures, commands, cost)


def arms(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of `end_collapse` by column of the headline table, at its shortest length."""
    steps = min(row["steps"] for row in rows)
    names = {
        COUPLED: end_collapse.report_arm(steps),
        DECOUPLED: end_collapse.line_arm("AdamW for Adam", steps),
        PUBLISHED: end_collapse.b158_arms(steps)[0],
    }
    found = {label: [r for r in rows if r["arm"] == arm] for label, arm in names.items()}
    return {label: members for label, members in found.items() if members}


def headline_table(rows: list[dict]) -> page.Table:
    """The report's numbers beside those of its recipe, of one line changed, and of the text."""
    columns = arms(rows)
    reference = rows[0]["references"]
    ladder = " / ".join(
        str(x)
        for x in (
            reference["targets"]["distinct"],
            reference["bigram"]["distinct"],
            reference["unigram"]["distinct"],
        )
    )
    losses = f"- / {reference['bigram']['loss']:.2f} / {reference['unigram']['loss']:.2f}"
    lines = []
    for label, reported, get, spec, told in (
        (f"distinct predictions of {reference['tracked_positions']}, stage 1", "15.1",
         lambda r: r["numbers"]["unique_stage1"], ".1f", ladder),
        ("stage 2", "3.6", lambda r: r["numbers"]["unique_stage2"], ".1f", ""),
        ("last step", "8", lambda r: r["numbers"]["unique_final"], ".0f", ""),
        ("training loss, mean over the run", "9.60", lambda r: r["numbers"]["loss_mean"], ".2f",
         ""),
        ("training loss, last step", "9.92", lambda r: r["numbers"]["loss_final"], ".2f", ""),
        ("held-out loss", "", lambda r: r["final"]["eval/loss"], ".2f", losses),
        (f"entropy at the end (ln V = {reference['uniform']['entropy']:.2f})", "10.7",
         lambda r: r["final"]["collapse/entropy"], ".2f", ""),
        ("standard deviation of the logits", "", lambda r: r["final"]["collapse/logit_std"], ".2f",
         ""),
        ("weights above 1.1 in magnitude", "981,223", lambda r: r["above_1.1"]["all"], ",.0f", ""),
    ):  # fmt: skip
        cells = [stats.interval(map(get, members)).text(spec) for members in columns.values()]
        lines.append([label, reported, *cells, told])
    heads = [f"{label} (n={len(members)})" for label, members in columns.items()]
    title = f"After {min(row['steps'] for row in rows)} steps"
    note = "Mean [95 % t interval] over seeds; every arm starts from the same seeds and batches."
    columns = ["", "the report said", *heads, "the text / bigram / unigram predictor"]
    return page.Table(title, columns, lines, note)


def picture(rows: list[dict]) -> list[charts.Panel]:
    """Distinct predictions and held-out loss: the report's recipe, one line changed, published."""
    reference = rows[0]["references"]
    out = []
    for key, title, ylabel, lines in (
        ("collapse/unique_tokens", f"Distinct predictions of {reference['tracked_positions']}",
         "tokens", [(k, reference[k]["distinct"]) for k in ("targets", "bigram")]),
        ("eval/loss", "Held-out loss", "nats per token",
         [(k, reference[k]["loss"]) for k in ("uniform", "unigram", "bigram")]),
    ):  # fmt: skip
        series = [
            charts.Series(label, r["curve"]["step"], r["curve"][key])
            for label, members in arms(rows).items()
            for r in members
        ]
        named = tuple(("text" if name == "targets" else name, value) for name, value in lines)
        boundary = min(row["steps"] for row in rows) // 2
        out.append(charts.Panel(series, title, ylabel, boundary, named))
    return out


def verdict(studies: list[list[dict]]) -> str:
    """Yes or no to the report's conclusion, from the factorial on every corpus it was run on."""
    ending = [explain_collapse.ending(rows) for rows in studies]
    coupling = all("decay enters" in changes for changes in ending)
    arithmetic = any("arithmetic" in changes for changes in ending)
    if coupling and not arithmetic:
        return (
            "No: the collapse is neither structural nor the fault of ternary weights. Weight decay "
            "that is coupled into Adam shrinks the output head, and the logits with it; the same "
            "decay decoupled, as in AdamW, does not."
        )
    if arithmetic and not coupling:
        return "Yes: without ternary weights the collapse ends, and decoupling the decay does not."
    if coupling:
        return "Both count: decoupling the decay ends the collapse, and so does full precision."
    return "Open: neither decoupling the decay nor full precision ends the collapse."


def place(row: dict) -> tuple[str, int]:
    """The text and the vocabulary of a row."""
    return row["corpus"], row["vocab_size"]


def holds(reproduced: list[dict], explained: list[dict], ended: list[dict]) -> page.Table:
    """The findings on every text and size, from the rows of three experiments.

    A column is a text and a vocabulary, the largest first; its shortest length is that of the
    one-line changes.
    """
    places = sorted({place(row) for row in ended}, key=lambda key: (-key[1], key[0]))
    columns = {key: [r for r in ended if place(r) == key] for key in places}
    above, factorial = (
        {key: [r for r in rows if place(r) == key] for key in places}
        for rows in (reproduced, explained)
    )

    def line(label, cell, of):
        return [label, *(cell(of[key]) if of[key] else "not run" for key in places)]

    def average(name):
        factor = list(explain_collapse.FACTORS).index(name)

        def cell(rows):
            effect = explain_collapse.main_effect(rows, factor, explain_collapse.LOSS)
            return stats.effect_text(effect)

        return cell

    lines = [
        line("runs of the report's recipe that end above the unigram's loss", above_unigram, above),
        *(line(f"{name}, alone", functools.partial(one_line, name), columns)
          for name in end_collapse.LINES),
        line("decoupling, averaged over the factorial", average("decay enters"), factorial),
        line("full precision, averaged over the factorial", average("arithmetic"), factorial),
        line("published recipe: severe evaluations once below the unigram's loss", severe, columns),
        line("published recipe: ternary against full precision", against_twin, columns),
    ]  # fmt: skip
    note = (
        "Changes of the held-out loss, paired within seeds, with 95 % t intervals; a line ends the "
        "collapse of a seed when its loss is below the unigram's and depends on the context. T: "
        "steps."
    )
    heads = [f"{corpus}, {vocab:,} tokens" for corpus, vocab in places]
    return page.Table("Does it hold elsewhere?", ["", *heads], lines, note)


def lengths(rows: list[dict]) -> str:
    return "T = " + ", ".join(map(str, sorted({row["steps"] for row in rows})))


def above_unigram(rows: list[dict]) -> str:
    bad = sum(r["final"]["eval/loss"] > r["references"]["unigram"]["loss"] for r in rows)
    return f"{bad} of {len(rows)} ({lengths(rows)})"


def one_line(name: str, rows: list[dict]) -> str:
    """Effect of one line of the report's recipe, and in how many seeds it ends the collapse."""
    steps = min(row["steps"] for row in rows)
    arm = end_collapse.line_arm(name, steps)
    if arm not in compare.by_arm(rows):
        return "not run"
    effect = compare.difference(rows, arm, end_collapse.report_arm(steps), end_collapse.LOSS)
    good, of = end_collapse.ends(rows, arm)
    return f"{stats.effect_text(effect)}, ended in {good} of {of}"


def published(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["arm"] == end_collapse.b158_arms(row["steps"])[0]]


def severe(rows: list[dict]) -> str:
    """Of the published recipe, at all its lengths."""
    numbers = [row["numbers"] for row in published(rows)]
    if not numbers:
        return "not run"
    never = sum(m["transit"] is None for m in numbers)
    count = sum(m["severe_after_transit"] for m in numbers)
    text = f"{count} in {len(numbers)} runs ({lengths(published(rows))})"
    return text + (f"; {never} never below it" if never else "")


def against_twin(rows: list[dict]) -> str:
    """Ternary - full precision of the published recipe, at each of its lengths."""
    steps = sorted({row["steps"] for row in published(rows)})
    told = [f"{end_collapse.gap(rows, t, '+.2f')} at T = {t}" for t in steps]
    return "; ".join(told) or "not run"


def tabular(table: page.Table) -> list[str]:
    """Lines of a table in Markdown."""
    return [
        "| " + " | ".join(table.columns) + " |",
        "|" + "---|" * len(table.columns),
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]


def markdown(
    told: str,
    parts: list[Part],
    table: page.Table,
    label: str,
    elsewhere: page.Table,
    commands: list[str],
) -> str:
    """The head of the README: the verdict as `told`, picture, tables, and one sentence per part.

    `label` and `commands` are those of the study of `table`.
    """
    picture_path = PICTURE.relative_to(Path(__file__).parents[1])
    lines = [
        f"**{told}**",
        "",
        f"![distinct predictions and held-out loss against step]({picture_path})",
        "",
        *tabular(table),
        "",
        f"{table.title}; {label}. {table.note}",
        "",
    ]
    for p in parts:
        lines.append(f"- **{p.title}** ([`{p.name}`](experiments/{p.name}.py), {p.label}): "
                     f"{p.study.answer}")  # fmt: skip
    lines += ["", *tabular(elsewhere), "", elsewhere.note]
    chosen = dict.fromkeys([*(p.commands[0] for p in parts), commands[0]])
    index = (
        "All commands, of other seeds, lengths, texts and sizes too, with their times: "
        "[the index](experiments/README.md)."
    )
    return "\n".join([*lines, "", "```", *chosen, "```", "", index])


def write(path: Path) -> str:
    """Write the page to `path` and the picture, and return the README's part.

    Raises UserError when one of the four experiments has no rows.
    """
    parts = [part(*p) for p in PARTS]
    label, ended = largest(results.load(end_collapse.NAME))
    table = headline_table(ended)
    panels = picture(ended)
    charts.save_figure(PICTURE, panels)
    _, reproduced = largest(results.load(reproduce_report.NAME))
    claims = ledger.table(ledger.recompute(reproduce_report.by_length(reproduced)))
    told = verdict(list(results.by_study(results.load(explain_collapse.NAME)).values()))
    rows = [results.load(m.NAME) for m in (reproduce_report, explain_collapse, end_collapse)]
    elsewhere = holds(*rows)
    html = page.render(
        "answer.html.jinja",
        verdict=told,
        elsewhere=elsewhere,
        table=table,
        label=label,
        hero=Markup(charts.panels_svg(panels)),
        parts=parts,
        ledger=claims,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    commands = results.commands(results.own(end_collapse.NAME, ended))
    return markdown(told, parts, table, label, elsewhere, commands)
