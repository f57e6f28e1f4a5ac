"""Videos are read through a window and pictures written as they are decoded, however long and wherever they are."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError
from omni_cli.formats.containers import FileSlice
from omni_cli.formats.video import decode, decode_only, encode_h264, probe
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.driving_windows import StepFilters, driving_tables
from omni_cli.samples.frame_batches import StoredViews, frame_batches, row_of_view
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.shards import finished_recording, frames_path, write_recording
from omni_cli.samples.step_labels import driven_labels
from omni_cli.samples.tables import FRAMES
from omni_cli.samples.windows import ego_motion_tables
from omni_cli.scene.cameras import Calibration, Pinhole
from omni_cli.scene.poses import Pose
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation
from tests.support.drives import circle, preprocess

FPS = 10
SIZE = {"width_px": 96, "height_px": 64}


def clip(seconds: float, width_px: int = 96, height_px: int = 64) -> bytes:
    """A video that grows brighter by one grey level a frame, over and over."""
    stream = io.BytesIO()
    greys = (np.full((height_px, width_px, 3), 20 + k % 200, np.uint8) for k in range(int(seconds * FPS)))
    encode_h264(stream, greys, rate_hz=Fraction(FPS), gop=FPS)
    return stream.getvalue()


def drive_of(path: Path, seconds: float) -> Recording:
    level = Pose(Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([0.0, 0.0, 1.2]))
    lens = Pinhole(96, 64, 90.0, 90.0, 48.0, 32.0)
    times_us = np.arange(int(seconds * FPS)) * (1_000_000 // FPS)
    camera = CameraStream("road", (VideoLocation(path),), times_us, Calibration(lens, level))
    ego = circle(seconds + 2, speed_mps=5.0, yaw_rate=0.1, start_us=-1_000_000)
    return Recording("drive", "test", {"road": camera}, ego=ego)


# -- where the bytes lie


@pytest.mark.fault("F23")
def test_a_video_beyond_four_gigabytes_of_a_file_is_read_through_a_window(tmp_path):
    content, path, offset = clip(2), tmp_path / "chunk.zip", 5 * 2**30 + 7
    with path.open("wb") as stream:  # sparse
        stream.seek(offset)
        stream.write(content + b"what follows is another member" * 100)
    location = VideoLocation(path, offset, len(content))
    assert probe(location, "clip") == probe(content, "clip")
    assert decode_only(location, "clip") == 20
    expected = dict(decode(content, "clip", range(0, 20, 3), **SIZE))
    found = dict(decode(location, "clip", range(0, 20, 3), **SIZE))
    assert list(found) == list(expected)
    assert all(np.array_equal(found[index], expected[index]) for index in expected)


def test_a_window_ends_where_its_file_or_its_part_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with FileSlice(VideoLocation(path, 10, 20)) as part:
        assert part.read(5) == bytes(range(10, 15))
        assert part.read() == bytes(range(15, 30))
        assert part.read(1) == b""
        assert part.seek(-3, io.SEEK_END) == 17
        assert part.read(9) == bytes(range(27, 30))
        assert part.seek(50) == 50
        assert part.read(1) == b""
    with FileSlice(VideoLocation(path, 95, 20)) as part:
        assert part.read() == bytes(range(95, 100))
    with FileSlice(VideoLocation(path, 90)) as part:
        assert (part.seek(0, io.SEEK_END), part.read()) == (10, b"")


@pytest.mark.fault("F15")
def test_a_video_that_is_cut_off_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(2)[:-200])
    with pytest.raises(DataError, match="clip: not a readable video"):
        camera_frames("clip", CameraStream("road", (VideoLocation(path),), np.arange(20)))


def noise_clip(path: Path, *, damaged: int | None = None) -> Path:
    """A video of moving noise in one group of pictures; half of a frame's slice may be zeros."""
    rng, stream = np.random.default_rng(0), io.BytesIO()
    noise = rng.integers(0, 255, (64, 160, 3), dtype=np.uint8).repeat(2, axis=1)
    encode_h264(stream, (noise[:, k : k + 96] for k in range(20)), rate_hz=Fraction(FPS), gop=20)
    content = bytearray(stream.getvalue())
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    if damaged is not None:
        begin, size = packets[damaged].pos, packets[damaged].size
        content[begin + size // 2 : begin + size] = bytes(size - size // 2)
    path.write_bytes(content)
    return path


@pytest.mark.fault("F15")
def test_damage_to_a_frame_that_nobody_wants_is_told_where_a_wanted_one_is_made_of_it(tmp_path):
    whole, hurt = noise_clip(tmp_path / "whole.mp4"), noise_clip(tmp_path / "hurt.mp4", damaged=4)
    marked, shown = [], []
    for path in (whole, hurt):
        with av.open(path) as container:
            frames = list(container.decode(video=0))
        marked.append([number for number, frame in enumerate(frames) if frame.is_corrupt])
        shown.append(frames[9].to_ndarray(format="rgb24").astype(int))
    assert marked == [[], [4]]  # the decoder marks that frame alone
    assert np.abs(shown[1] - shown[0]).mean() > 1  # and this is what comes of it
    assert [index for index, _ in decode(whole.read_bytes(), "clip", [9], **SIZE)] == [9]
    with pytest.raises(DataError, match="clip: frame 4 is damaged; fetch the file again"):
        list(decode(hurt.read_bytes(), "clip", [9], **SIZE))
    assert [index for index, _ in decode(hurt.read_bytes(), "clip", [3], **SIZE)] == [3]  # before it nothing is wrong


@pytest.mark.fault("F18")
def test_frames_that_share_a_time_are_told_apart_by_nobody(tmp_path):
    copy = io.BytesIO()
    with av.open(noise_clip(tmp_path / "clip.mp4")) as source, av.open(copy, "w", format="matroska") as target:
        stream = source.streams.video[0]
        track = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            packet.pts = packet.dts = (number - (number > 5)) * round(1 / FPS / stream.time_base)
            packet.stream = track
            target.mux(packet)
    assert probe(copy.getvalue(), "clip").num_frames == 20
    for wanted in ([5], [6], [10]):
        with pytest.raises(DataError, match="clip: two frames have the same time; remux the file"):
            list(decode(copy.getvalue(), "clip", wanted, **SIZE))


def test_a_later_video_of_another_size_is_refused(tmp_path):
    for number, width_px in enumerate((96, 128)):
        (tmp_path / f"{number}.mp4").write_bytes(clip(1, width_px))
    videos = tuple(VideoLocation(tmp_path / f"{number}.mp4", num_frames=10) for number in range(2))
    camera = camera_frames("road", CameraStream("road", videos, np.arange(20)))
    assert len(list(camera.decode([3, 9], **SIZE, decoder="pyav"))) == 2
    for decoded in (camera.decode([3, 12], **SIZE, decoder="pyav"), camera.decode_yuv([12])):
        with pytest.raises(DataError, match=r"1\.mp4: is 128x64 px where the camera's first video is 96x64; fetch"):
            list(decoded)


# -- in what order pictures lie


@pytest.mark.parametrize("counts", [[(3, 1)], [(40, 1), (33, 1)], [(50, 2)], [(7, 1), (21, 2), (40, 3)]])
def test_rows_lie_view_after_view_in_blocks_that_fill_a_batch(counts):
    stored, names = [], []
    for number, (count, views) in enumerate(counts):
        names.append([f"{number}{view}" for view in range(views)])
        frames = np.arange(count) * 2 + number
        pictures = [[np.full((2, 3), 10 * number + frame % 10 + 100 * view, np.uint8) for view in range(views)]
                    for frame in frames.tolist()]  # fmt: skip
        stored.append(StoredViews(tuple(names[-1]), frames, frames * 100, (3, 2), 6, lambda made=pictures: iter(made)))
    made = frame_batches(stored)
    batches = list(made.batches())
    assert [batch.num_rows for batch in batches[:-1]] == [32] * (len(batches) - 1)
    table = made.read_all()
    assert (table.schema, table.num_rows, made.num_rows) == (FRAMES, made.num_rows, sum(n * v for n, v in counts))
    rows = table.to_pylist()
    for name, of_view in zip([name for group in names for name in group], row_of_view(stored), strict=True):
        number, view = int(name[0]), int(name[1])
        mine = [rows[row] for row in of_view.tolist()]
        assert [row["camera"] for row in mine] == [name] * len(mine)
        frames = [row["frame_index"] for row in mine]
        assert frames == [2 * k + number for k in range(counts[number][0])]
        assert [row["timestamp_us"] for row in mine] == [frame * 100 for frame in frames]
        greys = [10 * number + frame % 10 + 100 * view for frame in frames]
        assert [set(row["pixels"]) for row in mine] == [{grey % 256} for grey in greys]
        assert np.count_nonzero(np.diff(of_view) != 1) <= len(frames) * len(names[number]) // 32 + 1  # few pieces


def test_pictures_are_decoded_when_they_are_written_and_damage_is_found_then(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(2))
    grid = preprocess(cameras=("road",), columns=1, canvas_width_px=112, canvas_height_px=56, num_frames=4)
    tables = ego_motion_tables(
        drive_of(path, 2), grid, stride=4, max_age_us=100_000, assign_split=lambda _start, _end: "train"
    )
    assert tables.frames.num_rows == tables.frames.read_all().num_rows > 4
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + 2000
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(content)
    with pytest.raises(DataError, match="drive road: "):
        write_recording(tmp_path / "shards", "drive", tables, "key")
    assert not any(frames_path(tmp_path / "shards", "drive").parent.iterdir())
    path.write_bytes(clip(2))
    write_recording(tmp_path / "shards", "drive", tables, "key")
    assert finished_recording(tmp_path / "shards", "drive", "key")
    with pa.ipc.open_stream(frames_path(tmp_path / "shards", "drive")) as written:
        assert written.read_all().equals(tables.frames.read_all())


# -- in how much memory


def write_shard(kind: str, path: Path, seconds: float) -> None:
    """Write one drive's shard; runs in a process of its own."""
    recording, split = drive_of(path, seconds), {"max_age_us": 150_000, "assign_split": lambda _start, _end: "train"}
    if kind == "tiled":
        grid = preprocess(cameras=("road",), columns=1, canvas_width_px=280, canvas_height_px=196, num_frames=8)
        tables = ego_motion_tables(recording, grid, stride=4, **split)
    else:
        how = ModelFramePreprocess(
            cameras=("road",), num_frames=8, sampling="nearest", teacher="motion", decoder_id="pyav"
        )
        tables = driving_tables(recording, how, stride=4, filters=StepFilters(), label=driven_labels, **split)
    write_recording(path.parent / f"{kind}-{seconds:g}", "drive", tables, "key")


CHILD = """
import resource, sys
from pathlib import Path
from tests.test_decode import write_shard
kind, short, long = sys.argv[1:]
for path in (short, long):
    write_shard(kind, Path(path), float(Path(path).stem))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("kind", ["tiled", "model frames"])
def test_the_memory_of_a_worker_does_not_grow_with_the_length_of_a_drive(tmp_path, kind):
    """Pain 7."""
    paths = [tmp_path / f"{seconds}.mp4" for seconds in (12, 48)]
    for path in paths:
        path.write_bytes(clip(float(path.stem)))
    words = [sys.executable, "-c", CHILD, kind, *map(str, paths)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    short_mib, long_mib = (int(kib) / 1024 for kib in said)
    pictures_mib = frames_path(tmp_path / f"{kind}-48", "drive").stat().st_size / 2**20
    assert pictures_mib > 70
    assert long_mib < 1.1 * short_mib
    assert long_mib - short_mib < 16  # of what the two differ by, nothing
