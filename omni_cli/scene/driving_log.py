"""What a driving device logs beside its videos: how it is mounted, how the car turns, what its own model saw.

Frames: *device* (x forward, y right, z down, fixed to the camera) and *calib*, the same axes turned level and along the
car's travel, with its origin in the camera. Paths and lanes of driving models live in calib.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from omni_cli.scene.clock import Float64Array, Int64Array

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MountLog:
    """How the device sits in the car, as far as it knew at each instant."""

    timestamp_us: Int64Array  # (n,) strictly increasing
    rpy_rad: Float64Array  # (n, 3) roll, pitch, yaw
    height_m: Float64Array  # (n,) of the camera above the road
    is_calibrated: BoolArray  # (n,)

    @property
    def settled_row(self) -> int:
        """The last row that the device takes for calibrated, or the last of all."""
        calibrated = np.flatnonzero(self.is_calibrated)
        return int(calibrated[-1]) if len(calibrated) else len(self.timestamp_us) - 1

    def device_R_calib(self, row: int) -> Float64Array:
        """Return Rz(yaw) Ry(pitch) Rx(roll), (3, 3); source: openpilot `common/transformations/orientation.py`."""
        return np.asarray(Rotation.from_euler("xyz", self.rpy_rad[row]).as_matrix())


@dataclass(frozen=True)
class YawRateLog:
    """How fast the car turns; left is positive."""

    timestamp_us: Int64Array  # (n,) strictly increasing
    yaw_rate_radps: Float64Array  # (n,)


@dataclass(frozen=True)
class DesireLog:
    """What the driver wanted at each instant: an index of openpilot's `Desire`, 0 is nothing."""

    timestamp_us: Int64Array  # (n,) strictly increasing
    desire: Int64Array  # (n,) 0..7


@dataclass(frozen=True)
class FixLog:
    """Whether the satellite receiver had a fix."""

    timestamp_us: Int64Array  # (n,) strictly increasing
    has_fix: BoolArray  # (n,)


@dataclass(frozen=True)
class LoggedModel:
    """What the device's own driving model said about some of its frames, in calib: x forward, y right, z down."""

    timestamp_us: Int64Array  # (n,) true time of the road camera's frame, strictly increasing
    path_m: Float32Array  # (n, 33, 3) at the path's 33 times, its first point behind the camera
    lane_lines_m: Float32Array  # (n, 4, 33, 2) y and z at 33 distances: outer left, left, right, outer right
    lane_line_prob: Float32Array  # (n, 4)
    road_edges_m: Float32Array  # (n, 2, 33, 2) y and z: left, right
    lead: Float32Array  # (n, 3, 4) x, y, v, a of the first point of the lead at 0, 2 and 4 s
    lead_prob: Float32Array  # (n, 3)


@dataclass(frozen=True)
class DeviceLog:
    """All of it; a part is None where the device did not log it."""

    mount: MountLog | None = None
    yaw_rate: YawRateLog | None = None
    desire: DesireLog | None = None
    fix: FixLog | None = None
    model: LoggedModel | None = None
    is_right_hand_drive: bool = False  # the driver sits on the right: left-hand traffic
