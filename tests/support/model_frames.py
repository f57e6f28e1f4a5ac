"""openpilot's warp written down once more, from its matrices alone."""

import numpy as np
from scipy.ndimage import map_coordinates

from omni_cli.scene.cameras import Pinhole
from omni_cli.scene.model_frame import ModelView

QCAMERA = Pinhole(526, 330, 2648.0 * 526 / 1928, 2648.0 * 330 / 1208, 263.0, 165.0)
V = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])


def rotation(rpy_rad) -> np.ndarray:
    """Rz(yaw) Ry(pitch) Rx(roll)."""
    (sr, sp, sy), (cr, cp, cy) = np.sin(rpy_rad), np.cos(rpy_rad)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def k_matrix(camera: Pinhole) -> np.ndarray:
    return np.array([[camera.fx_px, 0, camera.cx_px], [0, camera.fy_px, camera.cy_px], [0, 0, 1]])


def openpilot_matrix(view: ModelView, camera: Pinhole, rpy_rad) -> np.ndarray:
    """The matrix that maps pixels of the model frame to pixels of the camera."""
    return k_matrix(camera) @ V @ rotation(rpy_rad) @ np.linalg.inv(k_matrix(view.intrinsics) @ V)


def mapped(matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    """Where the matrix puts each pixel of a picture, (height, width, 2)."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    points = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ matrix.T
    return points[..., :2] / points[..., 2:]


def resampled(plane: np.ndarray, pixels: np.ndarray, sampling: str) -> np.ndarray:
    """By scipy; bilinear in steps of 1/32 pixel, halves rounded up, as integer arithmetic with a half added does."""
    u, v = np.moveaxis(pixels, -1, 0)
    if sampling == "nearest":
        return map_coordinates(plane, [np.rint(v), np.rint(u)], order=0, mode="nearest")
    steps = [np.rint(v * 32) / 32, np.rint(u * 32) / 32]
    return np.floor(map_coordinates(plane.astype(np.float64), steps, order=1, mode="nearest") + 0.5).astype(np.uint8)
