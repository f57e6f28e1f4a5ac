"""Camera models: from a point in the camera frame (x right, y down, z forward) to a pixel and back.

Pixel coordinates follow the centre convention: (0, 0) is the centre of the first pixel.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from omni_cli.scene.clock import Float64Array
from omni_cli.scene.poses import Pose

ExactPoly = Literal["both", "forward", "backward"]  # which polynomial of an f-theta camera is its definition
_ON_AXIS_M = 1e-9
_NEWTON_STEPS = 3  # from a fitted inverse, wrong by a pixel at most, each step squares the error


class CameraModel(Protocol):
    """What every camera model can do."""

    @property
    def width_px(self) -> int:
        """Width of the image."""

    @property
    def height_px(self) -> int:
        """Height of the image."""

    def project(self, points_m: Float64Array) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
        """Map points (n, 3) in the camera frame to pixels (n, 2), and say which of them lie in the image."""

    def rays(self, pixels_px: Float64Array) -> Float64Array:
        """Map pixels (n, 2) to unit directions (n, 3) in the camera frame."""

    def resized(self, width_px: int, height_px: int) -> "CameraModel":
        """Return the model of the same camera after its image was resized."""


@dataclass(frozen=True)
class Pinhole:
    """A pinhole camera without distortion."""

    width_px: int
    height_px: int
    fx_px: float
    fy_px: float
    cx_px: float
    cy_px: float

    def project(self, points_m: Float64Array) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
        """Map points to pixels; a point at or behind the camera plane is not in the image."""
        depth = points_m[:, 2]
        ahead = depth > _ON_AXIS_M
        safe = np.where(ahead, depth, 1.0)
        x = points_m[:, 0] / safe * self.fx_px + self.cx_px  # each by itself: numpy is slow along an axis of two
        y = points_m[:, 1] / safe * self.fy_px + self.cy_px
        pixels = np.stack([x, y], axis=1)
        return pixels, ahead & _inside(pixels, self.width_px, self.height_px)

    def rays(self, pixels_px: Float64Array) -> Float64Array:
        """Map pixels to unit directions."""
        xy = (pixels_px - np.array([self.cx_px, self.cy_px])) / np.array([self.fx_px, self.fy_px])
        rays = np.concatenate([xy, np.ones((len(xy), 1))], axis=1)
        return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))

    def resized(self, width_px: int, height_px: int) -> "Pinhole":
        """Scale the image: u' = (u + 0.5) s - 0.5."""
        sx, sy = width_px / self.width_px, height_px / self.height_px
        cx, cy = (self.cx_px + 0.5) * sx - 0.5, (self.cy_px + 0.5) * sy - 0.5
        return Pinhole(width_px, height_px, self.fx_px * sx, self.fy_px * sy, cx, cy)


@dataclass(frozen=True)
class FTheta:
    """NVIDIA's f-theta fisheye: the distance from the principal point is a polynomial of the angle to the axis.

    Source: `physical_ai_av` devkit and NVIDIA/ncore. theta = atan2(hypot(x, y), z) in rad, so that the axis and points
    behind the camera are well defined; beyond `max_angle_rad` the polynomials diverge and nothing is projected.
    With r = forward(theta) in the direction (x, y) / rho the pixel is A (r x / rho, r y / rho) + (cx, cy), where
    A = [[c, d], [e, 1]] is the linear term.
    """

    width_px: int
    height_px: int
    cx_px: float
    cy_px: float
    forward_poly: tuple[float, ...]  # px = sum(c_i theta^i)
    backward_poly: tuple[float, ...]  # theta = sum(c_i px^i)
    max_angle_rad: float
    linear_cde: tuple[float, float, float] = (1.0, 0.0, 0.0)
    exact: ExactPoly = "both"  # the other is a start for Newton's method, which inverts this one

    def project(self, points_m: Float64Array) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
        """Map points to pixels; outside the maximal angle a point is not in the image."""
        across = np.hypot(points_m[:, 0], points_m[:, 1])
        theta = np.arctan2(across, points_m[:, 2])
        radius = _evaluated(self.forward_poly, theta)
        if self.exact == "backward":
            reached = np.minimum(theta, self.max_angle_rad)  # beyond, Newton's method may run away
            radius = _inverted(self.backward_poly, reached, _evaluated(self.forward_poly, reached))
        direction = points_m[:, :2] / np.maximum(across, _ON_AXIS_M)[:, None]
        pixels = (direction * radius[:, None]) @ self._linear.T + np.array([self.cx_px, self.cy_px])
        return pixels, (theta <= self.max_angle_rad) & _inside(pixels, self.width_px, self.height_px)

    def rays(self, pixels_px: Float64Array) -> Float64Array:
        """Map pixels to unit directions."""
        offset = (pixels_px - np.array([self.cx_px, self.cy_px])) @ np.linalg.inv(self._linear).T
        radius = np.linalg.norm(offset, axis=1)
        theta = _evaluated(self.backward_poly, radius)
        if self.exact == "forward":
            theta = _inverted(self.forward_poly, radius, theta)
        direction = offset / np.maximum(radius, _ON_AXIS_M)[:, None]
        return np.concatenate([direction * np.sin(theta)[:, None], np.cos(theta)[:, None]], axis=1)

    def resized(self, width_px: int, height_px: int) -> "FTheta":
        """Scale the image by one factor.

        Raises:
            ValueError: width and height ask for different scales, which an f-theta camera cannot express.
        """
        scale = width_px / self.width_px
        if abs(self.height_px * scale - height_px) > 1:
            raise ValueError(f"an f-theta image of {self.width_px}x{self.height_px} keeps its aspect; "
                             f"{width_px}x{height_px} does not")  # fmt: skip
        return replace(
            self,
            width_px=width_px,
            height_px=height_px,
            cx_px=(self.cx_px + 0.5) * scale - 0.5,
            cy_px=(self.cy_px + 0.5) * scale - 0.5,
            forward_poly=tuple(c * scale for c in self.forward_poly),
            backward_poly=tuple(c / scale**i for i, c in enumerate(self.backward_poly)),
        )

    @property
    def _linear(self) -> Float64Array:
        c, d, e = self.linear_cde
        return np.array([[c, d], [e, 1.0]])


@dataclass(frozen=True)
class Calibration:
    """Where a camera sits on the rig and how it maps rays to pixels."""

    model: CameraModel
    rig_T_camera: Pose


def _inside(pixels_px: Float64Array, width_px: int, height_px: int) -> npt.NDArray[np.bool_]:
    x, y = pixels_px[:, 0], pixels_px[:, 1]
    return (x >= -0.5) & (x < width_px - 0.5) & (y >= -0.5) & (y < height_px - 0.5)


def _evaluated(poly: tuple[float, ...], at: Float64Array) -> Float64Array:
    return np.asarray(np.polynomial.polynomial.polyval(at, poly))


def _inverted(poly: tuple[float, ...], values: Float64Array, start: Float64Array) -> Float64Array:
    """Return x with poly(x) = values by Newton's method; `start` is near it."""
    slope, found = tuple(np.polynomial.polynomial.polyder(poly)), start
    for _ in range(_NEWTON_STEPS):
        found = found - (_evaluated(poly, found) - values) / _evaluated(slope, found)
    return found
