"""Collapse statistics agree with closed forms and add up; the verdict names known runs."""

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


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_a_tempered_unigram_lies_on_the_reference_curve(scale):
    """z = s log pi at every position: loss and entropy of the curve, no mutual information."""
    unigram_V = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    targets_BL = np.repeat(np.arange(VOCAB), [8, 6, 2, 2, 1, 1])[None]
    curve = reference.unigram_curve(unigram_V, unigram_V, [scale])
    found = evaluate(np.tile(scale * np.log(unigram_V), (1, 20, 1)), targets_BL)
    assert found["loss"] == pytest.approx(curve["loss"][0], rel=1e-6)
    assert found["entropy"] == pytest.approx(curve["entropy"][0], rel=1e-6)
    assert found["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_as_many_distinct_predictions_as_positions():
    found = evaluate(1e4 * np.eye(100)[np.arange(100)][None], np.zeros((1, 100), int))
    assert (found["unique_tokens"], found["unique_targets"]) == (100, 1)


# The verdict

REFERENCES = {"uniform": {"loss": 10.82}, "unigram": {"loss": 6.91}}
LATE = 0.4  # sum of the learning rates of a run that had the time to learn


def row(loss, entropy, sum_lr=LATE, step=100, std=0.3, mi=0.0, kl=1.0, **more):
    """An evaluation that has no distinct tokens to look at."""
    numbers = {"eval/loss": loss, "collapse/entropy": entropy, "collapse/logit_std": std}
    numbers |= {"collapse/mutual_information": mi, "collapse/unigram_kl": kl}
    return {"step": step, "sum_lr": sum_lr, **numbers, **more}


def head(norm, cosine=0.0):
    return {"decay/norm_ratio_head": norm, "decay/update_weight_cosine_head": cosine}


def steady(*args, times=5, **kwargs):
    """The same evaluation again and again, after one at initialisation."""
    first = row(10.98, 10.66, 0.0, step=0, std=0.577, mi=0.15, kl=3.9)
    return [first, *[row(*args, **kwargs)] * times]


def judge(history):
    return collapse.verdict(history, REFERENCES)


def severity(found):
    return collapse.LABELS[found.name][0]


@pytest.mark.parametrize(
    ("label", "history"),
    [
        ("init", [row(10.98, 10.66, 0.0, 0, 0.577)]),
        ("init", [row(11.32, 10.32, 0.0, 0, 1.0)]),
        ("unigram_transit", steady(9.11, 10.53, 0.0005)),  # healthy, step 15
        ("unigram_transit", steady(8.04, 9.10, 0.0008)),  # healthy, step 20
        ("unigram_transit", steady(8.43, 10.32, 0.0008, mi=0.001)),  # tied embedding, step 20
        ("healthy", steady(6.52, 6.56, mi=0.49)),
        ("healthy", steady(6.5, 6.5, mi=0.3)),  # 4 distinct of 56 greedy tokens
        ("underscaled", steady(9.74, 10.7, 6.9, 10_000)),  # the report, at its end
        ("underscaled_decayed", steady(9.80, 10.78, std=0.22, **head(0.1))),
        ("underscaled_decayed", steady(9.80, 10.78, times=1, **head(0.1))),
        ("underscaled_decayed", steady(8.36, 9.40, **head(0.02))),  # coupled decay
        ("underscaled_head_frozen", steady(9.63, 10.56, std=0.577, mi=0.1, **head(1.0))),
        ("underscaled", steady(9.63, 10.56, std=0.577, mi=0.1, **head(1.3))),
        ("underscaled", steady(9.63, 10.56, std=0.3, mi=0.1, **head(1.0))),
        ("slow", steady(9.60, 10.63, 0.007, 300, 0.577, 0.06)),  # low learning rate
        ("slow", steady(10.54, 10.66, 0.006, 300, 0.572, 0.124)),  # the same, 84 of 128 distinct
        ("slow", steady(7.56, 7.33, mi=0.44)),
        ("bigram_only", steady(7.56, 7.33, mi=0.44, **{collapse.LAST_TOKEN: 0.0})),
        ("slow", steady(7.56, 7.33, mi=0.44, **{collapse.LAST_TOKEN: 0.3})),
        ("overconfident", steady(9.62, 3.56, 0.5, std=4.0)),
        ("overconfident", steady(9.62, 3.56, 0.01, std=4.0)),
        ("dead", steady(10.81, 10.82, std=0.01)),
        ("dead", steady(10.98, 10.66, std=0.577, mi=0.15)),
        ("context_blind", steady(6.80, 6.80)),
        ("context_blind", steady(7.09, 7.38, mi=0.004)),
        ("slow", steady(7.09, 7.38, mi=0.004, times=4)),
        ("repetitive", steady(5.0, 5.1, mi=1.2, **{collapse.REP_4: 0.9})),
        ("healthy", steady(5.0, 5.1, mi=1.2, **{collapse.REP_4: 0.1})),
        ("nonfinite", steady(math.nan, 6.5)),
        ("nonfinite", steady(6.5, math.inf)),
        ("nonfinite", steady(math.inf, 6.5)),
        ("insufficient_data", []),
    ],
)
def test_verdict_of_known_runs(label, history):
    """Loss and entropy of runs whose state is known; no row says how many tokens are distinct."""
    found = judge(history)
    assert found.name == label
    assert found.next == collapse.LABELS[label][-1]


def test_evidence_holds_the_numbers_that_decided():
    assert judge(steady(9.80, 10.78, **head(0.1))).evidence == (
        "loss 9.80 is 2.89 above the unigram's 6.91; entropy 10.78 is 0.98 above the loss; "
        "mutual information 0.000; head norm 0.1 of initial"
    )


def test_a_missing_reference_is_insufficient():
    assert collapse.verdict(steady(6.5, 6.5), {"unigram": {"loss": 6.9}}).name == (
        "insufficient_data"
    )


def test_a_hole_in_the_evaluations_is_insufficient():
    """452 evaluations 5 steps apart, then one at step 10,000; and steps that vary, as runs make."""
    rows = [row(6.5, 6.5, step=5 * i, mi=0.3) for i in range(452)]
    assert judge(rows).name == "healthy"
    assert judge([*rows, row(6.5, 6.5, step=10_000, mi=0.3)]).name == "insufficient_data"
    ends = sorted({step for every in (100, 101) for step in range(0, 2000, every)})
    for n in range(1, len(ends)):
        assert judge([row(6.5, 6.5, step=s, mi=0.3) for s in ends[:n]]).name == "healthy"


def test_a_loss_that_comes_back_is_a_regression():
    """7.97 to 9.80 and away from the word frequencies; the cause comes first where it is known."""
    falls = [row(loss, loss, mi=0.2, kl=kl) for loss, kl in ((9.1, 2.2), (7.97, 1.1))]
    back = [(8.75, 1.9), (9.3, 2.4), (9.8, 2.9)]
    history = falls + [row(loss, loss + 1, mi=0.2, kl=kl) for loss, kl in back]
    assert judge(history).name == "regression"
    assert judge(history[:-1]).name == "underscaled"
    assert "loss drifts up: 9.80, was 7.97" in judge(history).warnings
    assert judge([r | head(0.1) for r in history]).name == "underscaled_decayed"
    same_kl = judge([r | {"collapse/unigram_kl": 1.1} for r in history])
    assert same_kl.name == "underscaled" and "drifts" not in " ".join(same_kl.warnings)


def test_hidden_states_without_rank_are_told_from_those_of_a_tied_embedding():
    history = steady(7.2, 7.2, mi=0.3, **head(1.2), **{collapse.RANK: 20.0})
    history[0][collapse.RANK] = 198.0
    assert judge(history).name == "rank_collapse"
    assert judge(history[:-1]).name == "slow"
    tied = [{k: v for k, v in r.items() if not k.endswith("_head")} for r in history]
    assert judge(tied).name == "slow"


@pytest.mark.parametrize("entropy", np.arange(7.5, 10.8, 0.3))
def test_nothing_on_the_way_to_the_unigram_is_called_a_collapse_early_on(entropy):
    """A healthy model passes through one distinct token and logits too small for its loss."""
    found = judge(steady(entropy - 0.5, entropy, 0.029, mi=0.001))
    assert (found.name, found.warnings) == ("unigram_transit", ())


@pytest.mark.parametrize("mi", [0.0, 0.3])
@pytest.mark.parametrize("entropy", [3.0, 7.0, 9.0, 10.8])
def test_an_alarm_does_not_vanish_as_the_loss_rises(entropy, mi):
    losses = np.arange(6.0, 12.0, 0.05)
    found = [severity(judge(steady(loss, entropy, mi=mi))) for loss in losses]
    assert found == sorted(found)
    assert found[-1] == collapse.ALARM


@pytest.mark.parametrize("norm", [1.0, 0.6])
def test_an_alarm_does_not_vanish_as_the_logits_fade(norm):
    """Down the curve of the tempered unigram to the uniform prediction."""
    pi_V = 1 / np.arange(1, 1001) / np.sum(1 / np.arange(1, 1001))
    scales = np.linspace(1, 0, 21)
    curve = reference.unigram_curve(pi_V, pi_V, scales)
    references = {"uniform": {"loss": math.log(1000)}, "unigram": {"loss": curve["loss"][0]}}
    for loss, entropy, s in zip(curve["loss"], curve["entropy"], scales, strict=True):
        history = steady(loss, entropy, std=s, **head(norm * s))
        assert severity(collapse.verdict(history, references)) == collapse.ALARM


def measured(logits_BLV, targets_BL, unigram_V):
    """A history of one measurement, taken from logits, again and again."""
    sums = stats(jnp.asarray(logits_BLV)[None], targets_BL, jnp.ones(targets_BL.shape), np.ones(50))
    numbers = collapse.finalize(sums, sums, unigram_V)
    found = {key: float(value[0]) for key, value in numbers.items()}
    return [found | {"step": step, "sum_lr": LATE} for step in range(5)]


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0, 4.0])
def test_the_verdict_sees_neither_shift_nor_names_nor_number_of_tokens(scale):
    """From a faded head over word frequencies to certainty about the wrong tokens."""
    random = np.random.default_rng(0)
    unigram_V = np.arange(50, 0, -1) / np.arange(51).sum()
    references = {
        "uniform": {"loss": math.log(50)},
        "unigram": {"loss": float(entr(unigram_V).sum())},
    }
    noise_BLV = (scale > 1) * random.normal(size=(2, 64, 50))
    logits_BLV = np.float32(scale * (2 * np.log(unigram_V) + noise_BLV))
    targets_BL = random.choice(50, (2, 64), p=unigram_V)
    order = random.permutation(50)
    inverse = np.argsort(order)
    cases = [
        (logits_BLV, targets_BL, unigram_V),
        (logits_BLV + np.float32(50), targets_BL, unigram_V),
        (logits_BLV[..., order], inverse[targets_BL], unigram_V[order]),
        (np.tile(logits_BLV, (1, 2, 1)), np.tile(targets_BL, (1, 2)), unigram_V),
    ]
    found = [collapse.verdict(measured(*case), references) for case in cases]
    assert [v.name for v in found] == [found[0].name] * 4
    assert severity(found[0]) == collapse.ALARM


def series(group, rows):
    """Measured: step, sum_lr, loss, entropy, std, MI, KL; norm and cosine of a group."""
    keys = (f"decay/norm_ratio_{group}", f"decay/update_weight_cosine_{group}")
    return [
        row(*(r[i] for i in (2, 3, 1, 0, 4, 5, 6)), **dict(zip(keys, r[7:], strict=True)))
        for r in rows
    ]


UNTIED = {"uniform": {"loss": 10.825}, "unigram": {"loss": 7.137}}  # books, 128 tokens a step
TIED = {"uniform": {"loss": 8.318}, "unigram": {"loss": 6.800}}  # Python's library, 4096 tokens
COUPLED_UNTIED = series(
    "head",
    [
        (0, 0.0, 10.95, 10.66, 0.5775, 0.158, 3.867, math.nan, math.nan),
        (5, 0.0001, 10.95, 10.66, 0.5767, 0.1575, 3.866, 0.999, -0.866),
        (10, 0.0002, 10.94, 10.66, 0.5743, 0.1562, 3.863, 0.995, -0.867),
        (15, 0.0005, 10.93, 10.66, 0.5706, 0.1539, 3.858, 0.989, -0.867),
        (115, 0.0267, 9.777, 10.72, 0.2649, 0.01898, 2.796, 0.462, -0.906),
        (120, 0.029, 9.689, 10.69, 0.2445, 0.01722, 2.695, 0.424, -0.907),
        (125, 0.0315, 9.607, 10.62, 0.2247, 0.01658, 2.591, 0.386, -0.908),
        (160, 0.0515, 9.084, 10.22, 0.1199, 0.01341, 2.132, 0.139, -0.895),
    ],
)
COUPLED_TIED = series(
    "embedding",
    [
        (0, 0.0, 8.378, 8.267, 0.32, 0.04678, 1.759, math.nan, math.nan),
        (20, 0.0063, 8.119, 8.285, 0.251, 0.01596, 1.535, 0.772, -0.783),
        (40, 0.0246, 7.312, 7.946, 0.3264, 0.00819, 0.5718, 0.348, -0.611),
        (60, 0.0531, 7.218, 7.619, 0.3702, 0.04415, 0.4347, 0.153, -0.275),
        (80, 0.0821, 7.271, 7.748, 0.3508, 0.01125, 0.5013, 0.101, -0.0683),
        (500, 0.4127, 7.091, 7.378, 0.4707, 0.005427, 0.2506, 0.153, -0.118),
    ],
)
DECOUPLED_UNTIED = series(
    "head",
    [
        (0, 0.0, 10.95, 10.66, 0.5775, 0.158, 3.867, math.nan, math.nan),
        (5, 0.0001, 10.94, 10.66, 0.5774, 0.1578, 3.862, 1.0, -0.101),
        (15, 0.0005, 10.89, 10.66, 0.5762, 0.1558, 3.825, 0.999, -0.124),
        (50, 0.0051, 10.08, 10.66, 0.5684, 0.1016, 3.073, 0.996, 0.0466),
        (75, 0.0114, 8.729, 10.19, 0.6309, 0.05786, 1.69, 1.02, 0.218),
        (100, 0.0202, 7.896, 7.643, 0.8382, 0.0979, 0.8131, 1.09, 0.396),
        (125, 0.0315, 7.81, 6.672, 0.9801, 0.1979, 0.7239, 1.18, 0.509),
        (150, 0.0453, 7.764, 6.141, 1.087, 0.2786, 0.7619, 1.29, 0.558),
        (200, 0.0804, 7.664, 6.423, 1.15, 0.429, 0.6778, 1.62, 0.58),
        (250, 0.1255, 7.51, 6.364, 1.139, 0.5318, 0.6319, 2.06, 0.583),
        (300, 0.1806, 7.558, 6.453, 1.179, 0.6632, 0.5954, 2.57, 0.531),
        (320, 0.2054, 7.452, 6.274, 1.07, 0.6721, 0.6246, 2.77, 0.471),
        (335, 0.2251, 7.611, 5.374, 1.305, 0.758, 0.7123, 2.92, 0.483),
        (500, 0.438, 7.421, 5.254, 1.258, 0.918, 0.5879, 4.39, 0.38),
        (765, 0.6326, 7.116, 6.457, 0.9832, 0.8028, 0.4262, 5.52, 0.372),
        (1000, 0.6879, 7.092, 5.884, 1.099, 0.8701, 0.4125, 5.85, 0.341),
    ],
)
DECOUPLED_TIED = series(
    "embedding",
    [
        (0, 0.0, 8.378, 8.267, 0.32, 0.04678, 1.759, math.nan, math.nan),
        (20, 0.0126, 7.007, 7.597, 0.8966, 0.01277, 0.3806, 1.05, 0.305),
        (40, 0.0416, 6.823, 6.517, 1.434, 0.1524, 0.1889, 1.43, 0.513),
        (60, 0.07, 6.713, 6.754, 1.38, 0.2138, 0.1631, 1.64, 0.337),
        (120, 0.1476, 6.631, 6.206, 1.539, 0.5489, 0.1436, 1.98, 0.27),
        (500, 0.3422, 5.678, 5.733, 1.64, 1.062, 0.09789, 2.79, 0.0),
    ],
)


def timeline(history, references):
    return [collapse.verdict(history[:n], references) for n in range(1, len(history) + 1)]


@pytest.mark.parametrize(
    ("history", "references", "slow"),
    [(DECOUPLED_UNTIED, UNTIED, True), (DECOUPLED_TIED, TIED, False)],
)
def test_a_healthy_run_is_never_warned_of(history, references, slow):
    """Nor where a batch of 128 tokens makes it two nats over-confident and its loss jumps."""
    found = timeline(history, references)
    names = list(dict.fromkeys(v.name for v in found))
    assert names == ["init", "unigram_transit", *["slow"] * slow, "healthy"]
    assert [v.warnings for v in found] == [()] * len(found)


@pytest.mark.parametrize(
    ("history", "references", "warned", "flagged"),
    [(COUPLED_UNTIED, UNTIED, 15, 125), (COUPLED_TIED, TIED, 40, 60)],
)
def test_coupled_decay_is_warned_of_and_named(history, references, warned, flagged):
    """Untied, the first warning comes while the loss is 0.04 above the healthy run's."""
    found = timeline(history, references)
    steps = [r["step"] for r in history]
    assert min(s for s, v in zip(steps, found, strict=True) if v.warnings) == warned
    alarms = [s for s, v in zip(steps, found, strict=True) if severity(v) == collapse.ALARM]
    assert alarms == [s for s in steps if s >= flagged]
    assert found[-1].name == "underscaled_decayed"


def test_updates_along_an_embedding_that_makes_no_logits_are_no_warning():
    """Rows of tokens that are not in the batch do nothing but shrink, in healthy runs, too."""
    shrinks = {"decay/norm_ratio_embedding": 0.9, "decay/update_weight_cosine_embedding": -0.95}
    history = [r | shrinks for r in DECOUPLED_UNTIED]
    assert [v.warnings for v in timeline(history, UNTIED)] == [()] * len(history)


@pytest.mark.parametrize(
    ("text", "history"),
    [
        ("logits too small: entropy 1.00 above the loss", steady(7.5, 8.5, 0.06, mi=0.3, times=1)),
        ("context is ignored: mutual information 0.0050", steady(8.0, 8.0, 0.035, mi=0.005)),
    ],
)
def test_a_warning_comes_before_the_alarm(text, history):
    found = judge(history)
    assert found.warnings == (text,) and severity(found) == collapse.FINE


def test_every_label_is_explained_in_the_docstring():
    lines = {line.split()[0] for line in collapse.verdict.__doc__.splitlines() if line.strip()}
    assert set(collapse.LABELS) <= lines
