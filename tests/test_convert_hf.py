"""A run leaves for Hugging Face and comes back with the same loss; mistakes are one line."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from bitnet_jax import log, presets, program, run
from experiments import common, convert_hf


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_folder):
    """A finished run of 2 steps with two replicates, and the --set of its corpus."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text("\n".join(f"{n} cats, {n * n} dogs." for n in range(3000)))
    cfg = presets.preset("tiny")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, n_layers=1, n_kv_heads=1),
        data=dataclasses.replace(cfg.data, corpus=f"text:{folder / 'corpus.txt'}"),
        run=dataclasses.replace(cfg.run, steps=2, recipes=("report", "b158")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        run.run(cfg, presets.make_replicates(cfg, [0], {}), folder / "run")
        yield folder / "run", cfg


@pytest.fixture
def command(monkeypatch, capsys):
    """Call `python -m experiments.convert_hf`; returns status and both outputs."""
    monkeypatch.setenv("XLA_FLAGS", common.DETERMINISTIC)  # guard() would leave it behind

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_hf", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            common.guard(convert_hf.body)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return command


def last_evaluation(workdir, replicate):
    rows = log.read_rows(workdir / "metrics.jsonl")
    return [row for row in rows if (row["kind"], row["replicate"]) == ("eval", replicate)][-1]


def data_of(cfg):
    return [
        f"--set=data.{name}={getattr(cfg.data, name)}"
        for name in ("corpus", "batch_size", "eval_batches")
    ]


@pytest.mark.parametrize("flags", [(), ("--packed",)], ids=["latents", "packed"])
def test_a_replicate_comes_back_with_the_loss_of_its_run(trained, command, tmp_path, flags):
    workdir, cfg = trained
    status, out, _ = command("export", f"{workdir}@2:1", tmp_path / "hf", *flags)
    assert status == 0 and "run@2:1 (b158, seed 0)" in out and ("packed" in out) == bool(flags)
    status, out, err = command("check", tmp_path / "hf", *data_of(cfg))
    logged = last_evaluation(workdir, 1)
    assert status == 0, err
    assert f"loss {logged['eval/loss']:.4f}, {logged['eval/bits_per_byte']:.3f} bits" in out
    n_params = json.loads((workdir / "config.json").read_text())["n_params"]
    assert f"{n_params:,} parameters" in out and "model.n_kv_heads=1" in out
    unigram = json.loads((workdir / "config.json").read_text())["references"]["unigram"]["loss"]
    assert f"unigram {unigram:.4f}" in out


def test_training_starts_where_the_exported_run_ended(trained, command, tmp_path):
    """The evaluation before the first step is the last one of that run."""
    workdir, cfg = trained
    command("export", workdir, tmp_path / "hf")
    start = dataclasses.replace(cfg.run, init=f"hf:{tmp_path / 'hf'}", recipes=("b158",))
    cfg = dataclasses.replace(cfg, run=start)
    made = program.build(cfg, presets.make_replicates(cfg, [5], {}))
    state, step = program.start_state(made, tmp_path)
    found = made.evaluate(state)["eval/loss"]
    assert step == 0 and found == pytest.approx(last_evaluation(workdir, 0)["eval/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "RUN@3", "NEW"], "no checkpoint of step 3; there: [1, 2]"),
        (["export", "RUN@2:7", "NEW"], "no replicate 7; the checkpoint has 0 to 1"),
        (["export", "NEW", "NEW"], "no checkpoints in"),
        (["export", "RUN", "RUN"], "exists and is not empty"),
        (["check", "NEW"], "no config.json"),
        (["check", "RUN"], "model_type None"),
        (["check", "HF", "--set", "model.d_model=64"], "only data.* and hyper.* can be set"),
        (["check", "HF", "--set", "data.tokenizer=gpt2"], "only data.* and hyper.* can be set"),
        (["check", "HF", "--set", "data.seq_len=long"], "data.seq_len=long: expected a whole"),
        (["check", "HF", "--set", "data.corpus=text:/none/*"], "/none/*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(trained, command, tmp_path, arguments, told):
    places = {"RUN": str(trained[0]), "NEW": str(tmp_path / "new"), "HF": str(tmp_path / "hf")}
    if "HF" in arguments:
        command("export", trained[0], tmp_path / "hf")
    for name, place in places.items():
        arguments = [text.replace(name, place) for text in arguments]
    status, _, err = command(*arguments)
    assert status == 2 and told in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not (tmp_path / "new").exists()


def test_another_strength_than_the_checkpoints_can_be_asked_for(trained, command, tmp_path):
    workdir, cfg = trained
    command("export", workdir, tmp_path / "hf")
    quantised = command("check", tmp_path / "hf", *data_of(cfg))[1]
    dense = command(
        "check", tmp_path / "hf", *data_of(cfg), "--set=hyper.weight_quant=0",
        "--set=hyper.act_quant=0",
    )[1]  # fmt: skip
    losses = [float(out.partition(": loss ")[2].partition(",")[0]) for out in (quantised, dense)]
    assert losses[0] != losses[1] and np.isfinite(losses).all()
