"""The cameras of a comma device: their videos, when each frame was seen, and how they look at the road."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import openpilot, video
from omni_cli.formats.openpilot import NANOSECONDS_PER_MICROSECOND, Camera
from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array, typical_period_us
from omni_cli.scene.driving_log import MountLog
from omni_cli.scene.model_frame import VIEW_FROM_DEVICE
from omni_cli.scene.poses import Pose
from omni_cli.scene.recording import CameraStream
from omni_cli.sources.noted import located
from omni_cli.sources.openpilot_events import EncodeIndex, LogEvents

MAX_TIME_MISMATCH_US = 1_000
MAX_PERIODS_BETWEEN = 1.5  # two frames, for the later to be the very next
_RIG_R_CALIB = np.diag([1.0, -1.0, -1.0])  # y right to y left, z down to z up
_UNKNOWN = "unknown"
_BEST_OF_THE_ROAD = ("fcamera", "qcamera", "ecamera")


@dataclass(frozen=True)
class Optics:
    """What a log says of the device's lenses and of how they look at the road."""

    device: str
    sensor: str | None  # None: the log does not say it
    mount: MountLog | None
    wide_R_device: Rotation  # from the device's axes, which are the road camera's, to those of the wide camera

    def calibration(self, camera: str, info: video.VideoInfo) -> tuple[Calibration | None, str]:
        """Return a camera's calibration by where the device settled, or why there is none.

        The rig of these recordings is calib dropped from the camera to the ground: x forward, y left, z up.
        """
        if self.sensor is None:
            return None, "none: the log holds no roadCameraState, which names the sensor"
        lens = openpilot.lens(camera, self.device, self.sensor, width_px=info.width_px, height_px=info.height_px)
        if lens is None:
            return None, f"none: no lens of {camera} is known for device {self.device} with sensor {self.sensor}"
        if self.mount is None:
            return None, "none: the log holds no liveCalibration, which tells how the device is mounted"
        settled = self.mount.settled_row
        state = "calibrated" if self.mount.is_calibrated[settled] else "uncalibrated"
        camera_R_device = self.wide_R_device if camera == "ecamera" else Rotation.identity()
        place = _rig_T_camera(self.mount, settled, camera_R_device.as_matrix())
        return Calibration(lens, place), f"{self.device} {self.sensor}, {state}"


def optics(events: LogEvents, mount: MountLog | None) -> Optics:
    """Collect what a log says of the device's lenses and mount."""
    device = events.last("deviceState", _UNKNOWN)
    if device == _UNKNOWN:  # old releases said it at the start alone
        device = events.last("initData", (_UNKNOWN, _UNKNOWN))[1]
    wide_rpy_rad = next((row.values.wide_rpy_rad for row in reversed(events.rows["liveCalibration"])), ())
    is_known = len(wide_rpy_rad) == 3 and bool(np.isfinite(wide_rpy_rad).all())
    wide_R_device = Rotation.from_euler("xyz", wide_rpy_rad if is_known else (0.0, 0.0, 0.0))
    return Optics(device, events.last("roadCameraState", None), mount, wide_R_device)


def wanted_cameras(name: str, there: Collection[str], cameras: tuple[str, ...] | None) -> list[Camera]:
    """Return the cameras asked for (None: all that are there).

    Args:
        name: of the recording, for an error.
        there: the cameras that each of its segments has.
        cameras: those asked for.

    Raises:
        UsageError: no such camera exists on these devices.
        DataError: the recording has no such camera, or none at all.
    """
    if unknown := set(cameras or ()) - openpilot.CAMERAS.keys():
        raise UsageError(f"no camera {sorted(unknown)[0]!r} in openpilot routes; known: {', '.join(openpilot.CAMERAS)}")
    wanted = cameras or tuple(there)
    if not there:
        raise DataError(f"{name}: has no qcamera.ts, fcamera.hevc or ecamera.hevc; copy a video too and fetch again")
    if missing := [camera for camera in wanted if camera not in there]:
        raise DataError(
            f"{name}: has no {missing[0]}; it has {', '.join(there)}; choose with --cameras {_choice(wanted, there)}"
        )
    return [openpilot.CAMERAS[camera] for camera in wanted]


def _choice(wanted: Sequence[str], there: Collection[str]) -> str:
    """Return what can be had of the cameras asked for, or else the one that shows the road best.

    Not all that are there: `qcamera` is `fcamera` made smaller, and a model of two cameras takes the second for wide.
    """
    return ",".join(camera for camera in wanted if camera in there) or next(
        camera for camera in _BEST_OF_THE_ROAD if camera in there
    )


def encode_indices(events: LogEvents, segment_number: int) -> dict[str, list[EncodeIndex]]:
    """Return what the log says of the frames of each of the segment's videos, by event.

    A log may begin with the last frames of the segment before; they are not of these videos.
    """
    kinds = [camera.index_event for camera in openpilot.CAMERAS.values()]
    rows = {kind: [row.values for row in events.rows[kind]] for kind in kinds}
    own = {kind: [index for index in rows[kind] if index.segment_number == segment_number] for kind in kinds}
    return {kind: indices for kind, indices in own.items() if indices}


def video_times_us(indices: list[EncodeIndex], name: str) -> Int64Array:
    """Return the end of exposure of frame 0, 1, 2 ... of a video.

    Raises:
        DataError: a frame lacks, or times do not increase.
    """
    time_us_of_frame = {index.video_index: exposed_us(index) for index in indices}
    missing = next((i for i in range(len(time_us_of_frame)) if i not in time_us_of_frame), None)
    if missing is not None:
        raise DataError(f"{name}: lacks frame {missing} of {max(time_us_of_frame) + 1}; the log lost events")
    times_us = np.array([time_us_of_frame[i] for i in range(len(time_us_of_frame))], dtype=np.int64)
    if (np.diff(times_us) <= 0).any():
        raise DataError(f"{name}: frame times do not increase; the log is damaged")
    return times_us


def coded_bytes(indices: list[EncodeIndex]) -> Int64Array:
    """Return how many bytes a device coded frame 0, 1, 2 ... of a video in, 0 where the log does not say it."""
    bytes_of_frame = {index.video_index: index.num_bytes for index in indices}
    return np.array([bytes_of_frame[i] for i in sorted(bytes_of_frame)], dtype=np.int64)


def exposed_us(index: EncodeIndex) -> int:
    """Return the end of exposure of a frame, rounded."""
    return (index.time_ns + NANOSECONDS_PER_MICROSECOND // 2) // NANOSECONDS_PER_MICROSECOND


@dataclass(frozen=True)
class SegmentVideo:
    """One segment's video of a camera."""

    path: Path
    info: video.VideoInfo
    timestamp_us: Int64Array  # (n,) strictly increasing, of its first n frames


def segment_video(
    camera: Camera, path: Path, logged_us: Int64Array | None, before: SegmentVideo | None, *, is_truncated: bool
) -> SegmentVideo:
    """Read what a segment's video holds.

    Args:
        camera: whose.
        path: of the video.
        logged_us: when its frames were seen as the log says; None where it does not.
        before: the same camera's video of the segment before, where there is one.
        is_truncated: whether the log's tail is missing.

    Raises:
        DataError: the video is damaged, has no times, disagrees with the log, or does not follow the one before.
    """
    info = video.probe(located(path), str(path))
    times_us = _container_times_us if camera.has_own_times else _logged_times_us
    found = SegmentVideo(path, info, times_us(info, logged_us, is_truncated, str(path)))
    if before is not None:
        _require_follows(before, found)
    return found


def require_whole_end(found: SegmentVideo, logged_bytes: Int64Array | None) -> None:
    """Check that a raw video does not end inside its last frame: a decoder would make up the rest without a word.

    A device writes each frame as it was coded, one behind the other, and logs how long it is. Where the log is right
    about all frames before, it is right about the last. It knows nothing of a video that was encoded anew. The first
    frame is longer by the stream's headers.
    Source: openpilot `system/loggerd/encoder/encoder.cc`, `system/loggerd/video_writer.cc`.

    Raises:
        DataError: the last frame is shorter than it was coded.
    """
    sizes = np.array(found.info.packet_bytes, dtype=np.int64)
    if logged_bytes is None or not 2 < len(logged_bytes) <= len(sizes):
        return
    last = len(logged_bytes) - 1
    is_as_written = np.array_equal(sizes[1:last], logged_bytes[1:last])
    if is_as_written and sizes[last] < logged_bytes[last]:
        raise DataError(
            f"{found.path}: its last frame has {sizes[last]} of the {logged_bytes[last]} bytes that the log lists; the "
            "video is truncated, fetch the segment again"
        )


def camera_stream(camera: Camera, videos: Sequence[SegmentVideo], optics: Optics) -> tuple[CameraStream, str]:
    """Join one camera's videos; return its stream, and what is known of its calibration, for provenance."""
    calibration, told = optics.calibration(camera.name, videos[0].info)
    locations = tuple(located(one.path, len(one.timestamp_us)) for one in videos)
    timestamp_us = np.concatenate([one.timestamp_us for one in videos])
    return CameraStream(camera.name, locations, timestamp_us, calibration), told


def gaps_s(videos: Sequence[SegmentVideo]) -> dict[int, float]:
    """Return number of a video -> time from its last frame to the next video's first, where frames lack between."""
    period_us = typical_period_us(np.concatenate([one.timestamp_us for one in videos]))
    between_us = [int(after.timestamp_us[0] - before.timestamp_us[-1]) for before, after in pairwise(videos)]
    return {
        number: gap_us / MICROSECONDS_PER_SECOND
        for number, gap_us in enumerate(between_us)
        if gap_us > MAX_PERIODS_BETWEEN * period_us
    }


def _require_follows(before: SegmentVideo, after: SegmentVideo) -> None:
    early_s = int(before.timestamp_us[-1] - after.timestamp_us[0]) / MICROSECONDS_PER_SECOND
    if early_s >= 0:
        raise DataError(
            f"{after.path}: its first frame was seen {early_s:.3f} s before the last one of {before.path}; "
            "the two are not of one drive, fetch the route again"
        )
    sizes = [(one.info.width_px, one.info.height_px) for one in (before, after)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{after.path}: its pictures are {sizes[1][0]}x{sizes[1][1]} px, those of {before.path} "
            f"{sizes[0][0]}x{sizes[0][1]} px; the two are not of one drive, fetch the route again"
        )


def _rig_T_camera(mount: MountLog, row: int, camera_R_device: Float64Array) -> Pose:
    """Source of the rotations: `selfdrive/ui/onroad/augmented_road_view.py`."""
    view_R_calib = VIEW_FROM_DEVICE @ camera_R_device @ mount.device_R_calib(row)
    return Pose(Rotation.from_matrix(_RIG_R_CALIB @ view_R_calib.T), np.array([0.0, 0.0, mount.height_m[row]]))


def _container_times_us(
    info: video.VideoInfo, logged_us: Int64Array | None, is_truncated: bool, name: str
) -> Int64Array:
    """Return the log's times where it has them: the container's are the same, rounded to 90 kHz."""
    if not len(info.pts_us):
        raise DataError(f"{name}: its container has no frame times; fetch the file again")
    if logged_us is None:
        return info.pts_us
    _require_same_count(info, logged_us, is_truncated, name)
    wraps = np.round((logged_us[0] - info.pts_us[0]) / openpilot.TS_WRAP_US)
    times_us = info.pts_us + round(wraps * openpilot.TS_WRAP_US)
    mismatch_us = int(np.abs(times_us[: len(logged_us)] - logged_us).max())
    if mismatch_us > MAX_TIME_MISMATCH_US:
        raise DataError(
            f"{name}: frame times differ from the log's by up to {mismatch_us} us, at most {MAX_TIME_MISMATCH_US} us "
            "was expected; video and log are not of one segment"
        )
    return np.concatenate([logged_us, times_us[len(logged_us) :]])


def _logged_times_us(info: video.VideoInfo, logged_us: Int64Array | None, is_truncated: bool, name: str) -> Int64Array:
    if logged_us is None:
        why = "ends before it lists any of its frames" if is_truncated else "has no encode index for it"
        raise DataError(f"{name}: raw video has no times, and the log {why}; use qcamera instead")
    _require_same_count(info, logged_us, is_truncated, name)
    return logged_us


def _require_same_count(info: video.VideoInfo, logged_us: Int64Array, is_truncated: bool, name: str) -> None:
    """A cut log may list fewer frames than the video has; nothing else may differ."""
    is_explained = is_truncated and len(logged_us) < info.num_frames
    if info.num_frames != len(logged_us) and not is_explained:
        raise DataError(
            f"{name}: holds {info.num_frames} frames, the log lists {len(logged_us)}; "
            "the video or the log is truncated, fetch the segment again"
        )
