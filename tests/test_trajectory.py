"""Trajectories of a run, on the report's own numbers and on series with known answers."""

import dataclasses

import numpy as np
import pytest

from bitnet_jax.config import RunConfig, UserError
from experiments import stats, trajectory

# Section 2 of the report: distinct predictions at the milestones of its 1000-step run.
REPORT = {5: 95, 50: 70, 100: 6, 130: 2, 140: 1, 500: 5, 600: 1, 700: 5, 1000: 8}
RUN = RunConfig(steps=1000, eval_every=5)


def make(unique, loss=9.0, steps=None):
    unique = np.array(unique)
    steps = 5 * np.arange(1, len(unique) + 1) if steps is None else np.array(steps)
    return trajectory.Trajectory(steps, unique, np.broadcast_to(loss, unique.shape).astype(float))


def test_first_collapses_of_the_reports_milestones():
    path = make([*REPORT.values()], steps=[*REPORT])
    assert trajectory.first_severe(path) == 130
    assert trajectory.first_complete(path) == 140


def test_the_reports_rise_to_8_is_no_recovery():
    (episode,) = trajectory.episodes(make([*REPORT.values()], steps=[*REPORT]))
    assert (episode.start, episode.recovery, episode.count_only) == (130, None, None)


def test_milestones_are_exact_steps():
    path = make([*REPORT.values()], steps=[*REPORT])
    assert trajectory.milestones(path, [5, 140, 1000]) == {5: 95, 140: 1, 1000: 8}
    with pytest.raises(UserError, match="no evaluation at step 120"):
        trajectory.milestones(path, [100, 120])


def test_recovery_is_the_first_of_three_diverse_evaluations_with_a_lower_loss():
    path = make([50, 2, 10, 9, 10, 11, 12, 13], [8, 9, 8, 8, 8, 8, 9, 8])
    (episode,) = trajectory.episodes(path)
    assert (episode.start, episode.recovery) == (10, 25)


def test_recovery_is_rejected_when_the_loss_rose():
    path = make([50, 2, 60, 68, 70, 66], [8, 9, 9.1, 10.7, 10.8, 10.7])
    (episode,) = trajectory.episodes(path)
    assert (episode.recovery, episode.count_only) == (None, 15)


def test_a_second_episode_starts_only_after_a_recovery():
    once = trajectory.episodes(make([2, 20, 20, 2, 20, 1]))
    twice = trajectory.episodes(make([2, 20, 20, 20, 2, 1]))
    assert [e.start for e in once] == [5]
    assert [(e.start, e.recovery) for e in twice] == [(5, 10), (25, None)]


def test_the_evaluation_at_the_boundary_belongs_to_stage_1():
    path = make([10] * 100 + [4] * 100)
    assert trajectory.stage_average(path, RUN, 1) == 10
    assert trajectory.stage_average(path, RUN, 2) == 4
    assert trajectory.stage_average(path, RUN) == 7


@pytest.mark.parametrize("stage, told", [(None, "452 of the 2000 of the run"),
                                         (1, "452 of the 1000 of stage 1"),
                                         (2, "0 of the 1000 of stage 2")])  # fmt: skip
def test_the_reports_452_rows_of_10000_steps_have_no_average(stage, told):
    run = RunConfig(steps=10_000, eval_every=5)
    first = 5005 if stage == 2 else 2265
    with pytest.raises(UserError, match=f"no evaluation at step {first}; the log has {told}"):
        trajectory.stage_average(make([28] * 452), run, stage)


def test_one_evaluation_in_a_hundred_may_be_missing():
    path = make([3.0] * 200)

    def without(*indices):
        return trajectory.Trajectory(
            *(np.delete(values, indices) for values in dataclasses.astuple(path))
        )

    assert trajectory.stage_average(without(7, 9), RUN) == 3
    with pytest.raises(UserError, match="no evaluation at step 40; the log has 197 of the 200"):
        trajectory.stage_average(without(7, 8, 9), RUN)


def test_severe_rate_of_the_report_with_wilson_interval():
    """57 of 200, in one block: 28.5 % [22.7, 35.1]; in blocks of time it is far less certain."""
    rate = trajectory.severe_rate(make([1] * 57 + [20] * 143), RUN)
    assert (rate.count, rate.n) == (57, 200)
    np.testing.assert_allclose(rate.wilson, [0.2269, 0.3512], atol=1e-4)
    assert rate.wilson == stats.wilson(57, 200)
    assert rate.bootstrap[0] < rate.wilson[0] and rate.bootstrap[1] > rate.wilson[1]


def test_block_bootstrap_matches_the_normal_interval_of_independent_values():
    x = np.random.default_rng(1).normal(size=4000)
    half = 1.96 * x.std() / np.sqrt(len(x))
    low, high = trajectory.block_bootstrap(x)
    np.testing.assert_allclose([low, high], [x.mean() - half, x.mean() + half], atol=0.2 * half)


def test_block_bootstrap_is_wider_for_a_dependent_series():
    x = np.repeat(np.random.default_rng(1).normal(size=200), 10)
    (low, high), (low_1, high_1) = (trajectory.block_bootstrap(x, block) for block in (20, 1))
    assert high - low > 2 * (high_1 - low_1)


def test_block_bootstrap_needs_two_blocks():
    assert (
        trajectory.severe_rate(make([1] * 30), RunConfig(steps=150, eval_every=5)).bootstrap is None
    )
    with pytest.raises(ValueError, match="39 values are fewer than two blocks of 20"):
        trajectory.block_bootstrap(np.ones(39))
    assert trajectory.block_bootstrap(np.ones(41)) == (1.0, 1.0)


def test_half_step_is_interpolated():
    steps = np.array([0, 10, 20, 30])
    assert trajectory.half_step(steps, np.array([1.0, 0.6, 0.4, 0.7])) == pytest.approx(15)
    assert trajectory.half_step(steps, np.array([1.0, 0.9, 0.8, 0.7])) is None
