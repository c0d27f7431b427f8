"""What llama.cpp gives for a GGUF file, through its own server in this process."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp


class LlamaCpp:
    """One file, run in one thread with a float32 cache of keys and values."""

    def __init__(self, path: Path, n_vocab: int, n_ctx: int = 128):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.port = n_ctx, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.verbosity = -1
        self.n_vocab, self.server = n_vocab, xllamacpp.Server(params)

    def post(self, path: str, **body) -> dict:
        """The answer of an endpoint of llama.cpp's server."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def complete(self, prompt, n_new: int, **settings) -> dict:
        """The greedy completion of token ids or a text."""
        fixed = {"temperature": 0.0, "cache_prompt": False, "return_tokens": True}
        prompt = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
        return self.post("completion", prompt=prompt, n_predict=n_new, **fixed, **settings)

    def log_probs(self, ids) -> np.ndarray:
        """Natural log probabilities [V] of the token after `ids`.

        They are those of the logits, which a bias of the choice does not change: `a` is chosen,
        because an end of text or half a character gives no answer.
        """
        choice = [[self.tokens("a")[0], 1e6]]
        answer = self.complete(ids, 1, n_probs=self.n_vocab, logit_bias=choice)
        next_token = answer["completion_probabilities"][0]
        found_V = np.full(self.n_vocab, np.nan)
        for entry in next_token["top_logprobs"]:
            found_V[entry["id"]] = entry["logprob"]
        return found_V

    def greedy(self, ids, n_new: int) -> list[int]:
        """The likeliest tokens after `ids`, up to an end of text."""
        return self.complete(ids, n_new)["tokens"]

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, in which a special token that is spelled out is text."""
        return self.post("tokenize", content=text, add_special=False, parse_special=False)["tokens"]
