"""`omni fetch --clips` against a loopback hub: parts of chunk zips by ranges, compared with the chunks themselves."""

import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from omni_cli import files
from omni_cli.downloads import Meter, RemoteFile
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.sources.zip_members import read_directory
from omni_cli.sources.zip_ranges import read_member, remote_members, spans_of
from omni_cli.stages.fetch.directories import FOLDER as DIRECTORIES
from omni_cli.stages.fetch.directories import read_directory as read_far_directory
from omni_cli.stages.fetch.partial import Piece, fetch_clips
from omni_cli.world.dataset import SyntheticSpec, clip_id, render_clip, write_chunk, write_indices
from tests.support import pai
from tests.support.clips import CLIPS, FAR, FRONT, VIDEO_BYTES, folder_of, get, members_of, of_clips, zip_of
from tests.support.fetch_once import start
from tests.support.hub import serve_hub


def test_clips_come_without_their_chunks(hub, repository, tmp_path):
    result = get(tmp_path, CLIPS[1], CLIPS[3])
    for camera in pai.CAMERAS:
        path = zip_of(tmp_path, camera)
        assert members_of(path) == of_clips(repository, {CLIPS[1], CLIPS[3]}, camera)
        receipt = files.verified_receipt(path)
        promised = hub.stored[FEATURES[camera].chunk_path(0)]
        assert (receipt["partial"], receipt["clips"]) == (True, [CLIPS[1], CLIPS[3]])
        assert receipt["whole"] == {"size": promised.size, "sha256": promised.sha256}
        assert hub.sent(camera) < 2 * (VIDEO_BYTES + 10_000) + 140_000 < promised.size
    assert not zip_of(tmp_path, FRONT, 1).exists()
    assert [ref.id for ref in PhysicalAiAv(folder_of(tmp_path)).recordings()] == [CLIPS[1], CLIPS[3]]
    assert result["fetched"] == len(result["paths"])


def test_more_clips_unite_and_the_same_bytes_come_whatever_the_order(hub, repository, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    get(one, CLIPS[0])
    hub.log.clear()
    get(one, CLIPS[0], CLIPS[2])
    assert 0 < hub.sent(FRONT) < VIDEO_BYTES + 10_000
    get(other, CLIPS[2])
    get(other, CLIPS[0])
    assert zip_of(one).read_bytes() == zip_of(other).read_bytes()
    assert members_of(zip_of(one)) == of_clips(repository, {CLIPS[0], CLIPS[2]})
    hub.log.clear()
    assert get(one, CLIPS[0])["fetched"] == 0
    assert files.read_receipt(zip_of(one))["clips"] == [CLIPS[0], CLIPS[2]]
    assert hub.log == []


def test_clips_that_another_process_brought_count_as_come(hub, tmp_path):
    get(tmp_path, CLIPS[0])
    stored = hub.stored[FEATURES[FRONT].chunk_path(0)]
    file, content = RemoteFile(stored.path, stored.size, stored.git_sha1, stored.sha256), stored.place.read_bytes()
    directory = read_far_directory(file, lambda at, size: content[at : at + size])
    missing = tuple(member for member in directory if member.clip == CLIPS[0])
    piece, shown = Piece(file, clips=CLIPS[:1], directory=directory, missing=missing), []
    meter = Meter(shown.append)
    meter.add(10**6 - piece.transfer_bytes)  # it shows whole megabytes
    fetch_clips(None, piece, zip_of(tmp_path), tmp_path / "staging", meter)
    assert shown == [1]


def test_the_whole_chunk_replaces_its_part_and_is_never_replaced(hub, repository, tmp_path):
    get(tmp_path, CLIPS[0])
    get(tmp_path, chunks="0-0")
    assert zip_of(tmp_path).read_bytes() == pai.zip_path(repository, FRONT).read_bytes()
    assert "partial" not in files.verified_receipt(zip_of(tmp_path))
    assert len(PhysicalAiAv(folder_of(tmp_path)).recordings()) == len(CLIPS)
    hub.log.clear()
    assert get(tmp_path, CLIPS[1])["fetched"] == 0
    assert hub.log == []


def test_all_clips_of_a_chunk_are_the_chunk(hub, repository, tmp_path):
    get(tmp_path, *CLIPS)
    assert zip_of(tmp_path).read_bytes() == pai.zip_path(repository, FRONT).read_bytes()


def test_small_zips_and_tables_come_whole(hub, repository, tmp_path):
    get(tmp_path, CLIPS[0])
    for feature in ("egomotion", "camera_intrinsics"):
        path = zip_of(tmp_path, feature)
        assert path.read_bytes() == pai.zip_path(repository, feature).read_bytes()


def test_directories_are_read_once(hub, tmp_path):
    get(tmp_path, CLIPS[0])
    kept = sorted(path.name for path in (folder_of(tmp_path) / DIRECTORIES).glob("*.json"))
    assert len([name for name in kept if not name.endswith(files.RECEIPT_SUFFIX)]) == 2
    hub.log.clear()
    get(tmp_path, CLIPS[1])
    requests = [entry for entry in hub.log if entry.server == "storage" and entry.method == "GET"]
    assert len(requests) == len(pai.CAMERAS)  # one merged range a clip and camera


@pytest.mark.fault("F23")
def test_clips_beyond_four_gigabytes_of_a_chunk_are_found(tmp_path):
    """Such a zip has offsets of 64 bits (APPNOTE 4.3.9, 4.5.3)."""
    path, begin, videos = tmp_path / "chunk.zip", 5 * 2**30, {f"{clip}.mp4": clip.encode() * 99 for clip in CLIPS}
    with path.open("wb") as stream:  # sparse
        stream.seek(begin)
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in videos.items():
                archive.writestr(name, content)
    directory = read_directory(path)
    assert {name: directory.read(name) for name in videos} == videos
    with path.open("rb") as stream:

        def read_range(start, size):
            stream.seek(start)
            return stream.read(size)

        members = remote_members("x", path.stat().st_size, read_range)
        found = {one.name: b"".join(read_member(stream, 0, one)) for one in members}
    assert (found, members[0].offset) == (videos, begin)


def test_spans_join_neighbours_alone(repository):
    path = pai.zip_path(repository, FRONT)
    content = path.read_bytes()
    members = remote_members("x", len(content), lambda at, size: content[at : at + size])
    assert [(span.start, span.end) for span in spans_of(members)] == [(0, members[-1].end)]
    of = {clip: [member for member in members if member.clip == clip] for clip in CLIPS}
    assert len(spans_of(of[CLIPS[0]])) == len(spans_of([*of[CLIPS[0]], *of[CLIPS[1]]])) == 1
    assert [span.members for span in spans_of([*of[CLIPS[3]], *of[CLIPS[0]]])] == [
        tuple(of[CLIPS[0]]),
        tuple(of[CLIPS[3]]),
    ]


@pytest.mark.fault("F1", "F2")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_killed_amid_a_range_it_goes_on_from_there(hub, repository, tmp_path, stop):
    get(tmp_path, CLIPS[0])
    hub.log.clear()
    hub.bytes_per_second = 100_000
    process = start(tmp_path, clips=CLIPS[1:3], cameras=pai.CAMERAS, workers=2, retry_wait_s=0.01)
    deadline = time.monotonic() + 60
    while hub.sent(FRONT) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait() != 0
    assert members_of(zip_of(tmp_path)) == of_clips(repository, {CLIPS[0]})
    assert [ref.id for ref in PhysicalAiAv(folder_of(tmp_path)).recordings()] == [CLIPS[0]]
    hub.bytes_per_second = None
    get(tmp_path, *CLIPS[1:3])
    assert members_of(zip_of(tmp_path)) == of_clips(repository, set(CLIPS[:3]))
    assert not list(folder_of(tmp_path).rglob("*.part"))


class Died(BaseException):
    pass


def dying_after(monkeypatch, renames):
    """Let the process end just before the next rename of a camera's zip or receipt into place."""
    left, rename = iter(range(renames)), Path.rename

    def dying(path, target):
        if path.parent.name == ".fetch" and next(left, None) is None:
            raise Died
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("first", [(), CLIPS[:1]], ids=["new", "grows"])
@pytest.mark.parametrize("renames", range(4))
def test_killed_between_a_part_and_its_receipt_nothing_more_is_listed_than_is_there(
    hub, tmp_path, monkeypatch, first, renames
):
    get(tmp_path, *(first or FAR[:1]))
    dying_after(monkeypatch, renames)
    with pytest.raises(Died):
        get(tmp_path, CLIPS[2])
    monkeypatch.undo()
    source = PhysicalAiAv(folder_of(tmp_path))
    for camera in pai.CAMERAS:
        path = zip_of(tmp_path, camera)
        if path.is_file():
            there = {name.partition(".")[0] for name in members_of(path)}
            assert set(files.read_receipt(path)["clips"]) <= there
    assert {ref.id for ref in source.recordings()} <= {*first, CLIPS[2], FAR[0]}
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    get(tmp_path, CLIPS[2])
    for camera in pai.CAMERAS:
        whole = hub.stored[FEATURES[camera].chunk_path(0)].place
        assert members_of(zip_of(tmp_path, camera)) == of_clips(whole, {*first, CLIPS[2]})
        assert files.verified_receipt(zip_of(tmp_path, camera))["clips"] == sorted({*first, CLIPS[2]})


def test_a_part_that_rots_is_mended_with_all_its_clips(hub, repository, tmp_path):
    get(tmp_path, CLIPS[0], CLIPS[1])
    path = zip_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    get(tmp_path, CLIPS[3])
    assert members_of(path) == of_clips(repository, {CLIPS[0], CLIPS[1], CLIPS[3]})


def test_without_its_receipt_a_part_is_read_and_adopted(hub, tmp_path):
    get(tmp_path, CLIPS[0])
    before = zip_of(tmp_path).read_bytes()
    files.receipt_path(zip_of(tmp_path)).unlink()
    hub.log.clear()
    get(tmp_path, CLIPS[0])
    assert hub.sent(FRONT) == 0
    assert zip_of(tmp_path).read_bytes() == before
    assert files.verified_receipt(zip_of(tmp_path))["clips"] == [CLIPS[0]]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the devkit's
def test_nvidias_devkit_reads_a_part_as_it_reads_the_whole(tmp_path, monkeypatch):
    from physical_ai_av import PhysicalAIAVDatasetInterface

    spec = SyntheticSpec(seed=3, clips_per_chunk=4, seconds=1, fps=10, width_px=320, height_px=180, cameras=(FRONT,))
    clip, other = clip_id(spec, 0, 1), clip_id(spec, 0, 2)
    write_chunk(tmp_path / "world", spec, 0, [render_clip(spec, 0, index) for index in range(4)])
    write_indices(tmp_path / "world", spec, [0])
    with serve_hub(tmp_path / "world") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        get(tmp_path / "data", clip, cameras=(FRONT,))
    assert files.read_receipt(zip_of(tmp_path / "data"))["clips"] == [clip]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    read = {}
    for name, root in (("whole", tmp_path / "world"), ("part", folder_of(tmp_path / "data"))):
        snapshot = tmp_path / name / "datasets--nvidia--PhysicalAI-Autonomous-Vehicles" / "snapshots" / hub.commit
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(root)
        theirs = PhysicalAIAVDatasetInterface(revision=hub.commit, cache_dir=tmp_path / name)
        reader = theirs.get_clip_feature(clip, FRONT)
        pictures, times = reader.decode_images_from_timestamps(
            PhysicalAiAv(root).open(clip).cameras[FRONT].timestamp_us
        )
        read[name] = (pictures, times, theirs.get_clip_feature(clip, "egomotion")(500_000).pose.translation)
        reader.close()
    for whole, part in zip(read["whole"], read["part"], strict=True):
        np.testing.assert_array_equal(part, whole)
    with pytest.raises(KeyError, match=other):
        theirs.get_clip_feature(other, FRONT)
