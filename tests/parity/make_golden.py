"""Write tests/fixtures/hf: exported folders, and what transformers gives for each.

make test-parity                                          # installs torch
PYTHONPATH=.:tests TORCH_COMPILE_DISABLE=1 .venv/bin/python tests/parity/make_golden.py
"""

import os
import shutil
import tempfile
from pathlib import Path

import hf_models
import numpy as np
import torch_side

from bitnet_jax import hf
from bitnet_jax.config import Hyper

FOLDER = Path(__file__).parents[1] / "fixtures" / "hf"
FOLDERS = {  # shape, packed
    "mha_tied": ("mha, tied", False),
    "gqa_untied": ("gqa, untied", False),
    "one_kv_head_packed": ("one kv head, tied, theta 1e4", True),
    "llama_gqa_untied": ("llama, gqa, untied", False),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BITNET_JAX_CACHE"] = cache
        tokenizer = hf_models.small_tokenizer()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (shape, packed) in FOLDERS.items():
        cfg, params, tokens_BL = hf_models.clear_model(hf_models.SHAPES[shape])
        hf.export(FOLDER / name, cfg, params, Hyper(), tokenizer, packed=packed)
        np.savez_compressed(
            FOLDER / name / "expected.npz", **torch_side.expected(FOLDER / name, tokens_BL)
        )
        size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
        print(f"{FOLDER / name}: {size:,} bytes")


if __name__ == "__main__":
    main()
