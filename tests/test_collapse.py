"""Collapse statistics agree with closed forms, add up, and take arrays of any trainer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr, log_softmax, softmax

from bitnet_jax import collapse, reference

VOCAB = 6
stats = jax.jit(collapse.stats)


@jax.jit
def numbers(logits_RBLV, targets_BL, weights_BL, token_bytes_V, unigram_V):
    """Everything `finalize` says about one batch that is held out and tracked at once."""
    sums = collapse.stats(logits_RBLV, targets_BL, weights_BL, token_bytes_V)
    return collapse.finalize(sums, sums, unigram_V)


def evaluate(logits_BLV, targets_BL, weights_BL=None, token_bytes_V=None, unigram_V=None):
    """`numbers` of one replicate as Python floats under their short names."""
    vocab = logits_BLV.shape[-1]
    weights_BL = np.ones(targets_BL.shape, np.float32) if weights_BL is None else weights_BL
    token_bytes_V = np.ones(vocab) if token_bytes_V is None else token_bytes_V
    unigram_V = np.full(vocab, 1 / vocab) if unigram_V is None else unigram_V
    result = numbers(
        jnp.asarray(logits_BLV, jnp.float32)[None],
        jnp.asarray(targets_BL),
        weights_BL,
        jnp.asarray(token_bytes_V, jnp.float32),
        jnp.asarray(unigram_V, jnp.float32),
    )
    return {key.split("/")[1]: float(value[0]) for key, value in result.items()}


@pytest.fixture
def case():
    """Logits [2, 5, V], targets [2, 5], weights [2, 5]."""
    random = np.random.default_rng(0)
    weights_BL = np.float32([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]])
    logits_BLV = 2 * random.normal(size=(2, 5, VOCAB)).astype(np.float32)
    return logits_BLV, random.integers(0, VOCAB, (2, 5)), weights_BL


def test_every_number_equals_its_definition(case):
    """The definitions of the module's docstring, written out in float64."""
    logits_BLV, targets_BL, weights_BL = case
    token_bytes_V = np.array([1, 2, 3, 4, 5, 6])
    unigram_V = np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    z_NV, y_N, scored_N = logits_BLV.reshape(10, -1), targets_BL.ravel(), weights_BL.ravel() > 0
    q_NV, n = softmax(z_NV.astype(np.float64), axis=-1), scored_N.sum()
    nats = -np.log(q_NV[np.arange(10), y_N])[scored_N].sum()
    entropy = entr(q_NV).sum(axis=-1)[scored_N].mean()
    mean_q_V = q_NV[scored_N].mean(axis=0)
    top_N = z_NV.argmax(axis=-1)
    want = {
        "loss": nats / n,
        "bits_per_byte": nats / math.log(2) / token_bytes_V[y_N[scored_N]].sum(),
        "unique_tokens": len(set(top_N)),
        "unique_targets": len(set(y_N)),
        "concentration": q_NV.max(axis=-1).mean(),
        "mode_share": np.bincount(top_N).max() / 10,
        "entropy": entropy,
        "logit_std": z_NV.std(axis=-1)[scored_N].mean(),
        "mutual_information": entr(mean_q_V).sum() - entropy,
        "unigram_kl": (unigram_V * np.log(unigram_V / mean_q_V)).sum(),
        "overconfidence": nats / n - entropy,
    }
    result = evaluate(*case, token_bytes_V, unigram_V)
    assert result == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_by_hand():
    """Uniform over four tokens is 2 bits a token; scored tokens have 3 and 1 bytes."""
    result = evaluate(
        np.zeros((1, 3, 4)), np.array([[2, 1, 0]]), np.float32([[1, 0, 1]]), np.array([1, 50, 3, 9])
    )
    assert result["bits_per_byte"] == pytest.approx(2 * 2 / 4)


def test_zero_logits_are_the_uniform_prediction():
    vocab, unigram_V = 50257, np.arange(1, 50258) / np.arange(1, 50258).sum()
    result = evaluate(np.zeros((1, 3, vocab)), np.array([[7, 8, 7]]), unigram_V=unigram_V)
    assert result["loss"] == pytest.approx(10.824905, abs=1e-5)
    assert result["entropy"] == pytest.approx(10.824905, abs=1e-5)
    assert (result["unique_tokens"], result["unique_targets"], result["mode_share"]) == (1, 2, 1)
    assert result["concentration"] == pytest.approx(1 / vocab)
    assert result["logit_std"] == 0
    assert result["mutual_information"] == pytest.approx(0, abs=1e-3)
    assert result["unigram_kl"] == pytest.approx(math.log(vocab) - entr(unigram_V).sum(), abs=1e-3)


def test_certain_and_right_has_no_loss_and_no_entropy():
    targets_BL = np.array([[0, 3, 5, 3]])
    result = evaluate(1e4 * np.eye(VOCAB)[targets_BL], targets_BL)
    assert (result["loss"], result["entropy"], result["overconfidence"]) == (0, 0, 0)
    assert (result["concentration"], result["unique_tokens"], result["mode_share"]) == (1, 3, 0.5)


def test_certain_and_wrong_has_finite_loss():
    result = evaluate(1e4 * np.eye(VOCAB)[np.array([[0]])], np.array([[1]]))
    assert (result["loss"], result["entropy"]) == (1e4, 0)


def test_two_certain_contexts_share_ln_2_nats_with_the_prediction():
    result = evaluate(1e4 * np.eye(VOCAB)[np.array([[1, 4]])], np.array([[1, 4]]))
    assert result["mutual_information"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_prediction_that_ignores_its_context_has_no_mutual_information():
    """q = the unigram everywhere: no information, no divergence, one token, loss = entropy."""
    unigram_V = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    targets_BL = np.repeat(np.arange(VOCAB), [8, 6, 2, 2, 1, 1])[None]
    result = evaluate(np.tile(np.log(unigram_V), (1, 20, 1)), targets_BL, unigram_V=unigram_V)
    assert result["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert result["unigram_kl"] == pytest.approx(0, abs=1e-6)
    assert result["unique_tokens"] == 1
    assert result["loss"] == pytest.approx(entr(unigram_V).sum(), rel=1e-6)
    assert result["overconfidence"] == pytest.approx(0, abs=1e-6)


def test_random_logits_have_the_statistics_of_a_fresh_model():
    """z ~ N(0, s^2): H = ln V - s^2/2, loss = ln V + s^2/2, MI = s^2/2 (1 - 1/N) at small s."""
    vocab, n, s = 20_000, 256, 0.577
    random = np.random.default_rng(0)
    logits_BLV = s * random.standard_normal((1, n, vocab), np.float32)
    targets_BL = random.integers(0, vocab, (1, n))
    # One target per position alone leaves a sampling error of s / 16 in the loss.
    scored = np.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1).mean()
    result = evaluate(logits_BLV, targets_BL)
    assert result["entropy"] == pytest.approx(math.log(vocab) - s**2 / 2, abs=0.01)
    assert result["loss"] + scored == pytest.approx(math.log(vocab) + s**2 / 2, abs=0.02)
    assert result["logit_std"] == pytest.approx(s, abs=1e-3)
    assert result["mutual_information"] == pytest.approx(s**2 / 2, rel=0.1)
    assert result["unique_tokens"] > 0.95 * n


def test_overconfidence_is_the_slope_of_the_loss_in_the_logit_scale(case):
    """d loss / d ln s at s = 1 = loss - entropy, by a central difference in float64."""
    logits_BLV, targets_BL, weights_BL = case

    def loss(log_scale):
        log_q = log_softmax(math.exp(log_scale) * logits_BLV.astype(np.float64), axis=-1)
        nll_BL = -np.take_along_axis(log_q, targets_BL[..., None], axis=-1)[..., 0]
        return (nll_BL * weights_BL).sum() / weights_BL.sum()

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert evaluate(*case)["overconfidence"] == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("shift", [-1e3, 1e3])
def test_a_constant_added_to_the_logits_changes_nothing(case, shift):
    logits_BLV, *rest = case
    result = evaluate(logits_BLV + np.float32(shift), *rest)
    assert result == pytest.approx(evaluate(*case), abs=1e-3)


def test_ties_count_for_the_lowest_token():
    """Rows whose maxima are {0, 5}, {0, 3, 5} and {4, 5}: predictions 0, 0 and 4."""
    logits_BLV = np.array([[[2, 0, 1, 0, 0, 2], [3, 0, 0, 3, 0, 3], [-9, -9, -9, -9, -1, -1]]])
    sums = stats(
        jnp.asarray(logits_BLV)[None], jnp.zeros((1, 3), int), jnp.ones((1, 3)), jnp.ones(VOCAB)
    )
    np.testing.assert_array_equal(sums.all_argmax, [[2, 0, 0, 0, 1, 0]])


def test_unscored_positions_count_as_tracked_and_not_in_the_loss(case):
    logits_BLV, targets_BL, weights_BL = case
    unscored_BLV = 9 * np.eye(VOCAB)[np.zeros((2, 5), int)]
    other_BLV = np.where(weights_BL[..., None] > 0, logits_BLV, unscored_BLV)
    result, other = evaluate(*case), evaluate(other_BLV, targets_BL, weights_BL)
    changed = {key for key in result if result[key] != other[key]}
    assert changed == {"concentration", "unique_tokens", "mode_share"}


def test_tracked_and_held_out_batches_feed_different_numbers(case):
    sums = stats(*(jnp.asarray(x) for x in (case[0][None], *case[1:])), jnp.ones(VOCAB))
    zeros = jax.tree.map(jnp.zeros_like, sums)
    uniform_V = jnp.full(VOCAB, 1 / VOCAB)
    tracked_only = collapse.finalize(zeros, sums, uniform_V)
    finite = {key for key, value in tracked_only.items() if np.isfinite(value).all()}
    assert finite == {
        f"collapse/{name}"
        for name in ("unique_tokens", "unique_targets", "concentration", "mode_share")
    }


def test_halves_merge_to_the_whole_in_any_order(case):
    def sums(rows):
        parts = (case[0][None, rows], case[1][rows], case[2][rows])
        return stats(*(jnp.asarray(x) for x in parts), jnp.arange(1.0, VOCAB + 1))

    whole = sums([0, 1])
    for order in ([0, 1], [1, 0]):
        halves = jax.tree.map(lambda *x: jnp.stack(x), *(sums([row]) for row in order))
        merged = collapse.merge(halves)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, whole)


def test_replicates_are_measured_apart(case):
    logits_BLV, *rest = case
    args = [jnp.asarray(x) for x in (*rest, np.ones(VOCAB))]
    both = stats(jnp.stack([logits_BLV, logits_BLV[::-1] ** 2]), *args)
    alone = [
        collapse.stats(jnp.asarray(z)[None], *args) for z in (logits_BLV, logits_BLV[::-1] ** 2)
    ]
    want = jax.tree.map(lambda *x: jnp.concatenate(x), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both, want)


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_a_tempered_unigram_lies_on_the_reference_curve(scale):
    """z = s log pi at every position: loss and entropy of the curve, no mutual information."""
    unigram_V = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    targets_BL = np.repeat(np.arange(VOCAB), [8, 6, 2, 2, 1, 1])[None]
    curve = reference.unigram_curve(unigram_V, unigram_V, [scale])
    result = evaluate(np.tile(scale * np.log(unigram_V), (1, 20, 1)), targets_BL)
    assert result["loss"] == pytest.approx(curve["loss"][0], rel=1e-6)
    assert result["entropy"] == pytest.approx(curve["entropy"][0], rel=1e-6)
    assert result["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_as_many_distinct_predictions_as_positions():
    result = evaluate(1e4 * np.eye(100)[np.arange(100)][None], np.zeros((1, 100), int))
    assert (result["unique_tokens"], result["unique_targets"]) == (100, 1)


def test_arrays_of_another_trainer_are_one_replicate(case):
    """NumPy logits [B, L, V], every position scored, no bytes of tokens."""
    logits_BLV, targets_BL, _ = case
    uniform_V = np.full(VOCAB, 1 / VOCAB)
    sums = collapse.stats(logits_BLV, targets_BL)
    numbers = collapse.finalize(sums, sums, uniform_V)
    short = {key.split("/")[1]: float(value[0]) for key, value in numbers.items()}
    expected = evaluate(logits_BLV, targets_BL)
    del expected["bits_per_byte"]
    assert short == pytest.approx(expected, rel=1e-5)


def test_replicates_may_see_different_text(case):
    logits_BLV, targets_BL, weights_BL = case
    other = (logits_BLV[::-1] ** 2, targets_BL[::-1], weights_BL[::-1])
    both = stats(*(jnp.stack(pair) for pair in zip(case, other, strict=True)), jnp.ones(VOCAB))
    alone = [stats(*map(jnp.asarray, arrays), jnp.ones(VOCAB)) for arrays in (case, other)]
    expected = jax.tree.map(lambda *x: jnp.concatenate(x), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both, expected)


def test_the_large_block_has_the_standard_errors_of_a_ratio_over_windows():
    """Windows of different numbers of scored positions, in two batches, in float64."""
    random = np.random.default_rng(0)
    n_windows, length = 40, 8
    logits_BLV = random.normal(size=(n_windows, length, VOCAB)).astype(np.float32)
    targets_BL = random.integers(0, VOCAB, (n_windows, length))
    weights_BL = np.float32(np.arange(length) < random.integers(2, length + 1, (n_windows, 1)))
    references_KBL = random.uniform(1, 3, (2, n_windows, length))
    halves = [
        stats(logits_BLV[rows], targets_BL[rows], weights_BL[rows], None, references_KBL[:, rows])
        for rows in (slice(0, 15), slice(15, None))
    ]
    numbers = collapse.finalize_large(jax.tree.map(lambda *x: sum(x), *halves))

    log_q = log_softmax(logits_BLV.astype(np.float64), axis=-1)
    nats_BL = -np.take_along_axis(log_q, targets_BL[..., None], axis=-1)[..., 0] * weights_BL
    n_B, nats_B = weights_BL.sum(axis=1), nats_BL.sum(axis=1)
    unigram_B, bigram_B = (references_KBL * weights_BL).sum(axis=-1)
    cases = {"loss": nats_B, "minus_unigram": nats_B - unigram_B, "minus_bigram": nats_B - bigram_B}
    expected = {"held_out/positions": n_B.sum()}
    for key, d_B in cases.items():
        mean = d_B.sum() / n_B.sum()
        residual = np.sum((d_B - mean * n_B) ** 2) * n_windows / (n_windows - 1)
        expected |= {f"held_out/{key}": mean, f"held_out/{key}_se": residual**0.5 / n_B.sum()}
    held_out_mi = numbers.pop("held_out/mutual_information")
    assert {k: float(v[0]) for k, v in numbers.items()} == pytest.approx(expected, rel=1e-4)
    assert float(held_out_mi[0]) == pytest.approx(
        evaluate(logits_BLV, targets_BL, weights_BL)["mutual_information"], rel=1e-4
    )


def test_the_standard_error_over_equal_windows_is_the_usual_one():
    """sd / sqrt(B) of window means; and one window alone tells nothing."""
    random = np.random.default_rng(1)
    logits_BLV, targets_BL = random.normal(size=(12, 5, VOCAB)), random.integers(0, VOCAB, (12, 5))
    numbers = collapse.finalize_large(stats(logits_BLV, targets_BL))
    log_q = log_softmax(logits_BLV, axis=-1)
    means_B = -np.take_along_axis(log_q, targets_BL[..., None], axis=-1)[..., 0].mean(axis=1)
    error = means_B.std(ddof=1) / math.sqrt(12)
    assert float(numbers["held_out/loss_se"][0]) == pytest.approx(error, rel=1e-4)
    assert "held_out/minus_unigram" not in numbers
    alone = collapse.finalize_large(stats(logits_BLV[:1], targets_BL[:1]))
    assert math.isnan(alone["held_out/loss_se"][0])


def test_a_window_without_a_scored_position_is_no_sample(case):
    """A window of padding changes neither the mean nor its standard error."""
    logits_BLV, targets_BL = case[0], case[1]
    weights_BL = np.ones(targets_BL.shape, np.float32)
    whole = collapse.finalize_large(stats(logits_BLV, targets_BL, weights_BL))
    logits_BLV, targets_BL = (np.concatenate([x, x[:1]]) for x in (logits_BLV, targets_BL))
    weights_BL = np.concatenate([weights_BL, 0 * weights_BL[:1]])
    padded = collapse.finalize_large(stats(logits_BLV, targets_BL, weights_BL))
    for key, value in whole.items():
        assert float(padded[key][0]) == pytest.approx(float(value[0]), rel=1e-5), key
