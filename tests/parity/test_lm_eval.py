"""The evaluation harness sees our losses and our texts; its tasks and data are written here."""

import json
import math

import hf_models
import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from bitnet_jax import data, hf, loss
from bitnet_jax.config import Hyper
from bitnet_jax.lm_eval import BitNet, cut_at, pad

TEXT = "the cat sat on the mat, and the dogs ran to it. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights and a context of 16 tokens."""
    path = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(path / "cache"))
        tokenizer = hf_models.small_tokenizer()
    cfg, params = hf_models.random_model(hf_models.SHAPES["gqa, untied"], 0)
    hf.export(path / "model", cfg, params, Hyper(), tokenizer)
    settings = json.loads((path / "model" / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 16
    (path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    return path / "model"


@pytest.fixture(scope="module")
def model(folder):
    return BitNet(str(folder), batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def test_the_rolling_log_likelihood_is_our_loss_on_the_same_windows(model):
    """One document of a multiple of L tokens, after the end of the text before it."""
    length, own = model.context, model.model
    ids = model.tok_encode(TEXT * 40, add_special_tokens=False)[: 5 * length]
    text = own.tokenizer.decode(ids)
    assert model.tok_encode(text, add_special_tokens=False) == ids
    stream = np.array([model.prefix_token_id, *ids])
    windows = data.Windows(stream, length, model.eot_token_id, True, True)
    batch = windows.cut(np.arange(len(windows)))
    assert batch.inputs.shape == (5, length)
    logits_BLV = hf_models.logits(own.cfg, own.params, batch.inputs)
    nats = float(loss.cross_entropy(logits_BLV, batch)) * batch.targets.size
    (rolled,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert -rolled == pytest.approx(nats, rel=1e-5)


def test_batches_padding_and_order_do_not_change_a_score(model):
    pairs = [("the cat", " sat"), ("", "the dogs"), (TEXT * 9, " ran"), ("on the mat", ", and")]
    together = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (total, likely) in zip(pairs, together, strict=True):
        ((alone, same),) = model.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)
        assert total == pytest.approx(alone, abs=1e-5) and likely is same
    ids = model.tok_encode("the cat sat")
    n = len(ids) - len(model.tok_encode("the cat"))
    logits_1LV = hf_models.logits(model.model.cfg, model.model.params, np.array([ids[:-1]]))
    log_p = jax.nn.log_softmax(logits_1LV[0])
    own = sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1 - n, len(ids) - 1))
    assert together[0][0] == pytest.approx(own, abs=1e-4)


def test_only_the_continuation_is_scored_and_the_beginning_is_cut():
    batch = pad([([1, 2, 3], [4, 5]), ([7], [8])], 3, 32)
    assert batch.inputs[0, :4].tolist() == [1, 2, 3, 4]
    assert batch.weights.sum(axis=1).tolist() == [2, 1, 0]
    assert (batch.targets * batch.weights).sum(axis=1).tolist() == [9, 8, 0]
    batch = pad([(list(range(50)), [50])], 1, 4)
    assert batch.inputs.tolist() == [[46, 47, 48, 49]] and batch.weights.tolist() == [[0, 0, 0, 1]]


def test_text_ends_before_the_first_stop(model):
    assert cut_at("one. two, three", [",", "."]) == "one" and cut_at("one", ["x"]) == "one"
    how = {"until": [], "max_gen_toks": 12}
    (whole,) = model.generate_until(requests("generate_until", ("the cat", how)))
    ids = model.tok_encode("the cat")
    for _ in range(3):
        logits_1LV = hf_models.logits(model.model.cfg, model.model.params, np.array([ids]))
        ids.append(int(logits_1LV[0, -1, : model.model.tokenizer.vocab_size].argmax()))
    assert whole.startswith(model.model.tokenizer.decode(ids[-3:]))
    stop = whole[3:5]
    (text,) = model.generate_until(requests("generate_until", ("the cat", how | {"until": stop})))
    assert text == whole[: whole.find(stop)]


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "local_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" sat", " ran"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "local_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "local_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


def test_local_tasks_of_each_kind_run_from_a_source(folder, tmp_path):
    """Three tasks over one file of data, started as the harness's own command starts them."""
    rows = [{"question": f"the cat {n}", "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        head = TASK.format(name=name, data=tmp_path / "rows.json")
        (tmp_path / f"{name}.yaml").write_text(head + text)
    results = lm_eval.simple_evaluate(
        model="bitnet_jax",
        model_args=f"source={folder}",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert results["local_choice"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert math.isfinite(results["local_text"]["word_perplexity,none"])
    assert 0 <= results["local_answer"]["exact_match,none"] <= 1
