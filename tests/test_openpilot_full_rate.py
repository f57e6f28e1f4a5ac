"""The whole way from a full-rate segment to shards: fcamera, ecamera and rlog, derived from the real small ones.

Nobody gave us a full-rate segment. The derived one (tests/support/full_rate.py) has two seconds of the real drive, in
which a lane change begins; its wide picture is no wide picture, but lies where a wide camera would see it.
"""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from omni_cli.errors import DataError
from omni_cli.recipes.distill.settings import DistillSplit
from omni_cli.samples.driven_path import driven_paths
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.scene.cameras import Pinhole
from omni_cli.scene.model_frame import BIG_IMG, IMG
from omni_cli.sources.openpilot_logs import OpenpilotLogs
from omni_cli.sources.openpilot_schema import log_schema
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.driving import REAL_ID, real_data, real_folder, tiny_student
from tests.support.full_rate import (
    FULL_SIZE_PX,
    GREY,
    WIDE_FOCAL_PX,
    as_zstd,
    derive_full_rate,
    full_rate_log,
    planes_of,
    real_events,
    small_frames,
    wide_matrix,
)
from tests.support.model_frames import QCAMERA, mapped, openpilot_matrix
from tests.support.pipeline import QUIET

pytestmark = [real_data, pytest.mark.real_data]
SEGMENT = Path("a2a0ccea32023010") / "2023-07-27--13-01-19--0"
RAW = Path("raw") / "openpilot"
FIRST, END = 705, 741  # frames of the real videos: a keyframe of the small one, and 1.8 s later
FRAMES, STRIDE = 3, 2
WIDE = Pinhole(*FULL_SIZE_PX, WIDE_FOCAL_PX, WIDE_FOCAL_PX, FULL_SIZE_PX[0] / 2, FULL_SIZE_PX[1] / 2)
LABELS = ("driven_xy_m", "driven_points", "speed_mps", "yaw_rate_radps", "target_xy_m", "target_points",
          "desire_pulse", "counts", "left_hand_traffic")  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Path:
    return real_folder() / "comma_demo_route" / SEGMENT


@pytest.fixture(scope="module")
def events(real) -> list:
    return real_events(real)


@pytest.fixture(scope="module")
def derived(real, tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("derived")
    derive_full_rate(real, data / RAW / SEGMENT, FIRST, END)
    return data


def cut(data: Path, out: Path, cameras: str = "fcamera,ecamera", **sample) -> ShardSet:
    sample = {"window": FRAMES, "stride": STRIDE, **sample}
    recipe = tiny_student(cameras=cameras, sample=sample, split=DistillSplit(validation=0.01))
    return open_shards(Path(etl(recipe, EtlRequest(data=data, out=out, workers=0), QUIET)["shards"]))


@pytest.fixture(scope="module")
def full(derived, tmp_path_factory) -> ShardSet:
    return cut(derived, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def small(derived, tmp_path_factory) -> ShardSet:
    return cut(derived, tmp_path_factory.mktemp("small"), "qcamera")


def exposures(events: list, kind: str) -> dict[int, int]:
    """Frame id -> end of exposure in ns, of the frames that the derived videos show, as the real log says."""
    found = [getattr(event, kind) for event in events if event.which() == kind]
    return {index.frameId: index.timestampEof for index in found if FIRST <= index.segmentId < END}


def test_the_derived_segment_passes_a_deep_audit(derived):
    result = audit(AuditRequest(derived, deep=True), QUIET)
    assert (result["audited"], result["findings"]) == (1, [])


def test_frames_of_raw_hevc_have_the_true_times_of_their_exposure(derived, events, real):
    recording = OpenpilotLogs(derived / RAW).open(REAL_ID)
    assert list(recording.cameras) == ["qcamera", "fcamera", "ecamera"]
    assert recording.provenance["log"] == "rlog.zst"
    road_us, wide_us = (recording.cameras[name].timestamp_us for name in ("fcamera", "ecamera"))
    for found_us, kind in ((road_us, "roadEncodeIdx"), (wide_us, "wideRoadEncodeIdx")):
        eof_us = np.array([*exposures(events, kind).values()]) / 1000
        assert len(found_us) == END - FIRST
        assert np.abs(found_us - eof_us).max() <= 0.5
    with av.open(str(real / "qcamera.ts")) as container:  # the real container tells the same times once more
        pts_us = sorted(p.pts * p.time_base * 1_000_000 for p in container.demux(video=0) if p.size)[FIRST:END]
    assert np.abs(road_us - np.array(pts_us, dtype=float)).max() < 10
    assert 0 < np.abs(wide_us - road_us).max() < 400  # another sensor, started by the same signal


def test_windows_are_as_many_as_fit_and_show_both_cameras_frames_of_one_id(full, events):
    road_ns, wide_ns = (exposures(events, kind) for kind in ("roadEncodeIdx", "wideRoadEncodeIdx"))
    first_us = max(min(road_ns.values()), min(wide_ns.values())) / 1000
    last_us = min(max(road_ns.values()), max(wide_ns.values())) / 1000
    instants_us = np.arange(np.ceil(first_us / 200_000), last_us // 200_000 + 1) * 200_000
    windows = full.windows(REAL_ID).to_pylist()
    starts_us = instants_us[: len(instants_us) - FRAMES + 1 : STRIDE]
    assert [window["start_us"] for window in windows] == starts_us.tolist()
    assert len(windows) == 3
    pairs_us = {round(road_ns[i] / 1000): round(wide_ns[i] / 1000) for i in road_ns}
    for window in windows:
        seen_us = np.array(window["timestamps_us"]).reshape(FRAMES, 2)
        assert [pairs_us[road] for road in seen_us[:, 0].tolist()] == seen_us[:, 1].tolist()
        at_us = window["start_us"] + 200_000 * np.arange(FRAMES)
        assert seen_us[:, 0].tolist() == [max(road for road in pairs_us if road <= at) for at in at_us]


def test_labels_are_those_of_the_small_video_and_of_the_whole_real_log(full, small, real):
    windows, of_small = full.windows(REAL_ID).to_pylist(), small.windows(REAL_ID).to_pylist()
    for mine, theirs in zip(windows, of_small, strict=True):
        assert {name: mine[name] for name in LABELS} == {name: theirs[name] for name in LABELS}
    recording = OpenpilotLogs(real.parents[1]).open(REAL_ID)
    assert recording.provenance["log"] == "qlog.bz2"
    steps_us = np.concatenate([np.array(w["timestamps_us"]).reshape(FRAMES, 2)[1:, 0] for w in windows])
    driven = driven_paths(recording, steps_us, camera="qcamera")
    np.testing.assert_array_equal(np.concatenate([w["target_xy_m"] for w in windows]), driven.xy_m.ravel())
    assert (driven.num_points == 33).all()
    assert {3} <= set(np.concatenate([w["desire_pulse"] for w in windows])) <= {0, 3}  # to the left


# -- pictures


def luma(pixels: bytes) -> np.ndarray:
    planes = np.frombuffer(pixels, np.uint8).reshape(6, 128, 256)
    whole = np.empty((256, 512))
    whole[0::2, 0::2], whole[1::2, 0::2], whole[0::2, 1::2], whole[1::2, 1::2] = planes[:4]
    return whole


def pictures(shards: ShardSet, view: str) -> dict[int, np.ndarray]:
    """Frame in the video -> luma of a view."""
    rows = shards.frames(REAL_ID).to_pylist()
    return {row["frame_index"]: luma(row["pixels"]) for row in rows if row["camera"] == view}


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def mount_at(events: list, frame: int) -> list[float]:
    """What the device knew of its mount when a frame of the derived video was seen."""
    seen_ns = next(e.roadEncodeIdx.timestampEof for e in events
                   if e.which() == "roadEncodeIdx" and e.roadEncodeIdx.segmentId == FIRST + frame)  # fmt: skip
    mounts = [e for e in events if e.which() == "liveCalibration" and e.logMonoTime <= seen_ns]
    return list(max(mounts, key=lambda event: event.logMonoTime).liveCalibration.rpyCalib)


def test_the_narrow_view_of_the_large_video_is_that_of_the_small_one(full, small):
    """Measured: 0.998 to 0.999; with the small video's view 0.2 s later 0.94 and less."""
    large, expected = pictures(full, IMG.name), pictures(small, IMG.name)
    assert large.keys() == expected.keys()
    assert min(alike(large[frame], expected[frame]) for frame in large) > 0.99
    assert max(alike(large[frame], expected[after]) for frame, after in pairwise(sorted(large))) < 0.97


def test_the_wide_view_is_made_of_the_wide_video(full, derived, events):
    """Against the small pictures, taken where openpilot's matrices say: 0.990 to 0.995 of it was measured.

    They take no notice of how the wide camera is turned against the device (modeld.py), and so its view is turned too.
    """
    content = (derived / RAW / SEGMENT / "qcamera.ts").read_bytes()
    shown = [planes_of(frame)[0] for frame in small_frames(content)]
    for frame, found in pictures(full, BIG_IMG.name).items():
        matrix = wide_matrix(events) @ openpilot_matrix(BIG_IMG, WIDE, mount_at(events, frame))
        at = mapped(matrix, 512, 256)
        margin_px = np.minimum(at, np.array([QCAMERA.width_px, QCAMERA.height_px]) - 1 - at).min(axis=-1)
        inside, outside = margin_px > 4, margin_px < -4
        expected = map_coordinates(shown[frame].astype(float), at[inside].T[::-1], order=1)
        assert 0.4 < inside.mean() < 0.6  # of the view; a road camera sees no more of it
        assert alike(found[inside], expected) > 0.98
        assert np.abs(found[outside] - GREY[0]).max() < 20


# -- what can only go wrong at full rate


def with_damage(derived: Path, folder: Path, damage: Callable[[Path], object]) -> Path:
    shutil.copytree(derived, folder)
    damage(folder / RAW / SEGMENT)
    return folder


def shortened(name: str, share: float) -> Callable[[Path], object]:
    """The first part of a file."""
    return lambda segment: (segment / name).write_bytes(
        (segment / name).read_bytes()[: int((segment / name).stat().st_size * share)]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda segment: (segment / "ecamera.hevc").unlink(), "has no ecamera; it has qcamera, fcamera; choose with"),
        (shortened("fcamera.hevc", 0.6), r"fcamera.hevc: holds \d\d frames, the log lists 36; the video or the log is"),
        (shortened("ecamera.hevc", 0.6), r"ecamera.hevc: holds \d\d frames, the log lists 36; the video or the log is"),
        (shortened("fcamera.hevc", 0.0), "fcamera.hevc: not a readable video "),
        (shortened("rlog.zst", 0.3), "fcamera.hevc: raw video has no times, and the log ends before it lists any of"),
        (lambda segment: (segment / "rlog.zst").unlink(), "has no rlog or qlog beside its videos; copy the log too"),
    ],
    ids=["no ecamera", "short fcamera", "short ecamera", "empty fcamera", "short rlog", "no rlog"],
)
def test_a_damaged_full_rate_segment_is_refused_in_one_line(derived, tmp_path, damage, message):
    data = with_damage(derived, tmp_path / "data", damage)
    with pytest.raises(DataError, match=message) as refused:
        cut(data, tmp_path / "shards")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_without_a_wide_camera_the_road_camera_gives_both_views(derived, small, tmp_path):
    data = with_damage(derived, tmp_path / "data", lambda segment: (segment / "ecamera.hevc").unlink())
    shards = cut(data, tmp_path / "shards", "fcamera")
    for view in (IMG.name, BIG_IMG.name):
        found, expected = pictures(shards, view), pictures(small, view)
        assert min(alike(found[frame], expected[frame]) for frame in expected) > 0.99


def kind_of(part: bytes) -> str:
    with log_schema().Event.from_bytes(part) as event:
        return event.which()


def without_tail(derived: Path, events: list, folder: Path, torn_bytes: int) -> Path:
    """As of a device that lost its power: the log ends with the 26th frame of the road camera, the videos have 36."""
    parts = [*full_rate_log(events, FIRST, END)]
    ends = [number for number, part in enumerate(parts, 1) if kind_of(part) == "roadEncodeIdx"][25]
    log = as_zstd([*parts[:ends], parts[ends][:torn_bytes]], is_ended=False)
    return with_damage(derived, folder, lambda segment: (segment / "rlog.zst").write_bytes(log))


@pytest.mark.parametrize("torn_bytes", [0, 40], ids=["between two events", "inside an event"])
def test_an_rlog_without_its_tail_tells_of_the_frames_up_to_there(derived, events, tmp_path, torn_bytes):
    data = without_tail(derived, events, tmp_path / "data", torn_bytes)
    whole, short = (OpenpilotLogs(place / RAW).open(REAL_ID) for place in (derived, data))
    assert (short.provenance["log_is_truncated"], whole.provenance["log_is_truncated"]) == ("true", "false")
    for camera, count in (("fcamera", 26), ("ecamera", 25)):  # the wide camera's word comes after the road's
        expected_us = whole.cameras[camera].timestamp_us[:count]
        np.testing.assert_array_equal(short.cameras[camera].timestamp_us, expected_us)
    result = audit(AuditRequest(data), QUIET)
    assert result["refused"] == 0
    assert {"truncated-log", "frame-count"} <= {finding["code"] for finding in result["findings"]}


def test_windows_of_an_rlog_without_its_tail_have_shorter_paths(derived, events, full, tmp_path):
    short = cut(without_tail(derived, events, tmp_path / "data", 0), tmp_path / "shards")
    found, expected = pictures(short, BIG_IMG.name), pictures(full, BIG_IMG.name)
    assert all((found[frame] == expected[frame]).all() for frame in found)
    windows = short.windows(REAL_ID).to_pylist()
    assert len(windows) == 2
    for mine, theirs in zip(windows, full.windows(REAL_ID).to_pylist(), strict=False):
        points = np.array(mine["target_points"])
        assert 0 < points[0] < 20 > points.max()
        is_known = np.arange(33) < points[:, None]
        mine_m, theirs_m = (np.array(w["target_xy_m"]).reshape(FRAMES - 1, 33, 2)[is_known] for w in (mine, theirs))
        np.testing.assert_allclose(mine_m, theirs_m, atol=0.01)  # the mount settled elsewhere
