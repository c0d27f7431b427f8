"""Trajectories of a run, on the report's own numbers and on series with known answers."""

import numpy as np
import pytest

from experiments.lab import trajectory

# Section 2 of the report: distinct predictions at the milestones of its 1000-step run.
REPORT = {5: 95, 50: 70, 100: 6, 130: 2, 140: 1, 500: 5, 600: 1, 700: 5, 1000: 8}


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


def test_half_step_is_interpolated():
    steps = np.array([0, 10, 20, 30])
    assert trajectory.half_step(steps, np.array([1.0, 0.6, 0.4, 0.7])) == pytest.approx(15)
    assert trajectory.half_step(steps, np.array([1.0, 0.9, 0.8, 0.7])) is None
