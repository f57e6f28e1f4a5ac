"""Metrics, baselines, intervals and controls against independent references."""

import numpy as np
import pytest
from scipy import stats

from omni_cli.scores.baselines import constant_velocity
from omni_cli.scores.controls import swap_between_groups
from omni_cli.scores.intervals import interval_by_recording
from omni_cli.scores.metrics import absolute_errors


def test_an_unreadable_answer_scores_as_the_median_would() -> None:
    predicted, truth = np.array([3.0, np.nan]), np.array([4.0, 10.0])
    assert absolute_errors(predicted, truth, fallback=5.0).tolist() == [1.0, 5.0]


def test_constant_velocity() -> None:
    row = {"start_us": 100_000, "end_us": 800_000, "start_speed_mps": -2.0}
    assert constant_velocity(row, ("mean_speed_mps",)) == {"mean_speed_mps": -2.0}
    assert constant_velocity(row, ("displacement_m",)) == {"displacement_m": pytest.approx(-1.4)}
    with pytest.raises(KeyError):
        constant_velocity(row, ("dyaw_rad",))


def test_interval_of_independent_recordings_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=80)
    low, high = interval_by_recording(values, [str(i) for i in range(80)])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", random_state=np.random.default_rng(2))
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.1)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.1)


def test_interval_is_wider_when_windows_of_a_recording_agree() -> None:
    generator = np.random.default_rng(3)
    values = np.repeat(generator.normal(5, 2, size=8), 20) + generator.normal(0, 0.1, size=160)
    by_recording = interval_by_recording(values, np.repeat(list("abcdefgh"), 20).tolist())
    as_if_independent = interval_by_recording(values, [str(i) for i in range(160)])
    assert np.diff(by_recording) > 2 * np.diff(as_if_independent)


def test_one_recording_has_no_interval() -> None:
    assert interval_by_recording(np.ones(9), ["a"] * 9) is None


def test_pictures_are_swapped_with_another_recording() -> None:
    groups = list("aaabbc")
    swapped = swap_between_groups(groups)
    assert all(groups[own] != groups[other] for own, other in enumerate(swapped))
    assert (swapped == swap_between_groups(groups)).all()
    with pytest.raises(ValueError, match="at least two"):
        swap_between_groups(["a", "a"])
