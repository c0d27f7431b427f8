"""The benchmark of training measures everything but torch on the tiny preset."""

import json

from bitnet_jax import presets
from experiments import bench_train, common


def test_every_measurement_becomes_a_row_without_paths(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path / "results" / "rows.jsonl")
    monkeypatch.setattr(bench_train, "ROUNDS", 1)
    monkeypatch.setattr(bench_train, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(bench_train, "why_no_peer", lambda: "not here")
    replicates = presets.make_replicates(tiny, [3], {})
    bench_train.body(
        common.Request("tiny", tiny, [3], {}, replicates, tmp_path / "work", False, None)
    )
    text = bench_train.RESULTS.read_text()
    rows = {row["benchmark"]: row for row in map(json.loads, text.splitlines())}
    assert set(rows) == set(bench_train.LABELS) - {"torch"}
    assert all(0 < r["ms_min"] <= r["ms_median"] <= r["ms_max"] for r in rows.values())
    assert {row["preset"] for row in rows.values()} == {"tiny"}
    assert {name: row["R"] for name, row in rows.items() if row["R"] != 1} == {"two_replicates": 2}
    assert rows["train_chunk"]["memory_mb"] > 0 < rows["evaluation"]["share_median"]
    assert str(tmp_path) not in text
    assert "not measured: torch: not here" in capsys.readouterr().out


def test_a_chunk_that_takes_too_long_is_not_measured(monkeypatch, capsys, tiny, tmp_path):
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(bench_train, "LIMIT_S", 0)
    replicates = presets.make_replicates(tiny, [0], {})
    bench_train.body(
        common.Request("tiny", tiny, [3], {}, replicates, tmp_path / "work", False, None)
    )
    assert "not measured: a chunk of 20 steps takes more than" in capsys.readouterr().out
    assert not bench_train.RESULTS.exists()
