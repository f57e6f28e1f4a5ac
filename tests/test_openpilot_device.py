"""What a comma device's log says of mount, turning, desire, satellite fix and its own model."""

import random
from pathlib import Path

import numpy as np
import pytest

from omni_cli.errors import DataError
from omni_cli.formats import openpilot
from omni_cli.sources import openpilot_schema
from omni_cli.sources.openpilot_logs import DriveLog, drive_log, read_log
from tests.support import openpilot as made
from tests.support.openpilot import calibration, event, every, frame_indices, model, rotation

FRAMES = 40
RPY = (0.02, -0.03, 0.05)


def log_of(tmp_path: Path, *extra: bytes, frames: int = FRAMES) -> DriveLog:
    """The extra events come after all others, whatever their time."""
    path = tmp_path / "qlog"
    path.write_bytes(made.events(frames) + b"".join(extra))
    return drive_log([read_log(path, 0)])


# --- mount


def test_the_mount_comes_in_the_order_of_time_and_settles_on_the_last_calibrated_row(tmp_path):
    rows = [
        event("liveCalibration", calibration((0, 0, 0.3), "recalibrating"), 9_000_000),
        event("liveCalibration", calibration((0, 0, 0.1), "uncalibrated"), 5_000_000),
        event("liveCalibration", calibration((0, 0, 0.2)), 7_000_000),
        event("liveCalibration", {"calStatus": "calibrated"}, 8_000_000),  # of an old release: no angles
        event("liveCalibration", calibration((0, 0, float("nan"))), 8_500_000),
    ]
    mount = log_of(tmp_path, *rows).device.mount
    np.testing.assert_array_equal(mount.timestamp_us, [5_000_000, 7_000_000, 9_000_000])
    np.testing.assert_allclose(mount.rpy_rad[:, 2], [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(mount.is_calibrated, [False, True, False])
    assert mount.settled_row == 1
    np.testing.assert_allclose(mount.device_R_calib(1), rotation(0, 0, 0.2), atol=1e-7)


def test_a_mount_that_never_calibrates_settles_on_its_last_row(tmp_path):
    rows = [calibration((0, 0, yaw), "uncalibrated") for yaw in (0.1, 0.2)]
    log = log_of(tmp_path, every("liveCalibration", rows))
    assert log.device.mount.settled_row == 1
    assert log.facts["mount"] == "0 of 2 calibrated"


def test_old_releases_say_calibrated_in_another_field_and_no_height(tmp_path):
    mount = log_of(tmp_path, event("liveCalibration", {"rpyCalib": [0, 0, 0], "calStatusDEPRECATED": 1})).device.mount
    assert mount.is_calibrated.tolist() == [True]
    assert mount.height_m.tolist() == [openpilot.DEFAULT_HEIGHT_M]


# --- turning


def seen_by_the_device(calib_radps: np.ndarray) -> np.ndarray:
    """The same angular velocities (n, 3) in the device's axes."""
    return (rotation(*RPY) @ calib_radps.T).T


def live_pose(xyz, time_us: int = 0, *, valid: bool = True) -> dict:
    return {"angularVelocityDevice": dict(zip("xyz", map(float, xyz), strict=True)) | {"valid": valid}}


def live_location(xyz, time_us: int = 0) -> dict:
    return {"angularVelocityDevice": {"value": [float(x) for x in xyz], "valid": True}}


def odometry(xyz, time_us: int) -> dict:
    return {"rot": [float(x) for x in xyz], "timestampEof": (int(time_us) - 41_000) * 1000}


TURNS = np.random.default_rng(0).normal(scale=0.2, size=(9, 3))
MAKERS = {
    "livePose": ("livePose", live_pose),
    "liveLocationKalman": ("liveLocationKalmanDEPRECATED", live_location),
    "cameraOdometry": ("cameraOdometry", odometry),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_turning_is_taken_to_calib_and_left_is_positive(tmp_path, kind):
    name, body = MAKERS[kind]
    at_us = made.BOOT_US + np.arange(9) * 250_000
    turns = TURNS if kind == "cameraOdometry" else seen_by_the_device(TURNS)  # what the camera sees is in calib
    bodies = [body(xyz, time_us) for xyz, time_us in zip(turns, at_us, strict=True)]
    log = log_of(tmp_path, event("liveCalibration", calibration(RPY)), every(name, bodies))
    # Only the camera's own events carry another time than the log's: that of their picture.
    seen_us = at_us - 41_000 if kind == "cameraOdometry" else at_us
    np.testing.assert_allclose(log.device.yaw_rate.yaw_rate_radps, -TURNS[:, 2], atol=1e-7)
    np.testing.assert_array_equal(log.device.yaw_rate.timestamp_us, seen_us)
    assert log.facts["yaw_rate"].startswith(f"{kind}.")
    assert "in the calib frame" in log.facts["yaw_rate"]


def test_without_a_mount_the_device_frame_is_taken_and_told(tmp_path):
    log = log_of(tmp_path, every("livePose", [live_pose(xyz) for xyz in TURNS]))
    np.testing.assert_allclose(log.device.yaw_rate.yaw_rate_radps, -TURNS[:, 2], atol=1e-7)
    assert "in the device frame" in log.facts["yaw_rate"]


def test_the_best_source_wins_even_if_it_starts_a_little_later_but_not_if_it_misses_much(tmp_path):
    at_us = range(made.BOOT_US, made.BOOT_US + 20_000_000, 250_000)
    camera = every("cameraOdometry", [odometry((0, 0, -1), time_us) for time_us in at_us])
    pose = [live_pose((0, 0, -2), valid=i >= 4) for i in range(80)]
    assert set(log_of(tmp_path, camera, every("livePose", pose)).device.yaw_rate.yaw_rate_radps) == {2.0}
    late = [live_pose((0, 0, -2), valid=i >= 40) for i in range(80)]
    log = log_of(tmp_path, camera, every("livePose", late))
    assert set(log.device.yaw_rate.yaw_rate_radps) == {1.0}
    assert log.facts["yaw_rate"] == "cameraOdometry.rot in the calib frame, 19.8 s of 19.8 s"
    holes = [live_pose((0, 0, -2), valid=i < 8 or i > 70) for i in range(80)]  # spans all, and covers little of it
    assert set(log_of(tmp_path, camera, every("livePose", holes)).device.yaw_rate.yaw_rate_radps) == {1.0}


def test_turns_that_are_invalid_or_not_numbers_are_left_out(tmp_path):
    rows = [
        event("livePose", live_pose((0, 0, -1)), 5_000_000),
        event("livePose", live_pose((0, 0, -2)), 5_250_000, valid=False),
        event("livePose", live_pose((0, 0, -3), valid=False), 5_500_000),
        event("livePose", live_pose((0, 0, np.nan)), 5_600_000),
        event("livePose", live_pose((0, 0, -4)), 5_750_000),
    ]
    assert log_of(tmp_path, *rows).device.yaw_rate.yaw_rate_radps.tolist() == [1.0, 4.0]


def test_the_cars_own_yaw_rate_is_the_last_resort_and_zeros_are_none(tmp_path):
    log = log_of(tmp_path)
    assert log.device.yaw_rate is None
    assert log.facts["yaw_rate"] == "none"
    car = [{"vEgo": 10.0, "yawRate": 0.25} for _ in range(9)]
    found = log_of(tmp_path, every("carState", car, 10_001)).device.yaw_rate  # between those that leave 0
    assert set(np.round(found.yaw_rate_radps, 6)) == {0.0, 0.25}
    assert (np.diff(found.timestamp_us) > 0).all()


# --- desire, satellite fix, side of the road


def lane_change(state: str, direction: str) -> dict:
    return {"meta": {"laneChangeState": state, "laneChangeDirection": direction}}


CHANGES = [
    lane_change("off", "none"),
    lane_change("preLaneChange", "left"),  # the blinker alone: the model is not asked yet
    lane_change("laneChangeStarting", "left"),
    lane_change("laneChangeFinishing", "left"),
    lane_change("laneChangeStarting", "right"),
    lane_change("laneChangeFinishing", "none"),
]


@pytest.mark.parametrize("kind", ["drivingModelData", "modelV2"])
def test_desire_follows_from_the_state_and_direction_of_a_lane_change(tmp_path, kind):
    log = log_of(tmp_path, every(kind, CHANGES))
    assert log.device.desire.desire.tolist() == [0, 0, 3, 3, 4, 0]
    np.testing.assert_array_equal(log.device.desire.timestamp_us, made.BOOT_US + np.arange(6) * 250_000)
    assert log.facts["desire"] == kind


def test_old_logs_say_desire_in_the_lateral_plan_while_the_models_field_is_not_filled(tmp_path):
    plans = every("lateralPlanDEPRECATED", [{"desire": d} for d in ("none", "laneChangeRight", "keepLeft")])
    quiet = every("modelV2", [lane_change("off", "none")] * 3)
    log = log_of(tmp_path, quiet, plans)
    assert log.device.desire.desire.tolist() == [0, 4, 5]
    assert log.facts["desire"] == "lateralPlan"
    assert log_of(tmp_path, quiet).device.desire.desire.tolist() == [0, 0, 0]
    assert log_of(tmp_path).device.desire is None


def test_a_fix_is_told_by_its_field_or_by_the_older_flag(tmp_path):
    bodies = [{"hasFix": False, "flags": 0}, {"hasFix": True}, {"flags": 1}, {"flags": 2}]
    log = log_of(tmp_path, every("gpsLocation", bodies))
    assert log.device.fix.has_fix.tolist() == [False, True, True, False]
    both = log_of(tmp_path, every("gpsLocation", bodies), every("gpsLocationExternal", [{"hasFix": True}] * 2))
    assert both.device.fix.has_fix.tolist() == [True, True]
    assert (both.facts["satellite_fix"], log_of(tmp_path).facts["satellite_fix"]) == ("gpsLocationExternal", "none")


def test_the_side_of_the_driver_is_the_last_that_the_device_took_it_for(tmp_path):
    assert not log_of(tmp_path).device.is_right_hand_drive
    sides = [{"isRHD": side} for side in (False, False, True)]
    assert log_of(tmp_path, every("driverMonitoringState", sides)).device.is_right_hand_drive


# --- the device's own model


def frames_known_by_id(tmp_path: Path, *extra: bytes) -> DriveLog:
    """In `made.events` every frame has id 0; here they have those of a real segment, from 2."""
    path = tmp_path / "qlog"
    speed = every("carState", [{"vEgo": 10.0}] * 3)
    path.write_bytes(
        speed + frame_indices("roadEncodeIdx", FRAMES, 2) + frame_indices("qRoadEncodeIdx", FRAMES, 2) + b"".join(extra)
    )
    return drive_log([read_log(path, 0)])


def test_a_logged_model_gets_the_true_time_of_the_frame_that_it_saw(tmp_path):
    late = event("modelV2", model(12, shift=1.0), made.BOOT_US + 60_000_000)  # logged when it was ready
    unsure = model(7)
    unsure["position"] = {axis: unsure["position"][axis] for axis in "xyz"}  # of its scales nothing is read
    log = frames_known_by_id(tmp_path, late, event("modelV2", unsure, made.BOOT_US + 70_000_000))
    seen = log.device.model
    np.testing.assert_array_equal(seen.timestamp_us, made.frame_times_us(FRAMES)[[5, 10]])
    points = np.arange(33)
    np.testing.assert_allclose(seen.path_m[0], np.stack([points, points / 10, points / 20], axis=1))
    np.testing.assert_allclose(seen.path_m[1, :, 0], points + 1)
    np.testing.assert_allclose(seen.lane_lines_m[0, 3], np.stack([points * 0 + 3, points / 10 + 3], axis=1), rtol=1e-6)
    np.testing.assert_allclose(seen.lane_line_prob[0], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(seen.road_edges_m[0, :, 0, 0], [-5, -4])
    np.testing.assert_allclose(seen.lead[0], [[30, 1, 20, 0.1], [31, 2, 21, 0.1], [32, 3, 22, 0.1]])
    np.testing.assert_allclose(seen.lead_prob[0], [0.9, 0.8, 0.7])
    assert seen.path_m.shape == (2, 33, 3)
    assert seen.lane_lines_m.shape == (2, 4, 33, 2)


def test_what_is_no_whole_look_at_a_frame_of_this_segment_is_dropped_and_counted(tmp_path):
    ragged = model(9)
    ragged["position"]["y"].pop()
    nan = model(10)
    nan["roadEdges"][1]["z"][4] = float("nan")
    other_segment = frame_indices(
        "roadEncodeIdx", FRAMES, 90, segment=1
    )  # as at the end of a log that runs into the next segment
    log = frames_known_by_id(
        tmp_path,
        other_segment,
        event("modelV2", model(1)),
        event("modelV2", model(95)),
        event("modelV2", model(7), valid=False),
        event("modelV2", model(8, leads=0)),
        event("modelV2", ragged),
        event("modelV2", nan),
        event("modelV2", model(11)),
    )
    np.testing.assert_array_equal(log.device.model.timestamp_us, made.frame_times_us(FRAMES)[[9]])
    assert log.facts["logged_model"] == "1 kept, 1 invalid, 3 incomplete, 2 without a video frame"
    none = frames_known_by_id(tmp_path, event("modelV2", model(1)))
    assert none.device.model is None


# --- logs of other releases, and damaged ones


def test_kinds_of_event_are_known_by_their_number_under_whatever_name_this_schema_has():
    kinds = openpilot_schema.event_kinds()
    assert set(kinds.values()) == set(openpilot.EVENT_ORDINALS)
    for name, kind in kinds.items():  # this schema's own names, so that a wrong number cannot hide
        assert name in (kind, f"{kind}DEPRECATED")


def test_a_device_newer_than_the_schema_is_named_by_its_number(tmp_path):
    with_device = [bytearray(event("deviceState", {"deviceType": name})) for name in ("tizi", "mici")]
    at = next(i for i, (a, b) in enumerate(zip(*with_device, strict=True)) if a != b)
    with_device[0][at] = 77
    log = log_of(tmp_path, bytes(with_device[0]), event("roadCameraState", {"sensor": "ox03c10"}))
    assert log.optics.device == "number 77"
    assert log.facts["log_damaged_events"] == "0"


def test_an_event_that_is_damaged_inside_is_counted_and_the_others_are_kept(tmp_path):
    broken = bytearray(event("liveCalibration", calibration(RPY)))
    pointer = 8 + 8 + 8 + 8  # frame, root pointer, logMonoTime, union's tag and flags: then the body's pointer
    broken[pointer : pointer + 8] = b"\xfc\xff\xff\x7f\xff\xff\xff\xff"
    log = log_of(tmp_path, bytes(broken), event("liveCalibration", calibration(RPY)))
    assert log.facts["log_damaged_events"] == "1"
    assert log.facts["log_is_truncated"] == "false"
    assert len(log.device.mount.timestamp_us) == 1


def test_flipped_bits_are_read_or_refused_in_one_line(tmp_path):
    good = (
        frame_indices("roadEncodeIdx", FRAMES, 2)
        + every("carState", [{"vEgo": 10.0}] * 9)
        + event("roadCameraState", {"sensor": "ox03c10"})
    )
    good += every("liveCalibration", [calibration(RPY)] * 3) + every("modelV2", [model(5), model(9)])
    good += every("livePose", [live_pose((0, 0, 1))] * 3) + event("gpsLocation", {"flags": 1})
    dice, path = random.Random(7), tmp_path / "qlog"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        content = bytearray(good)
        for _ in range(dice.choice([1, 4, 30])):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(content))
        try:
            drive_log([read_log(path, 0)])
            outcomes["read"] += 1
        except DataError as error:
            outcomes["refused"] += "\n" not in str(error)
    assert sum(outcomes.values()) == 300
    assert min(outcomes.values()) > 0
