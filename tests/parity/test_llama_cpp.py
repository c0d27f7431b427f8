"""llama.cpp runs the GGUF files and computes the same; `make test-parity` runs this.

It never quantises activations per token, so the measure is `act_quant=0`.
"""

from itertools import zip_longest

import hf_models
import jax
import numpy as np
import pytest
from llama_cpp_side import LlamaCpp

from bitnet_jax import gguf
from bitnet_jax.config import Hyper
from bitnet_jax.generate import until_end

FLOAT_ACTIVATIONS = Hyper(act_quant=0.0)
WIDE = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512} | {
    "activation": "silu"
}
SHAPES = {
    "bitnet": WIDE,
    "llama, untied": WIDE | {"layout": "llama", "tied_embedding": False, "rope_theta": 10_000.0},
    "llama, tied": WIDE | {"layout": "llama", "n_layers": 1, "n_kv_heads": 4},
    "llama 3, scaled rotary": WIDE
    | {"layout": "llama", "n_layers": 1, "rope_theta": 100.0, "rope_scaling": "llama3:8,1,4,32"},
}
# Largest |delta log p| over the vocabulary, in nats: that of float32 is the claim; float16 rounds
# embedding and scales, and the ternary types quantise activations in blocks of 256.
WITHIN = {"f32": 0.02, "f16": 0.03, "tq2_0": 0.5, "tq1_0": 0.5}
EXACT = ("f32", "f16")  # have our likeliest token; the others one that is about as likely
CLOSE = 0.2  # nats between two tokens of which either may come first


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield hf_models.small_tokenizer()


def random_model(shape):
    """Weights under which probabilities spread over a few nats, as a trained model's do."""
    cfg, params = hf_models.random_model(shape, 0)
    params["final_norm"]["scale"] *= 0.3
    if "head" in params:
        params["head"]["kernel"] *= 0.3
    return cfg, params


def log_probs(cfg, params, tokens_BL, hyper):
    """float32 [B, L, V]."""
    return np.asarray(jax.nn.log_softmax(hf_models.logits(cfg, params, tokens_BL, hyper)))


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    """A random model, tokens [2, L], and our log probabilities without int8 activations."""
    cfg, params = random_model(SHAPES[request.param])
    tokens_BL = np.random.default_rng(0).integers(1, hf_models.V, (2, 12)).astype(np.int32)
    return cfg, params, tokens_BL, log_probs(cfg, params, tokens_BL, FLOAT_ACTIVATIONS)


@pytest.mark.parametrize("kind", WITHIN)
def test_probabilities_and_the_likeliest_token_agree(model, tokenizer, tmp_path, kind):
    cfg, params, tokens_BL, ours_BLV = model
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), tokenizer, kind=kind)
    llama = LlamaCpp(tmp_path / "m.gguf", hf_models.V)
    for row, ours_LV in zip(tokens_BL, ours_BLV, strict=True):
        for length in (1, 5, len(row)):
            theirs_V, ours_V = llama.log_probs(row[:length]), ours_LV[length - 1]
            assert np.abs(theirs_V - ours_V).max() < WITHIN[kind]
            behind = ours_V.max() - ours_V[theirs_V.argmax()]
            assert behind <= (0 if kind in EXACT else CLOSE)


def test_a_llama_file_without_the_order_of_rotary_pairs_is_another_model(tokenizer, tmp_path):
    """The comparison sees it, from the second position on."""
    cfg, params = random_model(SHAPES["llama, tied"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_interleaved", lambda w_OI, heads: w_OI)
        gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), tokenizer, kind="f32")
    row = np.arange(20, 32, dtype=np.int32)
    ours_V = log_probs(cfg, params, row[None], FLOAT_ACTIVATIONS)[0, -1]
    assert np.abs(LlamaCpp(tmp_path / "m.gguf", hf_models.V).log_probs(row) - ours_V).max() > 0.1


def test_greedy_text_is_equal_until_two_tokens_are_about_equally_likely(model, tokenizer, tmp_path):
    """Against our own int8 activations, which llama.cpp does not have."""
    cfg, params, tokens_BL, _ = model
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), tokenizer, kind="f32")
    llama = LlamaCpp(tmp_path / "m.gguf", hf_models.V)
    ours_BN = hf_models.greedy(cfg, params, tokens_BL)
    for prompt, ours in zip(tokens_BL[:, : hf_models.N_PROMPT], ours_BN, strict=True):
        theirs = llama.greedy(prompt, len(ours))
        ours = until_end(ours, tokenizer.ends)
        parts = next(
            (i for i, pair in enumerate(zip_longest(ours, theirs)) if len({*pair}) > 1), None
        )
        if parts is None:
            continue
        text = np.concatenate([prompt, ours[:parts]])[None]
        top = np.sort(log_probs(cfg, params, text, FLOAT_ACTIVATIONS)[0, -1])
        assert top[-1] - top[-2] < CLOSE, (parts, top[-2:])


def texts() -> list[str]:
    """500 texts: words, numbers, white space, code and scripts in many mixtures."""
    rng = np.random.default_rng(0)
    parts = (
        "the cat", " sat", "ON", "it's", "we'LL", "  ", "\n", "\n\n\n", "\t", " \t\n ", "1234",
        " 3.14", "x_1=f(a,b);", "    def g(self):", "é", "ÅNGSTRÖM", "日本語", "Привет", "🙂",
        "\u200b", "\u00a0", "--->", '"quoted"', "http://a.b/c?d=e&f", "<b>", "'", "''s", "\r\n",
        "½", "٣",
    )  # fmt: skip
    return ["".join(rng.choice(parts, rng.integers(1, 12))) for _ in range(500)]


@pytest.mark.parametrize("way", ["gpt-2", "llama-bpe", "smollm"])
def test_texts_have_the_same_tokens(tokenizer, tmp_path, way):
    cfg, params = random_model(SHAPES["llama, tied"])
    cut = hf_models.cut_as(tokenizer, way)
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), cut, kind="f16")
    llama = LlamaCpp(tmp_path / "m.gguf", hf_models.V)
    ours = cut.encode_batch(texts())
    different = [
        text for text, ids in zip(texts(), ours, strict=True) if llama.tokens(text) != ids.tolist()
    ]
    assert different == []


def test_texts_have_the_same_tokens_under_sentencepiece(tmp_path):
    """llama.cpp joins them by scores, of which a tokenizer.json has none."""
    spm = hf_models.save_sentencepiece_like(tmp_path / "hf")
    shape = SHAPES["llama, tied"] | {"vocab_size": spm.vocab_size}
    gguf.export(tmp_path / "m.gguf", *random_model(shape), Hyper(), spm, kind="f16")
    llama = LlamaCpp(tmp_path / "m.gguf", spm.vocab_size)
    some = [*texts(), hf_models.WORDS]
    ours = spm.encode_batch(some)
    assert [t for t, ids in zip(some, ours, strict=True) if llama.tokens(t) != ids.tolist()] == []
