"""Every kind of damage is found and called by its name; whole data are passed."""

import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from omni_cli import files
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES_FILE, PRESENCE_FILE
from omni_cli.report import Console
from omni_cli.samples.shards import frames_path
from omni_cli.samples.tables import Frames, ShardTables
from omni_cli.scene.poses import EgoMotion
from omni_cli.sources.quarantine import read_quarantine, write_quarantine
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.checks.findings import Finding, table_rows
from omni_cli.stages.checks.motion import ego_findings
from omni_cli.stages.checks.timing import coverage_findings, spread_findings, timestamp_findings
from omni_cli.world.dataset import SyntheticSpec, clip_id, render_clip, write_chunk, write_indices
from tests.support import openpilot as routes
from tests.support import pai
from tests.support.drives import preprocess
from tests.support.dying import die_on_the_second_segment
from tests.support.shard_sets import write_shard_set

CLIP, OTHER = pai.clip_ids(0)
SPAN_US = (0, 1_900_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pai.write_repository(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def data(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "raw" / "physical_ai_av")
    return tmp_path


def repo(data: Path) -> Path:
    return data / "raw" / "physical_ai_av"


def run(path: Path, **options) -> dict:
    return audit(AuditRequest(path, **options), Console(quiet=True))


def of_recording(result: dict, severity: str, recording: str = CLIP) -> set[tuple[str, str]]:
    return {
        (finding["code"], finding["camera"])
        for finding in result["findings"]
        if finding["severity"] == severity and finding["recording"] == recording
    }


def test_whole_data_pass(data):
    result = run(data, deep=True)
    assert (result["audited"], result["refused"], result["findings"]) == (2, 0, [])
    json.dumps(result)


def _member(root: Path, feature: str, alias: str, content: bytes | None) -> None:
    pai.edit_zip(pai.zip_path(root, feature), {pai.member(feature, alias, CLIP): content})


def _times(root: Path, times_us: np.ndarray) -> None:
    _member(root, pai.FRONT, "frame_timestamps", pai.timestamps(times_us))


def _ego(root: Path, change) -> None:
    _member(root, "egomotion", "egomotion", pai.egomotion(change))


def _swap(times_us: np.ndarray) -> np.ndarray:
    times_us[[4, 5]] = times_us[[5, 4]]
    return times_us


def _late(times_us: np.ndarray, by_us: int) -> np.ndarray:
    times_us[10:] += by_us
    return times_us


def _set(name: str, rows: slice, value: float):
    def change(columns: dict[str, np.ndarray]) -> None:
        columns[name][rows] = value

    return change


def _cut(seconds: float):
    def change(columns: dict[str, np.ndarray]) -> None:
        kept = columns["timestamp"] < seconds * 1e6
        for name in columns:
            columns[name] = columns[name][kept]

    return change


def _jump(columns: dict[str, np.ndarray]) -> None:
    columns["x"][100:] += 5.0


REFUSED = {
    "missing video": (lambda r: _member(r, pai.FRONT, "video", None), ("missing-member", pai.FRONT)),
    "missing times": (lambda r: _member(r, pai.FRONT, "frame_timestamps", None), ("missing-member", pai.FRONT)),
    "missing ego": (lambda r: _member(r, "egomotion", "egomotion", None), ("missing-member", "")),
    "truncated video": (
        lambda r: _member(r, pai.FRONT, "video", pai.mp4()[: len(pai.mp4()) // 2]),
        ("unreadable-video", pai.FRONT),
    ),
    "no video": (lambda r: _member(r, pai.FRONT, "video", b"text" * 99), ("unreadable-video", pai.FRONT)),
    "too few frames": (lambda r: _member(r, pai.FRONT, "video", pai.mp4(17)), ("frame-count", pai.FRONT)),
    "too few times": (lambda r: _times(r, pai.frame_times_us()[:-2]), ("frame-count", pai.FRONT)),
    "swapped times": (lambda r: _times(r, _swap(pai.frame_times_us())), ("non-monotonic-time", pai.FRONT)),
    "long gap": (lambda r: _times(r, _late(pai.frame_times_us(), 1_500_000)), ("time-gap", pai.FRONT)),
    "float times": (lambda r: _times(r, pai.frame_times_us() / 1e6), ("wrong-columns", pai.FRONT)),
    "one frame": (lambda r: _times(r, pai.frame_times_us()[:1]), ("too-short", pai.FRONT)),
    "no parquet": (lambda r: _member(r, pai.FRONT, "frame_timestamps", b"PAR1"), ("damaged-member", pai.FRONT)),
    "nan ego": (lambda r: _ego(r, _set("vy", slice(7, 9), np.nan)), ("not-finite", "")),
    "infinite ego": (lambda r: _ego(r, _set("curvature", slice(7, 8), np.inf)), ("not-finite", "")),
    "lost column": (lambda r: _ego(r, lambda columns: columns.pop("vz")), ("wrong-columns", "")),
    "backward ego": (lambda r: _ego(r, _set("timestamp", slice(50, 51), 0)), ("non-monotonic-time", "")),
    "short ego": (lambda r: _ego(r, _cut(0.5)), ("ego-does-not-cover", "")),
    "speeding": (lambda r: _ego(r, _set("vx", slice(60, 62), 99.0)), ("impossible-speed", "")),
    "crash": (lambda r: _ego(r, _set("ay", slice(60, 62), -40.0)), ("impossible-acceleration", "")),
    "quaternion": (lambda r: _ego(r, _set("qw", slice(60, 62), 0.5)), ("quaternion-norm", "")),
    "teleport": (lambda r: _ego(r, _jump), ("position-jump", "")),
}


@pytest.mark.fault("F15", "F16", "F17", "F18", "F19")
@pytest.mark.parametrize("damage", REFUSED)
def test_damage_to_one_clip_refuses_that_clip_alone(data, damage):
    injure, expected = REFUSED[damage]
    injure(repo(data))
    result = run(data)
    assert expected in of_recording(result, "refuse")
    assert result["refused"] == 1
    assert not of_recording(result, "refuse", OTHER)


@pytest.mark.fault("F13")
def test_a_damaged_zip_refuses_every_clip_in_it(data):
    path = pai.zip_path(repo(data), pai.REAR)
    path.write_bytes(path.read_bytes()[:-200])
    result = run(data)
    assert result["refused"] == 2
    assert ("unreadable-zip", pai.REAR) in of_recording(result, "refuse")


def test_a_flipped_bit_in_a_member_is_found_by_its_crc(data):
    path = pai.zip_path(repo(data), "egomotion")
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(pai.member("egomotion", "egomotion", CLIP)).header_offset
    content = bytearray(path.read_bytes())
    content[offset + 400] ^= 1
    path.write_bytes(bytes(content))
    assert ("damaged-member", "") in of_recording(run(data), "refuse")


@pytest.mark.fault("F13", "F14")
@pytest.mark.parametrize("name", ["../evil.mp4", "/etc/evil", "a\\..\\evil", "C:evil"])
def test_a_member_that_leaves_its_folder_is_named_and_not_followed(data, name):
    pai.edit_zip(pai.zip_path(repo(data), pai.FRONT), {}, ((name, b"x"),))
    result = run(data)
    assert ("unsafe-member", pai.FRONT) in of_recording(result, "refuse")
    assert any(repr(name) in finding["detail"] for finding in result["findings"])
    assert not list(data.parent.rglob("evil*"))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_member_that_is_there_twice_is_refused(data):
    name = pai.member("egomotion", "egomotion", CLIP)
    pai.edit_zip(pai.zip_path(repo(data), "egomotion"), {}, ((name, pai.egomotion()),))
    assert ("duplicate-member", "") in of_recording(run(data), "refuse")


def test_what_does_no_harm_is_a_warning(data):
    root = repo(data)
    pai.edit_zip(pai.zip_path(root, pai.FRONT), {pai.member(pai.FRONT, "blurred_boxes", CLIP): None}, (("x.txt", b""),))
    _times(root, _late(pai.frame_times_us(), 250_000))
    (root / PRESENCE_FILE).unlink()
    result = run(data)
    assert result["refused"] == 0
    assert of_recording(result, "warn") == {("missing-member", pai.FRONT), ("time-gap", pai.FRONT)}
    assert Counter(f["code"] for f in result["findings"]) == {
        "missing-member": 1,
        "time-gap": 1,
        "extra-member": 1,
        "missing-index": 1,
    }


def test_a_camera_without_a_file_is_refused_only_if_asked_for(tmp_path):
    root = pai.write_repository(tmp_path / "physical_ai_av", chunks=2)
    pai.zip_path(root, pai.REAR, 1).unlink()
    relaxed = run(root)
    assert relaxed["refused"] == 0
    assert [finding["code"] for finding in relaxed["findings"]] == ["missing-zip"]
    strict = run(root, cameras=(pai.FRONT, pai.REAR))
    assert strict["refused"] == 2
    assert of_recording(strict, "refuse", pai.clip_ids(1)[0]) == {("missing-zip", pai.REAR)}
    assert run(root, cameras=(pai.FRONT,))["findings"] == []


def test_what_the_presence_table_does_not_promise_is_not_missed(data):
    root = repo(data)
    there = {"clip_id": [CLIP, OTHER], "egomotion": [True, True], pai.FRONT: [True, True], pai.REAR: [False, True]}
    (root / PRESENCE_FILE).write_bytes(pai.parquet(pa.table(there)))
    pai.edit_zip(
        pai.zip_path(root, pai.REAR),
        {pai.member(pai.REAR, alias, CLIP): None for alias in ("video", "frame_timestamps", "blurred_boxes")},
    )
    assert run(root)["findings"] == []
    assert of_recording(run(root, cameras=pai.CAMERAS), "warn") == {("not-recorded", pai.REAR)}


def test_clips_without_any_camera_are_refused(data):
    for camera in pai.CAMERAS:
        pai.zip_path(repo(data), camera).unlink()
    result = run(data)
    assert result["refused"] == 2
    assert of_recording(result, "refuse") == {("no-camera", "")}


def test_renamed_templates_are_refused(data):
    path = repo(data) / FEATURES_FILE
    path.write_text(path.read_text().replace("{clip_id}.egomotion.parquet", "{clip_id}.ego.parquet"))
    result = run(data)
    assert [finding["code"] for finding in result["findings"]] == ["changed-template"]
    assert result["refused"] == 1


def test_an_index_that_cannot_be_read_is_a_finding(data):
    (repo(data) / CLIP_INDEX_FILE).write_bytes(b"no parquet")
    result = run(data)
    assert result["refused"] == 1
    assert "not a readable Parquet table" in result["findings"][0]["detail"]


def test_quarantine_sets_refused_recordings_aside_with_reasons(data):
    _ego(repo(data), _set("vy", slice(7, 9), np.nan))
    assert run(data)["refused"] == 1
    assert not read_quarantine(repo(data))
    first = run(data, quarantine=True)
    assert (first["refused"], first["quarantined"]) == (0, 1)
    assert read_quarantine(repo(data))[CLIP].startswith("not-finite: egomotion: NaN or infinite in 2 rows")
    again = run(data)
    assert (again["refused"], again["quarantined"], again["audited"]) == (0, 1, 2)
    _ego(repo(data), lambda _: None)
    mended = run(data)
    assert of_recording(mended, "warn") == {("mended", "")}


def test_a_quarantine_list_is_kept_and_a_foreign_file_refused(tmp_path):
    write_quarantine(tmp_path, {"a": "first"})
    write_quarantine(tmp_path, {"b": "second"})
    assert read_quarantine(tmp_path) == {"a": "first", "b": "second"}
    (tmp_path / "quarantine.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="not a quarantine list"):
        read_quarantine(tmp_path)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.unlink(), "missing-artefact"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "wrong-size"),
        (lambda path: path.write_bytes(b"y" + path.read_bytes()[1:]), "wrong-content"),
        (lambda path: files.receipt_path(path).write_text("{"), "torn-receipt"),
        (lambda path: path.with_name(f"b{files.TEMPORARY_MARK}1-0").touch(), "leftover"),
    ],
)
def test_artefacts_must_match_their_receipts(tmp_path, damage, code):
    folder = tmp_path / "runs" / "one"
    for path in (folder / "a.bin", folder / "deeper" / "b.bin"):
        files.commit(path, lambda stream: stream.write(b"x" * 100))
    assert run(folder, deep=True)["findings"] == []
    damage(folder / "deeper" / "b.bin")
    result = run(folder, deep=True)
    assert [finding["code"] for finding in result["findings"]] == [code]
    assert "deeper/b" in result["findings"][0]["detail"]
    assert result["refused"] == (code != "leftover")
    assert run(folder)["refused"] == (code not in ("leftover", "wrong-content"))


def test_a_folder_receipt_covers_each_file_it_lists(tmp_path):
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "model.safetensors").write_bytes(b"w" * 64)
    facts = {"size": 64, "sha256": files.sha256_of(final / "model.safetensors")}
    files.put_receipt(final, {"files": {"model.safetensors": facts}})
    assert run(tmp_path / "run", deep=True)["findings"] == []
    (final / "model.safetensors").write_bytes(b"w" * 63 + b"v")
    for folder in (tmp_path / "run", final):
        assert [finding["code"] for finding in run(folder, deep=True)["findings"]] == ["wrong-content"]


def test_a_run_that_has_not_ended_is_told(tmp_path):
    files.write_json(tmp_path / "runs" / "one" / "run.json", {})
    result = run(tmp_path / "runs")
    assert (result["refused"], [finding["code"] for finding in result["findings"]]) == (0, ["unfinished-run"])


def test_an_unfinished_shard_set_is_refused(tmp_path):
    (tmp_path / "shards" / "one" / "recordings").mkdir(parents=True)
    result = run(tmp_path)
    assert result["refused"] == 1
    assert "unfinished, it has no manifest.json" in result["findings"][0]["detail"]


def test_openpilot_segments_are_audited_from_their_data_folder(tmp_path):
    folder = tmp_path / "raw" / "openpilot" / routes.DONGLE
    for number in (0, 2):  # 1 lacks, so that these are two recordings
        routes.write_segment(folder / f"{routes.LOG_ID}--{number}", segment=number)
    assert [found["code"] for found in run(tmp_path, deep=True)["findings"]] == ["duplicate"]  # of one picture
    (folder / f"{routes.LOG_ID}--2" / "qcamera.ts").write_bytes(routes.qcamera(routes.frame_times_us(30)))
    result = run(tmp_path, cameras=(pai.FRONT,))  # of another source: this one's own are audited
    assert (result["audited"], result["refused"]) == (2, 1)
    bad = f"{routes.DONGLE}_{routes.LOG_ID}--2"
    assert of_recording(result, "refuse", bad) == {("refused-by-reader", "")}
    assert run(tmp_path, quarantine=True)["refused"] == 0
    assert "holds 30 frames, the log lists 40" in read_quarantine(folder.parent)[bad]


@pytest.mark.parametrize("damage", ["unreadable", "cannot be decoded"])
def test_a_bad_segment_is_set_aside_without_its_neighbours(tmp_path, damage):
    raw = tmp_path / "raw" / "openpilot"
    video = routes.write_route(raw / routes.DONGLE, (20, 40, 20))[1] / "qcamera.ts"
    assert (run(tmp_path, deep=True)["audited"], run(tmp_path)["findings"]) == (1, [])
    whole = video.read_bytes()
    if damage == "unreadable":
        video.write_bytes(b"")
    else:
        video.write_bytes(with_a_bad_picture(whole))
    result = run(tmp_path, deep=True, quarantine=True)
    bad = f"{routes.DONGLE}_{routes.LOG_ID}--1"
    assert (result["audited"], result["refused"], list(read_quarantine(raw))) == (1, 0, [bad])
    again = run(tmp_path, deep=True)
    assert (again["audited"], again["refused"], again["quarantined"]) == (3, 0, 1)
    video.write_bytes(whole)
    assert ("mended", "") in of_recording(run(tmp_path, deep=True), "warn", bad)


def with_a_bad_picture(video: bytes) -> bytes:
    """An MPEG-TS whose packets are all there, one of them with nonsense in its slice."""
    content = bytearray(video)
    slices = [at for at in range(len(content) - 4) if content[at : at + 4] == b"\x00\x00\x01\x41"]
    at = slices[len(slices) // 2] + 5
    content[at : at + 30] = b"\xff" * 30
    return bytes(content)


def test_frames_lost_between_two_segments_are_told_and_cost_nothing_else(tmp_path):
    folder = tmp_path / "raw" / "openpilot" / routes.DONGLE
    routes.write_segment(folder / f"{routes.LOG_ID}--0")
    routes.write_segment(folder / f"{routes.LOG_ID}--1", segment=1, first=100)
    result = run(tmp_path, deep=True)
    assert (result["audited"], result["refused"]) == (1, 0)
    found = {finding["detail"].split(",")[0]: finding["code"] for finding in result["findings"]}
    assert found == {"frame times: 1 gaps": "time-gap", "speed times: 1 gaps": "time-gap"}


def _route(number: int) -> str:
    return f"{number:08x}--0696c823fa"


def test_workers_find_what_one_process_finds(tmp_path, monkeypatch):
    monkeypatch.setattr("omni_cli.stages.audit.recordings._RECORDINGS_A_WORKER", 1)
    for number in range(2):
        routes.write_segment(tmp_path / f"{routes.DONGLE}|{_route(number)}--0", count=20 + 20 * number)
        routes.write_segment(tmp_path / f"{routes.DONGLE}|{_route(number)}--2", segment=2)
    (tmp_path / f"{routes.DONGLE}|{_route(1)}--0" / "qcamera.ts").write_bytes(b"")
    parallel = run(tmp_path)
    monkeypatch.setattr("omni_cli.stages.audit.recordings._RECORDINGS_A_WORKER", 100)
    assert parallel == run(tmp_path)
    assert (parallel["audited"], parallel["refused"]) == (4, 1)


def test_a_recording_that_kills_its_worker_bars_only_itself(tmp_path, monkeypatch):
    """What a hostile file could do to a decoder, done by a check that dies on purpose."""
    monkeypatch.setattr("omni_cli.stages.audit.recordings._RECORDINGS_A_WORKER", 1)
    monkeypatch.setattr("omni_cli.stages.audit.recordings.check_unit", die_on_the_second_segment)
    for name in (f"{_route(0)}--0", f"{_route(0)}--2", f"{_route(1)}--0"):
        folder = tmp_path / f"{routes.DONGLE}|{name}"
        folder.mkdir()
        (folder / "qlog").touch()
    result = run(tmp_path)
    assert (result["audited"], result["refused"]) == (3, 1)
    assert [(f["code"], f["recording"][-3:]) for f in result["findings"]] == [("audit-failed", "--2")]


def test_shards_must_agree_with_their_manifest(tmp_path):
    folder = tmp_path / "shards" / "one"
    windows = pa.table({"split": ["train"] * 3})
    write_shard_set(folder, {"a": ShardTables(Frames(0, lambda: iter(())), windows)}, preprocess())
    assert run(tmp_path, deep=True)["findings"] == []
    path = frames_path(folder, "a")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    assert [finding["code"] for finding in run(folder, deep=True)["findings"]] == ["wrong-content"]
    files.write_receipt(path)  # a receipt of other bytes of the same size is no better
    assert [finding["code"] for finding in run(folder)["findings"]] == ["not-in-manifest"]
    path.unlink()
    assert {finding["code"] for finding in run(folder)["findings"]} == {"unusable", "missing-artefact"}


def test_nothing_to_audit_names_fetch(tmp_path):
    with pytest.raises(UsageError, match=r"no folder .*omni fetch"):
        run(tmp_path / "nowhere")
    (tmp_path / "note.mp4").touch()
    with pytest.raises(UsageError, match=r"note\.mp4: is a file; audit a folder"):
        run(tmp_path / "note.mp4")
    with pytest.raises(DataError, match=r"holds no raw data, shards or runs.*omni fetch"):
        run(tmp_path)
    with pytest.raises(UsageError, match="unknown camera 'camera_front_wide'; did you mean 'camera_front_wide_120fov'"):
        run(tmp_path, cameras=("camera_front_wide",))
    (tmp_path / "raw" / "physical_ai_av").mkdir(parents=True)
    result = run(tmp_path)
    assert result["refused"] == 1


def test_the_synthetic_world_is_whole_and_one_truncated_video_in_it_is_found(tmp_path):
    root = tmp_path / "raw" / "synthetic"
    spec = SyntheticSpec(clips_per_chunk=2, seconds=1.0, cameras=(pai.FRONT,), width_px=96, height_px=54)
    write_chunk(root, spec, 0, [render_clip(spec, 0, index) for index in range(2)])
    write_indices(root, spec, (0,))
    assert run(tmp_path, deep=True)["findings"] == []
    path, clip = pai.zip_path(root, pai.FRONT), clip_id(spec, 0, 1)
    name = pai.member(pai.FRONT, "video", clip)
    with zipfile.ZipFile(path) as archive:
        content = archive.read(name)
    pai.edit_zip(path, {name: content[: len(content) // 2]})
    result = run(tmp_path, deep=True)
    assert of_recording(result, "refuse", clip) == {("unreadable-video", pai.FRONT)}
    assert {f["code"] for f in result["findings"] if not f["recording"]} == {"wrong-size"}  # its receipt tells as well


def test_thousands_of_findings_become_few_rows():
    found = [Finding("refuse", "not-finite", "row 1", recording=f"clip{i}") for i in range(5000)]
    found += [Finding("warn", "time-gap", "gap", recording="clip0", camera="front")] * 3
    rows = table_rows(found)
    assert [row[:4] for row in rows] == [("not-finite", "refuse", 5000, 5000), ("time-gap", "warn", 3, 1)]
    assert rows[0][4] == "clip0 row 1\nclip1 row 1 ... and 4998 more"


def test_time_limits():
    steady = np.arange(100, dtype=np.int64) * 33_333
    assert not list(timestamp_findings(steady, "t"))
    assert not list(timestamp_findings(np.delete(steady, 50), "t"))  # one lost frame is two periods
    (gap,) = timestamp_findings(np.delete(steady, [50, 51]), "t")
    assert (gap.severity, gap.code) == ("warn", "time-gap")
    assert "0.100 s after row 49; every 0.033 s expected" in gap.detail
    assert not list(spread_findings({"a": (0, 100), "b": (33_000, 100)}))
    assert "b starts 0.60 s after a" in next(spread_findings({"a": (0, 9), "b": (600_000, 9)})).detail
    assert not list(coverage_findings((-5, 25), (0, 20), "ego"))
    assert [f.severity for f in coverage_findings((0, 15), (0, 20), "ego")] == ["warn"]
    assert [f.severity for f in coverage_findings((0, 5), (0, 20), "ego")] == ["refuse"]
    assert [f.severity for f in coverage_findings((30, 50), (0, 20), "ego")] == ["refuse"]


def test_motion_is_judged_while_the_cameras_look():
    """The log of the real dataset runs minutes past the video; what it says there is of no consequence."""
    columns = pai.ego_columns()
    columns["vx"][-5:] = 500.0

    def motion() -> EgoMotion:
        stacked = [
            np.column_stack([columns[n] for n in names]) for names in (("x", "y", "z"), ("qx", "qy", "qz", "qw"))
        ]
        vectors = [np.column_stack([columns[f"{kind}{axis}"] for axis in "xyz"]) for kind in "va"]
        return EgoMotion(columns["timestamp"], *stacked, *vectors, columns["curvature"])

    assert not list(ego_findings(motion(), SPAN_US))
    assert [finding.code for finding in ego_findings(motion(), None)] == ["impossible-speed", "position-jump"]
    columns["vx"][-5:] = np.nan  # but a spline through NaN is NaN everywhere
    assert [finding.code for finding in ego_findings(motion(), SPAN_US)] == ["not-finite"]
