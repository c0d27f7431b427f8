"""What a person sees while a command runs: text made harmless, one line that fits, progress.

Only the standard library, so that help and mistakes are quick.
"""

import contextlib
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence

from bitnet_jax.verdict import LABELS

SECONDS, WIDTH = 30, 160  # between lines of progress in a file; their length
NARROW = 60  # a warning and the replicates that have it
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters as escapes, not \\n and \\t.

    So are characters that change the direction of writing, and bytes that were not UTF-8.
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str, most: int) -> str:
    """Printable text on one line; what lies in the middle of a text longer than `most` is cut."""
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [...] {text[-most // 2 :]}"


class Progress:
    """Where a run is: one line that a terminal redraws, or whole lines, seldom, in a file.

    Compilation is told apart, and is no part of the rate. A warning stands on a line of its own
    when it is first met.
    """

    def __init__(
        self, replicates: Sequence, step: int, steps: int, tokens: int, silent: bool = False
    ):
        """`replicates` have a name and a seed; `tokens` are those of a step of all of them."""
        self.silent = silent
        self.labels = [f"{rep.name} {rep.seed}" for rep in replicates]
        self.step, self.steps, self.tokens = step, steps, tokens
        self.done, self.seconds, self.since = 0, 0.0, None
        self.states: dict[int, dict] = {}  # the last evaluation of each replicate
        self.warned: set[tuple[str, int]] = set()
        self.compiled: set[str] = set()
        self.drawn, self.written, self.shown = False, -math.inf, None

    @contextlib.contextmanager
    def compiling(self, what: str):
        """Tell how long a block takes that is the first of its name, and so compiles."""
        if what in self.compiled:
            yield
            return
        self.compiled.add(what)
        began = time.monotonic()
        self.end_line()
        self._print(f"compiling {what} ...", end="")
        yield
        took = time.monotonic() - began
        self._print(f" {took:.1f} s")
        if self.since is not None:
            self.since += took

    def start(self) -> None:
        """The clock runs from here."""
        self.since = time.monotonic()

    def update(self, step: int, rows: list[dict]) -> None:
        """Show the evaluations of a step."""
        if self.since is not None and step > self.step:
            now = time.monotonic()
            self.done += step - self.step
            self.seconds += now - self.since
            self.since = now
        self.step = step
        evals = [row for row in rows if row["kind"] == "eval"]
        self.states |= {row["replicate"]: row for row in evals}
        for text, replicates in self._new_warnings(evals).items():
            self.end_line()
            where = ", ".join(self.labels[i] for i in replicates)
            if len(text) + len(where) > NARROW:
                where = f"{len(replicates)} replicates"
            self._print(f"step {step}: {text} ({where})")
        self._show()

    def _new_warnings(self, evals: list[dict]) -> dict[str, list[int]]:
        """Warnings not met before, numbers aside, each with the replicates that have it."""
        new: dict[str, list[int]] = {}
        texts: dict[str, str] = {}
        for row in evals:
            for text in row["collapse/warnings"]:
                kind = re.sub(r"[\d.]+", "", text)
                if (kind, row["replicate"]) not in self.warned:
                    self.warned.add((kind, row["replicate"]))
                    new.setdefault(texts.setdefault(kind, text), []).append(row["replicate"])
        return new

    def _show(self) -> None:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            text = progress_line(self.labels, self.states, self._place(), width)
            self._print("\r" + text.ljust(width), end="")
            self.drawn = True
            return
        worst = max(LABELS[row["collapse/verdict"]].severity for row in self.states.values())
        now = time.monotonic()
        if now - self.written > SECONDS or worst != self.shown or self.step == self.steps:
            text = progress_line(self.labels, self.states, self._place(), WIDTH)
            self._print(text)
            self.written, self.shown = now, worst

    def _place(self) -> list[str]:
        """Where the run is, the fullest first."""
        place = f"{self.step}/{self.steps}"
        if not self.seconds or self.step == self.steps:
            return [place]
        left = round((self.steps - self.step) * self.seconds / self.done)
        left = f"{left // 60}:{left % 60:02}"
        return [
            f"{place}, {left} left, {self.tokens_per_second:,.0f} tok/s",
            f"{place}, {left} left",
        ]

    @property
    def tokens_per_second(self) -> float:
        return self.done * self.tokens / self.seconds if self.seconds else 0.0

    def _print(self, text: str = "", end: str = "\n") -> None:
        if not self.silent:
            print(text, end=end, file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """What is printed next begins a line of its own."""
        if self.drawn:
            self._print()
        self.drawn = False


def progress_line(labels: list[str], states: dict[int, dict], places: list[str], width: int) -> str:
    """The fullest line that fits: the state of each replicate, worst first, else their counts.

    `!` marks a state that has warnings. `states` are the last evaluations.
    """
    worst_first = sorted(
        states.items(),
        key=lambda state: (
            -LABELS[state[1]["collapse/verdict"]].severity,
            not state[1]["collapse/warnings"],
            -state[1].get("eval/loss", math.inf),
        ),
    )

    def name(row):
        return row["collapse/verdict"] + "!" * bool(row["collapse/warnings"])

    losses = [f" {row['eval/loss']:.2f}" if "eval/loss" in row else "" for _, row in worst_first]
    full = [
        f"{labels[i]} {name(row)}{loss}" for (i, row), loss in zip(worst_first, losses, strict=True)
    ]
    short = [f"{labels[i]} {name(row)}" for i, row in worst_first]
    rest = Counter(row["collapse/verdict"] for _, row in worst_first[1:])
    counted = [f"{n} {verdict}" for verdict, n in rest.items()]
    states = (full, short, [*full[:1], *counted], [*short[:1], *counted])
    choices = [(full, places[0])] + [(parts, places[-1]) for parts in states]
    candidates = [" | ".join([*parts, place]) for parts, place in choices]
    return next((line for line in candidates if len(line) <= width), candidates[-1][:width])
