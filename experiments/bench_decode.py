"""How many tokens a second does decoding give, and how many does transformers?

One process measures in turns, round after round, so that a slow minute hits everything alike:
greedy continuations of random prompts by a random model of a preset's size, as one compiled program
or with a dispatch for every token, with master weights (quantised once, before the loop) or with
packed 2-bit ones, and, where torch is installed, by `generate` of transformers with the same
weights in its fastest form: ternary values and their scale (AutoBitLinear, offline), on one thread
or one per core, whichever is faster at the time. `--online` adds the form that it trains, which
quantises all weights for every token. That is layout b158, the only one that transformers has; with
`--set model.layout=report` it is left out. Everything is float32 on CPUs, and of the preset's type
elsewhere. Times include reading the prompt, and those of master weights quantising them once.

Where rounding moves an activation to the next int8 code, logits move by some hundredths of their
spread, and a random model's most likely tokens are that close: continuations part. Rows say what
share of the tokens is that of the first program.

Prints a table, and the memory of packed weights; appends a row per measurement to
experiments/results/bench_decode.jsonl. A ratio says how many times faster than transformers; the
aim is at least 4 at batch 1 on a CPU and 10 on an H200. There is no Pallas kernel: only a GPU could
show that it wins, and none was at hand. On two cores the commands take 100 and 68 seconds.

    python -m experiments.bench_decode
    python -m experiments.bench_decode --preset 125m --tokens 16 --batches 1 --rounds 3
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import config, generate, log, presets
from bitnet_jax.config import Hyper, ModelConfig, UserError
from bitnet_jax.model import Transformer, pack_params
from experiments import common
from experiments.bench_train import PEER, make_peer, spread

RESULTS = Path(__file__).parent / "results" / "bench_decode.jsonl"
NEVER = -1  # an end of text that no model gives
LIMIT_S = 120  # after two rounds, none begins past this
LABELS = {
    "program": "one program",
    "program_packed": "one program, packed",
    "loop": "a dispatch per token",
    "loop_packed": "a dispatch per token, packed",
    "transformers": "transformers",
    "transformers_online": "transformers, quantising online",
}
# microsoft/bitnet-b1.58-2B-4T (arXiv 2504.12285): 2,412,820,480 parameters.
SHAPE_2B = ModelConfig(
    vocab_size=128_256,
    d_model=2560,
    n_layers=30,
    n_heads=20,
    n_kv_heads=5,
    d_ff=6912,
    dtype="bfloat16",
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises UserError for numbers that make no measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, told = parser.add_argument, "(default: %(default)s)"
    add("--preset", default="report", help=f"whose model's size {told}")
    add("--set", action="append", default=[], metavar="model.field=value", dest="overrides")
    add("--batches", default="1,8,64", help=f"prompts side by side {told}")
    add("--prompt", type=int, default=16, help=f"tokens of a prompt {told}")
    add("--tokens", type=int, default=32, help=f"new tokens {told}")
    add("--rounds", type=int, default=5, help=f"at most, after one of warm-up {told}")
    add("--seed", type=int, default=0, help=f"of weights and prompts {told}")
    add("--online", action="store_true", help="also the form that transformers trains")
    args = parser.parse_args(argv)
    for name in ("prompt", "tokens", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: needs at least 1")
    sizes = args.batches.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UserError(f"--batches {args.batches}: use numbers above 0 with commas, such as 1,8")
    args.batches = [int(size) for size in sizes]
    return args


def resolve(preset: str, overrides: list[str]) -> config.Config:
    """A preset's model in the layout of transformers; overrides come last."""
    fixed = ["model.layout=b158"]
    if jax.default_backend() == "cpu":
        fixed.append("model.dtype=float32")
    if presets.preset(preset).model.vocab_size is None:
        fixed.append("model.vocab_size=50257")
    return presets.override(presets.preset(preset), [*fixed, *overrides])[0]


def abstract_params(model: ModelConfig):
    """Shapes and types of the master weights."""
    init, tokens_BL = Transformer(model).init, jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda: init(jax.random.key(0), tokens_BL, Hyper())["params"])


def megabytes(tree) -> float:
    """Size of arrays, or of their shapes and types, in 10^6 bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6


def weight_memory(model: ModelConfig) -> dict[str, float]:
    """Parameters, and MB of them in bfloat16 and packed, without making any.

    Packed: 2 bits for ternary weights, embedding and head in the model's type, the rest float32.
    """
    params = abstract_params(model)
    packed = jax.eval_shape(lambda params: pack_params(params, model, Hyper()), params)
    n = sum(x.size for x in jax.tree.leaves(params))
    return {"params": n, "bf16_mb": 2 * n / 1e6, "packed_mb": megabytes(packed)}


def memory_table() -> str:
    """`weight_memory` of the published 700M and 2B shapes in words."""
    m700 = presets.preset("700m").model
    shapes = {"700m": replace(m700, vocab_size=50257), "2B": SHAPE_2B}
    lines = []
    for name, model in shapes.items():
        found = weight_memory(model)
        lines.append(
            f"{name}: {found['params']:,} parameters, {found['bf16_mb']:,.0f} MB in bfloat16, "
            f"{found['packed_mb']:,.0f} MB packed "
            f"({found['bf16_mb'] / found['packed_mb']:.1f} times less)"
        )
    return "\n".join(lines)


class Ours:
    """Two ways to decode: one program, and a dispatch per token."""

    def __init__(self, cfg: config.Config, params, prompts_BP: np.ndarray, n_new: int):
        self.cfg, self.n_new = cfg, n_new
        self.params = jax.tree.map(lambda x: jnp.asarray(x)[None], params)
        self.hyper = jax.tree.map(lambda x: jnp.full(1, x, jnp.float32), Hyper())
        self.prompts = jnp.asarray(prompts_BP), jnp.full(len(prompts_BP), prompts_BP.shape[1])
        self.precision = "float32" if cfg.model.dtype == "float32" else "default"
        rest = {"sampling": generate.Sampling(), "seed": 0, "end_of_text": NEVER}
        start = time.perf_counter()
        with jax.default_matmul_precision(self.precision):
            lowered = generate.generate.lower(
                cfg, self.params, self.hyper, *self.prompts, n_new, **rest
            )
            compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.temp_mb = compiled.memory_analysis().temp_size_in_bytes / 1e6
        self.params_mb = megabytes(self.params)
        self._program = lambda: compiled(self.params, self.hyper, *self.prompts, **rest)

    def program(self) -> np.ndarray:
        """New tokens [B, N], all by one dispatch."""
        return np.asarray(self._program())[0]

    def loop(self) -> np.ndarray:
        """New tokens [B, N], which the host reads one by one."""
        cfg, params, hyper, tokens = self.cfg, self.params, self.hyper, []
        with jax.default_matmul_precision(self.precision):
            state = generate.begin(cfg, params, hyper, *self.prompts, self.n_new, 0)
            for _ in range(self.n_new):
                state, tokens_RB1 = generate.extend(
                    cfg, params, hyper, state, 1, generate.Sampling(), NEVER
                )
                tokens.append(np.asarray(tokens_RB1)[0])
        return np.concatenate(tokens, axis=1)


def why_no_peer(model: ModelConfig) -> str | None:
    """What the comparison with transformers lacks here, if anything."""
    missing = [name for name in PEER if importlib.util.find_spec(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    if model.layout != "b158":
        return f"it has no layout {model.layout}"
    import torch  # optional, and only for this comparison

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return "torch has no GPU here"
    # AutoBitLinear compiles its quantisers.
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


def make_generate(model: ModelConfig, params, *, online: bool):
    """Return decode(prompts_BP, n_new) -> new tokens [B, N] of transformers with our parameters."""
    import torch  # optional, and only for this comparison

    # Past its default of 8 shapes torch.compile would leave the quantisers uncompiled.
    torch._dynamo.config.recompile_limit = 64
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    peer = make_peer(model, params)
    if not online:
        go_offline(peer)
    peer = peer.to(device, getattr(torch, model.dtype)).eval()

    def decode(prompts_BP: np.ndarray, n_new: int) -> np.ndarray:
        ids_BP = torch.tensor(prompts_BP, device=device).long()
        how = {"max_new_tokens": n_new, "do_sample": False, "use_cache": True}
        with torch.inference_mode():
            found = peer.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), **how)
        return found[:, prompts_BP.shape[1] :].cpu().numpy()

    return decode


def choose_threads(decode, prompts_BP: np.ndarray) -> int:
    """Set torch to one thread or one per core, whichever decodes faster here and now.

    A second thread on a busy core makes every operation wait for it.
    """
    import torch  # optional, and only for this comparison

    taken = {}
    for n in (1, len(os.sched_getaffinity(0))):
        torch.set_num_threads(n)
        decode(prompts_BP, 2)
        start = time.perf_counter()
        decode(prompts_BP, 6)
        taken[n] = time.perf_counter() - start
    best = min(taken, key=taken.get)
    torch.set_num_threads(best)
    return best


def go_offline(peer) -> None:
    """Replace every AutoBitLinear's weights by ternary codes and their scale, the value."""
    import torch  # optional, and only for this comparison
    from transformers.integrations.bitnet import AutoBitLinear

    for layer in peer.modules():
        if isinstance(layer, AutoBitLinear):
            value = layer.weight.data.abs().mean().clamp(min=1e-5)
            layer.weight.data = (layer.weight.data * (1 / value)).round().clamp(-1, 1)
            layer.weight_scale = torch.nn.Buffer(value.reshape(1))
            layer.online_quant = False


def measure(moves: dict, n_rounds: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds of each move in every round, after one of warm-up, and what it returned there."""
    tokens = {name: move() for name, move in moves.items()}
    rounds, begun = [], time.perf_counter()
    while len(rounds) < min(2, n_rounds) or (
        len(rounds) < n_rounds and time.perf_counter() - begun < LIMIT_S
    ):
        marks = [time.perf_counter()]
        for move in moves.values():
            move()
            marks.append(time.perf_counter())
        rounds.append(np.diff(marks))
    return dict(zip(moves, np.array(rounds).T, strict=True)), tokens


def measure_batch(cfg, params, peers: dict, prompts_BP: np.ndarray, args) -> list[dict]:
    """A row for every way to continue these prompts; `ratio`: times as fast as transformers."""
    packed_cfg = replace(cfg, model=replace(cfg.model, weight_format="packed"))
    packed_params = pack_params(params, cfg.model, Hyper())
    ours = {
        "": Ours(cfg, params, prompts_BP, args.tokens),
        "_packed": Ours(packed_cfg, packed_params, prompts_BP, args.tokens),
    }
    moves = {f"program{form}": way.program for form, way in ours.items()}
    moves |= {f"loop{form}": way.loop for form, way in ours.items()}
    for name, decode in peers.items():
        moves[name] = lambda decode=decode: decode(prompts_BP, args.tokens)
    seconds, tokens = measure(moves, args.rounds)
    rows = []
    for name, taken in seconds.items():
        row = {"benchmark": name, "B": len(prompts_BP), "rounds": len(taken)}
        row |= spread("ms", 1000 * taken / args.tokens)
        row["tokens_per_second"] = round(len(prompts_BP) * args.tokens / float(np.median(taken)), 1)
        if name not in peers and "transformers" in seconds:
            row |= spread("ratio", seconds["transformers"] / taken)
        if name != "program":
            row |= spread("of_program", taken / seconds["program"])
            row["same_tokens"] = round(float(np.mean(tokens[name] == tokens["program"])), 4)
        if name.startswith("program"):
            way = ours[name.removeprefix("program")]
            numbers = {k: getattr(way, k) for k in ("compile_s", "params_mb", "temp_mb")}
            row |= {k: round(v, 2) for k, v in numbers.items()}
        rows.append(row | {"load_1min": round(os.getloadavg()[0], 2)})
    return rows


def fixed_values(cfg: config.Config, args, n_params: int, peers: dict) -> dict:
    """What all rows of this call share."""
    model, seen = cfg.model, log.provenance()
    del seen["argv"]  # rows are published, and it names folders of this machine
    values = {
        "preset": args.preset,
        "layout": model.layout,
        "dtype": model.dtype,
        "P": args.prompt,
        "N": args.tokens,
        "d_model": model.d_model,
        "layers": model.n_layers,
        "vocab": model.vocab_size,
        "params": n_params,
    }
    if peers:
        values["peer_versions"] = {name: importlib.metadata.version(name) for name in PEER}
    return values | seen


def table(rows: list[dict]) -> str:
    """The rows in words, with [smallest, largest] over the rounds."""

    def show(row, name, unit):
        if f"{name}_median" not in row:
            return ""
        middle, low, high = (row[f"{name}_{k}"] for k in ("median", "min", "max"))
        return f"{middle:.3g} [{low:.3g}, {high:.3g}] {unit}"

    lines = []
    for row in rows:
        line = (
            f"batch {row['B']:<3} {LABELS[row['benchmark']]:32}"
            f"{row['tokens_per_second']:>9,.1f} tokens/s  {show(row, 'ms', 'ms a step'):34}"
            f"{show(row, 'ratio', 'x transformers'):36}"
        )
        if "temp_mb" in row:
            line += f"{row['params_mb']:.0f} MB of weights + {row['temp_mb']:.0f} MB"
        if row.get("same_tokens", 1) < 1:
            line += f" {row['same_tokens']:.1%} same tokens"
        lines.append(line.rstrip())
    return "\n".join(lines)


def body() -> None:
    args = parse(sys.argv[1:])
    cfg = resolve(args.preset, args.overrides)
    init = jax.jit(Transformer(cfg.model).init)
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    params = init(jax.random.key(args.seed), tokens_BL, Hyper())["params"]
    n_params, peers = sum(x.size for x in jax.tree.leaves(params)), {}
    if reason := why_no_peer(cfg.model):
        print(f"not measured: transformers: {reason}")
    else:
        on_host = jax.device_get(params)
        peers["transformers"] = make_generate(cfg.model, on_host, online=False)
        if args.online:
            peers["transformers_online"] = make_generate(cfg.model, on_host, online=True)
    fixed, rng = fixed_values(cfg, args, n_params, peers), np.random.default_rng(args.seed)
    print(
        f"{args.preset}: {n_params:,} parameters, layout {cfg.model.layout}, {cfg.model.dtype}, on "
        f"{fixed['device']}, {fixed['cores']} cores; {args.prompt} tokens of prompt and "
        f"{args.tokens} new ones"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    for n_rows in args.batches:
        shape = n_rows, args.prompt
        prompts_BP = rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32)
        shared = fixed
        if peers:
            threads = choose_threads(peers["transformers"], prompts_BP)
            shared = {"peer_threads": threads} | fixed
        rows = measure_batch(cfg, params, peers, prompts_BP, args)
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row | shared) + "\n" for row in rows)
        print(table(rows), flush=True)
    print(f"rows: {RESULTS}\n\nweights, by shape alone:\n{memory_table()}")


if __name__ == "__main__":
    common.guard(body)
