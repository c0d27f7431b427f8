"""Hugging Face folders: what transformers gave for them, both directions, and damaged ones.

tests/fixtures/hf was written by tests/parity/make_golden.py with transformers and torch.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import hf_models
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hf_models import (
    GOLDEN,
    LATENTS,
    PACKED,
    edit_json,
    message,
    same,
    shard,
    tensors_of,
    write_tensors,
)

from bitnet_jax import hf, presets, program, quant, restore, tokenizer
from bitnet_jax.config import Config, Hyper, ModelConfig
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import INDEX, WEIGHTS

PUBLISHED = ModelConfig(  # microsoft/bitnet-b1.58-2B-4T
    vocab_size=128256, d_model=2560, n_layers=30, n_heads=20, n_kv_heads=5, d_ff=6912
)


@pytest.fixture
def copy(tmp_path):
    """Copy a golden folder to a place where it can be damaged."""

    def copy(source=LATENTS):
        return Path(shutil.copytree(source, tmp_path / "folder"))

    return copy


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_logits_loss_and_greedy_text_are_those_of_transformers(folder):
    expected = np.load(folder / "expected.npz")
    cfg, params, _ = hf.load(folder)
    tokens_BL = expected["tokens"]
    logits_BLV = hf_models.logits(cfg, params, tokens_BL)
    np.testing.assert_allclose(logits_BLV, expected["logits"], rtol=0, atol=1e-4)
    assert hf_models.mean_loss(logits_BLV, tokens_BL) == pytest.approx(float(expected["loss"]))
    greedy_BN = hf_models.greedy(cfg, params, tokens_BL)
    assert (greedy_BN == expected["greedy"]).all() and len(np.unique(greedy_BN)) > 9


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_what_is_read_is_written_again(folder, tmp_path):
    """Master weights bitwise, and codes that are not quantised a second time."""
    cfg, params, tok = hf.load(folder)
    packed = cfg.model.weight_format == "packed"
    assert packed == (folder == PACKED)
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok, packed=packed)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"expected.npz"}
    for name in names:
        written, read = ((place / name).read_bytes() for place in (tmp_path / "out", folder))
        if name.endswith(".json"):  # the order of fields is of no account
            written, read = json.loads(written), json.loads(read)
        assert written == read, name
    again = hf.load(tmp_path / "out")
    assert again[0].model == cfg.model and same(again[1], params) and again[2].key == tok.key


def test_packed_weights_are_the_ternary_weights_of_training(tmp_path):
    cfg, params, tok = hf.load(LATENTS)
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok, packed=True)
    packed_cfg, packed, _ = hf.load(tmp_path / "out")
    assert packed_cfg.model == replace(cfg.model, weight_format="packed")
    latents, arrays = flatten_dict(params, sep="/"), flatten_dict(packed, sep="/")
    assert same(arrays["head/kernel"], latents["head/kernel"])
    for name in ("block_0/attn/k", "block_0/ffn/gate", "block_0/ffn/down"):
        codes_IO = quant.unpack_ternary(arrays[f"{name}/packed"])
        w = quant.quantize_weight(latents[f"{name}/kernel"], 1.0, np.float32)
        assert (codes_IO * arrays[f"{name}/scale"] == w).all() and len(np.unique(w)) == 3
        assert arrays[f"{name}/scale"].shape == () and arrays[f"{name}/packed"].dtype == np.uint8


def test_four_row_blocks_share_a_byte_in_the_file(tmp_path):
    """As transformers' `unpack_weights` reads them: output r + i * R of byte row r at bits 2i."""
    cfg, params, tok = hf.load(LATENTS)
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok, packed=True)
    packed = tensors_of(tmp_path / "out")["model.layers.0.mlp.gate_proj.weight"]
    latents_OI = params["block_0"]["ffn"]["gate"]["kernel"].T
    codes_OI = np.sign(np.round(latents_OI / np.abs(latents_OI).mean()))
    rows = packed.shape[0]
    assert packed.dtype == np.uint8 and packed.shape == (12, 24)
    for i in range(4):
        codes = (packed >> 2 * i & 3).astype(int) - 1
        assert (codes == codes_OI[i * rows : (i + 1) * rows]).all()


def test_the_scale_of_an_autobitlinear_is_a_value_and_of_a_bitlinear_an_inverse(copy):
    """Both are `weight_scale`: only `linear_class` tells 0.15 from 1 / 0.15."""
    folder = copy(PACKED)
    _, value, _ = hf.load(folder)
    quantised = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=quantised | {"linear_class": "bitlinear"})
    _, inverse, _ = hf.load(folder)
    a, b = (tree["block_0"]["attn"]["q"]["scale"] for tree in (value, inverse))
    assert 0.1 < a < 0.3 and b == np.float32(1) / a


def test_the_published_model_has_its_parameters_and_no_other_names():
    shapes = hf.shapes(PUBLISHED)
    assert sum(np.prod(shape) for shape in shapes.values()) == 2_412_820_480
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    for i in range(30):
        names |= {
            f"model.layers.{i}.{name}.weight"
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
                "self_attn.attn_sub_norm",
                *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj", "ffn_sub_norm")),
            )
        }
    assert {hf.hf_key(name) for name in shapes} == names
    packed = hf.shapes(replace(PUBLISHED, weight_format="packed"))
    scales = {name.replace("weight", "weight_scale") for name in names if "_proj" in name}
    assert {hf.hf_key(name) for name in packed} == names | scales
    assert packed["block_29/ffn/down/packed"] == (6912, 640)


def test_shards_of_bfloat16_are_read_as_published(copy):
    """float32 holds what bfloat16 held; the model computes in bfloat16."""
    folder = copy()
    rounded = {k: w.astype(ml_dtypes.bfloat16) for k, w in tensors_of(folder).items()}
    shard(folder, rounded)
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    cfg, params, _ = hf.load(folder)
    assert cfg.model.dtype == "bfloat16" and cfg.model.n_kv_heads == 2
    params_by_key = {hf.hf_key(name): w for name, w in flatten_dict(params, sep="/").items()}
    for key, w in rounded.items():
        ours = params_by_key[key].T if w.ndim == 2 and "embed" not in key else params_by_key[key]
        assert ours.dtype == np.float32 and (ours == w.astype(np.float32)).all(), key


def test_a_stripped_quantization_config_is_warned_of_and_read_as_a_bitnet(copy, capsys):
    folder = copy()
    edit_json(folder / "config.json", quantization_config=...)
    cfg, params, _ = hf.load(folder)
    warning = capsys.readouterr().err
    assert warning.startswith(f"WARNING: {folder}: config.json has no quantization_config")
    assert cfg.model.weight_format == "ternary" and same(params, hf.load(LATENTS)[1])
    assert not capsys.readouterr().err


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "expected_error"),
    [
        ({"model.layers.1.mlp.bias": np.zeros(3)}, "unknown key model.layers.1.mlp.bias"),
        ({Q: None}, f"missing key {Q} (1 missing in all)"),
        ({Q: np.zeros((24, 23), np.float32)}, f"{Q} has shape (24, 23)"),
        ({Q: np.zeros((24, 24), np.int32)}, f"{Q} is int32; expected float32"),
        ({Q: np.zeros((6, 24), np.uint8)}, f"{Q} is uint8; expected float32"),
    ],
    ids=["unknown", "missing", "shape", "dtype", "codes"],
)
def test_keys_that_do_not_fit_are_named(copy, change, expected_error):
    folder = copy()
    write_tensors(folder, tensors_of(folder) | change)
    assert expected_error in message(folder)


def test_codes_that_are_not_ternary_or_not_codes_are_named(copy):
    folder = copy(PACKED)
    tensors = tensors_of(folder)
    for wrong, expected_error in (
        (tensors[Q] | 0b1100, f"{Q} holds the code 3"),
        (tensors[Q].astype(np.int32), f"{Q} is int32; expected uint8"),
    ):
        write_tensors(folder, tensors | {Q: wrong})
        assert expected_error in message(folder)
    write_tensors(folder, tensors)
    edit_json(folder / "config.json", quantization_config=...)
    assert "unknown key model.layers.0.mlp.down_proj.weight_scale" in message(folder)


def test_damaged_shards_are_named(copy):
    folder = copy()
    shard(folder, tensors_of(folder))
    first, second = sorted(folder.glob("model-*"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert f"{second.name}: truncated or damaged" in message(folder)
    second.write_bytes(first.read_bytes())
    assert f"duplicate key {min(safetensors.numpy.load(whole) | tensors_of_file(first))}" in (
        message(folder)
    )
    second.unlink()
    assert f"missing shard {second.name}" in message(folder)
    (folder / INDEX).unlink()
    assert f"neither {WEIGHTS} nor {INDEX}" in message(folder)


def tensors_of_file(path):
    return safetensors.numpy.load_file(path)


@pytest.mark.parametrize(
    ("model", "hyper", "packed", "expected_error"),
    [
        ({"layout": "report"}, {}, False, "model.layout=report"),
        ({"output_bias": True}, {}, False, "model.output_bias=true"),
        ({"weight_format": "packed"}, {}, False, "only codes are left"),
        ({"d_ff": 46}, {}, True, "outputs; packing needs a multiple of 4"),
        ({"vocab_size": 260}, {}, False, "model.vocab_size=260"),
        ({}, {"logit_scale": 0.5}, False, "hyper.logit_scale=0.5"),
        ({}, {"weight_quant": 0.5}, False, "hyper.weight_quant=0.5"),
        ({}, {"act_quant": 0.0}, False, "hyper.act_quant=0"),
        ({}, {"weight_quant": 0.0, "act_quant": 0.0}, True, "a dense model"),
    ],
    ids=str,
)
def test_what_transformers_cannot_express_is_refused_with_the_reason(
    tmp_path, model, hyper, packed, expected_error
):
    cfg, params, tok = hf.load(LATENTS)
    cfg = replace(cfg, model=replace(cfg.model, **model))
    if "d_ff" in model:
        params["block_0"]["ffn"]["gate"]["kernel"] = np.ones((24, model["d_ff"]), np.float32)
    with pytest.raises(UserError) as caught:
        hf.export(tmp_path / "out", cfg, params, Hyper(**hyper), tok, packed=packed)
    assert expected_error in str(caught.value) and not any(tmp_path.iterdir())


def test_a_parameter_without_a_place_is_named():
    with pytest.raises(UserError, match="parameter block_0/attn/qkv/kernel: "):
        hf.hf_key("block_0/attn/qkv/kernel")


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    cfg, params, tok = hf.load(LATENTS)
    taken = tmp_path / "taken"
    taken.mkdir()
    hf.export(taken, cfg, params, Hyper(), tok)  # into an empty folder
    before = (taken / "config.json").read_bytes()
    with pytest.raises(UserError, match="taken: exists and is not empty"):
        hf.export(taken, replace(cfg, model=PUBLISHED), params, Hyper(), tok)
    assert (taken / "config.json").read_bytes() == before

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(UserError, match=r"new: cannot be written: .*No space left"):
        hf.export(tmp_path / "new", cfg, params, Hyper(), tok)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_is_a_tokenizer():
    """With the end of text that its tokenizer_config.json names."""
    tok = tokenizer.load_tokenizer(f"hf:{LATENTS}", "", lambda: iter(()))
    assert tok.vocab_size == hf_models.V and tok.name == f"hf:{LATENTS}"
    ids = tok.encode_batch(["the cat<|endoftext|>"])[0]
    assert tok.end_of_text not in ids and tok.decode(ids) == "the cat<|endoftext|>"
    assert tok.token_bytes_V[ids].sum() == len("the cat<|endoftext|>")


@pytest.fixture
def imported(tiny, tmp_path):
    """A configuration that starts from a folder, and the parameters in it."""
    cfg = replace(tiny, model=replace(tiny.model, n_layers=1))
    built = program.build(cfg, presets.make_replicates(cfg, [7], {}))
    params = jax.tree.map(lambda x: np.asarray(x[0]), built.init().params)
    hf.export(tmp_path / "hf", built.cfg, params, Hyper(), built.tokens.tokenizer)
    return replace(cfg, run=replace(cfg.run, init=f"hf:{tmp_path / 'hf'}")), params


def start(cfg):
    built = program.build(cfg, presets.make_replicates(cfg, [0], {}))
    return built, *restore.start_state(built, Path("nowhere"))


def test_training_starts_from_a_folder_with_a_new_optimiser(imported):
    """Every replicate has its weights; sizes are measured against them."""
    cfg, params = imported
    built, state, step = start(cfg)
    assert step == 0 and len(built.replicates) == 2
    for i in range(2):
        assert same(jax.tree.map(lambda x, i=i: x[i], state.params), params)
    assert same(state.opt_state, built.init().opt_state)
    embedding = np.linalg.norm(params["embed"]["embedding"])
    np.testing.assert_allclose(state.init_norm["embedding"], embedding, rtol=1e-6)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, shardings, built.state_sharding))


def test_a_folder_that_does_not_fit_the_run_is_refused_with_the_fields(imported, tmp_path):
    cfg, params = imported
    wider = replace(cfg, model=replace(cfg.model, d_ff=128, n_kv_heads=1))
    with pytest.raises(UserError, match=r"; add --set model.n_kv_heads=2 --set model.d_ff=64$"):
        start(wider)
    other = replace(cfg, data=replace(cfg.data, tokenizer=f"hf:{PACKED}"))
    with pytest.raises(UserError, match=rf"not its tokenizer.* --set data.tokenizer=hf:{tmp_path}"):
        start(other)
    *_, tok = hf.load(tmp_path / "hf")
    full = replace(Config(cfg.model), model=replace(cfg.model, vocab_size=tok.vocab_size))
    hf.export(tmp_path / "packed", full, params, Hyper(), tok, packed=True)
    with pytest.raises(UserError, match="packed weights cannot be trained"):
        start(replace(cfg, run=replace(cfg.run, init=f"hf:{tmp_path / 'packed'}")))
    with pytest.raises(UserError, match=r"no config.json"):
        start(replace(cfg, run=replace(cfg.run, init=f"hf:{tmp_path / 'none'}")))
