"""Commands about a trained model: text, folders of transformers, what is wrong with it."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest

from bitnet_jax import log, presets, program, restore, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_folder):
    """A finished run of 2 steps with two replicates; its text has gone since."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text("\n".join(f"{n} cats, {n * n} dogs." for n in range(3000)))
    cfg = presets.preset("tiny")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, n_layers=1, n_kv_heads=1),
        data=dataclasses.replace(cfg.data, corpus=f"text:{folder / 'corpus.txt'}"),
        run=dataclasses.replace(cfg.run, steps=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(cache_folder))
        run.run(cfg, presets.make_replicates(cfg, [0], {}), folder / "run")
        yield folder / "run", cfg


def last_evaluation(workdir, replicate):
    rows = log.read_rows(workdir / "metrics.jsonl")
    return [row for row in rows if (row["kind"], row["replicate"]) == ("eval", replicate)][-1]


def data_of(cfg):
    return [
        f"--set=data.{name}={getattr(cfg.data, name)}"
        for name in ("corpus", "batch_size", "eval_batches")
    ]


@pytest.mark.parametrize("packed", [(), ("--packed",)], ids=["latents", "packed"])
def test_a_replicate_comes_back_with_the_loss_of_its_run(trained, bitnet, tmp_path, packed):
    workdir, cfg = trained
    status, out, err = bitnet("convert", "hf", f"{workdir}@2:1", tmp_path / "hf", *packed)
    assert status == 0, err
    assert f"{workdir}@2:1 (published, seed 0)" in out
    status, out, err = bitnet("convert", "check", tmp_path / "hf", *data_of(cfg))
    logged = last_evaluation(workdir, 1)
    assert status == 0, err
    assert f"loss {logged['eval/loss']:.4f}, {logged['eval/bits_per_byte']:.3f} bits" in out
    described = json.loads((workdir / "config.json").read_text())
    assert f"{described['n_params']:,} parameters" in out and "model.n_kv_heads=1" in out
    assert f"unigram {described['references']['unigram']['loss']:.4f}" in out


def test_training_starts_where_the_exported_run_ended(trained, bitnet, tmp_path):
    """The evaluation before the first step is the last one of that run."""
    workdir, cfg = trained
    bitnet("convert", "hf", workdir, tmp_path / "hf")
    start = dataclasses.replace(cfg.run, init=f"hf:{tmp_path / 'hf'}", recipes=("published",))
    cfg = dataclasses.replace(cfg, run=start)
    built = program.build(cfg, presets.make_replicates(cfg, [5], {}))
    state, step = restore.start_state(built, tmp_path)
    loss = built.evaluate(state)["eval/loss"]
    assert step == 0 and loss == pytest.approx(last_evaluation(workdir, 0)["eval/loss"], rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        "convert hf RUN@3 NEW",
        "convert hf RUN@2:7 NEW",
        "convert hf NEW NEW",
        "convert hf RUN RUN",
        "convert check NEW",
        "convert check RUN",
        "convert check HF --set model.d_model=64",
        "convert check HF --set data.tokenizer=gpt2",
        "convert check HF --set data.seq_len=long",
        "convert check HF --text /none/*",
        "generate NEW --prompt a",
        "generate RUN --prompt a --tokens 0",
        "generate RUN --prompt a --temperature nan",
        "generate RUN --prompt a --top-k 3",
        "generate RUN --file NEW",
        "generate RUN --prompt=",
        "triage NEW",
        "triage RUN@7",
        "inspect RUN --text /none/*",
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(trained, bitnet, tmp_path, arguments):
    places = {"RUN": str(trained[0]), "NEW": str(tmp_path / "new"), "HF": str(tmp_path / "hf")}
    if "HF" in arguments:
        bitnet("convert", "hf", trained[0], tmp_path / "hf")
    for name, place in places.items():
        arguments = arguments.replace(name, place)
    status, _, err = bitnet(*arguments.split(" "))
    assert (status, err.count("\n"), err[:7]) == (2, 1, "error: "), err
    assert not (tmp_path / "new").exists()


def test_another_strength_than_the_checkpoints_can_be_asked_for(trained, bitnet, tmp_path):
    workdir, cfg = trained
    bitnet("convert", "hf", workdir, tmp_path / "hf")
    dense = ("--set=hyper.weight_quant=0", "--set=hyper.act_quant=0")
    outputs = [
        bitnet("convert", "check", tmp_path / "hf", *data_of(cfg), *more)[1] for more in ((), dense)
    ]
    losses = [float(out.partition(": loss ")[2].partition(",")[0]) for out in outputs]
    assert losses[0] != losses[1] and np.isfinite(losses).all()


def test_a_workdir_alone_writes_text(trained, bitnet, tmp_path, monkeypatch):
    """Its corpus is gone; a prompt of any bytes and a terminal of ASCII are no obstacle."""
    workdir = tmp_path / "moved"
    shutil.copytree(trained[0], workdir)
    described = json.loads((workdir / "config.json").read_text())
    described["data"]["corpus"] = "text:/nowhere/*"
    (workdir / "config.json").write_text(json.dumps(described))
    (tmp_path / "prompt").write_bytes(b"7 c\xff\x1b[31m")
    status, out, err = bitnet("generate", f"{workdir}@2:1", "--file", tmp_path / "prompt")
    assert status == 0, err
    assert out.startswith("7 c\N{REPLACEMENT CHARACTER}\\x1b[31m") and "\x1b" not in out + err
    assert err.splitlines()[-1] == "[64 tokens]"
    short = ("--tokens", "2")
    status, out, err = bitnet("generate", workdir, "--prompt", "7 cats", "--prompt", "8", *short)
    assert status == 0 and err.splitlines()[-2:] == ["[2 tokens]"] * 2
    assert "7 cats" in out and "\n8" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7 cats")))
    assert bitnet("generate", workdir, *short)[1].startswith("7 cats")


@pytest.mark.parametrize("source", ["RUN", "HF"])
def test_without_its_text_a_model_shows_its_weights(trained, bitnet, tmp_path, source):
    """One line says what is left out, and which flag gives a text."""
    workdir, corpus = trained[0], trained[0].parent / "corpus.txt"
    if source == "HF":
        bitnet("convert", "hf", workdir, tmp_path / "hf")
        workdir = tmp_path / "hf"
    corpus.rename(tmp_path / "moved.txt")
    try:
        inspected, triaged = bitnet("inspect", workdir), bitnet("triage", workdir)
    finally:
        (tmp_path / "moved.txt").rename(corpus)
    assert inspected[::2] == (0, "") and triaged[::2] == (0, "")
    assert "block_0/attn/q/kernel" in inspected[1] and "\ncodes " in triaged[1]
    for _, out, _ in (inspected, triaged):
        (line,) = [line for line in out.splitlines() if "left out, without text" in line]
        assert "--text" in line and (str(corpus) in line) == (source == "RUN")


def edit(text):
    """JSON of a tokenizer without its last merge, or of a row with another loss."""
    tree = json.loads(text)
    if "model" in tree:
        tree["model"]["merges"].pop()
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("name", "damage", "arguments"),
    [
        ("tokenizer/tokenizer.json", edit, "generate RUN --prompt a"),
        ("tokenizer/tokenizer.json", edit, "convert hf RUN NEW"),
        ("tokenizer/tokenizer.json", edit, "triage RUN --text TEXT"),
        ("metrics.jsonl", lambda text: text.replace("1", "2", 1), "inspect RUN"),
        ("metrics.jsonl", lambda text: "", "convert hf RUN NEW"),
        ("checkpoints/2/manifest.json", None, "generate RUN --prompt a"),
    ],
)
def test_what_a_workdir_holds_is_as_it_was_saved(
    trained, bitnet, tmp_path, name, damage, arguments
):
    """A damaged file is named in one line; None: a folder stands in its place."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    path = folder / name
    text = path.read_text()
    path.unlink()
    if damage:
        path.write_text(damage(text))
    else:
        path.mkdir()
    places = {"RUN": folder, "NEW": tmp_path / "new", "TEXT": __file__}
    status, out, err = bitnet(*(places.get(word, word) for word in arguments.split()))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert str(path.parent) in err and not (tmp_path / "new").exists()
    config = folder / "config.json"  # training and its page need it, no model does
    config.write_text("[")
    if name == "metrics.jsonl":
        assert bitnet("generate", folder, "--prompt", "a", "--tokens", "2")[0] == 0


def test_triage_and_inspection_of_a_run(trained, bitnet):
    workdir, _ = trained
    status, out, err = bitnet("triage", f"{workdir}@2:1")
    assert (status, err) == (int("\n1. " in out), "") and ("\n1. " in out) != ("no cause" in out)
    assert bitnet("triage", f"{workdir}@2:1", "--exit-zero")[0] == 0
    status, out, err = bitnet("inspect", f"{workdir}@2:1")
    assert (status, err) == (0, "") and "block_0/attn/q/kernel" in out


def test_the_check_fails_for_decay_that_is_coupled_into_adam(trained, bitnet):
    _, cfg = trained
    small = ["--preset", "tiny", *data_of(cfg), "--set=model.n_layers=1"]
    assert bitnet("check", *small, "--set=run.recipes=published")[0] == 0
    status, out, _ = bitnet("check", *small, "--set=run.recipes=coupled")
    assert status == 1 and out.count("FAILED") == 1
