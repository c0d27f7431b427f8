"""Rebuild what is told from the committed rows: every table, figure, the index, README's claims.

Prints for every claim and study whether it holds. Exits with 1 when README or the index tells a
claim that does not hold, or has not enough rows, where it is told.

    make results
"""

import re
from pathlib import Path

from bitnet_jax import charts
from bitnet_jax.cli import flags
from bitnet_jax.fields import check_known
from experiments.lab import experiment, headline, pages, rows
from experiments.lab.claims import HOLDS, UNDECIDED, Finding
from experiments.lab.pages import Part

ROOT = Path(__file__).parents[2]
QUESTIONS = (  # in the order of the index
    "explain_collapse",
    "end_collapse",
    "shrink_law",
    "critical_decay",
    "weight_bounds",
    "sweep_stage2_decay",
    "logit_distribution",
    "training_length",
    "sweep_regularisers",
    "fork_transition",
    "sweep_architectures",
    "degeneration",
    "warmup_from_dense",
    "ternary_price",
    "faults",
    "held_out_faults",
    "reproduce_report",
)
INDEX, README, PAGES = ROOT / "experiments/README.md", ROOT / "README.md", ROOT / "runs/results"
MARKED = re.compile(r"<!-- (claims|table|index): ?(.*?) ?-->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    """Rebuild everything; 0, or 1 when something that is told does not hold."""
    by_question = {name: analyse(name) for name in QUESTIONS}
    wrong = 0
    for name, findings in by_question.items():
        for finding in findings:
            print(pages.status_line(name, finding))
            wrong += finding.is_stated and finding.status != HOLDS
    df = headline.read()
    for steps, path in headline.PICTURES.items():
        charts.save_figure(path, headline.picture(df, steps))
    for path in (INDEX, README):
        path.write_text(rebuild(path.read_text(), by_question, df))
    n_stated = sum(f.is_stated for findings in by_question.values() for f in findings)
    print(f"{n_stated} stated, {wrong} of them not borne out; pages: {PAGES}")
    return 1 if wrong else 0


def analyse(name: str) -> list[Finding]:
    """Write the page of a question; findings on its studies, and on those told without rows."""
    module, committed_rows = experiment.load(name), rows.read(name)
    parts = pages.analyse(module.CLAIMS, module.show, committed_rows)
    pages.write(PAGES / f"{name}.html", name, module.__doc__, parts)
    return complete(module.CLAIMS, parts)


def complete(claims, parts: list[Part]) -> list[Finding]:
    """Findings of the parts; `not enough rows` for studies where a claim is told without any."""
    findings = [finding for part in parts for finding in part.findings]
    with_rows = {part.study for part in parts}
    absent = [
        Finding(claim, study, UNDECIDED, 0, "no rows")
        for claim in claims
        for study in claim.studies
        if study not in with_rows
    ]
    return findings + absent


def rebuild(text: str, by_question: dict[str, list[Finding]], df) -> str:
    """A document with its marked parts rewritten; raises UserError for a claim that is not there.

    `<!-- claims: QUESTION/CLAIM ... -->` lists claims, `<!-- index: -->` all of them by question,
    `<!-- table: STEPS -->` is `headline.table` of `df`, the largest study's rows, at that length;
    each ends at `<!-- end -->`.
    """

    def part(match: re.Match) -> str:
        kind, wanted = match.groups()
        if kind == "table":
            body = markdown(*headline.table(df, int(wanted)))
        else:
            body = (
                index(by_question) if kind == "index" else claim_list(wanted.split(), by_question)
            )
        head = f"<!-- {kind}: {wanted} -->".replace("  ", " ")
        return f"{head}\n\n{body}\n\n<!-- end -->"

    return MARKED.sub(part, text)


def markdown(heads: list[str], table_rows: list[list[str]]) -> str:
    """A table."""
    all_rows = [heads, ["---"] * len(heads), *table_rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in all_rows)


def claim_list(wanted: list[str], by_question: dict[str, list[Finding]]) -> str:
    """One line per claim: its text, where it holds with its seeds, and its question."""
    text_lines = []
    for place in wanted:
        name, _, claim = place.partition("/")
        check_known(name, by_question, "question of a claim:")
        check_known(claim, {f.claim.name: f for f in by_question[name]}, f"claim of {name}:")
        mine = [f for f in by_question[name] if f.claim.name == claim]
        places = [f"{study} (n = {n})" for study, n in where_stated(mine)]
        text = mine[0].claim.text
        where = f"{', '.join(places)}; [`{name}`](experiments/{name}.py)"
        text_lines.append(f"- **{text[0].upper()}{text[1:]}**: {where}")
    return "\n".join(text_lines)


def where_stated(findings: list[Finding]) -> list[tuple[str, int]]:
    """The studies that a claim is stated of, with what is wrong there, and their seeds per arm."""
    return [
        (f.study.name + ("" if f.status == HOLDS else f": {f.status}"), f.seeds)
        for f in findings
        if f.is_stated
    ]


def index(by_question: dict[str, list[Finding]]) -> str:
    """The index: a line per claim, and below it the commands that gave the rows."""
    text_lines = ["| question | answer | where it holds | n | command |", "|---|---|---|---|---|"]
    details = []
    for name, findings in by_question.items():
        question = experiment.load(name).__doc__.strip().partition("\n")[0]
        cells = [f"[{question}]({name}.py)", f"`python -m experiments.{name}`"]
        for claim in dict.fromkeys(f.claim for f in findings):
            mine = [f for f in findings if f.claim == claim]
            places, n = zip(*where_stated(mine), strict=True)
            line = (cells[0], claim.text, "; ".join(places), "; ".join(map(str, n)), cells[1])
            text_lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
            cells = ["", ""]
        committed_rows = rows.read(name)
        listed = "\n".join(f"- `{command}`" for command in rows.commands(committed_rows))
        title = f"{name}: {len(committed_rows)} rows, {rows.cost(committed_rows)}"
        details += [f"<details><summary>{title}</summary>", "", listed, "", "</details>"]
    return "\n".join([*text_lines, "", *details])


if __name__ == "__main__":
    flags.guard(main)
