"""A model of any SOURCE in EleutherAI's lm-evaluation-harness (pip install lm_eval, no torch).

    python -m bitnet_jax.lm_eval --model bitnet_jax --model_args source=runs/mine \\
        --tasks lambada_openai --batch_size 8

From Python: `lm_eval.simple_evaluate(model=BitNet("runs/mine"), tasks=[...])`. Scores are those of
the harness: sums of log-probabilities in nats. What is longer than the model's context loses its
beginning; the rolling log-likelihood cuts a document into windows of the context's length.
"""

import sys
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows

from bitnet_jax import config, generate, restore
from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError
from bitnet_jax.generate import Sampling, until_end
from bitnet_jax.model import Transformer

LEAST = 32  # tokens: shorter rows are padded to it, longer ones to the next power of 2
NEW = 256  # tokens that are generated where a task does not say how many
CHUNK = 16  # tokens between looks for a string that ends a text


@partial(jax.jit, static_argnums=0)
def score(cfg: config.Config, params, hyper, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of each row the log-probability of its scored targets, and whether all are the most likely.

    float32 [B] and bool [B].
    """
    logits_BLV = Transformer(cfg.model).apply({"params": params}, batch.inputs, hyper)
    log_p_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    log_p_BL = jnp.take_along_axis(log_p_BLV, batch.targets[..., None], axis=-1)[..., 0]
    likely_BL = jnp.argmax(logits_BLV, axis=-1) == batch.targets
    scored_BL = batch.weights > 0
    return jnp.sum(log_p_BL * batch.weights, axis=-1), jnp.all(likely_BL | ~scored_BL, axis=-1)


@register_model("bitnet_jax")
class BitNet(TemplateLM):
    """A model of a workdir or of a Hugging Face folder; raises UserError where there is none."""

    def __init__(self, source: str, batch_size: int | str = 8, **_):
        """`batch_size` rows are computed at once; what else the harness passes is not needed."""
        super().__init__()
        self.model = generate.for_decoding(restore.load_model(source))
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.params = jax.tree.map(jnp.asarray, self.model.params)
        self.hyper = jax.tree.map(jnp.float32, self.model.hyper)
        precise = self.model.cfg.model.dtype == "float32"  # float32 means float32, as in training
        self.precision = "float32" if precise else "default"

    @property
    def context(self) -> int:
        """Tokens of a window in training."""
        return self.model.cfg.data.seq_len

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: the tokenizer's begin, or the end of the text before."""
        return (*self.model.tokenizer.begin, self.eot_token_id)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is False:
            return self.model.tokenizer.encode_batch([string])[0].tolist()
        return self.model.tokenizer.encode_prompt(string).tolist()

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Of (key, context tokens, continuation tokens) the harness's pairs, in their order."""
        results: list = [None] * len(requests)
        for rows in self._batches([len(c) + len(t) for _, c, t in requests]):
            batch = pad([requests[i][1:] for i in rows], self.batch_size, self.context)
            with jax.default_matmul_precision(self.precision):
                sums_B, likely_B = score(self.model.cfg, self.params, self.hyper, batch)
            pairs = zip(np.asarray(sums_B).tolist(), np.asarray(likely_B).tolist(), strict=True)
            for i, pair in zip(rows, pairs, strict=False):  # the last batch may not be full
                results[i] = pair
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], pair)
        return results

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of the requests, the longest first: memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.context, 1)
            for inputs, targets in cut:  # the first input before the targets is their context
                windows.append((None, inputs[: len(inputs) - len(targets) + 1], targets))
                owners.append(i)
        totals = np.zeros(len(requests))
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, how = request.args
            texts.append(self._continue(prompt, how))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _continue(self, prompt: str, how: dict) -> str:
        """The text after a prompt, up to the first of the strings `until`."""
        stops = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
        n_new = int(how.get("max_gen_toks", NEW))
        temperature = float(how.get("temperature", 1.0)) if how.get("do_sample") else 0.0
        tokenizer, cfg = self.model.tokenizer, self.model.cfg
        kept = max(self.context - n_new, self.context // 2, 1)
        prompt_P = np.array(self.tok_encode(prompt) or [self.prefix_token_id], np.int32)[-kept:]
        length = len(prompt_P)
        prompt_P = np.pad(prompt_P, (0, padded(length, self.context) - length))
        params, hyper = jax.tree.map(lambda x: x[None], (self.params, self.hyper))
        sampling = Sampling(temperature, n_tokens=tokenizer.vocab_size)
        n_chunks, new_N = -(-n_new // CHUNK), np.zeros(0, np.int32)
        ends = np.array(tokenizer.ends, np.int32)
        with jax.default_matmul_precision(self.precision):
            state = generate.begin(
                *(cfg, params, hyper, prompt_P[None], np.array([length]), n_chunks * CHUNK, 0)
            )
            for _ in range(n_chunks):
                state, tokens_RBN = generate.extend(
                    cfg, params, hyper, state, CHUNK, sampling, ends
                )
                new_N = np.concatenate([new_N, tokens_RBN[0, 0]])[:n_new]
                text = tokenizer.decode(until_end(new_N, ends))
                if np.isin(new_N, ends).any() or any(stop in text for stop in stops):
                    break
        return cut_at(text, stops)


def cut_at(text: str, stops: list[str]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def padded(length: int, most: int) -> int:
    """The length to which a row is padded, so that few programs are compiled."""
    return max(length, min(most, max(LEAST, 1 << (length - 1).bit_length())))


def pad(pairs: list[tuple[list[int], list[int]]], n_rows: int, context: int) -> Batch:
    """Context and continuation tokens as a Batch [n_rows, L] that scores the continuations.

    Of a row that is longer than the context the last tokens are kept.
    """
    rows = [(before + after)[-(context + 1) :] for before, after in pairs]
    length = padded(max(map(len, rows)) - 1, context)
    batch = Batch(*(np.zeros((n_rows, length), kind) for kind in (np.int32, np.int32, np.float32)))
    for b, (row, (_, after)) in enumerate(zip(rows, pairs, strict=True)):
        n = len(row) - 1
        batch.inputs[b, :n], batch.targets[b, :n] = row[:-1], row[1:]
        batch.weights[b, max(0, n - len(after)) : n] = 1
    return batch


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
