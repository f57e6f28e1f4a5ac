"""What a comma device's log says of the device and the car beside speed: from rows of events to a `DeviceLog`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from omni_cli.formats.openpilot import NANOSECONDS_PER_MICROSECOND
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Int64Array
from omni_cli.scene.driving_log import DesireLog, DeviceLog, FixLog, LoggedModel, MountLog, YawRateLog
from omni_cli.sources.openpilot_events import LogEvents, Row

# What says how the car turns, best first: filters of gyroscope and camera, the camera alone, the car.
_TURN_KINDS = {
    "livePose": "livePose.angularVelocityDevice",
    "liveLocationKalman": "liveLocationKalman.angularVelocityDevice",
    "cameraOdometry": "cameraOdometry.rot",
}
_CAR_TURN = "carState.yawRate"
_OF_A_DEVICE = ("livePose", "liveLocationKalman")  # the camera's odometry is in calib (openpilot's locationd turns it)
_LEAST_COVER = 0.9  # of the time that the most complete source covers: a filter that starts late is still the best
_LONGEST_GAP_US = MICROSECONDS_PER_SECOND  # between samples of one source; what is longer is not covered
_DESIRES: Mapping[str, Callable[[Any], int]] = {
    "drivingModelData": int,
    "modelV2": attrgetter("desire"),
    "lateralPlan": int,
}
_FIX_KINDS = ("gpsLocationExternal", "gpsLocation")


def device_log(events: LogEvents, frame_time_us: Mapping[int, int]) -> tuple[DeviceLog, Mapping[str, str]]:
    """Return what the device logged, and where each part comes from, for provenance.

    Args:
        events: of one segment, or of several that follow each other.
        frame_time_us: when the road camera saw each frame that has a place in their videos, by frame id.
    """
    mount = _mount_log(events.rows["liveCalibration"])
    yaw_rate, turn_source = _yaw_rate_log(events, mount)
    desire, desire_kind = _desire_log(events)
    fix_kind = next((kind for kind in _FIX_KINDS if events.rows[kind]), "none")
    model, model_counts = _logged_model(events.rows["modelV2"], frame_time_us)
    log = DeviceLog(
        mount=mount,
        yaw_rate=yaw_rate,
        desire=desire,
        fix=_fix_log(events.rows[fix_kind]) if fix_kind != "none" else None,
        model=model,
        is_right_hand_drive=events.last("driverMonitoringState", otherwise=False),  # a guess that settles
    )
    facts = {
        "mount": f"{mount.is_calibrated.sum()} of {len(mount.timestamp_us)} calibrated" if mount else "none",
        "yaw_rate": turn_source,
        "desire": desire_kind,
        "satellite_fix": fix_kind,
        "logged_model": ", ".join(f"{count} {what}" for what, count in model_counts.items()),
    }
    return log, facts


def _mount_log(rows: Iterable[Row]) -> MountLog | None:
    whole = [row for row in rows if _is_vector((*row.values.rpy_rad, row.values.height_m), 4)]
    if not whole:
        return None
    time_us, first = _times_us(row.time_ns for row in whole)
    mounts = [whole[i].values for i in first]
    return MountLog(
        timestamp_us=time_us,
        rpy_rad=np.array([mount.rpy_rad for mount in mounts], dtype=np.float64),
        height_m=np.array([mount.height_m for mount in mounts], dtype=np.float64),
        is_calibrated=np.array([mount.is_calibrated for mount in mounts], dtype=np.bool_),
    )


def _yaw_rate_log(events: LogEvents, mount: MountLog | None) -> tuple[YawRateLog | None, str]:
    mounts = {kind: mount if kind in _OF_A_DEVICE else None for kind in _TURN_KINDS}
    found = {_TURN_KINDS[kind]: _turn(events.rows[kind], mounts[kind]) for kind in _TURN_KINDS}
    found[_CAR_TURN] = _car_turn(events.rows["carState"])
    covered_s = {source: _covered_s(log.timestamp_us) for source, log in found.items()}
    most_s = max(covered_s.values())
    if most_s == 0:
        return None, "none"
    best = next(source for source in found if covered_s[source] >= _LEAST_COVER * most_s)
    frame = "device" if mount is None and best.split(".")[0] in _OF_A_DEVICE else "calib"
    return found[best], f"{best} in the {frame} frame, {covered_s[best]:.1f} s of {most_s:.1f} s"


def _turn(rows: Iterable[Row], mount: MountLog | None) -> YawRateLog:
    """Return angular velocities, turned to calib by where the device settled; z is down, so that a left turn is -z."""
    kept = [row for row in rows if row.is_valid and row.values.is_valid and _is_vector(row.values.xyz_radps, 3)]
    time_us, first = _times_us(row.time_ns if row.values.time_ns is None else row.values.time_ns for row in kept)
    turn_radps = np.array([row.values.xyz_radps for row in kept], dtype=np.float64).reshape(-1, 3)[first]
    device_R_calib = np.eye(3) if mount is None else mount.device_R_calib(mount.settled_row)
    return YawRateLog(time_us, -(turn_radps @ device_R_calib)[:, 2])


def _car_turn(rows: Iterable[Row]) -> YawRateLog:
    kept = [row for row in rows if row.is_valid and _is_vector((row.values.yaw_rate_radps,), 1)]
    if not any(row.values.yaw_rate_radps for row in kept):
        kept = []  # most cars do not say it, and leave 0
    time_us, first = _times_us(row.time_ns for row in kept)
    return YawRateLog(time_us, np.array([kept[i].values.yaw_rate_radps for i in first], dtype=np.float64))


def _covered_s(timestamp_us: Int64Array) -> float:
    gaps_us = np.diff(timestamp_us)
    return int(gaps_us[gaps_us <= _LONGEST_GAP_US].sum()) / MICROSECONDS_PER_SECOND


def _desire_log(events: LogEvents) -> tuple[DesireLog | None, str]:
    """Take the first kind that ever says a desire: the field moved, and where it is not filled in it says none."""
    values = {kind: [of(row.values) for row in events.rows[kind]] for kind, of in _DESIRES.items() if events.rows[kind]}
    if not values:
        return None, "none"
    kind = next((kind for kind in values if any(values[kind])), next(iter(values)))
    time_us, first = _times_us(row.time_ns for row in events.rows[kind])
    return DesireLog(time_us, np.array(values[kind], dtype=np.int64)[first]), kind


def _fix_log(rows: Sequence[Row]) -> FixLog:
    time_us, first = _times_us(row.time_ns for row in rows)
    return FixLog(time_us, np.array([rows[i].is_valid and rows[i].values for i in first], dtype=np.bool_))


def _logged_model(
    rows: Iterable[Row], frame_time_us: Mapping[int, int]
) -> tuple[LoggedModel | None, Mapping[str, int]]:
    counts = Counter({"kept": 0, "invalid": 0, "incomplete": 0, "without a video frame": 0})
    kept: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        fate = _fate(row, frame_time_us)
        counts[fate] += 1
        if fate == "kept":
            kept[frame_time_us[row.values.frame_id]] = row.values.parts
    if not kept:
        return None, counts
    time_us = sorted(kept)
    parts = {name: np.stack([kept[time][name] for time in time_us]) for name in kept[time_us[0]]}
    return LoggedModel(
        timestamp_us=np.array(time_us, dtype=np.int64),
        path_m=parts["path_m"].swapaxes(-1, -2),
        lane_lines_m=parts["lane_lines_m"].swapaxes(-1, -2),
        lane_line_prob=parts["lane_line_prob"],
        road_edges_m=parts["road_edges_m"].swapaxes(-1, -2),
        lead=parts["lead"],
        lead_prob=parts["lead_prob"],
    ), counts


def _fate(row: Row, frame_time_us: Mapping[int, int]) -> str:
    if not row.is_valid:
        return "invalid"
    if row.values.parts is None:
        return "incomplete"
    return "kept" if row.values.frame_id in frame_time_us else "without a video frame"


def _is_vector(values: Sequence[float], size: int) -> bool:
    return len(values) == size and bool(np.isfinite(values).all())


def _times_us(times_ns: Iterable[int]) -> tuple[Int64Array, Int64Array]:
    """Return the distinct times in us, ascending, and where each comes first."""
    time_us, first = np.unique(
        np.array([time // NANOSECONDS_PER_MICROSECOND for time in times_ns], dtype=np.int64), return_index=True
    )
    return time_us, first.astype(np.int64)
