"""The cameras of `camera_intrinsics.offline`: one JSON text a camera, made with more care than the table beside it.

Source: NVIDIA/ncore, `data/types.py` and `tools/data_converter/pai`. Its principal points follow the convention of this
package already (an integer is the centre of a pixel); ncore adds the half pixel for its own.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from omni_cli.errors import DataError
from omni_cli.scene.cameras import ExactPoly, FTheta

_EXACT: Mapping[str, ExactPoly] = {"ANGLE_TO_PIXELDIST": "forward", "PIXELDIST_TO_ANGLE": "backward"}
_MAX_CHARACTERS = 100_000
_MAX_COEFFICIENTS = 6
_LEAST_AREA = 1e-6  # of the picture of a square pixel


class UnknownLensError(DataError):
    """A camera that is described well and that omni cannot compute."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind  # in words


def offline_camera_model(model_type: str, parameters: str, name: str) -> FTheta:
    """Return the camera that a row of camera_intrinsics.offline describes.

    Args:
        model_type: as the table says; `ftheta` alone is known.
        parameters: the JSON text.
        name: what to call the row in an error.

    Raises:
        UnknownLensError: it is of another type, or bends its rays at a windshield, too.
        DataError: it is no JSON, or lacks a number.
    """
    if model_type != "ftheta":
        message = f"{name}: camera model {str(model_type)[:40]!r}; expected ftheta, choose another camera"
        raise UnknownLensError(message, "of another lens")
    said = _read(parameters, name)
    if said.get("external_distortion_parameters") is not None:
        message = f"{name}: a windshield model, which omni does not apply; use camera_intrinsics instead"
        raise UnknownLensError(message, "a lens behind a windshield")
    try:
        width, height = (int(side) for side in said["resolution"])
        cx, cy = (float(value) for value in said["principal_point"])
        forward, backward = (_poly(said[key]) for key in ("angle_to_pixeldist_poly", "pixeldist_to_angle_poly"))
        linear, exact = _poly(said["linear_cde"]), _EXACT[said["reference_poly"]]
        max_angle = float(said["max_angle"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not the parameters of an f-theta camera ({error!r}); fetch it again") from None
    numbers = (cx, cy, max_angle, *forward, *backward, *linear)
    if not all(map(math.isfinite, numbers)) or min(width, height) < 1 or not 0 < max_angle <= math.pi:
        raise DataError(f"{name}: a size, an angle or a coefficient cannot be ({parameters[:80]}); fetch it again")
    if len(linear) != 3 or not 1 < min(len(forward), len(backward)) <= max(len(forward), len(backward)) <= (
        _MAX_COEFFICIENTS
    ):
        raise DataError(f"{name}: expected 3 linear and 2 to {_MAX_COEFFICIENTS} coefficients each; fetch it again")
    c, d, e = linear if any(linear) else (1.0, 0.0, 0.0)  # all zero says that there is none
    if abs(c - d * e) < _LEAST_AREA:
        raise DataError(f"{name}: linear_cde {linear} lays the picture on a line; fetch it again")
    return FTheta(width, height, cx, cy, forward, backward, max_angle, (c, d, e), exact)


def _read(parameters: str, name: str) -> dict[str, Any]:
    said = None
    if isinstance(parameters, str) and len(parameters) <= _MAX_CHARACTERS:  # a table may hold anything
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(parameters)
    if not isinstance(said, dict):
        raise DataError(f"{name}: model_parameters is no JSON object ({str(parameters)[:80]!r}); fetch it again")
    return said


def _poly(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
