"""What the benchmarks share, and that of training on the tiny preset, without torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.config import ModelConfig, RunConfig
from bitnet_jax.fields import UserError
from experiments import bench, bench_bounds, bench_peer, bench_train
from experiments.bench_decode import LABELS as DECODE_LABELS


@pytest.fixture
def run_tiny(tiny, tmp_path, monkeypatch):
    """Measure the tiny preset in one round: its rows by benchmark, and their text."""
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(bench_peer, "why_none", lambda model: "not here")

    def run(*flags):
        changes = (f"data.corpus={tiny.data.corpus}", "model.n_layers=1")
        argv = ["--preset", "tiny", "--rounds", "1", "--seed", "3", *flags]
        argv += [text for change in changes for text in ("--set", change)]
        bench_train.measure(bench_train.parse(argv))
        path = tmp_path / "results" / "bench_train.jsonl"
        text = path.read_text() if path.exists() else ""
        return {row["benchmark"]: row for row in map(json.loads, text.splitlines())}, text

    return run


@pytest.mark.slow
def test_every_measurement_becomes_a_row_without_paths(run_tiny, tmp_path, capsys):
    rows, text = run_tiny()
    assert set(rows) == set(bench_train.LABELS) - set(bench_peer.MOVES)
    assert all(0 < r["ms_min"] <= r["ms_median"] <= r["ms_max"] for r in rows.values())
    assert {row["preset"] for row in rows.values()} == {"tiny"}
    assert {name: row["R"] for name, row in rows.items() if row["R"] != 1} == {"two_replicates": 2}
    assert rows["train_chunk"]["memory_mb"] > 0 < rows["evaluation"]["share_median"]
    assert sum(row.get("of_run", 0) for row in rows.values()) == pytest.approx(1, abs=1e-3)
    assert all(row["cpu_flags"] == bench.cpu_flags() for row in rows.values())
    assert str(tmp_path) not in text
    out = capsys.readouterr().out
    assert "not measured: torch: not here" in out and "a run of tiny (20 steps" in out


@pytest.mark.slow
def test_brief_measures_the_chunk_its_evaluation_and_the_bound(run_tiny):
    rows, _ = run_tiny("--brief")
    assert set(rows) == {"train_chunk", "evaluation"}
    row = rows["train_chunk"]
    in_parts = row["bound_products_ms"] + row["bound_adam_ms"]
    assert 0 < row["bound_ms"] == pytest.approx(in_parts, abs=0.02)


def test_what_is_repeated_depends_on_the_last_time():
    """A product that did not could be made once for all."""
    a, b = jnp.full((2, 2), 2.0), jnp.full((2, 2), 3.0)
    out, a, b = bench_bounds.multiply((jnp.zeros((2, 2)), a, b))
    np.testing.assert_array_equal(a, [[12, 2], [2, 2]])
    out, *_ = bench_bounds.multiply((out, a, b))
    np.testing.assert_array_equal(out, [[42, 42], [12, 12]])


def test_a_chunk_that_takes_too_long_is_not_measured(run_tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "LIMIT_S", 0)
    rows, _ = run_tiny()
    assert "not measured: a chunk of 20 steps takes more than" in capsys.readouterr().out
    assert rows == {}


def test_a_run_spends_what_its_stops_cost():
    """40 steps with stops at 10, 15, 20, 30 and 40, and an evaluation at the start."""
    planned = RunConfig(steps=40, eval_every=10, save_every=15, checkpoint_every=1000)
    seconds = {"step": 1.0, "evaluation": 2.0, "large_block": 10.0, "host": 0.5}
    stops = 6  # the start, 10, 15, 20, 30, 40
    total = 40 + 2 * stops + 2 * 10 + 0.5 * stops
    assert bench_train.run_shares(planned, seconds) == pytest.approx(
        {
            "step": 40 / total,
            "evaluation": 12 / total,
            "large_block": 20 / total,
            "host": 3 / total,
        },
        abs=1e-4,
    )


def test_rounds_end_at_their_number_or_after_two_when_time_is_up(monkeypatch):
    """The warm-up is not among them; every move runs once in each."""
    calls = []
    moves = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    seconds = bench.rounds(moves, 4)
    assert calls == ["a", "b"] * 5
    assert seconds["a"].tolist() == [3, 5, 7, 9] and seconds["b"].tolist() == [4, 6, 8, 10]
    monkeypatch.setattr(bench, "LIMIT_S", 0)
    assert [len(bench.rounds(moves, n)["a"]) for n in (1, 2, 9)] == [1, 2, 2]


def test_a_spread_is_shown_as_it_was_taken():
    row = bench.spread("ms", np.array([3.0, 1.0, 2.00001]))
    assert row == {"ms_median": 2.0, "ms_min": 1.0, "ms_max": 3.0}
    assert bench.show(row, "ms", "%", 100) == "200 [100, 300] %" and not bench.show(row, "x", "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx2 amx_tile_x amx_int8\n", ["avx2", "avx512f", "amx_int8"]),
        ("processor: 0\nFeatures\t: fp asimddp i8mm\n", ["asimddp", "i8mm"]),
        ("processor: 0\n", None),
    ],
    ids=["x86", "arm", "neither"],
)
def test_flags_of_the_cpu(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(bench, "CPU_INFO", tmp_path / "cpuinfo")
    assert bench.cpu_flags() is None
    bench.CPU_INFO.write_text(text)
    assert bench.cpu_flags() == expected


def test_instructions_that_are_forbidden(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX512 --xla_cpu_max_isa=AVX2 --other=1")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert bench.cpu_caps() == {"xla": "AVX2"}


def test_no_rounds_make_no_measurement():
    with pytest.raises(UserError, match="--rounds 0: needs at least 1"):
        bench_train.parse(["--rounds", "0"])


def test_the_rows_of_committed_benchmarks_are_known():
    for name, labels in (("bench_train", bench_train.LABELS), ("bench_decode", DECODE_LABELS)):
        path = bench.FOLDER / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert {row["benchmark"] for row in rows} <= set(labels)


@pytest.mark.parametrize("layout", ["b158", "report"])
def test_the_products_of_a_step_are_those_of_its_matrices(layout):
    """4 D^2 + 3 D F in a block, and the head; grouped keys make two of them narrower."""
    model = ModelConfig(layout=layout, vocab_size=100, d_model=32, n_kv_heads=2, d_ff=48)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert bench_bounds.step_flops(model, 10) == 6 * 10 * (4 * block + 32 * 100)


def test_operations_that_hold_products_are_found_in_a_compiled_program():
    hlo = """HloModule m
%fused_computation (p: f32[2,2]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[2,2]) -> (f32[2,2]) {
  %x = f32[2,2]{1,0} parameter(0)
  %ynn_fusion = f32[2,2]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation
  %add.2 = f32[2,2]{1,0} add(%ynn_fusion, %x)
  ROOT %tuple = (f32[2,2]{1,0}) tuple(%add.2)
}
"""
    products = bench_bounds.product_names(hlo)
    assert products == {"p": False, "dot.1": True, "x": False, "ynn_fusion": True, "add.2": False}
