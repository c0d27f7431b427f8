"""Numbers in Hugging Face folders: refused, kept as the codes that they are, or warned of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_models import (
    LATENTS,
    PACKED,
    TIED,
    edit_json,
    message,
    same,
    tensors_of,
    write_tensors,
)

from bitnet_jax import (
    checkpoint,
    config_file,
    generate,
    hf,
    hf_files,
    log,
    presets,
    program,
    quant,
    restore,
)
from bitnet_jax.cli import convert
from bitnet_jax.config import Config, Hyper
from bitnet_jax.fields import UserError

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def copy(tmp_path):
    """Copy a golden folder to a place where it can be changed; returns it and its tensors."""

    def copy(source=LATENTS):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        folder = Path(shutil.copytree(source, tmp_path / "folder"))
        return folder, tensors_of(folder)

    return copy


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def floats_of(tensors, scale=None):
    """Packed codes as [out, in] floats: -s, 0, s, or codes where `scale` is given."""
    floats = dict(tensors)
    for key, packed in tensors.items():
        if packed.dtype == np.uint8:
            codes_OI = np.asarray(quant.unpack_ternary(packed.T)).T.astype(np.float32)
            floats[key] = codes_OI * (floats.pop(f"{key}_scale") if scale is None else scale)
    return floats


@pytest.mark.parametrize("key", [Q, NORM, EMBEDDING, HEAD])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_place(copy, key, value):
    folder, tensors = copy()
    place = (7,) * tensors[key].ndim
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        write_tensors(folder, tensors | {key: changed(tensors[key], place, value).astype(dtype)})
        assert f"{key} is {value} at {list(place)} (1 of {tensors[key].size}" in message(folder)


def test_a_float64_that_float32_cannot_hold_is_refused(copy):
    folder, tensors = copy()
    write_tensors(folder, tensors | {Q: changed(tensors[Q].astype(np.float64), (0, 1), 1e300)})
    assert f"{Q} is inf at [0, 1]" in message(folder)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("value", [0, -0.1, np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_positive_and_finite_is_refused(copy, value, linear_class):
    folder, tensors = copy(PACKED)
    quantised = {"quant_method": "bitnet", "linear_class": linear_class}
    edit_json(folder / "config.json", quantization_config=quantised)
    write_tensors(folder, tensors | {f"{Q}_scale": np.array([value], np.float32)})
    assert f"{Q}_scale is {value:g}" in message(folder)


def test_a_scale_whose_inverse_is_infinite_is_refused(copy):
    folder, tensors = copy(PACKED)
    write_tensors(folder, tensors | {f"{Q}_scale": np.array([1e-45], np.float32)})
    assert hf.load(folder)[1]["block_0"]["attn"]["q"]["scale"] > 0
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"},
    )
    assert f"{Q}_scale is 1.4013e-45" in message(folder)


@pytest.mark.parametrize("value", [0, 0.3, -2.0])
def test_a_matrix_of_one_code_is_loaded_and_named(copy, capsys, value):
    folder, tensors = copy()
    write_tensors(folder, tensors | {DOWN: np.full_like(tensors[DOWN], value)})
    hf.load(folder)
    warning = capsys.readouterr().err.splitlines()[0]
    assert DOWN in warning and Q not in warning


def test_packed_matrices_embeddings_and_gains_without_information_are_named(copy, capsys):
    folder, tensors = copy(PACKED)
    dead = {
        Q: np.full_like(tensors[Q], 0b10101010),
        EMBEDDING: np.zeros_like(tensors[EMBEDDING]),
        NORM: np.zeros_like(tensors[NORM]),
    }
    write_tensors(folder, tensors | dead)
    hf.load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(key in line for key in dead) and DOWN not in line
    write_tensors(folder, tensors | {Q: np.full_like(tensors[Q], 0b10011001)})
    hf.load(folder)
    assert not capsys.readouterr().err


def test_a_healthy_folder_is_loaded_without_a_word(capsys):
    for folder in (LATENTS, PACKED, TIED):
        hf.load(folder)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_matrices_of_three_values_stay_the_codes_that_they_are(copy, capsys, dtype):
    """Quantised again, each scale would shrink by the share of zeros."""
    folder, tensors = copy(PACKED)
    cfg, params, _ = hf.load(folder)
    latents = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    edit_json(folder / "config.json", quantization_config=latents | {"quantization_mode": "online"})
    write_tensors(folder, {key: w.astype(dtype) for key, w in floats_of(tensors).items()})
    again_cfg, again, _ = hf.load(folder)
    assert again_cfg.model == cfg.model and again_cfg.model.weight_format == "packed"
    codes, reloaded = flatten_dict(params, sep="/"), flatten_dict(again, sep="/")
    assert reloaded.keys() == codes.keys()
    for name, array in codes.items():
        if name.endswith("/packed"):
            assert (reloaded[name] == array).all() and reloaded[name].dtype == np.uint8, name
        elif array.shape == ():
            assert reloaded[name] == array.astype(dtype).astype(np.float32), name
    line = capsys.readouterr().err
    scale = reloaded["block_0/ffn/down/scale"]
    assert "14 of 14 matrices hold three values" in line and f"the scale {scale:.4g} of" in line


def test_a_dense_folder_of_three_valued_matrices_is_packed_too(copy, capsys):
    folder, tensors = copy(PACKED)
    edit_json(folder / "config.json", quantization_config=...)
    write_tensors(folder, floats_of(tensors))
    cfg, params, _ = hf.load(folder)
    assert cfg.model.weight_format == "packed" and same(params, hf.load(PACKED)[1])
    assert hf.strengths(folder, cfg.model) == Hyper()
    assert "no quantization_config" in capsys.readouterr().err.splitlines()[0]


def test_a_dense_folder_is_evaluated_as_transformers_runs_it(copy, capsys):
    folder, _ = copy(LATENTS)
    assert restore.load_model(str(folder)).hyper == Hyper()
    edit_json(folder / "config.json", quantization_config=...)
    model = restore.load_model(str(folder))
    assert model.hyper == Hyper(weight_quant=0.0, act_quant=0.0)
    assert "a dense model" in capsys.readouterr().err


def test_one_matrix_of_three_values_keeps_its_scale_and_the_others_are_quantised(copy):
    folder, tensors = copy()
    values = 0.25 * np.sign(np.round(tensors[DOWN] / np.abs(tensors[DOWN]).mean()))
    dead = np.zeros_like(tensors[Q])
    write_tensors(folder, tensors | {DOWN: values, Q: dead})
    block = hf.load(folder)[1]["block_0"]
    assert block["ffn"]["down"]["scale"] == np.float32(0.25)
    assert (quant.unpack_ternary(block["ffn"]["down"]["packed"]) * 0.25 == values.T).all()
    assert not np.asarray(quant.unpack_ternary(block["attn"]["q"]["packed"])).any()
    up = hf.load(LATENTS)[1]["block_0"]["ffn"]["up"]["kernel"]
    dequantised = quant.unpack_ternary(block["ffn"]["up"]["packed"]) * block["ffn"]["up"]["scale"]
    np.testing.assert_array_equal(dequantised, quant.quantize_weight(up, 1.0, np.float32))


def test_offline_codes_may_be_stored_one_by_one(copy):
    """As transformers runs them: weight times `weight_scale`, whatever 1 is stored as."""
    folder, tensors = copy(PACKED)
    for factor, dtype in ((1, np.int8), (1, ml_dtypes.bfloat16), (4, np.float32)):
        codes = floats_of(tensors, factor)
        scales = {key: w / factor for key, w in tensors.items() if key.endswith("_scale")}
        stored = {k: w.astype(dtype) for k, w in codes.items() if tensors[k].dtype == np.uint8}
        write_tensors(folder, tensors | stored | scales)
        assert same(hf.load(folder)[1], hf.load(PACKED)[1]), dtype
    write_tensors(folder, tensors | stored | {Q: changed(stored[Q], (0, 0), 0.5)})
    assert f"{Q} holds other values than three" in message(folder)


def test_a_head_that_repeats_the_tied_embedding_is_accepted_and_another_is_not(copy):
    folder, tensors = copy(TIED)
    write_tensors(folder, tensors | {HEAD: tensors[EMBEDDING]})
    assert same(hf.load(folder)[1], hf.load(TIED)[1])
    for other in (changed(tensors[EMBEDDING], (3, 4), 9), tensors[EMBEDDING][:-1]):
        write_tensors(folder, tensors | {HEAD: other})
        assert f"{HEAD} differs from {EMBEDDING}" in message(folder)
    write_tensors(folder, tensors)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "tie_word_embeddings=true missing" in message(folder)


def test_stored_rotary_frequencies_are_passed_over(copy):
    folder, tensors = copy()
    frequencies = {
        f"model.{place}rotary_emb.inv_freq": np.ones(3, np.float32)
        for place in ("", "layers.0.self_attn.")
    }
    write_tensors(folder, tensors | frequencies)
    assert same(hf.load(folder)[1], hf.load(LATENTS)[1])


def padded(folder, tensors, n):
    edit_json(folder / "config.json", vocab_size=hf_models.V + n)
    rows = {k: np.pad(tensors[k], ((0, n), (0, 0)), constant_values=0.5) for k in (EMBEDDING, HEAD)}
    write_tensors(folder, tensors | rows)


def test_rows_beyond_the_tokenizer_are_padding_that_comes_back(copy, tmp_path):
    """The first logits do not change, and the folder is written as it was."""
    folder, tensors = copy()
    padded(folder, tensors, 8)
    cfg, params, tok = hf.load(folder)
    assert cfg.model.vocab_size == hf_models.V + 8 and tok.vocab_size == hf_models.V
    tokens_BL = np.arange(2, 26).reshape(2, 12)
    whole = hf_models.logits(*hf.load(LATENTS)[:2], tokens_BL)
    np.testing.assert_allclose(hf_models.logits(cfg, params, tokens_BL)[..., :-8], whole, atol=1e-5)
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok)
    assert same(tensors_of(tmp_path / "out"), tensors_of(folder))


def test_padding_is_never_sampled_and_its_folder_trains(copy, tiny):
    """Rows that would win, were they allowed to."""
    folder, tensors = copy()
    padded(folder, tensors, 8)
    cfg, params, tok = hf.load(folder)
    params["head"]["kernel"][:, tok.vocab_size :] *= 40
    logits_BV = hf_models.logits(cfg, params, np.arange(2, 26).reshape(2, 12))[:, -1]
    assert (logits_BV.argmax(axis=-1) >= tok.vocab_size).any()
    keys, seen = jax.random.split(jax.random.key(0), 2), np.zeros(logits_BV.shape, bool)
    for temperature in (0.0, 1.0):
        sampling = generate.Sampling(temperature=temperature)
        anything = generate.choose(jnp.asarray(logits_BV), seen, keys, sampling)
        sampling = sampling.replace(n_tokens=tok.vocab_size)
        chosen = generate.choose(jnp.asarray(logits_BV), seen, keys, sampling)
        assert (anything >= tok.vocab_size).any() and (chosen < tok.vocab_size).all()
    cfg = replace(
        tiny,
        model=replace(cfg.model, dtype=tiny.model.dtype),
        data=replace(tiny.data, tokenizer=f"hf:{folder}"),
        run=replace(tiny.run, init=f"hf:{folder}"),
    )
    built = program.build(cfg, presets.make_replicates(cfg, [0], {}))
    state, _ = restore.start_state(built, Path("nowhere"))
    assert np.isfinite(built.evaluate(state)["eval/loss"]).all()
    with pytest.raises(UserError, match=r"model.vocab_size=300"):
        too_few = replace(cfg, model=replace(cfg.model, vocab_size=300))
        program.resolve_vocab(replace(too_few, data=tiny.data), 264)


def test_a_replicate_that_diverged_is_not_exported(tmp_path):
    cfg, params, tok = hf.load(LATENTS)
    params["block_0"]["ffn"]["up"]["kernel"][2, 3] = np.nan
    with pytest.raises(UserError, match=r"block_0/ffn/up/kernel is nan at \[2, 3\]"):
        hf.export(tmp_path / "out", cfg, params, Hyper(), tok)
    assert not any(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_told():
    assert hf.loss_fault(Path("x"), 2.5) is None
    assert all(str(v) in hf.loss_fault(Path("x"), v) for v in (float("nan"), float("inf")))


def test_an_export_that_fails_leaves_nothing_of_its_own(tmp_path, monkeypatch):
    """Nor the folders above it; a file of the same place that was there stays."""
    cfg, params, tok = hf.load(LATENTS)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(UserError):
            hf.export(place, cfg, params, Hyper(), tok)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.safetensors.numpy, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        hf.export(tmp_path / "a" / "b" / "new", cfg, params, Hyper(), tok)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_model_card_tells_the_facts_that_are_known(tmp_path):
    cfg, params, tok = hf.load(LATENTS)
    facts = hf_files.Card(
        "runs/a|b\n@500:1", "published", 3, 500, 1000, 64_000, 4.25, 5.5, 4.75, commit="abc"
    )
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok, card=facts)
    text = (tmp_path / "out" / "README.md").read_text()
    n_parameters = sum(w.size for w in flatten_dict(params, sep="/").values())
    table = text[text.index("|---|---|\n") + 10 : text.index("\n\n```")]
    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines())
    assert rows["parameters"] == f"{n_parameters:,}" and rows["recipe"] == "published"
    assert rows["held-out loss, nats per token"] == "4.2500" and "text" not in rows
    assert rows["steps"] == "500 of 1,000" and "a&#124;b" in rows["run"]
    hf.export(tmp_path / "packed", cfg, params, Hyper(), tok, packed=True, card=facts)
    assert f"{n_parameters:,}" in (tmp_path / "packed" / "README.md").read_text()
    assert hf.load(tmp_path / "out")[0] == Config(
        cfg.model, replace(cfg.data, tokenizer=f"hf:{tmp_path / 'out'}")
    )


def test_the_card_of_a_run_has_the_loss_of_the_exported_step(tmp_path, monkeypatch):
    """Of the large block where there is one, beside the predictors on the same positions."""
    cfg = presets.preset("tiny")
    described = config_file.to_json(cfg, presets.make_replicates(cfg, [4], {})) | {
        "references": {"unigram": {"loss": 5.5}, "bigram": {"loss": 5.25}},
        "corpus": {"source": "text:a", "sha256": "00ff"},
        "provenance": {"git_commit": None},
    }
    rows = [
        {"step": 5, "replicate": 1, "kind": "eval", "eval/loss": 5.0},
        {"step": 5, "replicate": 0, "kind": "eval", "eval/loss": 9.0},
        {"step": 20, "replicate": 1, "kind": "eval", "eval/loss": 4.0, "held_out/loss": 4.5}
        | {"held_out/minus_unigram": -1.25, "held_out/minus_bigram": -0.5},
        {"step": 20, "replicate": 1, "kind": "train", "train/loss": 3.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load_config(workdir, step):
        """As a checkpoint of `step` holds it, with the rows up to then."""
        size = sum(len(json.dumps(row)) + 1 for row in rows if row["step"] <= step)
        return described | {"metrics": log.seal(path, size)}

    monkeypatch.setattr(checkpoint, "load_config", load_config)
    early, last = (convert.run_card(tmp_path, step, 1) for step in (5, 20))
    assert (early.loss, early.unigram, early.bigram) == (5.0, 5.5, 5.25)
    assert (last.loss, last.unigram, last.bigram) == (4.5, 5.75, 5.0)
    assert (last.recipe, last.seed, last.step, last.steps) == (cfg.run.recipes[1], 4, 20, 20)
    assert last.tokens == 20 * cfg.data.batch_size * cfg.data.seq_len
    assert "text:a" in last.text and last.commit is None
    assert convert.run_card(tmp_path, 10, 1).loss is None


def test_every_end_and_the_begin_of_a_tokenizer_is_written(tmp_path):
    cfg, params, tok = hf.load(LATENTS)
    tok = replace(tok, ends=(tok.end_of_text, 7, 9), begin=(5,))
    hf.export(tmp_path / "out", cfg, params, Hyper(), tok)
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((tmp_path / "out" / name).read_text())
        assert tree["eos_token_id"] == [tok.end_of_text, 7, 9] and tree["bos_token_id"] == 5
    assert hf.load(tmp_path / "out")[2].ends == tok.ends
