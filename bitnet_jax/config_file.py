"""The resolved configuration as JSON and back, and a run's digest."""

import dataclasses
import hashlib
import json
import math
import types
import typing

from bitnet_jax.config import SECTIONS, Config, Hyper, Replicate
from bitnet_jax.fields import UserError, check_fields, check_known, shown


def to_json(cfg: Config, replicates: list[Replicate]) -> dict:
    """The resolved configuration as plain JSON values."""
    return {
        **json.loads(json.dumps(dataclasses.asdict(cfg))),
        "replicates": [dataclasses.asdict(rep) for rep in replicates],
    }


def from_json(tree: dict, source: str = "config.json") -> tuple[Config, list[Replicate]]:
    """Inverse of `to_json`; extra keys at the top (provenance) are ignored.

    Raises UserError that names `source` and the field that is missing, unknown or of another type.
    """
    _check_type(tree, dict, source)
    parts = {
        name: _read(kind, tree.get(name), f"{source}: {name}") for name, kind in SECTIONS.items()
    }
    _check_type(tree.get("replicates"), list, f"{source}: replicates")
    if not tree["replicates"]:
        raise UserError(f"{source}: replicates: empty; needs at least one")
    replicates = []
    for i, entry in enumerate(tree["replicates"]):
        where = f"{source}: replicates[{i}]"
        _check_type(entry, dict, where)
        hyper = _read(Hyper, entry.get("hyper"), f"{where}.hyper")
        replicates.append(_read(Replicate, entry | {"hyper": hyper}, where))
        check_fields(hyper, f"{where}.hyper")
    return Config(**parts), replicates


def _read(kind, tree, where: str):
    """An instance of the dataclass `kind` from a dict that has just its fields.

    A bookkeeping field that is younger than the file has its default.
    """
    _check_type(tree, dict, where)
    known = dataclasses.fields(kind)
    defaults = {f.name: f.default for f in known if f.metadata.get("bookkeeping")}
    tree = defaults | tree
    fields = {f.name: f.type for f in known}
    for name in tree:
        check_known(name, fields, f"field in {where}:")
    for name in fields:
        if name not in tree:
            raise UserError(f"{where}.{name}: missing")
    return kind(**{name: _value(tree[name], fields[name], f"{where}.{name}") for name in fields})


def _value(value, kind, where: str):
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        _check_type(value, list | tuple, where)
        return tuple(_value(x, str, f"{where}[{i}]") for i, x in enumerate(value))
    if typing.get_origin(kind) is dict:
        _check_type(value, dict, where)
        return {str(k): _value(x, float, f"{where}.{k}") for k, x in value.items()}
    _check_type(value, kind, where)
    return value


def _check_type(value, kind, where: str) -> None:
    """Raise UserError unless `value` is of type `kind`; whole numbers count as float, not bool."""
    accepted = int | float if kind is float else kind
    wrong_bool = isinstance(value, bool) and kind is not bool
    if wrong_bool or not isinstance(value, accepted):
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"{where}: {name} needed, not {shown(json.dumps(value, default=str))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: must be finite, not {value}")


def run_id(name: str, cfg: Config, replicates: list[Replicate]) -> str:
    """`name` and eight hex digits of the resolved configuration."""
    text = json.dumps(to_json(cfg, replicates), sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
