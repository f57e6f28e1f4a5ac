"""Driven paths against closed forms, an ODE solver, brute force, the synthetic world and a real segment."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.spatial.transform import Rotation
from scipy.special import fresnel

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.samples.driven_path import MAX_YAW_RATE_GAP_US, driven_paths
from omni_cli.samples.sync import MAX_MOTION_GAP_US
from omni_cli.scene.cameras import Calibration, Pinhole
from omni_cli.scene.driving_log import DeviceLog, YawRateLog
from omni_cli.scene.poses import EgoMotion, Pose
from omni_cli.scene.recording import CameraStream, Recording, SpeedLog, VideoLocation
from omni_cli.sources.openpilot_logs import OpenpilotLogs
from omni_cli.world.motion import random_drive
from tests.support.drives import circle

SECOND_US = 1_000_000


def logged(speed_us, speed, yaw_us, yaw_rate) -> Recording:
    speed_us, yaw_us = np.asarray(speed_us, np.int64), np.asarray(yaw_us, np.int64)
    speed, yaw_rate = np.broadcast_to(speed, speed_us.shape), np.broadcast_to(yaw_rate, yaw_us.shape)
    device = DeviceLog(yaw_rate=YawRateLog(yaw_us, yaw_rate.astype(float)))
    return Recording("drive", "test", {}, speed=SpeedLog(speed_us, speed.astype(float), 0 * speed), device=device)


def posed(ego: EgoMotion, lever_m=None) -> Recording:
    mount = None if lever_m is None else Calibration(Pinhole(8, 8, 8, 8, 4, 4), Pose(Rotation.identity(), lever_m))
    stream = CameraStream("front", (VideoLocation(Path("front.mp4")),), ego.timestamp_us, mount)
    return Recording("drive", "test", {"front": stream}, ego=ego)


def on_a_circle(speed_mps: float, yaw_rate: float) -> np.ndarray:
    """(33, 2) in calib: a left turn leads to negative y."""
    radius, angle = speed_mps / yaw_rate, yaw_rate * T_IDXS_S
    return np.stack([radius * np.sin(angle), -radius * (1 - np.cos(angle))], axis=1)


def every(period_us: int, seconds: float, phase_us: int = 0) -> np.ndarray:
    return np.arange(phase_us, round(seconds * SECOND_US), period_us, dtype=np.int64)


@pytest.mark.parametrize(("speed", "yaw_rate"), [(10.0, 0.2), (10.0, -0.2), (25.0, 0.01), (-3.0, 0.1)])
def test_poses_on_a_circle(speed, yaw_rate):
    paths = driven_paths(posed(circle(14, speed_mps=speed, yaw_rate=yaw_rate)), np.array([50_000, 1_234_567]))
    assert paths.xy_m == pytest.approx(np.stack([on_a_circle(speed, yaw_rate)] * 2), abs=1e-4)
    assert paths.xy_m.dtype == np.float32
    assert paths.num_points.tolist() == [33, 33]
    assert paths.speed_mps == pytest.approx(speed, abs=1e-4)
    assert paths.yaw_rate_radps == pytest.approx(yaw_rate, abs=1e-9)


def test_the_camera_swings_out_where_the_rear_axle_does_not():
    lever, yaw_rate = np.array([1.8, 0.3, 1.4]), 0.2
    recording = posed(circle(12, speed_mps=8, yaw_rate=yaw_rate), lever)
    angle = yaw_rate * T_IDXS_S
    turned = np.stack([np.cos(angle) * 1.8 - np.sin(angle) * 0.3, np.sin(angle) * 1.8 + np.cos(angle) * 0.3], axis=1)
    expected = on_a_circle(8, yaw_rate) + (turned - [1.8, 0.3]) * [1, -1]
    camera = driven_paths(recording, np.array([SECOND_US]), camera="front")
    rig = driven_paths(recording, np.array([SECOND_US]))
    assert camera.xy_m[0] == pytest.approx(expected, abs=1e-4)
    assert rig.xy_m[0] == pytest.approx(on_a_circle(8, yaw_rate), abs=1e-4)
    assert np.abs(camera.xy_m - rig.xy_m).max() > 2
    unknown = driven_paths(posed(recording.ego), np.array([SECOND_US]), camera="front")
    assert (unknown.xy_m == rig.xy_m).all()


def test_a_path_does_not_depend_on_where_the_anchor_is():
    ego = circle(12, speed_mps=8, yaw_rate=0.1)
    tilt, shift = Rotation.from_euler("xyz", [0.3, -0.2, 2.0]), np.array([-2.7e3, 4.2e3, 3.8e3])
    moved = EgoMotion(
        ego.timestamp_us,
        tilt.apply(ego.position_m) + shift,
        (tilt * Rotation.from_quat(ego.quaternion_xyzw)).as_quat(),
        tilt.apply(ego.velocity_mps),
        tilt.apply(ego.acceleration_mps2),
        ego.curvature_per_m,
    )
    here, there = (driven_paths(posed(motion), np.array([SECOND_US])) for motion in (ego, moved))
    assert there.xy_m == pytest.approx(here.xy_m, abs=1e-5)
    assert there.speed_mps == pytest.approx(8)
    assert there.yaw_rate_radps == pytest.approx(0.1)


def test_logs_on_a_clothoid():
    """A yaw rate that grows linearly: heading a t^2 / 2, position by Fresnel's integrals."""
    speed, growth = 12.0, 0.04
    yaw_us = every(250_000, 15, phase_us=-103_000)
    recording = logged(every(97_003, 15, phase_us=-90_000), speed, yaw_us, growth * yaw_us / SECOND_US)
    scale = np.sqrt(growth / np.pi)
    sine, cosine = fresnel(scale * T_IDXS_S)
    paths = driven_paths(recording, np.array([0]))
    assert paths.xy_m[0] == pytest.approx(speed / scale * np.stack([cosine, -sine], axis=1), abs=1e-3)
    assert paths.yaw_rate_radps == pytest.approx(0, abs=1e-4)


def test_logs_against_an_ode_solver():
    rng = np.random.default_rng(5)
    speed_us, yaw_us = np.cumsum(rng.integers(60_000, 140_000, 140)), np.cumsum(rng.integers(150_000, 500_000, 60))
    speed = 12 + np.cumsum(rng.normal(0, 0.3, len(speed_us)))
    yaw_rate = 0.3 * np.sin(np.cumsum(rng.uniform(0, 0.6, len(yaw_us))))

    def rates(t, state):
        forward, turn = np.interp(t * 1e6, speed_us, speed), np.interp(t * 1e6, yaw_us, yaw_rate)
        return forward * np.cos(state[2]), -forward * np.sin(state[2]), turn

    at_us = np.array([700_000, 2_345_678])
    found = driven_paths(logged(speed_us, speed, yaw_us, yaw_rate), at_us)
    assert found.num_points.tolist() == [33, 33]
    for row, start_s in enumerate(at_us / SECOND_US):
        solved = solve_ivp(
            rates, (start_s, start_s + 10), np.zeros(3), t_eval=start_s + T_IDXS_S[:-1], max_step=0.01, rtol=1e-9
        )
        assert found.xy_m[row, :-1] == pytest.approx(solved.y[:2].T, abs=1e-3)
        assert found.speed_mps[row] == pytest.approx(np.interp(at_us[row], speed_us, speed), abs=1e-3)


@given(
    st.lists(st.sampled_from([100_000, 250_000, 250_001, 500_000]), min_size=1, max_size=50),
    st.lists(st.sampled_from([250_000, 600_000, 600_001]), min_size=1, max_size=30),
    st.lists(st.integers(-300_000, 8_000_000), min_size=1, max_size=5),
)
def test_the_valid_prefix_ends_at_the_end_of_a_log_and_at_a_gap(speed_steps, yaw_steps, at_us):
    speed_us, yaw_us = np.cumsum([0, *speed_steps]), np.cumsum([-50_000, *yaw_steps])
    paths = driven_paths(logged(speed_us, 10.0, yaw_us, 0.0), np.array(at_us))
    for start_us, num_points, path in zip(at_us, paths.num_points, paths.xy_m, strict=True):
        times_us = start_us + np.round(T_IDXS_S * 1e6)
        expected = 0
        while expected < 33 and all(
            is_known(log, start_us, times_us[expected], gap)
            for log, gap in ((speed_us, MAX_MOTION_GAP_US), (yaw_us, MAX_YAW_RATE_GAP_US))
        ):
            expected += 1
        assert num_points == expected
        assert path[:num_points, 0] == pytest.approx(10 * T_IDXS_S[:num_points], abs=1e-4)
        assert not path[num_points:].any()


def is_known(log_us, start_us, end_us, max_gap_us) -> bool:
    """The definition, by brute force: both ends inside the log, and no gap between them."""
    if not log_us[0] <= start_us <= end_us <= log_us[-1]:
        return False
    pairs = pairwise(log_us)
    touches = [(a, b) for a, b in pairs if (a < end_us and b > start_us) or a < start_us < b]
    return all(b - a <= max_gap_us for a, b in touches)


def test_poses_have_gaps_too():
    ego = circle(12, speed_mps=8, yaw_rate=0.1)
    kept = (ego.timestamp_us <= 3_000_000) | (ego.timestamp_us > 3_250_000)
    columns = ("timestamp_us", "position_m", "quaternion_xyzw", "velocity_mps", "acceleration_mps2", "curvature_per_m")
    holed = EgoMotion(*(getattr(ego, name)[kept] for name in columns))
    paths = driven_paths(posed(holed), np.array([1_000_000, 3_000_000, 3_000_001, 3_260_000, 12_000_001]))
    inside = int((T_IDXS_S <= 2).sum())
    assert paths.num_points.tolist() == [inside, 1, 0, int((T_IDXS_S <= 8.74).sum()), 0]
    assert paths.speed_mps.tolist() == pytest.approx([8, 8, 0, 8, 0], abs=1e-2)


def test_an_instant_is_answered_alone_as_in_company():
    drive = random_drive(np.random.default_rng(7), seconds=15, start_phase=0.4)
    company = driven_paths(posed(drive.log()), np.array([9_000_000, 123_456, 0, 4_000_000]))
    alone = driven_paths(posed(drive.log()), np.array([123_456]))
    assert (alone.xy_m[0] == company.xy_m[1]).all()
    assert driven_paths(posed(drive.log()), np.zeros(0, np.int64)).xy_m.shape == (0, 33, 2)


@pytest.mark.parametrize(("hz", "tolerance_m"), [((100, 100), 1e-3), ((10, 4), 0.15)])
def test_poses_and_logs_of_one_drive_agree(hz, tolerance_m):
    for seed in range(3):
        drive = random_drive(np.random.default_rng(seed), seconds=40, start_phase=seed / 3)
        speed_us, yaw_us = every(SECOND_US // hz[0], 40, phase_us=-100_687), every(SECOND_US // hz[1], 40, phase_us=-51)
        turn = drive.speed_mps * drive.curvature_per_m
        values = np.interp(speed_us, drive.time_us, drive.speed_mps), np.interp(yaw_us, drive.time_us, turn)
        at_us = every(200_000, 28, phase_us=200_000)
        poses = driven_paths(posed(drive.log()), at_us)
        logs = driven_paths(logged(speed_us, values[0], yaw_us, values[1]), at_us)
        assert poses.num_points.min() == logs.num_points.min() == 33
        assert logs.xy_m == pytest.approx(poses.xy_m, abs=tolerance_m)
        assert np.abs(poses.xy_m[..., 1]).max() > 5  # it did turn
        assert logs.speed_mps == pytest.approx(poses.speed_mps, abs=1e-3)
        assert logs.yaw_rate_radps == pytest.approx(poses.yaw_rate_radps, abs=tolerance_m / 10)


def test_what_cannot_give_a_path_says_what_it_lacks():
    with pytest.raises(DataError, match="drive: has no poses and no speed and yaw rate; a driven path needs poses, or"):
        driven_paths(Recording("drive", "test", {}), np.array([0]))
    both = logged(every(100_000, 2), 9.0, every(100_000, 2), 0.0)
    with pytest.raises(DataError, match="drive: has no poses and no yaw rate"):
        driven_paths(Recording("drive", "test", {}, speed=both.speed, device=DeviceLog()), np.array([0]))
    apart = logged(every(100_000, 2), 9.0, 5 * SECOND_US + every(100_000, 2), 0.0)
    with pytest.raises(DataError, match="speed and yaw rate have no time in common"):
        driven_paths(apart, np.array([0]))


@pytest.mark.real_data
@pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
def test_a_real_segment_drives_where_its_own_model_said():
    """Against the integral of the logged speed, and against the plans that the device's model made at the time."""
    folder = Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"
    recording = OpenpilotLogs(folder).open("a2a0ccea32023010_2023-07-27--13-01-19--0")
    speed, model = recording.speed, recording.device.model
    paths = driven_paths(recording, model.timestamp_us, camera="qcamera")
    whole = paths.num_points == 33
    assert whole.sum() == 24

    two_s = np.abs(T_IDXS_S - 2).argmin()
    last_us = round(T_IDXS_S[two_s] * SECOND_US)
    for start_us, path in zip(model.timestamp_us[whole], paths.xy_m[whole], strict=True):
        times_us = np.append(np.arange(start_us, start_us + last_us, 10_000), start_us + last_us)
        way_m = np.trapezoid(np.interp(times_us, speed.timestamp_us, speed.speed_mps), times_us / SECOND_US)
        assert np.linalg.norm(path[two_s]) == pytest.approx(way_m, abs=0.05)

    planned = (model.path_m - model.path_m[:, :1])[..., :2]  # a plan begins a metre behind the camera
    apart_m = np.abs(paths.xy_m - planned)[whole, two_s].mean(axis=0)
    assert apart_m[0] < 1
    assert apart_m[1] < 0.2
    assert np.corrcoef(paths.xy_m[whole, two_s, 1], planned[whole, two_s, 1])[0, 1] > 0.9
