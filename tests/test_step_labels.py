"""Targets of a driving student against brute force: what the car's own model said, desires, which steps count."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from omni_cli.errors import DataError
from omni_cli.samples.driven_path import DrivenPaths
from omni_cli.samples.step_labels import (
    Looks,
    Scene,
    counted,
    desire_pulses,
    driven_labels,
    from_the_camera,
    logged_labels,
)
from omni_cli.scene.driving_log import DesireLog, DeviceLog, FixLog, LoggedModel, MountLog
from omni_cli.scene.recording import Recording

STEP_US = 200_000
FRAME_US = 50_000


def looks_at(timestamp_us, instants_us=None) -> Looks:
    """Looks without pictures."""
    times_us = np.asarray(timestamp_us, np.int64)
    instants = np.arange(len(times_us)) * STEP_US if instants_us is None else np.asarray(instants_us, np.int64)
    nothing = np.zeros(len(times_us), np.int64)
    return Looks(instants, times_us, (), np.zeros((len(times_us), 2), np.int64), nothing, False)


def driven(count: int) -> DrivenPaths:
    rng = np.random.default_rng(5)
    paths = rng.normal(size=(count, 33, 2)).astype(np.float32)
    return DrivenPaths(paths, rng.integers(0, 34, count), rng.random(count), rng.random(count))


def recording(device: DeviceLog | None) -> Recording:
    return Recording("drive", "test", {}, device=device)


# -- where memories begin


def test_memories_begin_where_there_is_no_look_a_step_before():
    looks = looks_at(np.zeros(6), [400_000, 600_000, 800_000, 1_200_000, 1_400_000, 2_000_000])
    assert looks.begins.tolist() == [True, False, False, True, False, True]


# -- the car itself


def test_the_car_teaches_the_path_that_it_drove():
    paths = driven(4)
    labels = driven_labels(recording(None), looks_at(np.arange(4)), paths)
    assert labels.scene is None
    np.testing.assert_array_equal(labels.xy_m, paths.xy_m)
    np.testing.assert_array_equal(labels.num_points, paths.num_points)


# -- the car's own model


def logged_model(timestamp_us) -> LoggedModel:
    rng = np.random.default_rng(len(timestamp_us))
    shapes = [(33, 3), (4, 33, 2), (4,), (2, 33, 2), (3, 4), (3,)]
    said = [rng.normal(size=(len(timestamp_us), *shape)).astype(np.float32) for shape in shapes]
    return LoggedModel(np.asarray(timestamp_us, np.int64), *said)


@given(
    at=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(sorted),
    logged=st.lists(st.tuples(st.integers(0, 40), st.integers(-1500, 1500)), min_size=1, max_size=20),
)
@example(at=[3], logged=[(3, 1000)])
@example(at=[3], logged=[(3, -1001), (4, 0)])
def test_the_cars_model_is_matched_by_the_true_time_of_its_frame(at, logged):
    model_us = np.array(sorted({frame * FRAME_US + jitter for frame, jitter in logged}))
    model_us = model_us[np.diff(model_us, prepend=-FRAME_US) > 5000]  # one word a frame
    model, times_us = logged_model(model_us), np.array(at) * FRAME_US
    rows = [[row for row, time in enumerate(model_us) if abs(time - at_us) <= 1000] for at_us in times_us]
    device = DeviceLog(model=model)
    if not any(rows):
        with pytest.raises(DataError, match=rf"drive: modelV2 was logged at none of the {len(at)} frames looked at; u"):
            logged_labels(recording(device), looks_at(times_us), driven(len(at)))
        return
    labels = logged_labels(recording(device), looks_at(times_us), driven(len(at)))
    assert labels.scene is not None
    assert labels.scene.is_known.tolist() == [bool(found) for found in rows]
    assert labels.num_points.tolist() == [33 if found else 0 for found in rows]
    for step, found in enumerate(rows):
        path = model.path_m[found[0]] if found else np.zeros((33, 3), np.float32)
        np.testing.assert_array_equal(labels.xy_m[step], path[:, :2] - np.float32([path[0, 0], 0]))
        for field in fields(Scene)[1:]:
            said, expected = getattr(labels.scene, field.name)[step], getattr(model, field.name)
            np.testing.assert_array_equal(said, expected[found[0]] if found else 0 * expected[0])


@pytest.mark.parametrize("device", [None, DeviceLog()])
def test_a_log_without_a_model_names_the_remedy(device):
    with pytest.raises(DataError, match="drive: its log holds no modelV2; take another teacher, or the rlog in place"):
        logged_labels(recording(device), looks_at([0]), driven(1))


def test_a_models_path_is_moved_to_begin_at_the_camera_and_keeps_its_shape():
    path_m = logged_model([0, 1]).path_m
    moved = from_the_camera(path_m)
    assert (moved[:, 0, 0] == 0).all()
    assert (moved[:, :, 1] == path_m[:, :, 1]).all()
    np.testing.assert_allclose(np.diff(moved, axis=1), np.diff(path_m[:, :, :2], axis=1), atol=1e-6)


# -- desires


def pulses_of_a_car(log: DesireLog, instants_us) -> list[int]:
    """One word of the log after the other, as `modeld.py` sees them: what was not wanted before is told once."""
    told = [0] * len(instants_us)
    before = np.eye(8)[log.desire[0]]
    for time_us, desire in zip(log.timestamp_us[1:].tolist(), log.desire[1:].tolist(), strict=True):
        now = np.eye(8)[desire]
        new = np.where(now - before > 0.99, now, 0)
        new[0], before = 0, now
        for step, instant_us in enumerate(instants_us):
            if instant_us - STEP_US < time_us <= instant_us and new.any():
                told[step] = int(new.argmax())
    return told


@given(
    times=st.lists(st.integers(-40, 220), min_size=1, max_size=60, unique=True).map(sorted),
    data=st.data(),
    kept=st.lists(st.integers(0, 10), min_size=1, max_size=11, unique=True).map(sorted),
)
def test_a_desire_is_told_once_where_it_begins(times, data, kept):
    desires = data.draw(st.lists(st.sampled_from([0, 0, 3, 4]), min_size=len(times), max_size=len(times)))
    log = DesireLog(np.array(times) * 10_000, np.array(desires))
    instants_us = np.array(kept) * STEP_US  # windows may have been dropped in between
    assert desire_pulses(log, instants_us).tolist() == pulses_of_a_car(log, instants_us.tolist())


def test_a_desire_that_is_held_is_no_pulse_and_neither_is_its_end():
    log = DesireLog(np.arange(8) * 100_000, np.array([0, 3, 3, 3, 3, 3, 0, 0]))
    assert desire_pulses(log, np.arange(1, 5) * STEP_US).tolist() == [3, 0, 0, 0]


def test_a_desire_that_ends_within_a_step_is_told():
    log = DesireLog(np.array([0, 250_000, 300_000, 350_000]), np.array([0, 4, 0, 0]))
    assert desire_pulses(log, np.arange(5) * STEP_US).tolist() == [0, 0, 4, 0, 0]


def test_what_a_log_begins_with_began_before_it():
    log = DesireLog(np.array([100_000, 500_000]), np.array([3, 3]))
    assert desire_pulses(log, np.arange(5) * STEP_US).tolist() == [0] * 5


def test_without_a_log_nothing_is_desired():
    assert desire_pulses(None, np.arange(3) * STEP_US).tolist() == [0, 0, 0]


# -- which steps count


def device_of(mount, fix) -> DeviceLog:
    """`mount` and `fix`: (time in units of 0.1 s, value) each."""

    def log(pairs):
        return np.array([time * 100_000 for time, _ in pairs]), np.array([value for _, value in pairs])

    mount_us, is_calibrated = log(mount)
    unknown = np.zeros((len(mount_us), 3))
    return DeviceLog(mount=MountLog(mount_us, unknown, unknown[:, 0], is_calibrated), fix=FixLog(*log(fix)))


words = st.dictionaries(st.integers(0, 80), st.booleans(), min_size=1).map(lambda said: sorted(said.items()))


@given(mount=words, fix=words, calibrated=st.booleans(), has_fix=st.booleans())
@example(mount=[(0, True)], fix=[(0, True)], calibrated=True, has_fix=True)
def test_a_step_counts_by_the_last_word_before_it_and_a_fix_by_a_fresh_one(mount, fix, calibrated, has_fix):
    instants_us = np.arange(-5, 90) * 100_000
    found = counted(device_of(mount, fix), instants_us, calibrated=calibrated, fix=has_fix)
    for instant_us, counts in zip(instants_us.tolist(), found.tolist(), strict=True):
        mounts = [value for time, value in mount if time * 100_000 <= instant_us]
        fixes = [(time * 100_000, value) for time, value in fix if time * 100_000 <= instant_us]
        is_calibrated = mounts[-1:] == [True]
        is_fixed = bool(fixes) and fixes[-1][1] and instant_us - fixes[-1][0] <= 2_500_000
        assert counts == ((is_calibrated or not calibrated) and (is_fixed or not has_fix))


@pytest.mark.parametrize("device", [None, DeviceLog()])
def test_what_is_not_logged_is_not_known(device):
    instants_us = np.arange(3) * STEP_US
    assert counted(device, instants_us, calibrated=False, fix=False).tolist() == [True] * 3
    assert counted(device, instants_us, calibrated=True, fix=False).tolist() == [False] * 3
    assert counted(device, instants_us, calibrated=False, fix=True).tolist() == [False] * 3
    whole = device_of([(0, True)], [(0, True)])
    assert counted(replace(whole, mount=None), instants_us, calibrated=True, fix=True).tolist() == [False] * 3
    assert counted(whole, instants_us, calibrated=True, fix=True).tolist() == [True] * 3
