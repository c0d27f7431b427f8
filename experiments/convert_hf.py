"""How does a model leave for Hugging Face's transformers, and come back?

`export` writes a replicate of a workdir as a folder that `AutoModelForCausalLM.from_pretrained`
loads as BitNetForCausalLM, with its tokenizer: the master weights, which transformers quantises as
it runs and can train, or with --packed the ternary codes, 2 bits each. `check` reads such a folder,
or a published one, says what it holds and evaluates it on held-out text. The loss is the one of the
run when corpus and windows are; both default to the folder's length and 2 batches of 8.

    python -m experiments.convert_hf export runs/train-1a2b3c4d@500:1 my-bitnet
    python -m experiments.convert_hf check my-bitnet --set data.corpus=text:books/*.txt
    python -m experiments.train --set run.init=hf:my-bitnet      # train on, with a new optimiser

Seconds on 2 CPU cores for the models that train there.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import data, hf, presets, reference, train
from bitnet_jax.config import Config, Hyper, UserError
from bitnet_jax.tokenizer import Tokenizer
from experiments import common, generate


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convert_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="export | check")
    add = commands.add_parser("export", help="write a replicate as a Hugging Face folder")
    add.add_argument(
        "checkpoint",
        metavar="WORKDIR[@STEP[:REPLICATE]]",
        help="default: last step, replicate 0",
    )
    add.add_argument("folder", type=Path, help="must not exist, or be empty")
    add.add_argument("--packed", action="store_true", help="ternary codes instead of latents")
    add.set_defaults(command=export)
    add = commands.add_parser("check", help="say what a folder holds and evaluate it")
    add.add_argument("folder", type=Path)
    add.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        dest="overrides",
        help="of data (default: data.corpus=stdlib) and hyper",
    )
    add.set_defaults(command=check)
    return parser.parse_args(argv)


def export(args: argparse.Namespace) -> None:
    """Write a replicate of a workdir as a folder."""
    label, cfg, hyper, params, tokenizer = generate.load(args.checkpoint)
    hf.export(args.folder, cfg, params, hyper, tokenizer, packed=args.packed)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    kind = "packed ternary weights" if args.packed else "master weights"
    print(f"{label}: {kind} in {args.folder}, {size / 1e6:.1f} MB")


def check(args: argparse.Namespace) -> None:
    """Say what a folder holds, and its loss on held-out text."""
    cfg, params, tokenizer = hf.load(args.folder)
    cfg, hyper = presets.override(cfg, args.overrides)
    for text in args.overrides:
        if text.partition(".")[0] not in ("data", "hyper") or text.startswith("data.tokenizer"):
            raise UserError(f"--set {text}: only data.* and hyper.* can be set; the folder decides")
    shapes = hf.shapes(dataclasses.replace(cfg.model, weight_format="ternary"))
    print(f"{args.folder}: {sum(int(np.prod(s)) for s in shapes.values()):,} parameters")
    for field in dataclasses.fields(cfg.model):
        print(f"    model.{field.name}={getattr(cfg.model, field.name)}")
    print(f"    {tokenizer.vocab_size:,} tokens, trained on windows of {cfg.data.seq_len}")
    found = evaluate(cfg, params, Hyper(**hyper), tokenizer)
    print(
        f"{cfg.data.corpus}, held out, {found['positions']:,} tokens in windows of "
        f"{cfg.data.seq_len}: loss {found['eval/loss']:.4f}, "
        f"{found['eval/bits_per_byte']:.3f} bits per byte; unigram {found['unigram']:.4f}, "
        f"uniform {np.log(cfg.model.vocab_size):.4f}"
    )


def evaluate(cfg: Config, params, hyper: Hyper, tokenizer: Tokenizer) -> dict[str, float]:
    """Numbers of `train.evaluate` on the held-out windows of `cfg.data`, and the unigram's loss."""
    tokens, n_vocab = data.load(cfg.data), cfg.model.vocab_size
    held_out_NBL = data.eval_blocks(cfg.data, tokens.validation_N)
    flat = held_out_NBL.reshape(-1, held_out_NBL.shape[-1])
    weights = data.score_weights(flat, tokenizer.end_of_text, True)
    unigram_V = reference.unigram_probs(tokens.train_N, n_vocab)
    bytes_V = np.pad(tokenizer.token_bytes_V, (0, n_vocab - tokenizer.vocab_size))
    evals = train.EvalData(
        held_out_NBL, None, unigram_V.astype(np.float32), bytes_V.astype(np.float32)
    )
    params, hyper = jax.tree.map(lambda x: np.asarray(x)[None], (params, hyper))
    # float32 means float32, as in training.
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        run = jax.jit(lambda p, h, e: train.evaluate(cfg, p, h, e, tokenizer.end_of_text))
        found = {key: float(value[0]) for key, value in run(params, hyper, evals).items()}
    unigram = float(-(np.log(unigram_V)[flat[:, 1:]] * weights).sum() / weights.sum())
    return found | {"positions": int(weights.sum()), "unigram": unigram}


def body() -> None:
    args = parse(sys.argv[1:])
    args.command(args)


if __name__ == "__main__":
    common.guard(body)
