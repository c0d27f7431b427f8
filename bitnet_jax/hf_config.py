"""config.json of a Hugging Face folder: as transformers 5.23 reads it, and as it is written here.

Two architectures can be read and written: BitNetForCausalLM (layout b158) and LlamaForCausalLM
(layout llama), whose linear layers transformers replaces by those of BitNet where
`quantization_config` says so.

A folder holds one of four forms of weights, told apart by its `quantization_config`:

latents  autobitlinear, online: transformers quantises the master weights as it runs
value    autobitlinear, offline: ternary codes, the output is multiplied by `weight_scale`
inverse  bitlinear, offline: ternary codes, the output is divided by `weight_scale`
dense    no quantization_config: transformers runs the weights as they are

What is missing has transformers' default (`models/*/configuration_*.py`), but the sizes must be
there. A value that transformers would not take, or that this model cannot express, is a
UserError naming key, value and reason.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bitnet_jax.config import Config, ModelConfig, rope_scaling_numbers
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import Entry, quoted


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, and what it takes where config.json says nothing."""

    layout: str
    architecture: str
    activation: str
    norm_eps: float
    rope_theta: float


FAMILIES = {  # by model_type
    "bitnet": Family("b158", "BitNetForCausalLM", "relu2", 1e-5, 500_000.0),
    "llama": Family("llama", "LlamaForCausalLM", "silu", 1e-6, 10_000.0),
}
TYPES = {family.layout: kind for kind, family in FAMILIES.items()}  # layout -> model_type
ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}  # of activations, as in ACT2FN
LLAMA3 = (  # of rope_scaling, in the order of ours
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
SIZES = {  # ModelConfig -> their configuration
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
PACKED = ("value", "inverse")
PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
LARGEST = 2**20  # of a size: a damaged number is named, not computed with
LARGEST_OF = {"vocab_size": 2**24, "num_hidden_layers": 10_000, "max_position_embeddings": 2**24}


def form(folder: Path, settings: dict) -> str:
    """A key of FORMS, or dense."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = f"only {' and '.join(map(repr, FAMILIES))} can be read"
        _refuse(folder, "model_type", kind, reason)
    quantised = settings.get("quantization_config")
    if quantised is None:
        return "dense"
    if not isinstance(quantised, dict):
        _refuse(folder, "quantization_config", quantised, "an object is needed")
    chosen = {"linear_class": "bitlinear", "quantization_mode": "offline"} | quantised
    forms = [name for name, wanted in FORMS.items() if wanted.items() <= chosen.items()]
    for key, wrong, reason in (
        ("quant_method", quantised.get("quant_method") != "bitnet", "only 'bitnet' can be read"),
        (
            "use_rms_norm",
            quantised.get("use_rms_norm", False) is not False,
            "this layout has no norm inside a linear layer; false is needed",
        ),
        (
            "linear_class",
            chosen["linear_class"] not in ("bitlinear", "autobitlinear"),
            "use bitlinear or autobitlinear",
        ),
        (
            "quantization_mode",
            not forms,
            "autobitlinear can be online or offline, bitlinear only offline",
        ),
    ):
        if wrong:
            _refuse(folder, f"quantization_config.{key}", chosen.get(key), reason)
    return forms[0]


def model_config(folder: Path, settings: dict, form: str, entries: dict[str, Entry]) -> ModelConfig:
    """The model that config.json describes; `entries` are the folder's tensors."""
    sizes = _sizes(folder, settings, form, entries)
    family = FAMILIES[settings["model_type"]]
    activation = _activation(folder, settings, family)
    for key in ("attention_bias", "mlp_bias"):
        if (bias := settings.get(key, False)) is not False:
            _refuse(folder, key, bias, "this layout has no biases; false is needed")
    if not isinstance(tied := settings.get("tie_word_embeddings", False), bool):
        _refuse(folder, "tie_word_embeddings", tied, "true or false is needed")
    _check_unquantised(folder, settings, sizes["n_layers"])
    theta, scaling = _rope(folder, settings, family.rope_theta)
    eps = settings.get("rms_norm_eps", family.norm_eps)
    eps = _number(folder, "rms_norm_eps", eps, 1e-30, 1)
    dtype = _dtype(folder, settings, entries)
    try:
        return ModelConfig(
            **sizes,
            layout=family.layout,
            activation=activation,
            tied_embedding=tied,
            weight_format="packed" if form in PACKED else "ternary",
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=eps,
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{folder}: config.json: {error}") from None


def trained_length(folder: Path, settings: dict) -> int:
    """Longest window that the model was trained on."""
    return _whole(folder, settings, "max_position_embeddings", smallest=2, default=2048)


def settings_of(cfg: Config, token_ids: dict, form: str) -> dict:
    """config.json of a folder of `cfg`; `token_ids` as transformers names them."""
    model, kind = cfg.model, TYPES[cfg.model.layout]
    quantised = {"quant_method": "bitnet"} | FORMS.get(form, {})
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        "hidden_act": model.activation,
        "max_position_embeddings": cfg.data.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # read by transformers 4
        **_rope_settings(model),
        "tie_word_embeddings": model.tied_embedding,
        "attention_bias": False,
        "initializer_range": 0.02,
        **token_ids,
        # Whatever model.dtype is: latents that are rounded to bfloat16 give other codes.
        "torch_dtype": "float32",
    } | ({} if form == "dense" else {"quantization_config": quantised})


def _refuse(folder: Path, key: str, value, reason: str) -> NoReturn:
    raise UserError(f"{folder}: config.json has {key}={quoted(value)}: {reason}")


def _whole(folder, settings, key, *, smallest=1, default=None) -> int:
    value, largest = settings.get(key, default), LARGEST_OF.get(key, LARGEST)
    if type(value) is not int or not smallest <= value <= largest:  # true is an int
        _refuse(folder, key, value, f"a whole number from {smallest} to {largest:,} is needed")
    return value


def _number(folder, key, value, smallest, largest) -> float:
    if type(value) not in (int, float) or not smallest <= value <= largest:
        _refuse(folder, key, value, f"a number from {smallest:g} to {largest:g} is needed")
    return float(value)


def _sizes(folder, settings, form, entries) -> dict[str, int]:
    """Numbers of SIZES; heads must divide the width, and codes are packed by four outputs."""
    n_heads = _whole(folder, settings, "num_attention_heads")
    width = _whole(folder, settings, "hidden_size")
    if width % n_heads or width // n_heads % 2:
        reason = f"must divide hidden_size={width} into heads of even width"
        _refuse(folder, "num_attention_heads", n_heads, reason)
    head = width // n_heads
    if settings.get("head_dim") not in (None, head):
        reason = f"this layout has hidden_size / num_attention_heads = {head}"
        _refuse(folder, "head_dim", settings["head_dim"], reason)
    if "num_key_value_heads" not in settings:
        settings = settings | {"num_key_value_heads": _stored_kv_heads(entries, form, head)}
    if settings["num_key_value_heads"] is None:
        settings = settings | {"num_key_value_heads": n_heads}
    if n_heads % _whole(folder, settings, "num_key_value_heads"):
        reason = f"must divide num_attention_heads={n_heads}"
        _refuse(folder, "num_key_value_heads", settings["num_key_value_heads"], reason)
    sizes = {ours: _whole(folder, settings, theirs) for ours, theirs in SIZES.items()}
    outputs = {
        "hidden_size": width,
        "num_key_value_heads": sizes["n_kv_heads"] * head,
        "intermediate_size": sizes["d_ff"],
    }
    for key, n in outputs.items():
        if form in PACKED and n % 4:
            reason = f"makes a matrix of {n} rows; codes are packed by four"
            _refuse(folder, key, settings[key], reason)
    return sizes


def _stored_kv_heads(entries, form, head) -> int | None:
    """As many as the first layer's keys have rows for.

    transformers takes its default, 5, and refuses the weights where that is not their number.
    """
    entry = entries.get(f"model.layers.0.{PROJECTIONS[1]}.weight")
    rows = entry.shape[0] if entry and entry.shape else 0
    packed = form in PACKED and entry and entry.dtype == "U8"
    return (4 * rows if packed else rows) // head or None


def _activation(folder, settings, family: Family) -> str:
    """Our name of the gate's activation, where this model has it."""
    name = settings.get("hidden_act", family.activation)
    known = (*ModelConfig.__dataclass_fields__["activation"].metadata["choices"], *ALIASES)
    if not isinstance(name, str) or name not in known:
        _refuse(folder, "hidden_act", name, f"known are {', '.join(known)}")
    return ALIASES.get(name, name)


def _rope(folder, settings, default: float) -> tuple[float, str | None]:
    """Base of the rotary frequencies, and our form of their scaling.

    From where either major version of transformers has them.
    """
    key = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        _refuse(folder, key, rope, "an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        reason = "only rotary frequencies of rope_type 'default' or 'llama3' are known"
        _refuse(folder, key, rope, reason)
    for place, factor in (
        (f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor")),
        ("partial_rotary_factor", settings.get("partial_rotary_factor")),
    ):
        if factor not in (None, 1):
            _refuse(folder, place, factor, "this layout rotates whole heads")
    scaling = None
    if kind == "llama3":
        numbers = [_number(folder, f"{key}.{name}", rope.get(name), 1e-30, 1e30) for name in LLAMA3]
        scaling = "llama3:" + ",".join(f"{number:.15g}" for number in numbers)
    for place, theta in (
        (f"{key}.rope_theta", rope.get("rope_theta")),
        ("rope_theta", settings.get("rope_theta")),
    ):
        if theta is not None:
            return _number(folder, place, theta, 1e-30, 1e30), scaling
    return default, scaling


def _rope_settings(model: ModelConfig) -> dict:
    """The rotary frequencies for transformers 5 and, where they are scaled, for 4."""
    numbers = rope_scaling_numbers(model.rope_scaling)
    if numbers is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    scaling = {"rope_type": "llama3"} | dict(zip(LLAMA3, numbers, strict=True))
    scaling["original_max_position_embeddings"] = round(numbers[-1])
    return {
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": model.rope_theta},
    }


def _dtype(folder, settings, entries) -> str:
    """Compute type: config.json's, or without one that of the embedding.

    float16 becomes float32, which holds its values: there is no loss of range, and no speed.
    """
    key = "dtype" if settings.get("dtype") is not None else "torch_dtype"
    dtype = settings.get(key)
    if dtype is None:
        entry = entries.get("model.embed_tokens.weight")
        return "bfloat16" if entry and entry.dtype == "BF16" else "float32"
    computed = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
    if not isinstance(dtype, str) or dtype not in computed:
        _refuse(folder, key, dtype, f"use {', '.join(computed)}")
    return computed[dtype]


def _check_unquantised(folder, settings, n_layers) -> None:
    """Exactly the head must be named by `modules_to_not_convert`, when it is there.

    A list takes the place of transformers' own choice, which is the head. Matching is that of
    `quantizers/quantizers_utils.should_convert_module`.
    """
    key = "quantization_config.modules_to_not_convert"
    names = (settings.get("quantization_config") or {}).get("modules_to_not_convert")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse(folder, key, names, "null or a list of names is needed")
    for name in names:
        plain = re.fullmatch(r"\w+([.]\w+|[.][*])*", name)
        if not plain or len(name) > 200 or name.count("*") > 3:
            _refuse(folder, key, names, f"{quoted(name)} is not the name of a module")
    boundary = r"(?:(?<=\.)|(?=\.|$))"

    def kept(module):
        return any(
            re.match(f"(?:{name}){boundary}", module) or module.endswith(name) for name in names
        )

    if not kept("lm_head"):
        reason = "lm_head is not named, so transformers quantises the head; null keeps it as it is"
        _refuse(folder, key, names, reason)
    for i in range(n_layers):
        for projection in PROJECTIONS:
            if kept(module := f"model.layers.{i}.{projection}"):
                reason = f"{module} would not be quantised; this model quantises all of a block"
                _refuse(folder, key, names, reason)
