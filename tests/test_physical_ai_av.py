"""The reader of PhysicalAI-AV layouts against NVIDIA's own devkit, and against broken folders."""

import io
import pickle
import shutil
import zipfile

import av
import numpy as np
import pandas as pd
import pytest

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats import physical_ai_av as layout
from omni_cli.formats.video import decode, probe
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.windows import decode_cells
from omni_cli.scene.clock import latest_at
from omni_cli.scene.recording import CameraStream
from omni_cli.sources import open_source
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.world.dataset import SyntheticSpec, clip_id, render_clip, write_chunk, write_indices
from tests.support import drives, pai

FRONT, LEFT = "camera_front_wide_120fov", "camera_cross_left_120fov"
SPEC = SyntheticSpec(
    seed=3, clips_per_chunk=2, seconds=1.5, fps=30, width_px=160, height_px=90, cameras=(FRONT, LEFT), rig="mixed"
)
CLIPS = tuple(clip_id(SPEC, 0, index) for index in range(2))
REVISION = "0123456789abcdef0123456789abcdef01234567"
CACHED = f"datasets--nvidia--PhysicalAI-Autonomous-Vehicles/snapshots/{REVISION}"


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """One chunk on disk; the index knows a second one that was never fetched."""
    root = tmp_path_factory.mktemp("world") / "synthetic"
    write_chunk(root, SPEC, 0, [render_clip(SPEC, 0, index) for index in (1, 0)])
    write_indices(root, SPEC, [0, 1])
    return root


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def chunk_file(root, feature):
    return root / layout.FEATURES[feature].chunk_path(0)


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write a zip anew after `change` edited its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_table(path, member, change):
    def edited(members):
        table = pd.read_parquet(io.BytesIO(members[member]))
        members[member] = change(table).to_parquet()

    rewrite(path, edited)


def devkit(root, cache, monkeypatch):
    import huggingface_hub.constants
    from physical_ai_av import PhysicalAIAVDatasetInterface

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = cache / CACHED
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(root)
    return PhysicalAIAVDatasetInterface(revision=REVISION, cache_dir=cache)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the devkit's
@pytest.mark.parametrize("clip", CLIPS)
def test_nvidias_devkit_reads_the_same(repository, tmp_path, monkeypatch, clip):
    theirs = devkit(repository, tmp_path, monkeypatch)
    ours = PhysicalAiAv(tmp_path).open(clip)
    rng = np.random.default_rng(0)
    for name, stream in ours.cameras.items():
        reader = theirs.get_clip_feature(clip, name)
        at_us = np.sort(rng.integers(stream.timestamp_us[0], stream.timestamp_us[-1] + 1, 12))
        pictures, times = reader.decode_images_from_timestamps(at_us)
        indices = latest_at(stream.timestamp_us, at_us)
        np.testing.assert_array_equal(stream.timestamp_us[indices], times)
        with av.open(io.BytesIO(stream.videos[0].read())) as container:
            all_frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        np.testing.assert_array_equal(pictures, [all_frames[index] for index in indices])
        scaled = decode(stream.videos[0].read(), name, np.unique(indices).tolist(), width_px=160, height_px=90)
        for index, picture in scaled:  # another filter makes RGB of it
            assert np.abs(picture.astype(int) - all_frames[index]).mean() < 1.5
        reader.close()
    at_us = rng.integers(*ours.ego.span_us, 200)
    state, expected = ours.ego.at(at_us), theirs.get_clip_feature(clip, "egomotion")(at_us)
    np.testing.assert_allclose(state.anchor_T_rig.translation_m, expected.pose.translation, atol=1e-9)
    assert (state.anchor_T_rig.rotation.inv() * expected.pose.rotation).magnitude().max() < 1e-9
    np.testing.assert_allclose(state.velocity_mps, expected.velocity, atol=1e-9)
    np.testing.assert_allclose(state.acceleration_mps2, expected.acceleration, atol=1e-9)
    np.testing.assert_allclose(state.curvature_per_m, expected.curvature[:, 0], atol=1e-9)
    extrinsics = theirs.get_clip_feature(clip, "sensor_extrinsics").sensor_poses
    intrinsics = theirs.get_clip_feature(clip, "camera_intrinsics").camera_models
    for name, stream in ours.cameras.items():
        rig_T_camera, model = stream.calibration.rig_T_camera, stream.calibration.model
        np.testing.assert_allclose(rig_T_camera.translation_m, extrinsics[name].translation, atol=1e-12)
        assert (rig_T_camera.rotation.inv() * extrinsics[name].rotation).magnitude() < 1e-9
        pixels = rng.uniform([0, 0], [160, 90], (50, 2))
        rays = intrinsics[name].pixel2ray(pixels)
        np.testing.assert_allclose(model.rays(pixels), rays, atol=1e-9)
        np.testing.assert_allclose(model.project(rays)[0], intrinsics[name].ray2pixel(rays), atol=1e-9)
    assert theirs.get_clip_feature(clip, "vehicle_dimensions").width in {2.121, 2.13}


def test_the_files_are_the_datasets_own_layout(repository):
    assert (repository / "features.csv").stat().st_size == 7076  # of the real file
    index = pd.read_parquet(repository / "clip_index.parquet")
    assert index.index.name == "clip_id"
    assert index["chunk"].tolist() == [0, 0, 1, 1]
    assert index.dtypes.astype(str).to_dict()["clip_is_valid"] == "bool"
    presence = pd.read_parquet(repository / layout.PRESENCE_FILE)
    assert list(presence.columns) == list(layout.FEATURES)
    assert {str(kind) for kind in presence.dtypes} == {"bool"}
    table = pd.read_parquet(chunk_file(repository, "camera_intrinsics"))
    assert table.index.names == ["clip_id", "camera_name"]
    with zipfile.ZipFile(chunk_file(repository, FRONT)) as archive:
        entries = archive.infolist()
    assert [entry.filename.partition(".")[0] for entry in entries] == [clip for clip in CLIPS for _ in range(3)]
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    receipts = [path for path in repository.rglob("*") if path.is_file() and not path.name.endswith(".receipt.json")]
    assert all(files.verified_receipt(path) for path in receipts)


def test_writing_again_gives_the_same_bytes(repository, tmp_path):
    write_chunk(tmp_path, SPEC, 0, [render_clip(SPEC, 0, index) for index in (0, 1)])
    write_indices(tmp_path, SPEC, [1, 0])
    before = {path.relative_to(repository): path for path in repository.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == set(before)
    assert all((tmp_path / name).read_bytes() == path.read_bytes() for name, path in before.items())


def test_only_what_is_on_disk_is_listed(repository):
    refs = open_source("synthetic", repository).recordings()
    assert [ref.id for ref in refs] == sorted(CLIPS)
    assert {ref.bundle for ref in refs} == {"chunk_0000"}
    assert all(ref.group == ref.id for ref in refs)
    assert {ref.declared_split for ref in refs} <= {"train", "val", "test"}


def test_a_reader_travels_to_workers_and_names_its_origin(repository):
    source = PhysicalAiAv(repository)
    here = source.open(CLIPS[0], (FRONT,))
    there = pickle.loads(pickle.dumps(source)).open(CLIPS[0], (FRONT,))
    assert there.cameras[FRONT].videos == here.cameras[FRONT].videos
    assert list(here.cameras) == [FRONT]
    assert here.provenance["licence"] == "made by omni, free to use"
    receipt = files.read_receipt(chunk_file(repository, FRONT))
    assert receipt["sha256"] in here.provenance.values()


@pytest.mark.parametrize("shape", ["cache", "repository", "snapshot", "refs"])
def test_every_shape_of_a_hub_cache_is_found(repository, tmp_path, shape):
    snapshot = tmp_path / CACHED
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(repository)
    folder = {"cache": tmp_path, "repository": snapshot.parent.parent, "snapshot": snapshot}.get(shape, tmp_path)
    if shape == "refs":
        (snapshot.parent / ("f" * 40)).symlink_to(repository)
        with pytest.raises(DataError, match=r"2 snapshots and no refs/main; give one, such as"):
            PhysicalAiAv(folder).recordings()
        files.write_text(snapshot.parent.parent / "refs" / "main", REVISION)
    source = PhysicalAiAv(folder)
    assert len(source.recordings()) == 2
    assert source.open(CLIPS[0]).provenance["revision"] == REVISION


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no clip_index\.parquet.*give the folder that omni fetch filled"):
        PhysicalAiAv(tmp_path).recordings()


def test_indices_alone_are_not_a_dataset(tmp_path):
    write_indices(tmp_path, SPEC, [0])
    with pytest.raises(DataError, match=r"no camera's chunk files among 1 chunks of the clip index; run omni fetch"):
        PhysicalAiAv(tmp_path).recordings()


def escape(members):
    members["../evil.mp4"] = b"x"


def absolute(members):
    members["/etc/evil.mp4"] = b"x"


@pytest.mark.parametrize("change", [escape, absolute])
def test_a_member_that_leaves_its_folder_is_refused(copy, change):
    rewrite(chunk_file(copy, FRONT), change)
    with pytest.raises(DataError, match=r"evil\.mp4' has a name that leaves its folder; do not use this file"):
        PhysicalAiAv(copy).open(CLIPS[0])


def test_a_compressed_member_is_refused(copy):
    rewrite(chunk_file(copy, FRONT), lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="is compressed or encrypted, expected stored bytes"):
        PhysicalAiAv(copy).open(CLIPS[0])


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_a_truncated_zip_is_refused(copy, keep):
    path = chunk_file(copy, FRONT)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"not a whole zip file .*fetch this chunk again"):
        PhysicalAiAv(copy).open(CLIPS[0])


def test_a_zip_with_bytes_lost_inside_is_refused(copy):
    path = chunk_file(copy, FRONT)
    content = path.read_bytes()
    path.write_bytes(content[:100] + content[2000:])
    with pytest.raises(DataError, match=r"mp4' begins before the file does"):
        PhysicalAiAv(copy).open(CLIPS[1], (FRONT,))


def member_bytes(path, name):
    """Return which bytes of a zip a member's content is, and what its directory says of it."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
    start = path.read_bytes().index(name.encode(), entry.header_offset) + len(name)
    return slice(start, start + entry.file_size), entry


@pytest.mark.fault("F6")
def test_a_flipped_bit_that_decodes_is_refused_before_a_picture_is_made(copy):
    """No decoder complains of this one, and its pictures are wrong."""
    path = chunk_file(copy, FRONT)
    where, _ = member_bytes(path, f"{CLIPS[0]}.{FRONT}.mp4")
    content, truth = bytearray(path.read_bytes()), all_pictures(copy)
    flipped = next(byte for byte in range(where.start + 1200, where.stop, 7) if is_silent(content, where, byte, truth))
    content[flipped] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"have CRC-32 \w{8}, the directory says \w{8}: damaged"):
        all_pictures(copy)


def all_pictures(root):
    stream = PhysicalAiAv(root).open(CLIPS[0], (FRONT,)).cameras[FRONT]
    decoded = camera_frames("clip", stream).decode(range(45), width_px=32, height_px=18, decoder="pyav")
    return np.stack([picture for _, picture in decoded])


def is_silent(content, where, byte, truth):
    """Say whether a decoder gives wrong pictures without a word where one bit is another."""
    damaged = bytearray(content[where])
    damaged[byte - where.start] ^= 1
    try:
        pictures = [picture for _, picture in decode(bytes(damaged), "clip", range(45), width_px=32, height_px=18)]
    except DataError:
        return False
    return not np.array_equal(np.stack(pictures), truth)


@pytest.mark.fault("F6")
def test_a_flipped_bit_in_the_times_is_refused(copy):
    path = chunk_file(copy, FRONT)
    where, _ = member_bytes(path, f"{CLIPS[0]}.{FRONT}.timestamps.parquet")
    content = bytearray(path.read_bytes())
    content[where.start + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="the directory says"):
        PhysicalAiAv(copy).open(CLIPS[0], (FRONT,))


@pytest.mark.fault("F13")
def test_members_whose_places_were_swapped_are_refused(copy):
    path = chunk_file(copy, FRONT)
    content = bytearray(path.read_bytes())
    entries = [member_bytes(path, f"{clip}.{FRONT}.mp4")[1] for clip in CLIPS]
    places = [content.rindex(entry.filename.encode()) - 4 for entry in entries]  # of the offsets, in the directory
    for place, entry in zip(places, reversed(entries), strict=True):
        content[place : place + 4] = entry.header_offset.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not where the directory says"):
        PhysicalAiAv(copy).open(CLIPS[0], (FRONT,))


def test_what_is_kept_does_not_grow_with_the_chunks_that_were_read(tmp_path):
    """A worker reads of thousands of chunks in one life."""
    reader, kept = PhysicalAiAv(pai.write_repository(tmp_path, chunks=4)), []
    for chunk in (0, 1, 2, 3, 0):
        reader.open(pai.clip_ids(chunk)[1])
        kept.append(len(pickle.dumps(reader)))
    assert max(kept) < 1.01 * kept[0]


def test_a_missing_member_is_named(copy):
    gone = f"{CLIPS[0]}.{FRONT}.timestamps.parquet"
    rewrite(chunk_file(copy, FRONT), lambda members: members.pop(gone))
    with pytest.raises(DataError, match=f"has no member {gone}"):
        PhysicalAiAv(copy).open(CLIPS[0])
    assert PhysicalAiAv(copy).open(CLIPS[1])


def test_missing_egomotion_and_cameras_are_named(copy):
    source = PhysicalAiAv(copy)
    with pytest.raises(DataError, match=r"camera_rear_tele_30fov\.chunk_0000\.zip: no such chunk file; fetch it"):
        source.open(CLIPS[0], ("camera_rear_tele_30fov",))
    with pytest.raises(DataError, match="no camera 'camera_roof' in this dataset"):
        source.open(CLIPS[0], ("camera_roof",))
    with pytest.raises(DataError, match="no clip nobody in clip_index"):
        source.open("nobody")
    chunk_file(copy, "egomotion").unlink()
    assert len(PhysicalAiAv(copy).recordings()) == 2
    with pytest.raises(DataError, match=r"egomotion\.chunk_0000\.zip: no such chunk file"):
        PhysicalAiAv(copy).open(CLIPS[0])


@pytest.mark.fault("F16", "F19")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(vx=t.vx.where(t.index != 7)), r"vx is nan at row 7; expected finite numbers"),
        (lambda t: t.drop(columns="curvature"), r"has no column 'curvature'"),
        (lambda t: t.iloc[::-1], r"timestamp does not increase at row 1"),
        (lambda t: t.assign(qw=t.qw * 2), r"quaternion at row \d+ is off unit norm"),
        (lambda t: t.astype({"timestamp": float}), r"timestamp is \d+ x double with 0 nulls; expected int64"),
        (lambda t: t.iloc[:0], r"timestamp is 0 x int64"),
    ],
)
def test_damaged_egomotion_is_refused_by_name(copy, change, message):
    member = f"{CLIPS[0]}.egomotion.parquet"
    edit_table(chunk_file(copy, "egomotion"), member, change)
    with pytest.raises(DataError, match=rf"{member}: {message}"):
        PhysicalAiAv(copy).open(CLIPS[0])


def test_frame_index_may_be_a_column_and_times_must_increase(copy):
    member = f"{CLIPS[0]}.{FRONT}.timestamps.parquet"
    before = PhysicalAiAv(copy).open(CLIPS[0]).cameras[FRONT].timestamp_us
    edit_table(chunk_file(copy, FRONT), member, lambda table: table.reset_index())
    np.testing.assert_array_equal(PhysicalAiAv(copy).open(CLIPS[0]).cameras[FRONT].timestamp_us, before)
    edit_table(chunk_file(copy, FRONT), member, lambda table: table.iloc[[0, 2, 1]])
    with pytest.raises(DataError, match=r"timestamp does not increase at row 2"):
        PhysicalAiAv(copy).open(CLIPS[0])


def test_a_parquet_file_that_is_none_is_refused(copy):
    path = chunk_file(copy, "camera_intrinsics")
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"camera_intrinsics\.chunk_0000\.parquet: not a readable parquet file"):
        PhysicalAiAv(copy).open(CLIPS[0])
    path.unlink()
    assert PhysicalAiAv(copy).open(CLIPS[0]).cameras[FRONT].calibration is None


def starting_later(content: bytes, frames: int) -> bytes:
    """Copy a video's packets, the first `frames` before time 0, where an edit list hides them: `ffmpeg -ss -c copy`."""
    copy = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(copy, "w", format="mp4") as target:
        stream = source.streams.video[0]
        track, offset = target.add_stream_from_template(stream), round(frames / SPEC.fps / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, track
                target.mux(packet)
    return copy.getvalue()


def test_frames_that_an_edit_list_hides_are_no_frames(copy):
    member = f"{CLIPS[0]}.{FRONT}.mp4"
    preprocess = drives.preprocess(cameras=(FRONT,), columns=1)
    whole = PhysicalAiAv(copy).open(CLIPS[0]).cameras[FRONT]
    num_frames = len(whole.timestamp_us)
    expected = list(decode_cells(camera_frames("whole", whole), np.arange(num_frames), preprocess))
    rewrite(chunk_file(copy, FRONT), lambda members: members.update({member: starting_later(members[member], 10)}))
    cut = PhysicalAiAv(copy).open(CLIPS[0]).cameras[FRONT]
    with pytest.raises(DataError, match=f"cut: {num_frames - 10} frames for {num_frames} timestamps; fetch it again"):
        camera_frames("cut", cut)
    shown = camera_frames("cut", CameraStream(FRONT, cut.videos, whole.timestamp_us[10:]))
    decoded = decode_cells(shown, np.arange(num_frames - 10), preprocess)
    for (_, picture), (_, true) in zip(decoded, expected[10:], strict=True):
        np.testing.assert_array_equal(picture, true)


@pytest.mark.parametrize(
    ("seconds", "cameras"),
    [(3, (FRONT, LEFT)), pytest.param(20, layout.CAMERAS, marks=pytest.mark.marathon, id="a whole clip")],
)
def test_full_size_clips_are_whole(tmp_path, seconds, cameras):
    spec = SyntheticSpec(
        seed=1, clips_per_chunk=1, seconds=seconds, fps=30, width_px=1920, height_px=1080, cameras=cameras
    )
    write_chunk(tmp_path, spec, 0, [render_clip(spec, 0, 0)])
    write_indices(tmp_path, spec, [0])
    recording = PhysicalAiAv(tmp_path).open(clip_id(spec, 0, 0))
    assert set(recording.cameras) == set(cameras)
    for name, stream in recording.cameras.items():
        info = probe(stream.videos[0].read(), name)
        assert (info.codec, info.width_px, info.height_px, info.num_frames) == ("h264", 1920, 1080, seconds * 30)
        assert len(stream.timestamp_us) == seconds * 30
        assert stream.calibration.model.width_px == 1920
