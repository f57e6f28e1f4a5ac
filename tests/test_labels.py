"""What the car did in a window, against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from omni_cli.errors import DataError
from omni_cli.samples.labels import ego_motion_columns
from omni_cli.scene.recording import Recording, SpeedLog
from tests.support.drives import circle

SPANS_US = np.array([[200_000, 1_700_000], [1_033_333, 2_533_333]], dtype=np.int64)


def labels(**parts):
    return ego_motion_columns(Recording("x", "test", {}, **parts), SPANS_US)


@given(
    st.floats(-20, 30).filter(lambda v: abs(v) > 0.5),
    st.floats(-0.6, 0.6).filter(lambda w: abs(w) > 1e-3),
)
def test_a_circle_in_closed_form(speed, yaw_rate):
    found = labels(ego=circle(4, speed_mps=speed, yaw_rate=yaw_rate))
    theta, radius = yaw_rate * 1.5, speed / yaw_rate
    np.testing.assert_allclose(found["dx_m"], radius * np.sin(theta), atol=1e-5)
    np.testing.assert_allclose(found["dy_m"], radius * (1 - np.cos(theta)), atol=1e-5)
    np.testing.assert_allclose(found["dyaw_rad"], theta, atol=1e-9)
    np.testing.assert_allclose(found["displacement_m"], 2 * radius * np.sin(theta / 2), atol=1e-5)
    np.testing.assert_allclose(found["path_length_m"], abs(speed) * 1.5, rtol=1e-5)
    np.testing.assert_allclose(found["mean_speed_mps"], speed, rtol=1e-4)
    np.testing.assert_allclose(found["start_speed_mps"], speed, rtol=1e-4)


def test_the_frame_is_that_of_the_windows_first_instant():
    ego = circle(4, speed_mps=8.0, yaw_rate=0.5)
    found = labels(ego=ego)
    np.testing.assert_allclose(found["dy_m"][0], found["dy_m"][1], atol=1e-6)  # the anchor frame would differ
    assert found["dy_m"][0] > 0  # y is left


def test_driving_away_and_back_is_a_path_without_displacement():
    ego = circle(4, speed_mps=1.0, yaw_rate=0.0)
    t = ego.timestamp_us / 1e6
    position = np.zeros((len(t), 3))
    position[:, 0] = 2 * np.sin(2 * np.pi * (t - 0.2) / 1.5)
    velocity = np.zeros((len(t), 3))
    velocity[:, 0] = 2 * (2 * np.pi / 1.5) * np.cos(2 * np.pi * (t - 0.2) / 1.5)
    found = labels(ego=replace(ego, position_m=position, velocity_mps=velocity))
    assert found["displacement_m"][0] == pytest.approx(0, abs=1e-6)
    assert found["mean_speed_mps"][0] == pytest.approx(0, abs=1e-6)
    assert found["path_length_m"][0] == pytest.approx(8.0, rel=1e-3)
    assert found["start_speed_mps"][0] == pytest.approx(2 * 2 * np.pi / 1.5, rel=1e-6)


def test_a_speed_log_gives_distance_and_says_what_it_does_not_know():
    times = np.arange(0, 3_000_001, 10_000, dtype=np.int64)

    def speed(t):
        return 5 + 3 * np.sin(2 * t)

    log = SpeedLog(times, speed(times / 1e6), np.zeros(len(times)))
    found = labels(speed=log)
    for row, (start, end) in enumerate(SPANS_US / 1e6):
        distance = quad(speed, start, end)[0]
        assert found["displacement_m"][row] == pytest.approx(distance, rel=1e-4)
        assert found["path_length_m"][row] == pytest.approx(distance, rel=1e-4)
        assert found["mean_speed_mps"][row] == pytest.approx(distance / 1.5, rel=1e-4)
        assert found["start_speed_mps"][row] == pytest.approx(speed(start), rel=1e-4)
    assert np.isnan([found["dx_m"], found["dy_m"], found["dyaw_rad"]]).all()


def test_reversing_with_a_speed_log_is_negative_displacement_and_positive_path():
    times = np.arange(0, 3_000_001, 10_000, dtype=np.int64)
    found = labels(speed=SpeedLog(times, np.full(len(times), -2.0), np.zeros(len(times))))
    np.testing.assert_allclose(found["displacement_m"], -3.0)
    np.testing.assert_allclose(found["path_length_m"], 3.0)


def test_motion_that_is_not_finite_or_not_there_is_refused():
    ego = circle(4, speed_mps=8.0, yaw_rate=0.5)
    velocity = ego.velocity_mps.copy()
    velocity[100] = np.nan
    with pytest.raises(DataError, match=r"x: ego motion is not finite \(mean_speed_mps\)"):
        labels(ego=replace(ego, velocity_mps=velocity))
    with pytest.raises(DataError, match="x: has no ego motion"):
        labels()
