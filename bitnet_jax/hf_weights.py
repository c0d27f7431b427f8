"""The tensors of a Hugging Face folder: their names and shapes, and their numbers.

Numbers are checked as names and shapes are. Refused: what is not finite, scales that are not
positive, codes that are not ternary. Warned of: matrices of one code. Codes are packed as
`quant.pack_ternary` has them, transposed, and are never quantised again: the mean of |w| of ternary
weights is smaller than their scale. That holds for codes that are stored as floats too.
"""

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax import hf_files, quant
from bitnet_jax.config import Hyper, ModelConfig
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import Entry, printable
from bitnet_jax.model import Transformer, pack_params

# Parameter here -> tensor there. Matrices are [in, out] here and [out, in] there.
KEYS = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"embed/embedding", r"model.embed_tokens.weight"),
        (r"final_norm/scale", r"model.norm.weight"),
        (r"head/kernel", r"lm_head.weight"),
        (r"block_(\d+)/attn_norm/scale", r"model.layers.\1.input_layernorm.weight"),
        (r"block_(\d+)/ffn_norm/scale", r"model.layers.\1.post_attention_layernorm.weight"),
        (r"block_(\d+)/attn/sub_norm/scale", r"model.layers.\1.self_attn.attn_sub_norm.weight"),
        (r"block_(\d+)/ffn/sub_norm/scale", r"model.layers.\1.mlp.ffn_sub_norm.weight"),
        (r"block_(\d+)/attn/([qkvo])/(kernel|packed)", r"model.layers.\1.self_attn.\2_proj.weight"),
        (r"block_(\d+)/attn/([qkvo])/scale", r"model.layers.\1.self_attn.\2_proj.weight_scale"),
        (r"block_(\d+)/ffn/(gate|up|down)/(kernel|packed)", r"model.layers.\1.mlp.\2_proj.weight"),
        (r"block_(\d+)/ffn/(gate|up|down)/scale", r"model.layers.\1.mlp.\2_proj.weight_scale"),
    )
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"} | {
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}
FLOATS = tuple(TYPES)[:4]


def hf_key(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` of `block_0/attn/q/kernel`.

    Raises UserError for a parameter that transformers' models do not have.
    """
    keys = [match.expand(theirs) for ours, theirs in KEYS if (match := ours.fullmatch(name))]
    if len(keys) != 1:
        raise UserError(f"parameter {name}: transformers' models have no place for it")
    return keys[0]


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path."""
    one_block = _shapes_of_one_block(replace(model, n_layers=1))
    by_path = {}
    for name, shape in one_block.items():
        first, slash, rest = name.partition("/")
        layers = range(model.n_layers) if first == "block_0" else [None]
        by_path |= {name if i is None else f"block_{i}{slash}{rest}": shape for i in layers}
    return by_path


@functools.lru_cache(maxsize=64)
def _shapes_of_one_block(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    ternary, tokens_BL = replace(model, weight_format="ternary"), jnp.zeros((1, 2), jnp.int32)

    def init():
        params = Transformer(ternary).init(jax.random.key(0), tokens_BL, Hyper())["params"]
        packed = model.weight_format == "packed"
        return pack_params(params, ternary, Hyper()) if packed else params

    tree = flatten_dict(jax.eval_shape(init), sep="/")
    return {name: leaf.shape for name, leaf in tree.items()}


def is_matrix(name: str) -> bool:
    """Whether a parameter is transposed between here and there."""
    return name.endswith(("/kernel", "/packed"))


def warn(folder: Path, text: str) -> None:
    """Tell on stderr what is suspect in a folder."""
    print(f"WARNING: {folder}: {text}", file=sys.stderr)


def read_params(folder, entries, model, form) -> dict[str, np.ndarray]:
    """Checked parameters by path, as the model has them."""
    named_shapes = shapes(model)
    names = {hf_key(name): name for name in named_shapes}
    entries = _without_redundant(folder, entries, model.tied_embedding)
    for key, entry in entries.items():
        if key not in names:
            raise UserError(f"{folder}: unknown key {printable(key)} in {entry.file}")
    if missing := sorted(names.keys() - entries.keys()):
        hint = "; is tie_word_embeddings=true missing in config.json?" if HEAD in missing else ""
        raise UserError(f"{folder}: missing key {missing[0]} ({len(missing)} missing in all){hint}")
    for key, entry in entries.items():
        _check_entry(folder, key, entry, names[key], named_shapes[names[key]], form)
    params, magnitudes = {}, {}
    for key, array in hf_files.tensors(folder, entries):
        name = names[key]
        if name.endswith("/packed") and array.dtype != np.uint8:
            array, magnitudes[name] = _codes_of_floats(folder, key, array)
        params[name] = _from_hf(folder, key, array, name, named_shapes[name], form)
    for name, magnitude in magnitudes.items():
        params[name.replace("/packed", "/scale")] *= magnitude
    return params


def _without_redundant(folder, entries: dict[str, Entry], tied: bool) -> dict[str, Entry]:
    """Entries without rotary frequencies and a head that repeats the tied embedding."""
    kept = {key: e for key, e in entries.items() if not key.endswith("rotary_emb.inv_freq")}
    if tied and {HEAD, EMBEDDING} <= kept.keys():
        pair = [kept[HEAD], kept[EMBEDDING]]
        equal = pair[0].shape == pair[1].shape and {entry.dtype for entry in pair} <= {*FLOATS}
        if equal:
            stored = dict(hf_files.tensors(folder, {HEAD: pair[0], EMBEDDING: pair[1]}))
            head_VD, embedding_VD = (w.astype(np.float32) for w in stored.values())
            equal = np.array_equal(head_VD, embedding_VD, equal_nan=True)
        if not equal:
            raise UserError(
                f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json has "
                "tie_word_embeddings=true; set it false for a head of its own"
            )
        del kept[HEAD]
    return kept


def _check_entry(folder, key, entry: Entry, name, shape, form) -> None:
    """Type and shape in the file's header; raises UserError naming the key."""
    wanted, types = shape[::-1] if is_matrix(name) else shape or (1,), FLOATS
    expected = "float32, bfloat16 or float16"
    if name.endswith("/packed"):
        types, expected = ("U8",), "uint8 codes"
        # transformers unpacks where the rows are a quarter and takes full ones as they are.
        if form == "value" and entry.dtype in (*FLOATS, "I8"):
            wanted, types = (4 * wanted[0], wanted[1]), (*FLOATS, "I8")
    if entry.dtype not in types:
        dtype = TYPES.get(entry.dtype, entry.dtype)
        raise UserError(f"{folder}: {key} is {dtype}; expected {expected}")
    if entry.shape != wanted:
        raise UserError(f"{folder}: {key} has shape {entry.shape}; config.json makes it {wanted}")


def _from_hf(folder, key, array, name, shape, form) -> np.ndarray:
    """A tensor as the model has it; raises UserError naming the key and the number in it."""
    if name.endswith("/packed"):
        if (array & array >> 1 & 0x55).any():
            raise UserError(f"{folder}: {key} holds the code 3; ternary codes are 0, 1 and 2")
    else:
        array = _float32(folder, key, array)
    if shape == ():
        with np.errstate(divide="ignore", over="ignore"):
            value = 1 / array[0] if form == "inverse" else array[0]
        if not 0 < value < np.inf:
            raise UserError(
                f"{folder}: {key} is {array[0]:g}; a scale must be positive and finite"
                + (", and its inverse too" if form == "inverse" else "")
            )
        return np.asarray(value)
    return np.ascontiguousarray(array.T) if is_matrix(name) else array


def _float32(folder, key, array) -> np.ndarray:
    with np.errstate(over="ignore"):  # of float64: an infinity is named
        array = array.astype(np.float32)
    if wrong := fault(array):
        raise UserError(f"{folder}: {key} {wrong}")
    return array


def fault(array: np.ndarray) -> str | None:
    """Which number of an array is none, or None."""
    finite = np.isfinite(array)
    if finite.all():
        return None
    place = np.argwhere(~finite)[0].tolist()
    return (
        f"is {array[tuple(place)]} at {place} ({np.sum(~finite)} of {array.size} values are not "
        "finite): no logit would be a number"
    )


def _codes_of_floats(folder, key, array_OI) -> tuple[np.ndarray, np.float32]:
    """Packed codes [out / 4, in] of codes that are stored one by one, and what 1 stands for."""
    w_OI = _float32(folder, key, array_OI)
    if (magnitude := _magnitude(w_OI)) is None:
        raise UserError(
            f"{folder}: {key} holds other values than three; quantization_mode=offline is for "
            "weights that are ternary codes"
        )
    codes_IO = np.sign(w_OI.T).astype(np.int8)
    return np.asarray(quant.pack_ternary(codes_IO)).T, magnitude


def _magnitude(w: np.ndarray) -> np.float32 | None:
    """The one magnitude of a matrix of -m, 0 and m, where it is one; 1 where all is 0."""
    magnitude = np.abs(w).max()
    if magnitude == 0:
        return np.float32(1)
    return magnitude if np.isin(np.abs(w), (0, magnitude)).all() else None


def _is_block_kernel(name: str) -> bool:
    return name.startswith("block_") and name.endswith("/kernel")


def ternary_kernels(params: dict[str, np.ndarray]) -> dict[str, np.float32]:
    """Names and magnitudes of the matrices that hold a ternary code times one number."""
    return {
        name: magnitude
        for name, w in params.items()
        if _is_block_kernel(name) and w.any() and (magnitude := _magnitude(w)) is not None
    }


def kept_as_codes(folder, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed parameters, in which matrices of three values keep their scale; says so."""
    magnitudes, kept = ternary_kernels(params), {}
    for name, w_IO in params.items():
        if not _is_block_kernel(name):
            kept[name] = w_IO
            continue
        if w_IO.shape[1] % 4:
            raise UserError(
                f"{folder}: {hf_key(name)} holds three values and has {w_IO.shape[1]} rows; codes "
                "are packed by four"
            )
        inverse = quant.weight_scale(w_IO)
        codes_IO = np.sign(w_IO) if name in magnitudes else quant.weight_codes(w_IO, inverse)
        kept[name.replace("/kernel", "/packed")] = np.asarray(
            quant.pack_ternary(np.asarray(codes_IO, np.int8))
        )
        scale = magnitudes.get(name, 1 / inverse)
        kept[name.replace("/kernel", "/scale")] = np.asarray(scale, np.float32)
    name, scale = next(iter(magnitudes.items()))
    n_kernels = sum(map(_is_block_kernel, params))
    warn(
        folder,
        f"{len(magnitudes)} of {n_kernels} matrices hold three values each; they are kept as "
        f"ternary codes with their own scale. Quantised again, the scale {scale:.4g} of "
        f"{hf_key(name)} would become {np.abs(params[name]).mean():.4g}.",
    )
    return kept


def warn_of_dead(folder, params: dict[str, np.ndarray]) -> None:
    """Name tensors through which nothing that depends on the text can pass."""
    dead = [hf_key(name) for name, array in params.items() if _is_dead(name, array)]
    if dead:
        more = f" and {len(dead) - 8} more" if len(dead) > 8 else ""
        warn(
            folder,
            f"{len(dead)} tensors are dead, a matrix of one code or a norm of zeros: "
            f"{', '.join(dead[:8])}{more}",
        )


def _is_dead(name: str, array: np.ndarray) -> bool:
    if name.endswith("/packed"):
        return (array == array.flat[0]).all() and array.flat[0] in (0x00, 0x55, 0xAA)
    if array.ndim < 2:
        return not array.any()  # a gain, or a scale, which is positive
    if not _is_block_kernel(name):
        return (array == array.flat[0]).all()
    ends = np.array([array.min(), array.max()])
    lowest, highest = quant.weight_codes(ends, quant.weight_scale(array))
    return bool(lowest == highest)
