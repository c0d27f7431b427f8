"""What a training step cannot be faster than on this machine, and how much of it is products.

Bound: every product of a step once, in the fastest narrow type that this machine has for its shape
(measured here and now, in turns with the step), and one pass of Adam over the state at the speed of
memory that is written over in place. Everything is timed into memory that is held already, as
inside a program: the first touch of fresh memory takes longer than a product. Attention's products
(1 to 3 % at these lengths) are left out. The bound takes the head in a narrow type, too, whose
products stay float32 in a float32 run.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import products
from bitnet_jax.config import ModelConfig
from experiments import bench

ADAM_BYTES = 28  # per parameter: weight, two moments and gradient read, all but the last written
COPIED = 1 << 26  # bytes of the array whose copy tells the speed of memory
KINDS = ((jnp.int8, jnp.int32), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32))


def shapes(model: ModelConfig, n_rows: int) -> dict[tuple[int, int, int], int]:
    """[N, D] times [D, F] products of a forward pass, and how often each occurs."""
    d, width = model.d_model, model.d_model // model.n_heads
    keys = model.n_kv_heads * width
    found: dict[tuple[int, int, int], int] = {}
    if model.layout == "report":
        linear = [(d, d + 2 * keys), (d, 2 * model.d_ff)]
    else:
        linear = [(d, d), (d, keys), (d, keys), (d, model.d_ff), (d, model.d_ff)]
    linear += [(d, d), (model.d_ff, d)]
    for inputs, outputs in linear * model.n_layers + [(d, model.vocab_size)]:
        shape = n_rows, inputs, outputs
        found[shape] = found.get(shape, 0) + 1
    return found


def step_flops(model: ModelConfig, n_rows: int) -> int:
    """Forward, input gradient and weight gradient: 6 N D F each."""
    return sum(6 * n * d * f * count for (n, d, f), count in shapes(model, n_rows).items())


def make_moves(model: ModelConfig, n_rows: int) -> dict[str, Callable[[], float]]:
    """Ways to time the parts of the bound, for `bench.rounds`."""
    numbers = jnp.zeros(COPIED // 4, jnp.float32)
    moves = {"bound_memory": in_place(lambda x: x + 1, numbers)}
    for (n, d, f), _ in shapes(model, n_rows).items():
        for kind, total in KINDS:
            a, b = jnp.ones((n, d), kind), jnp.ones((d, f), kind)

            def product(_, a, b, total=total):
                return products.dot(a, b, axis_a=1, axis_b=0, result=total)

            out = jnp.zeros((n, f), total)
            moves[f"bound {n} {d} {f} {kind.__name__}"] = in_place(product, out, a, b)
    return moves


def in_place(call: Callable, out: jax.Array, *inputs: jax.Array) -> Callable[[], float]:
    """Seconds of `out = call(out, *inputs)`, in the memory of `out`."""
    compiled, held = jax.jit(call, donate_argnums=0, keep_unused=True), [out]

    def seconds() -> float:
        def step():
            held[0] = compiled(held[0], *inputs)
            return held[0]

        return bench.timed(step)

    return seconds


def bound(model: ModelConfig, n_rows: int, n_params: int, taken: dict[str, np.ndarray]) -> dict:
    """The bound of a step in ms, from the medians of what `make_moves` took, and its parts."""
    memory = 2 * COPIED / float(np.median(taken["bound_memory"]))
    in_products = 0.0
    for (n, d, f), count in shapes(model, n_rows).items():
        names = [f"bound {n} {d} {f} {kind.__name__}" for kind, _ in KINDS]
        in_products += 3 * count * min(float(np.median(taken[name])) for name in names)
    adam = ADAM_BYTES * n_params / memory
    return {
        "gflop": round(step_flops(model, n_rows) / 1e9, 2),
        "adam_mb": round(ADAM_BYTES * n_params / 1e6),
        "copy_gb_per_s": round(memory / 1e9, 1),
        "bound_products_ms": round(1000 * in_products, 2),
        "bound_adam_ms": round(1000 * adam, 2),
        "bound_ms": round(1000 * (in_products + adam), 2),
    }


def product_share(compiled, call: Callable[[], object]) -> tuple[float, list[tuple[str, float]]]:
    """Share of a program's time in products, and its ten largest costs (kind of operation, share).

    From a trace of one `call`; `compiled` tells which operations hold a product.
    """
    is_product = product_names(compiled.as_text())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        path = next(Path(folder).rglob("*.xplane.pb"))
        trace = jax.profiler.ProfileData.from_file(str(path))
    taken: dict[str, float] = {}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in is_product:
                    taken[event.name] = taken.get(event.name, 0.0) + event.duration_ns
    total = sum(taken.values())
    kinds: dict[str, float] = {}
    for name, ns in taken.items():
        kind = "product" if is_product[name] else re.sub(r"[.\d]+$", "", name)
        kinds[kind] = kinds.get(kind, 0.0) + ns / total
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:10]
    return kinds.get("product", 0.0), [(kind, round(share, 4)) for kind, share in largest]


def product_names(hlo: str) -> dict[str, bool]:
    """Operations that do work by name, and whether each is a product or a fusion that holds one."""
    bodies: dict[str, bool] = {}
    found: dict[str, bool] = {}
    name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            name = head[1]
            bodies[name] = False
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\(", line):
            kind = match[2]
            bodies[name] |= kind == "dot"
            called = re.search(r"calls=%([\w.\-]+)", line)
            if kind not in ("while", "conditional", "call", "tuple", "get-tuple-element"):
                found[match[1]] = kind == "dot" or bool(called and bodies.get(called[1]))
    return found
