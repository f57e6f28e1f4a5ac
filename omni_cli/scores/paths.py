"""How far predicted paths, their scales and lane lines are from the truth: pure functions, in calib (y right).

A path has 33 points whose times are quadratic: half of them lie in the first quarter of its 10 s. A plain mean over
points would mostly score where nothing has happened yet. So every mean over time is one over time: displacements on a
uniform grid of 0.1 s, shares of points with the time that each point stands for (the trapezoidal rule's weights).
Between points it is the error that is interpolated, not the paths: what both have in common, such as the bend of a
curve, then cancels and costs no accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_cli.formats.driving_model import NUM_POINTS, T_IDXS_S
from omni_cli.scene.clock import Float64Array, Int64Array

HORIZONS_S = (1.0, 2.0, 3.0, 5.0, 10.0)
_GRID_S = 0.1
_LANE_IS_THERE = 0.5
_POINT_SECONDS = np.convolve(np.diff(T_IDXS_S), [0.5, 0.5])  # (33,) the time that each point stands for

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PathErrors:
    """Displacement errors of n paths at h horizons, in metres; NaN where the truth does not reach the horizon."""

    average_m: Float64Array  # (n, h) ADE: the mean distance over (0, horizon]
    final_m: Float64Array  # (n, h) FDE: the distance at the horizon


@dataclass(frozen=True)
class ScaleCalibration:
    """How n predicted Laplace distributions fit the truth; NaN where no truth is known."""

    inside_50: Float64Array  # (n,) share of the truth inside the central half; a calibrated scale has 0.5
    inside_90: Float64Array  # (n,) the same for 90 %
    scale_m: Float64Array  # (n,) mean predicted scale
    error_m: Float64Array  # (n,) mean absolute error of a coordinate; a calibrated scale has the same mean over all n


def path_errors(
    predicted_m: FloatArray, truth_m: FloatArray, num_points: Int64Array, horizons_s: Sequence[float] = HORIZONS_S
) -> PathErrors:
    """Return the average and the final displacement error (ADE, FDE) up to and at each horizon.

    Args:
        predicted_m: (n, 33, 2) x, y at `T_IDXS_S`.
        truth_m: (n, 33, 2).
        num_points: (n,) how many of the truth's points are known.
        horizons_s: (h,) of 0.1 to 10 s, in tenths.
    """
    steps = np.round(np.asarray(horizons_s) / _GRID_S).astype(int)
    distance = np.linalg.norm(_on_grid(np.asarray(predicted_m, float) - truth_m), axis=-1)
    average = np.cumsum(distance, axis=1)[:, steps - 1] / steps
    reached = is_reached(num_points, horizons_s)
    return PathErrors(np.where(reached, average, np.nan), np.where(reached, distance[:, steps - 1], np.nan))


def is_reached(num_points: Int64Array, horizons_s: Sequence[float]) -> BoolArray:
    """Say which horizons (n, h) the known points of n truths reach."""
    return np.asarray(_known_s(num_points)[:, None] >= np.asarray(horizons_s))


def scale_calibration(
    mean_m: FloatArray, scale_m: FloatArray, truth_m: FloatArray, num_points: Int64Array
) -> ScaleCalibration:
    """Compare predicted Laplace distributions of each coordinate with the truth.

    The central interval that holds a share p of a Laplace distribution reaches -scale ln(1 - p) to either side, and
    its mean absolute deviation is its scale.

    Args:
        mean_m: (n, 33, 2).
        scale_m: (n, 33, 2) positive.
        truth_m: (n, 33, 2).
        num_points: (n,) how many of the truth's points are known.
    """
    error = np.abs(np.asarray(mean_m, float) - truth_m)
    seconds = np.where(np.arange(NUM_POINTS) < num_points[:, None], _POINT_SECONDS, 0)
    total = np.where(num_points > 0, 2 * seconds.sum(axis=1), np.nan)  # of both coordinates

    def mean_over_time(values: FloatArray) -> Float64Array:
        return np.asarray(np.einsum("nkc,nk->n", values, seconds) / total)

    half, most = (mean_over_time(error <= -np.log(1 - share) * scale_m) for share in (0.5, 0.9))
    return ScaleCalibration(half, most, mean_over_time(scale_m), mean_over_time(error))


def lane_l1_m(predicted_m: FloatArray, truth_m: FloatArray, probability: FloatArray) -> Float64Array:
    """Return the mean absolute error (n,) over lines that are there, their points and coordinates; NaN where none is.

    Args:
        predicted_m: (n, lines, 33, 2) y, z at `X_IDXS_M`: equal weights look near the car, as the points do.
        truth_m: (n, lines, 33, 2).
        probability: (n, lines) that the truth's line is there; from one half on it counts.
    """
    is_there = np.asarray(probability) >= _LANE_IS_THERE
    error = np.abs(np.asarray(predicted_m, float) - truth_m).mean(axis=(2, 3))
    count = np.where(is_there.any(axis=1), is_there.sum(axis=1), np.nan)
    return np.asarray((error * is_there).sum(axis=1) / count)


def median_path_m(paths_m: FloatArray, num_points: Int64Array) -> Float64Array:
    """Return the median (k, 2) of each coordinate of paths (n, 33, 2), at the k points that any of them reaches.

    Args:
        paths_m: (n, 33, 2).
        num_points: (n,) how many points of each are known; a point's median is that of the paths that reach it.
    """
    reach = num_points.max(initial=0)
    return np.array([np.median(paths_m[num_points > at, at], axis=0) for at in range(reach)], dtype=float)


def median_lanes_m(lines_m: FloatArray, probability: FloatArray) -> Float64Array:
    """Return the median (lines, 33, 2) of each line where it is there; nothing of no instants.

    A line that never is has the median of what was said of it all the same: elsewhere it may be there.

    Args:
        lines_m: (n, lines, 33, 2).
        probability: (n, lines) that a line is there; from one half on it counts.
    """
    if not len(lines_m):
        return np.zeros(0)
    is_there = np.asarray(probability) >= _LANE_IS_THERE
    is_there |= ~is_there.any(axis=0)
    return np.array([np.median(lines_m[one, line], axis=0) for line, one in enumerate(is_there.T)], dtype=float)


def best_hypothesis(values: FloatArray, logit: FloatArray) -> FloatArray:
    """Return of values (n, hypotheses, ...) each row's hypothesis with the highest of its logits (n, hypotheses)."""
    return np.asarray(values[np.arange(len(values)), np.argmax(logit, axis=1)])


def constant_velocity_paths(speed_mps: Float64Array) -> Float64Array:
    """Return the paths (n, 33, 2) of cars that go straight on at speeds (n,)."""
    return constant_curvature_paths(speed_mps, np.zeros_like(speed_mps))


def constant_curvature_paths(speed_mps: Float64Array, yaw_rate_radps: Float64Array) -> Float64Array:
    """Return the paths (n, 33, 2) of cars that keep their speed (n,) and their yaw rate (n,), left positive.

    An arc of length s that turns by a has the chord s sinc(a / 2) in the direction a / 2.
    """
    half_turn = yaw_rate_radps[:, None] * T_IDXS_S / 2
    chord_m = speed_mps[:, None] * T_IDXS_S * np.sinc(half_turn / np.pi)
    return np.stack([chord_m * np.cos(half_turn), -chord_m * np.sin(half_turn)], axis=-1)


def _on_grid(error_m: Float64Array) -> Float64Array:
    """Return error vectors (n, 33, 2) linearly interpolated at 0.1, 0.2 ... 10 s: (n, 100, 2)."""
    grid_s = np.arange(1, round(T_IDXS_S[-1] / _GRID_S) + 1) * _GRID_S
    after = np.minimum(np.searchsorted(T_IDXS_S, grid_s), NUM_POINTS - 1)
    weight = ((grid_s - T_IDXS_S[after - 1]) / (T_IDXS_S[after] - T_IDXS_S[after - 1]))[:, None]
    return np.asarray(error_m[:, after - 1] * (1 - weight) + error_m[:, after] * weight)


def _known_s(num_points: Int64Array) -> Float64Array:
    """Return how far the truth reaches (n,); before its start where it has no point."""
    return np.where(num_points > 0, T_IDXS_S[num_points - 1], -1.0)
