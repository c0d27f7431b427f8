"""The benchmark of decoding measures everything but transformers on a tiny model."""

import json

import numpy as np
import pytest

from bitnet_jax import presets
from bitnet_jax.config import UserError
from experiments import bench_decode

TINY = ("--preset", "tiny", "--set", "model.vocab_size=300", "--set", "model.n_layers=1")


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["bench_decode", *argv])
    bench_decode.body()


def test_every_way_to_decode_becomes_a_row_without_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "RESULTS", tmp_path / "results" / "rows.jsonl")
    monkeypatch.setattr(bench_decode, "why_no_peer", lambda model: "not here")
    tiny = bench_decode.resolve("tiny", ["model.vocab_size=300"])
    monkeypatch.setattr(bench_decode, "SHAPE_2B", tiny.model)
    monkeypatch.setitem(presets.PRESETS, "700m", tiny)
    run(monkeypatch, *TINY, "--batches", "2", "--prompt", "3", "--tokens", "4", "--rounds", "2")
    text = bench_decode.RESULTS.read_text()
    rows = {row["benchmark"]: row for row in map(json.loads, text.splitlines())}
    assert set(rows) == {name for name in bench_decode.LABELS if "transformers" not in name}
    assert all(0 < r["ms_min"] <= r["ms_median"] <= r["ms_max"] for r in rows.values())
    assert {(r["B"], r["P"], r["N"], r["layout"]) for r in rows.values()} == {(2, 3, 4, "b158")}
    assert rows["program_packed"]["params_mb"] < rows["program"]["params_mb"]
    assert rows["loop"]["same_tokens"] == 1
    assert str(tmp_path) not in text
    out = capsys.readouterr().out
    assert "not measured: transformers: not here" in out and "MB packed" in out


def test_a_ratio_is_how_many_times_faster_than_transformers_in_the_same_round(monkeypatch):
    """Rounds of 1 and 3 seconds beside 4 and 6 of transformers: 4 and 2 times, 3 in the middle."""
    taken = {"program": [1.0, 3.0], "loop": [2.0, 4.0], "transformers": [4.0, 6.0]}
    seconds = {name: np.array(values) for name, values in taken.items()}
    tokens = dict.fromkeys(seconds, np.zeros((1, 2))) | {"loop": np.array([[0, 1]])}
    monkeypatch.setattr(bench_decode, "measure", lambda *_: (seconds, tokens))
    args = bench_decode.parse(["--tokens", "2", "--batches", "1"])
    cfg = bench_decode.resolve("tiny", ["model.vocab_size=300", "model.n_layers=1"])
    params = bench_decode.abstract_params(cfg.model)
    monkeypatch.setattr(bench_decode, "pack_params", lambda *_: {})
    monkeypatch.setattr(bench_decode, "Ours", FakeOurs)
    peers = {"transformers": None}
    found = bench_decode.measure_batch(cfg, params, peers, np.zeros((1, 3), np.int32), args)
    rows = {row["benchmark"]: row for row in found}
    ours = rows["program"]
    assert (ours["ratio_median"], ours["ratio_min"], ours["ratio_max"]) == (3, 2, 4)
    assert (ours["ms_median"], ours["tokens_per_second"]) == (1000, 1)
    assert rows["loop"]["ratio_max"] == 2 and rows["loop"]["same_tokens"] == 0.5
    assert "ratio_median" not in rows["transformers"]
    assert "3 [2, 4] x transformers" in bench_decode.table(found)


def test_rounds_end_at_their_number_or_after_two_when_time_is_up(monkeypatch):
    """The warm-up is not among them; every move runs once in each."""
    calls = []
    moves = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    seconds, first = bench_decode.measure(moves, 4)
    assert calls == ["a", "b"] * 5 and first == {"a": 1, "b": 2}
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4}
    monkeypatch.setattr(bench_decode, "LIMIT_S", 0)
    assert [len(bench_decode.measure(moves, n)[0]["a"]) for n in (1, 2, 9)] == [1, 2, 2]


class FakeOurs:
    compile_s = params_mb = temp_mb = 1.0
    program = loop = None

    def __init__(self, *_):
        pass


def test_packed_weights_of_the_published_shapes():
    """Bytes by hand: a quarter per ternary weight, 2 per embedding entry, 4 per norm and scale."""
    found = bench_decode.weight_memory(bench_decode.SHAPE_2B)
    assert found["params"] == 2_412_820_480 and found["bf16_mb"] == 4825.64096
    ternary = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 6912 * 2560)
    norms = 30 * (3 * 2560 + 6912) + 2560
    assert ternary + 128_256 * 2560 + norms == found["params"]
    packed = ternary / 4 + 2 * 128_256 * 2560 + 4 * (norms + 30 * 7)
    assert found["packed_mb"] == packed / 1e6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "0"], "--tokens 0: needs at least 1"),
        (["--rounds", "0"], "--rounds 0: needs at least 1"),
        (["--batches", "1,x"], "--batches 1,x: use numbers above 0"),
        (["--batches", "0"], "--batches 0: use numbers above 0"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--set", "model.depth=3"], "unknown model field 'depth'"),
    ],
    ids=str,
)
def test_a_mistake_is_named_on_one_line(monkeypatch, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        run(monkeypatch, *argv)
    assert "\n" not in str(caught.value)


def test_the_layout_is_one_that_transformers_has_unless_told_otherwise():
    assert bench_decode.resolve("report", []).model.layout == "b158"
    assert bench_decode.resolve("125m", []).model.dtype == "float32"  # on CPUs
    assert presets.preset("125m").model.dtype == "bfloat16"
    model = bench_decode.resolve("report", ["model.layout=report"]).model
    reason = bench_decode.why_no_peer(model)
    assert model.layout == "report" and ("no layout report" in reason or "no torch" in reason)
