"""The benchmark of decoding measures everything but transformers on a tiny model."""

import json

import jax
import numpy as np
import pytest

from bitnet_jax import presets
from bitnet_jax.fields import UserError
from experiments import bench, bench_decode, bench_peer

TINY = ("--preset", "tiny", "--set", "model.vocab_size=300", "--set", "model.n_layers=1")


def run(*argv):
    bench_decode.run(bench_decode.parse([*argv]))


def resolve(*argv):
    return bench_decode.resolve(bench_decode.parse([*argv]))


@pytest.mark.slow
def test_every_way_to_decode_becomes_a_row_without_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(bench_peer, "why_none", lambda model: "not here")
    tiny = resolve(*TINY)
    monkeypatch.setattr(bench_decode, "SHAPE_2B", tiny.model)
    monkeypatch.setitem(presets.PRESETS, "700m", tiny)
    run(*TINY, "--batches", "2", "--prompt", "3", "--tokens", "4", "--rounds", "2")
    text = (tmp_path / "results" / "bench_decode.jsonl").read_text()
    rows = {row["benchmark"]: row for row in map(json.loads, text.splitlines())}
    assert set(rows) == {name for name in bench_decode.LABELS if "transformers" not in name}
    assert all(0 < r["ms_min"] <= r["ms_median"] <= r["ms_max"] for r in rows.values())
    assert {(r["B"], r["P"], r["N"], r["layout"]) for r in rows.values()} == {(2, 3, 4, "b158")}
    assert rows["program_packed"]["params_mb"] < rows["program"]["params_mb"]
    assert rows["loop"]["same_tokens"] == 1
    assert all(row["cpu_flags"] == bench.cpu_flags() for row in rows.values())
    assert str(tmp_path) not in text
    out = capsys.readouterr().out
    assert "not measured: transformers: not here" in out and "MB packed" in out


def test_a_ratio_is_how_many_times_faster_than_transformers_in_the_same_round(monkeypatch):
    """Rounds of 1 and 3 seconds beside 4 and 6 of transformers: 4 and 2 times, 3 in the middle."""
    taken = {"program": [1.0, 3.0], "loop": [2.0, 4.0], "transformers": [4.0, 6.0]}
    seconds = {name: np.array(values) for name, values in taken.items()}
    tokens = dict.fromkeys(seconds, np.zeros((1, 2))) | {"loop": np.array([[0, 1]])}
    monkeypatch.setattr(bench_decode, "measure", lambda *_: (seconds, tokens))
    args = bench_decode.parse([*TINY, "--tokens", "2", "--batches", "1"])
    cfg = bench_decode.resolve(args)
    params = bench_decode.abstract_params(cfg.model)
    monkeypatch.setattr(bench_decode, "pack_params", lambda *_: {})
    monkeypatch.setattr(bench_decode, "Ours", FakeOurs)
    peers = {"transformers": None}
    batch_rows = bench_decode.measure_batch(cfg, params, peers, np.zeros((1, 3), np.int32), args)
    rows = {row["benchmark"]: row for row in batch_rows}
    ours = rows["program"]
    assert (ours["ratio_median"], ours["ratio_min"], ours["ratio_max"]) == (3, 2, 4)
    assert (ours["ms_median"], ours["tokens_per_second"]) == (1000, 1)
    assert rows["loop"]["ratio_max"] == 2 and rows["loop"]["same_tokens"] == 0.5
    assert "ratio_median" not in rows["transformers"]
    assert "3 [2, 4] x transformers" in bench_decode.table(batch_rows)


class FakeOurs:
    compile_s = params_mb = temp_mb = 1.0
    program = loop = None

    def __init__(self, *_):
        pass


def test_packed_weights_of_the_published_shapes():
    """Bytes by hand: a quarter per ternary weight, 2 per embedding entry, 4 per norm and scale."""
    memory = bench_decode.weight_memory(bench_decode.SHAPE_2B)
    assert memory["params"] == 2_412_820_480 and memory["bf16_mb"] == 4825.64096
    ternary = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 6912 * 2560)
    norms = 30 * (3 * 2560 + 6912) + 2560
    assert ternary + 128_256 * 2560 + norms == memory["params"]
    packed = ternary / 4 + 2 * 128_256 * 2560 + 4 * (norms + 30 * 7)
    assert memory["packed_mb"] == packed / 1e6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "0"], "--tokens 0: needs at least 1"),
        (["--rounds", "0"], "--rounds 0: needs at least 1"),
        (["--seed", "-1"], "--seed -1: use a number from 0"),
        (["--batches", "1,x"], "--batches 1,x: use numbers above 0"),
        (["--batches", "0"], "--batches 0: use numbers above 0"),
        (["--preset", "huge"], "unknown preset huge"),
        (["--set", "model.depth=3"], "unknown model field depth"),
    ],
    ids=str,
)
def test_a_mistake_is_named_on_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        run(*argv)
    assert "\n" not in str(caught.value)


def test_the_layout_is_one_that_transformers_has_unless_asked_otherwise(monkeypatch):
    assert resolve("--preset", "report").model.layout == "b158"
    assert resolve("--preset", "125m").model.dtype == "float32"  # on CPUs
    assert presets.preset("125m").model.dtype == "bfloat16"
    model = resolve("--set", "model.layout=report").model
    assert model.layout == "report"
    monkeypatch.setattr(bench_peer, "PACKAGES", ())
    assert bench_peer.why_none(model) == "it has no layout report"


def test_our_parameters_have_the_names_and_shapes_of_transformers():
    model = resolve(*TINY).model
    params = jax.tree.map(lambda x: np.zeros(x.shape), bench_decode.abstract_params(model))
    tensors = bench_peer.tensors(model, params)
    assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (model.d_ff, model.d_model)
    assert len(tensors) == len(jax.tree.leaves(params)) + model.tied_embedding
