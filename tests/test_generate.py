"""Greedy continuation is the argmax of full forward passes, per prompt and per replicate."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import config, generate, presets
from bitnet_jax.model import Transformer

N_NEW = 6


@pytest.fixture(scope="module", params=["b158", "report"])
def model(request):
    """A model with random weights that are large enough for its argmax to vary."""
    cfg = presets.preset("tiny")
    tied = request.param == "b158"
    shape = replace(cfg.model, layout=request.param, vocab_size=61, n_layers=1, tied_embedding=tied)
    cfg = replace(cfg, model=shape)
    hyper = config.Hyper(*(jnp.full(2, x, jnp.float32) for x in vars(config.Hyper()).values()))
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        lambda: Transformer(shape).init(jax.random.key(0), tokens_BL, config.Hyper())["params"]
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=(2, *x.shape)).astype(np.float32), shapes)
    prompts_BP = rng.integers(0, 61, (3, 5)).astype(np.int32)
    return cfg, params, hyper, prompts_BP


def test_is_the_argmax_of_full_forward_passes(model):
    cfg, params, hyper, prompts_BP = model
    expected_RBN = []
    forward = jax.jit(lambda p, h, x: Transformer(cfg.model).apply({"params": p}, x, h))
    for i in range(2):
        one, h = jax.tree.map(lambda x, i=i: x[i], (params, hyper))
        tokens_BL = prompts_BP
        for _ in range(N_NEW):
            logits_BLV = np.asarray(forward(one, h, tokens_BL))
            tokens_BL = np.concatenate([tokens_BL, logits_BLV[:, -1:].argmax(-1)], axis=1)
        expected_RBN.append(tokens_BL[:, prompts_BP.shape[1] :])
    new_RBN = np.asarray(generate.greedy(cfg, params, hyper, prompts_BP, N_NEW))
    assert new_RBN.dtype == np.int32 and new_RBN.tolist() == np.array(expected_RBN).tolist()
    assert len(np.unique(new_RBN)) > 5


def test_prompts_do_not_influence_each_other(model):
    cfg, params, hyper, prompts_BP = model
    together = np.asarray(generate.greedy(cfg, params, hyper, prompts_BP, N_NEW))
    others = (prompts_BP + 7) % 61
    others[1] = prompts_BP[1]
    beside = np.asarray(generate.greedy(cfg, params, hyper, others, N_NEW))
    assert (beside[:, 1] == together[:, 1]).all() and (beside[:, 0] != together[:, 0]).any()


def test_replicates_do_not_influence_each_other(model):
    cfg, params, hyper, prompts_BP = model
    together = np.asarray(generate.greedy(cfg, params, hyper, prompts_BP, N_NEW))
    swapped = jax.tree.map(lambda x: x[::-1], params)
    assert (generate.greedy(cfg, swapped, hyper, prompts_BP, N_NEW) == together[::-1]).all()
    assert (together[0] != together[1]).any()
