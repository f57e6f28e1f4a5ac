"""Where a path on the road lies in a picture that was taken a little before or after the path began."""

import numpy as np

from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import Float64Array
from omni_cli.scene.poses import EgoMotion, Pose

_FINE_STEPS = 8  # of each step of a path: near the car a step is long in the picture, and an f-theta lens bends it


def path_pixels(
    calibration: Calibration, ego: EgoMotion | None, xyz_m: Float64Array, taken_us: int, begins_us: int
) -> tuple[Float64Array, np.ndarray]:
    """Return the pixels (n, 2) of points of a path, and which of them (n,) lie in the image.

    Between the picture and the instant of the path the car has moved; where its poses at both are known, that is taken
    into account.

    Args:
        calibration: of the camera.
        ego: poses of the car.
        xyz_m: (n, 3) points in the rig frame at the instant of the path.
        taken_us: true time of the picture.
        begins_us: instant of the path.
    """
    points_m = xyz_m
    if ego is not None and ego.covers(min(taken_us, begins_us), max(taken_us, begins_us)):
        taken, begins = (_pose(ego, at_us) for at_us in (taken_us, begins_us))
        points_m = (taken.inverse() @ begins).apply(xyz_m)
    return calibration.model.project(calibration.rig_T_camera.inverse().apply(points_m))


def path_runs(
    calibration: Calibration, ego: EgoMotion | None, xyz_m: Float64Array, taken_us: int, begins_us: int
) -> list[Float64Array]:
    """Return the parts of a path that the image holds, each a line of two pixels (n, 2) or more; as above."""
    pixels, is_inside = path_pixels(calibration, ego, _finer(xyz_m), taken_us, begins_us)
    cuts = np.flatnonzero(np.diff(is_inside)) + 1
    parts = zip(np.split(pixels, cuts), np.split(is_inside, cuts), strict=True)
    return [part for part, inside in parts if inside[0] and len(part) > 1]


def _pose(ego: EgoMotion, at_us: int) -> Pose:
    pose = ego.at(np.array([at_us])).anchor_T_rig
    return Pose(pose.rotation[0], pose.translation_m[0])


def _finer(xyz_m: Float64Array) -> Float64Array:
    """Return a path with points between its own; it begins at the rig."""
    path_m = np.vstack([np.zeros((1, 3)), xyz_m])
    at, fine = np.arange(len(path_m)), np.linspace(0, len(path_m) - 1, (len(path_m) - 1) * _FINE_STEPS + 1)
    return np.stack([np.interp(fine, at, axis) for axis in path_m.T], axis=1)
