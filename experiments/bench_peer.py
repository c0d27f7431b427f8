"""transformers' BitNet on torch beside ours: the same weights, batches, schedule and precision.

It has layout b158 alone. Its fastest form of training is AutoBitLinear with online quantisation, in
bfloat16 under autocast; that of decoding holds ternary values and their scale. torchao trains the
same model with int8 products (`torchao.prototype.quantized_training.bitnet_training`).
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import time

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax import hf_config, optim
from bitnet_jax.config import Config, ModelConfig
from bitnet_jax.data import Batch
from bitnet_jax.hf_weights import EMBEDDING, HEAD, hf_key, is_matrix
from bitnet_jax.program import Program

PACKAGES = ("torch", "transformers")
MOVES = ("torch", "torchao", "torch_compiled", "torchao_compiled")  # ways to train
LONGEST = 2048  # tokens of a window, past which transformers warns
NOT_SCORED = -100  # torch's mark of a target that does not count
SHAPES = 64  # that torch.compile compiles for; past its default of 8, quantisers stay uncompiled


def why_none(model: ModelConfig) -> str | None:
    """What the comparison with transformers lacks here, if anything."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    if model.layout != "b158":
        return f"it has no layout {model.layout}"
    import torch  # optional, and only for this comparison

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return "torch has no GPU here"
    # AutoBitLinear compiles its quantisers.
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


def ways(*, compiled: bool) -> list[str]:
    """Those of MOVES that are measured: torchao's where it is, torch.compile's where asked for."""
    has_torchao = importlib.util.find_spec("torchao") is not None
    return [
        name
        for name in MOVES
        if (has_torchao or "torchao" not in name) and (compiled or "compiled" not in name)
    ]


def versions() -> dict[str, str]:
    """Of the packages that are compared."""
    names = [*PACKAGES, "torchao"] if importlib.util.find_spec("torchao") else PACKAGES
    return {name: importlib.metadata.version(name) for name in names}


def device() -> str:
    """Where torch runs: on the same kind of device as JAX."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def make_model(cfg: Config, params, *, by_torchao: bool = False):
    """transformers' BitNet with our parameters (NumPy, of one replicate), ready to train.

    `by_torchao`: its linear layers multiply int8 codes as torchao's do.
    """
    import torch  # optional, and only for this comparison
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch._dynamo.config.recompile_limit = SHAPES
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    rest = {"use_cache": False, "max_position_embeddings": LONGEST}
    settings = hf_config.settings_of(cfg, no_ends, "dense") | rest
    model = BitNetForCausalLM(BitNetConfig.from_dict(settings))
    if not by_torchao:
        online = BitNetQuantConfig(**hf_config.FORMS["latents"])
        replace_with_bitnet_linear(model, ["lm_head"], online)
    # The new layers hold the default weights of nn.Linear until here.
    weights = tensors(cfg.model, params)
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    model.tie_weights()
    if by_torchao:
        from torchao import quantize_
        from torchao.prototype.quantized_training import bitnet_training

        quantize_(model, bitnet_training(), lambda layer, name: name.endswith("_proj"))
    return model.to(device()).train()


def tensors(model: ModelConfig, params) -> dict[str, np.ndarray]:
    """Parameters under transformers' names, with linear layers as [out, in]."""
    named = flatten_dict(params, sep="/")
    state_dict = {hf_key(name): w.T if is_matrix(name) else w for name, w in named.items()}
    return state_dict | ({HEAD: state_dict[EMBEDDING]} if model.tied_embedding else {})


def make_trainer(program: Program, params, way: str):
    """Return train(batch_KBL, done) -> loss of the last: torch's loop with our settings.

    `way`: one of MOVES. It starts from our parameters (NumPy, of one replicate); `done` updates
    were made before.
    """
    import torch  # optional, and only for this comparison

    cfg, hyper, where = program.cfg, program.replicates[0].hyper, device()
    model = make_model(cfg, params, by_torchao=way.startswith("torchao"))
    named = list(model.named_parameters())
    forward = torch.compile(model) if way.endswith("compiled") else model
    groups = [
        {"params": [p for name, p in named if name.endswith("_proj.weight") == is_matrix]}
        for is_matrix in (True, False)
    ]
    betas = (cfg.optim.beta1, cfg.optim.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=cfg.optim.eps, fused=True)
    rates = np.array(optim.learning_rate(hyper, np.arange(cfg.run.steps + 1), cfg.run)).tolist()
    autocast = contextlib.nullcontext()
    if cfg.model.dtype == "bfloat16":
        autocast = torch.autocast(where, torch.bfloat16)

    def train_step(inputs_BL, targets_BL, n):
        decay = hyper.decoupled_1 if n <= cfg.run.boundary else hyper.decoupled_2
        for group, share in zip(optimizer.param_groups, (1.0, hyper.decay_rest), strict=True):
            group["weight_decay"] = decay * share
            group["lr"] = rates[n]
        optimizer.zero_grad()
        with autocast:
            logits_BLV = forward(input_ids=inputs_BL).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=NOT_SCORED
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        return loss

    def train(batch_KBL: Batch, done: int) -> float:
        targets_KBL = np.where(batch_KBL.weights > 0, batch_KBL.targets, NOT_SCORED)
        pairs = [torch.tensor(x).long().to(where) for x in (batch_KBL.inputs, targets_KBL)]
        batches = zip(*pairs, strict=True)
        return [train_step(*batch, done + k) for k, batch in enumerate(batches, 1)][-1].item()

    return train


def make_generate(cfg: Config, params, *, online: bool):
    """Return decode(prompts_BP, n_new) -> new tokens [B, N] of transformers with our parameters."""
    import torch  # optional, and only for this comparison

    model = make_model(cfg, params)
    if not online:
        go_offline(model)
    model = model.to(getattr(torch, cfg.model.dtype)).eval()

    def decode(prompts_BP: np.ndarray, n_new: int) -> np.ndarray:
        ids_BP = torch.tensor(prompts_BP, device=device()).long()
        how = {"max_new_tokens": n_new, "do_sample": False, "use_cache": True}
        with torch.inference_mode():
            tokens = model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), **how)
        return tokens[:, prompts_BP.shape[1] :].cpu().numpy()

    return decode


def choose_threads(decode, prompts_BP: np.ndarray) -> int:
    """Set torch to one thread or one per core, whichever decodes faster here and now.

    A second thread on a busy core makes every operation wait for it.
    """
    import torch  # optional, and only for this comparison

    taken = {}
    for n in (1, len(os.sched_getaffinity(0))):
        torch.set_num_threads(n)
        decode(prompts_BP, 2)
        start = time.perf_counter()
        decode(prompts_BP, 6)
        taken[n] = time.perf_counter() - start
    best = min(taken, key=taken.get)
    torch.set_num_threads(best)
    return best


def go_offline(model) -> None:
    """Replace every AutoBitLinear's weights by ternary codes and their scale, the value."""
    import torch  # optional, and only for this comparison
    from transformers.integrations.bitnet import AutoBitLinear

    for layer in model.modules():
        if isinstance(layer, AutoBitLinear):
            value = layer.weight.data.abs().mean().clamp(min=1e-5)
            layer.weight.data = (layer.weight.data * (1 / value)).round().clamp(-1, 1)
            layer.weight_scale = torch.nn.Buffer(value.reshape(1))
            layer.online_quant = False
