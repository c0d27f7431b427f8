"""Continuations of prompts, as one compiled program over all replicates, and how they degenerate.

The prompts fill a cache of keys and values in one pass; then each new token is one pass over one
position. Shapes: R replicates, B prompts, P tokens of the longest prompt, N new tokens.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import products
from bitnet_jax.config import Config
from bitnet_jax.model import Transformer, empty_cache, pack_params
from bitnet_jax.restore import Model


@flax.struct.dataclass
class Sampling:
    """How the next token is chosen: numbers, so that all choices share one compiled program."""

    temperature: float = 0.0  # divides the logits; 0: the most likely token
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the most likely that together reach p (nucleus, arXiv 1904.09751)
    repetition_penalty: float = 1.0  # of tokens seen before (arXiv 1909.05858, section 4.1)
    n_tokens: int = 0  # of the tokenizer: ids from here on are padding, never chosen; 0: none are


@flax.struct.dataclass
class Decoding:
    """Where R x B continuations stand."""

    cache: Any
    seen_BV: jax.Array  # whether the prompt or its continuation has the token
    token_B: jax.Array  # the last token
    position_B: jax.Array  # its position
    done_B: jax.Array  # whether the continuation has ended
    key_B: jax.Array


def for_decoding(model: Model, *, packed: bool = False) -> Model:
    """The same model with its weights as they decode fastest here, or packed in 2 bits.

    That is int8 codes where products by codes pay: each token reads all weights, and master weights
    are quantised again by every dispatch. Raises UserError where weights cannot be packed.
    """
    by_codes = products.choose([model.hyper], standard=True) == products.CODES
    if not packed and not (by_codes and model.cfg.model.weight_format == "ternary"):
        return model
    form = "packed" if packed else "codes"
    cfg = replace(model.cfg, model=replace(model.cfg.model, weight_format=form))
    params = pack_params(model.params, model.cfg.model, model.hyper, form)
    return replace(model, cfg=cfg, params=params)


@partial(jax.jit, static_argnums=(0, 5))
def generate(
    cfg: Config, params, hyper, prompts_BP, lengths_B, n_new: int, *, sampling, seed, end_of_text
) -> jax.Array:
    """Continue every prompt by `n_new` tokens in every replicate: int32 [R, B, N].

    `params` and `hyper` have a leading replicate axis; the prompts are shared. Row b's prompt is
    the first `lengths_B[b]` >= 1 tokens of `prompts_BP[b]`; what follows them has no influence.
    After an end of text there is nothing but end of text. `end_of_text` is a token or several, the
    first of which fills up. `sampling` is a Sampling.
    """
    decoding = begin(cfg, params, hyper, prompts_BP, lengths_B, n_new, seed)
    return extend(cfg, params, hyper, decoding, n_new, sampling, end_of_text)[1]


@partial(jax.jit, static_argnums=(0, 5))
def begin(cfg: Config, params, hyper, prompts_BP, lengths_B, n_new: int, seed: int) -> Decoding:
    """Read the prompts, with room for `n_new` tokens; a row's key is of (seed, replicate, row)."""
    n_rows, n_prompt = prompts_BP.shape
    row_B, position_P = jnp.arange(n_rows), jnp.arange(n_prompt)
    real_BP = position_P < lengths_B[:, None]
    seen_BV = jnp.zeros((n_rows, cfg.model.vocab_size), bool)

    def begin_replicate(params, hyper, replicate):
        variables = {"params": params, "cache": empty_cache(cfg.model, n_rows, n_prompt + n_new)}
        # The logits are not used, so the compiler leaves the head out. The last token of a prompt
        # is read again by the first step of `extend`, which needs its logits.
        _, filled = Transformer(cfg.model).apply(
            variables, prompts_BP, hyper, position_P[None], mutable="cache"
        )
        key = jax.random.fold_in(jax.random.key(seed), replicate)
        return Decoding(
            cache=filled["cache"],
            seen_BV=seen_BV.at[row_B[:, None], prompts_BP].max(real_BP),
            token_B=prompts_BP[row_B, lengths_B - 1].astype(jnp.int32),
            position_B=lengths_B - 1,
            done_B=jnp.zeros(n_rows, bool),
            key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, row_B),
        )

    replicates = jnp.arange(hyper.logit_scale.shape[0])
    return jax.vmap(begin_replicate, spmd_axis_name="replicate")(params, hyper, replicates)


@partial(jax.jit, static_argnums=(0, 4))
def extend(
    cfg: Config, params, hyper, decoding: Decoding, n: int, sampling: Sampling, end_of_text
) -> tuple[Decoding, jax.Array]:
    """Add `n` tokens to every continuation: the state after them, and the tokens [R, B, n]."""
    model, ends = Transformer(cfg.model), jnp.atleast_1d(jnp.asarray(end_of_text))

    def extend_replicate(params, hyper, decoding):
        def step(now, _):
            logits_B1V, filled = model.apply(
                {"params": params, "cache": now.cache},
                now.token_B[:, None],
                hyper,
                now.position_B[:, None],
                mutable="cache",
            )
            key_B = jax.vmap(jax.random.fold_in)(now.key_B, now.position_B)
            token_B = choose(logits_B1V[:, 0], now.seen_BV, key_B, sampling)
            token_B = jnp.where(now.done_B, ends[0], token_B)
            row_B = jnp.arange(len(token_B))
            after = now.replace(
                cache=filled["cache"],
                seen_BV=now.seen_BV.at[row_B, token_B].set(True, unique_indices=True),
                token_B=token_B,
                position_B=now.position_B + 1,
                done_B=jnp.isin(token_B, ends),
            )
            return after, token_B

        decoding, tokens_NB = jax.lax.scan(step, decoding, length=n)
        return decoding, tokens_NB.T

    return jax.vmap(extend_replicate, spmd_axis_name="replicate")(params, hyper, decoding)


def choose(logits_BV, seen_BV, key_B, sampling: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]; ties go to the lowest id when greedy."""
    penalty = sampling.repetition_penalty
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    is_token_V = (sampling.n_tokens == 0) | (jnp.arange(logits_BV.shape[-1]) < sampling.n_tokens)
    logits_BV = jnp.where(is_token_V, logits_BV, -jnp.inf)

    def sample(logits_BV):
        scaled_BV = logits_BV / sampling.temperature
        filtered = (sampling.top_k > 0) | (sampling.top_p < 1)  # sorting costs more than the rest
        kept_BV = jax.lax.cond(
            filtered,
            lambda x: keep_likely(x, sampling.top_k, sampling.top_p),
            lambda x: x,
            scaled_BV,
        )
        return jax.vmap(jax.random.categorical)(key_B, kept_BV).astype(jnp.int32)

    def most_likely(logits_BV):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, sample, most_likely, logits_BV)


def keep_likely(logits_BV: jax.Array, top_k, top_p) -> jax.Array:
    """Set to -inf what is not among the `top_k` (0: all), and then not in the nucleus `top_p`."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    in_k_V = (top_k == 0) | (jnp.arange(logits_BV.shape[-1]) < top_k)
    probs_BV = jax.nn.softmax(jnp.where(in_k_V, sorted_BV, -jnp.inf), axis=-1)
    more_likely_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = in_k_V & (more_likely_BV < top_p)
    lowest_B1 = jnp.min(sorted_BV, axis=-1, keepdims=True, where=kept_BV, initial=jnp.inf)
    return jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)


def degeneration(tokens_BN, end_of_text) -> dict[str, float | None]:
    """How repetitive continuations are: means over them, each up to its end of text.

    unique        distinct tokens
    distinct_n    distinct n-grams / n-grams, n = 1..4 (1 without n-grams)
    rep_4         1 - distinct_4: seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319, section 6
    loop          share that end in a loop (`loop_period`)
    loop_period   median period of those; None without
    """
    rows = [until_end(row, end_of_text) for row in np.asarray(tokens_BN)]
    out = {"unique": float(np.mean([len(np.unique(row)) for row in rows]))}
    for n in range(1, 5):
        out[f"distinct_{n}"] = float(np.mean([_distinct(row, n) for row in rows]))
    periods = [p for p in map(loop_period, rows) if p]
    out["rep_4"] = 1 - out["distinct_4"]
    out["loop"] = len(periods) / len(rows)
    out["loop_period"] = float(np.median(periods)) if periods else None
    return out


def until_end(tokens_N: np.ndarray, end_of_text) -> np.ndarray:
    """The tokens before the first end of text: a token, or the first of several."""
    ends = np.flatnonzero(np.isin(tokens_N, end_of_text))
    return tokens_N[: ends[0]] if len(ends) else tokens_N


def _distinct(row_N, n) -> float:
    if len(row_N) < n:
        return 1.0
    grams = np.lib.stride_tricks.sliding_window_view(row_N, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def loop_period(row_N) -> int | None:
    """Smallest p such that each of the last 4p tokens equals the one p before it; else None."""
    row_N = np.asarray(row_N)
    for p in range(1, len(row_N) // 5 + 1):
        if (row_N[-4 * p :] == row_N[-5 * p : -p]).all():
            return p
    return None
