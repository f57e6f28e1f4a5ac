"""Waypoints against closed forms, actions against an independent least squares, and what a model is told of both."""

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError
from omni_cli.recipe import Prediction
from omni_cli.recipes.vlm.forecast import Forecast
from omni_cli.samples.answer_formats import FORMATS, GRID_S, SPOKEN
from omni_cli.samples.prompts import parse_answer, render_answer
from omni_cli.samples.splits import time_split
from omni_cli.samples.sync import MOTION_GAP
from omni_cli.samples.unicycle import actions_from_path, is_drivable, path_from_actions, speed_from_history
from omni_cli.samples.waypoints import (
    NO_CAR,
    NO_FUTURE,
    NO_PAST,
    NUM_HISTORY,
    WAYPOINT_TARGETS,
    known_waypoints,
    waypoint_tables,
    waypoints_at,
)
from omni_cli.scene.recording import Recording, SpeedLog
from omni_cli.sources.comma2k19 import Comma2k19
from omni_cli.world.motion import random_drive, winding_drive
from tests.support.drives import circle, drive, preprocess

HISTORY_S = np.arange(-15, 1) * 0.1
ARCS = [(10.0, 0.2), (25.0, 0.02), (3.0, 0.5), (0.0, 0.0), (0.2, 0.02), (20.0, 0.0), (-2.0, 0.2), (15.0, -0.3)]


def arc(speed, yaw_rate, time_s):
    """Positions and headings of a car on a circle; x forward, y left."""
    turn = yaw_rate * time_s
    chord = speed * time_s * np.sinc(turn / 2 / np.pi)
    return np.stack([chord * np.cos(turn / 2), chord * np.sin(turn / 2)], axis=1), turn


def all_train(_start_us, _end_us):
    return "train"


cut = partial(waypoint_tables, stride=4, max_age_us=100_000, assign_split=all_train)


@given(
    st.floats(-15, 30).filter(lambda v: abs(v) > 0.5),
    st.floats(-0.5, 0.5).filter(lambda w: abs(w) > 1e-3),
    st.integers(1_600_000, 1_900_000),
)
@settings(max_examples=25, deadline=None)
def test_a_circle_in_closed_form_on_a_hill(speed, yaw_rate, at_us):
    ego = circle(9, speed_mps=speed, yaw_rate=yaw_rate)
    tilt = Rotation.from_euler("ZYX", [70, 4, -3], degrees=True)  # the anchor is where the log began, not the rig
    tilted = replace(
        ego,
        position_m=tilt.apply(ego.position_m) + np.array([5.0, -7.0, 3.0]),
        quaternion_xyzw=(tilt * Rotation.from_quat(ego.quaternion_xyzw)).as_quat(),
    )
    path = waypoints_at(Recording("x", "test", {}, ego=tilted), np.array([at_us]))[at_us]
    xy, yaw = arc(speed, yaw_rate, np.concatenate([HISTORY_S, GRID_S]))
    np.testing.assert_allclose(path.xyz_m[:, :2], xy, atol=1e-5)
    np.testing.assert_allclose(path.xyz_m[:, 2], 0, atol=1e-8)
    np.testing.assert_allclose(path.yaw_rad, yaw, atol=1e-8)
    assert path.speed_mps == pytest.approx(speed, rel=2e-4, abs=1e-3)
    np.testing.assert_allclose(path.actions[:, 0], 0, atol=0.02)
    if abs(speed) > 8:  # the ridge makes the curvature of a slow car smaller
        np.testing.assert_allclose(path.actions[:, 1], yaw_rate / speed, rtol=1e-3, atol=1e-5)


def test_nothing_is_extrapolated_and_every_window_left_out_has_its_reason(tmp_path):
    recording = drive(tmp_path, seconds=10.0, cameras=("front",))  # poses from -3 ms to 11.0 s
    grid = preprocess(cameras=("front",), num_frames=4, columns=1)
    tables = cut(recording, grid)
    ends = tables.windows["end_us"].to_numpy()
    last = recording.ego.span_us[1]
    assert ends.min() >= 1_500_000 - 3_217
    assert ends.max() + 6_400_000 <= last
    starts = np.arange(100_000, 10_000_000, 400_000)  # brute force: every window of the grid
    starts = starts[starts + 300_000 <= 100_000 + 9_966_667]
    late, early = (starts + 300_000 + 6_400_000 > last).sum(), (starts + 300_000 - 1_500_000 < -3_217).sum()
    assert tables.dropped == {NO_FUTURE: late, NO_PAST: early}
    assert len(ends) == len(starts) - late - early
    xyz = np.array(tables.windows["future_xyz_m"].to_pylist()).reshape(len(ends), 64, 3)
    np.testing.assert_allclose(xyz[..., :2], np.broadcast_to(arc(10.0, 0.2, GRID_S)[0], (len(ends), 64, 2)), atol=1e-5)
    past = np.array(tables.windows["history_xyz_m"].to_pylist()).reshape(len(ends), 16, 3)
    np.testing.assert_allclose(past[0, :, :2], arc(10.0, 0.2, HISTORY_S)[0], atol=1e-5)
    assert {field.name for field in WAYPOINT_TARGETS} < set(tables.windows.column_names)
    assert not any(column.null_count for column in tables.windows.columns)


def test_a_gap_in_the_future_drops_a_window_and_so_does_a_leap(tmp_path):
    recording = drive(tmp_path, seconds=9.0, cameras=("front",))
    grid = preprocess(cameras=("front",), num_frames=4, columns=1)
    ego = recording.ego
    kept = (ego.timestamp_us < 7_000_000) | (ego.timestamp_us > 7_400_000)
    gap = replace(ego, **{name: getattr(ego, name)[kept] for name in vars(ego)})
    with pytest.raises(DataError, match=f"dropped: .* because {MOTION_GAP}"):
        cut(replace(recording, ego=gap), grid)
    position = ego.position_m.copy()
    position[ego.timestamp_us > 6_000_000] += [0.0, 15.0, 0.0]  # as a satellite fix that jumps
    with pytest.raises(DataError, match=f"because {NO_CAR}"):
        cut(replace(recording, ego=replace(ego, position_m=position)), grid)


def test_a_source_without_poses_is_refused_in_one_line(tmp_path):
    recording = drive(tmp_path, seconds=3.0, cameras=("front",))
    log = SpeedLog(recording.ego.timestamp_us, np.full(401, 10.0), np.zeros(401))
    expected = "drive: has a speed log alone; waypoints need poses, choose --labels ego-motion or another source"
    with pytest.raises(DataError, match=f"^{expected}$"):
        cut(replace(recording, ego=None, speed=log), preprocess(cameras=("front",), columns=1))
    assert known_waypoints(replace(recording, ego=None, speed=log), []) == []


def test_what_a_training_window_tells_ends_before_validation_begins(tmp_path):
    recording = drive(tmp_path, seconds=20.0, cameras=("front",))
    split = partial(time_split, first_us=100_000, last_us=20_000_000, validation=0.4, gap_s=1.0)
    tables = waypoint_tables(
        recording,
        preprocess(cameras=("front",), num_frames=4, columns=1),
        stride=1,
        max_age_us=100_000,
        assign_split=split,
    )
    ends, starts = (tables.windows[name].to_numpy() for name in ("end_us", "start_us"))
    is_train = np.array(tables.windows["split"].to_pylist()) == "train"
    boundary = 100_000 + 0.6 * 19_900_000
    assert ends[is_train].max() + 6_400_000 <= boundary - 1_000_000
    assert (ends[~is_train] - 1_500_000).min() >= boundary
    assert is_train.any()
    assert starts[~is_train].size


# -- actions


def reference_actions(xy, yaw, speed):
    """The same problems as stacked rows for numpy's own least squares."""
    dt, num = 0.1, len(xy)

    def rough(size, order, weight):
        return np.sqrt(weight) / dt**order * np.diff(np.eye(size), order, axis=0)

    def solve(rows, values):
        return np.linalg.lstsq(np.vstack(rows), np.concatenate(values), rcond=None)[0]

    third = rough(num + 1, 3, 1e-6)
    theta = solve([np.eye(num), third[:, 1:], 1e-4 * np.eye(num)], [yaw, np.zeros(len(third)), np.zeros(num)])
    theta = np.append(0.0, theta)
    steps = 2 / dt * np.diff(xy, axis=0, prepend=np.zeros((1, 2)))
    data = np.zeros((2 * num, num + 1))
    for k in range(num):
        for axis, function in enumerate((np.cos, np.sin)):
            data[2 * k + axis, [k, k + 1]] = function(theta[k]), function(theta[k + 1])
    rows, ridge = np.vstack([data, third]), 1e-2 * np.eye(num)
    values = np.concatenate([steps.ravel(), np.zeros(len(third))]) - rows[:, 0] * speed
    v = np.append(speed, solve([rows[:, 1:], ridge], [values, np.zeros(num)]))
    second, ridge = rough(num, 2, 1e-4), 1e-2 * np.eye(num)
    none = [np.zeros(len(second)), np.zeros(num)]
    a = solve([np.eye(num), second, ridge], [np.diff(v) / dt, *none])
    way = dt * v[:-1] + dt**2 / 2 * a
    return np.stack([a, solve([np.diag(way), second, ridge], [np.diff(theta), *none])], axis=1)


@pytest.mark.parametrize(("speed", "yaw_rate"), ARCS)
def test_actions_are_those_of_an_independent_least_squares_and_drive_the_arc(speed, yaw_rate):
    rng = np.random.default_rng(0)
    (xy, yaw), (past_xy, past_yaw) = arc(speed, yaw_rate, GRID_S), arc(speed, yaw_rate, HISTORY_S)
    start = speed_from_history(past_xy, past_yaw)
    noisy = xy + rng.normal(0, 0.01, xy.shape), yaw + rng.normal(0, 0.001, yaw.shape)
    for path in ((xy, yaw), noisy):
        np.testing.assert_allclose(
            actions_from_path(*path, start), reference_actions(*path, start), atol=1e-7, rtol=1e-6
        )
    found, heading = path_from_actions(actions_from_path(xy, yaw, start), start)
    assert np.linalg.norm(found - xy, axis=1).max() < 0.03  # of up to 160 m
    assert np.abs(heading - yaw).max() < 0.03


def paths_of(ego, every_us=800_000):
    first, last = ego.span_us
    at_us = np.arange(first + 1_500_000, last - 6_400_000, every_us)
    return list(waypoints_at(Recording("x", "test", {}, ego=ego), at_us).values())


def round_trip_m(path):
    found, _ = path_from_actions(path.actions, path.speed_mps)
    return np.linalg.norm(found - path.xyz_m[NUM_HISTORY:, :2], axis=1).max()


@pytest.mark.parametrize("kind", ["gentle", "winding"])
def test_synthetic_drives_come_back_from_their_actions(kind):
    errors = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        gentle = random_drive(rng, seconds=20, start_phase=seed / 6)
        driven = gentle if kind == "gentle" else winding_drive(rng, seconds=20)
        for path in paths_of(driven.log()):
            assert is_drivable(path.actions)
            errors.append(round_trip_m(path))
    assert max(errors) < 0.04  # measured: 3.5 cm gentle (near a standstill), 1.1 cm winding
    assert np.median(errors) < 0.01


def test_no_car_leaps():
    xy, yaw = arc(10.0, 0.1, GRID_S)
    assert is_drivable(actions_from_path(xy, yaw, 10.0))
    xy[30:] += [0.0, 8.0]
    assert not is_drivable(actions_from_path(xy, yaw, 10.0))


@pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
@pytest.mark.real_data
def test_real_poses_come_back_from_their_actions():
    source = Comma2k19(Path(os.environ["OMNI_REAL_DATA"]) / "comma2k19_example1")
    recording = source.open(source.recordings()[0].id)
    paths = paths_of(recording.ego, 500_000)
    errors = [round_trip_m(path) for path in paths]
    assert len(paths) > 90
    assert all(is_drivable(path.actions) for path in paths)
    assert max(errors) < 0.25  # measured: 0.20 m of 113 m, where the heading is off the track by a tenth of a degree
    assert np.median(errors) < 0.12
    speed = [path.speed_mps for path in paths]
    assert 10 < min(speed) < max(speed) < 21


# -- what is said


def test_the_answer_letter_for_letter():
    xyz = np.column_stack([*arc(10.0, -0.02, GRID_S)[0].T, 0 * GRID_S])
    assert render_answer("waypoints", {"future_xyz_m": xyz.ravel()}) == (
        "Waypoints: 5.0,0.0 10.0,-0.1 15.0,-0.2 20.0,-0.4 25.0,-0.6 30.0,-0.9 35.0,-1.2 40.0,-1.6 44.9,-2.0 "
        "49.9,-2.5 54.9,-3.0 59.9,-3.6 63.8,-4.1"
    )


@pytest.mark.parametrize("labels", ["waypoints", "reasoning"])
def test_the_spoken_waypoints_tell_the_others_to_their_precision(labels):
    for seed in range(4):
        drives = (winding_drive(np.random.default_rng(seed), seconds=12), random_drive(
            np.random.default_rng(seed), seconds=12, start_phase=seed / 4))  # fmt: skip
        for path in (path for one in drives for path in paths_of(one.log())):
            said = render_answer(labels, {**path.columns(), "reasoning": "Slow down because of a bend."})
            values = parse_answer(labels, said)
            truth = path.xyz_m[NUM_HISTORY:, :2]
            np.testing.assert_allclose(values["xy_m"][list(SPOKEN)], truth[list(SPOKEN)], atol=0.0501)
            assert np.linalg.norm(values["xy_m"] - truth, axis=1).max() < 0.12
            assert ("reasoning" in values) == (labels == "reasoning")
            assert not re.search(r"-0\.0(?!\d)", said)


def test_a_parked_car_says_zeros_and_reads_back():
    values = parse_answer("waypoints", render_answer("waypoints", FORMATS["waypoints"].zero))
    np.testing.assert_array_equal(values["xy_m"], np.zeros((64, 2)))


GOOD = "Waypoints: " + " ".join(f"{k}.0,0.0" for k in range(1, 14))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Waypoints: 1.0,2.0",
        GOOD.rpartition(" ")[0],  # one too few
        GOOD + " 14.0,0.0",  # one too many
        GOOD + "7",
        GOOD.replace("3.0,", "nan,"),
        GOOD.replace(" 5.0,0.0", " 5.0;0.0"),
        "Speed 012 m/s.",
    ],
)
def test_an_unreadable_path_is_none(text):
    assert parse_answer("waypoints", GOOD) is not None
    assert parse_answer("waypoints", text) is None
    assert parse_answer("reasoning", GOOD) is None  # a reason was asked for


def rows_of(paths):
    return [path.columns() for path in paths]


def test_baselines_and_errors_on_a_circle():
    paths = [
        waypoints_at(Recording("x", "test", {}, ego=circle(9, speed_mps=8.0, yaw_rate=rate)), np.array([2_000_000]))[
            2_000_000
        ]
        for rate in (0.1, -0.3)
    ]
    rows, forecast = rows_of(paths), Forecast(says_why=False)
    medians = forecast.medians(rows)
    said = forecast.baselines(rows, medians, past_speed=False)
    assert list(said) == ["constant median", "stationary", "constant velocity", "constant curvature"]
    errors = {name: forecast.errors(one, rows, medians) for name, one in said.items()}
    assert errors["constant curvature"]["fde_6.4s"].max() < 0.02
    straight = np.stack([8.0 * GRID_S, 0 * GRID_S], axis=1)
    for number, rate in enumerate((0.1, -0.3)):
        truth = arc(8.0, rate, GRID_S)[0]
        for horizon, steps in ((1, 10), (2, 20), (3, 30), (6.4, 64)):
            apart = np.linalg.norm(straight - truth, axis=1)[:steps]
            assert errors["constant velocity"][f"ade_{horizon}s"][number] == pytest.approx(apart.mean(), abs=0.02)
            assert errors["constant velocity"][f"fde_{horizon}s"][number] == pytest.approx(apart[-1], abs=0.02)
            still = np.linalg.norm(truth, axis=1)[:steps].mean()
            assert errors["stationary"][f"ade_{horizon}s"][number] == pytest.approx(still, abs=1e-6)
    unreadable = forecast.errors([Prediction("?", None)] * 2, rows, medians)
    for key, values in unreadable.items():
        np.testing.assert_array_equal(values, errors["constant median"][key])
    assert {metric.key for metric in forecast.metrics} == set(unreadable)
    assert np.isnan(forecast.pairs([Prediction("?", None)], rows[:1])[0].predicted).all()
    assert forecast.pairs(said["constant curvature"], rows)[1].truth[0] > 0  # to the left


def test_people_and_json_are_told_the_same():
    forecast, xy = Forecast(says_why=False), arc(8.0, -0.3, GRID_S)[0]
    assert forecast.caption({"xy_m": xy}) == f"in 3 s {xy[29, 0]:.1f} m ahead, {-xy[29, 1]:.1f} m right"
    assert forecast.caption(None) == "no readable answer"
    assert forecast.caption({}) == "unknown"
    assert forecast.plain({"xy_m": xy})["xy_m"][63] == [round(xy[63, 0], 3), round(xy[63, 1], 3)]
