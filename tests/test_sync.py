"""Frames and labels are paired by time; every way of pairing by row gives another answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.samples.sync import MOTION_GAP, STALE_FRAME, common_span_us, plan_windows, time_grid
from omni_cli.samples.windows import ego_motion_tables
from tests.support.drives import CAMERAS, drive, grey_of, preprocess

TICK_US = 100_000


def plan(cameras, motion=None, **changes):
    settings = {"rate_hz": 10.0, "num_frames": 4, "stride": 2, "max_age_us": 50_000}
    return plan_windows(cameras, motion, **{**settings, **changes})


def latest_not_after(times, instant):
    """The definition, by brute force."""
    return max(index for index, time in enumerate(times) if time <= instant)


def increasing(low, high):
    return st.lists(st.integers(low, high), min_size=2, max_size=60, unique=True).map(
        lambda times: np.array(sorted(times), dtype=np.int64)
    )


@pytest.mark.fault("F18")
@given(st.lists(increasing(-500_000, 3_000_000), min_size=1, max_size=4), st.sampled_from([1.0, 7.5, 10.0, 30.0]))
def test_each_frame_is_the_last_one_not_after_its_instant(cameras, rate_hz):
    streams = {str(number): times for number, times in enumerate(cameras)}
    found = plan(streams, rate_hz=rate_hz, num_frames=2, stride=1, max_age_us=10**9)
    for window in found.windows:
        for instant, frames in zip(window.instants_us, window.frame_index, strict=True):
            assert list(frames) == [latest_not_after(times, instant) for times in cameras]
        assert window.max_age_us >= 0
        assert window.start_us >= max(times[0] for times in cameras)
        assert window.end_us <= min(times[-1] for times in cameras)


@pytest.mark.fault("F17", "F18")
@given(st.lists(increasing(0, 2_000_000), min_size=1, max_size=4), st.integers(0, 300_000))
def test_no_kept_window_has_a_frame_beyond_the_tolerance(cameras, max_age_us):
    """In any of its cameras; one that is shorter, or sees less often, moves no other."""
    streams = {str(number): times for number, times in enumerate(cameras)}
    found = plan(streams, max_age_us=max_age_us, stride=1)
    for window in found.windows:
        for number, times in enumerate(cameras):
            ages_us = window.instants_us - times[window.frame_index[:, number]]
            assert ((ages_us >= 0) & (ages_us <= max_age_us)).all()
    grid = time_grid(*common_span_us(streams, None), 10.0)
    assert len(found.windows) + sum(found.dropped.values()) == max(len(grid) - 3, 0)


def test_the_grid_is_whole_periods_inside_the_common_span():
    assert list(time_grid(-150_001, 210_000, 10.0)) == [-100_000, 0, 100_000, 200_000]
    assert list(time_grid(5, 4, 10.0)) == []


def test_a_dropped_frame_drops_only_the_windows_that_would_show_it_too_long():
    times = np.arange(0, 3_000_001, 33_333, dtype=np.int64)
    hole = times[(times < 1_000_000) | (times > 1_180_000)]
    found = plan({"front": hole}, stride=4)
    assert found.dropped == {STALE_FRAME: 1}
    assert [window.start_us for window in found.windows] == [0, 400_000, 1_200_000, 1_600_000, 2_000_000, 2_400_000]


def test_a_window_over_a_gap_in_the_ego_motion_is_dropped():
    times = np.arange(0, 3_000_001, 33_333, dtype=np.int64)
    motion = np.arange(0, 3_000_001, 10_000, dtype=np.int64)
    motion = motion[(motion < 1_100_000) | (motion > 1_400_000)]
    found = plan({"front": times}, motion, stride=4)
    assert found.dropped == {MOTION_GAP: 2}
    assert 1_200_000 not in [window.start_us for window in found.windows]


def test_thirty_hertz_video_and_hundred_hertz_motion_meet_in_time_and_not_in_rows(tmp_path):
    recording = drive(tmp_path, seconds=4.0, speed_mps=10.0, yaw_rate=0.2)
    tables = ego_motion_tables(
        recording, preprocess(), stride=8, max_age_us=50_000, assign_split=lambda start, end: "train"
    )
    frames, windows = tables.frames.read_all().to_pylist(), tables.windows.to_pylist()
    assert len(windows) == 4
    for window in windows:
        duration_s = (window["end_us"] - window["start_us"]) / 1e6
        assert duration_s == pytest.approx(0.7)
        assert window["displacement_m"] == pytest.approx(2 * 50 * np.sin(0.2 * duration_s / 2), abs=1e-6)
        assert window["dyaw_rad"] == pytest.approx(0.2 * duration_s, abs=1e-9)
        for place, row in enumerate(window["frames"]):
            instant, camera = divmod(place, len(CAMERAS))
            at_us = window["start_us"] + instant * TICK_US
            times = recording.cameras[CAMERAS[camera]].timestamp_us
            frame = latest_not_after(times, at_us)
            assert frames[row]["frame_index"] == frame
            assert frames[row]["timestamp_us"] == window["timestamps_us"][place] == times[frame]
            cell = np.frombuffer(frames[row]["pixels"], dtype=np.uint8).reshape(28, 56, 3)  # 64x36 px become 50x28
            assert abs(cell[:, 3:53].mean() - grey_of(frame, camera)) < 3
            assert not cell[:, :3].any()
            assert not cell[:, 53:].any()

    # What pairing by row would say of the last window: the motion of other instants, and other frames.
    last = windows[-1]
    rows = [frames[row]["frame_index"] for row in last["frames"][:: len(CAMERAS)]]
    by_row = recording.ego.timestamp_us[rows]
    assert abs(int(by_row[0]) - last["start_us"]) > 1_000_000
    wrong = np.linalg.norm(recording.ego.position_m[rows[-1]] - recording.ego.position_m[rows[0]])
    assert abs(wrong - last["displacement_m"]) > 0.5 * abs(last["displacement_m"])
    assert len({tuple(group) for group in np.reshape([frames[r]["frame_index"] for r in last["frames"]], (8, 4))}) == 8
    assert any(len({frames[r]["frame_index"] for r in last["frames"][k : k + 4]}) > 1 for k in range(0, 32, 4))


def test_the_skew_is_the_spread_between_cameras_at_one_instant(tmp_path):
    recording = drive(tmp_path)
    tables = ego_motion_tables(
        recording, preprocess(), stride=8, max_age_us=50_000, assign_split=lambda start, end: "val"
    )
    for window in tables.windows.to_pylist():
        seen = np.reshape(window["timestamps_us"], (8, 4))
        instants = window["start_us"] + TICK_US * np.arange(8)[:, None]
        assert window["max_skew_us"] == (seen.max(axis=1) - seen.min(axis=1)).max() > 0
        assert window["max_age_us"] == (instants - seen).max()
