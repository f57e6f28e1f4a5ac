"""What a user may call a recording of a route."""

import pytest

from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.stages import clips
from omni_cli.stages.clips import find_clips
from tests.support.driving import tiny_student, write_routes
from tests.support.live import encoded, pictures
from tests.support.openpilot import DONGLE
from tests.support.pipeline import tiny_recipe


def test_a_route_may_be_called_as_openpilot_does_or_by_its_log(tmp_path):
    ids, preprocess = write_routes(tmp_path, 4), tiny_student(cameras="qcamera").preprocess()

    def found(word: str) -> list[str]:
        return [clip.name for clip in find_clips(preprocess, (word,), {}, tmp_path, tiled=False)]

    log = ids[1].removeprefix(f"{DONGLE}_")
    for word in (ids[1], f"{DONGLE}|{log}", f"{DONGLE}/{log}", log):
        assert found(word) == [ids[1]]
    for word in (DONGLE, "0"):
        with pytest.raises(UsageError, match=rf"no recording of that id .*, or an id: {ids[0]}, {ids[1]}$"):
            found(word)
    with pytest.raises(UsageError, match=rf"no recording of that id .*; did you mean '{ids[1]}'\?$"):
        found(log[1:])


def test_of_very_many_ids_a_word_is_compared_with_those_alone_that_begin_or_end_as_it_does(monkeypatch):
    monkeypatch.setattr(clips, "_COMPARED", 3)
    ids = ["2b7e-0001", "2b7e-0002", "91c4-0001", "91c4-0003"]
    assert clips._comparable("2b7f-0001", ids[:3]) == ids[:3]
    assert clips._comparable("91c5-0003", ids) == ["91c4-0003"]
    assert clips._remedy("91c5-0003", ids) == "did you mean '91c4-0003'?"
    assert clips._remedy("2b77-0077", ids).startswith("give a file that is there, or an id: 2b7e-0001, ")


def names(clips) -> list[str]:
    return [clip.name for clip in clips]


def test_a_folder_holds_clips_drives_of_a_file_a_camera_and_folders(tmp_path):
    video = encoded(pictures(3), [0.0, 0.1, 0.2], form="mp4")
    first, second, other = CAMERA_SETS["4-cam"][0], CAMERA_SETS["4-cam"][1], CAMERA_SETS["7-cam"][-1]
    for place in (
        f"{first}.mp4",
        f"{other}.mp4",
        f"a.{first}.mp4",
        f"a.{second}.mp4",
        "deep/er/clip.mp4",
        "deep/er/x.txt",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(video)
    (tmp_path / "deep" / "again").symlink_to(tmp_path)

    one = tiny_recipe(cameras="1-cam").preprocess()
    found = find_clips(one, (str(tmp_path),), {}, tmp_path, tiled=False)
    assert names(found) == ["a", tmp_path.name, "clip"]
    assert [list(clip.open().cameras) for clip in found] == [[first]] * 3
    seen = [clip.open().cameras[first].videos[0].path for clip in found]
    assert seen == [tmp_path / f"a.{first}.mp4", tmp_path / f"{first}.mp4", tmp_path / "deep/er/clip.mp4"]

    two = tiny_recipe(cameras=f"{first},{second}").preprocess()
    with pytest.raises(UsageError, match=f"clip.mp4 is one view .{first}.., missing {second}: "):
        find_clips(two, (str(tmp_path),), {}, tmp_path, tiled=False)
    (tmp_path / "deep/er/clip.mp4").unlink()
    with pytest.raises(UsageError, match=f"of drive {tmp_path.name} it lacks {second}; the model looks at 2 cameras"):
        find_clips(two, (str(tmp_path),), {}, tmp_path, tiled=False)
    (tmp_path / f"{first}.mp4").rename(tmp_path / "deep" / f"{first}.mp4")
    (tmp_path / f"{other}.mp4").unlink()
    with pytest.raises(UsageError, match=f"of drive deep it lacks {second}"):
        find_clips(two, (str(tmp_path),), {}, tmp_path, tiled=False)
    (tmp_path / "deep" / f"{second}.mp4").write_bytes(video)
    found = find_clips(two, (str(tmp_path),), {}, tmp_path, tiled=False)
    assert names(found) == ["a", "deep"]
    assert [list(clip.open().cameras) for clip in found] == [[first, second]] * 2

    mosaics = find_clips(two, (str(tmp_path),), {}, tmp_path, tiled=True)
    assert len(mosaics) == 4
    with pytest.raises(UsageError, match="er: holds no video"):
        find_clips(one, (str(tmp_path / "deep" / "er"),), {}, tmp_path, tiled=False)
