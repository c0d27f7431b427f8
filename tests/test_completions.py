"""Documents with prompts: what is scored, how windows hold them, that nothing else is learned."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bitnet_jax import cache, data, documents, loss, presets, program, reference, tokens, train
from bitnet_jax.config import DataConfig, Hyper, Replicate
from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError

PAIRS = [(f"How many cats are {n} cats?", f" There are {n} cats, and no dog.") for n in range(400)]
BARE = ("", " An answer without a question.")


def write(path, pairs=PAIRS):
    """Pairs as .jsonl or .parquet, with names of their own."""
    rows = [{"question": prompt, "answer": text} for prompt, text in pairs]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path, **changes):
    fields = {"feature": "answer", "prompt": "question", "tokenizer": "bpe:300", "seq_len": 32}
    return DataConfig(corpus=f"text:{path}", **fields | changes)


@pytest.fixture
def cfg(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(cache_folder))
    return config(write(tmp_path / "pairs.jsonl", [*PAIRS, BARE]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tokens_of_texts_and_their_ends_are_scored_and_no_others(
    tmp_path, cache_folder, monkeypatch, suffix
):
    """A prompt is encoded as it is when it is continued; the last documents are held out."""
    monkeypatch.setenv("BITNET_JAX_CACHE", str(cache_folder))
    loaded = data.load(config(write(tmp_path / f"pairs{suffix}")))
    bpe, split = loaded.tokenizer, []
    for ids_N, scored_N in (
        (loaded.train_N, loaded.train_scored_N),
        (loaded.validation_N, loaded.validation_scored_N),
    ):
        stops = np.flatnonzero(ids_N == bpe.end_of_text) + 1
        split.append(list(zip(np.split(ids_N, stops), np.split(scored_N, stops), strict=True))[:-1])
    assert [len(part) for part in split] == [380, 20]
    for (ids_n, scored_n), (prompt, text) in zip(split[0] + split[1], PAIRS, strict=True):
        np.testing.assert_array_equal(ids_n[~scored_n], bpe.encode_prompt(prompt))
        assert bpe.decode(ids_n[scored_n][:-1]) == text and ids_n[-1] == bpe.end_of_text
        assert not scored_n[: np.argmax(scored_n)].any() and scored_n[np.argmax(scored_n) :].all()
    assert loaded.identity["train"]["scored"] == loaded.train_scored_N.sum()
    assert loaded.identity["train"]["documents"] == 380


def test_of_a_document_without_a_prompt_all_but_the_first_token_is_scored(cfg):
    """Nothing stands before it in its document, from which it could be told."""
    loaded = data.load(cfg)
    last = loaded.validation_scored_N[-len(loaded.tokenizer.encode_batch([BARE[1]])[0]) - 1 :]
    assert last.tolist() == [False] + [True] * (len(last) - 1)


def test_a_mask_that_is_damaged_is_made_again(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    scored_N = np.array(data.load(cfg).train_scored_N)
    for path in (tmp_path / "cache").glob("tokens-*.npy"):
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
        with pytest.raises(cache.DamagedError):
            tokens._read(path)
    np.testing.assert_array_equal(data.load(cfg).train_scored_N, scored_N)


def document(prompt, text):
    return [False] * prompt + [True] * text


@pytest.mark.parametrize(
    ("documents", "starts", "lengths"),
    [
        ([(2, 2), (1, 2), (1, 2)], [0, 7], [7, 3]),  # two fit into 8 + 1 tokens
        ([(2, 7), (1, 2)], [0, 9], [9, 3]),  # fits exactly
        ([(2, 15), (1, 2)], [0, 8, 17], [9, 9, 3]),  # goes on from its own last token
        ([(2, 9), (1, 2)], [0, 8], [9, 6]),  # the next document fits behind what is left
        ([(12, 2), (1, 2)], [8], [9]),  # the first window has nothing but a prompt
    ],
)
def test_windows_begin_with_prompts_and_hold_whole_documents(documents, starts, lengths):
    scored_N = np.concatenate([document(*sizes) for sizes in documents])
    windows = data.packed(scored_N, 8)
    assert [x.tolist() for x in windows] == [starts, lengths]


@pytest.mark.parametrize("seq_len", [4, 9, 40])
def test_every_scored_token_is_the_target_of_one_window(seq_len):
    random = np.random.default_rng(seq_len)
    sizes = random.integers(1, 25, (60, 2))
    scored_N = np.concatenate([document(*pair) for pair in sizes])
    ids_N = np.arange(1, len(scored_N) + 1)
    windows = data.Windows(ids_N, seq_len, 0, True, True, scored_N)
    batch = windows.cut(np.arange(len(windows)))
    hit = batch.targets[batch.weights > 0]
    assert sorted(hit.tolist()) == ids_N[scored_N].tolist()
    np.testing.assert_array_equal(batch.inputs[..., 1:], batch.targets[..., :-1])
    ends = data.Windows(ids_N, seq_len, int(ids_N[-1]), True, False, scored_N)
    assert ends.cut(np.arange(len(windows))).weights.sum() == len(hit) - 1
    short = data.Windows(ids_N, seq_len, 0, False, True, scored_N).cut(np.arange(len(windows)))
    assert not short.weights[:, -1].any()


def test_continuations_begin_with_whole_prompts_as_far_as_they_fit():
    scored_N = np.concatenate([document(*sizes) for sizes in ((2, 3), (9, 1), (4, 2))])
    held_out = data.TokenData(None, np.arange(len(scored_N)), None, {}, None, scored_N)
    starts, lengths = data.beginnings(held_out, 3, 5, 4)
    assert (starts.tolist(), lengths.tolist()) == ([0, 9, 15], [2, 5, 4])
    starts, lengths = data.beginnings(replace(held_out, validation_scored_N=None), 3, 5, 4)
    assert (starts.tolist(), lengths.tolist()) == ([0, 6, 12], [5, 5, 5])


def test_references_count_scored_tokens_alone():
    ids_N = np.array([1, 1, 2, 3, 1, 2, 2])
    scored_N = np.array([False, False, True, True, False, True, True])
    predictors = reference.fit(ids_N, 4, scored_N)
    np.testing.assert_allclose(predictors.unigram_V, np.array([0.1, 0.1, 3.1, 1.1]) / 4.4)
    expected = np.zeros((4, 4), int)
    expected[1, 2] = 2
    expected[2, 3] = expected[2, 2] = 1
    np.testing.assert_array_equal(predictors.counts_VV.toarray(), expected)
    assert predictors.counts_VV.nnz == 3  # a follower that is not scored is none


def test_what_is_not_scored_gets_no_gradient():
    """Exactly 0 for its logits, whatever they are."""
    random = np.random.default_rng(0)
    logits_BLV = jnp.asarray(random.normal(size=(3, 8, 11)), jnp.float32)
    targets_BL, weights_BL = random.integers(0, 11, (3, 8)), np.float32(random.random((3, 8)) < 0.5)
    batch = Batch(targets_BL, targets_BL, weights_BL)
    gradient_BLV = np.asarray(jax.grad(loss.cross_entropy)(logits_BLV, batch))
    assert (np.abs(gradient_BLV).max(axis=-1) > 0).tolist() == (weights_BL > 0).tolist()


def test_a_step_does_not_see_the_targets_of_prompts(cfg):
    """From the corpus to the parameters, bit for bit, with references of the scored tokens."""
    tiny = presets.preset("tiny")
    model = replace(tiny.model, n_layers=1)
    tiny = replace(tiny, model=model, data=replace(cfg, batch_size=4))
    built = program.build(tiny, [Replicate("published", 0, Hyper())])
    batch = jax.tree.map(lambda x: x[0, 0], built.batches(0, 1))
    assert built.train_N is None and 0 < batch.weights.mean() < 1
    other = batch.replace(
        targets=jnp.where(batch.weights > 0, batch.targets, (batch.targets + 7) % 300)
    )
    state = jax.tree.map(lambda x: x[0], built.init())
    hyper = jax.tree.map(lambda x: x[0], built.hyper)
    step = jax.jit(
        lambda b: train.train_step(built.cfg, built.seams, state, hyper, b, None)[0].params
    )
    with jax.set_mesh(built.mesh):
        jax.tree.map(np.testing.assert_array_equal, step(batch), step(other))
    scored_N = built.tokens.train_N[built.tokens.train_scored_N]
    unigram_V = reference.unigram_probs(scored_N, 300)
    np.testing.assert_allclose(built.evals.unigram_V, unigram_V, rtol=1e-6)
    held_out = built.evals.small
    nats = float((-np.log(unigram_V)[held_out.targets] * held_out.weights).sum())
    assert built.references["unigram"]["loss"] == pytest.approx(nats / held_out.weights.sum())
    assert built.references["positions"] == held_out.weights.sum() < held_out.weights.size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": "stdlib"}, "data.corpus=stdlib"),
        ({"stripped_lines": True}, "data.stripped_lines"),
        ({"gather": "device"}, "data.gather=device"),
        ({"prompt": "qestion"}, "data.prompt=qestion is not there; it has question, answer; did"),
        ({"feature": "text"}, "data.feature=text is not there"),
    ],
)
def test_a_mistake_is_one_line(cfg, changes, words):
    with pytest.raises(UserError) as error:
        data.load(replace(cfg, **changes))
    assert words in str(error.value)


def test_a_text_file_has_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"only \.jsonl and \.parquet"):
        documents.read_pairs(tmp_path / "a.txt", "prompt", "text")
