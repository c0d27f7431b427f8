"""What an experiment shows: tables and figures of one study, as text and as an HTML page."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first column is the row's name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Study:
    """The rows of one experiment at one size and corpus, analysed."""

    arms: str  # what was compared, for the index
    n: int  # seeds
    result: str  # numbers with intervals
    conclusion: str  # one line that follows from the rows
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # caption and <svg> element

    @property
    def answer(self) -> str:
        """The conclusion as a sentence."""
        return f"{self.conclusion[0].upper()}{self.conclusion[1:].rstrip('.')}."


Analyse = Callable[[list[dict]], Study]


def text_table(table: Table) -> str:
    """The table in columns of equal width."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    shown = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *shown, *([table.note] if table.note else [])])


def console(label: str, study: Study) -> str:
    """Tables, result and conclusion as text for a terminal."""
    parts = [f"== {label}", *map(text_table, study.tables)]
    return "\n\n".join(parts) + f"\n\nresult: {study.result}\nconclusion: {study.answer}"


def render(template: str, **values) -> str:
    """A template of this folder with its values; a value that is missing raises."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def write(path: Path, name: str, doc: str, studies: dict[str, Study], rows: list[dict]) -> Path:
    """Write one self-contained page about an experiment; `studies` maps labels to analyses."""
    question, _, rest = doc.strip().partition("\n")
    first = rows[0]
    html = render(
        "page.html.jinja",
        name=name,
        question=question,
        about=rest.strip(),
        studies={
            label: (study, [(caption, Markup(svg)) for caption, svg in study.figures])
            for label, study in studies.items()
        },
        made=sorted({f"{r['device']}, {r['cores']} cores" for r in rows}),
        versions=first["versions"],
        commits=sorted({str(r["git_commit"])[:10] for r in rows}),
        n_rows=len(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, path)
    return path
