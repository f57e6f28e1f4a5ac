"""What the real segment's log says of the device and the car, against signals of other origin."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import cumulative_trapezoid

from omni_cli.formats import video
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.sources import openpilot_schema
from omni_cli.sources.openpilot_events import read_events
from omni_cli.sources.openpilot_logs import DriveLog, OpenpilotLogs, SegmentLog, drive_log, read_log

real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")


@pytest.fixture(scope="module")
def real_folder() -> Path:
    return Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"


@pytest.fixture(scope="module")
def real_segment(real_folder) -> SegmentLog:
    return read_log(real_folder / "a2a0ccea32023010" / "2023-07-27--13-01-19--0" / "qlog.bz2", 0)


@pytest.fixture(scope="module")
def real_log(real_segment) -> DriveLog:
    return drive_log([real_segment])


@real_data
@pytest.mark.real_data
def test_the_real_devices_mount_fix_and_desire(real_segment, real_log):
    device, start_us = real_log.device, real_segment.frame_time_us["roadEncodeIdx"][0]
    mount = device.mount
    assert len(mount.timestamp_us) == 61
    after_9_s = np.searchsorted(mount.timestamp_us - start_us, 9_000_000)
    np.testing.assert_allclose(mount.rpy_rad[after_9_s], [0, 0.019, -0.019], atol=1e-3)
    np.testing.assert_allclose(mount.rpy_rad[-1], [0, 0.0157, -0.0209], atol=5e-5)
    assert mount.height_m[-1] == pytest.approx(1.1533, abs=1e-4)
    first_calibrated = np.flatnonzero(mount.is_calibrated)[0]  # `calPerc` reaches 100 there
    assert (mount.timestamp_us[first_calibrated] - start_us) / 1e6 == pytest.approx(27.2, abs=0.1)
    assert mount.is_calibrated[first_calibrated:].all()
    first_fix = np.flatnonzero(device.fix.has_fix)[0]
    assert (device.fix.timestamp_us[first_fix] - start_us) / 1e6 == pytest.approx(40.0, abs=0.1)
    changes = {d: (device.desire.timestamp_us[device.desire.desire == d] - start_us) / 1e6 for d in (3, 4)}
    assert 35 < changes[3].min() < changes[3].max() < 42
    assert 47 < changes[4].min() < changes[4].max() < 54
    assert set(device.desire.desire) == {0, 3, 4}
    assert not device.is_right_hand_drive


@real_data
@pytest.mark.real_data
def test_the_real_models_first_frame_has_no_video_frame(real_segment, real_log):
    assert real_log.facts["logged_model"] == "30 kept, 0 invalid, 0 incomplete, 1 without a video frame"
    frames_us = real_segment.frame_time_us["roadEncodeIdx"]
    np.testing.assert_array_equal(real_log.device.model.timestamp_us, frames_us[np.arange(41, 1202, 40) - 2])


def events_of(folder: Path, name: str) -> list:
    path = folder / "a2a0ccea32023010" / "2023-07-27--13-01-19--0" / "qlog.bz2"
    content, _ = openpilot_schema.decompress(path.read_bytes(), path.name)
    events = openpilot_schema.log_schema().Event.read_multiple_bytes(content)
    return sorted((e for e in events if e.which() == name), key=lambda e: e.logMonoTime)


def bicycle_yaw_rate(folder: Path, log: DriveLog) -> np.ndarray:
    """Yaw rate of a bicycle with slipping tyres, at each speed; `selfdrive/controls/lib/vehicle_model.py`."""
    car = events_of(folder, "carParams")[0].carParams
    learnt = events_of(folder, "liveParameters")[-1].liveParameters
    front, rear, length = car.tireStiffnessFront, car.tireStiffnessRear, car.wheelbase
    to_rear = length - car.centerToFront
    slip = car.mass * (front * car.centerToFront - rear * to_rear) / (length**2 * front * rear)
    speed = log.speed.speed_mps
    wheel = np.radians(log.speed.steering_angle_deg - learnt.angleOffsetDeg) / learnt.steerRatio
    return speed * wheel / length / (1 - slip * speed**2)


@real_data
@pytest.mark.real_data
def test_the_real_yaw_rate_agrees_with_the_steering_and_its_sign_with_the_lane_changes(real_folder, real_log):
    yaw_rate = real_log.device.yaw_rate
    assert real_log.facts["yaw_rate"].startswith("liveLocationKalman.angularVelocityDevice in the calib frame, 56.7 s")
    steered = bicycle_yaw_rate(real_folder, real_log)
    at_us = real_log.speed.timestamp_us
    inside = (at_us > yaw_rate.timestamp_us[0]) & (at_us < yaw_rate.timestamp_us[-1])
    # The car follows the wheel after 0.1 s; the wheel's zero is learnt within the first minutes only.
    turned = np.interp(at_us[inside] + 100_000, yaw_rate.timestamp_us, yaw_rate.yaw_rate_radps)
    assert np.corrcoef(turned, steered[inside])[0, 1] > 0.95
    slope, offset = np.polyfit(steered[inside], turned, 1)
    assert 0.85 < slope < 1.15
    assert abs(offset) < 0.003
    desire = real_log.device.desire
    begins_us = {d: desire.timestamp_us[desire.desire == d][0] for d in (3, 4)}
    first_s = np.linspace(0, 2e6, 41)
    turn = {
        d: np.interp(b + first_s, yaw_rate.timestamp_us, yaw_rate.yaw_rate_radps).mean() for d, b in begins_us.items()
    }
    assert turn[3] > 0.005 > -0.005 > turn[4]  # to the left lane, later back to the right


@real_data
@pytest.mark.real_data
def test_the_real_yaw_rate_integrates_to_the_satellites_bearing(real_folder, real_log):
    """Bearing from 40 s on; a fix every second, told 0.2 s late. Not turning at all would err by 0.87 degrees."""
    yaw_rate = real_log.device.yaw_rate
    fixes = [(e.logMonoTime // 1000 - 200_000, e.gpsLocationExternal.bearingDeg)
             for e in events_of(real_folder, "gpsLocationExternal") if e.gpsLocationExternal.flags & 1]  # fmt: skip
    at_us, bearing_deg = np.array(fixes[1:]).T
    grid_us = np.arange(at_us[0], at_us[-1] + 10_000, 10_000)
    heading = cumulative_trapezoid(
        np.interp(grid_us, yaw_rate.timestamp_us, yaw_rate.yaw_rate_radps), grid_us / 1e6, initial=0
    )
    integrated_deg, measured_deg = np.degrees(np.interp(at_us, grid_us, heading)), -bearing_deg  # clockwise from north

    def error_deg(sign: float) -> float:
        difference = sign * (integrated_deg - integrated_deg.mean()) - (measured_deg - measured_deg.mean())
        return float(np.sqrt((difference**2).mean()))

    assert error_deg(1) < 0.4
    assert 0.8 < error_deg(0) < error_deg(-1)


@real_data
@pytest.mark.real_data
def test_the_real_models_path_is_the_way_that_was_driven(real_log):
    """Two seconds after its own first point, which lies up to 1.5 m before or behind the camera.

    How far, by the integrated speed; to which side, by the integrated turn.
    """
    seen, speed, yaw_rate = real_log.device.model, real_log.speed, real_log.device.yaw_rate
    planned_m, ahead_m, aside_m = [], [], []
    for at_us, path_m in zip(seen.timestamp_us, seen.path_m, strict=True):
        grid_us = at_us + np.arange(0, 2_000_001, 10_000)
        if grid_us[-1] > speed.timestamp_us[-1] or at_us < yaw_rate.timestamp_us[0]:
            continue
        heading = cumulative_trapezoid(
            np.interp(grid_us, yaw_rate.timestamp_us, yaw_rate.yaw_rate_radps), dx=0.01, initial=0
        )
        speed_mps = np.interp(grid_us, speed.timestamp_us, speed.speed_mps)
        ahead_m.append(np.trapezoid(speed_mps * np.cos(heading), dx=0.01))
        aside_m.append(np.trapezoid(speed_mps * -np.sin(heading), dx=0.01))  # right positive, as the path's y
        planned_m.append([np.interp(2.0, T_IDXS_S, column - column[0]) for column in path_m.T[:2]])
    planned_ahead_m, planned_aside_m = np.array(planned_m).T
    assert len(planned_m) == 28
    assert np.abs(planned_ahead_m - ahead_m).mean() < 1.0
    assert np.corrcoef(planned_aside_m, aside_m)[0, 1] > 0.9
    assert np.abs(planned_aside_m - aside_m).mean() < 0.15
    assert np.abs(aside_m).mean() > 0.2  # what a straight path would err by


@real_data
@pytest.mark.real_data
def test_the_real_small_video_has_the_logs_times_and_the_road_cameras_lens(real_folder, real_segment, real_log):
    recording = OpenpilotLogs(real_folder).open("a2a0ccea32023010_2023-07-27--13-01-19--0")
    stream = recording.cameras["qcamera"]
    info = video.probe(stream.videos[0].read(), "qcamera.ts")
    logged_us = real_segment.frame_time_us["qRoadEncodeIdx"]
    assert 0 < np.abs(info.pts_us - logged_us).max() <= 10
    np.testing.assert_array_equal(stream.timestamp_us, logged_us)  # a logged model's frame is found by equality
    assert np.isin(real_log.device.model.timestamp_us, stream.timestamp_us).all()
    lens = stream.calibration.model
    assert (lens.width_px, lens.height_px) == (526, 330)
    np.testing.assert_allclose([lens.fx_px, lens.fy_px], [2648 * 526 / 1928, 2648 * 330 / 1208])
    np.testing.assert_allclose([lens.cx_px, lens.cy_px], [263, 165], atol=0.5)
    assert stream.calibration.rig_T_camera.translation_m.tolist() == [0, 0, pytest.approx(1.1533, abs=1e-4)]
    assert recording.provenance["calibration_qcamera"] == "tici ox03c10, calibrated"


@real_data
@pytest.mark.real_data
def test_the_real_log_is_read_in_well_under_two_seconds(real_folder):
    path = real_folder / "a2a0ccea32023010" / "2023-07-27--13-01-19--0" / "qlog.bz2"
    content, _ = openpilot_schema.decompress(path.read_bytes(), path.name)
    openpilot_schema.event_kinds()
    begun_s = time.process_time()  # of this process alone: others may be busy
    events = read_events(content)
    assert events.counts["all"] == 11_388
    assert time.process_time() - begun_s < 1.0
