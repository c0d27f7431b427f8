"""What does a checkpoint write?

Continues prompts by a model of a workdir: greedily, or sampled from a seed. One prompt appears as
it is decoded; several are decoded side by side and printed at the end.

    python -m experiments.generate runs/train-1a2b3c4d --prompt "def main("
    python -m experiments.generate runs/train-1a2b3c4d@500:1 --prompt "The" --temperature 0.8
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import data, generate, program, train
from bitnet_jax.config import UserError
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
    add("checkpoint", metavar="WORKDIR[@STEP[:REPLICATE]]", help="default: last step, replicate 0")
    add("--prompt", action="append", required=True, dest="prompts", help="may be repeated")
    add("--tokens", type=int, default=64, help=f"new tokens {told}")
    add("--temperature", type=float, default=0.0, help=f"0: the most likely token {told}")
    add("--top-k", type=int, default=0, help=f"only the k most likely; 0: all {told}")
    add("--top-p", type=float, default=1.0, help=f"only the most likely that reach p {told}")
    add("--repetition-penalty", type=float, default=1.0, help=f"of tokens seen before {told}")
    add("--seed", type=int, default=0, help=f"of the draws {told}")
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


def load(checkpoint: str):
    """(label, configuration, numbers, parameters, tokenizer) of a checkpoint; raises UserError."""
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


def encode(tokenizer: Tokenizer, prompts: list[str], n_new: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens [B, P] and lengths [B]; raises UserError for a prompt that does not fit."""
    rows = tokenizer.encode_batch(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if not len(row):
            raise UserError("--prompt is empty; give it at least one character")
        if len(row) + n_new > MOST:
            raise UserError(
                f"--prompt {prompt[:20]!r}...: {len(row)} tokens and --tokens {n_new} are more "
                f"than {MOST}"
            )
    lengths_B = np.array([len(row) for row in rows], np.int32)
    padded = [np.pad(row, (0, lengths_B.max() - len(row))) for row in rows]
    return np.stack(padded), lengths_B


def body() -> None:
    args = parse(sys.argv[1:])
    label, cfg, hyper, params, tokenizer = load(args.checkpoint)
    prompts_BP, lengths_B = encode(tokenizer, args.prompts, args.tokens)
    print(f"{label}: {'sampled' if args.temperature else 'greedy'}\n")
    params, hyper = jax.tree.map(lambda x: np.asarray(x, np.float32)[None], (params, hyper))
    # float32 means float32, as in training.
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    sampling = generate.Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    n_chunks, end = -(-args.tokens // CHUNK), tokenizer.end_of_text
    alone = len(args.prompts) == 1
    if alone:
        print(args.prompts[0], end="", flush=True)
    new_BN, shown = np.zeros((len(lengths_B), 0), np.int32), ""
    with jax.default_matmul_precision(precision):
        state = generate.begin(
            cfg, params, hyper, prompts_BP, lengths_B, n_chunks * CHUNK, np.uint32(args.seed)
        )
        for _ in range(n_chunks):
            state, tokens_RBN = generate.extend(cfg, params, hyper, state, CHUNK, sampling, end)
            new_BN = np.concatenate([new_BN, tokens_RBN[0]], axis=1)[:, : args.tokens]
            if alone:
                # A character may be cut in two: its bytes wait for the next chunk.
                text = tokenizer.decode(generate.until_end(new_BN[0], end)).rstrip("\ufffd")
                print(text[len(shown) :], end="", flush=True)
                shown = text
            if np.asarray(state.done_B).all():
                break
    for prompt, row in zip(args.prompts, new_BN, strict=True):
        row = generate.until_end(row, end)
        text = tokenizer.decode(row)
        print(text[len(shown) :] if alone else prompt + text)
        stopped = ", then an end of text" if len(row) < args.tokens else ""
        print(f"[{len(row)} tokens{stopped}]\n")


if __name__ == "__main__":
    common.guard(body)
