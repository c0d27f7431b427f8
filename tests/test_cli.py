"""A mistake on the command line is one line that names it, and exit status 2."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax import config, config_file, presets, run
from bitnet_jax.cli import COMMANDS, flags
from bitnet_jax.cli import train as command_train
from bitnet_jax.config import Config
from bitnet_jax.fields import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(bitnet, tiny, tmp_path):
    """Call `bitnet train` on a small text."""
    default = ["--set", f"data.corpus={tiny.data.corpus}", "--workdir", str(tmp_path / "run")]
    return lambda *arguments: bitnet("train", "--preset", "tiny", *default, *arguments)


def only_line(err):
    """The one line on the terminal besides progress bars."""
    text_lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    (line,) = [line for line in text_lines if not line.startswith("tokenizing ")]
    return line


WRONG = [
    "modle.d_model=64",
    "model.width=64",
    "hyper.learning_rate=1",
    "d_model=64",
    "model.d_model",
    "model.d_model=wide",
    "model.d_model=64.5",
    "model.d_model=99999999999999999999",
    "hyper.lr_peak=high",
    "hyper.lr_peak=nan",
    "hyper.lr_peak=1e39",
    "hyper.decoupled_1=-1",
    "hyper.weight_quant=2",
    "hyper.logit_scale=0",
    "model.tied_embedding=maybe",
    "model.layout=gpt",
    "model.dtype=float16",
    "model.n_heads=3",
    "model.n_kv_heads=3",
    "model.n_layers=0",
    "model.norm_eps=inf",
    "model.vocab_size=299",
    "data.corpus=wiki",
    "data.corpus=text:/nowhere/*.txt",
    "data.validation=rest",
    "data.tokenizer=words",
    "data.tokenizer=bpe:100",
    "data.tokenizer=bpe:99999999999",
    "data.holdout=1",
    "data.seq_len=1",
    "data.seq_len=100000",
    "data.eval_batches=5000",
    "optim.beta1=1",
    "optim.clip_norm=0",
    "optim.eps=inf",
    "run.recipes=published,adam",
    "run.recipes=coupled,coupled",
    "run.recipes=",
    "run.steps=1",
    "run.eval_every=0",
    "hyper.warmup_steps=11",
    "run.init=runs/old",
    "run.init=fork:/nowhere@5",
]


@pytest.mark.parametrize("assignment", WRONG)
def test_a_wrong_setting_is_named_and_leaves_no_folder(command, tmp_path, assignment):
    status, _, err = command("--set", assignment)
    line, path = only_line(err), assignment.partition("=")[0]
    assert status == 2 and line.startswith("error: ")
    assert any(text in line for text in (path, *path.split("."), assignment.partition(":")[2]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["trian"], "train"),
        (["train", "--presets", "quick"], "--preset"),
        (["train", "--preset", "qick"], "quick"),
        (["train", "--set", "modle.d_model=64"], "model"),
        (["train", "--set", "model.n_layer=2"], "n_layers"),
        (["train", "--set", "hyper.lr_peek=1"], "lr_peak"),
        (["train", "--set", "run.recipes=copled"], "coupled"),
        (["convert", "fh", "a", "b"], "hf"),
    ],
)
def test_the_nearest_right_name_is_told(bitnet, arguments, nearest):
    status, _, err = bitnet(*arguments)
    assert status == 2 and nearest in only_line(err).replace(arguments[-1], "")


@pytest.mark.parametrize("value", ["x" * 10_000, "a\nb", "\x1b[31mred", "\u202ekcab"])
def test_a_value_is_shown_short_and_harmless(command, value):
    for assignment in (f"data.corpus={value}", value, f"{value}.a=1", f"model.{value}=1"):
        status, _, err = command("--set", assignment)
        line = only_line(err)
        assert status == 2 and len(line) < flags.ERROR_CHARS + 50 and line.isprintable()


def test_an_argument_of_other_bytes_is_one_line(command):
    status, _, err = command("--set", "data.corpus=text:/caf\udce9/*")
    assert status == 2 and only_line(err).isprintable()


@pytest.mark.parametrize(
    "seeds", ["", "a", "1,", "3-1", "-1", "0-2,1", "1.5", "²", "0-9999999", "4294967296"]
)
def test_bad_seeds(command, seeds):
    status, _, err = command(f"--seeds={seeds}")
    assert status == 2 and only_line(err).startswith(f"error: --seeds {seeds}: ")


def request(*arguments, **options):
    parser = flags.Parser("bitnet train", "")
    flags.add_run(parser, place="runs", **options)
    return flags.resolve(parser.parse_args(list(arguments)), "train")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("1,5,7", [1, 5, 7]), ("7, 1-2", [7, 1, 2])],
)
def test_seeds(text, seeds):
    assert [rep.seed for rep in request("--seeds", text).replicates] == seeds * 2


@pytest.mark.parametrize(
    "content", [b"", b"fine\n\xff\n" * 99, b"short"], ids=["empty", "not UTF-8", "short"]
)
def test_bad_corpus_file(command, tmp_path, content):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    status, _, err = command("--set", f"data.corpus=text:{path}")
    assert status == 2 and str(path) in only_line(err)


def test_workdir_that_is_a_file(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = command("--workdir", str(workdir))
        assert status == 2 and str(workdir) in only_line(err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", " ", "gs://bucket/run"])
def test_a_workdir_is_a_folder_with_a_name(command, name):
    status, _, err = command(f"--workdir={name}")
    assert status == 2 and "--workdir" in only_line(err)


def test_workdir_in_use(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, _, err = command()
    assert status == 2 and f"{tmp_path / 'run'}: not empty" in only_line(err)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


class Failed(Exception):
    exit_status = 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no"), 2, "error: no\n"),
        (Failed("step 3"), 1, "failed: step 3\n"),
        (run.Interrupted("stopped", 15), 143, "stopped\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_statuses(bitnet, monkeypatch, error, status, line):
    def fail(argv):
        raise error

    monkeypatch.setattr(command_train, "main", fail)
    assert bitnet("train") == (status, "", line)


# Help and requests


def test_help_of_all_commands_is_quick():
    code = "import sys; from bitnet_jax.cli import main; sys.argv = ['bitnet', '--help']\n"
    code += "try: main()\nexcept SystemExit as stop: print(stop.code, 'jax' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert output.stdout.splitlines()[-1] == "0 False" and output.stderr == ""
    assert all(name in output.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(bitnet, name):
    status, out, err = bitnet(name, "--help")
    assert (status, err) == (0, "")
    assert importlib.import_module(f"bitnet_jax.cli.{name}").__doc__.splitlines()[0] in out


def test_help_lists_every_field_as_the_preset_has_it(bitnet):
    for arguments in (["--preset", "125m"], ["--preset=125m", "--seeds", "0-1"], []):
        status, out, err = bitnet("train", "--help", *arguments)
        assert (status, err) == (0, "")
        cfg = presets.preset("125m" if arguments else "quick")
        for section in dataclasses.fields(Config):
            for field in dataclasses.fields(section.type):
                value = flags.as_text(getattr(getattr(cfg, section.name), field.name))
                assert f"\n  {section.name}.{field.name}={value}\n" in out
                assert field.metadata["help"] in out
        for name in config.HYPER_FIELDS:
            assert f"\n  hyper.{name}=" in out
        for name in presets.PRESETS:
            assert name in out
    assert "hyper.coupled_1=0.1 (coupled) 0 (published)\n" in out


def test_request_holds_what_was_asked():
    arguments = "--preset report --set run.steps=50 --set hyper.coupled_1=0"
    arguments = [*arguments.split(), "--set", "hyper.lr_peak=1e-2"]
    asked = request(*arguments, "--seeds", "3-4")
    assert asked.cfg == dataclasses.replace(
        presets.preset("report"),
        run=dataclasses.replace(presets.preset("report").run, steps=50),
    )
    arms = [(rep.name, rep.seed) for rep in asked.replicates]
    assert arms == [("coupled", 3), ("coupled", 4), ("decoupled", 3), ("decoupled", 4)]
    assert {rep.hyper.coupled_1 for rep in asked.replicates} == {0}
    assert {rep.hyper.lr_peak for rep in asked.replicates} == {0.01}
    assert asked.seeds == [3, 4] and not asked.resume
    other = request(*arguments, "--seeds", "3-5")
    assert asked.workdir.parent.name == "runs" and asked.workdir != other.workdir


@pytest.fixture
def saved(tmp_path):
    """A config.json of a run whose replicates are no recipe's."""
    cfg, hyper = presets.override(presets.preset("tiny"), ["model.d_ff=96", "hyper.lr_peak=1e-2"])
    replicates = presets.make_replicates(cfg, [3], hyper)
    arm = dataclasses.replace(replicates[0], name="arm")
    path = tmp_path / "config.json"
    tree = config_file.to_json(cfg, [arm, replicates[1]]) | {"provenance": {}, "n_params": 1}
    path.write_text(json.dumps(tree))
    return path, cfg, [arm, replicates[1]]


def test_a_config_file_gives_fields_and_replicates(saved):
    path, cfg, replicates = saved
    asked = request("--config", str(path))
    assert (asked.cfg, asked.replicates, asked.seeds) == (cfg, replicates, [3])
    asked = request("--config", str(path), "--set", "model.d_ff=32", "--set", "hyper.lr_peak=2e-2")
    assert asked.cfg.model.d_ff == 32 and asked.cfg.model.d_model == cfg.model.d_model
    assert [rep.name for rep in asked.replicates] == ["arm", "published"]
    assert {rep.hyper.lr_peak for rep in asked.replicates} == {2e-2}
    asked = request("--config", str(path), "--seeds", "5,6")
    assert [(rep.name, rep.seed) for rep in asked.replicates] == [
        *(("arm", 5), ("arm", 6), ("published", 5), ("published", 6))
    ]
    assert asked.replicates[0].hyper == replicates[0].hyper
    asked = request("--config", str(path), "--set", "run.recipes=decoupled")
    assert [rep.name for rep in asked.replicates] == ["decoupled"]


def test_an_impossible_seed_of_a_config_file_is_one_line(saved, bitnet):
    path, *_ = saved
    tree = json.loads(path.read_text())
    tree["replicates"][0]["seed"] = -1
    path.write_text(json.dumps(tree))
    status, _, err = bitnet("train", "--config", path, "--dry-run")
    assert status == 2 and "seed=-1" in only_line(err)
    assert bitnet("train", "--config", path, "--dry-run", "--seeds", "1")[0] == 0


def test_a_config_file_by_hand_may_have_a_part(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"model": {"d_ff": 96}, "run": {"recipes": ["decoupled"]}}')
    asked = request("--preset", "tiny", "--config", str(path))
    assert asked.cfg.model == dataclasses.replace(presets.preset("tiny").model, d_ff=96)
    assert [rep.name for rep in asked.replicates] == ["decoupled"]


@pytest.mark.parametrize(
    "content",
    [
        *('[]', "null", "{", "", '{"modle": {}}', '{"model": []}', '{"model": {"width": 3}}'),
        *('{"model": {"d_ff": "wide"}}', '{"replicates": {}}', '{"replicates": [{}]}'),
        *('{"replicates": [{"name": "a", "seed": 0, "hyper": null}]}', '{"model": {"d_ff": 1e99}}'),
    ],
)  # fmt: skip
def test_a_damaged_config_file_is_one_line(bitnet, tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    status, _, err = bitnet("train", "--config", path, "--workdir", tmp_path / "run")
    assert status == 2 and only_line(err).startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_dry_run_tells_and_writes_nothing(bitnet, tmp_path, monkeypatch):
    """Also of a model that does not fit here, on a text that is not there."""
    monkeypatch.chdir(tmp_path)
    corpus = "data.corpus=text:/nowhere/*.txt"
    status, out, err = bitnet("train", "--preset", "125m", "--dry-run", "--set", corpus)
    assert (status, err) == (0, "") and not any(tmp_path.iterdir())
    assert "model.d_model=768" in out and "parameters: 123,585,024\n" in out
    assert f"{32 * 1024:,} a step, {32 * 1024 * 10_000:,} in all" in out
    assert "checkpoints: 1.48 GB each, 11 at the end: 16.3 GB" in out


# What a run prints


def summary(*entries, finished=True):
    keys = ("name", "seed", "verdict", "held_out", "failed")
    replicates = [dict(zip(keys, entry, strict=True)) for entry in entries]
    return {"step": 20, "finished": finished, "replicates": replicates}


def test_a_run_ends_with_a_line_per_replicate_and_the_page(capsys):
    asked = request("--workdir", "runs/x")
    good = ("coupled", 0, "healthy", {"loss": 4.56789, "unigram": 6.0}, None)
    assert command_train.tell(asked, summary(good)) == 0
    assert capsys.readouterr() == (
        "coupled seed 0: healthy, held-out 4.568 (unigram 6.000)\npage: runs/x/report.html\n",
        "",
    )
    failure = {"step": 7, "what": "the loss", "lr": 0.1}
    bad = ("coupled", 1, "nonfinite", {"loss": None, "unigram": 6.0}, failure)
    assert command_train.tell(asked, summary(good, bad)) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "coupled seed 1: nonfinite, held-out nan (unigram 6.000)"
    text = "coupled seed 1: step 7: the loss is not finite; learning rate 0.1; no checkpoint before"
    assert err == f"failed: {text}\n"


def test_the_last_good_checkpoint_is_the_one_before_the_failure(capsys, monkeypatch):
    monkeypatch.setattr("bitnet_jax.checkpoint.kept_steps", lambda workdir: [5, 7, 10])
    failure = {"step": 7, "what": "the loss", "lr": 0.1}
    bad = ("coupled", 1, "nonfinite", {"loss": None, "unigram": 6.0}, failure)
    assert command_train.tell(request("--workdir", "runs/x"), summary(bad)) == 1
    assert "runs/x@5:0\n" in capsys.readouterr().err


# Whole processes

STARTS = """
import os, sys, threading, time
from bitnet_jax.cli import main
threading.Thread(target=lambda: (time.sleep({delay}), os.kill(os.getpid(), {signum})), daemon=True).start()
sys.argv = ["bitnet", "train", "--preset", "tiny", "--set", "data.corpus={corpus}", "--workdir", "{run}"]
main()
"""  # noqa: E501


@pytest.mark.parametrize(
    ("delay", "signum"), [(0.05, 2), (0.3, 15), (0.8, 2), (1.6, 2), (2.5, 15), (3.5, 2)]
)
def test_a_signal_before_training_is_one_line(tiny, tmp_path, delay, signum):
    """While importing, tokenising or compiling: stopped without a trace, or saved."""
    code = STARTS.format(
        delay=delay, signum=signum, corpus=tiny.data.corpus, run=tmp_path / "new" / "run"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 128 + signum, process.stderr
    assert "Traceback" not in process.stderr
    last = process.stderr.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("stopped")
    assert (tmp_path / "new").exists() == ("saved" in last)
