"""What a field of a configuration may hold, and how a mistake is told."""

import dataclasses
import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for: shown as one line."""

    exit_status = 2


POSITIVE = (1e-30, 1e30)  # numbers that float32 holds, with room for their products
COUNT = (1, 2**31 - 1)  # indices on the device are int32


def setting(default, text, *, choices=None, within=None, bookkeeping=False):
    """A field with its meaning, its choices or its range (low, high), both ends included.

    `bookkeeping`: changes neither what is trained nor what is compared, so rows of experiments that
    differ in it belong to one study.
    """
    metadata = {"help": text, "choices": choices, "within": within, "bookkeeping": bookkeeping}
    return dataclasses.field(
        **{"default_factory" if default is dict else "default": default}, metadata=metadata
    )


def shown(value, most: int = 60) -> str:
    """A value as one line of about `most` characters at most, for messages."""
    text = repr(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text)} characters)"


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` when a known name is near, else the empty string."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_known(name: str, names: Iterable[str], kind: str) -> None:
    """Raise UserError unless `name` is one of `names`, naming them and the nearest."""
    if name not in names:
        listed = ", ".join(names)
        raise UserError(f"unknown {kind} {shown(name)}; known: {listed}{nearest(name, names)}")


def check_fields(part, section: str) -> None:
    """Raise UserError for the first field of `part` outside its choices or its range."""
    for f in dataclasses.fields(part):
        value, path = getattr(part, f.name), f"{section}.{f.name}"
        choices, within = f.metadata["choices"], f.metadata["within"]
        if choices and value not in choices:
            raise UserError(
                f"{path}={shown(value)}: use {' or '.join(choices)}{nearest(value, choices)}"
            )
        if within and value is not None and not within[0] <= value <= within[1]:
            raise UserError(f"{path}={shown(value)}: must lie in {within[0]:g} .. {within[1]:g}")
