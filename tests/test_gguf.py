"""GGUF files, read back with llama.cpp's own library: values, names, keys, tokens, refusals.

`make test-parity` runs such files in llama.cpp.
"""

from dataclasses import replace

import gguf as library
import hf_models
import numpy as np
import pytest

from bitnet_jax import gguf, hf, quant
from bitnet_jax.config import Hyper
from bitnet_jax.fields import UserError
from bitnet_jax.model import pack_params

SILU = {"activation": "silu"}
SMALL = {"d_model": 24, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48} | SILU
LLAMA = SMALL | {"layout": "llama", "tied_embedding": False}
WIDE = {"d_model": 256, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 256} | SILU
DENSE = Hyper(weight_quant=0.0, act_quant=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load(hf_models.LATENTS)[2]


def written(folder, tokenizer, shape, hyper=None, **rest):
    """A random model, and the reader of its file."""
    cfg, params = hf_models.random_model(shape, 0)
    gguf.export(folder / "model.gguf", cfg, params, hyper or Hyper(), tokenizer, **rest)
    return cfg, params, library.GGUFReader(folder / "model.gguf")


def values(reader) -> dict[str, np.ndarray]:
    return {t.name: library.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def key(reader, name):
    return reader.get_field(name).contents()


@pytest.mark.parametrize("shape", [SMALL, LLAMA], ids=["bitnet", "llama"])
def test_a_float32_file_holds_the_weights_that_a_bit_linear_multiplies_with(
    tmp_path, tokenizer, shape
):
    cfg, params, reader = written(tmp_path, tokenizer, shape, kind="f32")
    tensors, block = values(reader), params["block_0"]
    down = block["ffn"]["down"]["kernel"]
    wanted = np.asarray(quant.quantize_weight(down, 1.0, np.float32)).T
    np.testing.assert_allclose(tensors["blk.0.ffn_down.weight"], wanted, rtol=2e-7)
    query = np.asarray(quant.quantize_weight(block["attn"]["q"]["kernel"], 1.0, np.float32)).T
    if cfg.model.layout == "llama":  # pairs of a head lie side by side: 0, 3, 1, 4, 2, 5
        query = query.reshape(4, 6, 24)[:, [0, 3, 1, 4, 2, 5]].reshape(24, 24)
        assert "blk.0.ffn_sub_norm.weight" not in tensors
        np.testing.assert_array_equal(tensors["output.weight"], params["head"]["kernel"].T)
    else:
        sub_norm = block["ffn"]["sub_norm"]["scale"]
        np.testing.assert_array_equal(tensors["blk.0.ffn_sub_norm.weight"], sub_norm)
        assert "output.weight" not in tensors
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight"], query, rtol=2e-7)
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["embed"]["embedding"])
    architecture = key(reader, "general.architecture")
    assert architecture == gguf.ARCHITECTURES[cfg.model.layout]
    numbers = [key(reader, f"{architecture}.{name}") for name in (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "rope.dimension_count", "context_length", "vocab_size",
    )]  # fmt: skip
    assert numbers == [1, 24, 48, 4, 2, 6, 128, hf_models.V]


@pytest.mark.parametrize(("kind", "n_bytes"), [("tq2_0", 66), ("tq1_0", 54)])
def test_ternary_files_hold_every_code_and_its_scale_in_half_precision(
    tmp_path, tokenizer, kind, n_bytes
):
    """Packed parameters give the same file as the latents that they come from."""
    cfg, params, reader = written(tmp_path, tokenizer, WIDE, kind=kind)
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    assert tensor.data.shape == (256, n_bytes)
    w_OI = values(reader)[tensor.name]
    wanted = np.asarray(quant.quantize_weight(params["block_0"]["ffn"]["up"]["kernel"], 1.0, "f4"))
    np.testing.assert_array_equal(np.sign(w_OI), np.sign(wanted.T))
    np.testing.assert_allclose(w_OI, wanted.T, rtol=2**-11)
    assert {t.tensor_type.name for t in reader.tensors} == {kind.upper(), "F16", "F32"}
    packed = replace(cfg, model=replace(cfg.model, weight_format="packed"))
    codes = pack_params(params, cfg.model, Hyper())
    again = tmp_path / "again.gguf"
    gguf.export(again, packed, codes, Hyper(), tokenizer, kind=kind, name="model")
    assert again.read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_a_dense_model_is_written_as_it_is(tmp_path, tokenizer):
    _, params, reader = written(tmp_path, tokenizer, SMALL, DENSE, kind="f16")
    up = params["block_0"]["ffn"]["up"]["kernel"]
    np.testing.assert_array_equal(values(reader)["blk.0.ffn_up.weight"], up.T.astype(np.float16))


def test_tokens_their_kinds_and_those_that_end_a_text(tmp_path, tokenizer):
    """Rows without a token are unused; two ends are an end of sequence and one of a turn."""
    cfg, params = hf_models.random_model(SMALL, 0)
    rows = np.ones((3, 24), np.float32)
    params["embed"]["embedding"] = np.concatenate([params["embed"]["embedding"], rows])
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=hf_models.V + 3))
    two = replace(tokenizer, ends=(tokenizer.end_of_text, 9))
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), two, kind="f32")
    reader = library.GGUFReader(tmp_path / "m.gguf")
    tokens = key(reader, "tokenizer.ggml.tokens")
    assert tokens[:-3] == [tokenizer.backend.id_to_token(i) for i in range(hf_models.V)]
    kinds = key(reader, "tokenizer.ggml.token_type")
    assert [i for i, kind in enumerate(kinds) if kind == 3] == [tokenizer.end_of_text, 9]
    assert kinds[-3:] == [5, 5, 5] and kinds[1:9] == [1] * 8
    ends = [key(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")]
    assert ends == [tokenizer.end_of_text, tokenizer.end_of_text, 9]
    assert key(reader, "tokenizer.ggml.add_bos_token") is False
    assert "h e" in key(reader, "tokenizer.ggml.merges")


@pytest.mark.parametrize(
    ("shape", "hyper", "rest", "reason"),
    [
        (SMALL | {"activation": "relu2"}, {}, {}, "without a word .*--fork ik_llama.cpp writes"),
        (LLAMA | {"activation": "gelu"}, {}, {}, "model.activation=gelu"),
        (SMALL | {"tied_embedding": False}, {}, {}, "model.tied_embedding=false"),
        (SMALL | {"layout": "report"}, {}, {}, "model.layout=report"),
        (SMALL | {"output_bias": True}, {}, {}, "model.output_bias=true"),
        (SMALL | {"rope_scaling": "llama3:8,1,4,32"}, {}, {}, "model.rope_scaling=llama3:8,1,4,32"),
        (SMALL, {"logit_scale": 0.5}, {}, "hyper.logit_scale=0.5"),
        (SMALL, {"weight_quant": 0.5}, {}, "hyper.weight_quant=0.5"),
        (SMALL, {}, {"kind": "tq2_0"}, "d_model=24, model.d_ff=48.*nearest: model.d_model=256, mo"),
        (WIDE | {"d_ff": 650}, {}, {"kind": "tq1_0"}, "nearest: model.d_ff=768; or --type f16"),
        (WIDE, {"weight_quant": 0.0}, {"kind": "tq2_0"}, "weights of a dense model"),
        (SMALL, {}, {"kind": "q4_0"}, "unknown --type q4_0"),
        (SMALL, {}, {"fork": "ik_llama"}, "did you mean ik_llama.cpp"),
        (SMALL, {}, {"fork": "ik_llama.cpp"}, "leave --fork out"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_llama_cpp_cannot_express_is_refused(tmp_path, tokenizer, shape, hyper, rest, reason):
    with pytest.raises(UserError, match=reason) as caught:
        written(tmp_path, tokenizer, shape, Hyper(**hyper), **{"kind": "f32"} | rest)
    assert str(caught.value).isprintable() and not any(tmp_path.iterdir())


def test_relu2_is_written_for_the_fork_that_is_named(tmp_path, tokenizer):
    """With what the fork's loader takes beyond llama.cpp's `bitnet`: a head, scaled frequencies."""
    shape = SMALL | {"activation": "relu2", "tied_embedding": False}
    shape |= {"rope_scaling": "llama3:8,1,4,32"}
    reader = written(tmp_path, tokenizer, shape, kind="f16", fork="ik_llama.cpp")[2]
    of_block = ("attn_norm", "attn_sub_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                "ffn_norm", "ffn_sub_norm", "ffn_gate", "ffn_up", "ffn_down")  # fmt: skip
    names = {"token_embd", "output_norm", "output", "rope_freqs"}
    names |= {f"blk.0.{name}" for name in of_block}
    assert {tensor.name for tensor in reader.tensors} == {f"{name}.weight" for name in names}
    assert values(reader)["rope_freqs.weight"].tolist() == [1, 8, 8]
    assert key(reader, "general.architecture") == "bitnet-b1.58"
    assert key(reader, "bitnet-b1.58.block_count") == 1
    with pytest.raises(UserError, match="ternary types of its own"):
        written(tmp_path, tokenizer, shape, fork="ik_llama.cpp")


def test_a_scale_that_half_precision_does_not_hold_needs_float32(tmp_path, tokenizer):
    cfg, params = hf_models.random_model(SMALL, 0)
    params["block_0"]["ffn"]["up"]["kernel"] *= 1e-5
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight reaches .* use --type f32"):
        gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), tokenizer, kind="f16")
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), tokenizer, kind="f32")


def test_a_file_appears_whole_and_replaces_nothing(tmp_path, tokenizer):
    cfg, params = hf_models.random_model(SMALL, 0)
    (tmp_path / "taken").write_text("mine")
    for place, reason in (
        (tmp_path, "a folder; name a file in it"),
        (tmp_path / "taken", "exists; give a new file"),
        (tmp_path / "no" / "folder", "no folder .*/no; make it"),
    ):
        with pytest.raises(UserError, match=reason):
            gguf.export(place, cfg, params, Hyper(), tokenizer, kind="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("way", ["gpt-2", "llama-bpe", "smollm"])
def test_the_way_in_which_text_is_cut_is_named_as_llama_cpp_has_it(tmp_path, tokenizer, way):
    cfg, params = hf_models.random_model(SMALL, 0)
    cut = hf_models.cut_as(tokenizer, way)
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), cut, kind="f16")
    assert key(library.GGUFReader(tmp_path / "m.gguf"), "tokenizer.ggml.pre") == way


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path, tokenizer):
    cfg, params = hf_models.random_model(SMALL, 0)
    for way in ("digits together", "whole words"):
        with pytest.raises(UserError, match="cuts text into words in a way that is not known"):
            other = hf_models.cut_as(tokenizer, way)
            gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), other, kind="f16")


def test_the_tokenizer_of_sentencepiece_has_scores_and_bytes(tmp_path):
    spm = hf_models.save_sentencepiece_like(tmp_path / "hf")
    cfg, params = hf_models.random_model(SMALL | {"vocab_size": spm.vocab_size + 2}, 0)
    gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), spm, kind="f16")
    reader = library.GGUFReader(tmp_path / "m.gguf")
    ggml = {name: key(reader, f"tokenizer.ggml.{name}") for name in (
        "model", "tokens", "token_type", "scores", "add_space_prefix", "add_bos_token",
        "bos_token_id", "eos_token_id",
    )}  # fmt: skip
    assert [ggml[name] for name in ("model", "add_space_prefix", "add_bos_token")] == [
        "llama", True, True
    ]  # fmt: skip
    assert (ggml["bos_token_id"], ggml["eos_token_id"]) == (1, 2)
    assert ggml["token_type"][:4] == [2, 3, 3, 6] and ggml["token_type"][-2:] == [5, 5]
    score = dict(zip(ggml["tokens"], ggml["scores"], strict=True))
    assert score["▁t"] == 0 > score["▁the"] > score["t"] == -1000
    assert ggml["tokens"][3 + 65] == "<0x41>"


def test_merges_that_are_not_sentencepieces_are_refused(tmp_path):
    cfg, params = hf_models.random_model(SMALL | {"vocab_size": 400}, 0)
    spm = hf_models.save_sentencepiece_like(tmp_path / "hf", complete=False)
    with pytest.raises(UserError, match="merges in another way"):
        gguf.export(tmp_path / "m.gguf", cfg, params, Hyper(), spm, kind="f16")
