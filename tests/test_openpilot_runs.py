"""Segments that follow each other are one recording: by names, by times, in labels and in pictures."""

import bz2
import dataclasses
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from omni_cli.errors import DataError
from omni_cli.formats.video import decode, decode_yuv, decoder_id
from omni_cli.report import Console
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.driving_windows import StepFilters, driving_tables
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.shards import open_shards, safe_name
from omni_cli.samples.step_labels import driven_labels
from omni_cli.samples.sync import STALE_FRAME
from omni_cli.samples.tables import FRAMES
from omni_cli.samples.windows import ego_motion_tables
from omni_cli.scene.recording import Recording
from omni_cli.sources import PartRefused
from omni_cli.sources.openpilot_logs import OpenpilotLogs
from omni_cli.sources.openpilot_runs import MAX_SEGMENTS
from omni_cli.sources.quarantine import write_quarantine
from omni_cli.stages.clips import find_clips
from omni_cli.stages.etl import EtlRequest, etl
from tests.support import openpilot as made
from tests.support.drives import preprocess
from tests.support.openpilot import calibration, event, every, frame_indices, model
from tests.support.plain_recipe import Plain

ROUTE = f"{made.DONGLE}_{made.LOG_ID}"
COUNTS = (40, 33, 20)


# --- by names


def listed(folder: Path, *segments: str) -> list[str]:
    """What the source lists of empty files: `3:qcamera.ts,qlog` is a segment; another route's follows `/`."""
    for segment in segments:
        number, names = segment.split(":")
        for name in names.split(","):
            path = folder / made.DONGLE / f"{made.LOG_ID}--{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return [ref.id.removeprefix(ROUTE) for ref in OpenpilotLogs(folder).recordings()]


def test_consecutive_numbers_are_one_recording_and_a_gap_begins_another(tmp_path):
    assert listed(tmp_path, *(f"{number}:qcamera.ts,qlog" for number in (2, 0, 1, 4, 9, 10, 11))) == [
        "--0-2",
        "--4",
        "--9-11",
    ]
    other = tmp_path / made.DONGLE / "00000009--0696c823fa--3"
    shutil.copytree(tmp_path / made.DONGLE / f"{made.LOG_ID}--2", other)
    refs = OpenpilotLogs(tmp_path).recordings()
    assert [ref.id for ref in refs][-1] == f"{made.DONGLE}_00000009--0696c823fa--3"
    assert {ref.group for ref in refs} == {ref.bundle for ref in refs} == {ROUTE, f"{made.DONGLE}_00000009--0696c823fa"}


def test_a_run_ends_where_the_cameras_change_or_a_log_lacks(tmp_path):
    both, small = "qcamera.ts,fcamera.hevc,qlog", "qcamera.ts,qlog"
    mixed = [
        f"0:{small}",
        f"1:{small}",
        f"2:{both}",
        f"3:{both}",
        "4:qcamera.ts",
        f"5:{small}",
        "6:qcamera.ts,rlog.zst",
    ]
    assert listed(tmp_path, *mixed) == ["--0-1", "--2-3", "--4", "--5-6"]
    source = OpenpilotLogs(tmp_path)
    with pytest.raises(DataError, match=r"--4: has no rlog or qlog"):
        source.open(f"{ROUTE}--4")


def test_a_recording_is_no_longer_than_what_fits_in_memory(tmp_path):
    names = listed(tmp_path, *(f"{number}:qcamera.ts,qlog" for number in range(3, 3 + 2 * MAX_SEGMENTS + 1)))
    first = 3 + np.arange(3) * MAX_SEGMENTS
    assert names == [f"--{a}-{a + MAX_SEGMENTS - 1}" for a in first[:2]] + [f"--{first[2]}"]
    assert [safe_name(name) for name in names] == names


def test_a_segment_in_quarantine_stands_alone(tmp_path):
    segments = [f"{number}:qcamera.ts,qlog" for number in range(4)]
    assert listed(tmp_path, *segments) == ["--0-3"]
    write_quarantine(tmp_path, {f"{ROUTE}--1": "the wipers hid the road"})
    assert listed(tmp_path) == ["--0", "--1", "--2-3"]


# --- by times


@pytest.fixture(scope="module")
def route_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    made.write_route(folder / made.DONGLE, COUNTS)
    return folder


@pytest.fixture
def route(route_files, tmp_path) -> Path:
    shutil.copytree(route_files, tmp_path / "raw")
    return tmp_path / "raw"


def segment(route: Path, number: int) -> Path:
    return route / made.DONGLE / f"{made.LOG_ID}--{number}"


def opened(route: Path, *cameras: str) -> Recording:
    (ref,) = OpenpilotLogs(route).recordings()
    return OpenpilotLogs(route).open(ref.id, cameras or None)


def test_three_segments_have_the_times_and_the_speed_of_one_drive(route):
    recording = opened(route)
    assert recording.id == f"{ROUTE}--0-2"
    assert recording.parts == tuple(f"{ROUTE}--{number}" for number in range(3))
    np.testing.assert_array_equal(recording.cameras["qcamera"].timestamp_us, made.frame_times_us(sum(COUNTS)))
    assert [video.num_frames for video in recording.cameras["qcamera"].videos] == list(COUNTS)
    speed = recording.speed
    begin_us, end_us = made.BOOT_US - 100_000, made.BOOT_US + sum(COUNTS) * made.FRAME_US + 100_000
    np.testing.assert_array_equal(speed.timestamp_us, np.arange(begin_us, end_us, 10_000))  # what is repeated, once
    np.testing.assert_allclose(speed.speed_mps, made.speed_at(speed.timestamp_us), rtol=1e-6)
    assert recording.provenance["gaps_qcamera"] == "none"


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_a_frame_is_decoded_from_the_segment_that_it_lies_in(route, decoder):
    size = {"width_px": 96, "height_px": 64}
    videos = [(segment(route, number) / "qcamera.ts").read_bytes() for number in range(3)]
    each = [decode(one, "each", range(n), **size, decoder=decoder) for one, n in zip(videos, COUNTS, strict=True)]
    expected = [picture for part in each for _, picture in part]
    frames = camera_frames("all", opened(route).cameras["qcamera"])
    assert frames.size_px == (96, 64)
    for wanted in (range(93), [0, 39, 40, 72, 73, 92], [41, 45], [80]):
        found = list(frames.decode(wanted, **size, decoder=decoder))
        assert [index for index, _ in found] == list(wanted)
        for index, picture in found:
            np.testing.assert_array_equal(picture, expected[index])


def test_planes_are_decoded_so_too(route):
    videos = [(segment(route, number) / "qcamera.ts").read_bytes() for number in range(3)]
    expected = [
        planes[0] for one, n in zip(videos, COUNTS, strict=True) for _, planes in decode_yuv(one, "e", range(n))
    ]
    found = list(camera_frames("all", opened(route).cameras["qcamera"]).decode_yuv([38, 40, 41, 92]))
    assert [index for index, _ in found] == [38, 40, 41, 92]
    for index, planes in found:
        np.testing.assert_array_equal(planes[0], expected[index])
    with pytest.raises(DataError, match=r"--2/qcamera\.ts: ends before frame 20"):
        list(camera_frames("all", opened(route).cameras["qcamera"]).decode_yuv([38, 93]))


def windows(recording: Recording, **changes):
    grid = preprocess(cameras=("qcamera",), columns=1, canvas_width_px=56, num_frames=8, **changes)
    return ego_motion_tables(recording, grid, stride=1, max_age_us=100_000, assign_split=lambda _start, _end: "train")


def test_windows_across_the_cuts_have_the_labels_of_the_whole_drive(route, tmp_path):
    made.write_segment(tmp_path / "whole" / made.DONGLE / f"{made.LOG_ID}--0", sum(COUNTS))
    whole, cut = windows(opened(tmp_path / "whole")), windows(opened(route))
    for name, mine, true in zip(cut.windows.column_names, cut.windows.columns, whole.windows.columns, strict=True):
        np.testing.assert_equal(mine.to_pylist(), true.to_pylist(), err_msg=name)  # NaN where nothing is known
    facts = FRAMES.names[:-1]  # the pictures were coded anew
    assert cut.frames.read_all().select(facts).equals(whole.frames.read_all().select(facts))
    starts, ends = (cut.windows[name].to_numpy() for name in ("start_us", "end_us"))
    for boundary in np.cumsum(COUNTS)[:-1]:
        boundary_us = made.frame_times_us(sum(COUNTS))[boundary]
        assert ((starts < boundary_us) & (boundary_us < ends)).sum() >= 6


def test_a_segments_lost_tail_costs_the_windows_across_it_and_no_others(tmp_path):
    made.write_segment(tmp_path / made.DONGLE / f"{made.LOG_ID}--0", 40)
    made.write_segment(tmp_path / made.DONGLE / f"{made.LOG_ID}--1", 40, segment=1, first=70)
    recording = opened(tmp_path)
    assert recording.provenance["gaps_qcamera"] == "1.549 s after segment 0"
    tables = windows(recording)
    starts, ends = (tables.windows[name].to_numpy() for name in ("start_us", "end_us"))
    times_us = recording.cameras["qcamera"].timestamp_us
    assert not ((starts < times_us[39] + 100_000) & (ends > times_us[39] + 100_000)).any()
    alone = []
    for number in (0, 1):
        shutil.copytree(tmp_path / made.DONGLE, tmp_path / str(number) / made.DONGLE)
        shutil.rmtree(tmp_path / str(number) / made.DONGLE / f"{made.LOG_ID}--{1 - number}")
        alone.append(windows(opened(tmp_path / str(number))).windows.num_rows)
    assert len(starts) - sum(alone) in (0, 1)  # one may end after the last frame, while that is still fresh
    assert set(tables.dropped) <= {STALE_FRAME, "ego motion has a gap"}


def test_what_does_not_follow_is_refused_by_the_name_of_its_segment(route):
    one, two = (segment(route, number) / "qcamera.ts" for number in (1, 2))
    good = two.read_bytes()
    two.write_bytes(one.read_bytes())
    (two.parent / "qlog").write_bytes(made.events(COUNTS[1], 2, first=COUNTS[0]))
    with pytest.raises(
        PartRefused, match=r"--2/qcamera\.ts: its first frame was seen 1\.599 s before the last"
    ) as lost:
        opened(route)
    assert lost.value.part_id == f"{ROUTE}--2"
    assert str(lost.value).endswith(f"; to use {ROUTE}--0-2 without it: omni audit --quarantine")
    assert "\n" not in str(lost.value)
    (two.parent / "qlog").write_bytes(made.events(COUNTS[2], 2, first=sum(COUNTS[:2])))
    two.write_bytes(made.qcamera(made.frame_times_us(COUNTS[2], sum(COUNTS[:2])), (64, 48)))
    with pytest.raises(
        PartRefused, match=r"--2/qcamera\.ts: its pictures are 64x48 px, those of .*--1/qcamera\.ts 96x64"
    ):
        opened(route)
    two.write_bytes(good)
    opened(route)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qcamera.ts", b"no video" * 1000, r"--1/qcamera\.ts: not a readable video"),
        ("qlog", b"this is not a log " * 50, r"--1/qlog: holds no openpilot event"),
        ("qlog", made.events(COUNTS[1] + 3, 1, first=COUNTS[0]), r"holds 33 frames, the log lists 36"),
    ],
)
def test_a_bad_segment_is_named_and_the_others_are_recordings_without_it(route, file, content, message):
    (segment(route, 1) / file).write_bytes(content)
    with pytest.raises(PartRefused, match=message) as caught:
        opened(route)
    write_quarantine(route, {caught.value.part_id: str(caught.value)})
    source = OpenpilotLogs(route)
    assert [ref.id for ref in source.recordings()] == [f"{ROUTE}--{number}" for number in range(3)]
    assert len(source.open(f"{ROUTE}--2").cameras["qcamera"].timestamp_us) == COUNTS[2]
    with pytest.raises(DataError, match=message) as alone:
        source.open(f"{ROUTE}--1")
    assert not isinstance(alone.value, PartRefused)


def test_a_camera_that_the_segments_lack_is_named_with_those_that_they_have(route):
    with pytest.raises(DataError, match=r"--0-2: has no fcamera; it has qcamera; choose with --cameras qcamera$"):
        opened(route, "fcamera")
    with pytest.raises(DataError, match=r"holds no recording .*--0; `omni audit` lists"):
        OpenpilotLogs(route).open(f"{ROUTE}--0")


def test_raw_video_goes_on_too_and_frames_without_a_time_are_not_counted(tmp_path):
    """The log of the first segment lost its tail: of 40 frames it lists 30."""
    for number, (count, first) in enumerate(((40, 0), (20, 40))):
        folder = made.write_segment(
            tmp_path / made.DONGLE / f"{made.LOG_ID}--{number}", count, segment=number, first=first
        )
        (folder / "qcamera.ts").unlink()
        (folder / "fcamera.hevc").write_bytes(made.raw_hevc(made.frame_times_us(count, first)))
    log = segment(tmp_path, 0) / "qlog"
    log.write_bytes(every("carState", [{"vEgo": 10.0}] * 8) + frame_indices("roadEncodeIdx", 30, 0) + b"\x00" * 9)
    recording = opened(tmp_path)
    stream, all_us = recording.cameras["fcamera"], made.frame_times_us(60)
    np.testing.assert_array_equal(stream.timestamp_us, np.concatenate([all_us[:30], all_us[40:]]))
    assert recording.provenance["truncated_logs"] == f"{made.LOG_ID}--0/qlog"
    first, second = ((segment(tmp_path, n) / "fcamera.hevc").read_bytes() for n in (0, 1))
    expected = [planes[0] for one, n in ((first, 30), (second, 20)) for _, planes in decode_yuv(one, "e", range(n))]
    found = list(camera_frames("f", stream).decode_yuv(range(50)))
    for (index, planes), luma in zip(found, expected, strict=True):
        np.testing.assert_array_equal(planes[0], luma, err_msg=str(index))


# --- what the device logged


def test_the_devices_logs_go_on_and_a_logged_model_finds_its_frame_in_the_segment_before(route):
    before, after = segment(route, 0) / "qlog", segment(route, 1) / "qlog"
    cut_us = int(made.frame_times_us(41)[40])
    mounts = [event("liveCalibration", calibration((0, 0, yaw)), cut_us + at) for yaw, at in ((0.1, -500), (0.2, 900))]
    seen = [event("modelV2", model(frame), cut_us + 30_000 + frame) for frame in (39, 40, 200)]
    twice = mounts[0] + event("modelV2", model(38), cut_us - 300)  # the later log begins with what the one before says
    before.write_bytes(before.read_bytes() + twice)
    after.write_bytes(after.read_bytes() + twice + mounts[1] + b"".join(seen))
    recording = opened(route)
    mount = recording.device.mount
    np.testing.assert_array_equal(mount.timestamp_us, [cut_us - 500, cut_us + 900])
    np.testing.assert_allclose(mount.rpy_rad[:, 2], [0.1, 0.2])
    np.testing.assert_array_equal(recording.device.model.timestamp_us, made.frame_times_us(41)[[38, 39, 40]])
    assert recording.provenance["mount"] == "2 of 2 calibrated"
    assert recording.provenance["logged_model"] == "3 kept, 0 invalid, 0 incomplete, 1 without a video frame"


def test_ids_that_a_camera_gave_twice_name_no_frame(route):
    """It was started anew between the segments, and counts from 0 again."""
    log = segment(route, 1) / "qlog"
    times_us = made.frame_times_us(sum(COUNTS))[COUNTS[0] :]
    again = every("carState", [{"vEgo": 10.0}] * 9) + b"".join(
        event(
            "qRoadEncodeIdx", {"segmentId": i, "segmentNum": 1, "frameId": i, "timestampEof": int(times_us[i]) * 1000}
        )
        for i in range(COUNTS[1])
    )
    log.write_bytes(again + event("modelV2", model(35)) + event("modelV2", model(7), made.BOOT_US + 1))
    recording = opened(route)
    np.testing.assert_array_equal(recording.device.model.timestamp_us, made.frame_times_us(40)[[35]])
    assert recording.provenance["logged_model"] == "1 kept, 0 invalid, 0 incomplete, 1 without a video frame"


# --- through the stages


def test_a_run_becomes_one_shard_and_is_found_by_its_id(route_files, tmp_path):
    shutil.copytree(route_files, tmp_path / "data" / "raw" / "openpilot")
    shutil.copytree(route_files / made.DONGLE, tmp_path / "data" / "raw" / "openpilot" / made.DONGLE[::-1])
    etl(Plain(), EtlRequest(data=tmp_path / "data", out=tmp_path / "shards", workers=0), Console(quiet=True))
    entries = open_shards(tmp_path / "shards").manifest.recordings
    names = [f"{dongle}_{made.LOG_ID}--0-2" for dongle in (made.DONGLE, made.DONGLE[::-1])]
    assert [entry.id for entry in entries] == names
    assert sorted(path.name for path in (tmp_path / "shards" / "recordings").iterdir()) == names
    (clip,) = find_clips(Plain().preprocess(), [names[0]], {}, tmp_path / "data", tiled=False)
    assert len(clip.open().cameras["qcamera"].timestamp_us) == sum(COUNTS)


# --- the real segment, cut: derived

real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
REAL = "a2a0ccea32023010", "2023-07-27--13-01-19"


def cut_route(folder: Path, real: Path, cuts: list[int]) -> Path:
    """Derived: the real segment's packets and events, dealt out to segments that begin at these frames."""
    video, log = (real / "qcamera.ts").read_bytes(), bz2.decompress((real / "qlog.bz2").read_bytes())
    for number, (first, end) in enumerate(pairwise([0, *cuts, 1200])):
        part = folder / REAL[0] / f"{REAL[1]}--{number}"
        part.mkdir(parents=True)
        (part / "qcamera.ts").write_bytes(made.copied_frames(video, first, end))
        (part / "qlog.bz2").write_bytes(bz2.compress(made.cut_log(log, first, end, number)))
    return folder


def arrays_of(value) -> list[np.ndarray]:
    parts = [getattr(value, part.name) for part in dataclasses.fields(value)]
    return [array for part in parts for array in (arrays_of(part) if dataclasses.is_dataclass(part) else [part])]


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("cuts", [[600], [285, 900]])
def test_a_real_segment_that_was_cut_is_again_what_it_was(tmp_path, cuts):
    """Derived: cut at keyframes without coding anything anew; each log begins with 0.2 s of the one before."""
    routes = Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"
    whole = opened(routes)
    cut = opened(cut_route(tmp_path, routes / REAL[0] / f"{REAL[1]}--0", cuts))
    assert len(cut.parts) == len(cuts) + 1
    for mine, true in ((cut.speed, whole.speed), (cut.device, whole.device)):
        for found, expected in zip(arrays_of(mine), arrays_of(true), strict=True):
            np.testing.assert_array_equal(found, expected)
    stream, expected_stream = cut.cameras["qcamera"], whole.cameras["qcamera"]
    np.testing.assert_array_equal(stream.timestamp_us, expected_stream.timestamp_us)
    assert stream.calibration.model == expected_stream.calibration.model
    assert (cut.provenance["gaps_qcamera"], cut.provenance["logged_model"]) == (
        "none",
        whole.provenance["logged_model"],
    )
    told = {
        "cameras": ("qcamera",),
        "num_frames": 30,
        "sampling": "bilinear",
        "teacher": "motion",
        "decoder_id": decoder_id("pyav"),
    }
    settings = {"stride": 10, "max_age_us": 100_000, "filters": StepFilters(), "label": driven_labels}
    settings["assign_split"] = lambda _start_us, _end_us: "train"
    found, true = (driving_tables(one, ModelFramePreprocess(**told), **settings) for one in (cut, whole))
    assert found.windows.equals(true.windows)
    assert found.frames.read_all().equals(true.frames.read_all())
    starts, ends = (found.windows[name].to_numpy() for name in ("start_us", "end_us"))
    for frame in cuts:
        at_us = stream.timestamp_us[frame]
        assert ((starts < at_us) & (at_us < ends)).sum() >= 2


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_pictures_of_a_cut_real_segment_are_those_of_the_whole(tmp_path, decoder):
    """Derived, as above."""
    routes = Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"
    cut = opened(cut_route(tmp_path, routes / REAL[0] / f"{REAL[1]}--0", [600]))
    wanted, size = [0, 597, 599, 600, 601, 615, 1199], {"width_px": 160, "height_px": 100}
    found, true = (
        list(camera_frames("real", one.cameras["qcamera"]).decode(wanted, **size, decoder=decoder))
        for one in (cut, opened(routes))
    )
    for (index, picture), (expected_index, expected) in zip(found, true, strict=True):
        assert index == expected_index
        np.testing.assert_array_equal(picture, expected)
