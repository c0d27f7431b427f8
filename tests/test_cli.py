"""A mistake on the command line is one line that names it, and exit status 2."""

import dataclasses
import sys

import pytest

from bitnet_jax import config, presets
from bitnet_jax.config import Config, UserError
from bitnet_jax.run import Interrupted, TrainingFailed
from experiments import common, train


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """Call `python -m experiments.train` in this process; returns status and both outputs."""
    monkeypatch.setenv("XLA_FLAGS", common.DETERMINISTIC)  # main() would leave it behind

    def command(*arguments, body=train.body, sweep=False):
        default = ["--set", f"data.corpus={tiny.data.corpus}", "--workdir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["train", "--preset", "tiny", *default, *arguments])
        capsys.readouterr()
        status = 0
        try:
            common.main(train.__doc__, "train", "quick", body, sweep=sweep)
        except SystemExit as stop:
            status = stop.code
        except KeyboardInterrupt as stop:  # pytest would stop, too
            status = repr(stop)
        return status, *capsys.readouterr()

    return command


def error_lines(err):
    """What is left on the terminal: lines without progress bars."""
    lines = err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("tokenizing ")]


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("modle.d_model=64", ["section", "'modle'", "model, data, optim, run, hyper"]),
        ("model.width=64", ["model field 'width'", "d_model"]),
        ("hyper.learning_rate=1", ["hyper field 'learning_rate'", "lr_peak"]),
        ("d_model=64", ["--set d_model=64", "section.field=value"]),
        ("model.d_model", ["--set model.d_model", "section.field=value"]),
        ("model.d_model=wide", ["model.d_model=wide", "a whole number"]),
        ("model.d_model=64.5", ["model.d_model=64.5", "a whole number"]),
        ("hyper.lr_peak=high", ["hyper.lr_peak=high", "a number"]),
        ("hyper.lr_peak=nan", ["hyper.lr_peak=nan", "finite"]),
        ("hyper.decoupled_1=-1", ["hyper.decoupled_1=-1", "at least 0"]),
        ("hyper.weight_quant=2", ["hyper.weight_quant=2", "between 0 and 1"]),
        ("model.tied_embedding=maybe", ["model.tied_embedding=maybe", "true or false"]),
        ("model.layout=gpt", ["model.layout=gpt", "b158 or report"]),
        ("model.dtype=float16", ["model.dtype=float16", "float32 or bfloat16"]),
        ("model.n_heads=3", ["model.n_heads=3", "must divide model.d_model=32"]),
        ("model.n_kv_heads=3", ["model.n_kv_heads=3", "must divide model.n_heads=2"]),
        ("model.n_layers=0", ["model.n_layers=0", "positive"]),
        ("model.vocab_size=299", ["model.vocab_size=299", "300"]),
        ("data.corpus=wiki", ["data.corpus=wiki", "stdlib, text:GLOB or tfds:NAME"]),
        ("data.corpus=text:/nowhere/*.txt", ["text:/nowhere/*.txt", "no file"]),
        ("data.validation=rest", ["data.validation=rest", "text:GLOB"]),
        ("data.tokenizer=words", ["data.tokenizer=words", "bpe:N, gpt2 or gpt2:FOLDER"]),
        ("data.tokenizer=bpe:100", ["data.tokenizer=bpe:100", "at least 257"]),
        ("data.holdout=1", ["data.holdout=1.0", "between 0 and 1"]),
        ("data.seq_len=1", ["data.seq_len=1", "at least 2"]),
        ("data.seq_len=100000", ["data.seq_len=100000", "tokens", "fewer than the 100001"]),
        ("data.eval_batches=5000", ["data.eval_batches=5000", "windows", "needs 20000"]),
        ("optim.beta1=1", ["optim.beta1=1.0", "[0, 1)"]),
        ("optim.clip_norm=0", ["optim.clip_norm=0", "positive"]),
        ("run.recipes=b158,adam", ["run.recipes", "'adam'", "report_decoupled"]),
        ("run.recipes=", ["run.recipes is empty"]),
        ("run.steps=1", ["run.steps=1", "at least 2"]),
        ("run.eval_every=0", ["run.eval_every=0", "positive"]),
        ("hyper.warmup_steps=11", ["hyper.warmup_steps=11", "use 0 to 10"]),
        ("run.init=runs/old", ["run.init=runs/old", "fork:WORKDIR[@STEP[:REPLICATE]]"]),
        ("run.init=fork:/nowhere@5", ["/nowhere@5", "no checkpoints in /nowhere"]),
    ],
)
def test_bad_setting(command, assignment, named):
    status, _, err = command("--set", assignment)
    (line,) = error_lines(err)
    assert status == 2 and line.startswith("error: ")
    for text in named:
        assert text in line


@pytest.mark.parametrize("seeds", ["", "a", "1,", "3-1", "-1", "0-2,1", "1.5", "²"])
def test_bad_seeds(command, seeds):
    status, _, err = command(f"--seeds={seeds}")
    (line,) = error_lines(err)
    assert status == 2 and line.startswith(f"error: --seeds {seeds}: ")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("1,5,7", [1, 5, 7]), ("7, 1-2", [7, 1, 2])],
)
def test_seeds(text, seeds):
    request = common.parse("doc", "train", "tiny", ["--seeds", text])
    assert [rep.seed for rep in request.replicates] == seeds * 2


def test_unknown_preset(command):
    status, _, err = command("--preset", "huge")
    assert (status, error_lines(err)) == (
        2,
        [f"error: unknown preset 'huge'; known: {', '.join(presets.PRESETS)}"],
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty file"),
        (b"fine\n\xff\n" * 99, "not UTF-8 at byte 5"),
        (b"short", "tokens, fewer"),
    ],
)
def test_bad_corpus_file(command, tmp_path, content, problem):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    status, _, err = command("--set", f"data.corpus=text:{path}")
    (line,) = error_lines(err)
    assert status == 2 and str(path) in line and problem in line


def test_workdir_that_is_a_file(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = command("--workdir", str(workdir))
        (line,) = error_lines(err)
        assert status == 2 and str(workdir) in line and "cannot be used as workdir" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_workdir_in_use(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, _, err = command()
    assert (status, error_lines(err)) == (
        2,
        [f"error: {tmp_path / 'run'}: not empty; add --resume to go on, or give another --workdir"],
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no"), 2, "error: no"),
        (TrainingFailed("step 3"), 1, "failed: step 3"),
        (Interrupted("stopped", 15), 143, "stopped; go on with the same command"),
        (Interrupted("stopped", 2), 130, "stopped; go on with the same command"),
        (KeyboardInterrupt(), 130, "stopped before training began"),
    ],
)
def test_exit_statuses(command, error, status, line):
    def body(request):
        raise error

    assert command(body=body, sweep=True) == (status, "", line + "\n")


def test_unknown_option(command):
    status, _, err = command("--steps", "5")
    assert status == 2 and err.splitlines()[-1].endswith("unrecognized arguments: --steps 5")


def test_help_lists_every_field(command):
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert f"\n  {section.name}.{field.name}=" in out
            assert field.metadata["help"] in out
    for name in config.HYPER_FIELDS:
        assert f"\n  hyper.{name}=" in out
    for name in presets.PRESETS:
        assert name in out


def test_request_holds_what_was_asked(tmp_path):
    arguments = (
        "--preset report --set run.steps=50 --set hyper.coupled_1=0 --set hyper.lr_peak=1e-2"
    )
    request = common.parse("doc", "train", "tiny", [*arguments.split(), "--seeds", "3-4"])
    assert request.cfg == dataclasses.replace(
        presets.preset("report"),
        run=dataclasses.replace(presets.preset("report").run, steps=50),
    )
    assert [(r.name, r.seed) for r in request.replicates] == [
        ("report", 3),
        ("report", 4),
        ("report_decoupled", 3),
        ("report_decoupled", 4),
    ]
    assert {r.hyper.coupled_1 for r in request.replicates} == {0}
    assert {r.hyper.lr_peak for r in request.replicates} == {0.01}
    assert request.resume is False
    other = common.parse("doc", "train", "tiny", [*arguments.split(), "--seeds", "3-5"])
    assert request.workdir.parent.name == "runs" and request.workdir != other.workdir
