"""A question on the terminal and on a page of its own: claims, tables and figures by study."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from experiments.lab import rows, studies
from experiments.lab.claims import Claim, Finding, judge
from experiments.lab.exhibits import Exhibits, text_table
from experiments.lab.stats import NotEnough
from experiments.lab.studies import Study


@dataclass(frozen=True)
class Part:
    """One study of a question: what its rows say about the claims, and what they show."""

    study: Study
    rows: list[dict]
    findings: list[Finding]
    exhibits: Exhibits

    @property
    def label(self) -> str:
        steps = sorted({row["config"]["run"]["steps"] for row in self.rows})
        return f"{self.study.name}, {', '.join(map(str, steps))} steps"


def analyse(claims: tuple[Claim, ...], show: Callable, all_rows: list[dict]) -> list[Part]:
    """Judge and show every study that rows belong to, in the order of the rows."""
    parts = []
    for identity, members in rows.by_study(all_rows):
        study = studies.named(identity) or Study(studies.describe(identity), "", (), "")
        df = rows.frame(members)
        exhibits = Exhibits(df)
        try:
            show(df, exhibits)
        except NotEnough as error:  # of some arms: what is there has been shown
            exhibits.grid(f"Not enough rows to show more: {error}", ["arm"], [])
            exhibits.table(df)
        findings = [judge(claim, study, df) for claim in claims]
        parts.append(Part(study, members, findings, exhibits))
    return parts


def tell(
    name: str, doc: str, claims: tuple[Claim, ...], show: Callable, all_rows: list[dict], path: Path
) -> list[Part]:
    """Print what rows show, write the page, and return the parts."""
    parts = analyse(claims, show, all_rows)
    for part in parts:
        print(f"\n== {part.label}\n")
        print("\n\n".join(map(text_table, part.exhibits.tables)) + "\n")
        for finding in part.findings:
            print(status_line(name, finding))
    print(f"page: {write(path, name, doc, parts)}")
    return parts


def status_line(name: str, finding: Finding) -> str:
    """`holds: end_collapse/adamw on quick (n = 3): TEXT`; (not stated there) where it is not."""
    why = f" ({finding.why})" if finding.why else f" (n = {finding.seeds})"
    where = f"{name}/{finding.claim.name} on {finding.study.name}{why}"
    note = "" if finding.is_stated else " (not stated there)"
    return f"{finding.status}{note}: {where}: {finding.claim.text}"


def write(path: Path, name: str, doc: str, parts: list[Part]) -> Path:
    """One self-contained page about a question."""
    question, _, rest = doc.strip().partition("\n")
    all_rows = [row for part in parts for row in part.rows]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("question.html.jinja").render(
        name=name,
        question=question,
        about=rest.strip(),
        parts=parts,
        safe=Markup,
        devices=sorted({f"{row['device']}, {row['cores']} cores" for row in all_rows}),
        versions=all_rows[0]["versions"],
        commits=sorted({str(row["commit"])[:10] for row in all_rows}),
        n_rows=len(all_rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, path)
    return path
