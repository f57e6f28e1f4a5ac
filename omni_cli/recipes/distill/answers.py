"""How wrong a plan is, what it must beat, and how it is shown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omni_cli.formats.driving_model import NUM_POINTS, T_IDXS_S
from omni_cli.recipe import Metric, Pair, Prediction, Row
from omni_cli.scene.clock import Float64Array
from omni_cli.scores import paths

CONSTANT_VELOCITY = "constant velocity"
_SHOWN = (("ade", 2.0), ("ade", 5.0))
_TO_TEACHER_S = (2.0, 5.0)
_ERRORS = ("ade", "fde")


def metrics(*, has_scene: bool) -> tuple[Metric, ...]:
    """Return displacement errors at each horizon and how badly scales fit; of a teacher that sees, how far it is."""
    errors = [
        Metric(f"{key}_{horizon:g}s", f"{key.upper()} {horizon:g} s", "m", is_shown=(key, horizon) in _SHOWN)
        for horizon in paths.HORIZONS_S
        for key in _ERRORS
    ]
    errors += [
        Metric(f"inside_{share}", f"|share inside the {share} % - {share} %|", "", is_shown=False) for share in (50, 90)
    ]
    to_teacher = [
        Metric(_to_teacher(horizon), f"ADE {horizon:g} s to the teacher", "m", is_shown=False)
        for horizon in _TO_TEACHER_S
    ]
    return (*errors, *([*to_teacher, Metric("lane_l1", "lane L1", "m")] if has_scene else []))


def errors(
    of: Sequence[Metric], predictions: Sequence[Prediction], rows: Sequence[Row], warmup_steps: int
) -> dict[str, Float64Array]:
    """Return for each window the mean over its steps that count, NaN where there is none."""
    found = [_window_errors(one.values or {}, row, warmup_steps) for one, row in zip(predictions, rows, strict=True)]
    return {metric.key: np.array([one.get(metric.key, np.nan) for one in found]) for metric in of}


def baselines(rows: Sequence[Row], *, has_teacher: bool) -> dict[str, list[Prediction]]:
    """Return the car that keeps its speed, the one that keeps its turn as well, and where there is one the teacher."""
    speeds, turns = ([_array(row, name) for row in rows] for name in ("speed_mps", "yaw_rate_radps"))
    said = {
        CONSTANT_VELOCITY: _said(paths.constant_velocity_paths(speed) for speed in speeds),
        "constant curvature": _said(map(paths.constant_curvature_paths, speeds, turns)),
    }
    if has_teacher:
        said["teacher"] = [Prediction("", teacher_values(row)) for row in rows]
    return said


def teacher_values(row: Row) -> dict[str, Any]:
    """Return what the teacher said of a window, in the form of a prediction; unknown paths are NaN."""
    known = _points(row, "target_points")[:, None] > np.arange(NUM_POINTS)
    values = {"xy_m": np.where(known[..., None], path(row, "target_xy_m"), np.nan)}
    if len(row["scene_is_known"]):
        values["lane_lines_m"] = _array(row, "scene_lane_lines_m").reshape(-1, 4, NUM_POINTS, 2)
    return values


def pairs(predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
    """Return where the car is after two seconds, forward and sideways, at the last step of each window."""
    at = int(np.searchsorted(T_IDXS_S, 2.0))
    reached = [_points(row, "driven_points")[-1] > at for row in rows]
    kept = [(one.values, row) for one, row, is_known in zip(predictions, rows, reached, strict=True) if is_known]
    told = np.array([values["xy_m"][-1, at] for values, _ in kept if values is not None]).reshape(-1, 2)
    truth = np.array([path(row, "driven_xy_m")[-1, at] for _, row in kept]).reshape(-1, 2)
    titles = (f"x after {T_IDXS_S[at]:.1f} s", f"y after {T_IDXS_S[at]:.1f} s")
    return tuple(Pair(title, "m", truth[:, axis], told[:, axis]) for axis, title in enumerate(titles))


def path(row: Mapping[str, Any], name: str) -> Float64Array:
    """Return paths (steps, 33, 2) of a row."""
    return _array(row, name).reshape(-1, NUM_POINTS, 2)


def _window_errors(values: Mapping[str, Any], row: Row, warmup_steps: int) -> dict[str, float]:
    if not values:
        return {}
    counts = (_array(row, "counts") > 0) & (np.arange(len(row["counts"])) >= warmup_steps)
    truth, points = path(row, "driven_xy_m"), np.where(counts, _points(row, "driven_points"), 0)
    taught, taught_points = path(row, "target_xy_m"), np.where(counts, _points(row, "target_points"), 0)
    found = paths.path_errors(values["xy_m"], truth, points)
    result = {
        f"{key}_{horizon:g}s": _mean(error[:, column])
        for column, horizon in enumerate(paths.HORIZONS_S)
        for key, error in (("ade", found.average_m), ("fde", found.final_m))
    }
    apart = paths.path_errors(values["xy_m"], taught, taught_points, _TO_TEACHER_S).average_m
    result |= {_to_teacher(horizon): _mean(apart[:, column]) for column, horizon in enumerate(_TO_TEACHER_S)}
    if "scale_m" in values:
        fit = paths.scale_calibration(values["xy_m"], values["scale_m"], truth, points)
        result |= {"inside_50": abs(_mean(fit.inside_50) - 0.5), "inside_90": abs(_mean(fit.inside_90) - 0.9)}
    if len(row["scene_is_known"]) and "lane_lines_m" in values:
        result["lane_l1"] = _mean(_lane_l1(values, row)[counts])
    return result


def _to_teacher(horizon_s: float) -> str:
    return f"teacher_ade_{horizon_s:g}s"


def _lane_l1(values: Mapping[str, Any], row: Row) -> Float64Array:
    lines = _array(row, "scene_lane_lines_m").reshape(-1, 4, NUM_POINTS, 2)
    is_there = _array(row, "scene_lane_line_prob").reshape(-1, 4) * _array(row, "scene_is_known")[:, None]
    return paths.lane_l1_m(values["lane_lines_m"], lines, is_there)


def _mean(values: Float64Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _said(xy_m: Iterable[Float64Array]) -> list[Prediction]:
    return [Prediction("", {"xy_m": one}) for one in xy_m]


def _array(row: Mapping[str, Any], name: str) -> Float64Array:
    return np.asarray(row[name].numpy(), dtype=np.float64)


def _points(row: Mapping[str, Any], name: str) -> np.ndarray:
    return np.asarray(row[name].numpy(), dtype=np.int64)
