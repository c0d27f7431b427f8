"""The mean field against what it must equal in its limits; edges, schedules, and what is told."""

import dataclasses

import numpy as np
import pytest

from bitnet_jax import forecast, presets, shrink
from bitnet_jax.config import Config, ModelConfig, RunConfig
from bitnet_jax.fields import UserError

ZIPF = 1 / np.arange(1, 301)
ZIPF /= ZIPF.sum()


def setting(**changed):
    steps = changed.pop("steps", 120)
    base = dict(
        probs_V=ZIPF,
        rates_T=np.full(steps, 1e-3),
        shape_T=np.ones(steps),
        width=64,
        tokens=128,
        fan_in=640,
        fan_out=384,
        init=1 / 8,
    )
    return shrink.Setting(**base | changed)


def test_a_lone_gradient_lifts_a_weight_by_the_same_amount_whatever_its_size():
    """The scalar recursion of Adam, without the correction for its start."""
    assert shrink.lift(0.9, 0.95) == pytest.approx(5.837, abs=1e-3)
    assert shrink.lift(0.9, 0.8) == np.inf
    for size in (1e-6, 1.0):
        m, v, way = 0.1 * size, 0.05 * size**2, 0.0
        for _ in range(2000):
            way += m / np.sqrt(v)
            m, v = 0.9 * m, 0.95 * v
        assert way == pytest.approx(shrink.lift(0.9, 0.95), rel=1e-9)


def test_a_gradient_keeps_the_decay_out_until_its_second_moment_is_as_small():
    updates = shrink.shelter(1.0, 0.01, 0.95)
    assert np.sqrt(0.05 * 0.95**updates) == pytest.approx(0.01)
    assert shrink.shelter(0.01, 1.0, 0.95) == 0


def test_nothing_is_stationary_above_the_norm_of_the_frequencies():
    """Steps down f CE + decay / 2 |theta|^2 from large weights: left below the edge, 0 above."""
    edge = shrink.stationary_edge(ZIPF)
    assert edge == pytest.approx(np.sqrt((ZIPF**2).sum() - 1 / 300))

    def end(decay):
        w, gamma = 10 * (ZIPF - 1 / 300), 1.0
        for _ in range(20_000):
            z = 1 * gamma * w
            q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            w, gamma = (
                w - 0.5 * ((q - ZIPF) * gamma + decay * w),
                gamma - 0.5 * ((q - ZIPF) @ w + decay * gamma),
            )
        return np.abs(gamma * w).max()

    assert end(0.9 * edge) > 0.1 and end(1.1 * edge) < 1e-6


def test_lumped_tokens_keep_their_number_and_their_mass():
    p_V = 1 / np.arange(1, 20_001) ** 1.1
    p_V /= p_V.sum()
    p_N, weight_N = shrink.lumped(p_V)
    assert len(p_N) < 1200
    assert weight_N.sum() == 20_000 and (p_N * weight_N).sum() == pytest.approx(1)
    np.testing.assert_array_equal(shrink.lumped(ZIPF)[0], ZIPF)


def test_without_decay_the_mean_field_learns_the_word_frequencies():
    path = shrink.mean_field(setting(steps=300), [0.0])
    assert path.loss[0, 0] == pytest.approx(np.log(300))
    assert path.loss[-1, 0] == pytest.approx(-(ZIPF * np.log(ZIPF)).sum(), abs=0.1)
    assert path.alive[0] == 300 and path.mass[0] == pytest.approx(1)


def test_under_decay_that_outweighs_all_gradients_the_spread_follows_the_law_of_the_onset():
    """`spread_ratio` falls to the half where the mean field's does, which Adam delays a little."""
    path = shrink.mean_field(setting(), [100.0], every=1)
    ratio = path.spread[:, 0] / path.spread[0, 0]
    total = 1e-3 * path.step
    # gamma shrinks by the rate, too
    law = shrink.spread_ratio(total, 1 / 8) * (1 - total)
    np.testing.assert_allclose(ratio[:60], law[:60], atol=0.06)
    assert path.loss[-1, 0] == pytest.approx(np.log(300), abs=0.01) and path.mass[0] < 0.1


def test_more_decay_leaves_higher_loss_and_entropy():
    path = shrink.mean_field(setting(steps=300), [1e-3, 1e-2, 1e-1, 1.0])
    assert (np.diff(path.loss[-1]) > 0).all() and (np.diff(path.entropy[-1]) > 0).all()


def test_a_long_run_is_followed_at_its_ends():
    updates = shrink.followed(10_000)
    assert (updates[0], updates[-1], len(updates)) == (1, 10_000, shrink.START + shrink.END)
    np.testing.assert_array_equal(shrink.followed(7), np.arange(1, 8))


def test_an_edge_lies_between_the_decays_beside_it_on_a_log_axis():
    assert forecast.crossing([0.01, 0.1], [1.0, 0.0], 0.5) == pytest.approx(10**-1.5)
    assert forecast.crossing([0.01, 0.1, 1.0], [1.0, 2.0, 4.0], 3.0) == pytest.approx(10**-0.5)
    assert forecast.crossing([0.01, 0.1], [1.0, 2.0], 3.0) is None


def test_an_edge_below_all_decays_is_0():
    assert forecast.edge([0.01, 0.1], [1.0, 2.0], 0.5) == 0
    assert forecast.edge([0.01, 0.1], [0.0, 0.1], 0.5) is None


def test_the_strength_of_a_context_is_that_of_the_dense_matrix():
    tokens_N = np.random.default_rng(0).integers(0, 7, 500) ** 2 % 11
    probs_V, context = forecast.frequencies(tokens_N, 11)
    pairs = np.zeros((11, 11))
    np.add.at(pairs, (tokens_N[:-1], tokens_N[1:]), 1 / 499)
    dense = ((pairs - np.outer(pairs.sum(1), pairs.sum(0))) ** 2).sum()
    assert context == pytest.approx(dense) and probs_V.sum() == pytest.approx(1)


def test_schedules_start_at_the_peak_after_the_warm_up():
    for name in forecast.SCHEDULES:
        rates = forecast.rates(name, 2e-3, 10, 100)
        np.testing.assert_allclose(rates[:10], 2e-4 * np.arange(1, 11))
        assert rates.max() == pytest.approx(2e-3) and len(rates) == 100
    with pytest.raises(UserError, match="cosine"):
        forecast.rates("cosin", 1e-3, 0, 10)
    np.testing.assert_allclose(
        forecast.rates_through([(1, 1e-3), (3, 3e-3)], 4) * 1e3, [1, 2, 3, 3]
    )
    with pytest.raises(UserError, match="ascending"):
        forecast.rates_through([(3, 1e-3), (1, 1e-3)], 4)


def test_the_report_s_schedule_is_two_stage():
    run, hyper = RunConfig(steps=1000), presets.RECIPES["coupled"](RunConfig(steps=1000))
    ours = forecast.of_run(Config(ModelConfig(layout="report"), run=run), hyper, ZIPF, 3e-4)[
        0
    ].rates_T
    rates_T = forecast.rates("two-stage", 1.5e-3, 375, 1000)
    np.testing.assert_allclose(ours[:375], rates_T[:375], rtol=1e-5)


def test_a_setting_of_ours_has_the_decays_of_both_stages_and_the_initialisation():
    cfg = Config(ModelConfig(layout="report", tied_embedding=False, d_model=64), run=RunConfig(100))
    run_setting, decay = forecast.of_run(
        cfg, presets.RECIPES["coupled"](RunConfig(steps=100)), ZIPF, 3e-4
    )
    assert decay == pytest.approx(0.1) and run_setting.init == 1 / 8 and run_setting.uniform
    np.testing.assert_allclose(run_setting.shape_T, [1] * 50 + [0.5] * 50)
    _, outside = forecast.of_run(
        cfg, presets.RECIPES["decoupled"](RunConfig(steps=100)), ZIPF, 3e-4
    )
    assert outside == 0


def forecast_with(**changed):
    base = dict(decay=0.1, onset=0.01, outcome=0.02, blind=0.05, half_step=70.0, loss=5.0)
    base |= dict(entropy=5.5, alive=3.0, mass=0.2, unigram=4.0, uniform=5.7, undecayed=4.1)
    return forecast.Forecast(**base | changed)


def test_what_is_expected_depends_on_the_outcome_edge_and_its_error():
    assert forecast.expected(forecast_with()) == "collapse"
    assert forecast.expected(forecast_with(decay=0.02)) == "edge"
    for harmless in (
        forecast_with(decay=0.0),
        forecast_with(decay=1e-3),
        forecast_with(outcome=None),
    ):
        assert forecast.expected(harmless) == "no collapse by decay"
        assert forecast.warning(harmless) is None
    assert forecast.expected(forecast_with(undecayed=4.9)) == "cannot tell"
    assert "4.90" in "".join(forecast.terminal_lines(forecast_with(undecayed=4.9)))
    assert forecast.expected(forecast_with(undecayed=4.5)) == "collapse"
    assert "0.1" in forecast.warning(forecast_with()) and "\n" not in forecast.warning(
        forecast_with()
    )


def test_context_goes_before_word_frequencies_and_the_spread_is_halved_beyond_the_onset():
    prediction = forecast.forecast(setting(steps=200), 0.3)
    assert prediction.outcome < prediction.blind and prediction.onset < 0.3
    assert 0 < prediction.half_step < 200
    gentle = forecast.forecast(setting(steps=200), 1e-5)
    assert gentle.half_step is None and gentle.loss < prediction.loss
    spared = dataclasses.replace(setting(steps=200), decay_head=0.0, decay_norm=0.0)
    assert forecast.forecast(spared, 0.1).loss < prediction.loss


COUNTS = ("--optimizer", "adam", "--lr", "1e-3", "--steps", "100", "--width", "64",
          "--tokens-per-batch", "128")  # fmt: skip


def test_predict_needs_counts_and_flags_alone(bitnet, tmp_path):
    counts = tmp_path / "counts.txt"
    counts.write_text("".join(f"token{i} {round(1e5 * p)}\n" for i, p in enumerate(ZIPF)))
    status, out, _ = bitnet("predict", *COUNTS, "--counts", counts, "--weight-decay", "0.3")
    assert status == 0 and "expected: collapse" in out
    status, out, _ = bitnet("predict", *COUNTS[:1], "adamw", *COUNTS[2:], "--counts", counts)
    assert status == 0 and "expected: no collapse" in out


@pytest.mark.parametrize(
    "wrong",
    [
        ("--counts", "/nowhere"),
        ("--optimizer", "adam"),
        ("--lr", "1e-3"),
        (*COUNTS, "--weight-decay", "-1"),
        (*COUNTS, "--warmup", "101"),
        (*COUNTS, "--clip", "0"),
        (*COUNTS, "--schedule", "cosin"),
        (*COUNTS, "--betas", "0.9"),
        (*COUNTS, "--init", "normal:x"),
        (*COUNTS, "--optimizer", "adm"),
        (*COUNTS, "--lr-file", "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(bitnet, tmp_path, wrong):
    counts = tmp_path / "counts.txt"
    counts.write_text("5\n3\n2\n")
    status, out, err = bitnet("predict", "--counts", counts, *wrong)
    assert (status, out) == (2, "") and len(err.strip().splitlines()) == 1


def test_counts_that_are_none_are_named(bitnet, tmp_path):
    counts = tmp_path / "counts.txt"
    counts.write_text("5\nfew\n")
    status, _, err = bitnet("predict", *COUNTS, "--counts", counts)
    assert status == 2 and "line 2" in err
