"""What a training step cannot be faster than on this machine, and how much of it is products.

Bound: every product of a step once, in the fastest narrow type that this machine has for its shape
(measured here and now, in turns with the step), and one pass of Adam over the state at the speed of
memory that is written over. Both are timed inside a program that does them again and again: a
dispatch takes longer than a small product, the first touch of fresh memory longer than a large
one. Attention's products (1 to 3 % at these lengths) are left out. The head counts in a narrow
type, too, although its products stay float32 in a float32 run.
"""

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import products
from bitnet_jax.config import ModelConfig
from experiments import bench

ADAM_BYTES = 28  # per parameter: weight, two moments and gradient read, all but the last written
COPIED = 1 << 28  # bytes of the array whose copy tells the speed of memory, more than caches hold
REPEATS = 10  # of what is timed, inside its program
KINDS = ((jnp.int8, jnp.int32), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32))


def shapes(model: ModelConfig, n_rows: int) -> dict[tuple[int, int, int], int]:
    """[N, D] times [D, F] products of a forward pass, and how often each occurs."""
    d, width = model.d_model, model.d_model // model.n_heads
    keys = model.n_kv_heads * width
    counts: dict[tuple[int, int, int], int] = {}
    if model.layout == "report":
        linear = [(d, d + 2 * keys), (d, 2 * model.d_ff)]
    else:
        linear = [(d, d), (d, keys), (d, keys), (d, model.d_ff), (d, model.d_ff)]
    linear += [(d, d), (model.d_ff, d)]
    for inputs, outputs in linear * model.n_layers + [(d, model.vocab_size)]:
        shape = n_rows, inputs, outputs
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def step_flops(model: ModelConfig, n_rows: int) -> int:
    """Forward, input gradient and weight gradient: 6 N D F each."""
    return sum(6 * n * d * f * count for (n, d, f), count in shapes(model, n_rows).items())


def make_moves(model: ModelConfig, n_rows: int) -> dict[str, Callable[[], float]]:
    """Ways to time the parts of the bound, for `bench.rounds`."""
    moves = {"bound_memory": repeated(lambda x: x + 1, jnp.zeros(COPIED // 4, jnp.float32))}
    for (n, d, f), _ in shapes(model, n_rows).items():
        for kind, total in KINDS:
            state = jnp.zeros((n, f), total), jnp.ones((n, d), kind), jnp.ones((d, f), kind)
            moves[f"bound {n} {d} {f} {kind.__name__}"] = repeated(multiply, state)
    return moves


def multiply(state):
    """(ab, a, b) from (_, a, b); a number of the product enters a, or one would do for all."""
    out, a, b = state
    out = products.dot(a, b, axis_a=1, axis_b=0, result=out.dtype)
    return out, a.at[0, 0].set(out[0, 0].astype(a.dtype)), b


def repeated(step: Callable, state) -> Callable[[], float]:
    """Seconds of one `state = step(state)`, from a program that takes REPEATS of them."""
    held = [state]

    @partial(jax.jit, donate_argnums=0)
    def program(state):
        return jax.lax.fori_loop(0, REPEATS, lambda _, state: step(state), state)

    def go_on():
        held[0] = program(held[0])
        return held[0]

    return lambda: bench.timed(go_on) / REPEATS


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
    is_product: dict[str, bool] = {}
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
                is_product[match[1]] = kind == "dot" or bool(called and bodies.get(called[1]))
    return is_product
