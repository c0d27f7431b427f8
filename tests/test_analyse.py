"""The analysis of a workdir against planted weights, the evaluation of training and known logs."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from bitnet_jax import checkpoint, config, presets, program
from experiments import analyse

RUN = ["run.recipes=b158", "run.steps=20", "run.eval_every=5"]
KERNEL = "block_1/ffn/down/kernel"


@pytest.fixture
def workdir(tiny, tmp_path):
    """An unfinished run of 20 steps with checkpoints at 5 and 10 and evaluations to step 10.

    At step 10 seven entries of the embedding are 2 and one ternary matrix has changed its sign.
    """
    cfg, _ = presets.override(tiny, RUN)
    replicates = presets.make_replicates(cfg, [3], {})
    built = program.build(cfg, replicates)
    settings = config.to_json(built.cfg, replicates)
    folder = tmp_path / "run"
    states = {5: built.init().replace(step=np.array([5], np.int32))}
    params = jax.tree.map(np.array, states[5].params)
    params["embed"]["embedding"][0].flat[:7] = 2.0
    params["block_1"]["ffn"]["down"]["kernel"] *= -1
    states[10] = states[5].replace(step=np.array([10], np.int32), params=params)
    with checkpoint.open_manager(folder, cfg.run) as manager:
        for step, state in states.items():
            checkpoint.save(manager, step, state, settings)
    provenance = {
        "device": "cpu", "cores": 2, "git_commit": None,
        "versions": dict.fromkeys(("python", "jax", "flax", "optax"), "1"),
    }  # fmt: skip
    about = {"corpus": built.tokens.identity, "references": built.references}
    (folder / "config.json").write_text(json.dumps(settings | about | {"provenance": provenance}))
    state = jax.device_put(states[10], built.state_sharding)
    with jax.set_mesh(built.mesh):
        evaluated = jax.tree.map(lambda x: x[0].item(), built.evaluate(state))
    rows = [
        evaluated | {"kind": "eval", "replicate": 0, "step": step, "collapse/unique_tokens": unique}
        for step, unique in ((0, 60), (5, 2), (10, 1))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, evaluated


def test_analysis_of_an_unfinished_run(workdir, capsys):
    folder, evaluated = workdir
    path = analyse.analyse(str(folder), [])
    assert path.read_text().startswith("<!DOCTYPE html>")
    (found,) = json.loads((folder / "analyse.json").read_text())
    weights, tokens, course = found["weights"], found["predictions"], found["trajectory"]

    assert weights["total"]["above_1.1"] == 7
    assert weights["tensors"]["embed/embedding"]["above_1.1"] == 7
    assert (weights["quantised_above_1.1"], weights["total"]["outside"]) == (0, 0)
    flipped = weights["tensors"][KERNEL]
    assert flipped["flip_rate"] == 1 - flipped["zero_rate"] > 0.5
    assert weights["tensors"]["block_0/attn/o/kernel"]["flip_rate"] == 0

    # The same forward pass as the evaluation in training.
    np.testing.assert_allclose(
        tokens["kl_unigram_to_mean"], evaluated["collapse/unigram_kl"], rtol=1e-4
    )
    assert 0 < tokens["distinct_predicted"] <= evaluated["collapse/unique_tokens"]
    (most, *_) = tokens["most_predicted"]
    assert most["share_of_argmax"] >= max(t["share_of_argmax"] for t in tokens["most_frequent"])

    assert course["first"] == {"severe": 5, "complete": 10}
    assert course["average_unique"]["stage 1"] == 1.5
    refused = "refused: no evaluation at step 15; the log has 0 of the 2 of stage 2 (0.0%)"
    assert course["average_unique"]["stage 2"].startswith(refused)
    assert refused in capsys.readouterr().out


def test_divergence_of_two_coins():
    p, q = np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])
    np.testing.assert_allclose(analyse.divergence(p, q), 0.5 * np.log(2))
    assert analyse.divergence(p, p) == 0


@pytest.mark.parametrize("arguments, told", [
    (["nowhere"], "error: nowhere: no checkpoints in nowhere; write it as"),
    (["nowhere", "--milestones", "5,x"], "error: --milestones 5,x: use steps such as"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_status_2(arguments, told):
    command = [sys.executable, "-m", "experiments.analyse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
