"""Hugging Face checkpoints: out and in.

A folder holds layout b158 (transformers' `BitNetForCausalLM`) or llama (`LlamaForCausalLM`) in one
of the four forms of `hf_config`. Sources: transformers 5.23 `integrations/bitnet.py`,
`models/bitnet`, `models/llama`; the folders microsoft/bitnet-b1.58-2B-4T(-bf16).
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax import hf_config, hf_files
from bitnet_jax import tokenizer as tokenizers
from bitnet_jax.config import Config, DataConfig, Hyper, ModelConfig
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import WEIGHTS, Card
from bitnet_jax.hf_weights import (
    fault,
    hf_key,
    is_matrix,
    kept_as_codes,
    read_params,
    shapes,
    ternary_kernels,
    warn,
    warn_of_dead,
)
from bitnet_jax.model import pack_params
from bitnet_jax.tokenizer import Tokenizer

STORED = {  # what a model card says of each form
    "latents": "float32 master weights, which transformers quantises as it runs and can train",
    "value": "ternary, packed to 2 bits, with a scale for each matrix",
    "dense": "float32, not quantised",
}


def export(
    folder: Path,
    cfg: Config,
    params,
    hyper: Hyper,
    tokenizer: Tokenizer,
    *,
    packed: bool = False,
    card: Card | None = None,
) -> None:
    """Write one replicate as a folder that AutoModelForCausalLM and AutoTokenizer load.

    `hyper` holds the numbers of the parameters' step (`train.at_step`). The weights are the
    float32 latents, or with `packed` the ternary codes and their scales (values). A `card` becomes
    README.md. The folder appears when it is complete. Raises UserError when it exists and is not
    empty, cannot be written, or when transformers cannot express the model or a number of it.
    """
    folder = Path(folder)
    _check_expressible(cfg.model, hyper, tokenizer, packed)
    if packed:
        params = pack_params(params, cfg.model, hyper)
    form = "value" if packed else "latents" if float(hyper.weight_quant) else "dense"
    tensors = {}
    for name, array in flatten_dict(params, sep="/").items():
        array = np.asarray(array)
        if wrong := fault(array):
            raise UserError(f"cannot be exported: {name} {wrong}")
        array = array.T if is_matrix(name) else np.atleast_1d(array)
        tensors[hf_key(name)] = np.ascontiguousarray(array)
    texts = {
        name: json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        for name, tree in _json_files(cfg, tokenizer, form).items()
    }
    if card:
        of_all = shapes(replace(cfg.model, weight_format="ternary")).values()
        n_parameters, title = sum(map(math.prod, of_all)), folder.absolute().name
        texts["README.md"] = hf_files.card_text(card, title, n_parameters, STORED[form])
    with hf_files.appearing(folder) as draft:
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        safetensors.numpy.save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(draft / "config.json", draft / WEIGHTS)  # else readable by its owner only


def _json_files(cfg: Config, tokenizer: Tokenizer, form: str) -> dict[str, dict]:
    """The tokenizer as it saves itself, its tokens of begin and end, and the configuration."""
    first, *others = tokenizer.ends
    ids = {
        "bos_token_id": tokenizer.begin[0] if tokenizer.begin else first,
        "eos_token_id": [first, *others] if others else first,
    }
    files = tokenizer.files()
    files["tokenizer_config.json"]["model_max_length"] = cfg.data.seq_len
    files["generation_config.json"] = ids | {"pad_token_id": first}
    return files | {"config.json": hf_config.settings_of(cfg, ids, form)}


def _check_expressible(model, hyper, tokenizer, packed) -> None:
    strengths = float(hyper.weight_quant), float(hyper.act_quant)
    scale, dense = float(hyper.logit_scale), strengths == (0, 0)
    for wrong, reason in (
        (
            model.layout not in hf_config.TYPES,
            f"model.layout={model.layout}: transformers has {' and '.join(hf_config.TYPES)}, with "
            "separate projections, not a norm in every linear layer and fused ones",
        ),
        (model.output_bias, "model.output_bias=true: transformers' models have no bias of logits"),
        (scale != 1, f"hyper.logit_scale={scale:g}: transformers' models do not scale logits"),
        (
            strengths != (1, 1) and not dense,
            f"hyper.weight_quant={strengths[0]:g} and hyper.act_quant={strengths[1]:g} at this "
            "step: transformers quantises in full, or not at all with both at 0",
        ),
        (packed and dense, "hyper.weight_quant=0: a dense model has no ternary weights to pack"),
        (
            not packed and model.weight_format == "packed",
            "model.weight_format=packed: only codes are left, and these are written with --packed",
        ),
        (
            model.vocab_size < tokenizer.vocab_size,
            f"model.vocab_size={model.vocab_size}, but the tokenizer has {tokenizer.vocab_size}",
        ),
    ):
        if wrong:
            raise UserError(f"cannot be exported: {reason}")


def load(folder: Path) -> tuple[Config, dict, Tokenizer]:
    """Configuration, parameters and tokenizer of a folder.

    Of the configuration `model` is the folder's, `data` names its tokenizer and has the trained
    length as `seq_len`; the rest are defaults. Latents and all that is not ternary become float32;
    codes stay packed (`model.weight_format` packed: uint8 `packed` [in, out / 4] and float32
    `scale` [], the value), and so do matrices of three values. `model.vocab_size` counts the rows
    of the embedding: ids from `tokenizer.vocab_size` on are padding, which no text has.

    Raises UserError naming what is missing, damaged, no number of a model or not a BitNet's; what
    can be loaded and is suspect is warned of on stderr.
    """
    folder = Path(folder)
    settings = hf_files.read_json(folder / "config.json")
    form = hf_config.form(folder, settings)
    entries = hf_files.entries(folder)
    model = hf_config.model_config(folder, settings, form, entries)
    length = hf_config.trained_length(folder, settings)
    tokenizer = tokenizers.load_folder(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"vocab_size={model.vocab_size}"
        )
    if form == "dense":
        warn(
            folder,
            "config.json has no quantization_config: a dense model, run as transformers runs it. "
            "Training from it (run.init) makes it ternary, unless hyper.weight_quant=0 and "
            "hyper.act_quant=0.",
        )
    params = read_params(folder, entries, model, form)
    warn_of_dead(folder, params)
    if form in ("latents", "dense") and ternary_kernels(params):
        params = kept_as_codes(folder, params)
        model = replace(model, weight_format="packed")
    cfg = Config(model=model, data=DataConfig(tokenizer=f"hf:{folder}", seq_len=length))
    return cfg, unflatten_dict(params, sep="/"), tokenizer


def strengths(folder: Path, model: ModelConfig) -> Hyper:
    """The numbers that a loaded folder's model is evaluated with: as transformers runs it.

    A dense model is not quantised; `model` is what `load` gives, packed where codes were found.
    """
    folder = Path(folder)
    form = hf_config.form(folder, hf_files.read_json(folder / "config.json"))
    if form == "dense" and model.weight_format != "packed":
        return Hyper(weight_quant=0.0, act_quant=0.0)
    return Hyper()


def loss_fault(folder: Path, loss: float) -> str | None:
    """What to tell of a loss that is no number, or None when it is one."""
    if math.isfinite(loss):
        return None
    return f"{folder}: loss is {loss}: every weight is finite, so a product of them is too large"
