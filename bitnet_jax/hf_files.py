"""The files of a Hugging Face folder: JSON, shards and the index that names them, and a new folder.

What is read may come from anywhere: whatever it holds, the outcome is the content or a UserError of
one line, and nothing outside the folder is opened because a file in it says so.
"""

import contextlib
import json
import os
import reprlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import safetensors

from bitnet_jax import stopping
from bitnet_jax.fields import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 70


def quoted(value) -> str:
    """A value on one line of printable characters, shortened."""
    return _SHORT.repr(value)


def printable(name: str) -> str:
    """A name as it is, or quoted where a terminal could not show it."""
    return name if name.isprintable() and len(name) <= 200 else quoted(name)


def read_json(path: Path) -> dict:
    """The JSON object in a file of a folder."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path.parent}: no {path.name}; a Hugging Face folder of a BitNet is needed"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON: {printable(str(error))}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    return tree


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is, as the file's header tells; nothing of it is read."""

    file: str
    dtype: str  # in safetensors' names: F32, BF16, U8
    shape: tuple[int, ...]


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of one file or of all shards, by key; raises UserError naming the file."""
    by_key = {}
    for name in _weight_files(folder):
        with _opened(folder, name) as file:
            for key in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                if key in by_key:
                    raise UserError(
                        f"{folder}: duplicate key {printable(key)}: {by_key[key].file} and {name}"
                    )
                header = file.get_slice(key)
                by_key[key] = Entry(name, header.get_dtype(), tuple(header.get_shape()))
    return by_key


def tensors(folder: Path, wanted: dict[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """The key and the content of every `wanted` entry, one at a time."""
    for name in sorted({entry.file for entry in wanted.values()}):
        with _opened(folder, name) as file:
            for key, entry in wanted.items():
                if entry.file == name:
                    yield key, file.get_tensor(key)


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise UserError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} is there; weights of other forms (pickled "
            ".bin or .pt) are not read"
        )
    place = read_json(folder / INDEX).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise UserError(
            f"{folder / INDEX}: weight_map={quoted(place)}: an object that gives the file of each "
            "tensor is needed"
        )
    for key, name in place.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            reason = "the name of a .safetensors file is needed"
        elif (path := PureWindowsPath(name)).anchor or ".." in path.parts:
            reason = "a file outside the folder; only names inside it are read"
        else:
            continue
        raise UserError(
            f"{folder / INDEX}: weight_map has {printable(key)}={quoted(name)}: {reason}"
        )
    return sorted(set(place.values()))


@contextlib.contextmanager
def _opened(folder: Path, name: str):
    try:
        with safetensors.safe_open(folder / name, "np") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{folder}: missing shard {printable(name)}, named by {INDEX}") from None
    except OSError as error:
        raise UserError(f"{folder}: {printable(name)} cannot be read: {error}") from error
    except (ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder}: {printable(name)}: truncated or damaged: {printable(str(error))}"
        ) from error


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends well.

    Otherwise nothing is left, nor the folders above it that were made for it. Raises UserError when
    `folder` exists and is not empty, or cannot be written.
    """
    place = folder.absolute()
    draft = place.with_name(f".{place.name[:50]}.{secrets.token_hex(8)}.tmp")
    new_parents = []

    def undo():
        shutil.rmtree(draft, ignore_errors=True)
        for path in new_parents:
            with contextlib.suppress(OSError):  # it was not made, or it is in use
                path.rmdir()

    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{folder}: exists and is not empty; give a new folder")
        new_parents += [path for path in place.parents if not path.exists()]
        with stopping.undone(undo):
            draft.mkdir(parents=True)
            yield draft
            os.replace(draft, place)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error


@dataclass(frozen=True)
class Card:
    """What a model card tells of the run that a model comes from; what is None is left out."""

    source: str  # WORKDIR@STEP:REPLICATE
    recipe: str
    seed: int
    step: int
    steps: int  # of the whole run
    tokens: int | None = None  # trained on until `step`
    loss: float | None = None  # held-out, nats per token
    unigram: float | None = None  # the same of these predictors on the same positions
    bigram: float | None = None
    verdict: str | None = None  # of `verdict.LABELS`, at that step
    text: str | None = None  # the corpus, with its digest
    commit: str | None = None


def card_text(card: Card, title: str, n_parameters: int, weights: str) -> str:
    """README.md of a folder: the facts of its run as a table, and how to load it."""
    facts = {
        "parameters": f"{n_parameters:,}",
        "weights": weights,
        "run": card.source,
        "recipe": card.recipe,
        "seed": card.seed,
        "steps": f"{card.step:,} of {card.steps:,}",
        "tokens trained on": None if card.tokens is None else f"{card.tokens:,}",
        "text": card.text,
        "held-out loss, nats per token": card.loss,
        "the same of a unigram model": card.unigram,
        "the same of a bigram model": card.bigram,
        "verdict": card.verdict,
        "commit of bitnet_jax": card.commit,
    }
    cells = {
        key: f"{value:.4f}" if isinstance(value, float) else printable(str(value))
        for key, value in facts.items()
        if value is not None
    }
    rows = "\n".join(f"| {key} | {text.replace('|', '&#124;')} |" for key, text in cells.items())
    return CARD.format(title=printable(title), folder=title, rows=rows)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- bitnet
---

# {title}

A BitNet b1.58 language model (ternary weights, int8 activations), trained with bitnet_jax.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""
