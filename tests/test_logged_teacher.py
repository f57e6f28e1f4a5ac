"""The `log` teacher on a short log, which keeps one word of the car's model in forty: the grid goes where they are."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.recipes.distill.settings import DistillSplit
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.samples.step_labels import logged_phase_us
from omni_cli.samples.sync import time_grid
from omni_cli.scene.driving_log import DeviceLog, LoggedModel
from omni_cli.scene.recording import Recording
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.driving import REAL_ID, copy_real_segment, real_data, tiny_student, write_routes
from tests.support.full_rate import real_events
from tests.support.openpilot import BOOT_US, FRAME_US
from tests.support.pipeline import QUIET

PERIOD_US = 200_000
FRAMES, STRIDE = 11, 10


def logged_at(model_us) -> Recording:
    parts = [np.zeros((len(model_us), *shape), np.float32)
             for shape in ((33, 3), (4, 33, 2), (4,), (2, 33, 2), (3, 4), (3,))]  # fmt: skip
    return Recording("drive", "test", {}, device=DeviceLog(model=LoggedModel(np.asarray(model_us, np.int64), *parts)))


def phase_of(frame_us, logged, max_age_us: int = 100_000) -> int:
    frame_us = np.asarray(frame_us)
    return logged_phase_us(logged_at(frame_us[logged]), frame_us, period_us=PERIOD_US, max_age_us=max_age_us)


def frames_shown(frame_us, phase_us: int, max_age_us: int) -> set[int]:
    """Frames that are the last one at some instant of a grid, one instant after the other."""
    instants_us = range(phase_us - PERIOD_US, frame_us[-1], PERIOD_US)
    shown = [(at_us, max((i for i, seen_us in enumerate(frame_us) if seen_us <= at_us), default=-1))
             for at_us in instants_us]  # fmt: skip
    return {frame for at_us, frame in shown if frame >= 0 and at_us - frame_us[frame] <= max_age_us}


# -- the phase


@given(
    gaps_ms=st.lists(st.sampled_from([43, 50, 50, 50, 57, 170, 450]), min_size=1, max_size=30),
    start_ms=st.integers(0, 400),
    max_age_us=st.sampled_from([30_000, 100_000]),
    data=st.data(),
)
def test_no_phase_shows_more_of_the_logged_frames(gaps_ms, start_ms, max_age_us, data):
    frame_us = (np.cumsum([start_ms, *gaps_ms]) * 1000).tolist()
    logged = data.draw(st.lists(st.integers(0, len(frame_us) - 2), min_size=1, max_size=8, unique=True).map(sorted))
    chosen_us = phase_of(frame_us, logged, max_age_us)
    hits = {
        phase_us: len(frames_shown(frame_us, phase_us, max_age_us) & set(logged))
        for phase_us in [chosen_us, *range(0, PERIOD_US, 1000)]
    }
    assert 0 <= chosen_us < PERIOD_US
    from_0 = frames_shown(frame_us, 0, max_age_us)
    if chosen_us or 2 * len(from_0 & set(logged)) <= len(from_0):  # else the grid stays where all others lie
        assert hits[chosen_us] == max(hits.values())
        assert (hits[0] == hits[chosen_us]) == (chosen_us == 0)


def test_the_phase_lies_amid_the_time_that_frames_are_shown():
    frame_us = np.arange(400) * 50_000 + 12_000 + np.arange(400) % 3 * 500  # a jitter of 1 ms
    assert phase_of(frame_us, np.arange(1, 400, 40)) == pytest.approx(12_000 + 50_000 + 25_000, abs=1000)
    assert phase_of(frame_us, np.arange(1, 400, 40), max_age_us=10_000) == pytest.approx(62_000 + 5_500, abs=1000)


@pytest.mark.parametrize("count", [400, 401, 402, 403])
def test_a_log_that_holds_every_frame_leaves_the_grid_where_all_others_lie(count):
    frame_us = np.arange(count) * 50_000 + 12_000
    assert phase_of(frame_us, np.arange(count)) == 0


@pytest.mark.parametrize("lost", [[601], [600], range(593, 600), range(0, 400)])
def test_a_log_that_lost_some_words_leaves_it_too(lost):
    frame_us = np.arange(1200) * 50_000 + 12_000
    assert phase_of(frame_us, np.setdiff1d(np.arange(1200), lost)) == 0


def test_frames_that_no_video_shows_choose_nothing():
    frame_us = np.arange(40) * 50_000 + 12_000
    recording = logged_at([62_000 + 25_000, 5_000_000])
    assert logged_phase_us(recording, frame_us, period_us=PERIOD_US, max_age_us=100_000) == 0


@given(first=st.integers(-(10**6), 10**6), length=st.integers(-10, 10**6), phase=st.integers(0, PERIOD_US - 1))
def test_a_grid_with_a_phase_holds_every_instant_of_its_span_and_no_other(first, length, phase):
    instants = [number * PERIOD_US + phase for number in range(-7, 12)]
    inside = [at for at in instants if first <= at <= first + length]
    assert time_grid(first, first + length, 5.0, phase).tolist() == inside


# -- shards


def cut(data: Path, teacher: str, out: Path, **sample) -> ShardSet:
    sample = {"window": FRAMES, "stride": STRIDE, "teacher": teacher, **sample}
    recipe = tiny_student(cameras="qcamera", sample=sample, split=DistillSplit(validation=0.3))
    return open_shards(Path(etl(recipe, EtlRequest(data=data, out=out, workers=0), QUIET)["shards"]))


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> tuple[Path, list[str]]:
    """Two drives of which every 40th frame has a word, always the second of four."""
    data = tmp_path_factory.mktemp("routes")
    return data, write_routes(data, 120, models_every=40, models_from=1)


def test_the_car_itself_teaches_on_the_grid_that_begins_at_nought(routes, tmp_path):
    shards = cut(routes[0], "motion", tmp_path)
    starts_us = [start for name in routes[1] for start in shards.windows(name)["start_us"].to_pylist()]
    assert {start_us % PERIOD_US for start_us in starts_us} == {0}
    assert shards.manifest.provenance["grid_phase_us"] == ("0",)


def test_steps_without_a_word_of_the_model_are_masked(routes, tmp_path):
    data, names = routes
    shards = cut(data, "log", tmp_path)
    (phase,) = shards.manifest.provenance["grid_phase_us"]
    assert 50_000 < (int(phase) - BOOT_US) % PERIOD_US < 100_000
    for name in names:
        for row in shards.windows(name).to_pylist():
            assert row["start_us"] % PERIOD_US == int(phase)
            seen_us = np.array(row["timestamps_us"]).reshape(FRAMES, 2)[1:, 0]
            frame = np.round((seen_us - BOOT_US) / FRAME_US).astype(int)
            is_known = frame % 40 == 1
            assert is_known.any()
            assert row["target_points"] == np.where(is_known, 33, 0).tolist()
            assert row["scene_is_known"] == is_known.astype(int).tolist()
            path_m = np.array(row["target_xy_m"]).reshape(-1, 33, 2)
            assert (path_m[~is_known] == 0).all()
            shift_m = 0.1 * frame[is_known][0] / 10  # of its y; x begins at the camera
            expected = np.arange(33)[:, None] * [1, 0.1] + [0, shift_m]
            np.testing.assert_allclose(path_m[is_known][0], expected, rtol=1e-5)
            assert (np.array(row["scene_lane_line_prob"]).reshape(-1, 4)[~is_known] == 0).all()


def test_windows_that_pass_every_word_by_are_refused_with_the_remedy(tmp_path):
    write_routes(tmp_path, models_every=40, models_from=21)
    with pytest.raises(
        DataError, match=r"modelV2 was logged at none of the 3 frames looked at; use an rlog, or a small"
    ):
        cut(tmp_path, "log", tmp_path / "shards", window=3, stride=40)


# -- the real segment


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory) -> ShardSet:
    data = tmp_path_factory.mktemp("real")
    copy_real_segment(data)
    return cut(data, "log", data / "shards")


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[int, object]:
    """Time of a frame -> what the car's model said of it, straight from the real log."""
    data = tmp_path_factory.mktemp("said")
    copy_real_segment(data)
    (log,) = data.rglob("qlog.bz2")
    events = real_events(log.parent)
    seen_us = {e.roadEncodeIdx.frameId: round(e.roadEncodeIdx.timestampEof / 1000)
               for e in events if e.which() == "roadEncodeIdx"}  # fmt: skip
    words = [event.modelV2 for event in events if event.which() == "modelV2"]
    return {seen_us[word.frameId]: word for word in words if word.frameId in seen_us}


@real_data
@pytest.mark.real_data
def test_a_real_short_log_labels_the_very_frames_that_its_model_saw(real_shards, said):
    assert len(said) == 30
    labelled = {}
    for row in real_shards.windows(REAL_ID).to_pylist():
        seen_us = np.array(row["timestamps_us"]).reshape(FRAMES, 2)[1:, 0].tolist()
        points, counts = np.array(row["target_points"]), np.array(row["counts"])
        assert [at_us in said for at_us in seen_us] == (points == 33).tolist() == (counts * points > 0).tolist()
        assert set(points) == {0, 33}
        parts = {
            name: np.array(row[name]).reshape(FRAMES - 1, -1)
            for name in row
            if name.startswith(("target_xy", "scene_l"))
        }
        for step, at_us in enumerate(seen_us):
            labelled |= {at_us: {name: part[step] for name, part in parts.items()}} if at_us in said else {}
            assert at_us in said or not any(part[step].any() for part in parts.values())
    assert len(labelled) >= 28
    for at_us, label in labelled.items():
        check_label(label, said[at_us])


def check_label(label: dict[str, np.ndarray], word) -> None:
    path_m = np.array([word.position.x, word.position.y], np.float32).T
    np.testing.assert_allclose(label["target_xy_m"].reshape(33, 2), path_m - [path_m[0, 0], 0], atol=1e-4)
    lines_m = np.array([np.stack([line.y, line.z], axis=1) for line in word.laneLines], np.float32)
    np.testing.assert_array_equal(label["scene_lane_lines_m"].reshape(4, 33, 2), lines_m)
    np.testing.assert_array_equal(label["scene_lane_line_prob"], np.array(word.laneLineProbs, np.float32))
    leads = [[lead.x[0], lead.y[0], lead.v[0], lead.a[0]] for lead in word.leadsV3]
    np.testing.assert_array_equal(label["scene_lead"].reshape(3, 4), np.array(leads, np.float32))


@real_data
@pytest.mark.real_data
def test_the_phase_of_the_real_short_log_is_amid_its_frames_and_told(real_shards, said):
    (phase,) = map(int, real_shards.manifest.provenance["grid_phase_us"])
    after_us = [(phase - at_us) % PERIOD_US for at_us in said]
    assert max(after_us) < 35_000  # of the 50 ms that a frame is shown, though the camera gains 5 ms in a minute
    assert min(after_us) > 15_000
    windows = real_shards.windows(REAL_ID).to_pylist()
    assert {row["start_us"] % PERIOD_US for row in windows} == {phase}


@real_data
@pytest.mark.real_data
def test_what_the_real_model_planned_is_about_where_the_car_went(real_shards):
    errors_m = []
    for row in real_shards.windows(REAL_ID).to_pylist():
        planned, driven = (np.array(row[name]).reshape(-1, 33, 2) for name in ("target_xy_m", "driven_xy_m"))
        is_known = (np.array(row["target_points"]) == 33) & (np.array(row["driven_points"]) > 20)
        errors_m += np.linalg.norm(planned - driven, axis=-1)[is_known].tolist()
    at_s = {second: np.searchsorted(T_IDXS_S, second) for second in (1, 2)}
    assert np.array(errors_m).mean(axis=0)[at_s[1]] < 1
    assert np.array(errors_m).mean(axis=0)[at_s[2]] < 2
