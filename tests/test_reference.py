"""The reference predictors agree with their definitions, written out."""

import itertools
import json

import numpy as np
import pytest
from scipy.special import entr

from bitnet_jax import reference

VOCAB = 7


@pytest.fixture
def case():
    """Train tokens [N], held-out windows [n, L+1] with weights [n, L], tracked windows [m, L+1].

    Token 5 is never followed in training, token 6 never seen.
    """
    random = np.random.default_rng(0)
    train_N = np.append(random.integers(0, 5, 60), 5).astype(np.uint16)
    held_out = random.integers(0, VOCAB, (6, 9)).astype(np.int32)
    weights = random.integers(0, 2, (6, 8)).astype(np.float32)
    return train_N, held_out, weights, random.integers(0, VOCAB, (3, 9)).astype(np.int32)


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


@pytest.mark.parametrize("chunk_rows", [2, 64])
def test_scores_match_a_loop_over_positions(case, monkeypatch, chunk_rows):
    monkeypatch.setattr(reference, "CHUNK_ROWS", chunk_rows)
    train_N, held_out, weights, tracked = case
    found = reference.references(train_N, VOCAB, held_out, weights, tracked)
    unigram_V = reference.unigram_probs(train_N, VOCAB)
    rows = [brute_bigram(train_N, unigram_V, x) for x in range(VOCAB)]
    scored = [
        (int(x), int(y))
        for row, weight in zip(held_out, weights, strict=True)
        for x, y, w in zip(row[:-1], row[1:], weight, strict=True)
        if w
    ]
    bigram = found["bigram"]
    assert bigram["loss"] == pytest.approx(np.mean([-np.log(rows[x][y]) for x, y in scored]))
    assert bigram["entropy"] == pytest.approx(np.mean([entr(rows[x]).sum() for x, _ in scored]))
    assert bigram["distinct"] == len({int(rows[x].argmax()) for x in tracked[:, :-1].ravel()})
    unigram = found["unigram"]
    assert unigram["loss"] == pytest.approx(np.mean([-np.log(unigram_V[y]) for _, y in scored]))
    assert unigram["entropy"] == pytest.approx(entr(unigram_V).sum())
    assert found["positions"] == len(scored)
    assert found["tracked_positions"] == 24
    assert found["targets"]["distinct"] == len(set(tracked[:, 1:].ravel().tolist()))


def test_uniform_is_ln_v_and_the_result_is_json(case):
    found = reference.references(case[0], VOCAB, *case[1:])
    assert found["uniform"] == {"loss": np.log(VOCAB), "entropy": np.log(VOCAB), "distinct": 1}
    assert json.loads(json.dumps(found)) == found


def test_ties_go_to_the_lowest_token():
    train_N = np.array([0, 1, 0, 2, 0, 2, 0, 1, 0])  # 1 and 2 follow 0 equally often
    tracked = np.array([[0, 0, 0]])
    found = reference.references(train_N, 3, tracked, np.ones((1, 2)), tracked)
    rows = reference.bigram_rows(
        reference.bigram_counts(train_N, 3), reference.unigram_probs(train_N, 3), np.array([0])
    )
    assert rows[0, 1] == rows[0, 2] and rows[0].argmax() == 1
    assert found["bigram"]["distinct"] == 1


def test_only_the_first_fit_tokens_count(case, monkeypatch):
    train_N, *scored = case
    monkeypatch.setattr(reference, "FIT_TOKENS", len(train_N))
    longer_N = np.append(train_N, [6, 6, 6])
    assert reference.references(longer_N, VOCAB, *scored) == reference.references(
        train_N, VOCAB, *scored
    )


def test_curve_runs_from_uniform_through_the_unigram(case):
    found = reference.references(case[0], VOCAB, *case[1:])
    curve = found["curve"]
    assert curve["scale"] == pytest.approx(np.arange(0, 1.21, 0.05))
    assert curve["loss"][0] == pytest.approx(np.log(VOCAB))
    assert curve["entropy"][0] == pytest.approx(np.log(VOCAB))
    one = curve["scale"].index(1.0)
    assert curve["loss"][one] == pytest.approx(found["unigram"]["loss"])
    assert curve["entropy"][one] == pytest.approx(found["unigram"]["entropy"])


def test_curve_is_the_softmax_of_scaled_log_probabilities():
    probs_V = np.array([0.5, 0.3, 0.2])
    curve = reference.unigram_curve(probs_V, np.array([1, 0, 3]), [2.0])
    q_V = np.array([0.25, 0.09, 0.04]) / 0.38
    assert curve["loss"] == [pytest.approx(-(np.log(q_V[0]) + 3 * np.log(q_V[2])) / 4)]
    assert curve["entropy"] == [pytest.approx(-(q_V * np.log(q_V)).sum())]
