"""The entry of every question: command line, training, rows, what they show."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from bitnet_jax.cli import flags
from bitnet_jax.config import Config
from bitnet_jax.fields import UserError
from experiments.lab import arms, claims, pages, rows
from experiments.lab.arms import Arm, Measure, Request

Train = Callable[[Request, list[Arm], Measure | None], list[dict]]


def experiment(
    doc: str,
    arms_: tuple[Arm, ...],
    measure: Measure | None,
    claims_: tuple[claims.Claim, ...],
    show: Callable,
    *,
    seeds: str = "0-2",
    preset: str = "quick",
    quick: tuple[str, ...] = (),
    lengths: str = "1",
    check: Callable[[Config], None] = lambda cfg: None,
    train: Train = arms.train_arms,
) -> None:
    """Run the question that is this process's script; ends the process.

    `quick` are assignments that the preset of that name gets; `lengths` the multiples of run.steps
    that may be trained; `check` raises UserError for a configuration that the question cannot use;
    `train` replaces `arms.train_arms` where arms depend on finished runs.
    """
    name = sys.modules["__main__"].__spec__.name.rpartition(".")[2]

    def command() -> int:
        request = parse(
            doc, name, sys.argv[1:], seeds=seeds, preset=preset, quick=quick, lengths=lengths
        )
        check(request.cfg)
        flags.prepare()
        if request.dry_run:
            print("\n".join(map(arms.describe, arms.groups(request, list(arms_)))))
            return 0
        new_rows = train(request, list(arms_), measure)
        rows.append(name, new_rows)
        pages.tell(name, doc, claims_, show, new_rows, request.workdir / "page.html")
        return 0

    flags.guard(command)


def parse(
    doc: str,
    name: str,
    argv: list[str],
    *,
    seeds: str = "0-2",
    preset: str = "quick",
    quick: tuple[str, ...] = (),
    lengths: str = "1",
) -> Request:
    """The request of a command line; raises UserError for values that do not fit."""
    parser = flags.Parser(f"python -m experiments.{name}", doc)
    flags.add_run(parser, preset=preset, seeds=seeds, place=f"runs/{name}")
    parser.add_argument("--only", metavar="TEXT,TEXT", help="arms of this name, or with this in it")
    parser.add_argument("--at-once", type=int, help="replicates in one program (default: memory's)")
    if "," in lengths:
        text = f"multiples of run.steps to train, of {lengths} (default: all)"
        parser.add_argument("--lengths", default=lengths, help=text)
    args = parser.parse_args(argv)
    if args.at_once is not None and args.at_once < 1:
        raise UserError(f"--at-once {args.at_once}: needs at least 1")
    run = flags.resolve(args, name, quick if args.preset == "quick" else ())
    assigned = tuple(text.partition("=")[0].strip() for text in args.assignments)
    return Request(
        name=name,
        preset=run.preset,
        cfg=run.cfg,
        hyper=run.hyper,
        seeds=run.seeds,
        workdir=args.workdir or Path("runs") / name,
        lengths=parse_lengths(getattr(args, "lengths", lengths), lengths),
        only=tuple(args.only.split(",")) if args.only else (),
        recipes=run.cfg.run.recipes if "run.recipes" in assigned else (),
        at_once=args.at_once,
        dry_run=run.dry_run,
        assigned=assigned,
    )


def parse_lengths(text: str, known: str) -> tuple[int, ...]:
    """Some of the `known` numbers, each once, in ascending order; raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not set(parts) <= set(known.split(",")) or len(set(parts)) < len(parts):
        raise UserError(f"--lengths {text}: use some of {known}, separated by commas")
    return tuple(sorted(map(int, parts)))


def load(name: str) -> ModuleType:
    """The module of a question: `__doc__`, ARMS, CLAIMS and show."""
    return importlib.import_module(f"experiments.{name}")
