"""The reference predictors agree with their definitions, written out."""

import itertools
import json

import numpy as np
import pytest
from scipy.special import entr

from bitnet_jax import reference
from bitnet_jax.data import Batch

VOCAB = 7


def batch(windows, weights) -> Batch:
    return Batch(windows[..., :-1], windows[..., 1:], weights.astype(np.float32))


@pytest.fixture
def case():
    """Train tokens [N], a held-out Batch [6, 8], and a tracked Batch [R=2, 3, 8].

    Token 5 is never followed in training, token 6 never seen.
    """
    random = np.random.default_rng(0)
    train_N = np.append(random.integers(0, 5, 60), 5).astype(np.uint16)
    held_out = batch(random.integers(0, VOCAB, (6, 9)), random.integers(0, 2, (6, 8)))
    return train_N, held_out, batch(random.integers(0, VOCAB, (2, 3, 9)), np.ones((2, 3, 8)))


def brute_bigram(train_N, unigram_V, x):
    """Witten-Bell p(. | x), one count at a time."""
    followers = [int(b) for a, b in itertools.pairwise(train_N) if a == x]
    kinds = len(set(followers))
    if not kinds:
        return unigram_V
    counts = np.array([followers.count(y) for y in range(VOCAB)])
    return (counts + kinds * unigram_V) / (len(followers) + kinds)


def test_unigram_is_add_alpha():
    probs_V = reference.unigram_probs(np.array([0, 0, 2]), 4, alpha=0.5)
    np.testing.assert_allclose(probs_V, np.array([2.5, 0.5, 1.5, 0.5]) / 5, rtol=1e-15)


def test_bigram_rows_are_witten_bell_and_sum_to_one(case):
    train_N = case[0]
    unigram_V = reference.unigram_probs(train_N, VOCAB)
    rows_VV = reference.bigram_rows(
        reference.bigram_counts(train_N, VOCAB), unigram_V, np.arange(VOCAB)
    )
    np.testing.assert_allclose(rows_VV.sum(axis=1), 1, rtol=1e-14)
    for x in range(VOCAB):
        np.testing.assert_allclose(rows_VV[x], brute_bigram(train_N, unigram_V, x), rtol=1e-13)


@pytest.mark.parametrize("count_tokens", [1, 2, 7, 60, 61, 1000])
def test_counts_do_not_depend_on_how_many_are_counted_at_once(case, monkeypatch, count_tokens):
    train_N = case[0]
    monkeypatch.setattr(reference, "COUNT_TOKENS", count_tokens)
    counts_VV = reference.bigram_counts(train_N, VOCAB).toarray()
    pairs = list(itertools.pairwise(train_N.tolist()))
    assert counts_VV.tolist() == [[pairs.count((x, y)) for y in range(VOCAB)] for x in range(VOCAB)]
    unigram_V = reference.unigram_probs(train_N, VOCAB, alpha=0.25)
    ones_V = np.array([(train_N == x).sum() + 0.25 for x in range(VOCAB)])
    np.testing.assert_allclose(unigram_V, ones_V / ones_V.sum(), rtol=1e-14)


@pytest.mark.parametrize("chunk_rows", [2, 64])
def test_scores_match_a_loop_over_positions(case, monkeypatch, chunk_rows):
    monkeypatch.setattr(reference, "CHUNK_ROWS", chunk_rows)
    train_N, held_out, tracked = case
    predictors = reference.fit(train_N, VOCAB)
    scores = reference.references(predictors, held_out, tracked)
    unigram_V = reference.unigram_probs(train_N, VOCAB)
    rows = [brute_bigram(train_N, unigram_V, x) for x in range(VOCAB)]
    scored = [
        (int(x), int(y))
        for x, y, w in zip(
            held_out.inputs.ravel(), held_out.targets.ravel(), held_out.weights.ravel(), strict=True
        )
        if w
    ]
    bigram = scores["bigram"]
    assert bigram["loss"] == pytest.approx(np.mean([-np.log(rows[x][y]) for x, y in scored]))
    assert bigram["entropy"] == pytest.approx(np.mean([entr(rows[x]).sum() for x, _ in scored]))
    distinct = [len({int(rows[x].argmax()) for x in inputs.ravel()}) for inputs in tracked.inputs]
    assert bigram["distinct"] == np.mean(distinct)
    unigram = scores["unigram"]
    assert unigram["loss"] == pytest.approx(np.mean([-np.log(unigram_V[y]) for _, y in scored]))
    assert unigram["entropy"] == pytest.approx(entr(unigram_V).sum())
    assert scores["positions"] == len(scored)
    assert scores["tracked_positions"] == 24
    targets = [len(set(targets.ravel().tolist())) for targets in tracked.targets]
    assert scores["targets"]["distinct"] == np.mean(targets)


def test_without_tracked_positions_all_held_out_ones_are_counted(case):
    train_N, held_out, _ = case
    scores = reference.references(reference.fit(train_N, VOCAB), held_out)
    assert scores["tracked_positions"] == held_out.targets.size
    assert scores["targets"]["distinct"] == len(np.unique(held_out.targets))


def test_uniform_is_ln_v_and_the_result_is_json(case):
    scores = reference.references(reference.fit(case[0], VOCAB), *case[1:])
    assert scores["uniform"] == {"loss": np.log(VOCAB), "entropy": np.log(VOCAB), "distinct": 1}
    assert json.loads(json.dumps(scores)) == scores


def test_ties_go_to_the_lowest_token():
    train_N = np.array([0, 1, 0, 2, 0, 2, 0, 1, 0])  # 1 and 2 follow 0 equally often
    held_out = batch(np.array([[0, 0, 0]]), np.ones((1, 2)))
    scores = reference.fit(train_N, 3).score(held_out)
    assert scores.bigram_argmax.tolist() == [[1, 1]]


def test_only_the_first_fit_tokens_count(case, monkeypatch):
    train_N = case[0]
    monkeypatch.setattr(reference, "FIT_TOKENS", len(train_N))
    first, longer = (reference.fit(x, VOCAB) for x in (train_N, np.append(train_N, [6, 6, 6])))
    np.testing.assert_array_equal(first.unigram_V, longer.unigram_V)
    assert (first.counts_VV != longer.counts_VV).nnz == 0


def test_curve_runs_from_uniform_through_the_unigram(case):
    scores = reference.references(reference.fit(case[0], VOCAB), *case[1:])
    curve = scores["curve"]
    assert curve["scale"] == pytest.approx(np.arange(0, 1.21, 0.05))
    assert curve["loss"][0] == pytest.approx(np.log(VOCAB))
    assert curve["entropy"][0] == pytest.approx(np.log(VOCAB))
    unit_index = curve["scale"].index(1.0)
    assert curve["loss"][unit_index] == pytest.approx(scores["unigram"]["loss"])
    assert curve["entropy"][unit_index] == pytest.approx(scores["unigram"]["entropy"])


def test_curve_is_the_softmax_of_scaled_log_probabilities():
    probs_V = np.array([0.5, 0.3, 0.2])
    curve = reference.unigram_curve(probs_V, np.array([1, 0, 3]), [2.0])
    q_V = np.array([0.25, 0.09, 0.04]) / 0.38
    assert curve["loss"] == [pytest.approx(-(np.log(q_V[0]) + 3 * np.log(q_V[2])) / 4)]
    assert curve["entropy"] == [pytest.approx(-(q_V * np.log(q_V)).sum())]
