"""A plain video file is one camera whose times come from its container."""

import os
from pathlib import Path

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
    pictures = list(video.decode(stream.video.read(), "clip", range(5), width_px=96, height_px=64))
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


@pytest.mark.real_data
@pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
def test_a_real_clip():
    clip = Path(os.environ["OMNI_REAL_DATA"]) / "udacity_lanelines" / "test_videos" / "solidWhiteRight.mp4"
    recording = video_recording({"front": clip})
    assert recording.id == "solidWhiteRight"
    np.testing.assert_array_equal(recording.cameras["front"].timestamp_us, np.arange(221) * 40_000)
