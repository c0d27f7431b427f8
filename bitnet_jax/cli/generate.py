"""Continue prompts by a model of a workdir or of a Hugging Face folder.

Greedily, or sampled from a seed. A prompt is given by --prompt, is a whole file, or comes from
standard input (also as --prompt -). One prompt appears as it is decoded; several are decoded side
by side and printed at the end. Standard output has the text alone. --packed keeps ternary weights
in 2 bits: the same model in less memory. CPUs that multiply integers fast get them in 8 bits.

    bitnet generate runs/train-1a2b3c4d --prompt "def main("
    bitnet generate runs/train-1a2b3c4d@500:1 --prompt "The" --temperature 0.8
    bitnet generate exported/model --packed < prompt.txt
"""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from bitnet_jax import stopping
from bitnet_jax.cli import flags

CHUNK = 16  # tokens between prints
STDIN = "-"  # as a prompt
MOST = 8192  # tokens of a prompt and its continuation


def main(argv: list[str]) -> None:
    args = parse(argv)

    from bitnet_jax import generate, restore

    flags.prepare()
    prompts = read_prompts(args)
    model = restore.load_model(args.source)
    context = model.cfg.data.seq_len
    prompts_BP, lengths_B = encode(model.tokenizer, prompts, args.tokens, context, args.special)
    model = generate.for_decoding(model, packed=args.packed)
    write(model, prompts, decode(model, prompts_BP, lengths_B, args), args)


def parse(argv: list[str]) -> Namespace:
    """The command line; raises UserError for values that make no text."""
    parser = flags.Parser("bitnet generate", __doc__, any_bytes=True)
    add, default = parser.add_argument, "(default: %(default)s)"
    flags.add_source(parser)
    add("--prompt", action="append", default=[], dest="prompts", help="may be repeated")
    add("--file", action="append", default=[], dest="files", type=Path, help="a prompt; as often")
    add("--special", action="store_true", help="special tokens in prompts are those tokens")
    add("--tokens", type=int, default=64, help=f"new tokens {default}")
    add("--temperature", type=float, default=0.0, help=f"0: the most likely token {default}")
    add("--top-k", type=int, default=0, help=f"only the k most likely; 0: all {default}")
    add("--top-p", type=float, default=1.0, help=f"only the most likely that reach p {default}")
    add("--repetition-penalty", type=float, default=1.0, help=f"of tokens seen before {default}")
    add("--seed", type=int, default=0, help=f"of the draws {default}")
    add("--packed", action="store_true", help="keep ternary weights in 2 bits")
    args = parser.parse_args(argv)

    from bitnet_jax.fields import UserError

    ranges = {
        "tokens": 1 <= args.tokens <= MOST or f"needs 1 to {MOST}",
        "seed": 0 <= args.seed < 2**32 or "needs 0 to 2**32 - 1",
        "temperature": args.temperature == 0
        or 1e-3 <= args.temperature <= 1e3
        or "needs 0, or 0.001 to 1000",
        "top_k": 0 <= args.top_k < 2**31 or "must be at least 0",
        "top_p": 0 < args.top_p <= 1 or "must be above 0 and at most 1",
        "repetition_penalty": 1e-3 <= args.repetition_penalty <= 1e3 or "needs 0.001 to 1000",
    }
    for name, fits in ranges.items():
        if fits is not True:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: {fits}")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        raise UserError("--top-k and --top-p cut what is sampled from; add --temperature 1")
    return args


def read_prompts(args: Namespace) -> list[str]:
    """Of --prompt, then of --file, then or else standard input; not UTF-8 becomes U+FFFD."""
    from bitnet_jax.fields import UserError

    given = [os.fsencode(prompt) for prompt in args.prompts if prompt != STDIN]
    try:
        given += [path.read_bytes() for path in args.files]
    except OSError as error:
        raise UserError(f"--file {error.filename}: {error.strerror}") from error
    if not given or STDIN in args.prompts:
        if sys.stdin.isatty() and not args.prompts:
            raise UserError("no prompt: give --prompt TEXT, --file FILE, or text on standard input")
        given.append(sys.stdin.buffer.read())
    return [prompt.decode("utf-8", "replace") for prompt in given]


def encode(tokenizer, prompts: list[str], n_new: int, context: int, special: bool = False):
    """Padded tokens [B, P] and lengths [B]; raises UserError for a prompt that does not fit.

    As the tokenizer encodes the start of a document; `special` as in `Tokenizer.encode_prompt`.
    A continuation may pass the `context`, the tokens of a window in training; a prompt may not.
    """
    import numpy as np

    from bitnet_jax.fields import UserError

    rows = [tokenizer.encode_prompt(prompt, special) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not len(row):
            raise UserError("the prompt is empty; give it at least one character")
        length = f"prompt {prompt[:20]!r}...: {len(row)} tokens"
        if len(row) > context:
            raise UserError(f"{length}, but the model's context is {context}; give it less text")
        if len(row) + n_new > MOST:
            raise UserError(f"{length} and --tokens {n_new} are more than {MOST}")
    lengths_B = np.array([len(row) for row in rows], np.int32)
    padded = [np.pad(row, (0, lengths_B.max() - len(row))) for row in rows]
    return np.stack(padded), lengths_B


def decode(model, prompts_BP, lengths_B, args: Namespace):
    """Yield the new tokens [B, n] so far, CHUNK more each time, up to `args.tokens`.

    Ends early where all rows have ended.
    """
    import jax
    import numpy as np

    from bitnet_jax import generate

    cfg, ends = model.cfg, np.array(model.tokenizer.ends, np.int32)
    params = jax.tree.map(lambda x: np.asarray(x)[None], model.params)
    hyper = jax.tree.map(lambda x: np.full(1, x, np.float32), model.hyper)
    sampling = generate.Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.repetition_penalty,
        n_tokens=model.tokenizer.vocab_size,
    )
    n_chunks, new_BN = -(-args.tokens // CHUNK), np.zeros((len(lengths_B), 0), np.int32)
    # float32 means float32, as in training.
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        params = jax.device_put(params)
        state = generate.begin(
            cfg, params, hyper, prompts_BP, lengths_B, n_chunks * CHUNK, np.uint32(args.seed)
        )
        for _ in range(n_chunks):
            state, tokens_RBN = generate.extend(cfg, params, hyper, state, CHUNK, sampling, ends)
            new_BN = np.concatenate([new_BN, tokens_RBN[0]], axis=1)[:, : args.tokens]
            yield new_BN
            if np.asarray(state.done_B).all():
                return


def write(model, prompts: list[str], decoded, args: Namespace) -> None:
    """Print text to standard output as it comes, and how long it is and took to standard error."""
    from bitnet_jax.generate import until_end
    from bitnet_jax.terminal import printable

    tokenizer, alone, shown, times = model.tokenizer, len(prompts) == 1, "", []
    how = f"sampled, seed {args.seed}" if args.temperature else "greedy"
    print(printable(f"{model.label}: {how}"), file=sys.stderr, flush=True)
    if alone:
        print(printable(prompts[0]), end="", flush=True)
    writing = True

    def end_line():  # that it was stopped stands on a line of its own
        if writing:
            print(flush=True)

    with stopping.undone(end_line):
        for new_BN in decoded:
            times.append(time.perf_counter())
            if alone:
                text = finished_text(tokenizer, until_end(new_BN[0], tokenizer.ends))
                print(printable(text[len(shown) :]), end="", flush=True)
                shown = text
        writing = False
    if len(times) > 1:  # the first chunk compiles
        rate = (len(times) - 1) * CHUNK * len(prompts) / (times[-1] - times[0])
        rate = f"{rate:.1f} tokens/s after the first {CHUNK}"
    for prompt, row in zip(prompts, new_BN, strict=True):
        row = until_end(row, tokenizer.ends)
        text = tokenizer.decode(row)
        print(printable(text[len(shown) :] if alone else prompt + text), flush=True)
        if len(times) > 1 and prompt is prompts[-1]:
            print(rate, file=sys.stderr)
        stopped = ", then an end of text" if len(row) < args.tokens else ""
        print(f"[{len(row)} tokens{stopped}]", file=sys.stderr, flush=True)


def finished_text(tokenizer, ids) -> str:
    """Text of unfinished ids that more ids only add to: the bytes of a cut character wait."""
    return tokenizer.decode(ids).rstrip("\ufffd")
