"""What a program costs, read from itself: products of its jaxpr, collectives of its HLO."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from jax.interpreters.partial_eval import dce_jaxpr

ROOT = "ROOT"  # of a computation, besides its own name
ITEM_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
CALL = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(([^)]*)\)")
REFERENCES = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.-]+,? ?)+)"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
LOOP = re.compile(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)")
ITEM = re.compile(r" get-tuple-element\(.*index=(\d+)")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a run of a program."""

    count: float
    bytes: float  # of the arrays that are gathered, reduced or moved, as one device sees them
    sent: float  # bytes that one device sends when a ring carries them

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def over(self, n: float) -> "Traffic":
        """The share of one of n."""
        return Traffic(self.count / n, self.bytes / n, self.sent / n)


def collective(kind: str, whole: float, n: int, count: float = 1) -> Traffic:
    """`count` collectives over n devices of an array of `whole` bytes, before or after them all."""
    passes = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    return Traffic(count, count * whole, count * whole * passes)


def needed(closed):
    """The jaxpr of a closed one without what no result needs, which a compiler drops, too."""
    return dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]


def flops(jaxpr) -> int:
    """Floating-point operations of all products of a jaxpr: two per multiplication.

    A scan counts every step; of the branches of a `cond` the costliest counts. A `while` whose end
    is not known counts once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        inner = [flops(getattr(sub, "jaxpr", sub)) for sub in _subjaxprs(eqn.params)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(sizes[i] for i in contracted)
        elif eqn.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def _subjaxprs(params: dict):
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield part


def traffic(hlo: str) -> dict[str, Traffic]:
    """Collectives of one run of a compiled program by kind, from its text (`as_text()`).

    A loop counts as often as it turns, where the compiler knows (else once). What is gathered in
    parts, in several fusions, has one channel and counts once.
    """
    types, computations, entry = parse_hlo(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo)
    times = executions(computations, entry)
    collectives: dict[tuple, tuple[str, Traffic]] = {}
    for name, instructions in computations.items():
        for instruction, line in instructions.items():
            if instruction == ROOT or not (call := CALL.search(line)):
                continue
            kind, operands = call[1], re.findall(r"%?([\w.-]+)(?:,|$)", call[2])
            n = _group_size(line, int(devices[1]) if devices else 1)
            whole = sum(_bytes(types.get(operand, "")) for operand in operands)
            whole *= n if kind == "all-gather" else 1
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1]) if channel else (kind, name, instruction)
            new = collective(kind, whole, n, times[name])
            if n > 1 and (key not in collectives or collectives[key][1].bytes < new.bytes):
                collectives[key] = kind, new
    totals: dict[str, Traffic] = defaultdict(lambda: Traffic(0, 0, 0))
    for kind, cost in collectives.values():
        totals[kind] += cost
    return dict(totals)


def parse_hlo(hlo: str) -> tuple[dict, dict, str]:
    """Types by name; texts of the instructions by computation and name; where it begins."""
    types: dict[str, str] = {}
    computations: dict[str, dict[str, str]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (instruction := INSTRUCTION.match(line)):
            root, name, text = instruction.groups()
            types[name] = re.split(r" [a-z][\w-]*\(", text, maxsplit=1)[0]
            computations[current][name] = " " + text
            if root:
                computations[current][ROOT] = " " + text
    return types, computations, entry


def executions(computations: dict, entry: str) -> dict[str, float]:
    """How often each computation runs when the program runs once."""
    times: dict[str, float] = defaultdict(float)

    def visit(name, n):
        times[name] += n
        instructions = computations.get(name, {})
        for line in (line for key, line in instructions.items() if key != ROOT):
            turns = _turns(line, computations)
            for references in REFERENCES.finditer(line):
                for called in re.findall(r"%([\w.-]+)", references[1]):
                    visit(called, n * turns)

    visit(entry, 1)
    return times


def _turns(line: str, computations: dict) -> int:
    """How often a loop turns: as noted, or from its counter's end and step; else 1.

    XLA:TPU notes nothing. Its loops count from 0 while they are less than a constant.
    """
    if noted := TRIPS.search(line):
        return int(noted[1])
    if not (loop := LOOP.search(line)):
        return 1
    test, body = computations[loop[1]], computations[loop[2]]
    places = {name: int(item[1]) for name, text in test.items() if (item := ITEM.search(text))}
    compared = re.search(r" compare\(%([\w.-]+), %([\w.-]+)\).*direction=LT", test.get(ROOT, ""))
    end = _constant(test, compared[2]) if compared else None
    if end is None or compared[1] not in places:
        return 1
    items = re.findall(r"%([\w.-]+)", body.get(ROOT, "").partition(" tuple(")[2].partition(")")[0])
    place = places[compared[1]]
    counter = body.get(items[place], "") if place < len(items) else ""
    added = re.search(r" add\(%[\w.-]+, %([\w.-]+)\)", counter)
    return -(-end // (_constant(body, added[1]) or 1 if added else 1))


def _constant(instructions: dict, name: str) -> int | None:
    constant = re.search(r" constant\((\d+)\)", instructions.get(name, ""))
    return int(constant[1]) if constant else None


def _group_size(line: str, n_devices: int) -> int:
    """Devices that a collective joins, in each of the ways that XLA writes them; all by default."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2])  # whole, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return n_devices


def _bytes(types: str) -> int:
    """Bytes of the arrays of a type, all those of a tuple."""
    return sum(_bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) // 8
               for kind, dims in SHAPE.findall(types))  # fmt: skip


def _bits(kind: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return ITEM_BITS.get(kind) or (int(digits[1]) if digits else 0)
