"""The shard of a driving student against brute force: pictures, times, paths, pairs of cameras, what is refused."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import PICTURE_SHAPE, T_IDXS_S
from omni_cli.formats.video import encode_h264
from omni_cli.recipes.distill.sampling import questions
from omni_cli.samples.driven_path import driven_paths
from omni_cli.samples.driving_pictures import window_pictures
from omni_cli.samples.driving_windows import NOTHING_COUNTS, UNPAIRED, StepFilters, driving_tables, per_view
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.step_labels import StepLabels, driven_labels
from omni_cli.samples.sync import STALE_FRAME
from omni_cli.samples.windows import BETWEEN_SPLITS, plan_cameras
from omni_cli.scene.cameras import Calibration, Pinhole
from omni_cli.scene.driving_log import DesireLog, DeviceLog, FixLog, MountLog
from omni_cli.scene.model_frame import BIG_IMG, IMG
from omni_cli.scene.poses import EgoMotion, Pose
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation
from tests.support.drives import circle
from tests.support.model_frames import mapped, openpilot_matrix, resampled

SIZE_PX = (96, 64)
LENSES = {"road": Pinhole(*SIZE_PX, 90.0, 91.0, 47.0, 30.0), "wide": Pinhole(*SIZE_PX, 40.0, 41.0, 48.0, 33.0)}
VIEWS = {"img": IMG, "big_img": BIG_IMG}
FRAMES, SPEED_MPS, YAW_RATE, LAST_US = 64, 12.0, 0.15, 8_000_000
LATER_US = 300  # the wide camera is exposed a little later, and so past the instant at which the road's just came
MOUNT_US = np.array([500_000, 1_310_000, 2_090_000])
RPY_RAD = np.array([[0.02, 0.03, -0.04], [0.0, 0.05, 0.01], [-0.03, 0.01, 0.03]])


def road_times_us(count: int = FRAMES) -> np.ndarray:
    """20 Hz with jitter; every fourth frame ends its exposure at most 100 us before an instant of the 5 Hz grid."""
    return np.arange(count) * 50_000 - 100 + np.arange(count) % 5 * 20


def write_video(path: Path, seed: int, count: int = FRAMES, size_px: tuple[int, int] = SIZE_PX) -> Path:
    """A soft coloured pattern that wanders, so that no two frames and no two places look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(float)
    grid = np.meshgrid(np.linspace(0, 7, size_px[1]), np.linspace(0, 10, size_px[0]), indexing="ij")
    seen = (
        np.stack([map_coordinates(coarse[..., c], [grid[0] + k / 40, grid[1] + k / 50], order=1) for c in range(3)], -1)
        for k in range(count)
    )
    with path.open("wb") as stream:
        encode_h264(stream, (picture.astype(np.uint8) for picture in seen), rate_hz=Fraction(20), crf=18)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / f"{name}.mp4", seed) for seed, name in enumerate(LENSES)}


@pytest.fixture
def drive(videos) -> Recording:
    """A device on a left-hand circle; it refines its mount twice and is driven in left-hand traffic."""
    times_us = {"road": road_times_us(), "wide": road_times_us() + LATER_US}
    device = DeviceLog(
        mount=MountLog(MOUNT_US, RPY_RAD, np.full(3, 1.2), np.array([False, True, True])),
        desire=DesireLog(np.array([0, 1_130_000, 1_900_000]), np.array([0, 3, 0])),
        fix=FixLog(np.array([0, 2_000_000]), np.array([False, True])),
        is_right_hand_drive=True,
    )
    level = Pose(Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([0.0, 0.0, 1.2]))
    cameras = {
        name: CameraStream(name, (VideoLocation(path),), times_us[name], Calibration(LENSES[name], level))
        for name, path in videos.items()
    }
    ego = circle(LAST_US / 1e6 + 1, speed_mps=SPEED_MPS, yaw_rate=YAW_RATE, start_us=-1_000_000)
    return Recording("drive", "test", cameras, ego=ego, device=device)


def preprocess(cameras=("road", "wide"), **changes) -> ModelFramePreprocess:
    values = {"num_frames": 4, "sampling": "bilinear", "teacher": "motion", "decoder_id": "pyav"}
    return ModelFramePreprocess(cameras=cameras, **{**values, **changes})


EVERY_STEP = StepFilters()


def cut(recording, how=None, *, filters=EVERY_STEP, label=driven_labels, stride=3, assign_split=None):
    assign = assign_split or (lambda _start_us, _end_us: "train")
    return driving_tables(
        recording, how or preprocess(), stride=stride, max_age_us=100_000, filters=filters, label=label,
        assign_split=assign,
    )  # fmt: skip


def rows_of(tables) -> list[dict]:
    return tables.windows.to_pylist()


def step_times_us(row: dict) -> np.ndarray:
    """True times of the newer road frame of each step."""
    return np.array(row["timestamps_us"]).reshape(-1, 2)[1:, 0]


def with_camera(recording: Recording, name: str, **changes) -> Recording:
    return replace(recording, cameras={**recording.cameras, name: replace(recording.cameras[name], **changes)})


def with_device(recording: Recording, **changes) -> Recording:
    return replace(recording, device=replace(recording.device, **changes))


# -- pictures


def decoded(path: Path) -> list[tuple[np.ndarray, ...]]:
    """Y, U and V of every frame, by PyAV alone."""
    (width, height), planes = SIZE_PX, []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            flat = frame.to_ndarray(format="yuv420p").ravel()
            luma, chroma = width * height, (height // 2, width // 2)
            y = flat[:luma].reshape(height, width)
            planes.append((y, *flat[luma:].reshape(2, *chroma)))
    return planes


def picture(planes, matrix: np.ndarray, sampling: str) -> np.ndarray:
    """A packed model frame from openpilot's matrix: luma in quarters, then chroma at half the size."""
    if sampling == "nearest":
        chroma_matrix = matrix * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]])
    else:
        half = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
        chroma_matrix = half @ matrix @ np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    luma = resampled(planes[0], mapped(matrix, 512, 256), sampling)
    quarters = [luma[0::2, 0::2], luma[1::2, 0::2], luma[0::2, 1::2], luma[1::2, 1::2]]
    return np.stack([*quarters, *(resampled(one, mapped(chroma_matrix, 256, 128), sampling) for one in planes[1:])])


def mount_at(time_us: int) -> np.ndarray:
    return RPY_RAD[max(int((time_us >= MOUNT_US).sum()) - 1, 0)]


@pytest.mark.parametrize(
    ("cameras", "sampling"), [(("road", "wide"), "bilinear"), (("road",), "bilinear"), (("road", "wide"), "nearest")]
)
def test_every_stored_picture_is_openpilots_warp_of_its_frame(drive, videos, cameras, sampling):
    frames = cut(drive, preprocess(cameras, sampling=sampling)).frames.read_all().to_pylist()
    camera_of = {"img": "road", "big_img": cameras[-1]}
    planes = {name: decoded(path) for name, path in videos.items()}
    assert len({(row["camera"], row["frame_index"]) for row in frames}) == len(frames)
    assert {tuple(mount_at(row["timestamp_us"])) for row in frames} == set(map(tuple, RPY_RAD))
    for row in frames:
        camera, index = camera_of[row["camera"]], row["frame_index"]
        assert row["timestamp_us"] == drive.cameras[camera].timestamp_us[index]
        assert (row["width_px"], row["height_px"]) == (512, 256)
        matrix = openpilot_matrix(VIEWS[row["camera"]], LENSES[camera], mount_at(row["timestamp_us"]))
        stored = np.frombuffer(row["pixels"], np.uint8).reshape(PICTURE_SHAPE)
        np.testing.assert_array_equal(stored, picture(planes[camera][index], matrix, sampling))


def test_a_mount_refined_by_less_than_a_tenth_of_a_pixel_changes_no_picture(drive):
    finer = MountLog(np.sort([*MOUNT_US, 900_000]), RPY_RAD[[0, 0, 1, 2]].copy(), np.full(4, 1.2), np.ones(4, bool))
    finer.rpy_rad[1] += 9e-5
    coarser = replace(finer, rpy_rad=finer.rpy_rad + np.array([[0], [1e-3], [0], [0]]))
    plain, refined, moved = (
        cut(one).frames.read_all()["pixels"].to_pylist()
        for one in (drive, with_device(drive, mount=finer), with_device(drive, mount=coarser))
    )
    assert refined == plain
    assert moved != plain


def test_what_infer_looks_at_is_what_is_stored(drive):
    how = preprocess()
    tables = cut(drive, how, stride=2)  # windows overlap
    pixels = tables.frames.read_all()["pixels"].to_pylist()
    plan = plan_cameras(drive, how.cameras, how, stride=2, max_age_us=100_000)
    windows, _ = per_view(drive, plan.windows, how)
    assert len(windows) == tables.windows.num_rows > 5
    for row, seen in zip(rows_of(tables), window_pictures(drive, how, windows), strict=True):
        stored = np.stack([np.frombuffer(pixels[number], np.uint8) for number in row["frames"]])
        np.testing.assert_array_equal(seen, stored.reshape(how.window_shape))


# -- times and paths


def test_a_windows_frames_are_a_fifth_of_a_second_apart_and_the_newest_at_their_instants(drive):
    rows = rows_of(cut(drive))
    road_us = road_times_us()
    assert len(rows) > 3
    for row in rows:
        instants_us = np.arange(row["start_us"], row["end_us"] + 1, 200_000)
        assert (instants_us % 200_000 == 0).all()
        expected = np.array([max(time for time in road_us if time <= instant) for instant in instants_us])
        found = np.array(row["timestamps_us"]).reshape(4, 2)
        np.testing.assert_array_equal(found[:, 0], expected)
        assert np.abs(np.diff(expected) - 200_000).max() <= 100
        assert row["max_age_us"] == (instants_us[:, None] - found).max() <= 100
        assert row["max_skew_us"] == LATER_US
    assert [row["start_us"] for row in rows] == [row["window"] * 3 * 200_000 + rows[0]["start_us"] for row in rows]


def test_each_step_has_the_path_truly_driven_after_its_newer_frame(drive):
    """By our own function, which other tests prove, and in closed form: a circle to the left leads to negative y."""
    for row in rows_of(cut(drive)):
        times_us = step_times_us(row)
        expected = driven_paths(drive, times_us, camera="road")
        targets = np.array(row["target_xy_m"], np.float32).reshape(-1, 33, 2)
        np.testing.assert_array_equal(targets, expected.xy_m)
        np.testing.assert_array_equal(row["target_points"], expected.num_points)
        angle = YAW_RATE * T_IDXS_S
        on_the_circle = SPEED_MPS / YAW_RATE * np.stack([np.sin(angle), np.cos(angle) - 1], axis=1)
        reached = times_us[:, None] + T_IDXS_S * 1e6 <= LAST_US + 0.5
        np.testing.assert_array_equal(row["target_points"], reached.sum(axis=1))
        np.testing.assert_allclose(targets, np.where(reached[..., None], on_the_circle, 0), atol=2e-3)
        np.testing.assert_allclose(row["speed_mps"], SPEED_MPS, rtol=1e-5)
        np.testing.assert_allclose(row["yaw_rate_radps"], YAW_RATE, rtol=1e-5)
        assert (row["driven_xy_m"], row["driven_points"]) == (row["target_xy_m"], row["target_points"])
        assert row["scene_is_known"] == row["scene_lane_lines_m"] == row["scene_lead"] == []


def test_a_path_begins_when_the_newer_frame_was_seen_not_at_its_instant(drive):
    """The car gains 1.5 m/s each second, and every frame is 40 ms older than its instant."""
    time_us = np.arange(-1_000_000, LAST_US + 1, 10_000)
    zeros, speed = np.zeros(len(time_us)), 5 + 1.5 * time_us / 1e6
    ahead = 5 * time_us / 1e6 + 0.75 * (time_us / 1e6) ** 2
    along = [np.column_stack([values, zeros, zeros]) for values in (ahead, speed, zeros + 1.5)]
    ego = EgoMotion(time_us, along[0], np.tile([0.0, 0, 0, 1], (len(time_us), 1)), *along[1:], zeros)
    older = replace(with_camera(drive, "road", timestamp_us=road_times_us() - 40_000), ego=ego)
    for row in rows_of(cut(older, preprocess(("road",)))):
        times_us = step_times_us(row)
        assert (times_us % 200_000 < 161_000).all()
        now_mps = 5 + 1.5 * times_us / 1e6
        expected = now_mps[:, None] * T_IDXS_S + 0.75 * T_IDXS_S**2
        reached = np.arange(33) < np.array(row["target_points"])[:, None]
        found = np.array(row["target_xy_m"]).reshape(-1, 33, 2)[..., 0]
        np.testing.assert_allclose(found, np.where(reached, expected, 0), atol=1e-3)
        np.testing.assert_allclose(row["speed_mps"], now_mps, rtol=1e-5)


def test_a_desire_is_told_once_where_it_begins_and_the_traffic_in_every_window(drive):
    rows = rows_of(cut(drive))
    pulses = {
        int(time): pulse for row in rows for time, pulse in zip(step_times_us(row), row["desire_pulse"], strict=True)
    }
    (begins,) = [time for time, pulse in pulses.items() if pulse]
    assert pulses[begins] == 3
    assert begins - 200_000 < 1_130_000 <= begins
    assert {row["left_hand_traffic"] for row in rows} == {1}
    assert {row["left_hand_traffic"] for row in rows_of(cut(with_device(drive, is_right_hand_drive=False)))} == {0}


# -- two cameras


def later(drive: Recording, offset_us: int) -> Recording:
    return with_camera(drive, "wide", timestamp_us=road_times_us() + offset_us)


@pytest.mark.parametrize("offset_us", [LATER_US, -LATER_US, 9_900, -9_900])
def test_the_wide_camera_is_paired_with_the_frame_exposed_nearest_to_the_roads(drive, offset_us):
    recording, how = later(drive, offset_us), preprocess()
    plan = plan_cameras(recording, how.cameras, how, stride=3, max_age_us=100_000)
    behind = 0
    for window, seen in zip(plan.windows, per_view(recording, plan.windows, how)[0], strict=True):
        nearest = [np.abs(recording.cameras["wide"].timestamp_us - time).argmin() for time in seen.timestamp_us[:, 0]]
        np.testing.assert_array_equal(seen.frame_index[:, 1], nearest)
        np.testing.assert_array_equal(seen.frame_index[:, 0], nearest)  # they count their frames alike
        np.testing.assert_array_equal(seen.timestamp_us[:, 1] - seen.timestamp_us[:, 0], offset_us)
        behind += int((window.frame_index[:, 1] < nearest).sum())  # as two independent cameras
    assert (behind > 0) == (offset_us > 0)


@pytest.mark.parametrize("offset_us", [10_500, -11_000])
def test_cameras_more_than_10_ms_apart_are_refused(drive, offset_us):
    apart, never = f"{abs(offset_us) / 1000:.1f}", later(drive, offset_us)
    with pytest.raises(DataError, match=f"^drive: in every window wide and road are {apart} ms apart or more, at most"):
        cut(never)
    with pytest.raises(DataError, match=r"at most 10 ms was expected; look with one camera: --cameras road$"):
        questions(never, preprocess(), 3, 100_000)
    cut(never, preprocess(("road",)))


def test_a_lost_wide_frame_costs_the_windows_that_look_at_it_alone(drive, tmp_path):
    """At etl as at infer; what is left is what it would be beside the others, and of the others no picture is kept."""
    kept, how = np.delete(np.arange(FRAMES), 24), preprocess()  # exposed at 1.2 s
    video = VideoLocation(write_video(tmp_path / "lossy.mp4", 1, count=len(kept)))
    lossy = with_camera(drive, "wide", timestamp_us=drive.cameras["wide"].timestamp_us[kept], videos=(video,))
    whole, found = rows_of(cut(drive, stride=1)), cut(lossy, stride=1)
    sound = [row for row in whole if not row["start_us"] <= 1_200_000 <= row["end_us"]]
    assert found.dropped == {UNPAIRED: len(whole) - len(sound)} == {UNPAIRED: 4}
    names = ("start_us", "end_us", "timestamps_us", "target_xy_m", "desire_pulse")
    assert [[row[name] for name in names] for row in rows_of(found)] == [[row[name] for name in names] for row in sound]
    assert {number for row in rows_of(found) for number in row["frames"]} == set(range(found.frames.num_rows))
    asked = questions(lossy, how, 1, 100_000)
    assert (asked.count, asked.dropped) == (len(sound), found.dropped)
    assert [one.window.start_us for one in asked.asked] == [row["start_us"] for row in sound]


# -- what counts


def counts_by_time(tables) -> dict[int, int]:
    return {
        int(time): count
        for row in rows_of(tables)
        for time, count in zip(step_times_us(row), row["counts"], strict=True)
    }


@pytest.mark.parametrize(
    ("filters", "from_us"),
    [
        (StepFilters(), 0),
        (StepFilters(calibrated=True), 1_310_000),
        (StepFilters(fix=True), 2_000_000),
        (StepFilters(calibrated=True, fix=True), 2_000_000),
    ],
)
def test_only_what_passes_the_filters_counts(drive, filters, from_us):
    counts = counts_by_time(cut(drive, filters=filters))
    assert {time: int(time >= from_us) for time in counts} == counts
    every = counts_by_time(cut(drive))
    assert len(every) == 12
    assert [time for time, count in counts.items() if count] == [time for time in every if time >= from_us]


def silent_from(time_us: int):
    """A teacher that says nothing of what is seen later."""

    def label(recording, looks, driven):
        known = looks.timestamp_us < time_us
        return StepLabels(driven.xy_m * known[:, None, None], driven.num_points * known)

    return label


@pytest.mark.parametrize(
    ("filters", "silent_us", "split"),
    [
        (StepFilters(calibrated=True), LAST_US, "train"),
        (StepFilters(fix=True), LAST_US, "val"),
        (StepFilters(), 1_000_000, "train"),
        (StepFilters(calibrated=True), 2_000_000, "train"),
    ],
)
def test_windows_without_a_step_of_use_are_dropped_with_their_pictures_and_counted(drive, filters, silent_us, split):
    """What is left is what it would be beside the others."""
    settings = {"label": silent_from(silent_us), "assign_split": lambda _start_us, _end_us: split, "stride": 2}
    every, found = cut(drive, **settings | {"assign_split": lambda *_: "val"}), cut(drive, filters=filters, **settings)
    counts = {StepFilters(): 0, StepFilters(calibrated=True): 1_310_000, StepFilters(fix=True): 2_000_000}[filters]
    useful = [row for row in rows_of(every) if any(counts <= time < silent_us for time in step_times_us(row))]
    assert 0 < len(useful) < every.windows.num_rows
    assert found.dropped == {NOTHING_COUNTS: every.windows.num_rows - len(useful)}
    assert [row["window"] for row in rows_of(found)] == list(range(len(useful)))
    seen = [pictures_of(tables, row) for tables, rows in ((every, useful), (found, rows_of(found))) for row in rows]
    assert seen[: len(useful)] == seen[len(useful) :]
    assert {number for row in rows_of(found) for number in row["frames"]} == set(range(found.frames.num_rows))
    left_out = ("window", "frames", "counts", "split")
    assert [{name: row[name] for name in row if name not in left_out} for row in rows_of(found)] == [
        {name: row[name] for name in row if name not in left_out} for row in useful
    ]


def pictures_of(tables, row: dict) -> list[tuple]:
    """Camera, frame and pixels of everything that a window looks at."""
    frames = tables.frames.read_all().take(row["frames"])
    return list(zip(*(frames[name].to_pylist() for name in ("camera", "frame_index", "pixels")), strict=True))


def test_a_window_of_which_the_teacher_says_nothing_is_still_measured(drive):
    tables = cut(drive, label=silent_from(1_000_000), assign_split=lambda start_us, _: "val" if start_us else "train")
    assert tables.dropped == {}
    assert any(sum(row["target_points"]) == 0 < sum(row["driven_points"]) for row in rows_of(tables))


def test_a_teacher_sees_every_window_also_those_that_are_dropped(drive):
    seen = []

    def listening(recording, looks, driven):
        seen.append(looks.instants_us.tolist())
        return driven_labels(recording, looks, driven)

    dropped = [cut(drive, filters=filters, label=listening).dropped for filters in (EVERY_STEP, StepFilters(fix=True))]
    assert bool(dropped[0]) < bool(dropped[1])
    assert seen[0] == seen[1]


def test_a_recording_without_a_step_that_counts_is_refused(drive):
    never = with_device(drive, fix=None)
    with pytest.raises(
        DataError,
        match=r"^drive: no step can be learned from: of 13, 0 pass the filters, 13 have a target and 13 a path truly",
    ):
        cut(never, filters=StepFilters(fix=True))
    with pytest.raises(DataError, match="of 13, 13 pass the filters, 0 have a target and 13 a path truly driven; expe"):
        cut(drive, label=silent_from(0))


def test_windows_between_the_splits_are_dropped_and_counted(drive):
    def split(start_us: int, end_us: int) -> str | None:
        return "train" if end_us < 2_000_000 else "val" if start_us > 2_100_000 else None

    how = preprocess(("road",))
    plan = plan_cameras(drive, how.cameras, how, stride=1, max_age_us=100_000)
    splits = [split(window.start_us, window.end_us) for window in plan.windows]
    tables = cut(drive, how, stride=1, assign_split=split)
    assert tables.windows["split"].to_pylist() == [one for one in splits if one]
    assert tables.dropped == {BETWEEN_SPLITS: splits.count(None)}
    assert {"train", "val", None} == set(splits)


def test_a_teachers_memory_begins_anew_after_dropped_windows(drive, tmp_path):
    told = []

    def listening(recording, looks, driven):
        told.append(looks)
        return driven_labels(recording, looks, driven)

    kept = np.r_[0:20, 28:FRAMES]  # a hole of 0.4 s, in the video as in its times
    video = VideoLocation(write_video(tmp_path / "holey.mp4", 0, count=len(kept)))
    holey = with_camera(drive, "road", timestamp_us=road_times_us()[kept], videos=(video,))
    tables = cut(holey, preprocess(("road",)), label=listening, stride=1)
    (looks,) = told
    seen = sorted({t for row in rows_of(tables) for t in range(row["start_us"], row["end_us"] + 1, 200_000)})
    assert looks.instants_us.tolist() == seen
    begins = looks.instants_us[looks.begins].tolist()
    assert begins == [time for time in seen if time - 200_000 not in seen]
    assert len(begins) == 2
    assert tables.dropped == {STALE_FRAME: 4}  # those with the instant 1.2 s, whose newest frame is of 0.95 s
    assert set(counts_by_time(tables).values()) == {1}
    starts = {row["start_us"] for row in rows_of(tables)}
    assert set(begins) <= starts  # so no step ends there


# -- what is refused


WRONG = {
    "no calibration": (
        lambda drive, _: with_camera(drive, "road", calibration=None),
        r"^drive: road has no calibration, which a driving model's view is warped with; a plain video has none: name",
    ),
    "no mount": (
        lambda drive, _: with_device(drive, mount=None),
        r"^drive: its log holds no liveCalibration, so its mount is unknown; fetch the log again$",
    ),
    "another size": (
        lambda drive, path: with_camera(drive, "road", videos=(VideoLocation(write_video(path, 5, size_px=(80, 48))),)),
        r"^drive road: its pictures are 80x48 px, its calibration is for 96x64 px; fetch both again$",
    ),
    "fewer times than frames": (
        lambda drive, _: with_camera(drive, "road", timestamp_us=road_times_us()[:-8]),
        rf"^drive road: {FRAMES} frames for {FRAMES - 8} timestamps; fetch it again$",
    ),
    "a camera is missing": (
        lambda drive, _: replace(drive, cameras={"road": drive.cameras["road"]}),
        r"^drive: lacks wide; fetch them, or choose others with --cameras$",
    ),
    "no motion": (lambda drive, _: replace(drive, ego=None), r"^drive: .*motion"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_student_cannot_learn_from_is_refused_in_one_line(drive, tmp_path, wrong):
    change, message = WRONG[wrong]
    with pytest.raises(DataError, match=message) as refusal:
        cut(change(drive, tmp_path / "other.mp4"))
    assert "\n" not in str(refusal.value)
