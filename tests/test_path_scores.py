"""Scores of paths against brute force, closed forms and samples of known distributions."""

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.scores import paths as scores

RNG = np.random.default_rng(3)


def whole(num: int) -> np.ndarray:
    return np.full(num, 33)


def test_errors_at_each_horizon_by_brute_force():
    predicted, truth = RNG.normal(size=(4, 33, 2)), RNG.normal(size=(4, 33, 2))
    num_points = np.array([33, 16, 15, 0])  # the 15th point lies at 1.91 s, the 16th at 2.20 s
    found = scores.path_errors(predicted, truth, num_points)
    for row in range(4):
        for column, horizon_s in enumerate(scores.HORIZONS_S):
            known_s = T_IDXS_S[num_points[row] - 1] if num_points[row] else -1
            if known_s < horizon_s:
                assert np.isnan(found.average_m[row, column])
                assert np.isnan(found.final_m[row, column])
                continue
            distances = []
            for tenth in range(1, round(horizon_s * 10) + 1):
                error = [np.interp(tenth / 10, T_IDXS_S, (predicted - truth)[row, :, axis]) for axis in range(2)]
                distances.append(np.hypot(*error))
            assert found.average_m[row, column] == pytest.approx(np.mean(distances))
            assert found.final_m[row, column] == pytest.approx(distances[-1])
    reached = scores.is_reached(num_points, scores.HORIZONS_S)
    assert (np.isfinite(found.final_m) == reached).all()
    assert reached.tolist() == [[True] * 5, [True, True, False, False, False], [True] + [False] * 4, [False] * 5]


def test_the_average_is_one_over_time_and_not_over_points():
    """An error that grows as t: the mean over (0, 10] is 5 m; over the points it would be a third of 10 m."""
    truth = scores.constant_velocity_paths(np.array([9.0]))
    errors = scores.path_errors(scores.constant_velocity_paths(np.array([10.0])), truth, whole(1))
    assert errors.final_m == pytest.approx(np.array([scores.HORIZONS_S]))
    assert errors.average_m == pytest.approx((np.array([scores.HORIZONS_S]) + 0.1) / 2)  # of 0.1, 0.2 ... h
    assert T_IDXS_S.mean() == pytest.approx(3.39, abs=0.01)


def test_a_shared_bend_costs_the_interpolation_nothing():
    bend = scores.constant_curvature_paths(np.array([20.0]), np.array([0.3]))
    errors = scores.path_errors(bend + np.array([3.0, -4.0]), bend, whole(1))
    assert errors.final_m == pytest.approx(5.0)
    assert errors.average_m == pytest.approx(5.0)


def test_what_lies_past_the_truth_does_not_count():
    predicted, truth = np.zeros((1, 33, 2)), np.zeros((1, 33, 2))
    predicted[:, 20:] = 1e6
    errors = scores.path_errors(predicted, truth, np.array([20]))
    assert errors.final_m[0, :3].tolist() == [0, 0, 0]
    assert np.isnan(errors.final_m[0, 3:]).all()
    scale = np.ones((1, 33, 2))
    assert scores.scale_calibration(predicted, scale, truth, np.array([20])).error_m == pytest.approx(0)


@pytest.mark.parametrize("yaw_rate", [0.0, 1e-12, 0.2, -0.35])
def test_constant_curvature_is_the_integral_of_its_heading(yaw_rate):
    path = scores.constant_curvature_paths(np.array([12.0]), np.array([yaw_rate]))[0]
    for t, (x, y) in zip(T_IDXS_S, path, strict=True):
        assert x == pytest.approx(quad(lambda s: 12 * np.cos(yaw_rate * s), 0, t)[0], abs=1e-9)
        assert y == pytest.approx(-quad(lambda s: 12 * np.sin(yaw_rate * s), 0, t)[0], abs=1e-9)


def test_constant_velocity_goes_straight_on():
    path = scores.constant_velocity_paths(np.array([12.0, 0.0, -2.0]))
    assert path[..., 0] == pytest.approx(np.outer([12.0, 0.0, -2.0], T_IDXS_S))
    assert not path[..., 1].any()


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_the_scale_of_a_laplace_distribution_is_found_calibrated_or_not(factor):
    scale = np.exp(RNG.normal(size=(4000, 33, 2)))
    truth = RNG.normal(size=(4000, 33, 2))
    found = scores.scale_calibration(truth + RNG.laplace(scale=scale), scale * factor, truth, whole(4000))
    laplace = stats.laplace(scale=1 / factor)
    for inside, share in ((found.inside_50, 0.5), (found.inside_90, 0.9)):
        half = stats.laplace.ppf((1 + share) / 2)
        assert inside.mean() == pytest.approx(laplace.cdf(half) - laplace.cdf(-half), abs=0.01)
    assert found.scale_m.mean() / found.error_m.mean() == pytest.approx(factor, rel=0.02)


def test_calibration_weighs_a_point_by_its_time():
    """Truth inside the interval before 5 s and outside after: half of the time, two thirds of the points."""
    truth, scale = np.zeros((2, 33, 2)), np.ones((2, 33, 2))
    mean = np.where(T_IDXS_S < 5, 0.1, 9.0)[None, :, None] * np.ones((2, 33, 2))
    found = scores.scale_calibration(mean, scale, truth, np.array([33, 0]))
    assert found.inside_50[0] == pytest.approx(0.5, abs=0.03)
    assert found.error_m[0] == pytest.approx((0.1 + 9) / 2, abs=0.3)
    for values in (found.inside_50, found.inside_90, found.scale_m, found.error_m):
        assert np.isnan(values[1])
    assert found.scale_m[0] == pytest.approx(1)


def test_lanes_count_where_they_are():
    truth = np.zeros((3, 4, 33, 2))
    predicted = truth + np.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
    predicted[..., 1] *= -1
    probability = np.array([[1, 1, 1, 1], [0.1, 0.5, 0.9, 0.49], [0, 0, 0, 0]])
    found = scores.lane_l1_m(predicted, truth, probability)
    assert found[:2] == pytest.approx([2.5, 2.5])
    assert np.isnan(found[2])
    by_hand = RNG.normal(size=(1, 4, 33, 2))
    assert scores.lane_l1_m(by_hand, truth[:1], np.array([[0, 0, 1, 0]])) == pytest.approx(np.abs(by_hand[0, 2]).mean())


def test_no_constant_path_or_lane_is_nearer_in_a_coordinate_than_the_median():
    paths, points = RNG.normal(size=(6, 33, 2)), np.array([33, 33, 33, 10, 10, 0])
    found = scores.median_path_m(paths, points)
    lines, probability = RNG.normal(size=(6, 2, 33, 2)), np.array([[0.9, 0.1]] * 3 + [[0.1, 0.2]] * 3)
    lanes = scores.median_lanes_m(lines, probability)
    for at, known in ((0, paths[:5, 0]), (9, paths[:5, 9]), (10, paths[:3, 10]), (32, paths[:3, 32])):
        for other in np.vstack([found[at] + [0, 1e-3], found[at] - [0, 1e-3], known]):
            assert np.abs(known - found[at]).sum() <= np.abs(known - other).sum()
    np.testing.assert_array_equal(lanes[0], np.median(lines[:3, 0], axis=0))
    np.testing.assert_array_equal(lanes[1], np.median(lines[:, 1], axis=0))  # it never is there
    assert scores.median_path_m(paths, np.zeros(6, dtype=int)).size == 0
    assert scores.median_lanes_m(lines[:0], probability[:0]).size == 0


def test_the_best_hypothesis_is_the_likeliest():
    mean, logit = RNG.normal(size=(5, 3, 33, 2)), RNG.normal(size=(5, 3))
    best = scores.best_hypothesis(mean, logit)
    for row in range(5):
        likeliest = max(range(3), key=lambda hypothesis: logit[row, hypothesis])
        assert (best[row] == mean[row, likeliest]).all()
