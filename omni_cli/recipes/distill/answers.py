"""How wrong a plan is, what it must beat, and how it is shown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omni_cli.formats.driving_model import NUM_POINTS, T_IDXS_S
from omni_cli.recipe import Metric, Pair, Prediction, Row
from omni_cli.samples.model_steps import STEP_RATE_HZ
from omni_cli.scene.clock import Float64Array
from omni_cli.scores import paths
from omni_cli.scores.strata import Strata, motion_strata, per_second

CONSTANT_VELOCITY = "constant velocity"
_SHOWN = (("ade", 2.0), ("ade", 5.0))
_BESIDE_TEACHER_S = (2.0, 5.0)
_ERRORS = ("ade", "fde")
_LINES = (4, NUM_POINTS, 2)
_SCALES = (
    Metric("inside_50", "share inside the 50 % interval", "", is_shown=False, is_error=False),
    Metric("inside_90", "share inside the 90 % interval", "", is_shown=False, is_error=False),
    Metric("scale_m", "predicted scale", "m", is_shown=False, is_error=False),
    Metric("error_m", "absolute error, which the scale should equal", "m", is_shown=False, is_error=False),
)


def metrics(*, has_scene: bool) -> tuple[Metric, ...]:
    """Return displacement errors at each horizon, how scales fit, and of a teacher that sees how far off it is.

    Scales are calibrated where the shares are what their names say and the mean scale is the mean error. No one window
    shows either: its errors go together, and lie inside an interval or outside as one. So each of these is to be judged
    by its mean over windows alone, and a scale's ratio is that of two means.
    """
    errors = [
        Metric(f"{key}_{horizon:g}s", f"{key.upper()} {horizon:g} s", "m", is_shown=(key, horizon) in _SHOWN)
        for horizon in paths.HORIZONS_S
        for key in _ERRORS
    ]
    return (*errors, *_SCALES, *(_beside_teacher() if has_scene else []))


def errors(
    of: Sequence[Metric], predictions: Sequence[Prediction], rows: Sequence[Row], warmup_steps: int
) -> dict[str, Float64Array]:
    """Return for each window the mean over its steps that count, NaN where there is none.

    It is NaN too where an answer is silent at one of them: a teacher that speaks at two steps of fifteen would be
    measured at those, and the others at all. `ade_*_taught` measures everyone at the steps where the teacher speaks.
    """
    found = [_window_errors(one.values or {}, row, warmup_steps) for one, row in zip(predictions, rows, strict=True)]
    return {metric.key: np.array([one.get(metric.key, np.nan) for one in found]) for metric in of}


def medians(rows: Sequence[Row], warmup_steps: int) -> dict[str, tuple[float, ...]]:
    """Return the median of the paths driven and, where a teacher tells of them, of the lanes, over steps that count.

    Args:
        rows: of the windows that were learned from.
        warmup_steps: of a window, which do not count.

    Returns:
        By the name of a column the k x 2 numbers of the points that any path reaches, and 4 x 33 x 2; none where
        nothing is known.
    """

    def counted(name: str, *shape: int) -> np.ndarray:
        steps = [row[name].numpy().reshape(-1, *shape)[_counts(row, warmup_steps)] for row in rows]
        return np.concatenate(steps)

    found = {"driven_xy_m": paths.median_path_m(counted("driven_xy_m", NUM_POINTS, 2), counted("driven_points"))}
    if len(rows[0]["scene_is_known"]):
        known = counted("scene_is_known") > 0
        lines, there = counted("scene_lane_lines_m", *_LINES)[known], counted("scene_lane_line_prob", 4)[known]
        found["scene_lane_lines_m"] = paths.median_lanes_m(lines, there)
    return {name: tuple(value.ravel().tolist()) for name, value in found.items() if value.size}


def baselines(
    rows: Sequence[Row], learned: Mapping[str, Sequence[float]], *, has_teacher: bool
) -> dict[str, list[Prediction]]:
    """Return the car that keeps its speed, that keeps its turn as well, the median drive, and the teacher if it sees.

    The median has no values where it is not known: runs that were trained before it was kept have none.
    """
    speeds, turns = ([_array(row, name) for row in rows] for name in ("speed_mps", "yaw_rate_radps"))
    said = {
        CONSTANT_VELOCITY: _said(paths.constant_velocity_paths(speed) for speed in speeds),
        "constant curvature": _said(map(paths.constant_curvature_paths, speeds, turns)),
        "constant median": [Prediction("", _median_values(learned, len(row["counts"]))) for row in rows],
    }
    if has_teacher:
        said["teacher"] = [Prediction("", teacher_values(row)) for row in rows]
    return said


def strata(rows: Sequence[Row]) -> tuple[Strata, Strata]:
    """Return windows by what the car did during their steps, and by its speed at the last."""
    speeds, turns = (np.stack([_array(row, name) for row in rows]) for name in ("speed_mps", "yaw_rate_radps"))
    duration_s = np.full(len(rows), (speeds.shape[1] - 1) / STEP_RATE_HZ)
    acceleration_mps2 = per_second(speeds[:, -1] - speeds[:, 0], duration_s)
    return motion_strata(speeds.mean(axis=1), acceleration_mps2, turns.mean(axis=1), speeds[:, -1])


def teacher_values(row: Row) -> dict[str, Any]:
    """Return what the teacher said of a window, in the form of a prediction; unknown paths are NaN."""
    known = _points(row, "target_points")[:, None] > np.arange(NUM_POINTS)
    values = {"xy_m": np.where(known[..., None], path(row, "target_xy_m"), np.nan)}
    if len(row["scene_is_known"]):
        values["lane_lines_m"] = _array(row, "scene_lane_lines_m").reshape(-1, *_LINES)
    return values


def pairs(predictions: Sequence[Prediction], rows: Sequence[Row], warmup_steps: int) -> tuple[Pair, ...]:
    """Return where the car is two seconds after the last step of each window that counts and whose path goes so far."""
    at = int(np.searchsorted(T_IDXS_S, 2.0))
    said, truth = [], []
    for prediction, row in zip(predictions, rows, strict=True):
        assert prediction.values is not None  # a student always answers
        steps = np.flatnonzero(_counts(row, warmup_steps) & (_points(row, "driven_points") > at))[-1:]
        said.append(prediction.values["xy_m"][steps, at])
        truth.append(path(row, "driven_xy_m")[steps, at])
    told, driven = np.concatenate(said), np.concatenate(truth)
    titles = (f"x after {T_IDXS_S[at]:.1f} s", f"y after {T_IDXS_S[at]:.1f} s")
    return tuple(Pair(title, "m", driven[:, axis], told[:, axis]) for axis, title in enumerate(titles))


def path(row: Mapping[str, Any], name: str) -> Float64Array:
    """Return paths (steps, 33, 2) of a row."""
    return _array(row, name).reshape(-1, NUM_POINTS, 2)


def _beside_teacher() -> list[Metric]:
    measured = [("{}_taught", "ADE {:g} s at the teacher's steps"), ("teacher_{}", "ADE {:g} s to the teacher")]
    errors = [
        Metric(key.format(_ade(horizon)), title.format(horizon), "m", is_shown=False)
        for key, title in measured
        for horizon in _BESIDE_TEACHER_S
    ]
    return [*errors, Metric("lane_l1", "lane L1", "m")]


def _window_errors(values: Mapping[str, Any], row: Row, warmup_steps: int) -> dict[str, float]:
    if not values:
        return {}
    counts, said = _counts(row, warmup_steps), values["xy_m"]
    truth, points = path(row, "driven_xy_m"), np.where(counts, _points(row, "driven_points"), 0)
    taught, taught_points = path(row, "target_xy_m"), np.where(counts, _points(row, "target_points"), 0)
    result = _displacements(said, truth, points, paths.HORIZONS_S)
    beside = _displacements(said, truth, np.where(taught_points > 0, points, 0), _BESIDE_TEACHER_S)
    apart = _displacements(said, taught, taught_points, _BESIDE_TEACHER_S)
    for key in map(_ade, _BESIDE_TEACHER_S):
        result |= {f"{key}_taught": beside[key], f"teacher_{key}": apart[key]}
    if "scale_m" in values:
        fit = paths.scale_calibration(said, values["scale_m"], truth, points)
        result |= {metric.key: _mean(getattr(fit, metric.key), points > 0) for metric in _SCALES}
    if len(row["scene_is_known"]) and "lane_lines_m" in values:
        apart_m = _lane_l1(values, row)
        result["lane_l1"] = _mean(apart_m, counts & np.isfinite(apart_m))
    return result


def _displacements(
    said: Float64Array, truth: Float64Array, points: np.ndarray, horizons_s: Sequence[float]
) -> dict[str, float]:
    found, is_reached = paths.path_errors(said, truth, points, horizons_s), paths.is_reached(points, horizons_s)
    return {
        f"{key}_{horizon:g}s": _mean(error[:, column], is_reached[:, column])
        for column, horizon in enumerate(horizons_s)
        for key, error in (("ade", found.average_m), ("fde", found.final_m))
    }


def _ade(horizon_s: float) -> str:
    return f"ade_{horizon_s:g}s"


def _lane_l1(values: Mapping[str, Any], row: Row) -> Float64Array:
    lines = _array(row, "scene_lane_lines_m").reshape(-1, *_LINES)
    is_there = _array(row, "scene_lane_line_prob").reshape(-1, 4) * _array(row, "scene_is_known")[:, None]
    return paths.lane_l1_m(values["lane_lines_m"], lines, is_there)


def _median_values(learned: Mapping[str, Sequence[float]], steps: int) -> dict[str, Any] | None:
    """Return the medians at every step, in the form of a prediction; points that no path reached are NaN."""
    if "driven_xy_m" not in learned:
        return None
    known = np.reshape(learned["driven_xy_m"], (-1, 2))
    values = {"xy_m": np.pad(known, ((0, NUM_POINTS - len(known)), (0, 0)), constant_values=np.nan)}
    if "scene_lane_lines_m" in learned:
        values["lane_lines_m"] = np.reshape(learned["scene_lane_lines_m"], _LINES)
    return {name: np.broadcast_to(value, (steps, *value.shape)) for name, value in values.items()}


def _mean(values: Float64Array, where: np.ndarray) -> float:
    """Return the mean over steps where the truth is known; NaN where nothing is, or one of them is."""
    return float(values[where].mean()) if where.any() else float("nan")


def _counts(row: Row, warmup_steps: int) -> np.ndarray:
    """Say which steps (n,) are past the warm-up and pass the filters."""
    return (_points(row, "counts") > 0) & (np.arange(len(row["counts"])) >= warmup_steps)


def _said(xy_m: Iterable[Float64Array]) -> list[Prediction]:
    return [Prediction("", {"xy_m": one}) for one in xy_m]


def _array(row: Mapping[str, Any], name: str) -> Float64Array:
    return np.asarray(row[name].numpy(), dtype=np.float64)


def _points(row: Mapping[str, Any], name: str) -> np.ndarray:
    return np.asarray(row[name].numpy(), dtype=np.int64)
