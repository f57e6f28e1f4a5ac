"""From a driving model's flat output vector to means, scales and probabilities.

Source: openpilot `selfdrive/modeld/parse_model_outputs.py` (v0.10.0 to v0.10.3) and `fill_model_msg.py`. The parts are
found by name, so one function serves a vision graph, a policy graph and a supercombo.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import DESIRES, FEATURE_LEN, MEAN_SHAPES

Float32Array = npt.NDArray[np.float32]

EXP_CLIP = 11.0  # openpilot's: models are trained in float16, whose largest number is e^11.09

_NORMALS: Mapping[str, tuple[int, ...]] = {**MEAN_SHAPES, "desired_curvature": (1,)}
# Models to v0.10.0 say a plan as 5 hypotheses, and a lead as 2 from which each of the 3 leads selects its own.
_HYPOTHESES = {"plan": (5, 1), "lead": (2, 3)}  # hypotheses, selections
_SIGMOIDS = {"meta": None, "lane_lines_prob": 8, "lead_prob": 3}
_SOFTMAXES = {"desire_pred": (4, DESIRES), "desire_state": (DESIRES,)}
_PLAIN = {"hidden_state": FEATURE_LEN}


def safe_exp(x: Float32Array) -> Float32Array:
    """Return exp(min(x, 11)): no larger number fits into float16."""
    return np.asarray(np.exp(np.minimum(x, EXP_CLIP)))


def sigmoid(x: Float32Array) -> Float32Array:
    """Return 1 / (1 + safe_exp(-x)): never below 1.7e-5."""
    return np.asarray(1 / (1 + safe_exp(-x)))


def softmax(x: Float32Array, axis: int = -1) -> Float32Array:
    """Return exp(x) / sum(exp(x)) along an axis, the largest subtracted first so that nothing overflows."""
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True))


def parse_normal(raw: Float32Array, shape: tuple[int, ...]) -> tuple[Float32Array, Float32Array]:
    """Return mean and standard deviation, each (b, *shape).

    Args:
        raw: (b, 2 n), n = prod(shape): all means, then all logarithms of scales.
        shape: of one mean.
    """
    mean, log_std = np.split(raw, 2, axis=1)
    return mean.reshape(-1, *shape), safe_exp(log_std).reshape(-1, *shape)


def parse_hypotheses(
    raw: Float32Array, shape: tuple[int, ...], hypotheses: int, selections: int
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return means and scales, each (b, hypotheses, *shape), and weights (b, hypotheses, selections).

    Args:
        raw: (b, hypotheses (2 n + selections)), n = prod(shape): of each hypothesis all means, all logarithms of
            scales, then its score in each selection.
        shape: of one hypothesis.
        hypotheses: how many; they stay in the model's order.
        selections: how many times one of them is chosen; the weights of each sum to one.
    """
    rows = raw.reshape(len(raw), hypotheses, -1)
    mean, log_std, scores = np.split(rows, [math.prod(shape), 2 * math.prod(shape)], axis=2)
    assert scores.shape[2] == selections
    whole = (len(raw), hypotheses, *shape)
    return mean.reshape(whole), safe_exp(log_std).reshape(whole), softmax(scores, axis=1)


def select_likeliest(values: Float32Array, weights: Float32Array) -> Float32Array:
    """Return the values (b, selections, ...) of each selection's likeliest hypothesis.

    Args:
        values: (b, hypotheses, ...).
        weights: (b, hypotheses, selections).
    """
    chosen: Float32Array = values[np.arange(len(values))[:, None], weights.argmax(axis=1)]
    return chosen


def parse_outputs(raw: npt.NDArray[np.floating], slices: Mapping[str, slice]) -> dict[str, Float32Array]:
    """Return what a driving model says, by name, whatever its graph holds of it.

    Keys, b first: `plan` (33, 15), `lane_lines` (4, 33, 2), `road_edges` (2, 33, 2), `lead` (3, 6, 4), `pose` (6,),
    `road_transform` (6,), `wide_from_device_euler` (3,), `desired_curvature` (1,), each with NAME_std, and of a model
    with hypotheses also NAME_weights (hypotheses, selections), NAME_hypotheses and NAME_hypotheses_std; probabilities
    `lane_lines_prob` (4,), `lead_prob` (3,), `meta` (55,), `desire_pred` (4, 8), `desire_state` (8,); `hidden_state`
    (512,). `pad` and names that are not known are left out.

    Args:
        raw: (b, width), float16 or float32.
        slices: where each name lies.

    Raises:
        DataError: a part has a width that no known model has.
    """
    check_widths(slices, raw.shape[1])
    parsed: dict[str, Float32Array] = {}
    for name, part in slices.items():
        parsed |= _parse(name, raw[:, part].astype(np.float32))
    return parsed


def check_widths(slices: Mapping[str, slice], width: int, source: str = "a driving model's answer") -> None:
    """Check that every known name has a width that some model has.

    Args:
        slices: where each name lies.
        width: of the whole vector.
        source: what the vector is from, for the error.

    Raises:
        DataError: one has not.
    """
    for name, part in slices.items():
        found, known = len(range(*part.indices(width))), _widths(name)
        if known and found not in known:
            expected = " or ".join(map(str, known))
            raise DataError(f"{source}: '{name}' is {found} wide in a vector of {width}, expected {expected}; "
                            "the slices are of another model")  # fmt: skip


def _widths(name: str) -> tuple[int, ...]:
    """Return the widths that a name may have; none: any."""
    if name in _NORMALS:
        single = 2 * math.prod(_NORMALS[name])
        count, selections = _HYPOTHESES.get(name, (0, 1))
        return tuple(sorted({single, count * (single // selections + selections)} - {0}))
    exact = _PLAIN.get(name) or _SIGMOIDS.get(name) or math.prod(_SOFTMAXES.get(name, (0,)))
    return (exact,) if exact else ()


def _parse(name: str, raw: Float32Array) -> dict[str, Float32Array]:
    if name in _NORMALS:
        return _parse_normal(name, raw)
    if name in _SIGMOIDS:
        probability = sigmoid(raw)  # a lane line has two scores; `fill_model_msg.py` reads the second
        return {name: probability[:, 1::2] if name == "lane_lines_prob" else probability}
    if name in _SOFTMAXES:
        return {name: softmax(raw.reshape(-1, *_SOFTMAXES[name]))}
    return {name: raw} if name in _PLAIN else {}


def _parse_normal(name: str, raw: Float32Array) -> dict[str, Float32Array]:
    shape = _NORMALS[name]
    if raw.shape[1] == 2 * math.prod(shape):
        mean, std = parse_normal(raw, shape)
        return {name: mean, f"{name}_std": std}
    count, selections = _HYPOTHESES[name]
    own_shape = shape if selections == 1 else shape[1:]
    means, stds, weights = parse_hypotheses(raw, own_shape, count, selections)
    chosen = {key: select_likeliest(values, weights).reshape(-1, *shape)
              for key, values in ((name, means), (f"{name}_std", stds))}  # fmt: skip
    return {**chosen, f"{name}_weights": weights, f"{name}_hypotheses": means, f"{name}_hypotheses_std": stds}
