"""What a plan looks like over the road: polylines in a camera's own pixels, and one line of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from omni_cli.formats.driving_model import T_IDXS_S, X_IDXS_M
from omni_cli.recipe import Stroke
from omni_cli.samples.model_views import camera_R_calib_at, known_calibration, mount_rows
from omni_cli.scene.clock import Float64Array
from omni_cli.scene.model_frame import project_calib_points
from omni_cli.scene.recording import Recording

_PLAN, _TRUTH, _LANE, _EDGE, _LEAD = (250, 210, 60), (90, 220, 90), (240, 240, 240), (230, 80, 60), (90, 170, 255)
_BENEATH_PX = 7  # the truth shows on both sides of a plan that lies on it
_IS_THERE = 0.5
_NEAREST_M = 2.0  # of a path: what is nearer lies under the bonnet
_LEAD_WIDTH_M, _LEAD_HEIGHT_M = 1.8, 1.5
_CAPTION_S = 2.0
_DECIMALS = 3


def strokes(recording: Recording, camera: str, values: Mapping[str, Any], at: int, at_us: int) -> Sequence[Stroke]:
    """Return lines of the step that ends at instant `at` of a window, over the picture of a camera at `at_us`.

    Args:
        recording: with the camera's calibration and mount.
        camera: whose picture is drawn over.
        values: of a prediction, or of the truth.
        at: number of the instant in its window; the first ends no step.
        at_us: true time of the picture.
    """
    stream = recording.cameras[camera]
    calibration, camera_R_calib = known_calibration(recording, stream), camera_R_calib_at(recording, stream, at_us)
    size_px = (calibration.model.width_px, calibration.model.height_px)
    lines = []
    for points_m, colour, width_px in _lines(values, at - 1, _height_m(recording, camera, at_us)):
        pixels, is_inside = project_calib_points(
            points_m[np.isfinite(points_m).all(axis=1)], calibration.model, camera_R_calib
        )
        if is_inside.sum() > 1:
            lines.append(Stroke(pixels[is_inside], size_px, colour, width_px))
    return lines


def caption(values: Mapping[str, Any] | None, at: int) -> str:
    """Return where the car is in two seconds, by the step that ends at instant `at` (the last where negative)."""
    if values is None:
        return "no plan"
    ahead_m, right_m = (np.interp(_CAPTION_S, T_IDXS_S, values["xy_m"][at - (at > 0), :, axis]) for axis in (0, 1))
    if not np.isfinite(ahead_m + right_m):
        return "unknown: the log ends before"
    return f"in {_CAPTION_S:g} s {ahead_m:.1f} m ahead, {abs(right_m):.1f} m {'right' if right_m > 0 else 'left'}"


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays as lists, rounded to a millimetre; NaN is None."""
    arrays = {name: np.asarray(value) for name, value in values.items() if name != "is_truth"}
    return {name: _listed(array.astype(float)) for name, array in arrays.items()}


def _listed(array: Float64Array) -> Any:
    rounded = np.round(array, _DECIMALS).astype(object)
    rounded[~np.isfinite(array)] = None
    return rounded.tolist()


def _lines(
    values: Mapping[str, Any], step: int, height_m: float
) -> Iterator[tuple[Float64Array, tuple[int, int, int], int]]:
    """Yield polylines (n, 3) in calib, their colour and width; a path lies on the road, `height_m` below the camera."""
    for name, colour in (("road_edges_m", _EDGE), ("lane_lines_m", _LANE)):
        for number, line in enumerate(values[name][step] if name in values else ()):
            if name == "road_edges_m" or values["lane_line_prob"][step, number] > _IS_THERE:
                yield np.column_stack([X_IDXS_M, line]), colour, 1
    xy_m = values["xy_m"][step]
    is_ahead = ~(xy_m[:, 0] < _NEAREST_M)
    path = np.column_stack([xy_m, np.full(len(xy_m), height_m)])[is_ahead]
    yield (path, _TRUTH, _BENEATH_PX) if "is_truth" in values else (path, _PLAN, 3)
    if "lead" in values and values["lead_prob"][step, 0] > _IS_THERE:
        x_m, y_m = values["lead"][step, 0, :2]
        yield _box(x_m, y_m, height_m), _LEAD, 2


def _box(x_m: float, y_m: float, height_m: float) -> Float64Array:
    """Return the back of a car as a closed line."""
    left, right, top = y_m - _LEAD_WIDTH_M / 2, y_m + _LEAD_WIDTH_M / 2, height_m - _LEAD_HEIGHT_M
    corners = ((left, height_m), (left, top), (right, top), (right, height_m), (left, height_m))
    return np.array([(x_m, *corner) for corner in corners])


def _height_m(recording: Recording, camera: str, at_us: int) -> float:
    """Return how high a camera is above the road."""
    mount = recording.device.mount if recording.device else None
    if mount is not None:
        return float(mount.height_m[mount_rows(mount, np.array([at_us]))[0]])
    return float(known_calibration(recording, recording.cameras[camera]).rig_T_camera.translation_m[2])
