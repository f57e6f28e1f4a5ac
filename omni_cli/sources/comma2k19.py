"""comma2k19: a minute of highway with poses of a whole-dataset optimizer, CAN speed, and one road camera.

Frames: the poses are those of the device, which looks a few degrees down and to a side. How it sits in the car follows
from the direction in which it moves while the car goes fast and straight, as openpilot's own calibration does; roll
cannot be seen that way and is taken for 0. The rig is the ground under the camera (x along the car, y left, z up), for
where the rear axle is nobody wrote down. The anchor is east, north, up at the first position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import comma2k19 as layout
from omni_cli.formats import video
from omni_cli.formats.openpilot import SegmentName
from omni_cli.scene.cameras import Calibration, Pinhole
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.driving_log import DeviceLog, MountLog
from omni_cli.scene.model_frame import VIEW_FROM_DEVICE
from omni_cli.scene.poses import EgoMotion, Pose
from omni_cli.scene.recording import CameraStream, Recording, SpeedLog
from omni_cli.sources import RecordingRef
from omni_cli.sources.noted import check_noted, located

_SEMI_AXES_M = np.array([6_378_137.0, 6_378_137.0, 6_356_752.314245])  # WGS84
_CALIB_R_RIG = Rotation.from_matrix(np.diag([1.0, -1.0, -1.0]))  # x forward; left to right, up to down
_CAMERA_R_DEVICE = Rotation.from_matrix(VIEW_FROM_DEVICE)
# What openpilot's calibration learns from (`calibrationd.py`: MIN_SPEED_FILTER, MAX_YAW_RATE_FILTER).
_FAST_MPS, _STRAIGHT_RADPS = 6.7, np.radians(2.0)
_MIN_TELLING_FRAMES = 100  # five seconds
_MOVES_MPS = 1.0  # below it a curvature would be noise over nothing
_MAX_ASPECT_ERROR = 0.01
_MAX_QUATERNION_ERROR = 1e-3
_AGAIN = "copy the whole segment and fetch again"


class Comma2k19:
    """A folder of chunks or routes of comma2k19. One recording is one segment; its group is the route."""

    known_cameras: ClassVar[tuple[str, ...]] = layout.CAMERAS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every segment, by route and number.

        Raises:
            DataError: the folder holds no segment.
        """
        return tuple(RecordingRef(id=str(name), group=name.route, bundle=name.route) for name in sorted(self._segments))

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one segment with the camera, if it is asked for (None: if it is there).

        Raises:
            DataError: the segment, its video or one of its arrays is missing, damaged, or disagrees with the others.
            UsageError: no such camera exists in this data set.
        """
        name = next((segment for segment in self._segments if str(segment) == recording_id), None)
        if name is None:
            raise DataError(f"{self._folder}: holds no segment {recording_id}; `omni audit` lists what is there")
        segment = _Segment(name, self._segments[name])
        device = _device_poses(segment)
        mount = _mount(device)
        streams = {}
        if _is_wanted(cameras, is_there=layout.VIDEO_FILE in segment.files):
            streams[layout.CAMERA] = _camera_stream(segment, device.time_us, mount)
        return Recording(
            id=str(name), source="comma2k19", cameras=streams, ego=_ego_motion(device, mount),
            speed=_speed_log(segment), device=DeviceLog(mount=mount), group=name.route, provenance={"licence": "MIT"},
        )  # fmt: skip

    @cached_property
    def _segments(self) -> Mapping[SegmentName, Mapping[str, Path]]:
        if not self._folder.is_dir():
            raise DataError(f"no folder {self._folder}; `omni fetch --source comma2k19 --from CHUNKS` makes it")
        found: dict[SegmentName, dict[str, Path]] = {}
        for path in sorted(self._folder.absolute().rglob("*")):
            if parsed := layout.parse_segment_file(path.as_posix()):
                found.setdefault(parsed[0], {})[parsed[1]] = path
        if not found:
            raise DataError(
                f"{self._folder}: holds no segment such as Chunk_1/DONGLE|DATE--TIME/40/global_pose/frame_times; "
                "`omni fetch --source comma2k19 --from CHUNKS` imports some"
            )
        return found


@dataclass(frozen=True)
class _Segment:
    name: SegmentName
    files: Mapping[str, Path]  # name inside the segment -> file

    def numbers(self, file: str, columns: int | None = None) -> Float64Array:
        """Load an array (n,) or (n, columns); no code of the file runs, and no size it states is taken on trust."""
        if file not in self.files:
            raise DataError(f"{self.name}: lacks {file}; {_AGAIN}")
        path = self.files[file]
        check_noted(path)
        try:
            # A map of the file: an array that reaches past the file's end is refused, and never allocated.
            values = np.atleast_1d(np.array(np.lib.format.open_memmap(path, mode="r")))
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: no array of numbers ({' '.join(str(error).split())}); {_AGAIN}") from None
        shape = (len(values),) if columns is None else (len(values), columns)
        if values.dtype.kind not in "fiu" or values.size != np.prod(shape) or len(values) < 2:
            raise DataError(
                f"{path}: holds {values.dtype} {values.shape}; expected numbers (n, {columns or 1}); {_AGAIN}"
            )
        if not np.isfinite(values).all():
            raise DataError(f"{path}: holds NaN or infinite values; {_AGAIN}")
        return values.reshape(shape).astype(np.float64)

    def can_log(self, times: str, values: str) -> tuple[Int64Array, Float64Array]:
        """Load increasing times and their values; of messages that came in one microsecond the first counts."""
        time_s, value = self.numbers(times), self.numbers(values)
        if len(time_s) != len(value):
            raise DataError(f"{self.name}: {values} holds {len(value)} rows for {len(time_s)} times; {_AGAIN}")
        time_us, first = np.unique(_microseconds(time_s), return_index=True)
        return time_us, value[first]


@dataclass(frozen=True)
class _DevicePoses:
    """The device as the data have it."""

    time_us: Int64Array  # (n,) of the frames
    position_m: Float64Array  # (n, 3) ECEF
    velocity_mps: Float64Array  # (n, 3) ECEF
    ecef_R_device: Rotation  # n

    @cached_property
    def turn_radps(self) -> Float64Array:
        """Angular velocity (n, 3) in the device's frame, from the frames before and after each."""
        rows = np.arange(len(self.time_us))
        before, after = np.maximum(rows - 1, 0), np.minimum(rows + 1, len(rows) - 1)
        turn = (self.ecef_R_device[before].inv() * self.ecef_R_device[after]).as_rotvec()
        elapsed_s = (self.time_us[after] - self.time_us[before]) / MICROSECONDS_PER_SECOND
        return np.asarray(turn / elapsed_s[:, None])


def _device_poses(segment: _Segment) -> _DevicePoses:
    time_us = _microseconds(segment.numbers(layout.FRAME_TIMES))
    if (np.diff(time_us) <= 0).any():
        raise DataError(f"{segment.name}: {layout.FRAME_TIMES} do not increase; {_AGAIN}")
    position_m, velocity_mps = segment.numbers(layout.POSITIONS, 3), segment.numbers(layout.VELOCITIES, 3)
    wxyz = segment.numbers(layout.ORIENTATIONS, 4)
    if counts := {len(array) for array in (position_m, velocity_mps, wxyz)} - {len(time_us)}:
        raise DataError(f"{segment.name}: holds {min(counts)} poses for {len(time_us)} frames; {_AGAIN}")
    if (np.abs(np.linalg.norm(wxyz, axis=1) - 1) > _MAX_QUATERNION_ERROR).any():
        raise DataError(f"{segment.name}: {layout.ORIENTATIONS} holds quaternions that are not of length 1; {_AGAIN}")
    return _DevicePoses(time_us, position_m, velocity_mps, Rotation.from_quat(wxyz[:, [1, 2, 3, 0]]))


def _mount(device: _DevicePoses) -> MountLog:
    """Find pitch and yaw of the device in the car from where it moves, in its own frame.

    With device_R_calib = Rz(yaw) Ry(pitch) the car's axis lies at (cos yaw cos pitch, sin yaw cos pitch, -sin pitch).
    """
    speed_mps = np.linalg.norm(device.velocity_mps, axis=1)
    is_telling = (speed_mps > _FAST_MPS) & (np.abs(device.turn_radps[:, 2]) < _STRAIGHT_RADPS)
    is_calibrated = is_telling.sum() >= _MIN_TELLING_FRAMES
    pitch, yaw = 0.0, 0.0
    if is_calibrated:
        x, y, z = device.ecef_R_device[is_telling].inv().apply(device.velocity_mps[is_telling]).T
        pitch, yaw = np.median(-np.arctan2(z, np.hypot(x, y))), np.median(np.arctan2(y, x))
    height_m = np.array([layout.CAMERA_HEIGHT_M])
    return MountLog(device.time_us[:1], np.array([[0.0, pitch, yaw]]), height_m, np.array([is_calibrated]))


def _ego_motion(device: _DevicePoses, mount: MountLog) -> EgoMotion:
    device_R_rig, anchor_R_ecef = _device_R_rig(mount), _anchor_R_ecef(device.position_m[0])
    anchor_R_rig = anchor_R_ecef * device.ecef_R_device * device_R_rig
    velocity_mps = anchor_R_ecef.apply(device.velocity_mps)
    speed_mps = np.linalg.norm(velocity_mps, axis=1)
    yaw_rate_radps = device_R_rig.inv().apply(device.turn_radps)[:, 2]
    elapsed_s = (device.time_us - device.time_us[0]) / MICROSECONDS_PER_SECOND
    to_ground_m = anchor_R_rig.apply([0, 0, -layout.CAMERA_HEIGHT_M])
    return EgoMotion(
        timestamp_us=device.time_us,
        position_m=anchor_R_ecef.apply(device.position_m - device.position_m[0]) + to_ground_m,
        quaternion_xyzw=anchor_R_rig.as_quat(),
        velocity_mps=velocity_mps,
        acceleration_mps2=np.gradient(velocity_mps, elapsed_s, axis=0),
        curvature_per_m=np.where(speed_mps > _MOVES_MPS, yaw_rate_radps / np.maximum(speed_mps, _MOVES_MPS), 0),
    )


def _device_R_rig(mount: MountLog) -> Rotation:
    return Rotation.from_matrix(mount.device_R_calib(0)) * _CALIB_R_RIG


def _anchor_R_ecef(position_m: Float64Array) -> Rotation:
    """Return the rotation from ECEF to east, north, up; up is the normal of the ellipsoid through the position."""
    up = position_m / _SEMI_AXES_M**2
    up /= np.linalg.norm(up)
    east = np.cross([0.0, 0.0, 1.0], up)
    east /= np.linalg.norm(east)
    return Rotation.from_matrix(np.stack([east, np.cross(up, east), up]))


def _speed_log(segment: _Segment) -> SpeedLog:
    """Return the CAN speed at its own times, with the steering angle interpolated to them where both are known."""
    speed_us, speed_mps = segment.can_log(layout.SPEED_TIMES, layout.SPEEDS)
    steering_us, angle_deg = segment.can_log(layout.STEERING_TIMES, layout.STEERING_ANGLES)
    is_known = (speed_us >= steering_us[0]) & (speed_us <= steering_us[-1])
    if is_known.sum() < 2:
        raise DataError(f"{segment.name}: CAN speed and steering have no time in common; {_AGAIN}")
    time_us = speed_us[is_known]
    return SpeedLog(time_us, speed_mps[is_known], np.interp(time_us, steering_us, angle_deg))


def _is_wanted(cameras: tuple[str, ...] | None, *, is_there: bool) -> bool:
    if unknown := set(cameras or ()) - set(layout.CAMERAS):
        raise UsageError(f"no camera {sorted(unknown)[0]!r} in comma2k19; known: {', '.join(layout.CAMERAS)}")
    return is_there if cameras is None else layout.CAMERA in cameras


def _camera_stream(segment: _Segment, time_us: Int64Array, mount: MountLog) -> CameraStream:
    if layout.VIDEO_FILE not in segment.files:
        raise DataError(f"{segment.name}: has no {layout.VIDEO_FILE}, only poses and logs; {_AGAIN}")
    path = segment.files[layout.VIDEO_FILE]
    location = located(path)
    info = video.probe(location, str(path))
    if info.num_frames != len(time_us):
        raise DataError(f"{path}: holds {info.num_frames} frames for {len(time_us)} frame times; {_AGAIN}")
    model = _camera_model(info, str(path))
    pose = Pose((_CAMERA_R_DEVICE * _device_R_rig(mount)).inv(), np.array([0, 0, layout.CAMERA_HEIGHT_M]))
    return CameraStream(layout.CAMERA, (location,), time_us, Calibration(model, pose))


def _camera_model(info: video.VideoInfo, name: str) -> Pinhole:
    full = layout.INTRINSICS
    if abs(info.width_px / info.height_px * full.height_px / full.width_px - 1) > _MAX_ASPECT_ERROR:
        raise DataError(
            f"{name}: is {info.width_px}x{info.height_px}; expected {full.width_px}x{full.height_px} or the same "
            "picture at another size, for a cut picture is of another camera: use the original video"
        )
    return full.resized(info.width_px, info.height_px)


def _microseconds(time_s: Float64Array) -> Int64Array:
    return np.round(time_s * MICROSECONDS_PER_SECOND).astype(np.int64)
