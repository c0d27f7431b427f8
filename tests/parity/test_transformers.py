"""transformers loads what was exported and computes the same; `make test-parity` runs this."""

import json
import shutil

import hf_models
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_side
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, WeightQuant

from bitnet_jax import hf, quant
from bitnet_jax.config import Hyper
from bitnet_jax.model import Transformer

DENSE = Hyper(weight_quant=0.0, act_quant=0.0)


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield hf_models.small_tokenizer()


@pytest.fixture(scope="module", params=hf_models.SHAPES)
def model(request):
    return hf_models.clear_model(hf_models.SHAPES[request.param])


@pytest.fixture(scope="module")
def simple():
    return hf_models.clear_model(hf_models.SHAPES["gqa, untied"])


def exported(folder, model, tokenizer, hyper=None, **rest):
    hf.export(folder, *model[:2], hyper or Hyper(), tokenizer, **rest)
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["latents", "packed"])
def test_logits_loss_and_greedy_text_are_equal(model, tokenizer, tmp_path, packed):
    cfg, params, tokens_BL = model
    folder = exported(tmp_path / "out", model, tokenizer, packed=packed)
    theirs = torch_side.expected(folder, tokens_BL)
    ours_BLV = hf_models.logits(cfg, params, tokens_BL)
    assert ours_BLV.std() > 0.5
    np.testing.assert_allclose(ours_BLV, theirs["logits"], rtol=0, atol=1e-4)
    assert hf_models.mean_loss(ours_BLV, tokens_BL) == pytest.approx(float(theirs["loss"]), 1e-6)
    assert (hf_models.greedy(cfg, params, tokens_BL) == theirs["greedy"]).all()
    cfg, params, _ = hf.load(folder)
    loaded_BLV = hf_models.logits(cfg, params, tokens_BL)
    np.testing.assert_allclose(loaded_BLV, theirs["logits"], rtol=0, atol=1e-4)


def test_a_dense_model_is_dense_there(simple, tokenizer, tmp_path):
    cfg, params, tokens_BL = simple
    folder = exported(tmp_path / "out", simple, tokenizer, DENSE)
    theirs = torch_side.expected(folder, tokens_BL)
    ours_BLV = hf_models.logits(cfg, params, tokens_BL, DENSE)
    np.testing.assert_allclose(ours_BLV, theirs["logits"], rtol=1e-5, atol=1e-4)
    assert np.abs(hf_models.logits(cfg, params, tokens_BL) - theirs["logits"]).max() > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_dense_llama_that_transformers_wrote_is_the_same_model_here(tokenizer, tmp_path, tied):
    """From its own initialisation and its own defaults; without quantisation on either side."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 40, "vocab_size": hf_models.V + 6}
    config = LlamaConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    cfg, params, _ = hf.load(tmp_path)
    assert (cfg.model.layout, cfg.model.activation) == ("llama", "silu")
    assert (cfg.model.rope_theta, cfg.model.norm_eps) == (10_000.0, 1e-6)
    tokens_BL = np.random.default_rng(0).integers(1, hf_models.V, (2, 12)).astype(np.int32)
    theirs = torch_side.expected(tmp_path, tokens_BL)
    hyper = hf.strengths(tmp_path, cfg.model)
    ours_BLV = hf_models.logits(cfg, params, tokens_BL, hyper)
    assert ours_BLV.std() > 0.5
    np.testing.assert_allclose(ours_BLV, theirs["logits"], rtol=1e-5, atol=1e-4)
    assert (hf_models.greedy(cfg, params, tokens_BL, hyper) == theirs["greedy"]).all()


def test_master_weights_train_there_with_our_gradients(simple, tokenizer, tmp_path):
    cfg, params, tokens_BL = simple
    model = torch_side.load(exported(tmp_path / "out", simple, tokenizer))
    tokens = torch.tensor(tokens_BL).long()
    model(tokens, labels=tokens).loss.backward()

    def loss(params):
        logits_BLV = Transformer(cfg.model).apply({"params": params}, tokens_BL, Hyper())
        return hf_models.loss.cross_entropy(logits_BLV[:, :-1], hf_models.next_tokens(tokens_BL))

    ours = jax.jit(jax.grad(loss))(params)
    for layer, ours_IO in (
        (model.model.layers[0].self_attn.q_proj, ours["block_0"]["attn"]["q"]["kernel"]),
        (model.model.layers[0].mlp.down_proj, ours["block_0"]["ffn"]["down"]["kernel"]),
    ):
        assert isinstance(layer, AutoBitLinear)
        grad_IO = layer.weight.grad.numpy().T
        assert np.abs(grad_IO).max() > 1e-3
        np.testing.assert_allclose(grad_IO, ours_IO, rtol=1e-3, atol=1e-5)


def test_the_tokenizer_gives_the_same_ids_and_text(simple, tokenizer, tmp_path):
    folder = exported(tmp_path / "out", simple, tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "The cat's mat,\n\n   sat  on 1234 é🙂"
    ids = tokenizer.encode_batch([text])[0]
    assert theirs(text)["input_ids"] == ids.tolist()
    assert theirs.decode(ids) == text == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.end_of_text and len(theirs) == tokenizer.vocab_size


def test_what_transformers_saves_again_is_read_back_exactly(simple, tokenizer, tmp_path):
    folder = exported(tmp_path / "out", simple, tokenizer)
    torch_side.load(folder).save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "again")
    cfg, params, _ = hf.load(tmp_path / "again")
    assert cfg.model == simple[0].model
    assert jax.tree.all(jax.tree.map(np.array_equal, params, simple[1]))


def test_scales_are_values_for_autobitlinear_and_inverses_for_bitlinear(
    simple, tokenizer, tmp_path
):
    """A folder of the other convention has the same logits; the wrong one is far off."""
    cfg, params, tokens_BL = simple
    folder = exported(tmp_path / "out", simple, tokenizer, packed=True)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["linear_class"] = "bitlinear"
    (folder / "config.json").write_text(json.dumps(settings))
    model = torch_side.load(folder)
    assert isinstance(model.model.layers[0].mlp.down_proj, BitLinear)
    ours_BLV, tokens = hf_models.logits(cfg, params, tokens_BL), torch.tensor(tokens_BL).long()
    with torch.no_grad():
        mixed_up_BLV = model(tokens).logits.numpy()
    assert np.abs(mixed_up_BLV - ours_BLV).max() > 0.1

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    inverted = {k: 1 / x if k.endswith("weight_scale") else x for k, x in tensors.items()}
    safetensors.numpy.save_file(inverted, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        theirs_BLV = torch_side.load(folder)(tokens).logits.numpy()
    np.testing.assert_allclose(theirs_BLV, ours_BLV, rtol=0, atol=1e-4)
    values = hf.load(folder)[1]["block_0"]["ffn"]["down"]["scale"]
    latents = params["block_0"]["ffn"]["down"]["kernel"]
    np.testing.assert_allclose(values, np.abs(latents).mean(), rtol=1e-6)


def rewritten(folder, settings=None, **tensors):
    """The folder with other fields of config.json and other tensors."""
    hf_models.edit_json(folder / "config.json", **settings or {})
    stored = hf_models.tensors_of(folder) | {k.replace("/", "."): w for k, w in tensors.items()}
    hf_models.write_tensors(folder, stored)
    return folder


def both_logits(folder, tokens_BL):
    """Logits of the folder, ours and theirs."""
    theirs_BLV = torch_side.expected(folder, tokens_BL)["logits"]
    return hf_models.logits(*hf.load(folder)[:2], tokens_BL), theirs_BLV


def test_codes_stored_as_floats_are_what_transformers_makes_of_them(simple, tokenizer, tmp_path):
    """Offline, a weight of full size is taken as it is; its scale multiplies the output."""
    folder = exported(tmp_path / "out", simple, tokenizer, packed=True)
    packed = {k: w for k, w in hf_models.tensors_of(folder).items() if w.dtype == np.uint8}
    floats = {k: np.float32(quant.unpack_ternary(w.T)).T for k, w in packed.items()}
    ours_BLV, theirs_BLV = both_logits(rewritten(folder, **floats), simple[2])
    np.testing.assert_allclose(ours_BLV, theirs_BLV, rtol=0, atol=1e-4)


def test_online_transformers_quantises_three_valued_matrices_again(simple, tokenizer, tmp_path):
    """Here they keep their scale, so the logits are those of the packed folder, not theirs."""
    folder = exported(tmp_path / "out", simple, tokenizer)
    kernels = {k: w for k, w in hf_models.tensors_of(folder).items() if "_proj" in k}
    ternary = {k: np.asarray(quant.quantize_weight(w, 1.0, np.float32)) for k, w in kernels.items()}
    before_BLV = hf_models.logits(*simple)
    ours_BLV, theirs_BLV = both_logits(rewritten(folder, **ternary), simple[2])
    np.testing.assert_allclose(ours_BLV, before_BLV, rtol=0, atol=1e-4)
    layer = torch_side.load(folder).model.layers[0].mlp.down_proj
    again = WeightQuant.apply(layer.weight).abs().max()
    assert again < 0.8 * layer.weight.abs().max()
    assert np.abs(theirs_BLV - before_BLV).max() > 0.01


def test_padding_rows_have_logits_there_too(simple, tokenizer, tmp_path):
    folder = exported(tmp_path / "out", simple, tokenizer)
    rng = np.random.default_rng(0)
    rows = {
        key: np.concatenate([w, rng.normal(0, 0.3, (24, w.shape[1])).astype(np.float32)])
        for key, w in hf_models.tensors_of(folder).items()
        if key in ("lm_head.weight", "model.embed_tokens.weight")
    }
    folder = rewritten(folder, {"vocab_size": hf_models.V + 24}, **rows)
    ours_BLV, theirs_BLV = both_logits(folder, simple[2])
    assert ours_BLV.shape[-1] == hf_models.V + 24
    np.testing.assert_allclose(ours_BLV, theirs_BLV, rtol=0, atol=1e-4)


def test_the_head_is_quantised_there_when_a_list_of_exceptions_leaves_it_out(
    simple, tokenizer, tmp_path
):
    """Which is why such a list is refused here, and null or a list with the head is not."""
    folder = exported(tmp_path / "out", simple, tokenizer)
    quantised = json.loads((folder / "config.json").read_text())["quantization_config"]
    for names, is_quantised in (([], True), (["lm_head"], False), (None, False)):
        changed = quantised | {"modules_to_not_convert": names}
        rewritten(folder, {"quantization_config": changed})
        assert isinstance(torch_side.load(folder).lm_head, AutoBitLinear) == is_quantised
        if is_quantised:
            assert "lm_head is not named" in hf_models.message(folder)
        else:
            hf.load(folder)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_weights_are_the_same_model(simple, tokenizer, tmp_path, stored):
    """transformers, told to compute in float32, as we do for float16."""
    folder = exported(tmp_path / "out", simple, tokenizer)
    dtype = np.float16 if stored == "float16" else ml_dtypes.bfloat16
    halves = {key: w.astype(dtype) for key, w in hf_models.tensors_of(folder).items()}
    ours_BLV, theirs_BLV = both_logits(rewritten(folder, **halves), simple[2])
    close = np.isclose(ours_BLV, theirs_BLV, rtol=0, atol=1e-4)
    assert close.all(axis=-1).mean() > 0.5  # rounding moves a few positions over a code's edge
    assert np.abs(ours_BLV - theirs_BLV).max() < 0.2


@pytest.mark.parametrize("way", ["prepend", "metaspace"])
def test_a_sentencepiece_tokenizer_gives_the_same_ids_and_text(tmp_path, way):
    spm = hf_models.save_sentencepiece_like(tmp_path, way=way)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (hf_models.WORDS, "  the   cat\n\n\tsat é🙂 日本 <s> x"):
        ids = spm.encode_prompt(text, special=True)
        assert theirs(text)["input_ids"] == ids.tolist()
        assert theirs.decode(ids[1:]) == spm.decode(ids[1:])[1:]
    spm.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("the cat")["input_ids"][0] == 1
