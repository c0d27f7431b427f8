"""config.json and index files of Hugging Face folders: read as transformers reads them."""

import copy as copies
import json
import random
import shutil
from pathlib import Path

import pytest
import transformers
from hf_models import LATENTS, PACKED, TIED, edit_json, message, shard, tensors_of

from bitnet_jax import hf, hf_config
from bitnet_jax.config import rope_scaling_numbers
from bitnet_jax.fields import UserError
from bitnet_jax.hf_files import INDEX, WEIGHTS

CONFIG = json.loads((LATENTS / "config.json").read_text())
QUANTISED = CONFIG["quantization_config"]


@pytest.fixture
def copy(tmp_path):
    """Copy a golden folder to a place where it can be damaged."""

    def copy(source=LATENTS):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        return Path(shutil.copytree(source, tmp_path / "folder"))

    return copy


SCALED = {"rope_type": "llama3"} | dict(zip(hf_config.LLAMA3, (8.0, 1.0, 4.0, 16), strict=True))


def kept(*names):
    return {"quantization_config": QUANTISED | {"modules_to_not_convert": list(names)}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": ...},
        {"rope_parameters": ...},
        {"rope_theta": ..., "rope_parameters": ...},
        {"rope_theta": 7, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.5, "rope_parameters": {}},
        {"rope_theta": 7.5, "rope_parameters": None},
        {"rope_theta": 7.5, "rope_parameters": {"rope_theta": 9.5}},
        {"rope_theta": 7.5, "rope_parameters": {"rope_theta": 9.5}, "rope_scaling": None},
        {"rope_theta": 7.5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 7.5, "rope_scaling": {"rope_type": "default", "rope_theta": 8}},
        {"rope_theta": 7.5, "rope_scaling": SCALED},
        {"rope_parameters": SCALED | {"rope_theta": 8}},
        {"tie_word_embeddings": ...},
        {"rms_norm_eps": ...},
        {"rms_norm_eps": 1e-6},
        {"hidden_act": ..., "attention_bias": ...},
        {"max_position_embeddings": ...},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "bfloat16", "dtype": "float32"},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"head_dim": 6},
        {"use_cache": False, "architectures": None, "auto_map": {"AutoConfig": "x.Y"}},
    ],
    ids=str,
)
def test_the_same_model_as_transformers_reads(copy, changes):
    """`BitNetConfig` is the reference for what is missing and which of two places counts."""
    folder = copy()
    edit_json(folder / "config.json", **changes)
    cfg = hf.load(folder)[0]
    theirs = transformers.BitNetConfig.from_pretrained(folder)
    model = cfg.model
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]
    scaled = [theirs.rope_parameters.get(key) for key in hf_config.LLAMA3]
    assert list(rope_scaling_numbers(model.rope_scaling) or [None] * 4) == scaled
    assert model.tied_embedding == theirs.tie_word_embeddings
    dtype = str(theirs.dtype).removeprefix("torch.")  # where torch is installed
    assert model.norm_eps == theirs.rms_norm_eps and model.dtype == dtype
    assert cfg.data.seq_len == theirs.max_position_embeddings
    sizes = (model.d_model, model.n_layers, model.n_heads, model.n_kv_heads, model.d_ff)
    assert sizes == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.intermediate_size,
    )


def test_key_and_value_heads_are_the_query_heads_when_null_and_those_stored_when_missing(copy):
    folder = copy(TIED)
    for value in (None, ...):
        edit_json(folder / "config.json", num_key_value_heads=value)
        assert hf.load(folder)[0].model.n_kv_heads == 2
    for source, n in ((LATENTS, 2), (PACKED, 1)):  # of 4 query heads
        folder = copy(source)
        edit_json(folder / "config.json", num_key_value_heads=...)
        assert hf.load(folder)[0].model.n_kv_heads == n
        edit_json(folder / "config.json", num_key_value_heads=None)
        assert "k_proj.weight has shape" in message(folder)


def test_half_precision_that_is_not_offered_is_computed_in_float32(copy):
    folder = copy()
    edit_json(folder / "config.json", torch_dtype="float16")
    assert hf.load(folder)[0].model.dtype == "float32"


@pytest.mark.parametrize("names", [None, ["lm_head"], ["model.embed_tokens", "lm_head", "norm"]])
def test_modules_that_are_never_quantised_may_be_named(copy, names):
    folder = copy()
    edit_json(
        folder / "config.json", quantization_config=QUANTISED | {"modules_to_not_convert": names}
    )
    assert hf.load(folder)[0].model.n_layers == 1


HUGE = 10**30


@pytest.mark.parametrize(
    ("changes", "expected_error"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': only 'bitnet' and 'llama'"),
        ({"model_type": ["llama"]}, "model_type=['llama']"),
        ({"model_type": "llama", "hidden_act": "silu"}, "unknown key model.layers.0.mlp.ffn_sub"),
        ({"model_type": ...}, "model_type=None"),
        ({"hidden_size": ...}, "hidden_size=None: a whole number"),
        ({"hidden_size": 26}, "num_attention_heads=4: must divide hidden_size=26"),
        ({"hidden_size": 20}, "num_attention_heads=4: must divide hidden_size=20"),
        ({"hidden_size": "24"}, "hidden_size='24': a whole number"),
        ({"hidden_size": 24.0}, "hidden_size=24.0: a whole number"),
        ({"hidden_size": [24]}, "hidden_size=[24]: a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: a whole number"),
        ({"num_hidden_layers": HUGE}, f"num_hidden_layers={HUGE}: a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=4"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2: a whole number"),
        ({"intermediate_size": 2**20}, "has shape (24, 48); config.json makes it (24, 1048576)"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776: a whole number"),
        ({"vocab_size": 263}, "the tokenizer has 264 tokens, more than vocab_size=263"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long': a whole number"),
        ({"hidden_act": "mish"}, "hidden_act='mish': known are relu2, silu, gelu,"),
        ({"hidden_act": ["relu2"]}, "hidden_act=['relu2']"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0: a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': a number"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters={'rope_type': 'yarn'}"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling={'factor': 2, 'type':"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor=None: a number"),
        (
            {"rope_scaling": dict.fromkeys(hf_config.LLAMA3, 2) | {"rope_type": "llama3"}},
            "model.rope_scaling=llama3:2,2,2,2",
        ),
        ({"rope_parameters": [1]}, "rope_parameters=[1]: an object"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta='1e4'"),
        ({"rope_parameters": ..., "rope_theta": 1e39}, "rope_theta=1e+39: a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"dtype": "float8"}, "dtype='float8': use float32, bfloat16, float16"),
        ({"torch_dtype": 32}, "torch_dtype=32"),
        ({"quantization_config": []}, "quantization_config=[]: an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"quantization_config": {}}, "quantization_config.quant_method=None"),
        (
            {"quantization_config": QUANTISED | {"use_rms_norm": True}},
            "quantization_config.use_rms_norm=True",
        ),
        (
            {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}},
            "quantization_config.quantization_mode='online'",
        ),
        (
            {"quantization_config": QUANTISED | {"linear_class": ["x"]}},
            "quantization_config.linear_class=['x']",
        ),
        (kept(), "modules_to_not_convert=[]: lm_head is not named"),
        (kept("lm_head", "model.layers.0.mlp"), "model.layers.0.mlp.gate_proj would not be"),
        (kept("lm_head", "o_proj"), "model.layers.0.self_attn.o_proj would not be"),
        (kept("lm_head", 3), "modules_to_not_convert=['lm_head', 3]"),
        (kept("lm_head", "(a+)+$"), "'(a+)+$' is not the name of a module"),
        ({"hidden_act": "x\n\x1b[2J" + "y" * 9999}, r"hidden_act='x\n\x1b[2Jyyy"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_configuration_that_is_not_this_model_is_named(copy, changes, expected_error):
    folder = copy()
    edit_json(folder / "config.json", **changes)
    line = message(folder)
    assert expected_error in line and len(line.replace(str(folder), "")) < 250


def test_packed_matrices_have_rows_in_fours(copy):
    """One key head of width 2 has two."""
    folder = copy(PACKED)
    edit_json(folder / "config.json", num_attention_heads=16)
    assert "num_key_value_heads=1: makes a matrix of 2 rows" in message(folder)
    edit_json(folder / "config.json", num_attention_heads=4, intermediate_size=42)
    assert "intermediate_size=42: makes a matrix of 42 rows" in message(folder)


@pytest.mark.parametrize(
    ("name", "content", "expected_error"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "config.json: damaged, not JSON"),
        ("config.json", b"[]", "config.json: damaged, not a JSON object"),
        ("config.json", b"\xff\xfe{}", "config.json: damaged, not JSON"),
        ("config.json", b"[" * 100_000, "config.json: damaged, not JSON"),
        ("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "config.json: damaged, not JSON"),
        ("config.json", ..., "config.json: cannot be read"),
        ("tokenizer.json", None, "tokenizer missing: no tokenizer.json"),
        ("tokenizer_config.json", None, "tokenizer missing: no tokenizer_config.json"),
        ("tokenizer.json", b"{", "damaged tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "not a byte-level BPE"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token=<end>"),
        (WEIGHTS, b"", "truncated or damaged"),
        (WEIGHTS, ..., "neither model.safetensors nor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_missing_and_damaged_files_are_named(copy, name, content, expected_error):
    folder = copy()
    (folder / name).unlink()
    if content is ...:
        (folder / name).mkdir()
    elif content is not None:
        (folder / name).write_bytes(content)
    assert expected_error in message(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "a/../../secret.safetensors",
        "ABSOLUTE",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_not_opened(copy, name):
    """The file is there and would be read."""
    folder = copy()
    tensors = tensors_of(folder)
    shard(folder, tensors)
    secret = shutil.move(sorted(folder.glob("model-*"))[0], folder.parent / "secret.safetensors")
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    key = min(tensors)
    place[key] = name.replace("ABSOLUTE", str(secret))
    edit_json(folder / INDEX, weight_map=place)
    assert "a file outside the folder" in message(folder) and key in message(folder)


@pytest.mark.parametrize(
    ("weight_map", "expected_error"),
    [
        (..., "weight_map=None: an object"),
        ([], "weight_map=[]: an object"),
        ({}, "weight_map={}: an object"),
        ("model.safetensors", "weight_map='model.safetensors': an object"),
        ({"a": 3}, "weight_map has a=3: the name of"),
        ({"a": None}, "weight_map has a=None: the name of"),
        ({"a": "weights.bin"}, "weight_map has a='weights.bin': the name of"),
        ({"a": "gone.safetensors"}, "missing shard gone.safetensors"),
        ({"a\n": "x" * 300 + ".safetensors"}, "missing shard 'xxx"),
        ({"a": "nul\0.safetensors"}, "missing shard 'nul"),
    ],
    ids=str,
)
def test_an_index_that_is_none_is_named(copy, weight_map, expected_error):
    folder = copy()
    shard(folder, tensors_of(folder))
    edit_json(folder / INDEX, weight_map=weight_map)
    assert expected_error in message(folder)


def test_shards_may_lie_in_a_folder_of_the_folder(copy):
    folder = copy()
    shard(folder, tensors_of(folder))
    (folder / "part").mkdir()
    for path in folder.glob("model-*.safetensors"):
        shutil.move(path, folder / "part" / path.name)
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={key: f"part/{name}" for key, name in place.items()})
    assert hf.load(folder)[0].model == hf.load(LATENTS)[0].model


ODD = (None, True, False, 0, -1, 3, 24, 2**31, 2**64, 10**30, 0.5, 1e-300, 1e300, float("inf"))
ODD += (float("nan"), "", "24", "relu2", "bitnet", "é\n\x1b", "x" * 5000, [], [1], ["lm_head"], {})
ODD += ({"rope_type": "default"}, {"a": {"b": [None]}}, "../x.safetensors", "/dev/zero")


def mutate(rng, tree):
    """Change one to three places of a JSON object, at any depth."""
    tree = copies.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        node = tree
        while True:
            key = rng.choice(list(node)) if node and rng.random() > 0.05 else "new"
            if isinstance(node.get(key), dict) and rng.random() < 0.7:
                node = node[key]
                continue
            if rng.random() < 0.15:
                node.pop(key, None)
            else:
                node[key] = copies.deepcopy(rng.choice(ODD))
            break
    return tree


def test_no_folder_ends_in_anything_but_a_model_or_one_line(copy, capsys):
    """Seeded changes to config.json and to the index; a traceback would be the third outcome."""
    rng, outcomes = random.Random(0), {"config.json": [0, 0], INDEX: [0, 0]}
    for source in (LATENTS, PACKED):
        folder = copy(source)
        shard(folder, tensors_of(folder))
        for name in outcomes:
            whole = (folder / name).read_text()
            for _ in range(150):
                (folder / name).write_text(json.dumps(mutate(rng, json.loads(whole))))
                try:
                    hf.load(folder)
                    outcomes[name][0] += 1
                except UserError as error:
                    outcomes[name][1] += 1
                    assert str(error).isprintable() and len(str(error)) < 600
            (folder / name).write_text(whole)
    assert all(min(counts) > 20 for counts in outcomes.values()), outcomes
