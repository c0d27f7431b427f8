"""What real logs of other trainers get: transformers' Trainer, TensorBoard, a loop with a CSV."""

import foreign_logs
import pytest

from bitnet_jax import diagnosis, elsewhere, history


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Folder of `foreign_logs.main`, and the references of its text. Takes a minute."""
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        foreign_logs.main(folder.relative_to(folder))
        references = diagnosis.of_text(str(folder / "text.txt"), f"hf:{folder / 'tokenizer'}")
    return folder, references


@pytest.mark.parametrize(
    ("log", "label", "settings"),
    [
        ("adamw", "healthy", {}),
        ("adam", "stalled", {}),
        ("adam/runs", "stalled", {"optim": "torch.optim.Adam"}),
        ("loop.csv", "below_unigram", {}),
    ],
)
def test_a_real_log_gets_its_verdict(logs, log, label, settings):
    folder, references = logs
    run = history.read(folder / log, (), settings)
    result = diagnosis.diagnose(run, references)
    print("\n".join(diagnosis.terminal_lines(run, result, references)))
    assert (result.verdict.name, result.alarm) == (label, label == "stalled")
    assert run.last_step == foreign_logs.STEPS


def test_a_trainer_s_arguments_are_in_its_events_and_are_not_those_of_an_optimizer_of_ones_own(
    logs,
):
    """The Trainer writes down the arguments that it has, not the optimiser that it was given."""
    folder, _ = logs
    settings = history.read(folder / "adam" / "runs").settings
    assert settings["optim"].startswith("adamw") and settings["weight_decay"] == 0.1
    assert settings["learning_rate"] == foreign_logs.RATE
    given = {"optim": "torch.optim.Adam"}
    run = history.read(folder / "adam" / "runs", (), given)
    assert elsewhere.couples(run.settings) and not elsewhere.couples(settings)
