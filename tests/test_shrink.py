"""The theory of the collapse against what it idealises: Adam's recursion, draws, and softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr

from bitnet_jax import optim, presets, shrink
from bitnet_jax.config import Hyper, OptimConfig, RunConfig

REPORT = RunConfig(steps=1000), presets.RECIPES["coupled"](RunConfig(steps=1000))
RNG = np.random.default_rng(0)


def test_the_report_can_move_a_weight_by_0688_in_all():
    total = shrink.summed_rate(*REPORT)
    assert total[0] == 0
    assert total[-1] == pytest.approx(0.688, abs=5e-4)
    np.testing.assert_allclose(total[:376], 2e-6 * np.arange(376) * np.arange(1, 377), rtol=1e-5)


def test_the_weights_beyond_1_1_that_the_report_counts_follow_from_the_schedule():
    """N(0, 1) embedding entries without gradient: 979,330 of 12,865,792 end beyond 1.1."""
    assert shrink.count_above(1.1, 12_865_792, OptimConfig(), *REPORT) == pytest.approx(
        979_330, abs=5
    )


@pytest.mark.parametrize("late", [False, True])
def test_starved_weights_equal_the_optimiser_without_loss_gradients(late):
    """Also where they overshoot 0, and with the schedule and the decay of both stages."""
    run = RunConfig(steps=200, late_schedule=late)
    hyper = presets.RECIPES["coupled"](RunConfig(steps=200)).replace(decay_rest=0.5, lr_peak=2e-2)
    start = np.array([-2.5, -1.0, 0.2, 0.9, 1.774])
    with jax.enable_x64(True):
        params = {"embed": {"embedding": jnp.asarray(start)}, "head": {"kernel": jnp.zeros(())}}
        tx = optim.make_optimizer(OptimConfig(), run, hyper, optim.param_groups(params))

        @jax.jit
        def train(params):
            def body(carry, _):
                params, state = carry
                updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
                params = jax.tree.map(jnp.add, params, updates)
                return (params, state), params["embed"]["embedding"]

            return jax.lax.scan(body, (params, tx.init(params)), length=200)[1]

        path = np.asarray(train(params))
    end = shrink.starved_weight(start, OptimConfig(), run, hyper)
    np.testing.assert_allclose(path[-1], end, rtol=1e-5)
    assert np.ptp(np.sign(path[:, 2])) == 2


def test_the_limit_is_the_recursion_for_weights_that_stay_large_against_the_rate():
    """Adam's normaliser is a little behind a shrinking decay: within 3 % of the way after 1000."""
    start = np.array([-3.0, 1.774, 2.0, 5.0])
    end = shrink.starved_weight(start, OptimConfig(), *REPORT)
    total = shrink.summed_rate(*REPORT)[-1]
    np.testing.assert_allclose(end, shrink.shrink_limit(start, total), atol=0.03 * total)


@pytest.mark.parametrize("decay", [1e-4, 1.0])
def test_the_amount_of_coupled_decay_does_not_matter_to_a_starved_weight(decay):
    run, hyper = REPORT
    start = np.array([1.0, 2.0])
    changed = hyper.replace(coupled_1=decay, coupled_2=decay / 2)
    ends = [shrink.starved_weight(start, OptimConfig(), run, h) for h in (hyper, changed)]
    np.testing.assert_allclose(*ends, rtol=1e-3)


def test_the_limit_stops_at_zero():
    np.testing.assert_array_equal(shrink.shrink_limit([-0.5, 0.0, 0.3, 1.0], 0.5), [0, 0, 0, 0.5])


def test_the_spread_of_logits_of_a_shrunk_head():
    """Drawn: 256 x 4000 head entries from U(-1/16, 1/16), and states of fixed length."""
    bound = 1 / 16
    head = RNG.uniform(-bound, bound, (256, 4000))
    h = RNG.normal(size=(64, 256))
    h /= np.sqrt(np.mean(h**2, axis=1, keepdims=True))
    start = np.std(h @ head)
    for total in (0.01, 0.03, 0.05):
        ratio = np.std(h @ shrink.shrink_limit(head, total)) / start
        assert ratio == pytest.approx(shrink.spread_ratio(total, bound), rel=0.01)
    assert shrink.spread_ratio(0.1, bound) == 0


def test_the_step_of_half_the_spread_comes_from_the_warm_up_and_not_from_the_decay():
    """sqrt(2 x 375 x 0.37 / 16 / 1.5e-3) = 107.5: four times the warm-up, twice the step."""
    run, hyper = REPORT
    step = shrink.half_spread_step(run, hyper, 1 / 16)
    assert step == pytest.approx(107.0, abs=0.5)
    quarter = shrink.half_spread_step(run, hyper.replace(warmup_steps=375 / 4), 1 / 16)
    assert quarter == pytest.approx(step / 2, abs=0.5)
    more = shrink.half_spread_step(run, hyper.replace(coupled_1=1.0), 1 / 16)
    assert more == step


def test_a_run_that_ends_before_half_the_spread_has_no_such_step():
    assert shrink.half_spread_step(RunConfig(steps=10), Hyper(warmup_steps=5.0), 1 / 16) is None


def test_the_slope_of_the_loss_in_the_scale_of_the_logits():
    """d loss / d ln s by differentiation equals loss - entropy."""
    z = jnp.asarray(RNG.normal(size=50), jnp.float32)

    def loss(log_s):
        return -jax.nn.log_softmax(jnp.exp(log_s) * z)[7]

    entropy = float(entr(np.asarray(jax.nn.softmax(z))).sum())
    assert shrink.scale_slope(loss(0.0), entropy) == pytest.approx(
        float(jax.grad(loss)(0.0)), abs=1e-5
    )


def test_entropy_of_gaussian_logits():
    z = RNG.normal(0, 0.3, (20, 50_000))
    e = np.exp(z)
    q = e / e.sum(-1, keepdims=True)
    measured = float(-(q * np.log(q)).sum(-1).mean())
    assert shrink.gaussian_entropy(50_000, 0.3) == pytest.approx(measured, abs=1e-3)
