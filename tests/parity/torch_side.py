"""What transformers gives for a folder."""

from pathlib import Path

import numpy as np
import torch
from hf_models import N_NEW, N_PROMPT
from transformers import AutoModelForCausalLM


def load(folder: Path):
    """The folder's model."""
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def expected(folder: Path, tokens_BL: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, loss, and the greedy continuation of the first N_PROMPT tokens."""
    model, tokens = load(folder), torch.tensor(tokens_BL).long()
    out = model(tokens, labels=tokens)
    model.generation_config.eos_token_id = None
    text = model.generate(
        tokens[:, :N_PROMPT],
        attention_mask=torch.ones_like(tokens[:, :N_PROMPT]),
        max_new_tokens=N_NEW,
        do_sample=False,
    )
    return {
        "tokens": tokens_BL,
        "logits": out.logits.numpy(),
        "loss": out.loss.numpy(),
        "greedy": text[:, N_PROMPT:].numpy().astype(np.int32),
    }
