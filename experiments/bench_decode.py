"""How many tokens a second does decoding give, and how many does transformers?

One process measures in turns, round after round, so that a slow minute hits everything alike:
greedy continuations of random prompts by a random model of a preset's size, as one compiled program
or with a dispatch for every token, with master weights (quantised once, before the loop), with
int8 codes (as `bitnet generate` has them on CPUs with AMX) or with packed 2-bit ones, and, where
torch is installed, by `generate` of transformers with the same weights in its fastest form: ternary
values and their scale (AutoBitLinear, offline), on one thread or one per core, whichever is faster
at the time. `--online` adds the form that it trains, which quantises all weights for every token.
That is layout b158, the only one that transformers has; with `--set model.layout=report` it is left
out. Everything is float32 on CPUs, and of the preset's type elsewhere. Times include reading the
prompt, and those of master weights quantising them once.

Where rounding moves an activation to the next int8 code, logits move by some hundredths of their
spread, and a random model's most likely tokens are that close: continuations part. Rows say what
share of the tokens is that of the first program.

Prints a table, and the memory of packed weights; appends a row per measurement to
experiments/results/bench_decode.jsonl. A ratio says how many times faster than transformers; the
aims at batch 1 are 6 for `report` and 4 for `125m` on a CPU, and 10 on an H200. There is no Pallas
kernel: only a GPU could show that it wins, and none was at hand.

    python -m experiments.bench_decode
    python -m experiments.bench_decode --preset 125m --tokens 16 --batches 1 --rounds 3
"""

import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import generate, presets
from bitnet_jax.cli import flags
from bitnet_jax.config import Config, Hyper, ModelConfig
from bitnet_jax.fields import UserError
from bitnet_jax.model import Transformer, pack_params
from experiments import bench, bench_peer
from experiments.bench import show, spread

NEVER = -1  # an end of text that no model gives
LABELS = {
    "program": "one program",
    "program_packed": "one program, packed",
    "program_codes": "one program, int8 codes",
    "loop": "a dispatch per token",
    "loop_codes": "a dispatch per token, int8 codes",
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


def parse(argv: list[str]) -> Namespace:
    """The command line; raises UserError for numbers that make no measurement."""
    parser = bench.parser("bench_decode", __doc__, preset="report", rounds=5)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--batches", default="1,8,64", help=f"prompts side by side {default}")
    add("--prompt", type=int, default=16, help=f"tokens of a prompt {default}")
    add("--tokens", type=int, default=32, help=f"new tokens {default}")
    add("--online", action="store_true", help="also the form that transformers trains")
    args = parser.parse_args(argv)
    bench.check_counts(args, "prompt", "tokens", "rounds")
    sizes = args.batches.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UserError(f"--batches {args.batches}: use numbers above 0 with commas, such as 1,8")
    args.batches = [int(size) for size in sizes]
    return args


def resolve(args: Namespace) -> Config:
    """A preset's model in the layout of transformers; the user's changes come last."""
    fixed = ["model.layout=b158"]
    if jax.default_backend() == "cpu":
        fixed.append("model.dtype=float32")
    if presets.preset(args.preset).model.vocab_size is None:
        fixed.append("model.vocab_size=50257")
    return bench.resolve(args, fixed)[0]


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
    text_lines = []
    for name, model in shapes.items():
        size = weight_memory(model)
        text_lines.append(
            f"{name}: {size['params']:,} parameters, {size['bf16_mb']:,.0f} MB in bfloat16, "
            f"{size['packed_mb']:,.0f} MB packed "
            f"({size['bf16_mb'] / size['packed_mb']:.1f} times less)"
        )
    return "\n".join(text_lines)


class Ours:
    """Two ways to decode: one program, and a dispatch per token."""

    def __init__(self, cfg: Config, params, prompts_BP: np.ndarray, n_new: int):
        self.cfg, self.n_new = cfg, n_new
        self.params = jax.tree.map(lambda x: jnp.asarray(x)[None], params)
        self.hyper = jax.tree.map(lambda x: jnp.full(1, x, jnp.float32), Hyper())
        self.prompts = jnp.asarray(prompts_BP), jnp.full(len(prompts_BP), prompts_BP.shape[1])
        rest = {"sampling": generate.Sampling(), "seed": 0, "end_of_text": NEVER}
        start = time.perf_counter()
        with bench.precision(cfg.model):
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
        with bench.precision(cfg.model):
            state = generate.begin(cfg, params, hyper, *self.prompts, self.n_new, 0)
            for _ in range(self.n_new):
                state, tokens_RB1 = generate.extend(
                    cfg, params, hyper, state, 1, generate.Sampling(), NEVER
                )
                tokens.append(np.asarray(tokens_RB1)[0])
        return np.concatenate(tokens, axis=1)


def measure_batch(cfg: Config, params, peers: dict, prompts_BP: np.ndarray, args) -> list[dict]:
    """A row for every way to continue these prompts; `ratio`: times as fast as transformers."""
    ours = {"": Ours(cfg, params, prompts_BP, args.tokens)}
    for form in ("codes", "packed"):
        cfg_ = replace(cfg, model=replace(cfg.model, weight_format=form))
        held = pack_params(params, cfg.model, Hyper(), form)
        ours[f"_{form}"] = Ours(cfg_, held, prompts_BP, args.tokens)
    ways = {f"program{form}": way.program for form, way in ours.items()}
    ways |= {f"loop{form}": way.loop for form, way in ours.items()}
    for name, decode in peers.items():
        ways[name] = lambda decode=decode: decode(prompts_BP, args.tokens)
    seconds, tokens = measure(ways, args.rounds)
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
        rows.append(row)
    return rows


def measure(ways: dict, most: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds of each way to decode in every round, and the tokens that it gave in the last."""
    tokens = {}

    def move(name, decode):
        start = time.perf_counter()
        tokens[name] = decode()
        return time.perf_counter() - start

    moves = {name: partial(move, name, decode) for name, decode in ways.items()}
    return bench.rounds(moves, most), tokens


def table(rows: list[dict]) -> str:
    """The rows in words, with [smallest, largest] over the rounds."""
    text_lines = []
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
        text_lines.append(line.rstrip())
    return "\n".join(text_lines)


def make_peers(cfg: Config, params, *, online: bool) -> dict:
    """transformers' ways to decode, by name; says why when there are none."""
    if reason := bench_peer.why_none(cfg.model):
        print(f"not measured: transformers: {reason}")
        return {}
    on_host = jax.device_get(params)
    peers = {"transformers": bench_peer.make_generate(cfg, on_host, online=False)}
    if online:
        peers["transformers_online"] = bench_peer.make_generate(cfg, on_host, online=True)
    return peers


def run(args: Namespace) -> None:
    """Measure, write and print what the command line asks for."""
    cfg, rng = resolve(args), np.random.default_rng(args.seed)
    init, tokens_BL = jax.jit(Transformer(cfg.model).init), jnp.zeros((1, 2), jnp.int32)
    params = init(jax.random.key(args.seed), tokens_BL, Hyper())["params"]
    n_params = sum(x.size for x in jax.tree.leaves(params))
    fixed = bench.shape_of(args.preset, cfg, n_params) | {"P": args.prompt, "N": args.tokens}
    rows = bench.Rows("bench_decode", fixed)
    print(f"{rows.heading()}; {args.prompt} tokens of prompt and {args.tokens} new ones")
    peers = make_peers(cfg, params, online=args.online)
    for n_rows in args.batches:
        shape = n_rows, args.prompt
        prompts_BP = rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32)
        shared = {}
        if peers:
            threads = bench_peer.choose_threads(peers["transformers"], prompts_BP)
            shared = {"peer_threads": threads, "peer_versions": bench_peer.versions()}
        measured = measure_batch(cfg, params, peers, prompts_BP, args)
        print(table([rows.add(**row, **shared) for row in measured]), flush=True)
    print(f"rows: {rows.path}\n\nweights, by shape alone:\n{memory_table()}")


def main() -> None:
    args = parse(sys.argv[1:])
    bench.prepare()
    run(args)


if __name__ == "__main__":
    flags.guard(main)
