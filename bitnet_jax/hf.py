"""Hugging Face checkpoints of BitNet (transformers' `BitNetForCausalLM`): out and in.

A folder holds one of four forms of the b158 layout, told apart by its `quantization_config`:

latents  autobitlinear, online: transformers quantises the master weights as it runs
value    autobitlinear, offline: ternary codes, the output is multiplied by `weight_scale`
inverse  bitlinear, offline: ternary codes, the output is divided by `weight_scale`
dense    no quantization_config: transformers runs the weights as they are

Codes are packed as `quant.pack_ternary` has them, transposed. They are never quantised again: the
mean of |w| of ternary weights is smaller than their scale. Sources: transformers 5.23
`integrations/bitnet.py` and `models/bitnet`; the folders microsoft/bitnet-b1.58-2B-4T(-bf16).
"""

import contextlib
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax import tokenizer as tokenizers
from bitnet_jax.config import Config, DataConfig, Hyper, ModelConfig, UserError
from bitnet_jax.model import Transformer, pack_params
from bitnet_jax.tokenizer import Tokenizer

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
SIZES = {  # ModelConfig -> BitNetConfig, all required
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
}
FORMS = {  # quantization_config of each form; without one the weights are dense
    "latents": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "value": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "inverse": {"linear_class": "bitlinear", "quantization_mode": "offline"},
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)


def hf_key(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` of `block_0/attn/q/kernel`.

    Raises UserError for a parameter that BitNetForCausalLM does not have.
    """
    keys = [match.expand(theirs) for ours, theirs in KEYS if (match := ours.fullmatch(name))]
    if len(keys) != 1:
        raise UserError(f"parameter {name}: transformers' BitNet has no place for it")
    return keys[0]


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path."""
    ternary, tokens_BL = replace(model, weight_format="ternary"), jnp.zeros((1, 2), jnp.int32)

    def init():
        params = Transformer(ternary).init(jax.random.key(0), tokens_BL, Hyper())["params"]
        packed = model.weight_format == "packed"
        return pack_params(params, ternary, Hyper()) if packed else params

    tree = flatten_dict(jax.eval_shape(init), sep="/")
    return {name: leaf.shape for name, leaf in tree.items()}


def export(
    folder: Path, cfg: Config, params, hyper: Hyper, tokenizer: Tokenizer, *, packed: bool = False
) -> None:
    """Write one replicate as a folder that AutoModelForCausalLM and AutoTokenizer load.

    `hyper` holds the numbers of the parameters' step (`train.at_step`). The weights are the
    float32 latents, or with `packed` the ternary codes and their scales (values). The folder
    appears when it is complete. Raises UserError when it exists and is not empty, cannot be
    written, or when transformers cannot express the model.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; give a new folder")
    _check_expressible(cfg.model, hyper, tokenizer, packed)
    if packed:
        params = pack_params(params, cfg.model, hyper)
    tensors = {}
    for name, array in flatten_dict(params, sep="/").items():
        array = np.asarray(array)
        array = array.T if _is_matrix(name) else np.atleast_1d(array)
        tensors[hf_key(name)] = np.ascontiguousarray(array)
    form = "value" if packed else "latents" if float(hyper.weight_quant) else "dense"
    end = tokenizer.end_of_text
    text = tokenizer.backend.id_to_token(end)
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text,
        "eos_token": text,
        "model_max_length": cfg.data.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "config.json": _settings(cfg, end, form),
        "generation_config.json": {f"{name}_token_id": end for name in ("bos", "eos", "pad")},
        "tokenizer.json": json.loads(tokenizer.backend.to_str()),
        "tokenizer_config.json": tokenizer_settings,
    }
    with _appearing(folder) as draft:
        for name, tree in files.items():
            written = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
            (draft / name).write_text(written, encoding="utf-8")
        safetensors.numpy.save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(draft / name, draft / WEIGHTS)  # it would be readable by its owner only


def _check_expressible(model, hyper, tokenizer, packed) -> None:
    strengths = float(hyper.weight_quant), float(hyper.act_quant)
    scale, fmt = float(hyper.logit_scale), model.weight_format
    dense = strengths == (0, 0)
    for wrong, reason in (
        (
            model.layout != "b158",
            f"model.layout={model.layout}: transformers' BitNet has sub-norms and separate "
            "projections, not a norm in every linear layer and fused ones",
        ),
        (model.output_bias, "model.output_bias=true: transformers' BitNet has no bias of logits"),
        (
            fmt not in ("ternary", "packed"),
            f"model.weight_format={fmt}: transformers' BitNet is ternary",
        ),
        (scale != 1, f"hyper.logit_scale={scale:g}: transformers' BitNet does not scale logits"),
        (
            strengths != (1, 1) and not dense,
            f"hyper.weight_quant={strengths[0]:g} and hyper.act_quant={strengths[1]:g} at this "
            "step: transformers' BitNet quantises in full, or not at all with both at 0",
        ),
        (packed and dense, "hyper.weight_quant=0: a dense model has no ternary weights to pack"),
        (not packed and fmt == "packed", "model.weight_format=packed: only codes are left; pack"),
        (
            model.vocab_size != tokenizer.vocab_size,
            f"model.vocab_size={model.vocab_size}, but the tokenizer has {tokenizer.vocab_size}",
        ),
    ):
        if wrong:
            raise UserError(f"cannot be exported: {reason}")


def _is_matrix(name: str) -> bool:
    return name.endswith(("/kernel", "/packed"))


def _settings(cfg: Config, end_of_text: int, form: str) -> dict:
    """config.json of a folder."""
    model = cfg.model
    quantised = {"quant_method": "bitnet"} | FORMS.get(form, {})
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        "hidden_act": "relu2",
        "max_position_embeddings": cfg.data.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_embedding,
        "attention_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        # Whatever model.dtype is: latents that are rounded to bfloat16 give other codes.
        "torch_dtype": "float32",
    } | ({} if form == "dense" else {"quantization_config": quantised})


@contextlib.contextmanager
def _appearing(folder: Path):
    """Yield a temporary folder that becomes `folder` when the block ends well."""
    draft = folder.absolute().with_name(f"{folder.absolute().name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> tuple[Config, dict, Tokenizer]:
    """Configuration, parameters and tokenizer of a folder.

    Of the configuration `model` is the folder's, `data` names its tokenizer and has the trained
    length as `seq_len`; the rest are defaults. Latents and all that is not ternary become float32;
    codes stay packed (`model.weight_format` packed: uint8 `packed` [in, out / 4] and float32
    `scale` [], the value). Raises UserError naming what is missing, damaged or not a BitNet's.
    """
    folder = Path(folder)
    settings = _read_json(folder, "config.json")
    if settings.get("model_type") != "bitnet":
        raise UserError(
            f"{folder}: config.json has model_type {settings.get('model_type')!r}; only 'bitnet' "
            "can be read (others lack the two sub-norms of each block)"
        )
    form = _form(folder, settings)
    model = _model(folder, settings, form)
    tokenizer = tokenizers.load_folder(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"vocab_size={model.vocab_size}"
        )
    found = shapes(model)
    wanted = {hf_key(name): name for name in found}
    tensors = _read_tensors(folder, wanted)
    if form == "dense":
        print(
            f"WARNING: {folder}: config.json has no quantization_config, so transformers runs "
            "these weights as a dense model. Here they run as a BitNet, ternary with int8 "
            "activations, unless hyper.weight_quant=0 and hyper.act_quant=0.",
            file=sys.stderr,
        )
    named = {
        name: _from_hf(folder, key, tensors[key], name, shape, form)
        for (key, name), shape in zip(wanted.items(), found.values(), strict=True)
    }
    length = settings.get("max_position_embeddings", 2048)
    cfg = Config(model=model, data=DataConfig(tokenizer=f"hf:{folder}", seq_len=length))
    return cfg, unflatten_dict(named, sep="/"), tokenizer


def _read_json(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder}: no {name}; a Hugging Face folder of a BitNet is needed")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    return tree


def _form(folder: Path, settings: dict) -> str:
    """A key of FORMS, or dense; defaults as in transformers."""
    told = settings.get("quantization_config")
    if told is None:
        return "dense"
    found = {"linear_class": "bitlinear", "quantization_mode": "offline"} | told
    forms = [form for form, settings in FORMS.items() if settings.items() <= found.items()]
    wrong = (
        ("quant_method", told.get("quant_method") != "bitnet"),
        ("use_rms_norm", told.get("use_rms_norm", False)),
        ("modules_to_not_convert", told.get("modules_to_not_convert") not in (None, ["lm_head"])),
        ("quantization_mode", not forms),
    )
    _refuse(folder, told, wrong, "quantization_config.")
    return forms[0]


def _model(folder: Path, settings: dict, form: str) -> ModelConfig:
    for theirs in SIZES.values():
        n = settings.get(theirs)
        if not isinstance(n, int) or n < 1:
            raise UserError(f"{folder}: config.json has {theirs}={n}; a positive number is needed")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = rope.get("rope_theta", settings.get("rope_theta", 500_000.0))
    dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    width = settings["hidden_size"] // settings["num_attention_heads"]
    wrong = (
        ("hidden_act", settings.get("hidden_act", "relu2") != "relu2"),
        ("attention_bias", settings.get("attention_bias", False)),
        ("head_dim", settings.get("head_dim") not in (None, width)),
        ("rope_parameters", rope.get("rope_type", rope.get("type", "default")) != "default"),
        ("torch_dtype", dtype not in ("float32", "bfloat16")),
    )
    _refuse(folder, settings, wrong)
    try:
        return ModelConfig(
            **{ours: settings[theirs] for ours, theirs in SIZES.items()},
            tied_embedding=settings.get("tie_word_embeddings", False),
            weight_format="packed" if form in ("value", "inverse") else "ternary",
            rope_theta=float(theta),
            norm_eps=settings.get("rms_norm_eps", 1e-5),
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{folder}: config.json: {error}") from None


def _refuse(folder, settings, wrong, prefix="") -> None:
    for name, bad in wrong:
        if bad:
            raise UserError(
                f"{folder}: config.json has {prefix}{name}={settings.get(name)!r}, which this "
                "model cannot express"
            )


def _read_tensors(folder: Path, wanted: dict[str, str]) -> dict[str, np.ndarray]:
    """The tensors of one file or of all shards, which must be exactly the `wanted` ones."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder, INDEX).get("weight_map", {}).values()))
    else:
        raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
    tensors, place = {}, {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: missing shard {name}, named by {INDEX}")
        try:
            with safetensors.safe_open(folder / name, "np") as file:
                for key in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                    if key in place:
                        raise UserError(f"{folder}: duplicate key {key}: {place[key]} and {name}")
                    if key not in wanted:
                        raise UserError(f"{folder}: unknown key {key} in {name}")
                    tensors[key], place[key] = file.get_tensor(key), name
        except safetensors.SafetensorError as error:
            raise UserError(f"{folder / name}: truncated or damaged: {error}") from error
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{folder}: missing key {missing[0]} ({len(missing)} missing in all)")
    return tensors


def _from_hf(folder, key, array, name, shape, form) -> np.ndarray:
    """A tensor as the model has it; raises UserError naming the key."""
    packed = name.endswith("/packed")
    if array.dtype not in ((np.uint8,) if packed else FLOATS):
        expected = "uint8 codes" if packed else "float32, bfloat16 or float16"
        raise UserError(f"{folder}: {key} is {array.dtype}; expected {expected}")
    wanted = shape[::-1] if _is_matrix(name) else shape or (1,)
    if array.shape != wanted:
        raise UserError(f"{folder}: {key} has shape {array.shape}; config.json makes it {wanted}")
    if packed:
        if (array & array >> 1 & 0x55).any():
            raise UserError(f"{folder}: {key} holds the code 3; ternary codes are 0, 1 and 2")
    else:
        array = array.astype(np.float32)
    if shape == ():
        return np.asarray(1 / array[0] if form == "inverse" else array[0])
    return np.ascontiguousarray(array.T) if _is_matrix(name) else array
