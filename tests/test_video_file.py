"""A plain video file is one camera whose times come from its container."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import video
from omni_cli.sources.video_file import open_video, video_recording
from tests.support import openpilot as made


def test_variable_times_come_from_the_container(tmp_path):
    times_us = np.array([0, 40_000, 80_000, 500_000, 540_000])
    path = tmp_path / "clip.mkv"
    path.write_bytes(made.encode("matroska", "libx264", times_us + 3_000_000, {"preset": "ultrafast", "bf": "2"}))
    stream = open_video(path, "front")
    np.testing.assert_allclose(stream.timestamp_us, times_us, atol=1000)  # matroska keeps milliseconds
    pictures = list(video.decode(stream.videos[0].read(), "clip", range(5), width_px=96, height_px=64))
    assert np.all(np.diff([picture.mean() for _, picture in pictures]) > 0)


def test_several_files_start_together(tmp_path):
    times_us = made.frame_times_us(10)
    for name, late_us in (("a.mp4", 0), ("b.mp4", 700_000)):
        content = made.encode("mpegts", "libx264", times_us + late_us, {"preset": "ultrafast", "bf": "0"})
        (tmp_path / name).write_bytes(content)
    recording = video_recording({"left": tmp_path / "a.mp4", "right": tmp_path / "b.mp4"})
    assert (recording.id, recording.ego, recording.speed) == ("a", None, None)
    np.testing.assert_array_equal(recording.cameras["left"].timestamp_us, times_us - times_us[0])
    np.testing.assert_array_equal(recording.cameras["left"].timestamp_us, recording.cameras["right"].timestamp_us)


def test_what_is_no_timed_video_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.mp4").write_text("these are notes, not a video\n" * 100)
    (tmp_path / "raw.hevc").write_bytes(made.raw_hevc(made.frame_times_us(5)))
    (tmp_path / "empty.mp4").touch()
    whole = made.encode("mp4", "libx264", made.frame_times_us(5), {"preset": "ultrafast"})
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("notes.mp4", "not a readable video"),
        ("empty.mp4", "not a readable video"),
        ("cut.mp4", "not a readable video"),
        ("raw.hevc", "a raw hevc stream has no times"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_video(tmp_path / name, "front")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no video file"):
        open_video(tmp_path / "nothing.mp4", "front")
    with pytest.raises(UsageError, match="no video file was given"):
        video_recording({})


X264 = ("libx264", {"preset": "veryfast", "bf": "2", "g": "15", "crf": "5"})
X264_WITHOUT_B = ("libx264", {"preset": "ultrafast", "bf": "0", "g": "15", "crf": "5"})
X264_OPEN = ("libx264", {**X264[1], "x264-params": "open-gop=1:keyint=15:scenecut=0"})
_X265 = "keyint=15:min-keyint=15:log-level=none:pools=none:frame-threads=1"
X265_OPEN = ("libx265", {"preset": "ultrafast", "crf": "5", "x265-params": f"bframes=3:open-gop=1:{_X265}"})
X265_WITHOUT_B = ("libx265", {"preset": "ultrafast", "crf": "5", "x265-params": f"bframes=0:{_X265}"})
COUNT = 45
TIMES_US = made.frame_times_us(COUNT)


def copied(video: bytes, container: str, first: int = 0, earlier_us: int = 0) -> bytes:
    """Copy packets without decoding them, as `ffmpeg -c copy` does.

    The copy begins at packet `first`, or at its first random access point where that is -1. Times are `earlier_us`
    less: an mp4 whose first frames come before 0 gets an edit list that hides them.
    """
    copy = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(copy, "w", format=container) as target:
        stream = source.streams.video[0]
        track, offset = target.add_stream_from_template(stream), round(earlier_us / 1e6 / stream.time_base)
        packets = [packet for packet in source.demux(stream) if packet.size]
        second_gop = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second_gop if first < 0 else first :]:
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, track
            target.mux(packet)
    return copy.getvalue()


def made_as(container: str, codec: tuple[str, dict[str, str]]) -> bytes:
    return made.encode(container, codec[0], TIMES_US, codec[1])


CUT_US = int(TIMES_US[20])  # within the second of three groups of pictures
PLAYED = {
    "mp4, nothing cut": lambda: made_as("mp4", X264),
    "mp4 with an edit list": lambda: copied(made_as("mp4", X264), "mp4", earlier_us=CUT_US),
    "mp4 with an edit list, no B-frames": lambda: copied(made_as("mp4", X264_WITHOUT_B), "mp4", earlier_us=CUT_US),
    "mp4 of HEVC, at an open group": lambda: copied(made_as("mp4", X265_OPEN), "mp4", first=-1),
    "mkv, amid a group": lambda: copied(made_as("matroska", X264), "matroska", first=7),
    "ts, amid a group": lambda: copied(made_as("mpegts", X264_WITHOUT_B), "mpegts", first=7),
    "ts with B-frames": lambda: made_as("mpegts", X264),
    "ts with B-frames, amid a group": lambda: copied(made_as("mpegts", X264), "mpegts", first=7),
    "ts at an open group": lambda: copied(made_as("mpegts", X264_OPEN), "mpegts", first=-1),
    "ts of HEVC, at an open group": lambda: copied(made_as("mpegts", X265_OPEN), "mpegts", first=-1),
}


def presented(video: bytes) -> list[tuple[int, float]]:
    """Time in us and brightness of each frame that ffmpeg presents, without our code."""
    with av.open(io.BytesIO(video)) as container:
        frames = container.decode(container.streams.video[0])
        return [(round((f.pts or 0) * f.time_base * 1_000_000), f.to_ndarray(format="rgb24").mean()) for f in frames]


def number_of(brightness: float) -> int:
    """Which of the frames that were encoded a picture shows."""
    return int(np.abs([picture.mean() - brightness for picture in made.frames(COUNT)]).argmin())


def pictures(video_bytes: bytes, indices, decoder: str) -> dict[int, float]:
    decoded = video.decode(video_bytes, "clip", indices, width_px=96, height_px=64, decoder=decoder)
    return {index: picture.mean() for index, picture in decoded}


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize("cut", PLAYED)
def test_frames_and_times_are_those_that_ffmpeg_presents(cut, decoder):
    clip = PLAYED[cut]()
    expected = presented(clip)
    info = video.probe(clip, "clip")
    assert info.num_frames == len(expected) > 20
    assert info.num_frames < COUNT or cut in ("mp4, nothing cut", "ts with B-frames")
    np.testing.assert_array_equal(info.pts_us, [time_us for time_us, _ in expected])
    shown = pictures(clip, range(info.num_frames), decoder)
    assert list(shown) == list(range(info.num_frames))
    np.testing.assert_allclose(list(shown.values()), [brightness for _, brightness in expected], atol=1.5)
    numbers = [number_of(brightness) for brightness in shown.values()]
    assert numbers == list(range(COUNT - info.num_frames, COUNT))  # the last ones, each once
    times_us = TIMES_US[numbers]
    np.testing.assert_allclose(np.diff(info.pts_us), np.diff(times_us), atol=1001)  # matroska keeps milliseconds
    some = range(3, info.num_frames, 7)
    assert pictures(clip, some, decoder) == {index: shown[index] for index in some}


@pytest.mark.parametrize(
    ("codec", "first", "num_left"),
    [(X265_OPEN, 0, 45), (X265_OPEN, 7, 30), (X265_OPEN, -1, 30), (X265_WITHOUT_B, 0, 45), (X265_WITHOUT_B, 7, 30)],
)
def test_raw_hevc_counts_what_a_decoder_presents(codec, first, num_left):
    clip = copied(made_as("mp4", codec), "hevc", first=first)
    info = video.probe(clip, "clip")
    assert (info.num_frames, len(info.pts_us)) == (num_left, 0)
    assert len(presented(clip)) == num_left
    for decoder in ("pyav", "torchcodec"):
        shown = pictures(clip, range(num_left), decoder)
        assert [number_of(brightness) for brightness in shown.values()] == list(range(COUNT - num_left, COUNT))
        assert pictures(clip, [5, 17], decoder) == {index: shown[index] for index in (5, 17)}
        with pytest.raises(DataError, match="clip: ends before frame 45; the video is shorter than its timestamps"):
            pictures(clip, [45], decoder)


def test_a_wrong_frame_of_torchcodec_is_refused_by_its_time():
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as target:
        track = target.add_stream("mpeg4", rate=20, options={"bf": "2", "g": "15"})
        track.width, track.height, track.pix_fmt = 96, 64, "yuv420p"
        for picture in made.frames(COUNT):
            target.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(track.encode(None))
    clip = stream.getvalue()
    assert [number_of(brightness) for brightness in pictures(clip, range(COUNT), "pyav").values()] == list(range(COUNT))
    message = r"clip: torchcodec gives the frame at \d\.\d+ s for the one at \d\.\d+ s; .* --set sample\.decoder=pyav"
    with pytest.raises(DataError, match=message):
        pictures(clip, [5], "torchcodec")


def test_a_cut_clip_is_timed_from_its_first_picture(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(copied(made_as("mp4", X264), "mp4", earlier_us=CUT_US))
    stream = open_video(path, "front")
    np.testing.assert_allclose(stream.timestamp_us, TIMES_US[20:] - TIMES_US[20], atol=2)


@pytest.mark.real_data
@pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
def test_a_real_clip():
    clip = Path(os.environ["OMNI_REAL_DATA"]) / "udacity_lanelines" / "test_videos" / "solidWhiteRight.mp4"
    recording = video_recording({"front": clip})
    assert recording.id == "solidWhiteRight"
    np.testing.assert_array_equal(recording.cameras["front"].timestamp_us, np.arange(221) * 40_000)
