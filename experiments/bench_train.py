"""How long does a training step take, what does the loop add to it, and how long does torch take?

One process measures in turns, round after round, so that a slow minute hits everything alike: the
chunk of 20 steps that training dispatches, its evaluation, the host's code around it, the same
steps with a dispatch each, two replicates at once, and, where torch is installed, transformers'
BitNet (AutoBitLinear, online quantisation) from the same weights on the same batches and schedule.
The last runs in float32 with layout b158, the only one that transformers has. Everything trains
recipe b158: the numbers of a recipe are data, and `--set hyper.*` changes nothing here.

Prints a table and appends a row per measurement to experiments/results/bench_train.jsonl.
Aims on a CPU: torch takes at least 1.5 times as long, evaluation at most 5 % of the time and host
code less than 5 %. On two cores `quick` takes about 4 minutes and `report` 6.

    python -m experiments.bench_train
    python -m experiments.bench_train --preset report --set data.corpus=text:books/*.txt
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import config, data, log, optim, presets, run, train
from bitnet_jax import program as programs
from experiments import common

RESULTS = Path(__file__).parent / "results" / "bench_train.jsonl"
K = 20  # steps in a chunk
STEPS = 2000  # length of the schedule, more than is measured
LOOP_CHUNKS = 2  # chunks in a window of the whole loop
PEER = ("torch", "transformers")
ROUNDS, QUICK_ROUNDS = 5, 9  # the latter where a chunk takes less than a second
LIMIT_S = 120  # a chunk that takes longer is not measured
CORE_FLOPS = 1.5e11  # float32 per second, more than a core reaches: gives a lower bound of the time
LABELS = {
    "train_chunk": "a step, in chunks of 20",
    "evaluation": "an evaluation; share of its chunk",
    "host_code": "a step of the whole loop; share of host code",
    "single_steps": "a step, one dispatch each; ratio to chunks without evaluation",
    "two_replicates": "a step of one of two replicates; ratio to one alone",
    "torch": "a step of transformers on torch; ratio to ours without evaluation",
}


class Skipped(Exception):
    """A measurement that does not fit this machine, and why."""


@dataclasses.dataclass
class Trainer:
    """A program and its state, which every window moves on."""

    program: programs.Program
    state: train.TrainState
    step: int = 0

    def window(self, move, batches) -> float:
        """Seconds that `move(state, batches) -> state` takes, until the new parameters exist."""
        with jax.set_mesh(self.program.mesh):
            start = time.perf_counter()
            self.state = move(self.state, batches)
            jax.block_until_ready(self.state.params)
            return time.perf_counter() - start

    def batches(self, n_chunks: int) -> list[jax.Array]:
        """Batches of the next chunks, ready on the device."""
        starts = [self.step + K * i for i in range(n_chunks)]
        self.step += K * n_chunks
        return [jax.block_until_ready(self.program.batches(n, n + K)) for n in starts]

    def chunks(self, n_chunks: int) -> float:
        """Seconds of chunks alone."""

        def move(state, batches):
            for batch in batches:
                state, *_ = self.program.train_chunk(state, batch)
            return state

        return self.window(move, self.batches(n_chunks))

    def evaluation(self) -> float:
        """Seconds of an evaluation alone."""
        with jax.set_mesh(self.program.mesh):
            start = time.perf_counter()
            jax.block_until_ready(self.program.evaluate(self.state))
            return time.perf_counter() - start

    def loop(self, n_chunks: int, metrics: log.Metrics) -> float:
        """Seconds of chunks with the host's work around them, as `run.run` does it."""
        make_rows = run.row_maker(self.program)
        ends = [self.step + K * i for i in range(1, n_chunks + 1)]
        self.step = ends[-1]

        def emit(step, numbers):
            metrics.write(make_rows(step, *jax.device_get(numbers)))

        def move(state, prefetch):
            pending = None
            batches = prefetch.submit(self.program.batches, ends[0] - K, ends[0])
            for end in ends:
                state, *numbers = self.program.train_chunk(state, batches.result())
                if end < ends[-1]:
                    batches = prefetch.submit(self.program.batches, end, end + K)
                if pending:
                    emit(*pending)
                pending = (end, numbers)
            emit(*pending)
            return state

        with ThreadPoolExecutor(max_workers=1) as prefetch:
            return self.window(move, prefetch)


def start(program: programs.Program) -> Trainer:
    """Start a program at step 0."""
    with jax.set_mesh(program.mesh):
        return Trainer(program, program.init())


def make_single_steps(program: programs.Program):
    """Return move(state, batches) -> state with a dispatch for every batch [R, B]."""
    cfg, end_of_text = program.cfg, program.tokens.tokenizer.end_of_text

    def one(state, hyper, tokens_N, batch):
        on_host = tokens_N is None
        windows_BL = batch if on_host else data.gather(tokens_N, batch, cfg.data.seq_len)
        return train.train_step(cfg, state, hyper, windows_BL, end_of_text)[0]

    step_R = train.over_replicates(one, len(program.replicates))
    compiled = jax.jit(step_R, donate_argnums=0, out_shardings=program.state_sharding)

    def move(state, batches):
        for batch in batches:
            state = compiled(state, program.hyper, program.train_N, batch)
        return state

    return move


def compile_chunk(trainer: Trainer) -> dict:
    """Compile the chunk that training dispatches; its seconds, and the memory it needs."""
    program = trainer.program
    fixed = (program.hyper, program.evals, program.train_N)
    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        lowered = program.jitted_chunk.lower(trainer.state, *fixed, program.batches(0, K))
        middle = time.perf_counter()
        m = lowered.compile().memory_analysis()
        end = time.perf_counter()
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        "lower_s": round(middle - start, 2),
        "compile_s": round(end - middle, 2),
        "memory_mb": round((needed + m.temp_size_in_bytes) / 1e6, 1),
    }


def peak_memory() -> dict:
    """The most that this process, and where it counts the device, have held so far."""
    unit = 1024 if sys.platform == "linux" else 1
    peak = {"rss_mb": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if stats := jax.devices()[0].memory_stats():
        peak["device_peak_mb"] = stats["peak_bytes_in_use"]
    return {k: round(v / 1e6, 1) for k, v in peak.items()}


def free_memory() -> float:
    """Bytes free on the device, or in the machine where that is the device."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if not Path("/proc/meminfo").exists():
        return float("inf")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def check_time(n_params: int, cfg: config.Config) -> None:
    """Raise Skipped if even ideal code would take too long for a chunk here."""
    seconds = 6 * n_params * K * cfg.data.batch_size * cfg.data.seq_len
    seconds /= CORE_FLOPS * len(os.sched_getaffinity(0))
    if jax.default_backend() == "cpu" and seconds > LIMIT_S:
        raise Skipped(f"a chunk of {K} steps takes more than {seconds:.0f} s on these cores")


def check_memory(memory_mb: float, n_params: int) -> None:
    """Raise Skipped if the program and four more copies of the parameters do not fit."""
    needed, free = memory_mb * 1e6 + 16 * n_params, free_memory()
    if needed > free:
        raise Skipped(f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def measure(moves: dict) -> list[np.ndarray]:
    """Seconds of each move in every round, after a round of warm-up."""

    def take_turns():
        return [move() for move in moves.values()]

    take_turns()
    rounds = [take_turns()]
    while len(rounds) < (QUICK_ROUNDS if rounds[0][0] < 1 else ROUNDS):
        rounds.append(take_turns())
    return list(np.array(rounds).T)


def measure_ours(one: Trainer, two: Trainer, workdir: Path, record) -> None:
    """The chunk, and what stands around it."""
    compiled = compile_chunk(one)
    check_memory(compiled["memory_mb"], record.n_params)
    if (seconds := one.chunks(1)) > LIMIT_S:
        raise Skipped(f"a chunk of {K} steps takes {seconds:.0f} s")
    compiled |= peak_memory()
    compiled_two = compile_chunk(two)
    check_memory(compiled_two["memory_mb"], 2 * record.n_params)
    single_steps = make_single_steps(one.program)

    def singles():
        batches_RKB = one.batches(1)[0]
        return one.window(single_steps, [batches_RKB[:, k] for k in range(K)])

    run.prepare_workdir(workdir, resume=True)
    folder = Path(tempfile.mkdtemp(prefix="loop-", dir=workdir))
    metrics = log.Metrics(folder, 0, one.program.replicates)
    turns = measure(
        {
            "chunk": lambda: one.chunks(1),
            "evaluation": one.evaluation,
            "singles": singles,
            "two": lambda: two.chunks(1),
            "alone": lambda: one.chunks(LOOP_CHUNKS),
            "loop": lambda: one.loop(LOOP_CHUNKS, metrics),
        }
    )
    metrics.close()
    chunk, evaluation, singles, two, alone, loop = turns
    steps = chunk - evaluation
    record("train_chunk", chunk / K, **compiled)
    record("evaluation", evaluation, share=evaluation / chunk)
    record("host_code", loop / (K * LOOP_CHUNKS), share=1 - alone / loop)
    record("single_steps", singles / K, ratio=singles / steps)
    record("two_replicates", two / (2 * K), ratio=two / (2 * chunk), R=2, **compiled_two)


def measure_peer(ours: Trainer, record) -> None:
    """Our step beside that of transformers on torch, and the loss that both reach."""
    program, losses = ours.program, {}
    params = jax.tree.map(lambda x: x[0], jax.device_get(ours.state.params))
    peer_steps = make_peer_steps(program, make_peer(program.cfg.model, params))
    n_windows = data.n_windows(len(program.tokens.train_N), program.cfg.data.seq_len)

    def our_steps():
        def move(state, batches):
            state, numbers, _ = program.train_chunk(state, batches)
            losses["ours"] = numbers["train/loss"]
            return state

        return ours.window(move, ours.batches(1)[0])

    def torch_steps():
        """The batches that `our_steps` has just taken."""
        cfg, seed = program.cfg.data, program.replicates[0].data_seed
        steps = range(ours.step - K, ours.step)
        ids_KB = np.array([data.window_ids(cfg, n_windows, seed, step) for step in steps])
        windows_KBL = data.gather(program.tokens.train_N, ids_KB, cfg.seq_len)
        start = time.perf_counter()
        losses["torch"] = peer_steps(windows_KBL, steps.start)
        return time.perf_counter() - start

    turns = {"ours": our_steps, "torch": torch_steps, "evaluation": ours.evaluation}
    chunk, torch, evaluation = measure(turns)
    record(
        "torch",
        torch / K,
        ratio=torch / (chunk - evaluation),
        layout=program.cfg.model.layout,
        dtype=program.cfg.model.dtype,
        **spread("ours_ms", 1000 * (chunk - evaluation) / K),
        **spread("ratio_with_evaluation", torch / chunk),
        steps=ours.step,
        loss=round(losses["torch"], 4),
        ours_loss=round(float(losses["ours"][0]), 4),
        peer_versions={name: importlib.metadata.version(name) for name in PEER},
    )


def why_no_peer() -> str | None:
    """What the comparison with torch lacks on this machine, if anything."""
    missing = [name for name in PEER if importlib.util.find_spec(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    if jax.default_backend() != "cpu":
        return "only compared on CPUs"
    # AutoBitLinear compiles its quantisers.
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


def make_peer(cfg: config.ModelConfig, params):
    """transformers' BitNet with the parameters of one of our replicates."""
    import torch  # optional, and only for this comparison
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = BitNetForCausalLM(
        BitNetConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_ff,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            tie_word_embeddings=cfg.tied_embedding,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    online = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    replace_with_bitnet_linear(model, ["lm_head"], online)
    # The new layers hold the default weights of nn.Linear until here.
    weights = peer_weights(cfg, params)
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    model.tie_weights()
    return model.train()


def peer_weights(cfg: config.ModelConfig, params) -> dict[str, np.ndarray]:
    """Parameters under transformers' names, with linear layers as [out, in]."""
    embedding = params["embed"]["embedding"]
    weights = {
        "model.embed_tokens": embedding,
        "model.norm": params["final_norm"]["scale"],
        "lm_head": embedding if cfg.tied_embedding else params["head"]["kernel"].T,
    }
    for i in range(cfg.n_layers):
        block, layer = params[f"block_{i}"], f"model.layers.{i}"
        weights[f"{layer}.input_layernorm"] = block["attn_norm"]["scale"]
        weights[f"{layer}.post_attention_layernorm"] = block["ffn_norm"]["scale"]
        weights[f"{layer}.self_attn.attn_sub_norm"] = block["attn"]["sub_norm"]["scale"]
        weights[f"{layer}.mlp.ffn_sub_norm"] = block["ffn"]["sub_norm"]["scale"]
        for name in ("q", "k", "v", "o"):
            weights[f"{layer}.self_attn.{name}_proj"] = block["attn"][name]["kernel"].T
        for name in ("gate", "up", "down"):
            weights[f"{layer}.mlp.{name}_proj"] = block["ffn"][name]["kernel"].T
    return {f"{name}.weight": w for name, w in weights.items()}


def make_peer_steps(program: programs.Program, model):
    """Return steps(windows_KBL, done) -> loss of the last: torch's loop with our settings."""
    import torch  # optional, and only for this comparison

    cfg, hyper = program.cfg, program.replicates[0].hyper
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("_proj.weight") == is_matrix]}
        for is_matrix in (True, False)
    ]
    betas = (cfg.optim.beta1, cfg.optim.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=cfg.optim.eps, fused=True)
    rates = np.array(optim.learning_rate(hyper, np.arange(STEPS + 1), cfg.run)).tolist()

    def one(inputs_BL, targets_BL, n):
        decay = hyper.decoupled_1 if n <= cfg.run.boundary else hyper.decoupled_2
        for group, share in zip(optimizer.param_groups, (1.0, hyper.decay_rest), strict=True):
            group["weight_decay"] = decay * share
            group["lr"] = rates[n]
        optimizer.zero_grad()
        logits_BLV = model(input_ids=inputs_BL).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        return loss

    def steps(windows_KBL, done):
        end_of_text = program.tokens.tokenizer.end_of_text
        scored_KBL = data.score_weights(windows_KBL, end_of_text, cfg.data.score_last)
        targets_KBL = np.where(scored_KBL > 0, windows_KBL[..., 1:], -100)  # -100: not scored
        inputs_KBL = torch.tensor(windows_KBL[..., :-1]).long()
        batches = zip(inputs_KBL, torch.tensor(targets_KBL).long(), strict=True)
        return [one(*batch, done + k) for k, batch in enumerate(batches, 1)][-1].item()

    return steps


def spread(name: str, values: np.ndarray) -> dict:
    """Median, smallest and largest."""
    numbers = {"median": np.median(values), "min": values.min(), "max": values.max()}
    return {f"{name}_{k}": float(f"{x:.4g}") for k, x in numbers.items()}


class Record:
    """Rows: appended to the results as they come, and printed at the end."""

    def __init__(self, cfg: config.Config, preset: str, n_params: int):
        self.n_params, self.rows = n_params, []
        self.fixed = {
            "preset": preset,
            "layout": cfg.model.layout,
            "dtype": cfg.model.dtype,
            "B": cfg.data.batch_size,
            "L": cfg.data.seq_len,
            "d_model": cfg.model.d_model,
            "layers": cfg.model.n_layers,
            "vocab": cfg.model.vocab_size,
            "params": n_params,
            "R": 1,
            "K": K,
        }
        self.seen = log.provenance()
        del self.seen["argv"]  # rows are published, and it names folders of this machine

    def __call__(self, benchmark: str, seconds: np.ndarray, ratio=None, share=None, **values):
        """Append a row; `seconds` become milliseconds, and tokens per second for a step."""
        row = {"benchmark": benchmark} | self.fixed | spread("ms", 1000 * seconds)
        if benchmark != "evaluation":
            row["tokens_per_second"] = round(row["B"] * row["L"] / float(np.median(seconds)))
        for name, relative in (("ratio", ratio), ("share", share)):
            if relative is not None:
                row |= spread(name, relative)
        row |= values | {"load_1min": round(os.getloadavg()[0], 2)} | self.seen
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def table(self) -> str:
        """The rows in words, with [smallest, largest] over the rounds."""

        def show(row, name, unit, factor=1):
            if f"{name}_median" not in row:
                return ""
            middle, low, high = (factor * row[f"{name}_{k}"] for k in ("median", "min", "max"))
            return f"{middle:.4g} [{low:.4g}, {high:.4g}] {unit}"

        lines = [
            f"{LABELS[row['benchmark']]:62} {show(row, 'ms', 'ms'):30} "
            f"{show(row, 'ratio', 'x')}{show(row, 'share', '%', 100)}"
            for row in self.rows
        ]
        for row in self.rows:
            if "compile_s" in row:
                lines.append(
                    f"R={row['R']}: {row['tokens_per_second']:,} tokens/s per replicate; lowering "
                    f"{row['lower_s']} s, compiling {row['compile_s']} s; {row['memory_mb']} MB"
                )
            if "ours_loss" in row:
                lines.append(
                    f"torch: layout {row['layout']}, {row['dtype']}; loss after {row['steps']} "
                    f"steps {row['loss']:.3f}, ours {row['ours_loss']:.3f}; with our evaluation "
                    f"{show(row, 'ratio_with_evaluation', 'x')}"
                )
        return "\n".join(lines)


def body(request: common.Request) -> None:
    schedule = replace(request.cfg.run, recipes=("b158",), steps=STEPS, eval_every=K, init=None)
    cfg = replace(request.cfg, run=schedule)
    seed = request.replicates[0].seed
    replicates = presets.make_replicates(cfg, [seed, seed + 1], {})
    one = start(programs.build(cfg, replicates[:1]))
    n_params = sum(x.size for x in jax.tree.leaves(one.program.abstract_state.params))
    record = Record(one.program.cfg, request.preset, n_params)
    try:
        check_time(n_params, cfg)
        two = start(programs.build(cfg, replicates))
        measure_ours(one, two, request.workdir, record)
        del two
        if reason := why_no_peer():
            raise Skipped(f"torch: {reason}")
        check_memory(2 * record.rows[0]["memory_mb"], n_params)
        peer_cfg = replace(cfg, model=replace(cfg.model, layout="b158", dtype="float32"))
        program = one.program if peer_cfg == cfg else programs.build(peer_cfg, replicates[:1])
        measure_peer(start(program), record)
    except Skipped as reason:
        print(f"not measured: {reason}")
    if record.rows:
        print(
            f"{record.fixed['preset']}: {n_params:,} parameters on {record.seen['device']}, "
            f"{record.seen['cores']} cores\n{record.table()}\nrows: {RESULTS}"
        )


if __name__ == "__main__":
    common.main(__doc__, "bench_train", "quick", body)
