"""openpilot's driving models: what they see and say, where each part lies in their output vectors, their metadata.

Source: openpilot v0.10.3 (`selfdrive/modeld/constants.py`, `modeld.py`, `get_model_metadata.py`) and the metadata
pickles released with it. Paths, lanes and leads are in calib: x forward, y right, z down, origin in the camera.
"""

import base64
import binascii
import io
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_cli.errors import DataError
from omni_cli.scene.clock import Float64Array

NUM_POINTS = 33  # of a path, over time, and of a lane line, over distance


def _quadratic(last: float) -> Float64Array:
    """Return last * (i / 32)^2: dense near the car, where a controller looks."""
    values = np.asarray(last * (np.arange(NUM_POINTS) / (NUM_POINTS - 1)) ** 2)
    values.flags.writeable = False
    return values


T_IDXS_S = _quadratic(10.0)  # (33,) times of a path's points
X_IDXS_M = _quadratic(192.0)  # (33,) distances of a lane line's points

FEATURE_LEN = 512
HISTORY_STEPS = 25  # of the policy's memory, at 5 Hz, the newest last
DESIRES = 8  # openpilot's `Desire`; 0 is none
TRAFFIC_CONVENTIONS = 2  # one-hot: right-hand traffic, left-hand traffic
PICTURE_SHAPE = (6, 128, 256)  # one packed YUV420 picture; the model sees two, the older first

PLAN_WIDTH = 15
PLAN_COLUMNS: Mapping[str, slice] = {  # m, m/s, m/s^2, rad, rad/s along x, y, z; the angles are roll, pitch, yaw
    "position": slice(0, 3),
    "velocity": slice(3, 6),
    "acceleration": slice(6, 9),
    "euler": slice(9, 12),
    "euler_rate": slice(12, 15),
}
# What a Gaussian or Laplacian output describes; it is stored as all means, then all logarithms of scales.
MEAN_SHAPES: Mapping[str, tuple[int, ...]] = {
    "plan": (NUM_POINTS, PLAN_WIDTH),
    "lane_lines": (4, NUM_POINTS, 2),  # outer left, left, right, outer right; y, z
    "road_edges": (2, NUM_POINTS, 2),
    "lead": (3, 6, 4),  # the lead at 0, 2, 4 s; its next 0, 2 ... 10 s; x, y, speed, acceleration
    "pose": (6,),
    "wide_from_device_euler": (3,),
    "road_transform": (6,),
}

# `pad` is what the real files say; it may alias the whole vector and means nothing.
VISION_SLICES: Mapping[str, slice] = {
    "meta": slice(0, 55),
    "desire_pred": slice(55, 87),
    "pose": slice(87, 99),
    "wide_from_device_euler": slice(99, 105),
    "road_transform": slice(105, 117),
    "lane_lines": slice(117, 645),
    "lane_lines_prob": slice(645, 653),
    "road_edges": slice(653, 917),
    "lead": slice(917, 1061),
    "lead_prob": slice(1061, 1064),
    "hidden_state": slice(1064, 1576),
    "pad": slice(0, None),
}
POLICY_SLICES: Mapping[str, slice] = {
    "plan": slice(0, 990),
    "desire_state": slice(990, 998),
    "pad": slice(-2, None),
}
VISION_WIDTH, POLICY_WIDTH = 1576, 1000
OUTPUT_NAME = "outputs"
SLICES_KEY, CHECKPOINT_KEY = "output_slices", "model_checkpoint"  # of an ONNX file's metadata_props


@dataclass(frozen=True)
class InputSpec:
    """One input of a model; batch first. Real files hold floats as float16 or float32: read that from the file."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name


_PICTURES = InputSpec((1, 2 * PICTURE_SHAPE[0], *PICTURE_SHAPE[1:]), "uint8")
VISION_INPUTS: Mapping[str, InputSpec] = {"img": _PICTURES, "big_img": _PICTURES}
POLICY_INPUTS: Mapping[str, InputSpec] = {
    "desire_pulse": InputSpec((1, HISTORY_STEPS, DESIRES), "float32"),
    "traffic_convention": InputSpec((1, TRAFFIC_CONVENTIONS), "float32"),
    "features_buffer": InputSpec((1, HISTORY_STEPS, FEATURE_LEN), "float32"),
}

_MAX_PICKLE_BYTES = 1 << 14  # real ones hold 0.8 kB; a bound keeps nesting harmless


@dataclass(frozen=True)
class ModelMetadata:
    """What a `<model>_metadata.pkl` beside an ONNX file says of it."""

    model_checkpoint: str
    output_slices: Mapping[str, slice]
    input_shapes: Mapping[str, tuple[int, ...]]
    output_shapes: Mapping[str, tuple[int, ...]]


def encode_slices(slices: Mapping[str, slice]) -> str:
    """Return what `metadata_props['output_slices']` of an ONNX file holds: base64 of a pickle of name -> slice."""
    return base64.b64encode(pickle.dumps(dict(slices), protocol=4)).decode()


def decode_slices(text: str, name: str = SLICES_KEY) -> dict[str, slice]:
    """Read the `output_slices` of an ONNX file; no code of the file runs.

    Args:
        text: base64 of a pickle.
        name: where the text is from, for the error.

    Raises:
        DataError: it is no base64, or its pickle holds anything but a dict of names and slices of whole numbers.
    """
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{name}: found no base64; expected a pickled dict of slices: export the model again") from None
    slices = _load(content, name)
    if not _is_slices(slices):
        raise DataError(f"{name}: expected a dict of names and slices of whole numbers; export the model again")
    return dict(slices)


def read_metadata(path: Path) -> ModelMetadata:
    """Read a `<model>_metadata.pkl`; no code of the file runs.

    Raises:
        DataError: the pickle holds anything but shapes, slices and a checkpoint's name.
    """
    found = _load(path.read_bytes(), str(path))
    if not _is_metadata(found):
        raise DataError(
            f"{path}: expected a dict with input_shapes, output_shapes and output_slices of a driving model; take the "
            "file that belongs to the ONNX file"
        )
    checkpoint = str(found.get(CHECKPOINT_KEY, ""))
    return ModelMetadata(checkpoint, found[SLICES_KEY], found["input_shapes"], found["output_shapes"])


class _SlicesOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) != ("builtins", "slice"):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return slice


def _load(content: bytes, name: str) -> Any:
    refused = f"{name}: a pickle that is refused"
    if len(content) > _MAX_PICKLE_BYTES:
        raise DataError(
            f"{refused}: {len(content)} bytes, at most {_MAX_PICKLE_BYTES} are read; export the model again"
        )
    try:
        _refuse_far_memo(content)
        return _SlicesOnly(io.BytesIO(content)).load()
    except Exception as error:  # a pickle's bytes are a program, and any exception can be its outcome
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{refused}: {why}; expected names, numbers and slices: export the model again") from None


def _refuse_far_memo(content: bytes) -> None:
    """A memo's index is the length of an array that Python allocates: ten bytes could ask for 64 GB."""
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"its memo reaches to {argument}")


def _is_metadata(value: Any) -> bool:
    shapes = ("input_shapes", "output_shapes")
    return (
        isinstance(value, dict) and _is_slices(value.get(SLICES_KEY)) and all(_is_shapes(value.get(k)) for k in shapes)
    )


def _is_slices(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(part, slice)
        and _are_whole(part.start or 0, part.stop or 0, part.step or 1)
        for name, part in value.items()
    )


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(shape, tuple) and _are_whole(*shape) for name, shape in value.items()
    )


def _are_whole(*values: Any) -> bool:
    return all(type(value) is int for value in values)
