"""The two camera rigs of the synthetic car: where seven f-theta cameras sit and how they see.

The rigs differ as the ones of the real dataset do: the front wide camera's principal point lies at row 543 or 755 of
1080, and mounts, angles and focal lengths differ. Every clip's car is a little off its drawing, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.polynomial import polyval
from scipy.spatial.transform import Rotation

from omni_cli.formats.physical_ai_av import CAMERAS
from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.clock import Float64Array
from omni_cli.scene.poses import Pose

FULL_WIDTH_PX, FULL_HEIGHT_PX = 1920, 1080
RIGS = ("a", "b")
# x forward, y left, z up -> x right, y down, z forward
_RIG_R_LEVEL_CAMERA = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
_MARGIN = 1.02  # the polynomials hold this far beyond the corners
_ANGLE_JITTER_DEG, _PLACE_JITTER_M = 0.4, 0.01


@dataclass(frozen=True)
class Mount:
    """A camera's place in the rig frame and its optical centre in the full-size image."""

    place_m: tuple[float, float, float]
    yaw_deg: float  # left positive
    pitch_deg: float  # down positive
    cy_px: float


@dataclass(frozen=True)
class Vehicle:
    """Sizes in metres, in the order and under the names of vehicle_dimensions."""

    length: float
    width: float
    height: float
    rear_axle_to_bbox_center: float
    wheelbase: float
    track_width: float


VEHICLES: Mapping[str, Vehicle] = {
    "a": Vehicle(4.872, 2.121, 1.473, 1.327, 2.85, 1.5785),
    "b": Vehicle(5.255, 2.13, 1.494, 1.4345, 3.165, 1.6305),
}
_MOUNTS: Mapping[str, Mapping[str, Mount]] = {
    "a": {
        "camera_cross_left_120fov": Mount((2.36, 0.93, 0.96), 62, 3, 540),
        "camera_cross_right_120fov": Mount((2.36, -0.93, 0.96), -62, 3, 548),
        "camera_front_tele_30fov": Mount((1.72, 0.06, 1.43), 0, 2, 541),
        "camera_front_wide_120fov": Mount((1.76, 0.0, 1.42), 0, 1.5, 543),
        "camera_rear_left_70fov": Mount((2.29, 0.96, 0.94), 150, 4, 537),
        "camera_rear_right_70fov": Mount((2.29, -0.96, 0.94), -150, 4, 544),
        "camera_rear_tele_30fov": Mount((-0.42, 0.0, 1.21), 180, 3, 539),
    },
    "b": {
        "camera_cross_left_120fov": Mount((2.61, 0.95, 1.02), 57, 5, 561),
        "camera_cross_right_120fov": Mount((2.61, -0.95, 1.02), -57, 5, 556),
        "camera_front_tele_30fov": Mount((1.91, -0.05, 1.36), 0, 2.5, 552),
        "camera_front_wide_120fov": Mount((1.95, 0.02, 1.37), 0, 10.0, 755),
        "camera_rear_left_70fov": Mount((2.54, 0.98, 1.0), 146, 5, 528),
        "camera_rear_right_70fov": Mount((2.54, -0.98, 1.0), -146, 5, 531),
        "camera_rear_tele_30fov": Mount((-0.51, 0.0, 1.28), 180, 3.5, 547),
    },
}
_BEND = {"a": (0.004, -0.028, 0.003), "b": (0.002, -0.019, 0.001)}  # how r / f departs from theta: theta^2, ^3, ^4


def field_of_view_deg(camera: str) -> float:
    """Return the horizontal field of view that a camera's name states."""
    return float(camera.rpartition("_")[2].removesuffix("fov"))


def random_rig(
    rng: np.random.Generator, rig: str, *, width_px: int, height_px: int, cameras: tuple[str, ...] = CAMERAS
) -> dict[str, Calibration]:
    """Return the calibration of each camera of one car; a camera's does not depend on which others are asked for."""
    jitter = {camera: rng.uniform(-1, 1, 6) for camera in CAMERAS}
    return {camera: _calibration(rig, camera, jitter[camera], width_px, height_px) for camera in cameras}


def _calibration(rig: str, camera: str, jitter: Float64Array, width_px: int, height_px: int) -> Calibration:
    mount = _MOUNTS[rig][camera]
    yaw, pitch, roll = np.array([mount.yaw_deg, mount.pitch_deg, 0.0]) + jitter[:3] * _ANGLE_JITTER_DEG
    rotation = Rotation.from_euler("ZYX", [yaw, pitch, roll], degrees=True) * _RIG_R_LEVEL_CAMERA
    place = np.array(mount.place_m) + jitter[3:] * _PLACE_JITTER_M
    full = _full_size_model(rig, camera, cx_px=959.5 + 6 * float(jitter[3]), cy_px=mount.cy_px)
    return Calibration(full.resized(width_px, height_px), Pose(rotation, place))


def _full_size_model(rig: str, camera: str, *, cx_px: float, cy_px: float) -> FTheta:
    half = np.radians(field_of_view_deg(camera) / 2)
    shape = np.array([0.0, 1.0, *_BEND[rig]])
    forward = shape * (FULL_WIDTH_PX / 2) / polyval(half, shape)
    corner_px = np.hypot(max(cx_px, FULL_WIDTH_PX - cx_px), max(cy_px, FULL_HEIGHT_PX - cy_px))
    backward, max_angle = _inverse(forward, corner_px)
    return FTheta(FULL_WIDTH_PX, FULL_HEIGHT_PX, cx_px, cy_px, tuple(forward), backward, max_angle)


def _inverse(forward: Float64Array, corner_px: float) -> tuple[tuple[float, ...], float]:
    """Fit theta = bw(r), and return it with the angle at the farthest corner."""
    angles = np.linspace(0, 2.2, 20_001)
    radii = polyval(angles, forward)
    max_angle = float(np.interp(corner_px * _MARGIN, radii, angles))
    theta = angles[angles <= max_angle][1:]
    radius = polyval(theta, forward) / corner_px  # scaled, so that the powers stay near one
    powers = np.stack([radius**i for i in range(1, 5)], axis=1)
    fitted = np.linalg.lstsq(powers, theta, rcond=None)[0]
    return (0.0, *(float(c) / corner_px**i for i, c in enumerate(fitted, start=1))), max_angle
