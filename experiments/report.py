"""Rebuild every table, figure and page of the experiments from their committed rows.

Writes a page per experiment, an index of them and the page of the answer to runs/report/, and the
generated parts of README.md and experiments/README.md. An experiment without rows is an error.

    make report
"""

import dataclasses
import importlib
import sys
from pathlib import Path

from bitnet_jax.config import UserError
from experiments import answer, page, results

NAMES = (
    "reproduce_report",
    "explain_collapse",
    "shrink_law",
    "end_collapse",
    "weight_bounds",
    "sweep_stage2_decay",
    "logit_distribution",
    "training_length",
    "sweep_regularisers",
    "fork_transition",
    "sweep_architectures",
    "degeneration",
    "faults",
    "warmup_from_dense",
)
INDEX = Path(__file__).parent / "README.md"
README = Path(__file__).parent.parent / "README.md"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One study of one experiment, for the index."""

    name: str
    question: str
    label: str
    study: page.Study
    commands: list[str]
    cost: str


def entries(name: str, folder: Path) -> list[Entry]:
    """Analyse the rows of an experiment, write its page.

    Raises UserError when there are no rows.
    """
    module = importlib.import_module(f"experiments.{name}")
    rows = results.load(name)
    parts = results.by_study(rows)
    studies = {label: module.analyse(part) for label, part in parts.items()}
    page.write(folder / f"{name}.html", name, module.__doc__, studies, rows)
    question = module.__doc__.strip().partition("\n")[0]
    mine = {label: results.own(name, part) for label, part in parts.items()}
    return [
        Entry(
            name, question, label, study, results.commands(mine[label]), results.cost(mine[label])
        )
        for label, study in studies.items()
    ]


def markdown(found: list[Entry]) -> str:
    """The generated part of experiments/README.md: one section per experiment."""
    lines = []
    for name in dict.fromkeys(entry.name for entry in found):
        mine = [entry for entry in found if entry.name == name]
        lines += [f"### [`{name}`]({name}.py): {mine[0].question}", ""]
        for e in mine:
            lines += [
                f"**{e.study.answer}** {e.study.result}",
                "",
                f"- {e.label}; {e.study.arms}; n = {e.study.n} seeds; {e.cost}",
                *(f"- `{command}`" for command in e.commands),
                "",
            ]
    return "\n".join(lines).rstrip()


def answers(found: list[Entry]) -> str:
    """The generated table of README.md: a question and its answer per experiment and study.

    Without the experiments that the answer above it is made of.
    """
    told = {module.NAME for _, module, _ in answer.PARTS}
    lines = ["| question | answer |", "|---|---|"]
    for e in (e for e in found if e.name not in told):
        where = f"{e.label.partition(',')[0]}, {e.label.rpartition(', ')[2]}"
        cells = (f"[{e.question}](experiments/{e.name}.py) ({where})", e.study.answer)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def replace_part(text: str, name: str, part: str) -> str:
    """`text` with what stands between the markers of `name` replaced; UserError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"README.md: needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def main() -> None:
    folder = Path("runs") / "report"
    found = [entry for name in NAMES for entry in entries(name, folder)]
    head = answer.write(folder / "answer.html")
    for path, name, part in (
        (INDEX, "rows", markdown(found)),
        (README, "answer", head),
        (README, "rows", answers(found)),
    ):
        path.write_text(replace_part(path.read_text(), name, part))
    index = folder / "index.html"
    index.write_text(page.render("index.html.jinja", entries=found))
    print(f"{len(found)} studies of {len(NAMES)} experiments in {index} and both README.md")
    print(f"the answer: {folder / 'answer.html'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
