"""Route folders of comma devices: road cameras with true frame times, and what the log says of the car and the device.

Clock: the device's boot-monotonic clock in microseconds. Frame i of a segment's video takes the time of the encode
index whose `segmentId` is i. The low-resolution `qcamera.ts` carries that clock in its own container too, and is
checked against the log. The driver's camera is never read. Segments that follow each other are one recording
(openpilot_runs.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from omni_cli.errors import DataError
from omni_cli.formats import openpilot
from omni_cli.formats.openpilot import NANOSECONDS_PER_MICROSECOND, Camera, SegmentName
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.driving_log import DeviceLog
from omni_cli.scene.recording import Recording, SpeedLog
from omni_cli.sources import PartRefused, RecordingRef, openpilot_schema
from omni_cli.sources.noted import read_noted
from omni_cli.sources.openpilot_cameras import (
    Optics,
    SegmentVideo,
    camera_stream,
    coded_bytes,
    encode_indices,
    exposed_us,
    gaps_s,
    optics,
    require_whole_end,
    segment_video,
    video_times_us,
    wanted_cameras,
)
from omni_cli.sources.openpilot_device import device_log
from omni_cli.sources.openpilot_events import LogEvents, Row, joined, read_events
from omni_cli.sources.openpilot_runs import SegmentFiles, SegmentRun, camera_paths, log_path, segment_runs
from omni_cli.sources.quarantine import read_quarantine

_ROAD_INDEX_EVENTS = ("roadEncodeIdx", "qRoadEncodeIdx")  # two videos of one camera, which numbers its frames once


class OpenpilotLogs:
    """A folder of routes, in any layout of comma's tools. A recording is a run of segments; its group is the route."""

    known_cameras: ClassVar[tuple[str, ...]] = tuple(openpilot.CAMERAS)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every run of segments, by route and number; no file but the list of those in quarantine is read.

        Raises:
            DataError: the folder holds no segment.
        """
        return tuple(RecordingRef(id=str(run), group=run.route, bundle=run.route) for run in self._runs)

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one run of segments with the cameras asked for (None: all that are there).

        Raises:
            PartRefused: of several segments, one's log or video is damaged, disagrees, or does not follow the others.
            DataError: there is no such run, or its log or a camera is missing, damaged, or disagrees with the log.
            UsageError: no such camera exists on these devices, or the `openpilot` extra is not installed.
        """
        run = next((run for run in self._runs if str(run) == recording_id), None)
        if run is None:
            raise DataError(f"{self._folder}: holds no recording {recording_id}; `omni audit` lists what is there")
        logs = self._logs(run)
        log = drive_log(logs)
        wanted = wanted_cameras(str(run), camera_paths(self._files[run.segments[0]]), cameras)
        videos = {camera.name: self._videos(run, camera, logs) for camera in wanted}
        found = {camera.name: camera_stream(camera, videos[camera.name], log.optics) for camera in wanted}
        return Recording(
            id=str(run),
            source="openpilot",
            cameras={camera: stream for camera, (stream, _) in found.items()},
            speed=log.speed,
            device=log.device,
            group=run.route,
            parts=tuple(map(str, run.segments)) if len(run.segments) > 1 else (),
            provenance={
                **log.facts,
                **{f"calibration_{camera}": told for camera, (_, told) in found.items()},
                **{f"gaps_{camera}": _told_gaps(run, those) for camera, those in videos.items() if len(those) > 1},
            },
        )

    def _logs(self, run: SegmentRun) -> list["SegmentLog"]:
        logs = []
        for segment in run.segments:
            path = log_path(self._files[segment])
            if path is None:
                raise DataError(f"{segment}: has no rlog or qlog beside its videos; copy the log too and fetch again")
            with _blaming(segment, run):
                logs.append(read_log(path, segment.number))
        return logs

    def _videos(self, run: SegmentRun, camera: Camera, logs: Sequence["SegmentLog"]) -> list[SegmentVideo]:
        videos: list[SegmentVideo] = []
        for segment, log in zip(run.segments, logs, strict=True):
            path, logged_us = camera_paths(self._files[segment])[camera.name], log.frame_time_us.get(camera.index_event)
            before = videos[-1] if videos else None
            with _blaming(segment, run):
                videos.append(segment_video(camera, path, logged_us, before, is_truncated=log.is_truncated))
                require_whole_end(videos[-1], log.frame_bytes.get(camera.index_event))
        return videos

    @cached_property
    def _runs(self) -> tuple[SegmentRun, ...]:
        return segment_runs(self._files, alone=read_quarantine(self._folder))

    @cached_property
    def _files(self) -> SegmentFiles:
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

    path: Path
    events: LogEvents
    speed: SpeedLog
    frame_time_us: Mapping[str, Int64Array]  # encode index event -> end of exposure of frame 0, 1, 2 ...
    frame_bytes: Mapping[str, Int64Array]  # likewise -> how long the device coded it, 0 where the log does not say it
    road_time_us: Mapping[int, int]  # frame id -> end of exposure, of the road camera's frames in the segment's videos
    is_truncated: bool


@dataclass(frozen=True)
class DriveLog:
    """What omni takes from the logs of segments that follow each other."""

    speed: SpeedLog
    device: DeviceLog
    optics: Optics
    facts: Mapping[str, str]  # provenance


def read_log(path: Path, segment_number: int) -> SegmentLog:
    """Read one segment's log.

    Events of kinds that the schema does not know are skipped and counted; a log whose tail is missing is read up to
    there and marked.

    Raises:
        DataError: the file is not what was noted of it, or holds no events, or no valid speed.
        UsageError: the `openpilot` extra is not installed.
    """
    content, is_cut = openpilot_schema.decompress(read_noted(path), path.name)
    events = read_events(content)
    if not events.counts["all"]:
        raise DataError(f"{path}: holds no openpilot event; it is no log, or of another format; fetch it again")
    indices = encode_indices(events, segment_number)
    return SegmentLog(
        path=path,
        events=events,
        speed=_speed_log(events.rows["carState"], path),
        frame_time_us={event: video_times_us(found, f"{path}: {event}") for event, found in indices.items()},
        frame_bytes={event: coded_bytes(found) for event, found in indices.items()},
        road_time_us={
            index.frame_id: exposed_us(index) for event in _ROAD_INDEX_EVENTS for index in indices.get(event, ())
        },
        is_truncated=is_cut or events.is_torn,
    )


def drive_log(logs: Sequence[SegmentLog]) -> DriveLog:
    """Join the logs of segments that follow each other; where the device settled is told by all of them."""
    events = joined([log.events for log in logs])
    device, device_facts = device_log(events, _road_time_us(logs))
    return DriveLog(
        speed=_joined_speed([log.speed for log in logs]),
        device=device,
        optics=optics(events, device.mount),
        facts={**_log_facts(events, logs), **device_facts},
    )


@contextmanager
def _blaming(segment: SegmentName, run: SegmentRun) -> Iterator[None]:
    """Name the segment of a longer run that is refused, and how the others can be used."""
    try:
        yield
    except DataError as error:
        if len(run.segments) == 1:
            raise
        raise PartRefused(f"{error}; to use {run} without it: omni audit --quarantine", str(segment)) from None


def _told_gaps(run: SegmentRun, videos: Sequence[SegmentVideo]) -> str:
    told = [f"{gap_s:.3f} s after segment {run.segments[number].number}" for number, gap_s in gaps_s(videos).items()]
    return ", ".join(told) or "none"


def _road_time_us(logs: Sequence[SegmentLog]) -> Mapping[int, int]:
    """A camera that was started anew counts from 0 again: an id that two segments have names no frame."""
    claims = Counter(frame_id for log in logs for frame_id in log.road_time_us)
    return {frame_id: time for log in logs for frame_id, time in log.road_time_us.items() if claims[frame_id] == 1}


def _log_facts(events: LogEvents, logs: Sequence[SegmentLog]) -> dict[str, str]:
    truncated = [log.path for log in logs if log.is_truncated]
    facts = {
        "log": ", ".join(sorted({log.path.name for log in logs})),
        "log_is_truncated": str(bool(truncated)).lower(),
        "log_events": str(events.counts["all"]),
        "log_unknown_events": str(events.counts["unknown"]),
        "log_damaged_events": str(events.counts["damaged"]),
        "log_invalid_speed_events": str(sum(not row.is_valid for row in events.rows["carState"])),
        "log_schema_sha256": openpilot_schema.schema_hash(),
    }
    if truncated:
        facts["truncated_logs"] = ", ".join(f"{path.parent.name}/{path.name}" for path in truncated)
    if (init := events.last("initData", None)) is not None:
        facts |= {"openpilot_version": init[0], "device": init[1]}
    if (car := events.last("carParams", None)) is not None:
        facts["car"] = car
    return facts


def _speed_log(rows: Iterable[Row], path: Path) -> SpeedLog:
    valid = [row for row in rows if row.is_valid]  # the others' bus was silent: their values are stale
    time_us, first = np.unique([row.time_ns // NANOSECONDS_PER_MICROSECOND for row in valid], return_index=True)
    values = np.array([row.values[:2] for row in valid], dtype=np.float64).reshape(-1, 2)[first]
    if len(time_us) < 2:
        raise DataError(f"{path}: holds {len(time_us)} valid carState events, at least 2 are needed for a speed")
    if not np.isfinite(values).all():
        raise DataError(f"{path}: carState holds NaN or infinite speed or steering; the log is damaged")
    return SpeedLog(time_us.astype(np.int64), values[:, 0], values[:, 1])


def _joined_speed(logs: Sequence[SpeedLog]) -> SpeedLog:
    """Join logs of which one may begin with what the one before ends with."""
    time_us, first = np.unique(np.concatenate([log.timestamp_us for log in logs]), return_index=True)
    speed_mps, angle_deg = (
        np.concatenate([getattr(log, name) for log in logs])[first] for name in ("speed_mps", "steering_angle_deg")
    )
    return SpeedLog(time_us, speed_mps, angle_deg)
