"""Route folders of comma devices: road cameras with true frame times, speed and steering from the log.

Clock: the device's boot-monotonic clock in microseconds. The low-resolution `qcamera.ts` carries that clock in its own
container, and is checked against the log; raw HEVC has no times, so frame i takes the time of the encode index whose
`segmentId` is i. The driver's camera is never read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import openpilot, video
from omni_cli.formats.openpilot import NANOSECONDS_PER_MICROSECOND, Camera, SegmentName
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording, SpeedLog, VideoLocation
from omni_cli.sources import RecordingRef, openpilot_schema

MAX_TIME_MISMATCH_US = 1_000
_INDEX_EVENTS = frozenset(camera.index_event for camera in openpilot.CAMERAS.values())


class OpenpilotLogs:
    """A folder of routes, in any layout of comma's tools. One recording is one segment; its group is the route."""

    known_cameras: ClassVar[tuple[str, ...]] = tuple(openpilot.CAMERAS)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every segment, by route and number.

        Raises:
            DataError: the folder holds no segment.
        """
        return tuple(RecordingRef(id=str(name), group=name.route, bundle=name.route) for name in sorted(self._segments))

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one segment with the cameras asked for (None: all that are there).

        Raises:
            DataError: the segment, its log or a camera is missing, damaged, or disagrees with the log.
            UsageError: no such camera exists on these devices, or the `openpilot` extra is not installed.
        """
        name = next((segment for segment in self._segments if str(segment) == recording_id), None)
        if name is None:
            raise DataError(f"{self._folder}: holds no segment {recording_id}; `omni audit` lists what is there")
        segment_files = self._segments[name]
        log_path = next((segment_files[file] for file in openpilot.LOG_FILES if file in segment_files), None)
        if log_path is None:
            raise DataError(f"{name}: has no rlog or qlog beside its videos; copy the log too and fetch again")
        log = read_log(log_path, name.number)
        videos = _camera_files(name, segment_files, cameras)
        streams = {camera.name: _camera_stream(camera, path, log) for camera, path in videos}
        return Recording(
            id=str(name), source="openpilot", cameras=streams, speed=log.speed, group=name.route, provenance=log.facts
        )

    @cached_property
    def _segments(self) -> Mapping[SegmentName, Mapping[str, Path]]:
        if not self._folder.is_dir():
            raise DataError(f"no folder {self._folder}; `omni fetch --source openpilot --from ROUTES` makes it")
        found: dict[SegmentName, dict[str, Path]] = {}
        for path in sorted(self._folder.absolute().rglob("*")):
            if parsed := openpilot.parse_segment_file(path.as_posix()):
                found.setdefault(parsed[0], {})[parsed[1]] = path
        if not found:
            raise DataError(
                f"{self._folder}: holds no segment such as DONGLE/LOGID--0/qcamera.ts; "
                "`omni fetch --source openpilot --from ROUTES` imports a route"
            )
        return found


@dataclass(frozen=True)
class SegmentLog:
    """What omni takes from one segment's log."""

    speed: SpeedLog
    frame_time_us: Mapping[str, Int64Array]  # encode index event -> end of exposure of frame 0, 1, 2 ...
    is_truncated: bool
    facts: Mapping[str, str]  # provenance


@dataclass
class _Events:
    """Events of one log, as they are collected."""

    speed: list[tuple[int, float, float]] = field(default_factory=list)  # ns, m/s, deg
    frames: dict[str, dict[int, int]] = field(default_factory=dict)  # event -> segmentId -> ns
    facts: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def read_log(path: Path, segment_number: int) -> SegmentLog:
    """Read one segment's log.

    Events of kinds that the schema does not know are skipped and counted; a log whose tail is missing is read up to
    there and marked.

    Raises:
        DataError: the file holds no events, or no valid speed.
    """
    content, is_cut = openpilot_schema.decompress(path.read_bytes(), path.name)
    events = _Events()
    is_torn = _collect(content, segment_number, events)
    if not events.counts["events"]:
        raise DataError(f"{path}: holds no openpilot event; it is no log, or of another format; fetch it again")
    facts = events.facts | {
        "log": path.name,
        "log_is_truncated": str(is_cut or is_torn).lower(),
        "log_events": str(events.counts["events"]),
        "log_unknown_events": str(events.counts["unknown"]),
        "log_invalid_speed_events": str(events.counts["invalid speed"]),
        "log_schema_sha256": openpilot_schema.schema_hash(),
    }
    frame_times = {event: _frame_times_us(times, f"{path}: {event}") for event, times in events.frames.items()}
    return SegmentLog(_speed_log(events.speed, path), frame_times, is_cut or is_torn, facts)


def _collect(content: bytes, segment_number: int, events: _Events) -> bool:
    """Collect the events of a log; return whether it ends inside one."""
    damage = openpilot_schema.extra("capnp").KjException
    try:
        for event in openpilot_schema.log_schema().Event.read_multiple_bytes(content):
            events.counts["events"] += 1
            try:
                kind = event.which()
            except damage:
                events.counts["unknown"] += 1  # a union member newer than the schema
                continue
            _take(event, kind, segment_number, events)
    except damage:
        return True
    return False


def _take(event: Any, kind: str, segment_number: int, events: _Events) -> None:
    if kind == "carState":
        if event.valid:
            state = event.carState
            events.speed.append((event.logMonoTime, state.vEgo, state.steeringAngleDeg))
        else:
            events.counts["invalid speed"] += 1  # the car's bus was silent: its values are stale
    elif kind in _INDEX_EVENTS:
        index = getattr(event, kind)
        if index.segmentNum == segment_number:  # a log may begin with the last frames of the segment before
            events.frames.setdefault(kind, {})[index.segmentId] = index.timestampEof
    elif kind == "initData":
        events.facts |= {"openpilot_version": event.initData.version, "device": str(event.initData.deviceType)}
    elif kind == "carParams":
        events.facts["car"] = event.carParams.carFingerprint


def _speed_log(rows: Iterable[tuple[int, float, float]], path: Path) -> SpeedLog:
    table = sorted(rows)  # events lie in the file in the order of their sockets, not of time
    time_us, first = np.unique([row[0] // NANOSECONDS_PER_MICROSECOND for row in table], return_index=True)
    values = np.array([row[1:] for row in table], dtype=np.float64).reshape(-1, 2)[first]
    if len(time_us) < 2:
        raise DataError(f"{path}: holds {len(time_us)} valid carState events, at least 2 are needed for a speed")
    if not np.isfinite(values).all():
        raise DataError(f"{path}: carState holds NaN or infinite speed or steering; the log is damaged")
    return SpeedLog(time_us.astype(np.int64), values[:, 0], values[:, 1])


def _frame_times_us(time_of_frame: Mapping[int, int], name: str) -> Int64Array:
    missing = next((i for i in range(len(time_of_frame)) if i not in time_of_frame), None)
    if missing is not None:
        raise DataError(f"{name}: lacks frame {missing} of {max(time_of_frame) + 1}; the log lost events")
    times_ns = np.array([time_of_frame[i] for i in range(len(time_of_frame))], dtype=np.int64)
    times_us = (times_ns + NANOSECONDS_PER_MICROSECOND // 2) // NANOSECONDS_PER_MICROSECOND
    if (np.diff(times_us) <= 0).any():
        raise DataError(f"{name}: frame times do not increase; the log is damaged")
    return times_us


def _camera_files(
    name: SegmentName, segment_files: Mapping[str, Path], cameras: tuple[str, ...] | None
) -> list[tuple[Camera, Path]]:
    if unknown := set(cameras or ()) - openpilot.CAMERAS.keys():
        raise UsageError(f"no camera {sorted(unknown)[0]!r} in openpilot routes; known: {', '.join(openpilot.CAMERAS)}")
    there = {
        camera.name: (camera, segment_files[file])
        for camera in openpilot.CAMERAS.values()
        for file in camera.files
        if file in segment_files
    }
    wanted = cameras or tuple(there)
    if missing := [camera for camera in wanted if camera not in there]:
        raise DataError(f"{name}: has no {missing[0]}; it has {', '.join(there) or 'no camera'}; choose with --cameras")
    if not wanted:
        raise DataError(f"{name}: has no qcamera.ts, fcamera.hevc or ecamera.hevc; copy a video too and fetch again")
    return [there[camera] for camera in wanted]


def _camera_stream(camera: Camera, path: Path, log: SegmentLog) -> CameraStream:
    info = video.probe(path.read_bytes(), str(path))
    logged_us = log.frame_time_us.get(camera.index_event)
    times_us = _container_times_us if camera.has_own_times else _logged_times_us
    return CameraStream(camera.name, VideoLocation(path), times_us(info, logged_us, log, str(path)))


def _container_times_us(info: video.VideoInfo, logged_us: Int64Array | None, log: SegmentLog, name: str) -> Int64Array:
    if not len(info.pts_us):
        raise DataError(f"{name}: its container has no frame times; fetch the file again")
    if logged_us is None:
        return info.pts_us
    _require_same_count(info, logged_us, log, name)
    both = min(info.num_frames, len(logged_us))
    wraps = np.round((logged_us[0] - info.pts_us[0]) / openpilot.TS_WRAP_US)
    times_us = info.pts_us + round(wraps * openpilot.TS_WRAP_US)
    mismatch_us = int(np.abs(times_us[:both] - logged_us[:both]).max())
    if mismatch_us > MAX_TIME_MISMATCH_US:
        raise DataError(
            f"{name}: frame times differ from the log's by up to {mismatch_us} us, at most {MAX_TIME_MISMATCH_US} us "
            "was expected; video and log are not of one segment"
        )
    return np.asarray(times_us)


def _logged_times_us(info: video.VideoInfo, logged_us: Int64Array | None, log: SegmentLog, name: str) -> Int64Array:
    if logged_us is None:
        raise DataError(f"{name}: raw video has no times, and the log has no encode index for it; use qcamera instead")
    _require_same_count(info, logged_us, log, name)
    return logged_us


def _require_same_count(info: video.VideoInfo, logged_us: Int64Array, log: SegmentLog, name: str) -> None:
    """A cut log may list fewer frames than the video has; nothing else may differ."""
    is_explained = log.is_truncated and len(logged_us) < info.num_frames
    if info.num_frames != len(logged_us) and not is_explained:
        raise DataError(
            f"{name}: holds {info.num_frames} frames, the log lists {len(logged_us)}; "
            "the video or the log is truncated, fetch the segment again"
        )
