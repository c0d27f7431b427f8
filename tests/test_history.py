"""Logs of other trainers: every format says the same, and what is wrong with one is one line."""

import argparse
import csv
import html
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from bitnet_jax import diagnosis, elsewhere, forecast, history, history_page
from bitnet_jax.cli import predict
from bitnet_jax.fields import UserError

REFERENCES = diagnosis.of_numbers(50257, 7.1)
FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
STEPS = range(20, 2001, 20)


def losses(end, start=10.8):
    """A loss that falls to `end` within 200 steps."""
    return [end + (start - end) * math.exp(-step / 40) for step in STEPS]


def entries(values, **constant):
    """Rows of a log with its own names."""
    pairs = zip(STEPS, values, strict=True)
    return [{"step": step, "loss": float(np.float32(x)), **constant} for step, x in pairs]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)
    return path


def write_state(path, rows):
    path.write_text(json.dumps({"global_step": 1, "log_history": [*rows, {"train_runtime": 1.5}]}))
    return path


def write_events(folder, rows):
    with SummaryWriter(str(folder)) as board:
        for row in rows:
            for key in row.keys() - {"step"}:
                board.add_scalar(key, row[key], row["step"])
    return folder


WRITERS = {
    "log.jsonl": write_jsonl,
    "trainer_state.json": write_state,
    "log.csv": write_csv,
    "runs": write_events,
}


def diagnose(path, references=REFERENCES, **how):
    return diagnosis.diagnose(history.read(path, **how), references)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_holds_the_same_numbers(tmp_path, name):
    rows = entries(losses(9.8), lr=1e-3)
    run = history.read(WRITERS[name](tmp_path / name, rows))
    assert run.columns["loss"].steps_N.tolist() == list(STEPS)
    np.testing.assert_array_equal(run.columns["loss"].values_N, [row["loss"] for row in rows])
    np.testing.assert_allclose(run.columns["lr"].values_N, 1e-3)
    assert diagnosis.evaluations(run)[-1]["sum_lr"] == pytest.approx(2000e-3)


@pytest.mark.parametrize(
    ("label", "rows"),
    [
        ("unlearned", entries(losses(9.7), lr=1e-3)),
        ("unlearned", entries(losses(9.7))),  # after 1000 steps no rate is needed
        ("below_unigram", entries(losses(5.0))),
        ("stalled", entries(losses(7.1))),
        ("stalled", entries(losses(7.3), lr=1e-3)),
        ("slow", entries([7.8 - 0.15 * math.log2(n) / 2 for n in STEPS], lr=1e-3)),
        ("slow", entries(losses(9.7), lr=1e-5)),  # a sum of 0.02: not late
        ("slow", entries(losses(9.7))[:45]),  # 900 steps
        ("init", entries(losses(10.8))[:10]),
        ("unigram_transit", entries(losses(9.0))[:10]),
        ("regression", entries(losses(5.0)[:50] + [6.0] * 50)),
        ("nonfinite", entries([*losses(5.0)[:99], math.nan])),
        ("nonfinite", entries(losses(5.0)[:90] + [0.0] * 10)),  # as transformers logs NaN
        ("nonfinite", entries(losses(5.0), grad_norm=math.inf)),
        ("dead", entries(losses(9.7), entropy=9.7)),
        ("underscaled", entries(losses(9.7), entropy=10.6)),
        ("overconfident", entries(losses(9.7), entropy=3.0)),
        ("context_blind", entries(losses(7.1), mutual_information=0.01)),
        ("healthy", [row | {"eval_loss": row["loss"]} for row in entries(losses(5.0))]),
    ],
)
def test_a_log_is_judged_by_what_it_holds(tmp_path, label, rows):
    assert diagnose(write_jsonl(tmp_path / "log.jsonl", rows)).verdict.name == label


@pytest.mark.parametrize(
    ("log", "label"),
    [
        ("adamw_trainer_state.json", "healthy"),
        ("adam_trainer_state.json", "stalled"),
        ("adam", "stalled"),
        ("loop.csv", "below_unigram"),
    ],
)
def test_real_logs_of_other_trainers(log, label):
    """Written by parity/foreign_logs.py, which also gives the references of their text."""
    result = diagnose(FOREIGN / log, diagnosis.of_numbers(1024, 5.963))
    assert (result.verdict.name, result.notes) == (label, ())


def test_a_loss_of_batches_in_the_order_of_a_text_raises_no_alarm_at_any_step():
    """It goes up and down by half a nat with the documents."""
    run = history.read(FOREIGN / "loop.csv")
    for n in range(30, 301, 10):
        start = {
            role: replace(c, steps_N=c.steps_N[:n], values_N=c.values_N[:n])
            for role, c in run.columns.items()
        }
        references = diagnosis.of_numbers(1024, 5.963)
        assert not diagnosis.diagnose(replace(run, columns=start), references).alarm


def test_the_norm_of_the_head_is_compared_with_its_first(tmp_path):
    rows = entries(losses(9.7), entropy=10.6)
    rows = [row | {"lm_head_norm": 30 * 0.98**i} for i, row in enumerate(rows)]
    result = diagnose(write_jsonl(tmp_path / "log.jsonl", rows))
    assert result.verdict.name == "underscaled_decayed"
    assert "head_norm" not in result.unknown and "entropy" not in result.unknown


def test_what_a_log_of_losses_does_not_say_is_named_with_its_column(tmp_path):
    result = diagnose(write_jsonl(tmp_path / "a.jsonl", entries(losses(9.7))))
    assert {
        "eval_loss",
        "lr",
        "entropy",
        "mutual_information",
        "head_norm",
    } <= result.unknown.keys()
    assert "dead" in result.unknown["entropy"] and "context_blind" not in result.unknown["entropy"]
    learned = [row | {"val_loss": 5.0} for row in entries(losses(5.0))]
    assert diagnose(write_jsonl(tmp_path / "b.jsonl", learned)).unknown == {}


def test_a_training_loss_stands_beside_the_frequencies_of_its_own_text(tmp_path):
    """A held-out one beside their loss on held-out text."""
    unigram = {"loss": 7.6, "entropy": 7.1}
    references = {"uniform": {"loss": 10.8}, "unigram": unigram}
    rows = entries(losses(7.2), lr=1e-3)
    training = diagnose(write_jsonl(tmp_path / "a.jsonl", rows), references)
    assert (training.verdict.name, "7.10" in training.verdict.evidence) == ("stalled", True)
    rows = [{"step": row["step"], "eval_loss": row["loss"]} for row in rows]
    held_out = diagnose(write_jsonl(tmp_path / "b.jsonl", rows), references)
    assert (held_out.verdict.name, "7.60" in held_out.verdict.evidence) == ("healthy", True)


def test_without_references_only_what_needs_none_is_said(tmp_path):
    stuck = write_jsonl(tmp_path / "a.jsonl", entries(losses(9.7)))
    back = write_jsonl(tmp_path / "b.jsonl", entries(losses(5.0)[:50] + [6.0] * 50))
    for references in ({}, diagnosis.of_numbers(50257, None)):
        assert diagnose(stuck, references).verdict.name == "insufficient_data"
        assert diagnose(back, references).verdict.name == "regression"


def test_noise_of_single_batches_is_no_regression(tmp_path):
    random = np.random.default_rng(0)
    rows = [{"step": n, "loss": 5 + random.normal()} for n in range(5000)]
    assert diagnose(write_jsonl(tmp_path / "log.jsonl", rows)).verdict.name == "below_unigram"


def test_after_a_resume_the_later_rows_count(tmp_path):
    """Also those of steps that the first part had passed and the second logs at other places."""
    first, second = range(0, 200, 10), range(155, 400, 10)
    rows = [{"step": n, "loss": 9.0} for n in first] + [{"step": n, "loss": 5.0} for n in second]
    run = history.read(write_jsonl(tmp_path / "log.jsonl", rows))
    assert run.columns["loss"].steps_N.tolist() == [*range(0, 155, 10), *second]
    assert "155" in run.notes[0]


def test_a_line_that_is_still_written_is_left_out_and_a_damaged_one_named(tmp_path):
    path = write_jsonl(tmp_path / "log.jsonl", entries(losses(5.0)))
    text = path.read_text()
    path.write_text(text + '{"step": 9999, "lo')
    assert len(history.read(path).log.rows) == len(text.splitlines())
    path.write_text('{"step": 1, "lo\n' + text)
    with pytest.raises(UserError, match=r"log\.jsonl:1: "):
        history.read(path)


def test_rows_in_no_order_are_sorted_and_of_a_repeated_step_the_last_counts(tmp_path):
    rows = entries(losses(5.0))
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    run = history.read(write_jsonl(tmp_path / "a.jsonl", shuffled))
    np.testing.assert_array_equal(run.columns["loss"].steps_N, STEPS)
    assert len(run.notes) == 1
    twice = [row | {"loss": x} for row in rows for x in (1.0, row["loss"])]
    run = history.read(write_jsonl(tmp_path / "b.jsonl", twice))
    np.testing.assert_array_equal(run.columns["loss"].values_N, [row["loss"] for row in rows])
    assert "100" in run.notes[0]


def test_a_loss_that_is_not_finite_for_a_while_is_told_with_its_step(tmp_path):
    values = losses(5.0)
    values[7] = math.inf
    run = history.read(write_jsonl(tmp_path / "log.jsonl", entries(values)))
    assert run.broken is None and "step 160" in run.notes[0]
    broken = history.read(write_jsonl(tmp_path / "b.jsonl", entries(values[:50] + [math.nan] * 50)))
    assert broken.broken[0] == STEPS[50]
    result = diagnosis.diagnose(broken, {})
    assert (result.since, result.alarm) == (STEPS[50], True)


def test_columns_are_found_by_their_usual_names(tmp_path):
    """W&B's export of a chart, Lightning's logger, nested objects; and others by --map."""
    cases = {
        "Step,run - train/loss,run - train/loss__MIN,run - train/loss__MAX": ("loss", 1),
        "epoch,step,train_loss,val_loss,lr-AdamW": ("lr", 4),
        "train/global_step;train/loss;eval/loss": ("eval_loss", 2),
        "iter\tlm loss\tlm loss validation\tgrad-norm": ("grad_norm", 3),
    }
    for header, (role, place) in cases.items():
        delimiter = next(d for d in "\t;," if d in header)
        names = header.split(delimiter)
        cells = delimiter.join(str(10 + i) for i in range(len(names)))
        (tmp_path / "log.csv").write_text(f"{header}\n{cells}\n")
        column = history.read(tmp_path / "log.csv").columns[role]
        assert (column.name, column.values_N.tolist()) == (names[place], [10.0 + place])
    path = write_jsonl(tmp_path / "log.jsonl", [{"it": 1, "train": {"ce": 2.5, "loss": 9}}])
    run = history.read(path, ["step=it", "loss=train/ce"])
    assert run.columns["loss"].values_N.tolist() == [2.5] and "train/loss" in run.unread


def test_settings_come_from_the_log_and_whoever_has_it_knows_better(tmp_path):
    folder = tmp_path / "runs"
    with SummaryWriter(str(folder)) as board:
        board.add_scalar("loss", 9.7, 1)
        arguments = {"optim": "adamw_torch", "weight_decay": 0.1, "output_dir": "x"}
        board.add_text("args", json.dumps(arguments), 0)
    assert history.read(folder).settings == {"optim": "adamw_torch", "weight_decay": 0.1}
    run = history.read(folder, (), {"optim": "torch.optim.Adam"})
    assert diagnosis.couples(run.settings) and not diagnosis.couples({"optim": "adam"})
    (tmp_path / "log.csv").write_text("step,loss,weight_decay\n1,2,0.1\n2,None,0.1\n")
    run = history.read(tmp_path / "log.csv")
    assert run.settings == {"weight_decay": 0.1} and len(run.columns["loss"].steps_N) == 1
    assert not diagnosis.couples({"optim": "AdamW", "weight_decay": 0.1})


def test_an_event_file_of_tensorflow_and_one_that_was_cut_off(tmp_path):
    """Scalars as tensors, by value or as bytes; a cut ends the file without a word."""
    path = tmp_path / "events.out.tfevents.1"
    writer = RecordWriter(str(path))
    for step in (1, 2):
        event = Event(step=step)
        tensor = event.summary.value.add(tag="loss").tensor
        tensor.dtype = 1
        if step == 1:
            tensor.float_val.append(4.5)
        else:
            tensor.tensor_content = struct.pack("<f", 3.5)
        writer.write(event.SerializeToString())
    writer.close()
    assert history.read(path).columns["loss"].values_N.tolist() == [4.5, 3.5]
    path.write_bytes(path.read_bytes()[:-3])
    assert history.read(path).columns["loss"].values_N.tolist() == [4.5]


def test_a_folder_of_a_trainer_gives_its_last_checkpoint(tmp_path):
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        write_state(path, [{"step": step, "loss": 3.0}])
    assert history.read(tmp_path).last_step == 100


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.txt", "once upon a time\nthere was", "not a log"),
        ("a.bin", b"\xff\xfe\x00", "not a log"),
        ("a.csv", "step,loss\n", "without any numbers"),
        ("a.csv", "step,loss\n1,2,3\n", "a.csv:2"),
        ("a.csv", "step,loss\n1,two\n", "line 2: loss is no number: two"),
        ("a.csv", "step,los\n1,2\n", "--map loss=COLUMN; it has los"),
        ("a.csv", "epoch,loss\n1,2\n", "--map step=COLUMN"),
        ("a.csv", "step,a - loss,b - loss\n1,2,3\n", "'a - loss', 'b - loss'"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n[1]\n', "a.jsonl:2"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n{"step": 2\n{}\n', "a.jsonl:2"),
        ("a.csv", "step,loss,run_name\n1,2,a\n1,3,b\n", "2 runs by its column run_name: a, b"),
        ("events.out.tfevents.1", "no events at all", "damaged, or not an event file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, name, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        history.read(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_several_runs_in_a_folder_are_named(tmp_path):
    for name in ("one", "two"):
        write_events(tmp_path / name, entries(losses(5.0))[:2])
    with pytest.raises(UserError, match="holds 2 runs; name one of one, two"):
        history.read(tmp_path)
    with pytest.raises(UserError, match="neither"):
        (tmp_path / "empty").mkdir()
        history.read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[3, 0, 1]"), ("a.json", '{"x": 3, "y": 0, "z": 1}'),
                          ("a.txt", "3\n0\n1\n"), ("a.npy", None)]
)  # fmt: skip
def test_counts_give_the_entropy_of_the_frequencies(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content) if content else np.save(path, np.array([3, 0, 1]))
    references = diagnosis.of_counts(path)
    assert references["uniform"]["loss"] == pytest.approx(math.log(3))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert references["unigram"]["loss"] == pytest.approx(entropy)


@pytest.mark.parametrize("content", ["", "[]", "[1, -2]", "a b c", "[[1, 2], [3, 4]]", "[0, 0]"])
def test_a_file_that_is_no_counts_is_refused(tmp_path, content):
    (tmp_path / "counts").write_text(content)
    with pytest.raises(UserError, match="--counts"):
        diagnosis.of_counts(tmp_path / "counts")


def test_the_page_draws_every_column_beside_the_references(tmp_path):
    rows = [row | {"entropy": 10.5, "grad_norm": math.nan} for row in entries(losses(9.7), lr=1e-3)]
    rows = [row | {"eval_loss": row["loss"]} for row in rows[:3]]
    rows[0]["grad_norm"] = 1.0
    run = history.read(write_jsonl(tmp_path / "<log>.jsonl", rows))
    html = history_page.render(run, diagnosis.diagnose(run, REFERENCES), REFERENCES)
    assert html.count("<svg") == 5 and "&lt;log&gt;" in html and "<log>" not in html
    assert "held-out" in html and ">unigram<" in html


def test_triage_of_a_log_exits_as_triage_does_and_writes_a_page(tmp_path, bitnet):
    stuck = write_jsonl(tmp_path / "stuck.jsonl", entries(losses(9.7)))
    numbers = ("--vocab-size", 50257, "--unigram-loss", 7.1)
    status, out, _ = bitnet("triage", "--log", stuck, *numbers)
    assert status == 1 and "unlearned" in out and (tmp_path / "stuck.jsonl.html").is_file()
    assert bitnet("triage", "--log", stuck, *numbers, "--exit-zero")[0] == 0
    fine = write_jsonl(tmp_path / "fine.jsonl", entries(losses(5.0)))
    assert bitnet("triage", "--log", fine, *numbers, "--page", tmp_path / "p.html")[0] == 0
    assert (tmp_path / "p.html").is_file() and not (tmp_path / "fine.jsonl.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("runs/x", "--log", "y"),
        ("runs/x", "--counts", "y"),
        ("--log", "x", "--text", "y"),
        ("--log", "x", "--counts", "y", "--vocab-size", "5"),
        ("--log", "x", "--vocab-size", "-5"),
        ("--log", "x", "--vocab-size", "50257", "--unigram-loss", "11"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(bitnet, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x", entries(losses(5.0)))
    status, _, err = bitnet("triage", *arguments)
    assert status == 2 and err.count("\n") == 1


SETTINGS = {
    "optim": "torch.optim.Adam", "weight_decay": 0.1, "learning_rate": 1e-3, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1,
    "max_steps": 300, "hidden_size": 64, "max_grad_norm": 0.0, "tie_word_embeddings": True,
}  # fmt: skip


def test_settings_of_a_log_are_values_of_predict():
    assert elsewhere.of_log(SETTINGS) == {
        "optimizer": "adam", "weight_decay": 0.1, "lr": 1e-3, "betas": "0.9,0.95", "steps": 300,
        "schedule": "constant", "warmup": 30, "width": 64, "tied": True,
    }  # fmt: skip
    wrong = {"weight_decay": "auto", "max_steps": -1, "learning_rate": math.nan, "optim": "lion"}
    assert elsewhere.of_log(wrong | {"lr_scheduler_type": "polynomial"}) == {}
    assert elsewhere.family("paged_adamw_8bit") == "adamw" and not elsewhere.couples(wrong)


def test_the_command_for_a_log_is_one_that_predict_takes():
    words = elsewhere.command(elsewhere.of_log(SETTINGS)).replace("TOKENS_PER_BATCH", "512").split()
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer")
    parser.add_argument("--counts")
    predict.add_setting(parser.add_argument)
    args = parser.parse_args(words[2:])
    values = {"optimizer": args.optimizer} | predict.given(args)
    assert values == elsewhere.of_log(SETTINGS) | {"tokens_per_batch": 512}
    elsewhere.check(values)


def test_the_prediction_of_a_log_is_that_of_predict(bitnet, tmp_path):
    """Of the fixture with torch.optim.Adam, whose rate is constant after 20 steps of warm-up."""
    counts, page = tmp_path / "counts.txt", tmp_path / "page.html"
    counts.write_text("".join(f"{10**6 // n}\n" for n in range(1, 1025)))
    rates = tmp_path / "rates.txt"
    logged = history.read(FOREIGN / "adam").columns["lr"]
    pairs = zip(logged.steps_N, logged.values_N, strict=True)
    rates.write_text("".join(f"{step},{rate}\n" for step, rate in pairs))
    known = ("--optimizer", "adam", "--weight-decay", "0.1", "--counts", counts)
    known += ("--tokens-per-batch", "512")
    of_log = ("triage", "--log", FOREIGN / "adam", "--page", page, *known)
    status, output, _ = bitnet(*of_log)
    shape = ("--steps", "300", "--width", "64", "--layers", "2", "--ff", "128", "--clip", "1")
    _, alone, _ = bitnet("predict", *known, *shape, "--init", "normal:0.02", "--lr-file", rates)
    said = alone.splitlines()[1:]
    assert status == 1 and "  expected: collapse" in said
    assert set(said) <= set(output.splitlines())
    assert all(html.escape(line.strip()) in page.read_text() for line in said)
    _, output, _ = bitnet(*of_log[:-2])  # without the tokens of a batch
    line = next(line for line in output.splitlines() if line.startswith(elsewhere.TITLE))
    assert "--tokens-per-batch" in line and "expected:" not in output


def test_a_checkpoint_folder_says_the_models_shape(tmp_path):
    state = json.loads((FOREIGN / "adam_trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "initializer_range": 0.02}')
    assert history.read(tmp_path).settings == {
        "max_steps": 300, "hidden_size": 64, "initializer_range": 0.02
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "expected_error"),
    [
        (("--width", "0"), "--width 0"),
        (("--betas", "0.9"), "--betas 0.9"),
        (("--init", "normal"), "--init normal"),
        (("--weight-decay", "-1"), "--weight-decay -1"),
        (("--schedule", "cosin"), "two-stage"),
        (("--warmup", "900"), "--warmup 900"),
        (("--lr-file", "/nowhere"), "/nowhere"),
    ],
)
def test_a_setting_that_makes_no_run_is_one_line(bitnet, tmp_path, wrong, expected_error):
    """Even where more is missing."""
    page = tmp_path / "page.html"
    status, _, err = bitnet("triage", "--log", FOREIGN / "loop.csv", "--page", page, *wrong)
    assert status == 2 and expected_error in err and err.count("\n") == 1 and not page.exists()


def test_an_optimiser_that_predict_does_not_know_is_named():
    assert "lion" in elsewhere.prediction({}, (), None, "lion")[0]
    assert elsewhere.prediction({}, (), None) == []
    assert tuple(forecast.SCHEDULES) == predict.SCHEDULES and {*predict.SETTING} == {
        *elsewhere.DEFAULTS
    }
