"""The two models in experiments/models: small, whole, and one of them has learned."""

from pathlib import Path

import hf_models
import jax
import numpy as np
import pytest

from bitnet_jax import hf
from bitnet_jax.config import Hyper
from bitnet_jax.model import Transformer

FOLDER = Path(__file__).parents[1] / "experiments" / "models"
HEALTHY, COLLAPSED = FOLDER / "healthy", FOLDER / "collapsed"


@pytest.mark.parametrize("folder", [HEALTHY, COLLAPSED], ids=lambda folder: folder.name)
def test_a_folder_is_below_a_megabyte(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_only_the_healthy_one_predicts_code_better_than_its_words():
    """Mean loss on this package's own source, against that of its own token frequencies."""
    text = (Path(hf.__file__).parent / "config.py").read_text()
    cfg, _, tokenizer = hf.load(HEALTHY)
    tokens_BL = tokenizer.encode_batch([text])[0][: 16 * 64].reshape(16, 64)
    model = Transformer(cfg.model)
    forward = jax.jit(lambda params: model.apply({"params": params}, tokens_BL, Hyper()))
    losses = {}
    for folder in (HEALTHY, COLLAPSED):
        assert hf.load(folder)[0].model == cfg.model
        losses[folder] = hf_models.mean_loss(forward(hf.load(folder)[1]), tokens_BL)
    counts = np.bincount(tokens_BL.ravel(), minlength=512) / tokens_BL.size
    unigram = -np.mean(np.log(counts[tokens_BL]))
    assert losses[HEALTHY] < unigram - 0.3 and losses[COLLAPSED] > unigram
