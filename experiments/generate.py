"""What does a checkpoint write?

Continues prompts by a model of a workdir or of a Hugging Face folder: greedily, or sampled from a
seed. One prompt appears as it is decoded; several are decoded side by side and printed at the end.
`--packed` keeps ternary weights in 2 bits: the same model in less memory. Standard output has the
text alone; how fast it came goes to standard error.

    python -m experiments.generate runs/train-1a2b3c4d --prompt "def main("
    python -m experiments.generate runs/train-1a2b3c4d@500:1 --prompt "The" --temperature 0.8
    python -m experiments.generate exported/model --prompt "The" --packed
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import data, generate, hf, program, train
from bitnet_jax.config import Config, Hyper, UserError
from bitnet_jax.model import pack_params
from bitnet_jax.tokenizer import Tokenizer
from experiments import common

CHUNK = 16  # tokens between prints
MOST = 8192  # tokens of a prompt and its continuation


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises UserError for values that make no text."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, told = parser.add_argument, "(default: %(default)s)"
    add(
        "checkpoint",
        metavar="WORKDIR[@STEP[:REPLICATE]]",
        help="default: last step, replicate 0; or a Hugging Face folder",
    )
    add("--prompt", action="append", required=True, dest="prompts", help="may be repeated")
    add("--tokens", type=int, default=64, help=f"new tokens {told}")
    add("--temperature", type=float, default=0.0, help=f"0: the most likely token {told}")
    add("--top-k", type=int, default=0, help=f"only the k most likely; 0: all {told}")
    add("--top-p", type=float, default=1.0, help=f"only the most likely that reach p {told}")
    add("--repetition-penalty", type=float, default=1.0, help=f"of tokens seen before {told}")
    add("--seed", type=int, default=0, help=f"of the draws {told}")
    add("--packed", action="store_true", help="keep ternary weights in 2 bits")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: needs at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be at least 0 and below 2**32")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: must be finite and at least 0")
    if args.top_k < 0:
        raise UserError(f"--top-k {args.top_k}: must be at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if not 0 < args.repetition_penalty < float("inf"):
        raise UserError(f"--repetition-penalty {args.repetition_penalty}: must be above 0")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        raise UserError("--top-k and --top-p cut what is sampled from; add --temperature 1")
    return args


def load(checkpoint: str) -> tuple[str, Config, Hyper, dict, Tokenizer]:
    """Label, configuration, numbers, parameters and tokenizer of a checkpoint; raises UserError."""
    if is_hf_folder(Path(checkpoint)):
        cfg, params, tokenizer = hf.load(Path(checkpoint))
        return checkpoint, cfg, Hyper(), params, tokenizer
    workdir, step, index = program.checkpoint_place(checkpoint)
    index = index or 0
    cfg, replicate, state = program.load_replicate(workdir, step, index)
    tokenizer = data.load(cfg.data).tokenizer
    saved = json.loads((Path(workdir) / "config.json").read_text())["corpus"]["tokenizer"]
    if tokenizer.key != saved["key"]:
        raise UserError(
            f"{workdir}: data.corpus={cfg.data.corpus} has changed since the run, and with it the "
            f"tokenizer {saved['name']}"
        )
    label = f"{workdir}@{step}:{index} ({replicate.name}, seed {replicate.seed})"
    return label, cfg, train.at_step(replicate.hyper, state.step), state.params, tokenizer


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder is laid out as Hugging Face's, complete or not; a workdir is not."""
    path = folder / "config.json"
    return any(folder.glob("*.safetensors*")) or (
        path.is_file() and '"model_type"' in path.read_text(encoding="utf-8", errors="replace")
    )


def encode(
    tokenizer: Tokenizer, prompts: list[str], n_new: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens [B, P] and lengths [B]; raises UserError for a prompt that does not fit.

    A continuation may pass the `context`, the tokens of a window in training; a prompt may not.
    """
    rows = tokenizer.encode_batch(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if not len(row):
            raise UserError("--prompt is empty; give it at least one character")
        told = f"--prompt {prompt[:20]!r}...: {len(row)} tokens"
        if len(row) > context:
            raise UserError(f"{told}, but the model's context is {context}; give it less text")
        if len(row) + n_new > MOST:
            raise UserError(f"{told} and --tokens {n_new} are more than {MOST}")
    lengths_B = np.array([len(row) for row in rows], np.int32)
    padded = [np.pad(row, (0, lengths_B.max() - len(row))) for row in rows]
    return np.stack(padded), lengths_B


def printable(tokenizer: Tokenizer, ids) -> str:
    """Text of unfinished ids that more ids only add to: the bytes of a cut character wait."""
    return tokenizer.decode(ids).rstrip("\ufffd")


def decode(cfg, params, hyper, prompts_BP, lengths_B, args, end_of_text):
    """Yield the new tokens [B, n] so far, CHUNK more each time, up to `args.tokens`.

    Ends early where all rows have ended. `args` are those of `parse`.
    """
    params = jax.tree.map(lambda x: np.asarray(x)[None], params)
    hyper = jax.tree.map(lambda x: np.full(1, x, np.float32), hyper)
    sampling = generate.Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    n_chunks, new_BN = -(-args.tokens // CHUNK), np.zeros((len(lengths_B), 0), np.int32)
    # float32 means float32, as in training.
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        params = jax.device_put(params)
        state = generate.begin(
            cfg, params, hyper, prompts_BP, lengths_B, n_chunks * CHUNK, np.uint32(args.seed)
        )
        for _ in range(n_chunks):
            state, tokens_RBN = generate.extend(
                cfg, params, hyper, state, CHUNK, sampling, end_of_text
            )
            new_BN = np.concatenate([new_BN, tokens_RBN[0]], axis=1)[:, : args.tokens]
            yield new_BN
            if np.asarray(state.done_B).all():
                return


def body() -> None:
    args = parse(sys.argv[1:])
    label, cfg, hyper, params, tokenizer = load(args.checkpoint)
    prompts_BP, lengths_B = encode(tokenizer, args.prompts, args.tokens, cfg.data.seq_len)
    if args.packed:
        params = pack_params(params, cfg.model, hyper)
        cfg = replace(cfg, model=replace(cfg.model, weight_format="packed"))
    print(f"{label}: {'sampled' if args.temperature else 'greedy'}\n")
    end, alone = tokenizer.end_of_text, len(args.prompts) == 1
    if alone:
        print(args.prompts[0], end="", flush=True)
    shown, times = "", []
    for new_BN in decode(cfg, params, hyper, prompts_BP, lengths_B, args, end):
        if alone:
            text = printable(tokenizer, generate.until_end(new_BN[0], end))
            print(text[len(shown) :], end="", flush=True)
            shown = text
        times.append(time.perf_counter())
    for prompt, row in zip(args.prompts, new_BN, strict=True):
        row = generate.until_end(row, end)
        text = tokenizer.decode(row)
        print(text[len(shown) :] if alone else prompt + text)
        stopped = ", then an end of text" if len(row) < args.tokens else ""
        print(f"[{len(row)} tokens{stopped}]\n")
    if len(times) > 1:  # the first chunk compiles
        rate = (len(times) - 1) * CHUNK * len(lengths_B) / (times[-1] - times[0])
        print(f"{rate:.1f} tokens/s after the first {CHUNK}", file=sys.stderr)


if __name__ == "__main__":
    common.guard(body)
