"""Greedy continuation of prompts, as one compiled program over all replicates."""

from functools import partial

import jax
import jax.numpy as jnp

from bitnet_jax.config import Config
from bitnet_jax.model import Transformer


@partial(jax.jit, static_argnums=(0, 4))
def greedy(cfg: Config, params, hyper, prompts_BP: jax.Array, n_new: int) -> jax.Array:
    """Append the most likely token `n_new` times: int32 [R, B, n_new].

    `params` and `hyper` have a leading replicate axis; prompts are shared and of equal length.
    Every new token runs the whole window through the model.
    """
    model = Transformer(cfg.model)
    n_prompt = prompts_BP.shape[1]
    padded_BL = jnp.pad(prompts_BP, ((0, 0), (0, n_new)))

    def one(params, hyper):
        def extend(i, tokens_BL):
            logits_BLV = model.apply({"params": params}, tokens_BL, hyper)
            token_B = jnp.argmax(logits_BLV[:, i - 1], axis=-1)
            return tokens_BL.at[:, i].set(token_B.astype(tokens_BL.dtype))

        return jax.lax.fori_loop(n_prompt, n_prompt + n_new, extend, padded_BL)[:, n_prompt:]

    return jax.vmap(one)(params, hyper)
