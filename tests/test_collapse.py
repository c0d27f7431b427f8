"""Collapse statistics agree with closed forms and add up; the verdict names known runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr, log_softmax, softmax

from bitnet_jax import collapse

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
    found = numbers(
        jnp.asarray(logits_BLV, jnp.float32)[None],
        jnp.asarray(targets_BL),
        weights_BL,
        jnp.asarray(token_bytes_V, jnp.float32),
        jnp.asarray(unigram_V, jnp.float32),
    )
    return {key.split("/")[1]: float(value[0]) for key, value in found.items()}


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
    found = evaluate(*case, token_bytes_V, unigram_V)
    assert found == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_by_hand():
    """Uniform over four tokens is 2 bits a token; scored tokens have 3 and 1 bytes."""
    found = evaluate(
        np.zeros((1, 3, 4)), np.array([[2, 1, 0]]), np.float32([[1, 0, 1]]), np.array([1, 50, 3, 9])
    )
    assert found["bits_per_byte"] == pytest.approx(2 * 2 / 4)


def test_zero_logits_are_the_uniform_prediction():
    vocab, unigram_V = 50257, np.arange(1, 50258) / np.arange(1, 50258).sum()
    found = evaluate(np.zeros((1, 3, vocab)), np.array([[7, 8, 7]]), unigram_V=unigram_V)
    assert found["loss"] == pytest.approx(10.824905, abs=1e-5)
    assert found["entropy"] == pytest.approx(10.824905, abs=1e-5)
    assert (found["unique_tokens"], found["unique_targets"], found["mode_share"]) == (1, 2, 1)
    assert found["concentration"] == pytest.approx(1 / vocab)
    assert found["logit_std"] == 0
    assert found["mutual_information"] == pytest.approx(0, abs=1e-3)
    assert found["unigram_kl"] == pytest.approx(math.log(vocab) - entr(unigram_V).sum(), abs=1e-3)


def test_certain_and_right_has_no_loss_and_no_entropy():
    targets_BL = np.array([[0, 3, 5, 3]])
    found = evaluate(1e4 * np.eye(VOCAB)[targets_BL], targets_BL)
    assert (found["loss"], found["entropy"], found["overconfidence"]) == (0, 0, 0)
    assert (found["concentration"], found["unique_tokens"], found["mode_share"]) == (1, 3, 0.5)


def test_certain_and_wrong_has_finite_loss():
    found = evaluate(1e4 * np.eye(VOCAB)[np.array([[0]])], np.array([[1]]))
    assert (found["loss"], found["entropy"]) == (1e4, 0)


def test_two_certain_contexts_share_ln_2_nats_with_the_prediction():
    found = evaluate(1e4 * np.eye(VOCAB)[np.array([[1, 4]])], np.array([[1, 4]]))
    assert found["mutual_information"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_prediction_that_ignores_its_context_has_no_mutual_information():
    """q = the unigram everywhere: no information, no divergence, one token, loss = entropy."""
    unigram_V = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    targets_BL = np.repeat(np.arange(VOCAB), [8, 6, 2, 2, 1, 1])[None]
    found = evaluate(np.tile(np.log(unigram_V), (1, 20, 1)), targets_BL, unigram_V=unigram_V)
    assert found["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert found["unigram_kl"] == pytest.approx(0, abs=1e-6)
    assert found["unique_tokens"] == 1
    assert found["loss"] == pytest.approx(entr(unigram_V).sum(), rel=1e-6)
    assert found["overconfidence"] == pytest.approx(0, abs=1e-6)


def test_random_logits_have_the_statistics_of_a_fresh_model():
    """z ~ N(0, s^2): H = ln V - s^2/2, loss = ln V + s^2/2, MI = s^2/2 (1 - 1/N) at small s."""
    vocab, n, s = 20_000, 256, 0.577
    random = np.random.default_rng(0)
    logits_BLV = s * random.standard_normal((1, n, vocab), np.float32)
    targets_BL = random.integers(0, vocab, (1, n))
    # One target per position alone leaves a sampling error of s / 16 in the loss.
    scored = np.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1).mean()
    found = evaluate(logits_BLV, targets_BL)
    assert found["entropy"] == pytest.approx(math.log(vocab) - s**2 / 2, abs=0.01)
    assert found["loss"] + scored == pytest.approx(math.log(vocab) + s**2 / 2, abs=0.02)
    assert found["logit_std"] == pytest.approx(s, abs=1e-3)
    assert found["mutual_information"] == pytest.approx(s**2 / 2, rel=0.1)
    assert found["unique_tokens"] > 0.95 * n


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
    found = evaluate(logits_BLV + np.float32(shift), *rest)
    assert found == pytest.approx(evaluate(*case), abs=1e-3)


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
    found, other = evaluate(*case), evaluate(other_BLV, targets_BL, weights_BL)
    changed = {key for key in found if found[key] != other[key]}
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


REFERENCES = {"uniform": {"loss": 10.82}, "unigram": {"loss": 6.91}}


def verdict(loss, entropy, sum_lr, logit_std=0.3, mutual_information=0.0):
    """The verdict of a row that has no distinct tokens to look at."""
    row = {
        "eval/loss": loss,
        "collapse/entropy": entropy,
        "collapse/logit_std": logit_std,
        "collapse/mutual_information": mutual_information,
    }
    return collapse.verdict(row, REFERENCES, sum_lr)


@pytest.mark.parametrize(
    ("label", "row"),
    [
        ("init", {"loss": 10.98, "entropy": 10.66, "sum_lr": 0.0, "logit_std": 0.577}),
        ("init", {"loss": 11.32, "entropy": 10.32, "sum_lr": 0.0, "logit_std": 1.0}),
        ("unigram_transit", {"loss": 9.11, "entropy": 10.53, "sum_lr": 0.0005}),  # healthy, step 15
        ("unigram_transit", {"loss": 8.04, "entropy": 9.10, "sum_lr": 0.0008}),  # healthy, step 20
        ("unigram_transit", {"loss": 8.43, "entropy": 10.32, "sum_lr": 0.0008}),  # tied, step 20
        ("healthy", {"loss": 6.52, "entropy": 6.56, "sum_lr": 0.4, "mutual_information": 0.49}),
        ("context_blind", {"loss": 6.80, "entropy": 6.80, "sum_lr": 0.4}),
        ("underscaled", {"loss": 9.74, "entropy": 10.7, "sum_lr": 6.9}),  # the report, at its end
        ("underscaled", {"loss": 9.80, "entropy": 10.78, "sum_lr": 0.4, "logit_std": 0.22}),
        ("underscaled", {"loss": 8.36, "entropy": 9.40, "sum_lr": 0.4}),  # coupled decay
        ("underscaled", {"loss": 9.63, "entropy": 10.56, "sum_lr": 0.4, "logit_std": 0.577}),
        ("overconfident", {"loss": 9.62, "entropy": 3.56, "sum_lr": 0.5, "logit_std": 4.0}),
        ("overconfident", {"loss": 9.62, "entropy": 3.56, "sum_lr": 0.01, "logit_std": 4.0}),
        ("dead", {"loss": 10.81, "entropy": 10.82, "sum_lr": 0.4, "logit_std": 0.01}),
        ("dead", {"loss": 10.98, "entropy": 10.66, "sum_lr": 0.4, "logit_std": 0.577}),
        ("slow", {"loss": 7.56, "entropy": 7.33, "sum_lr": 0.4, "mutual_information": 0.44}),
        ("collapsed", {"loss": 7.09, "entropy": 7.38, "sum_lr": 0.4, "mutual_information": 0.004}),
        ("nonfinite", {"loss": math.nan, "entropy": 6.5, "sum_lr": 0.4}),
        ("nonfinite", {"loss": 6.5, "entropy": math.inf, "sum_lr": 0.4}),
        ("nonfinite", {"loss": math.inf, "entropy": 6.5, "sum_lr": 0.4}),
    ],
)
def test_verdict_of_known_runs(label, row):
    """Loss and entropy of runs whose state is known; no row says how many tokens are distinct."""
    assert verdict(**row) == label


@pytest.mark.parametrize("entropy", np.arange(7.5, 10.8, 0.3))
def test_nothing_on_the_way_to_the_unigram_is_called_a_collapse_early_on(entropy):
    """A healthy model passes through one distinct token and logits too small for its loss."""
    assert verdict(entropy - 0.5, entropy, sum_lr=0.03) == "unigram_transit"


def test_every_label_is_explained_in_the_docstring():
    labels = (
        "nonfinite healthy context_blind init overconfident unigram_transit dead underscaled slow"
    )
    assert [n for n in labels.split() if f"\n    {n} " not in collapse.verdict.__doc__] == []
