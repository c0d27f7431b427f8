"""Tiny random models for comparisons with transformers, what both must give, and their folders."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import tokenizers.decoders
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tokenizers import models, normalizers, pre_tokenizers, processors

from bitnet_jax import generate, gguf_vocab, hf, loss, quant, tokenizer
from bitnet_jax.config import Config, DataConfig, Hyper, ModelConfig
from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import INDEX, WEIGHTS
from bitnet_jax.model import BitLinear, Transformer

V, N_TOKENS, N_PROMPT, N_NEW = 264, 12, 8, 64
SHAPES = {
    "mha, tied": {"d_model": 24, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 48},
    "gqa, untied": {
        "d_model": 24,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "tied_embedding": False,
    },
    "one kv head, tied, theta 1e4": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 1,
        "d_ff": 40,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-6,
    },
    "silu, tied": {
        "activation": "silu",
        "d_model": 24,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_ff": 48,
    },
    "llama, gqa, untied": {
        "layout": "llama",
        "activation": "silu",
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "tied_embedding": False,
        "rope_theta": 10_000.0,
    },
    "llama 3, scaled rotary": {
        "layout": "llama",
        "activation": "silu",
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_ff": 48,
        "rope_theta": 100.0,
        "rope_scaling": "llama3:8,1,4,32",
    },
    "llama, gelu, tied": {
        "layout": "llama",
        "activation": "gelu_pytorch_tanh",
        "d_model": 24,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "d_ff": 40,
    },
}


def small_tokenizer() -> tokenizer.Tokenizer:
    """A BPE of V tokens; the cache folder must have been set."""
    return tokenizer.load_tokenizer(
        f"bpe:{V}", "hf_models", lambda: iter(["the cat sat on the mat, and the dog ran. " * 9])
    )


def cut_as(like: tokenizer.Tokenizer, way: str) -> tokenizer.Tokenizer:
    """The same vocabulary and merges behind words that are cut in another way."""
    tree = json.loads(like.backend.to_str())
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {"type": "Split", "pattern": {"Regex": gguf_vocab.LLAMA_3}, "behavior": "Isolated"}
    parts = {
        "gpt-2": [plain | {"use_regex": True}],
        "whole words": [plain | {"use_regex": True}],
        "llama-bpe": [words | {"invert": False}, plain | {"use_regex": False}],
        "smollm": [{"type": "Digits", "individual_digits": True}, plain | {"use_regex": True}],
        "digits together": [{"type": "Digits", "individual_digits": False}, plain],
    }[way]
    tree["model"]["ignore_merges"] = way in ("llama-bpe", "whole words")
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    if way == "gpt-2":
        tree["pre_tokenizer"] = parts[0]
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    backend.encode_special_tokens = True
    return replace(like, backend=backend)


WORDS = "the cat sat on the mat, and the dog ran on. It's a day's way away, they say. é日本 " * 3


def sentencepiece_like(way: str = "prepend", complete: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 has one: three special tokens, 256 bytes, pieces, their merges, one before a text.

    The space before a text is put there by the normaliser, as in its tokenizer.json (`prepend`), or
    as transformers 5 saves it (`metaspace`). Without `complete` each piece has one merge alone.
    """
    pieces = "▁t he ▁a at ▁the the ▁s on an ▁c ▁cat cat ▁sat ▁d ▁o ▁on ▁m mat ▁mat ay nd ▁an ▁and"
    pieces = [*pieces.split(), "▁▁", "▁da", "▁day", "▁they", "▁▁▁▁"]
    chars = sorted({*WORDS.replace(" ", "▁")} - {*"é日本"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *chars]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in splits if vocab.keys() >= {*pair}]
        merges += known if complete else known[-1:]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    strip = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    strip += [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    backend.decoder = tokenizers.decoders.Sequence(strip)
    if way == "prepend":
        replace = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(replace)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def save_sentencepiece_like(folder: Path, **how) -> tokenizer.Tokenizer:
    """In a folder, as transformers has it, and as it is read."""
    folder.mkdir(exist_ok=True, parents=True)
    sentencepiece_like(**how).save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.load_folder(folder)


def random_model(shape: dict, seed: int) -> tuple[Config, dict]:
    """A configuration, and random parameters."""
    cfg = Config(ModelConfig(**{"vocab_size": V} | shape), DataConfig(seq_len=128))
    tokens_BL, rng = jnp.zeros((1, 2), jnp.int32), np.random.default_rng(seed)
    init = Transformer(cfg.model).init
    tree = jax.eval_shape(lambda: init(jax.random.key(0), tokens_BL, Hyper())["params"])

    def draw(path, leaf):
        """A small embedding, so that a tied model says more than the token that it read last."""
        name, is_gain = jax.tree_util.keystr(path), len(leaf.shape) == 1
        factor = 0.3 if "embed" in name else 6 if "final_norm" in name else 1
        return (factor * rng.normal(is_gain, 0.2, leaf.shape)).astype(np.float32)

    return cfg, jax.tree.map_with_path(draw, tree)


def clear_model(shape: dict) -> tuple[Config, dict, np.ndarray]:
    """Configuration, parameters and tokens [2, L] of the first seed that keeps clear of rounding.

    Products that are summed in another order differ by about 1e-5 of an int8 code. An activation
    that lies nearer to the middle of two codes may be rounded either way, which moves the logits by
    more than a comparison can allow; with 1e-4 of distance none does. Nor must a weight lie in the
    middle of two ternary codes, where the mean of the others decides.
    """
    clear = None
    for seed in range(100):
        cfg, params = random_model(shape, seed)
        tokens_BL = np.random.default_rng(seed).integers(1, V, (2, N_TOKENS)).astype(np.int32)
        clear = clear or jax.jit(
            lambda params, tokens_BL, cfg=cfg: clearance(cfg, params, tokens_BL)
        )
        if weight_clearance(params) > 1e-6 and clear(params, tokens_BL) > 1e-4:
            return cfg, params, tokens_BL
    raise AssertionError("no seed keeps clear of the rounding boundaries")


def weight_clearance(params) -> float:
    """Smallest distance of a scaled weight from the middle of two ternary codes."""
    flat = flatten_dict(params, sep="/").items()
    matrices = [w for name, w in flat if name.startswith("block_") and w.ndim > 1]
    return min(np.abs(np.abs(w) / np.abs(w).mean() - 0.5).min() for w in matrices)


def clearance(cfg: Config, params, tokens_BL) -> jax.Array:
    """Smallest distance of a scaled activation from the middle of two int8 codes."""
    distances = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, BitLinear):
            scaled = args[0] * quant.activation_scale(args[0])
            distances.append(jnp.min(jnp.abs(scaled - jnp.floor(scaled) - 0.5)))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        Transformer(cfg.model).apply({"params": params}, tokens_BL, Hyper())
    return jnp.min(jnp.stack(distances))


def logits(cfg: Config, params, tokens_BL, hyper: Hyper | None = None) -> np.ndarray:
    """float32 [B, L, V] of the full forward pass."""
    forward = jax.jit(Transformer(cfg.model).apply)
    return np.asarray(forward({"params": params}, tokens_BL, hyper or Hyper()))


def next_tokens(tokens_BL) -> Batch:
    """Every token predicts the one that follows it."""
    weights_BL = np.ones(tokens_BL[:, 1:].shape, np.float32)
    return Batch(tokens_BL[:, :-1], tokens_BL[:, 1:], weights_BL)


def mean_loss(logits_BLV, tokens_BL) -> float:
    """Mean cross-entropy of the tokens after the first."""
    return float(loss.cross_entropy(logits_BLV[:, :-1], next_tokens(tokens_BL)))


def greedy(cfg: Config, params, tokens_BL, hyper: Hyper | None = None) -> np.ndarray:
    """N_NEW tokens after the first N_PROMPT of every row: int32 [B, N]; no end of text stops it."""
    params, hyper = jax.tree.map(lambda x: np.asarray(x)[None], (params, hyper or Hyper()))
    prompts_BP, lengths_B = tokens_BL[:, :N_PROMPT], np.full(len(tokens_BL), N_PROMPT)
    rest = {"sampling": generate.Sampling(), "seed": 0, "end_of_text": V}
    return np.asarray(generate.generate(cfg, params, hyper, prompts_BP, lengths_B, N_NEW, **rest))[
        0
    ]


GOLDEN = Path(__file__).parent / "fixtures" / "hf"  # written by parity/make_golden.py
LATENTS, PACKED, TIED = (GOLDEN / name for name in ("gqa_untied", "one_kv_head_packed", "mha_tied"))


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON object in a file; `...` removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder that has one file of them."""
    return safetensors.numpy.load_file(folder / WEIGHTS)


def write_tensors(folder: Path, tensors, name: str = WEIGHTS) -> None:
    """Write a file of tensors; those that are None are left out."""
    stored = {key: np.ascontiguousarray(w) for key, w in tensors.items() if w is not None}
    safetensors.numpy.save_file(stored, folder / name, metadata={"format": "pt"})


def shard(folder: Path, tensors) -> None:
    """Two shards in place of one file, and the index that names them."""
    (folder / WEIGHTS).unlink()
    place = {}
    for i in range(2):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        write_tensors(folder, part, name)
        place |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def same(a, b) -> bool:
    """Whether two trees of arrays are equal."""
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def message(folder: Path) -> str:
    """The line that says why a folder cannot be loaded."""
    with pytest.raises(UserError) as caught:
        hf.load(folder)
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)
    return str(caught.value)
