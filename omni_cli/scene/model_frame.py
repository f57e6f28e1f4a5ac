"""Where the pixels of openpilot's model frames lie in the frame of a calibrated camera.

openpilot shows its driving model not what the camera saw but what a virtual pinhole camera would see that stands in the
same place and looks level along the car's travel: the axes of *calib* (x forward, y right, z down). Two such views,
`img` (narrow) and `big_img` (wide), of 512 x 256 pixels. A virtual camera's ray turned into the real camera and
projected gives the pixel to sample. Where the real camera is a pinhole, that is openpilot's matrix
M = K_camera V device_R_calib inv(K_view V), with V = `VIEW_FROM_DEVICE`.

Pixels: integer coordinates are the centres of pixels on both sides, as in openpilot's kernels, which apply M to the
model pixel's indices and take the result for indices of the frame; K is used as it is given, with no half pixel added.

Sources, all in commaai/openpilot: `common/transformations/{model,camera,orientation}.py`;
`selfdrive/modeld/compile_modeld.py` (2026); `common/mat.h` and `selfdrive/modeld/transforms/transform.cl` (until then).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from omni_cli.scene.cameras import Calibration, CameraModel, FTheta, Pinhole
from omni_cli.scene.clock import Float64Array

VIEW_FROM_DEVICE = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # right, down, forward
_RIG_R_CALIB = np.diag([1.0, -1.0, -1.0])  # x forward; y left to right; z up to down
_LEAST_DEPTH = 1e-3  # of a unit ray that a pinhole projects: a thousand focal lengths beside the axis, in no image
_ON_AXIS = 1e-9


@dataclass(frozen=True)
class ModelView:
    """A virtual camera of openpilot's driving models; its axes are those of calib."""

    name: str  # of the models' input
    intrinsics: Pinhole


IMG = ModelView("img", Pinhole(512, 256, 910.0, 910.0, 256.0, 47.6))  # medmodel
BIG_IMG = ModelView("big_img", Pinhole(512, 256, 455.0, 455.0, 256.0, 0.5 * (256.0 + 47.6)))  # sbigmodel
MODEL_VIEWS = (IMG, BIG_IMG)


def camera_R_calib(calibration: Calibration, device_R_calib: Float64Array | None) -> Float64Array:
    """Return the rotation (3, 3) from calib to the camera frame (x right, y down, z forward).

    Args:
        calibration: where the camera sits on the rig; not looked at where the device knows its own mount.
        device_R_calib: (3, 3) of a device whose axes are its camera's; None: the rig's axes are the car's.
    """
    if device_R_calib is not None:
        return np.asarray(VIEW_FROM_DEVICE @ device_R_calib)
    return np.asarray(calibration.rig_T_camera.rotation.inv().as_matrix() @ _RIG_R_CALIB)


def sampling_map(view: ModelView, camera: CameraModel, camera_R_calib: Float64Array) -> Float64Array:
    """Return the pixel (u, v) of the camera's frame that each pixel of a view shows: (256, 512, 2).

    A pixel may lie outside the frame: a sampler takes the nearest edge pixel for it, each coordinate by itself, as
    openpilot does. A ray that the camera cannot project at all (behind a pinhole, beyond an f-theta's maximal angle)
    is first turned towards the axis to the widest angle that it can; openpilot's matrix would mirror it.
    """
    return _source_pixels(view, camera, camera_R_calib, step_px=1, shift_px=0.0)


def chroma_sampling_map(
    view: ModelView, camera: CameraModel, camera_R_calib: Float64Array, *, centred: bool
) -> Float64Array:
    """Return the same for the half-size U and V planes: pixels of the camera's own half-size planes, (128, 256, 2).

    Args:
        view: what the model sees.
        camera: model of the full-size frame.
        camera_R_calib: (3, 3) rotation.
        centred: chroma pixel k lies between luma pixels 2k and 2k + 1 (`transform_scale_buffer`, until 2026), or else
            on luma pixel 2k (`compile_modeld.py`: M * [[1, 1, .5], [1, 1, .5], [2, 2, 1]]).
    """
    shift_px = 0.5 if centred else 0.0
    return (_source_pixels(view, camera, camera_R_calib, step_px=2, shift_px=shift_px) - shift_px) / 2


def project_calib_points(
    points_calib_m: Float64Array, camera: CameraModel, camera_R_calib: Float64Array
) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
    """Return the pixels (n, 2) of points (n, 3) in calib, and which of them lie in the image: for overlays.

    On a model frame itself the camera is `view.intrinsics`, its rotation `VIEW_FROM_DEVICE`.
    """
    return camera.project(points_calib_m @ camera_R_calib.T)


def _source_pixels(
    view: ModelView, camera: CameraModel, camera_R_calib: Float64Array, step_px: int, shift_px: float
) -> Float64Array:
    """Map the view's pixels 0, step, 2 step ..., all shifted, to pixels of the camera: (height, width, 2)."""
    camera_R_view = camera_R_calib @ VIEW_FROM_DEVICE.T
    pixels, _ = camera.project(_projectable(_view_rays(view, step_px, shift_px) @ camera_R_view.T, camera))
    return pixels.reshape(view.intrinsics.height_px // step_px, view.intrinsics.width_px // step_px, 2)


@cache
def _view_rays(view: ModelView, step_px: int, shift_px: float) -> Float64Array:
    """Return the unit ray of each of these pixels in the view's own frame, (n, 3): the same under every mount."""
    x = np.arange(0, view.intrinsics.width_px, step_px) + shift_px
    y = np.arange(0, view.intrinsics.height_px, step_px) + shift_px
    return view.intrinsics.rays(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))


def _projectable(rays: Float64Array, camera: CameraModel) -> Float64Array:
    """Turn the unit rays (n, 3) that a camera cannot project towards its axis, to the widest angle that it can."""
    least_depth = np.cos(camera.max_angle_rad) if isinstance(camera, FTheta) else _LEAST_DEPTH
    beyond = rays[:, 2] < least_depth
    if not beyond.any():
        return rays
    turned = np.array(rays)
    across = np.hypot(*rays[beyond, :2].T)
    turned[beyond, :2] *= np.sqrt(1 - least_depth**2) / np.maximum(across, _ON_AXIS)[:, None]
    turned[beyond, 2] = least_depth
    return turned
