"""Regularisers: formulas, gradients, optima; and what the claims of the sweep say of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import entr, log_softmax, logsumexp, rel_entr, softmax
from test_lab import make_rows

from bitnet_jax import presets, train
from bitnet_jax.config import Hyper
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy
from experiments import sweep_regularisers as study
from experiments.lab import rows
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, judge
from experiments.lab.exhibits import Exhibits
from experiments.lab.studies import QUICK
from experiments.regularisers import REGULARISERS, penalty, regularised_loss

PI = np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02])


@pytest.fixture
def windows():
    """Logits [2, 5, 7], windows [2, 6] in which tokens recur, weights [2, 5], seven of them 1."""
    logits_BLV = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32) * 3
    weights_BL = np.float32([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]])
    return logits_BLV, np.array([[3, 1, 3, 3, 0, 1], [6, 6, 2, 5, 2, 2]]), weights_BL


def batch_of(windows_BL, weights_BL):
    inputs_BL, targets_BL = np.int32(windows_BL[:, :-1]), np.int32(windows_BL[:, 1:])
    return Batch(inputs_BL, targets_BL, jnp.float32(weights_BL))


def value(name, logits_BLV, windows_BL, weights_BL, weight=1.0, pi=PI):
    """The named regulariser on windows, as a training step adds it."""
    batch = batch_of(windows_BL, weights_BL)
    return penalty(jnp.asarray(logits_BLV), batch, {name: weight}, jnp.float32(pi))


def written_out(name, logits_BLV, windows_BL, weights_BL):
    """The regularisers position by position, float64."""
    z = np.asarray(logits_BLV, np.float64)
    log_q, total, mean_q = log_softmax(z, axis=-1), 0.0, np.zeros(7)
    for b, n in np.argwhere(weights_BL):
        lq, y, seen = log_q[b, n], windows_BL[b, n + 1], set(windows_BL[b, : n + 1])
        q = np.exp(lq)
        mean_q += q / weights_BL.sum()
        total += {
            "label_smoothing": -lq.mean() + lq[y],
            "z_loss": logsumexp(z[b, n]) ** 2,
            "entropy_bonus": 1 - entr(q).sum() / np.log(7),
            "frequency_penalty": q @ np.log(PI / PI.min()),
            "diversity_bonus": sum(q[v] for v in seen),
            "unlikelihood": -sum(np.log(1 - q[v]) for v in seen - {y}),
        }.get(name, 0.0)
    return rel_entr(PI, mean_q).sum() if name == "coverage" else total / weights_BL.sum()


@pytest.mark.parametrize("name", REGULARISERS)
def test_each_regulariser_is_its_formula(windows, name):
    got = value(name, *windows, weight=0.25)
    assert got.dtype == jnp.float32
    assert float(got) == pytest.approx(0.25 * written_out(name, *windows), rel=1e-5)


def test_the_loss_sums_the_named_regularisers_with_their_weights(windows):
    logits_BLV, batch = windows[0], batch_of(*windows[1:])
    weights = {name: i / 8 for i, name in enumerate(REGULARISERS)}
    got = regularised_loss(logits_BLV, batch, Hyper(extra=weights), jnp.float32(PI))
    want = sum(weight * written_out(name, *windows) for name, weight in weights.items())
    assert float(got - cross_entropy(logits_BLV, batch)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_weight_of_zero_adds_exactly_nothing(windows, name):
    batch = batch_of(*windows[1:])

    def total(logits_BLV, extra):
        return regularised_loss(logits_BLV, batch, Hyper(extra=extra), jnp.float32(PI))

    plain = jax.value_and_grad(cross_entropy)(windows[0], batch)
    for extra in ({name: 0.0}, {}):
        regularised = jax.value_and_grad(total)(windows[0], extra)
        for with_it, without in zip(regularised, plain, strict=True):
            np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("name", REGULARISERS)
def test_unscored_positions_change_no_regulariser(windows, name):
    """Neither their logits nor, at the end of a window, their targets."""
    logits_BLV, windows_BL, weights_BL = windows
    weights_BL = np.array(weights_BL)
    weights_BL[:, -1] = 0
    other_logits_BLV = np.where(weights_BL[..., None] == 0, 1 - logits_BLV, logits_BLV)
    other_windows_BL = np.array(windows_BL)
    other_windows_BL[:, -1] = 4
    grad = jax.value_and_grad(functools.partial(value, name))
    loss, grad_BLV = grad(logits_BLV, windows_BL, weights_BL)
    other, other_grad_BLV = grad(other_logits_BLV, other_windows_BL, weights_BL)
    assert loss == other
    np.testing.assert_array_equal(grad_BLV, other_grad_BLV)
    np.testing.assert_array_equal(np.abs(grad_BLV).sum(axis=-1) > 0, weights_BL > 0)


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_batch_without_scored_positions_has_no_gradient(windows, name):
    loss, grad_BLV = jax.value_and_grad(functools.partial(value, name))(
        windows[0], windows[1], 0 * windows[2]
    )
    assert np.isfinite(loss)
    np.testing.assert_array_equal(grad_BLV, 0)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
@pytest.mark.parametrize("name", REGULARISERS)
def test_extreme_logits_give_finite_values_and_gradients(windows, name, size):
    """One token has all probability: a wrong and repeated one, the target, and a tie of two."""
    logits_BLV = np.zeros((2, 5, 7), np.float32)
    logits_BLV[0, :, 3], logits_BLV[1, :, 2], logits_BLV[1, :, 6] = size, -size, -size
    logits_BLV[1, :3, 5] = size
    loss, grad_BLV = jax.value_and_grad(functools.partial(value, name))(logits_BLV, *windows[1:])
    assert np.isfinite(loss) and np.isfinite(grad_BLV).all()


# A toy: 16 windows of 5 tokens that begin with `a b` and whose third token follows P.
P = np.array([8, 4, 2, 1, 1]) / 16
A, B = 0, 3
TOY_PI = np.array([0.5, 0.3, 0.1, 0.07, 0.03])
SEEN = np.isin(np.arange(5), [A, B])


def minimiser(name, weight, p=P, pi=TOY_PI):
    """Logits [5] that minimise cross-entropy + weight * regulariser in the context `a b`."""
    thirds = np.repeat(np.arange(5), np.round(16 * p).astype(int))
    windows_BL = np.stack([np.full(16, A), np.full(16, B), thirds], axis=1)
    weights_BL = np.tile(np.float32([0, 1]), (16, 1))

    def objective(z_V):
        z_BLV = jnp.broadcast_to(z_V, (16, 2, 5))
        extra = value(name, z_BLV, windows_BL, weights_BL, weight, pi) if name else 0.0
        return cross_entropy(z_BLV, batch_of(windows_BL, weights_BL)) + extra

    start_V = jnp.linspace(-1, 2, 5)
    descend = jax.jit(
        lambda z_V: jax.lax.fori_loop(0, 4000, lambda _, z_V: z_V - jax.grad(objective)(z_V), z_V)
    )
    return np.asarray(descend(start_V), np.float64)


def solve(q_of_mu, low, high):
    """The distribution q(mu), with mu such that it sums to 1."""
    return q_of_mu(brentq(lambda mu: q_of_mu(mu).sum() - 1, low, high, xtol=1e-14))


def entropy_optimum(beta):
    """p / q = mu + beta log q, each q by bisection."""

    def q_of_mu(mu):
        return np.array([brentq(lambda q, p=p: p / q - beta * np.log(q) - mu, 1e-9, 50) for p in P])

    return solve(q_of_mu, 0.3, 3)


def unlikelihood_optimum(alpha):
    """p / q = mu + alpha (1 - p) / (1 - q) for seen tokens, a quadratic in q; else p / mu."""

    def q_of_mu(mu):
        # p (1 - q) = mu q (1 - q) + alpha (1 - p) q
        b = mu + P + alpha * (1 - P)
        return np.where(SEEN, (b - np.sqrt(b * b - 4 * mu * P)) / (2 * mu), P / mu)

    return solve(q_of_mu, 0.05, 5)


@pytest.mark.parametrize(
    ("name", "weight", "optimum"),
    [
        ("", 0.0, P),
        ("label_smoothing", 0.1, 0.9 * P + 0.1 / 5),
        ("z_loss", 0.1, P),
        ("entropy_bonus", 0.5, entropy_optimum(0.5 / np.log(5))),
        (
            "frequency_penalty",
            0.3,
            solve(lambda mu: P / (mu + 0.3 * np.log(TOY_PI / 0.03)), 1e-3, 2),
        ),
        ("diversity_bonus", 0.5, solve(lambda mu: P / (mu + 0.5 * SEEN), 1e-3, 2)),
        ("coverage", 0.5, (P + 0.5 * TOY_PI) / 1.5),
        ("unlikelihood", 1.0, unlikelihood_optimum(1.0)),
    ],
)
def test_bayes_optimum(name, weight, optimum):
    """What a model that can represent every distribution predicts after training."""
    assert optimum.sum() == pytest.approx(1)
    np.testing.assert_allclose(softmax(minimiser(name, weight)), optimum, atol=2e-5)


def test_the_z_loss_chooses_the_logits_that_are_log_probabilities():
    np.testing.assert_allclose(minimiser("z_loss", 0.1), np.log(P), atol=1e-4)


def test_rewards_move_the_optimum_as_their_names_say():
    """More entropy, rarer tokens, tokens that the window lacks, no repetition."""
    q = {
        name: softmax(minimiser(name, 0.5))
        for name in ("entropy_bonus", "frequency_penalty", "diversity_bonus", "unlikelihood")
    }
    assert entr(q["entropy_bonus"]).sum() > entr(P).sum() + 0.05
    assert q["frequency_penalty"] @ np.log(TOY_PI) < P @ np.log(TOY_PI) - 0.1
    assert q["diversity_bonus"][SEEN].sum() < P[SEEN].sum() - 0.05
    assert q["unlikelihood"][SEEN].sum() < P[SEEN].sum() - 0.05


def test_coverage_leaves_the_text_alone_where_its_mean_is_the_unigram():
    """Two contexts of other distributions: both are learned exactly, at any weight."""
    np.testing.assert_allclose(softmax(minimiser("coverage", 2.0, pi=P)), P, atol=2e-5)
    windows_BL = np.array([[c, y] for c, p in enumerate((P, P[::-1])) for y in range(5)
                           for _ in range(round(16 * p[y]))])  # fmt: skip
    weights_BL, pi = np.ones((32, 1), np.float32), (P + P[::-1]) / 2

    def objective(z_CV):
        z_BLV = z_CV[windows_BL[:, 0]][:, None]
        extra = value("coverage", z_BLV, windows_BL, weights_BL, 2.0, pi)
        return cross_entropy(z_BLV, batch_of(windows_BL, weights_BL)) + extra

    descent = jax.jit(jax.grad(objective))
    gradient = descent(jnp.log(jnp.float32([P, P[::-1]])))
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    swapped = descent(jnp.log(jnp.float32([P[::-1], P])))
    assert np.abs(swapped).max() > 0.1


# ------------------------------------------------------------------------------ arms and the step


def test_every_regulariser_is_an_arm_of_both_recipes_and_so_is_the_bias():
    names = [arm.name for arm in study.ARMS]
    assert len(names) == len(set(names)) == 2 * (1 + len(REGULARISERS) + 1)
    for kind in study.KINDS:
        extras = [arm.extra for arm in study.ARMS if arm.recipe == kind]
        assert [{}, *({name: w} for name, w in study.WEIGHTS.items()), {}] == extras
    assert set(study.WEIGHTS) == set(REGULARISERS) and min(study.WEIGHTS.values()) > 0


def test_every_regulariser_reaches_the_gradient_and_none_the_reported_loss():
    """One step with each weight: another gradient norm than without, the same cross-entropy."""
    cfg = presets.override(presets.preset("tiny"), ["model.vocab_size=300", "model.n_layers=1"])[0]
    tokens_BL = np.random.default_rng(0).integers(0, 300, (4, 17), np.int32)
    batch = Batch(tokens_BL[:, :-1], tokens_BL[:, 1:], np.ones((4, 16), np.float32))
    pi_V = np.float32(np.arange(1, 301) / np.arange(1, 301).sum())
    none = dict.fromkeys(study.WEIGHTS, 0.0)
    state = train.init_state(cfg, Hyper(extra=none), 0)
    step = jax.jit(functools.partial(train.train_step, cfg, study.REGULARISED))

    def numbers(extra):
        _, _, metrics = step(state, Hyper(extra=none | extra), batch, pi_V)
        return float(metrics["train/grad_norm"]), float(metrics["train/loss"])

    plain = numbers({})
    norms_and_losses = {name: numbers({name: weight}) for name, weight in study.WEIGHTS.items()}
    assert {loss for _, loss in norms_and_losses.values()} == {plain[1]}
    assert {name for name, (norm, _) in norms_and_losses.items() if norm == plain[0]} == set()


# ------------------------------------------------------------------------------------------ claims


def frame(jitter=0.0, **changed):
    """Three seeds of every arm; `changed` gives losses and mutual information. Unigram 4."""
    numbers = {"coupled": (5.0, 0.002), "decoupled": (3.0, 0.5)}
    numbers |= {"coupled_unigram_bias": (3.8, 0.05)} | changed
    run_rows = []
    for number, arm in enumerate(study.ARMS):
        name = arm.name.replace(" ", "_")
        loss, context = numbers.get(name, numbers[arm.recipe])
        noise = jitter * np.random.default_rng(number).normal(size=3)
        run_rows += make_rows(
            {arm.name: [loss + 0.01 * s + noise[s] for s in range(3)]}, context=context
        )
    return rows.frame(run_rows)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"coupled_coverage": (3.5, 0.5)}, {"none": FAILS, "small": FAILS}),
        ({"coupled_coverage": (4.7, 0.01)}, {"small": FAILS}),
        ({"coupled_unigram_bias": (3.5, 0.5)}, {"none": FAILS, "masked": FAILS}),
        ({"coupled_unigram_bias": (4.1, 0.05)}, {"masked": FAILS}),
        ({"decoupled_z_loss": (2.7, 0.5)}, {"healthy": FAILS}),
        # The healthy run is young still: nothing tells a collapse from too few steps.
        ({"decoupled": (3.9, 0.5)},
         {"none": UNDECIDED, "masked": UNDECIDED}),
    ],
)  # fmt: skip
def test_claims_follow_from_the_rows(changed, expected):
    statuses = {claim.name: judge(claim, QUICK, frame(**changed)).status for claim in study.CLAIMS}
    assert {name: status for name, status in statuses.items() if status != HOLDS} == expected


def test_p_values_are_adjusted_over_both_recipes():
    """None of 16 is lowered, and a change far beyond the noise stays."""
    adjusted = study.p_values(frame(jitter=1e-3))
    assert len(adjusted) == 16 and max(adjusted.values()) <= 1
    assert adjusted["coupled unigram_bias"] < 0.01 < adjusted["coupled coverage"]


def test_every_change_is_shown_with_its_p_value():
    df = frame(jitter=1e-3)
    shown = Exhibits(df)
    study.show(df, shown)
    assert [len(table.rows) for table in shown.tables] == [16, 16, 18 + 4]
    alone = df[df["seed"] == 0]
    shown = Exhibits(alone)
    study.show(alone, shown)
    assert [len(table.rows) for table in shown.tables] == [16, 18 + 4]
