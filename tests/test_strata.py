"""Kinds of driving and the best of several answers, against brute force and a definition written out."""

import math

import numpy as np
import pytest
from scipy import stats

from omni_cli.recipes.vlm.labels import LABELS
from omni_cli.scores.controls import derangement
from omni_cli.scores.drawn import best_of
from omni_cli.scores.intervals import paired_difference
from omni_cli.scores.strata import BANDS, MANOEUVRES, manoeuvres, mean_acceleration, speed_bands
from omni_cli.scores.waypoints import STEP_S, arcs, displacement_errors, path_lengths

RNG = np.random.default_rng(11)


def kinds(*of: tuple[float, float, float]) -> list[str]:
    return [MANOEUVRES[one] for one in manoeuvres(*np.array(of, dtype=float).T)]


def test_a_manoeuvre_is_told_by_rates():
    turn = math.pi / 6 / 8  # Waymo's pi/6 over its 8 s
    assert kinds(
        (0.6, 0, 0), (5 / 8, 0, 0), (9, 0, turn), (9, 0, -turn), (9, -3, 0.99 * turn), (9, 3, 0), (9, 0.9, 0)
    ) == ["standing", "straight", "left", "right", "braking", "accelerating", "straight"]  # fmt: skip
    assert kinds((0.1, -3, 1)) == ["standing"]
    assert kinds((-5, 3, 0), (-5, -3, 0)) == ["braking", "accelerating"]  # backward
    nan = math.nan
    assert kinds((9, 0, nan), (0.1, 0, nan), (nan, 0, 0), (9, nan, 0)) == ["unknown", "standing", "unknown", "unknown"]


def test_speed_bands_have_edges_that_belong_to_the_faster_one():
    found = speed_bands(np.array([0, 1.99, 2, 6.9, -7, 13, 14, 22, 80, np.nan]))
    assert [BANDS[one].split()[0] for one in found] == [
        "under",
        "under",
        "2",
        "2",
        "7",
        "7",
        "14",
        "22",
        "22",
        "unknown",
    ]


def test_the_acceleration_of_a_mean_speed_by_integration():
    start, acceleration, duration_s = 8.0, -1.7, 2.5
    times_s = np.linspace(0, duration_s, 100_001)
    mean = np.trapezoid(start + acceleration * times_s, times_s) / duration_s
    found = mean_acceleration(np.array([start]), np.array([mean]), np.array([duration_s]))
    assert found == pytest.approx(acceleration)
    assert np.isnan(mean_acceleration(np.ones(1), np.ones(1), np.zeros(1))).all()


def future(speed_mps: float, yaw_rate_radps: float, acceleration_mps2: float = 0.0) -> dict:
    """A row of waypoints of a car that keeps its turn; with an acceleration, of one that goes straight on."""
    xy_m = arcs(np.array([speed_mps]), np.array([yaw_rate_radps]), 64)[0]
    times_s = STEP_S * np.arange(1, 65)
    if acceleration_mps2:
        xy_m = np.stack([speed_mps * times_s + acceleration_mps2 * times_s**2 / 2, 0 * times_s], axis=1)
    xyz_m = np.column_stack([xy_m, np.zeros(64)]).ravel()
    return {"end_speed_mps": speed_mps, "future_xyz_m": xyz_m, "future_yaw_rad": yaw_rate_radps * times_s}


def test_waypoints_are_told_apart_by_what_is_ahead():
    rows = [future(10, 0), future(10, 0.1), future(10, -0.1), future(0.3, 0), future(12, 0, -1.5), future(3, 0, 2.0)]
    by_manoeuvre, by_speed = LABELS["waypoints"].answers.strata(rows)
    names = [by_manoeuvre.names[one] for one in by_manoeuvre.of]
    assert names == ["straight", "left", "right", "standing", "braking", "accelerating"]
    assert [by_speed.names[one] for one in by_speed.of] == [BANDS[one] for one in (2, 2, 2, 0, 2, 1)]
    assert by_speed.where("7 to 14 m/s").tolist() == [True, True, True, False, True, False]


def test_windows_of_motion_are_told_apart_by_what_happened_in_them():
    def row(**changed):
        still = {"start_us": 0, "end_us": 1_500_000, "mean_speed_mps": 10.0, "start_speed_mps": 10.0, "dyaw_rad": 0.0}
        return {**still, **changed}

    rows = [row(), row(dyaw_rad=0.2), row(start_speed_mps=12.0), row(dyaw_rad=float("nan")), row(end_us=0)]
    by_manoeuvre, by_speed = LABELS["speed"].answers.strata(rows)
    names = [by_manoeuvre.names[one] for one in by_manoeuvre.of]
    assert names == ["straight", "left", "braking", "unknown", "unknown"]
    assert {by_speed.names[one] for one in by_speed.of} == {"7 to 14 m/s"}


def test_the_length_of_an_arc_is_speed_times_time():
    assert path_lengths(arcs(np.array([10.0, 0.0]), np.array([0.2, 0.0]), 64)) == pytest.approx([64.0, 0.0], rel=1e-3)


def test_min_ade_k_by_brute_force():
    """Window by window, draw by draw, point by point; unreadable draws count for nothing, all of them as the constant.

    nuscenes-devkit's min_ade_k and min_fde_k take each minimum by itself, as here.
    """
    truth, draws = RNG.normal(size=(6, 64, 2)), RNG.normal(size=(5, 6, 64, 2))
    readable = RNG.random((5, 6)) < 0.6
    readable[:, 2], readable[:, 3] = False, True
    instead = RNG.random((2, 6, 4))
    found = [displacement_errors(one, truth) for one in draws]
    for kind in (0, 1):
        for column, steps in enumerate((10, 20, 30, 64)):
            errors = [one[kind][:, column] for one in found]
            best = best_of(errors, readable, instead[kind, :, column])
            for window in range(6):
                told = [
                    [math.dist(draws[draw, window, step], truth[window, step]) for step in range(steps)]
                    for draw in range(5) if readable[draw, window]
                ]  # fmt: skip
                each = [sum(apart) / steps if kind == 0 else apart[-1] for apart in told]
                assert best[window] == pytest.approx(min(each, default=instead[kind, window, column]))


def test_k_copies_of_an_answer_are_as_good_as_one():
    error = RNG.random(7)
    assert (best_of([error] * 4, np.ones((4, 7), bool), error + 1) == error).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_in_a_derangement_nothing_keeps_its_place_and_each_is_as_likely(count):
    generator = np.random.default_rng(0)
    drawn = [tuple(derangement(count, generator)) for _ in range(600)]
    assert all(sorted(one) == list(range(count)) and (np.array(one) != np.arange(count)).all() for one in drawn)
    seen = np.array([drawn.count(one) for one in set(drawn)])
    assert len(seen) == {2: 1, 3: 2, 4: 9}[count]  # the subfactorials
    assert stats.chisquare(seen).pvalue > 1e-3 if count > 2 else seen == 600
    with pytest.raises(ValueError, match="keeps its place"):
        derangement(1, generator)


def test_a_paired_difference_of_independent_recordings_agrees_with_scipy():
    ones = RNG.gamma(2, 2, size=60)
    others = ones + RNG.normal(-0.3, 0.5, size=60)

    for windows in (1, 3):  # of each recording
        recordings = [str(number // windows) for number in range(60)]
        mean, interval = paired_difference(ones, others, recordings)
        theirs = stats.ttest_1samp((others - ones).reshape(-1, windows).mean(axis=1), 0).confidence_interval()
        assert mean == pytest.approx((others - ones).mean())
        assert interval == pytest.approx((theirs.low, theirs.high))


def test_a_paired_difference_of_uneven_recordings_leaves_out_one_after_the_other():
    recordings = np.repeat(np.arange(5), (1, 9, 3, 4, 20))
    apart = RNG.normal(size=37)
    _, (low, high) = paired_difference(np.zeros(37), apart, recordings.astype(str).tolist())
    means = np.array([apart[recordings != one].mean() for one in range(5)])
    error = math.sqrt(4 / 5 * sum((mean - apart.mean()) ** 2 for mean in means))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, apart.mean(), error))


@pytest.mark.parametrize(("count", "is_even"), [(6, True), (6, False), (20, True)])
def test_equal_models_are_rarely_called_unequal(count, is_even):
    """A percentile bootstrap over recordings calls 16 of 100 pairs so at 6, and 8 at 20."""
    rng, found = np.random.default_rng(7), 0
    for _ in range(600):
        windows = np.full(count, 8) if is_even else np.clip(rng.lognormal(2, 0.8, count), 2, 60).astype(int)
        apart = np.repeat(rng.normal(size=count), windows) + rng.normal(size=windows.sum())
        _, (low, high) = paired_difference(0 * apart, apart, np.repeat(np.arange(count), windows).astype(str).tolist())
        found += not low <= 0 <= high
    assert 0.02 < found / 600 < 0.1


def test_pairs_tell_apart_what_their_own_intervals_cannot():
    """Both are wrong at the same windows; one is always a little less so."""
    recordings = np.repeat([str(number) for number in range(12)], 5).tolist()
    ones = np.repeat(RNG.gamma(1, 5, size=12), 5)
    _, (low, high) = paired_difference(ones, ones - 0.2 + RNG.normal(0, 0.05, size=60), recordings)
    assert -0.3 < low < high < -0.1
    assert paired_difference(ones, ones, ["one"] * 60) == (0.0, None)
