"""The views of a driving model, warped from a camera's frames with the mount that was known at each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omni_cli.errors import DataError
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.camera_frames import CameraFrames, camera_frames
from omni_cli.samples.model_frames import Sampling, Warp
from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import Float64Array, Int64Array, latest_at
from omni_cli.scene.driving_log import MountLog
from omni_cli.scene.model_frame import ModelView, camera_R_calib
from omni_cli.scene.recording import CameraStream, Recording

# A warp takes longer to make than to use. A device refines its mount many times a minute; less than this moves no
# pixel of the narrow view by a tenth.
_SAME_MOUNT_RAD = 1e-4


@dataclass(frozen=True)
class WarpedCamera:
    """A calibrated camera, ready to be decoded into what a model sees."""

    seen: CameraFrames
    calibration: Calibration
    mount: MountLog | None

    @property
    def timestamp_us(self) -> Int64Array:
        """True time of each of its frames."""
        return self.seen.stream.timestamp_us

    def frames(
        self,
        frames: Int64Array,
        views: Sequence[ModelView],
        sampling: Sampling,
        only: Int64Array | None = None,
    ) -> Iterator[tuple[int, list[Uint8Array]]]:
        """Yield (frame, one picture (6, 128, 256) a view), ascending.

        Args:
            frames: indices in its video, ascending and unique; over them it is decided where the mount has changed.
            views: what is to be seen in each frame.
            sampling: how pixels are taken.
            only: those of the frames that are decoded; all of them unless given.

        Raises:
            DataError: a video is damaged.
        """
        mounts = dict(zip(frames.tolist(), self._mounts(frames), strict=True))
        wanted = (frames if only is None else only).tolist()
        warps, warps_for = list[Warp](), -1
        for frame, planes in self.seen.decode_yuv(wanted):
            if (row := mounts[frame]) != warps_for or not warps:
                warps, warps_for = [self._warp(view, row, sampling) for view in views], row
            yield frame, [warp.pack(*planes) for warp in warps]

    def _mounts(self, frames: Int64Array) -> list[int]:
        rows = None if self.mount is None else mount_rows(self.mount, self.timestamp_us[frames])
        return _settled(rows, self.mount, len(frames))

    def _warp(self, view: ModelView, row: int, sampling: Sampling) -> Warp:
        R = camera_R_calib(self.calibration, None if self.mount is None else self.mount.device_R_calib(row))
        return Warp.of(view, self.calibration.model, R, sampling)


def warped_camera(recording: Recording, camera: str) -> WarpedCamera:
    """Open a camera of a recording, with the mount where a device logs it.

    Raises:
        DataError: the camera is not calibrated, its video is damaged or of another size.
    """
    stream = recording.cameras[camera]
    name, calibration = f"{recording.id} {camera}", known_calibration(recording, stream)
    seen = camera_frames(name, stream)
    size, expected = seen.size_px, (calibration.model.width_px, calibration.model.height_px)
    if size != expected:
        raise DataError(f"{name}: its pictures are {size[0]}x{size[1]} px, its calibration is for {expected[0]}x"
                        f"{expected[1]} px; fetch both again")  # fmt: skip
    return WarpedCamera(seen, calibration, recording.device.mount if recording.device else None)


def known_calibration(recording: Recording, stream: CameraStream) -> Calibration:
    """Return a camera's calibration.

    Raises:
        DataError: there is none, or the device never logged its mount.
    """
    if stream.calibration is None:
        told = recording.provenance.get(f"calibration_{stream.name}", "a plain video has none")
        raise DataError(
            f"{recording.id}: {stream.name} has no calibration, which a driving model's view is warped with; {told}: "
            "name a recording of a calibrated source, or fetch its log again"
        )
    if recording.device is not None and recording.device.mount is None:
        raise DataError(
            f"{recording.id}: its log holds no liveCalibration, so its mount is unknown; fetch the log again"
        )
    return stream.calibration


def mount_rows(mount: MountLog, at_us: Int64Array) -> Int64Array:
    """Return the row of the mount known at each instant (n,); before the first, the first.

    A device starts with what it learned on earlier drives and logs it within its first second.
    """
    return np.asarray(np.maximum(latest_at(mount.timestamp_us, at_us), 0))


def camera_R_calib_at(recording: Recording, stream: CameraStream, at_us: int) -> Float64Array:
    """Return the rotation (3, 3) from calib to a camera at an instant."""
    mount = recording.device.mount if recording.device else None
    row = None if mount is None else int(mount_rows(mount, np.array([at_us]))[0])
    device_R_calib = None if mount is None or row is None else mount.device_R_calib(row)
    return camera_R_calib(known_calibration(recording, stream), device_R_calib)


def _settled(rows: Int64Array | None, mount: MountLog | None, count: int) -> list[int]:
    """Return for each frame the mount's row to warp with: the last one that differs from the one before it."""
    if rows is None or mount is None:
        return [0] * count
    settled, current = [], int(rows[0]) if count else 0
    for row in rows.tolist():
        if np.abs(mount.rpy_rad[row] - mount.rpy_rad[current]).max() > _SAME_MOUNT_RAD:
            current = row
        settled.append(current)
    return settled
