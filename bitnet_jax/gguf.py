"""GGUF files: models as llama.cpp, and what is built on it, run them.

Two architectures of llama.cpp hold a model here: `bitnet` (layout b158, tied) and `llama` (layout
llama, tied or not), both with SiLU hard-coded. It gives no warning where a model has another
activation, so such a model is refused. Weights are ternary codes times their scale as `quant` has
them; llama.cpp multiplies them with activations that it never quantises per token, so a file of
float32 gives the logits of `act_quant=0`.

Sources: llama.cpp of 2026-10 `src/models/{bitnet,llama}.cpp`; the library that it publishes,
imported here as `gguf`. Of the fork: ik_llama.cpp `src/graphs/build_bitnet.cpp` (build_bitnet_158),
`src/llama-load-tensors.cpp` (create_bitnet2_tensors); no file was run there.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax import gguf_vocab, quant, stopping
from bitnet_jax.config import Config, Hyper, ModelConfig
from bitnet_jax.fields import UserError, check_known
from bitnet_jax.hf_weights import fault, is_matrix
from bitnet_jax.model import rope_factors
from bitnet_jax.tokenizer import Tokenizer

TYPES = ("tq2_0", "tq1_0", "f16", "f32")  # of the weights of linear layers
ROW = 256  # weights in a block of the ternary types; a row is whole blocks
ARCHITECTURES = {"b158": "bitnet", "llama": "llama"}  # by layout
FORKS = {"ik_llama.cpp": "bitnet-b1.58"}  # that have a graph with relu2, and its architecture
NAMES = {  # of a block's modules, here and there
    "attn_norm": "attn_norm",
    "attn/sub_norm": "attn_sub_norm",
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn/sub_norm": "ffn_sub_norm",
    "ffn/gate": "ffn_gate",
    "ffn/up": "ffn_up",
    "ffn/down": "ffn_down",
}
ENDS = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}


def export(
    path: Path,
    cfg: Config,
    params,
    hyper: Hyper,
    tokenizer: Tokenizer,
    *,
    kind: str = "tq2_0",
    fork: str | None = None,
    name: str | None = None,
) -> None:
    """Write one replicate as a file of GGUF, which appears when it is complete.

    `hyper` holds the numbers of the parameters' step, `kind` of TYPES is that of the linear layers:
    embedding and head are float32 beside f32 and float16 otherwise, norms float32. `fork` of FORKS
    writes relu2 for a program that has it. Raises UserError when the file exists, cannot be
    written, or where llama.cpp cannot express the model, its tokenizer or a number of it.
    """
    architecture = _architecture(cfg.model, hyper, kind, fork)
    writer = gguf.GGUFWriter(None, architecture)
    _describe(writer, cfg, kind, name or Path(path).stem)
    gguf_vocab.add_tokenizer(writer, tokenizer, cfg.model)
    with _appearing(Path(path)) as draft:
        for key, array in tensors(params, cfg.model, hyper):
            of_layer = key.startswith("blk.") and array.ndim == 2
            stored = kind if of_layer else "f16" if array.ndim == 2 and kind != "f32" else "f32"
            type_ = gguf.GGMLQuantizationType[stored.upper()]
            writer.add_tensor(key, _as_type(key, array, stored, type_), raw_dtype=type_)
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(params, model: ModelConfig, hyper: Hyper) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values [out, in] of every tensor, linear layers dequantised."""
    flat = flatten_dict(params, sep="/")
    if model.rope_scaling:
        width = model.d_model // model.n_heads
        yield "rope_freqs.weight", rope_factors(width, model.rope_theta, model.rope_scaling)
    for path, array in flat.items():
        if path.startswith("block_") and path.endswith("/scale") and "norm" not in path:
            continue  # of packed codes
        if wrong := fault(np.asarray(array)):
            raise UserError(f"cannot be exported: {path} {wrong}")
        module = path.rpartition("/")[0]
        if module in ENDS:
            yield f"{ENDS[module]}.weight", _out_in(path, array)
            continue
        block, _, module = module.partition("/")
        if path.endswith("/packed"):
            codes = quant.unpack_ternary(jnp.asarray(array)).astype(jnp.float32)
            array = codes * flat[path.replace("/packed", "/scale")]
        elif is_matrix(path) and float(hyper.weight_quant):
            inverse = quant.weight_scale(array)
            array = quant.weight_codes(array, inverse) * (1 / inverse)
        array = _out_in(path, array)
        heads = {"attn/q": model.n_heads, "attn/k": model.n_kv_heads}.get(module)
        if heads and model.layout == "llama":
            array = _interleaved(array, heads)
        yield f"blk.{block.removeprefix('block_')}.{NAMES[module]}.weight", array


def _out_in(path: str, array) -> np.ndarray:
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.T) if is_matrix(path) else array


def _interleaved(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows for rotary pairs (2i, 2i + 1), as `llama` has them, of those for (i, i + K / 2)."""
    w_HPKI = w_OI.reshape(heads, 2, -1, w_OI.shape[1])
    return np.ascontiguousarray(w_HPKI.swapaxes(1, 2).reshape(w_OI.shape))


def _as_type(key: str, array: np.ndarray, stored: str, type_) -> np.ndarray:
    """The array in a file's type; raises UserError where float16 does not hold its numbers."""
    if stored != "f32":
        magnitude = float(np.abs(array).max())
        ternary = key.startswith("blk.")
        limits = np.finfo(np.float16)
        if magnitude > limits.max or (ternary and 0 < magnitude < limits.smallest_normal):
            raise UserError(
                f"cannot be exported as {stored}: {key} reaches {magnitude:.2g}, and float16 holds "
                f"{limits.smallest_normal:.2g} to {limits.max:.5g}; use --type f32"
            )
    return gguf.quants.quantize(array, type_)


def _architecture(model: ModelConfig, hyper: Hyper, kind: str, fork: str | None) -> str:
    """The file's architecture; raises UserError for what it cannot express."""
    check_known(kind, TYPES, "--type")
    if fork is not None:
        check_known(fork, FORKS, "--fork")
    if wrong := _model_fault(model, hyper, fork) or _type_fault(model, hyper, kind, fork):
        raise UserError(f"cannot be exported: {wrong}")
    return FORKS[fork] if fork else ARCHITECTURES[model.layout]


def _model_fault(model: ModelConfig, hyper: Hyper, fork: str | None) -> str | None:
    """What of a model llama.cpp, or a fork of it, cannot express."""
    of_fork = model.layout == "b158" and model.activation == "relu2"
    if model.layout not in ARCHITECTURES:
        return (
            f"model.layout={model.layout}: llama.cpp has no graph with a norm in every linear "
            f"layer; layouts that it has: {', '.join(ARCHITECTURES)}"
        )
    if fork and not of_fork:
        return (
            f"--fork {fork} is for model.layout=b158 with model.activation=relu2, and this is "
            f"{model.layout} with {model.activation}; leave --fork out"
        )
    if model.activation != "silu" and not fork:
        instead = f"; --fork {next(iter(FORKS))} writes it for that program" if of_fork else ""
        return (
            f"model.activation={model.activation}: llama.cpp has silu in its code, would load the "
            f"file without a word and compute another model{instead}"
        )
    if model.layout == "b158" and model.rope_scaling and not fork:
        return (
            f"model.rope_scaling={model.rope_scaling}: llama.cpp's bitnet does not read it; "
            "model.layout=llama may have it"
        )
    if model.layout == "b158" and not model.tied_embedding and not fork:
        return (
            "model.tied_embedding=false: llama.cpp's bitnet has no output matrix of its own; "
            "model.layout=llama may be untied"
        )
    if model.output_bias:
        return "model.output_bias=true: llama.cpp has no bias of these logits"
    if (scale := float(hyper.logit_scale)) != 1:
        return f"hyper.logit_scale={scale:g}: llama.cpp does not scale these logits"
    return None


def _type_fault(model: ModelConfig, hyper: Hyper, kind: str, fork: str | None) -> str | None:
    """Why the weights of a model cannot be of a type."""
    if (strength := float(hyper.weight_quant)) not in (0, 1):
        return f"hyper.weight_quant={strength:g} at this step: weights are ternary at 1, dense at 0"
    if not kind.startswith("tq"):
        return None
    if fork:
        return f"--type {kind}: {fork} has ternary types of its own; use --type f16, quantise there"
    if not strength:
        return f"--type {kind}: weights of a dense model are not ternary; use --type f16"
    widths = {name: getattr(model, name) for name in ("d_model", "d_ff")}
    wrong = {name: width for name, width in widths.items() if width % ROW}
    if not wrong:
        return None
    return (
        f"--type {kind}: {_listed(wrong)}, and its rows are multiples of {ROW}; nearest: "
        f"{_listed({name: _nearest_row(width) for name, width in wrong.items()})}; or --type f16"
    )


def _nearest_row(width: int) -> int:
    return max(1, (width + ROW // 2) // ROW) * ROW


def _listed(fields: dict[str, int]) -> str:
    return ", ".join(f"model.{name}={value}" for name, value in fields.items())


def _describe(writer: gguf.GGUFWriter, cfg: Config, kind: str, name: str) -> None:
    """Keys of the model."""
    model = cfg.model
    writer.add_name(name)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0,
            "tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(cfg.data.seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.d_model // model.n_heads)
    writer.add_vocab_size(model.vocab_size)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yield a draft beside `path` that takes its name when the block ends well, and else goes."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file in it, such as {path / 'model.gguf'}")
    if path.exists():
        raise UserError(f"{path}: exists; give a new file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}; make it, or give a file elsewhere")
    draft = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with stopping.undone(lambda: draft.unlink(missing_ok=True)):
            yield draft
            os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
