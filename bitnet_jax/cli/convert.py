"""Write a model for transformers or llama.cpp, or check a folder of transformers.

`hf` writes a model as a folder that `AutoModelForCausalLM.from_pretrained` loads as
BitNetForCausalLM (layout b158) or LlamaForCausalLM (layout llama), with its tokenizer: the master
weights, which transformers quantises as it runs and can train, or with --packed the ternary codes,
2 bits each. `check` reads such a folder, or a published one, says what it holds and evaluates it on
held-out text. The loss is the one of the run when text and windows are; both default to the
folder's length and 2 batches of 8.

`gguf` writes a file for llama.cpp and what is built on it: layout b158 (tied) or llama, with
model.activation=silu. llama.cpp never quantises activations to int8 per token, so its texts part
from those of `generate` where two tokens are about equally likely.

    bitnet convert hf runs/train-1a2b3c4d@500:1 my-bitnet
    bitnet convert gguf runs/train-1a2b3c4d@500:1 my-bitnet.gguf --type f16
    bitnet convert check my-bitnet --text 'mine/*.txt'
    bitnet train --set run.init=hf:my-bitnet      # train on, with a new optimiser
"""

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

from bitnet_jax.cli import flags


def main(argv: list[str]) -> int | None:
    parser = flags.Parser("bitnet convert", __doc__)
    kinds = parser.add_subparsers(
        required=True,
        metavar="hf | gguf | check",
        parser_class=lambda prog, **_: flags.Parser(prog, __doc__),
    )
    add = kinds.add_parser("hf", help="write a model as a Hugging Face folder")
    flags.add_source(add)
    add.add_argument("folder", type=Path, metavar="FOLDER", help="must not exist, or be empty")
    add.add_argument("--packed", action="store_true", help="ternary codes instead of latents")
    add.set_defaults(command=export)
    add = kinds.add_parser("gguf", help="write a model as a file for llama.cpp")
    flags.add_source(add)
    add.add_argument("file", type=Path, metavar="FILE", help="must not exist")
    add.add_argument(
        "--type",
        default="tq2_0",
        metavar="TYPE",
        help="of the linear layers: tq2_0 (2.06 bits), tq1_0 (1.69 bits; both need widths that are "
        "multiples of 256), f16 or f32 (default: %(default)s)",
    )
    add.add_argument(
        "--fork",
        metavar="NAME",
        help="write relu2, which llama.cpp would compute wrong, for a program that has it: "
        "ik_llama.cpp (--type f16 or f32; checked against its sources, not run there)",
    )
    add.set_defaults(command=export_gguf)
    add = kinds.add_parser("check", help="say what a folder holds and evaluate it")
    add.add_argument("folder", type=Path, metavar="FOLDER")
    add.add_argument("--text", metavar="GLOB", help="text to evaluate on (default: stdlib)")
    add.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="assignments",
        help="of data and hyper",
    )
    add.set_defaults(command=check)
    args = parser.parse_args(argv)
    return args.command(args)


def export(args: Namespace) -> None:
    """Write a model as a folder."""
    from bitnet_jax import hf, restore

    flags.prepare()
    model = restore.load_model(args.source)
    of_run = not restore.is_hf_folder(Path(args.source))
    hf.export(
        args.folder,
        model.cfg,
        model.params,
        model.hyper,
        model.tokenizer,
        packed=args.packed,
        card=run_card(*restore.checkpoint_place(args.source)) if of_run else None,
    )
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    weights = "master weights" if float(model.hyper.weight_quant) else "dense weights"
    kind = "packed ternary weights" if args.packed else weights
    print(f"{model.label}: {kind} in {args.folder}, {size / 1e6:.1f} MB")


def export_gguf(args: Namespace) -> None:
    """Write a model as a file of GGUF."""
    from bitnet_jax import gguf, restore

    flags.prepare()
    model = restore.load_model(args.source)
    gguf.export(
        args.file,
        model.cfg,
        model.params,
        model.hyper,
        model.tokenizer,
        kind=args.type,
        fork=args.fork,
    )
    print(f"{model.label}: {args.type} in {args.file}, {args.file.stat().st_size / 1e6:.1f} MB")


def run_card(workdir: Path, step: int, index: int | None):
    """What a model card tells of replicate `index` of a run: an hf.Card.

    The loss is that of the large block where the step has one, beside the predictors on the same
    positions.
    """
    from bitnet_jax import checkpoint, config_file, hf, metrics, restore

    index = index or 0
    described = checkpoint.load_config(workdir, step)
    cfg, replicates = config_file.from_json(described, f"{workdir}@{step}")
    rows = restore.evaluations(workdir, step, index)
    row, losses = rows[-1] if rows and rows[-1]["step"] == step else {}, {}
    if metrics.HELD_OUT_LOSS in row:
        losses["loss"] = row[metrics.HELD_OUT_LOSS]
        losses["unigram"] = losses["loss"] - row[metrics.MINUS_UNIGRAM]
        losses["bigram"] = losses["loss"] - row[metrics.MINUS_BIGRAM]
    elif metrics.LOSS in row:
        references = described.get("references", {})
        losses = {name: references.get(name, {}).get("loss") for name in ("unigram", "bigram")}
        losses["loss"] = row[metrics.LOSS]
    corpus = described.get("corpus", {})
    return hf.Card(
        source=f"{workdir}@{step}:{index}",
        recipe=replicates[index].name,
        seed=replicates[index].seed,
        step=step,
        steps=cfg.run.steps,
        tokens=step * cfg.data.batch_size * cfg.data.seq_len,
        text=f"{corpus['source']}, sha256 {corpus['sha256']}" if corpus else None,
        verdict=row.get("collapse/verdict"),
        commit=described.get("provenance", {}).get("git_commit"),
        **losses,
    )


def check(args: Namespace) -> int:
    """Say what a folder holds, and its loss on held-out text; 1 when that is not finite."""
    import numpy as np

    from bitnet_jax import hf, presets
    from bitnet_jax.fields import UserError

    flags.prepare()
    cfg, params, tokenizer = hf.load(args.folder)
    text = [f"data.corpus=text:{args.text}"] if args.text else []
    for assignment in args.assignments:
        if not assignment.startswith(("data.", "hyper.")) or assignment.startswith(
            "data.tokenizer"
        ):
            raise UserError(
                f"--set {assignment}: only data.* and hyper.* can be set; the folder decides"
            )
    cfg, changed = presets.override(cfg, [*text, *args.assignments])
    hyper = hf.strengths(args.folder, cfg.model).replace(**changed)
    shapes = hf.shapes(replace(cfg.model, weight_format="ternary"))
    print(f"{args.folder}: {sum(int(np.prod(s)) for s in shapes.values()):,} parameters")
    for field in fields(cfg.model):
        print(f"    model.{field.name}={getattr(cfg.model, field.name)}")
    print(f"    {tokenizer.vocab_size:,} tokens, trained on windows of {cfg.data.seq_len}")
    measured = evaluate(cfg, params, hyper, tokenizer)
    loss = measured["eval/loss"]
    print(
        f"{cfg.data.corpus}, held out, {measured['positions']:,} tokens in windows of "
        f"{cfg.data.seq_len}: loss {loss:.4f}, "
        f"{measured['eval/bits_per_byte']:.3f} bits per byte; unigram {measured['unigram']:.4f}, "
        f"uniform {np.log(cfg.model.vocab_size):.4f}",
        flush=True,
    )
    if fault := hf.loss_fault(args.folder, loss):
        return flags.fail(f"failed: {fault}", 1)
    return 0


def evaluate(cfg, params, hyper, tokenizer) -> dict[str, float]:
    """Numbers of `train.evaluate` on the held-out windows of `cfg.data`, and the unigram's loss."""
    import jax
    import numpy as np

    from bitnet_jax import data, reference, train

    tokens, n_vocab = data.load(cfg.data), cfg.model.vocab_size
    held_out = data.small_block(cfg.data, data.held_out_windows(cfg.data, tokens))
    unigram_V = reference.unigram_probs(tokens.train_N, n_vocab, scored_N=tokens.train_scored_N)
    bytes_V = np.pad(tokenizer.token_bytes_V, (0, n_vocab - tokenizer.vocab_size))
    evals = train.EvalData(
        small=held_out,
        large=None,  # not evaluated
        large_nats_NKBL=None,
        tracked=None,
        unigram_V=unigram_V.astype(np.float32),
        token_bytes_V=bytes_V.astype(np.float32),
    )
    params, hyper = jax.tree.map(lambda x: np.asarray(x)[None], (params, hyper))
    # float32 means float32, as in training.
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        run = jax.jit(lambda p, h, e: train.evaluate(cfg, train.STANDARD, p, h, e))
        measured = {key: float(value[0]) for key, value in run(params, hyper, evals).items()}
    nats = -np.log(unigram_V)[held_out.targets] * held_out.weights
    unigram = float(nats.sum() / held_out.weights.sum())
    return measured | {"positions": int(held_out.weights.sum()), "unigram": unigram}
