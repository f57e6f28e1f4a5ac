"""The events of an openpilot log that omni reads, as rows of plain numbers in the order of time.

Each kind has its reader below; only these know the fields of the schema. What the rows mean together is another
module's work (openpilot_device.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from omni_cli.formats.driving_model import DESIRES, NUM_POINTS
from omni_cli.formats.openpilot import DEFAULT_HEIGHT_M
from omni_cli.scene.driving_log import Float32Array
from omni_cli.sources import openpilot_schema

_LANE_CHANGE_STATES = (2, 3)  # laneChangeStarting, laneChangeFinishing
_LANE_CHANGE_DESIRES = {1: 3, 2: 4}  # LaneChangeDirection left, right -> Desire laneChangeLeft, laneChangeRight
_IS_CALIBRATED = 1  # of both calStatus and the number that it replaced
_HAS_FIX_FLAG = 1  # of u-blox's and Android's `flags`; newer logs say it in `hasFix`, which is false in older ones
_MODEL_SHAPES = {
    "path_m": (3, NUM_POINTS),
    "lane_lines_m": (4, 2, NUM_POINTS),
    "lane_line_prob": (4,),
    "road_edges_m": (2, 2, NUM_POINTS),
    "lead": (3, 4),
    "lead_prob": (3,),
}


class Row(NamedTuple):
    """One event."""

    time_ns: int  # when it was logged
    is_valid: bool  # as its sender says; false where what it leans on was silent
    values: Any  # what the reader of its kind returns


class CarState(NamedTuple):
    """Speed, steering and yaw rate; left is positive."""

    speed_mps: float
    steering_angle_deg: float
    yaw_rate_radps: float  # 0 in most cars, which do not say it


class EncodeIndex(NamedTuple):
    """One frame of one video."""

    segment_number: int
    video_index: int  # in the segment's video
    frame_id: int  # of the camera, since it was started
    time_ns: int  # end of exposure
    num_bytes: int  # that it was coded in; 0 in old logs


class Mount(NamedTuple):
    """How the device sits in the car."""

    rpy_rad: tuple[float, ...]  # 3, or none in old logs
    height_m: float
    is_calibrated: bool
    wide_rpy_rad: tuple[float, ...]  # from the device frame to the wide camera's; 3, or none in old logs


class Turn(NamedTuple):
    """Angular velocity in the device frame."""

    time_ns: int | None  # of the picture that it was seen in; None: when it was logged
    is_valid: bool
    xyz_radps: tuple[float, ...]


class ModelOutput(NamedTuple):
    """What the driving model said of one frame."""

    frame_id: int
    parts: Mapping[str, Float32Array] | None  # shapes: `_MODEL_SHAPES`; None where one has another, or a NaN
    desire: int


@dataclass(frozen=True)
class LogEvents:
    """What omni reads of one log, or of several that follow each other."""

    rows: Mapping[str, list[Row]]  # kind -> its events in the order of time; every kind is there
    counts: Mapping[str, int]  # all, unknown, damaged
    is_torn: bool  # the log ends inside an event

    def last(self, kind: str, otherwise: Any) -> Any:
        """Return the values of the last event of a kind."""
        return self.rows[kind][-1].values if self.rows[kind] else otherwise


def joined(logs: Sequence[LogEvents]) -> LogEvents:
    """Return the events of logs that follow each other as one; what a log repeats of those before counts once."""
    rows = {kind: _joined_rows([log.rows[kind] for log in logs]) for kind in _READERS}
    counts = {name: sum(log.counts[name] for log in logs) for name in logs[0].counts}
    return LogEvents(rows, counts, any(log.is_torn for log in logs))


def read_events(content: bytes) -> LogEvents:
    """Read the events of a decompressed log.

    Events lie in the file in the order of their sockets, not of time. One of a kind newer than the schema is counted
    and left, and so is one that is damaged inside.

    Raises:
        UsageError: the `openpilot` extra is not installed.
    """
    damage = openpilot_schema.extra("capnp").KjException
    rows: dict[str, list[Row]] = {kind: [] for kind in _READERS}
    counts = Counter(all=0, unknown=0, damaged=0)
    is_torn = False
    try:
        for event in openpilot_schema.log_schema().Event.read_multiple_bytes(content):
            counts["all"] += 1
            _take(event, rows, counts, damage)
    except damage:
        is_torn = True
    for found in rows.values():
        found.sort(key=lambda row: row.time_ns)
    return LogEvents(rows, counts, is_torn)


def _joined_rows(logs: Sequence[Sequence[Row]]) -> list[Row]:
    rows: list[Row] = []
    for log in logs:
        known = {row.time_ns for row in rows}
        rows += [row for row in log if row.time_ns not in known]
    return sorted(rows, key=lambda row: row.time_ns)


def _take(event: Any, rows: Mapping[str, list[Row]], counts: Counter[str], damage: type[Exception]) -> None:
    try:
        name = event.which()
    except damage:
        counts["unknown"] += 1  # a member of the union newer than the schema
        return
    if (kind := openpilot_schema.event_kinds().get(name)) is None:
        return
    try:
        rows[kind].append(Row(event.logMonoTime, event.valid, _READERS[kind](getattr(event, name))))
    except (damage, UnicodeDecodeError):
        counts["damaged"] += 1


def _enumerant(value: Any) -> str:
    try:
        return str(value)
    except RuntimeError:  # newer than the schema
        return f"number {value.raw}"


def _init_data(init: Any) -> tuple[str, str]:
    return init.version, _enumerant(init.deviceType)


def _car_state(state: Any) -> CarState:
    return CarState(state.vEgo, state.steeringAngleDeg, state.yawRate)


def _encode_index(index: Any) -> EncodeIndex:
    return EncodeIndex(index.segmentNum, index.segmentId, index.frameId, index.timestampEof, index.len)


def _mount(calibration: Any) -> Mount:
    return Mount(
        rpy_rad=tuple(calibration.rpyCalib),
        height_m=next(iter(calibration.height), DEFAULT_HEIGHT_M),
        is_calibrated=_IS_CALIBRATED in (calibration.calStatus.raw, calibration.calStatusDEPRECATED),
        wide_rpy_rad=tuple(calibration.wideFromDeviceEuler),
    )


def _live_pose(pose: Any) -> Turn:
    turn = pose.angularVelocityDevice
    return Turn(None, turn.valid, (turn.x, turn.y, turn.z))


def _live_location(location: Any) -> Turn:
    turn = location.angularVelocityDevice
    return Turn(None, turn.valid, tuple(turn.value))


def _camera_odometry(odometry: Any) -> Turn:
    return Turn(odometry.timestampEof, True, tuple(odometry.rot))


def _lane_change(meta: Any) -> int:
    if meta.laneChangeState.raw not in _LANE_CHANGE_STATES:
        return 0
    return _LANE_CHANGE_DESIRES.get(meta.laneChangeDirection.raw, 0)


def _has_fix(location: Any) -> bool:
    return location.hasFix or bool(location.flags & _HAS_FIX_FLAG)


def _model(model: Any) -> ModelOutput:
    path = model.position
    lists = {
        "path_m": [list(path.x), list(path.y), list(path.z)],
        "lane_lines_m": [[list(line.y), list(line.z)] for line in model.laneLines],
        "lane_line_prob": list(model.laneLineProbs),
        "road_edges_m": [[list(edge.y), list(edge.z)] for edge in model.roadEdges],
        # Only the first point of a lead means something; its later x and y are noise near 0 (facts: A3).
        "lead": [
            [value for part in (lead.x, lead.y, lead.v, lead.a) for value in list(part)[:1]] for lead in model.leadsV3
        ],
        "lead_prob": [lead.prob for lead in model.leadsV3],
    }
    return ModelOutput(model.frameId, _arrays(lists), _lane_change(model.meta))


def _arrays(lists: Mapping[str, list[Any]]) -> Mapping[str, Float32Array] | None:
    try:
        arrays = {name: np.array(values, dtype=np.float32) for name, values in lists.items()}
    except ValueError:  # lists of unequal lengths
        return None
    is_whole = {name: values.shape for name, values in arrays.items()} == _MODEL_SHAPES
    return arrays if is_whole and all(np.isfinite(values).all() for values in arrays.values()) else None


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "initData": _init_data,
    "carParams": lambda car: car.carFingerprint,
    "carState": _car_state,
    "deviceState": lambda state: _enumerant(state.deviceType),
    "roadCameraState": lambda state: _enumerant(state.sensor),
    "roadEncodeIdx": _encode_index,
    "qRoadEncodeIdx": _encode_index,
    "wideRoadEncodeIdx": _encode_index,
    "liveCalibration": _mount,
    "livePose": _live_pose,
    "liveLocationKalman": _live_location,
    "cameraOdometry": _camera_odometry,
    "drivingModelData": lambda model: _lane_change(model.meta),
    "lateralPlan": lambda plan: plan.desire.raw if plan.desire.raw < DESIRES else 0,
    "modelV2": _model,
    "gpsLocation": _has_fix,
    "gpsLocationExternal": _has_fix,
    "driverMonitoringState": lambda state: state.isRHD,
}
