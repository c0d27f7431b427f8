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
    "faults",
    "held_out_faults",
    "reproduce_report",
)
INDEX, README, PAGES = ROOT / "experiments/README.md", ROOT / "README.md", ROOT / "runs/results"
MARKED = re.compile(r"<!-- (claims|table|index): ?(.*?) ?-->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    """Rebuild everything; 0, or 1 when something that is told does not hold."""
    found = {name: analyse(name) for name in QUESTIONS}
    wrong = 0
    for name, findings in found.items():
        for finding in findings:
            print(pages.status_line(name, finding))
            wrong += finding.is_told and finding.status != HOLDS
    df = headline.read()
    for steps, path in headline.PICTURES.items():
        charts.save_figure(path, headline.picture(df, steps))
    for path in (INDEX, README):
        path.write_text(rebuild(path.read_text(), found, df))
    n_told = sum(f.is_told for findings in found.values() for f in findings)
    print(f"{n_told} told, {wrong} of them not borne out; pages: {PAGES}")
    return 1 if wrong else 0


def analyse(name: str) -> list[Finding]:
    """Write the page of a question; findings on its studies, and on those told without rows."""
    module, made = experiment.load(name), rows.read(name)
    parts = pages.analyse(module.CLAIMS, module.show, made)
    pages.write(PAGES / f"{name}.html", name, module.__doc__, parts)
    return complete(module.CLAIMS, parts)


def complete(claims, parts: list[Part]) -> list[Finding]:
    """Findings of the parts; `not enough rows` for studies where a claim is told without any."""
    found = [finding for part in parts for finding in part.findings]
    there = {part.study for part in parts}
    absent = [
        Finding(claim, study, UNDECIDED, 0, "no rows")
        for claim in claims
        for study in claim.studies
        if study not in there
    ]
    return found + absent


def rebuild(text: str, found: dict[str, list[Finding]], df) -> str:
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
            body = index(found) if kind == "index" else claim_list(wanted.split(), found)
        head = f"<!-- {kind}: {wanted} -->".replace("  ", " ")
        return f"{head}\n\n{body}\n\n<!-- end -->"

    return MARKED.sub(part, text)


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table."""
    told = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in told)


def claim_list(wanted: list[str], found: dict[str, list[Finding]]) -> str:
    """One line per claim: its text, where it holds with its seeds, and its question."""
    lines = []
    for place in wanted:
        name, _, claim = place.partition("/")
        check_known(name, found, "question of a claim:")
        check_known(claim, {f.claim.name: f for f in found[name]}, f"claim of {name}:")
        mine = [f for f in found[name] if f.claim.name == claim]
        places = [f"{study} (n = {n})" for study, n in told(mine)]
        text = mine[0].claim.text
        where = f"{', '.join(places)}; [`{name}`](experiments/{name}.py)"
        lines.append(f"- **{text[0].upper()}{text[1:]}**: {where}")
    return "\n".join(lines)


def told(findings: list[Finding]) -> list[tuple[str, int]]:
    """The studies that a claim is told of, with what is wrong there, and their seeds per arm."""
    return [
        (f.study.name + ("" if f.status == HOLDS else f": {f.status}"), f.seeds)
        for f in findings
        if f.is_told
    ]


def index(found: dict[str, list[Finding]]) -> str:
    """The index: a line per claim, and below it the commands that gave the rows."""
    lines = ["| question | answer | where it holds | n | command |", "|---|---|---|---|---|"]
    details = []
    for name, findings in found.items():
        question = experiment.load(name).__doc__.strip().partition("\n")[0]
        cells = [f"[{question}]({name}.py)", f"`python -m experiments.{name}`"]
        for claim in dict.fromkeys(f.claim for f in findings):
            mine = [f for f in findings if f.claim == claim]
            places, n = zip(*told(mine), strict=True)
            line = (cells[0], claim.text, "; ".join(places), "; ".join(map(str, n)), cells[1])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
            cells = ["", ""]
        made = rows.read(name)
        listed = "\n".join(f"- `{command}`" for command in rows.commands(made))
        title = f"{name}: {len(made)} rows, {rows.cost(made)}"
        details += [f"<details><summary>{title}</summary>", "", listed, "", "</details>"]
    return "\n".join([*lines, "", *details])


if __name__ == "__main__":
    flags.guard(main)
