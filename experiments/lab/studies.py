"""The studies that claims are told of, by the configuration that their arms start from."""

import dataclasses
import functools
from dataclasses import dataclass

import pandas as pd

from bitnet_jax import presets
from experiments.lab import rows

# A model, smaller: what `--preset quick` means for a question of many arms.
SIZE = (
    "model.d_model=128",
    "model.n_layers=2",
    "model.d_ff=256",
    "data.tokenizer=bpe:2048",
    "data.seq_len=32",
    "data.eval_batches=4",
    "run.steps=300",
    "run.save_every=300",
)
# The same of the report's layout.
SMALL = ("model.layout=report", "model.tied_embedding=false", "model.rope_theta=10000", *SIZE)
# Tracked positions as the report's. Shuffled: a few hundred steps in order would see no more than
# the first modules of a standard library.
TRACKED = (*SMALL, "data.track=first_batch", "data.score_last=false")

BOOK_FILES = ("data.corpus=text:books.train.txt.xz", "data.validation=text:books.validation.txt.xz")
# Of faults that came after triage, on a text that no threshold was chosen on.
HELD_OUT = (
    "model.d_model=96",
    "model.n_layers=2",
    "model.d_ff=192",
    "model.vocab_size=1024",
    "data.corpus=text:runs/kjv.txt",
    "data.tokenizer=bpe:1024",
    "data.seq_len=32",
    "run.steps=300",
    "run.save_every=300",
)
# Of the star of measurements of coupled decay.
STAR_SIZE = (
    *("model.layout=report", "model.tied_embedding=false", "model.rope_theta=10000"),
    *("model.d_model=64", "model.n_layers=2", "model.d_ff=128", "data.tokenizer=bpe:2048"),
    *("data.seq_len=32", "data.batch_size=4", "data.eval_batches=4"),
    *("run.steps=600", "run.eval_every=10"),
)
NARROW = ("model.d_model=64", "model.n_layers=2", "model.d_ff=128", "data.tokenizer=bpe:2048")
STDLIB_TEXT = "b7fe7151"  # of Python 3.11.7
BOOKS_TEXT = "079f1ebe"  # of both files
KJV_TEXT = "c80364f4"  # bible-kjv 4.38
FEW_BOOKS_TEXT = "b987b958"  # of the books' validation file


@dataclass(frozen=True)
class Study:
    """What a command line without arms, seeds and lengths trains: preset, assignments, text."""

    name: str
    preset: str
    assignments: tuple[str, ...]
    text: str  # the first digits of its sha256

    @functools.cached_property
    def identity(self) -> dict:
        """As `rows.study` has it."""
        cfg, hyper = presets.override(presets.preset(self.preset), list(self.assignments))
        base = {f"hyper.{name}": value for name, value in hyper.items()}
        return rows.identity(dataclasses.asdict(cfg), base, self.text)

    def frame(self, question: str) -> pd.DataFrame:
        """The committed rows of a question that belong to this study."""
        members = [row for row in rows.read(question) if rows.study(row) == self.identity]
        return rows.frame(members)


FULL = Study("full-size books", "report", (*BOOK_FILES, "data.tokenizer=gpt2:gpt2"), BOOKS_TEXT)
BOOKS = Study("narrow books", "report", (*BOOK_FILES, *NARROW, "model.vocab_size=2048"), BOOKS_TEXT)
BOOKS_UNSTRIPPED = Study(
    "narrow books, lines not stripped",
    "report",
    (*BOOKS.assignments, "data.stripped_lines=false"),
    BOOKS_TEXT,
)
QUICK = Study("quick", "quick", (*SMALL, "model.vocab_size=2048"), STDLIB_TEXT)
QUICK_TRACKED = Study("quick", "quick", (*TRACKED, "model.vocab_size=2048"), STDLIB_TEXT)
QUICK_B158 = Study("quick", "quick", (*SIZE, "model.vocab_size=2048"), STDLIB_TEXT)
KJV = Study("King James", "quick", HELD_OUT, KJV_TEXT)
KJV_STDLIB = Study("beside King James", "quick", HELD_OUT, STDLIB_TEXT)
STAR_BOOKS = Study("star, books", "quick", STAR_SIZE, FEW_BOOKS_TEXT)
STAR_PYTHON = Study("star, Python", "quick", STAR_SIZE, STDLIB_TEXT)
STUDIES = (
    *(FULL, BOOKS, BOOKS_UNSTRIPPED, QUICK, QUICK_TRACKED, QUICK_B158),
    *(KJV, KJV_STDLIB, STAR_BOOKS, STAR_PYTHON),
)


def named(identity: dict) -> Study | None:
    """The study of this identity, if it has a name."""
    return next((study for study in STUDIES if study.identity == identity), None)


def describe(identity: dict) -> str:
    """A study in a few words, for those without a name."""
    model = f"{identity['model.d_model']} wide, {identity['model.n_layers']} layers"
    vocab = identity["model.vocab_size"]
    return f"{identity['model.layout']}, {model}, {vocab:,} tokens, text {identity['text']}"
