"""Odd tables, times, motions, calibrations and zips: found by their names, without a false alarm beside them."""

import ast
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_cli import files
from omni_cli.formats.physical_ai_av import (
    CLIP_INDEX_FILE,
    FEATURES_FILE,
    MANIFEST_FILE,
    PRESENCE_FILE,
    REVISION_FILE,
)
from omni_cli.report import Console
from omni_cli.scene.recording import SpeedLog
from omni_cli.sources.quarantine import read_quarantine
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.audit.duplicates import duplicate_findings, duplicate_pairs
from omni_cli.stages.audit.targets import units_of
from omni_cli.stages.checks.agreement import agreement_findings, wheel_findings
from omni_cli.stages.checks.calibration import rig_of
from omni_cli.stages.checks.facts import PictureFacts, RecordingFacts, camera_facts, skews_us
from omni_cli.stages.checks.remedies import REMEDIES
from omni_cli.stages.checks.timing import jitter_findings, timestamp_findings
from omni_cli.stages.checks.units import check_unit
from tests.support import pai
from tests.support.drives import circle

CLIP, OTHER = pai.clip_ids(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pai.write_repository(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "raw" / "physical_ai_av"))


def run(path: Path, **options) -> dict:
    return audit(AuditRequest(path, **options), Console(quiet=True))


def codes(path: Path, **options) -> set[str]:
    return {finding["code"] for finding in run(path, **options)["findings"]}


def change_table(path: Path, change) -> None:
    table = pq.read_table(path).to_pandas()
    path.write_bytes(pai.parquet(pa.Table.from_pandas(change(table))))


def _row(camera: str, **values):
    def change(table):
        table.loc[(table["clip_id"] == CLIP) & (table[_KEY[camera]] == pai.FRONT), list(values)] = list(values.values())
        return table

    return change


_KEY = {"camera_intrinsics": "camera_name", "sensor_extrinsics": "sensor_name"}


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("feature", "values", "code"),
    [
        ("camera_intrinsics", {"cy": np.nan}, "not-finite"),
        ("camera_intrinsics", {"cy": 40.0}, "unknown-rig"),
        ("camera_intrinsics", {"cx": -3.0}, "principal-point"),
        ("camera_intrinsics", {"fw_poly_1": 60.0}, "lens-disagrees"),
        ("camera_intrinsics", {"fw_poly_3": 1e300}, "lens-disagrees"),
        ("camera_intrinsics", {"height": 0.0}, "unknown-rig"),
        ("camera_intrinsics", {"width": 128.0}, "other-size"),
        ("sensor_extrinsics", {"qw": 0.9}, "quaternion-norm"),
    ],
)
def test_a_calibration_that_cannot_be_true_is_named(root, feature, values, code):
    change_table(pai.zip_path(root, feature), _row(feature, **values))
    result = run(root)
    assert {(f["code"], f["recording"]) for f in result["findings"] if f["code"] == code} == {(code, CLIP)}


def test_a_null_in_a_calibration_is_no_number(root):
    table = pai.zip_path(root, "camera_intrinsics")
    change_table(table, lambda rows: rows.assign(cy=[None] * len(rows)))
    assert "not-finite" in codes(root)


@pytest.mark.fault("F16")
@pytest.mark.parametrize("values", ["x", [1.0]])  # of each row
def test_a_calibration_without_numbers_names_its_file(root, values):
    change_table(pai.zip_path(root, "sensor_extrinsics"), lambda table: table.assign(qx=[values] * len(table)))
    found = {f["code"]: f for f in run(root)["findings"]}
    assert found.keys() == {"unreadable-calibration", "refused-by-reader"}
    assert (
        found["unreadable-calibration"]["file"] == pai.zip_path(root, "sensor_extrinsics").relative_to(root).as_posix()
    )
    assert "qx" in found["unreadable-calibration"]["detail"]


def _nested(table):
    return table.assign(clip_id=[[one] for one in table["clip_id"]])


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (FEATURES_FILE, lambda path: path.write_bytes(b"\x82\xff,\n")),
        (FEATURES_FILE, lambda path: path.write_bytes(b"a" * 200_000)),
        (CLIP_INDEX_FILE, lambda path: change_table(path, _nested)),
        (PRESENCE_FILE, lambda path: change_table(path, _nested)),
    ],
)
def test_an_index_of_another_form_is_one_refusal_that_names_it(root, name, damage):
    damage(root / name)
    (found,) = run(root)["findings"]
    assert (found["code"], found["severity"]) == ("unusable", "refuse")
    assert name in found["detail"]
    assert "fetch it again" in found["detail"]


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "text", ['{"size": 1e999, "sha256": ""}', '{"partial": true}', '{"partial": true, "clips": 3}']
)
def test_a_receipt_of_another_form_is_torn_and_no_crash(root, text):
    files.receipt_path(pai.zip_path(root, pai.FRONT)).write_text(text)
    assert "torn-receipt" in codes(root)


def test_rigs_are_told_apart_at_any_size():
    assert [rig_of(row, 1080) for row in (543, 755, 650)] == ["A", "B", "unknown"]
    assert [rig_of((row + 0.5) / 10 - 0.5, 108) for row in (543, 755)] == ["A", "B"]


@pytest.mark.fault("F17")
def test_one_camera_in_another_s_place_is_refused(root):
    """The same bytes under two cameras, as a wrong copy leaves them."""
    with zipfile.ZipFile(pai.zip_path(root, pai.FRONT)) as archive:
        video = archive.read(pai.member(pai.FRONT, "video", CLIP))
    pai.edit_zip(pai.zip_path(root, pai.REAR), {pai.member(pai.REAR, "video", CLIP): video})
    assert codes(root) == {"same-video"}


@pytest.mark.fault("F16")
def test_a_clip_that_the_index_lists_twice_is_refused(root):
    table = pq.read_table(root / CLIP_INDEX_FILE)
    (root / CLIP_INDEX_FILE).write_bytes(pai.parquet(pa.concat_tables([table, table.slice(0, 1)])))
    assert codes(root) == {"duplicate-clip"}


@pytest.mark.fault("F9")
def test_a_clip_that_vanished_from_the_index_is_told(root):
    table = pq.read_table(root / CLIP_INDEX_FILE)
    (root / CLIP_INDEX_FILE).write_bytes(pai.parquet(table.slice(1)))
    assert codes(root) == {"vanished-clip"}


@pytest.mark.fault("F9")
def test_two_revisions_in_one_folder_are_refused(root):
    files.write_json(root / REVISION_FILE, {"revision": "a" * 40})
    listed = {"features.csv": {"git_sha1": "1" * 40}}
    absent = {"radar/x.zip": "listed in this revision, and yet 404: pruned"}
    files.write_json(root / MANIFEST_FILE, {"revision": "a" * 40, "files": listed, "absent": absent})
    files.write_receipt(root / "features.csv", git_sha1="1" * 40)
    assert codes(root) - {"unsealed"} == {"absent-upstream"}
    files.write_receipt(root / "features.csv", git_sha1="2" * 40)
    assert "revision-drift" in codes(root)
    files.write_json(root / MANIFEST_FILE, {"revision": "a" * 40, "files": {"features.csv": 1}, "absent": {}})
    assert "revision-drift" in codes(root)  # and no crash
    files.write_receipt(root / "features.csv", git_sha1="1" * 40)
    files.write_json(root / REVISION_FILE, {"revision": "b" * 40})
    assert "revision-drift" in codes(root)


@pytest.mark.fault("F16")
def test_fuzzed_tables_are_judged_and_never_crash_the_check(root):
    """Nothing of what still reads may hold a value that later stages would choke on."""
    rng, unit = random.Random(16), units_of("physical_ai_av", root, None)[0][0]
    name, path = pai.member("egomotion", "egomotion", CLIP), pai.zip_path(root, "egomotion")
    refused = 0
    for _ in range(150):
        content = bytearray(pai.egomotion())
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        pai.edit_zip(path, {name: bytes(content)})
        found = check_unit(unit, deep=False).findings
        refused += any(finding.severity == "refuse" and finding.recording == CLIP for finding in found)
        assert all(finding.recording != OTHER for finding in found)
    assert refused > 40


@pytest.mark.fault("F13")
def test_members_that_share_bytes_are_refused(root):
    """Two directory entries that point to one member, as in an overlapping zip bomb."""
    path = pai.zip_path(root, pai.REAR)
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    content = path.read_bytes()
    last = offsets[-1].to_bytes(4, "little")
    directory = content.rindex(last)
    path.write_bytes(content[:directory] + offsets[-2].to_bytes(4, "little") + content[directory + 4 :])
    assert "overlapping-members" in codes(root)


@pytest.mark.fault("F13")
def test_a_compressed_member_is_refused_unread(root):
    path = pai.zip_path(root, pai.FRONT)
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    pai.write_zip(path, members, zipfile.ZIP_DEFLATED)
    assert {f["code"] for f in run(root)["findings"]} == {"compressed-member"}


@pytest.mark.fault("F18")
@pytest.mark.parametrize(
    ("times_us", "code"),
    [
        (np.arange(20) * 33, "wrong-unit"),  # milliseconds
        (np.arange(20) * 33_333_333, "wrong-unit"),  # nanoseconds
        (np.arange(20) * 33_333 % 400_000, "non-monotonic-time"),
        (np.repeat(np.arange(10) * 33_333, 2), "non-monotonic-time"),
        (np.arange(20) * 33_333 + (np.arange(20) > 9) * 200_000, "time-gap"),
        (2**53 + np.arange(20) * 33_333, None),
    ],
)
def test_odd_times_are_named(times_us, code):
    assert [finding.code for finding in timestamp_findings(times_us, "times")] == [code] * (code is not None)


def test_uneven_times_are_told():
    even = np.arange(60) * 33_333 + np.random.default_rng(0).integers(-500, 500, 60)
    assert not list(jitter_findings(even, "times"))
    uneven = np.cumsum(np.where(np.arange(60) % 3, 15_000, 60_000))
    assert [finding.code for finding in jitter_findings(uneven, "times")] == ["jitter"]


def changed(ego, **values):
    return type(ego)(**{**vars(ego), **values})


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ego: {}, set()),
        (lambda ego: {"velocity_mps": ego.velocity_mps * 3.6}, {("refuse", "velocity-disagrees")}),  # km/h
        (lambda ego: {"velocity_mps": ego.velocity_mps * 1.25}, {("warn", "velocity-disagrees")}),
        (lambda ego: {"velocity_mps": np.tile([10.0, 0, 0], (len(ego.velocity_mps), 1))}, {"velocity", "heading"}),
        (lambda ego: {"quaternion_xyzw": np.roll(ego.quaternion_xyzw, 1, axis=1)}, {"heading"}),  # w, x, y, z
        (lambda ego: {"curvature_per_m": -ego.curvature_per_m}, {("warn", "curvature-sign")}),
        (lambda ego: {"curvature_per_m": ego.curvature_per_m * 10}, {("warn", "curvature-scale")}),
        (lambda ego: _scaled(ego, 2.0), {("warn", "curvature-scale")}),
        (lambda ego: _scaled(ego, 0.5), {("warn", "curvature-scale")}),
        (lambda ego: {"position_m": _held(ego.position_m), "quaternion_xyzw": _held(ego.quaternion_xyzw)}, {"frozen"}),
    ],
)
@pytest.mark.parametrize("yaw_rate", [0.3, -0.3])
def test_a_motion_that_contradicts_itself_is_found(change, expected, yaw_rate):
    ego = circle(8, speed_mps=10, yaw_rate=yaw_rate)
    found = {(one.severity, one.code) for one in agreement_findings(changed(ego, **change(ego)))}
    exact = {one for one in expected if isinstance(one, tuple)}
    assert found >= exact
    assert bool(found) == bool(expected)
    for word in expected - exact:
        assert any(code.startswith(word) for _, code in found), found


def _scaled(ego, factor: float) -> dict:
    """Positions and velocities of another unit agree with each other; the curvature knows better."""
    return {"position_m": ego.position_m * factor, "velocity_mps": ego.velocity_mps * factor}


def _held(values: np.ndarray) -> np.ndarray:
    held = values.copy()
    held[300:400] = held[300]
    return held


def test_a_car_that_drives_backward_or_stands_contradicts_nothing():
    for speed, yaw_rate in ((-4.0, 0.2), (0.0, 0.0), (25.0, 0.0)):
        assert not list(agreement_findings(circle(6, speed_mps=speed, yaw_rate=yaw_rate)))


def test_wheels_are_compared_with_poses():
    ego = circle(6, speed_mps=10, yaw_rate=0.1)
    log = SpeedLog(ego.timestamp_us, np.full(len(ego.timestamp_us), 10.2), np.zeros(len(ego.timestamp_us)))
    assert not list(wheel_findings(log, ego))
    fast = SpeedLog(log.timestamp_us, log.speed_mps * 3.6, log.steering_angle_deg)
    assert [(one.severity, one.code) for one in wheel_findings(fast, ego)] == [("refuse", "speed-disagrees")]


def test_skew_is_that_of_brute_force():
    rng = np.random.default_rng(3)
    times = {name: np.sort(rng.integers(0, 3_000_000, 90)) for name in "abc"}
    start, end = max(t[0] for t in times.values()), min(t[-1] for t in times.values())
    wanted = []
    for at in range(start, end + 1, 100_000):
        shown = [max(t for t in found if t <= at) for found in times.values()]
        wanted.append(max(shown) - min(shown))
    assert skews_us(times).tolist() == wanted


def test_duplicates_are_found_among_many_and_others_are_not():
    rng = np.random.default_rng(0)
    hashes = {f"{n:03d}": {"front": tuple(map(int, rng.integers(1, 2**63, 8)))} for n in range(600)}
    assert duplicate_pairs(hashes) == []
    coded_again = tuple(one ^ (1 << bit) for bit, one in enumerate(hashes["017"]["front"]))
    pairs = duplicate_pairs({**hashes, "900": {"front": coded_again, "rear": (1,) * 8}})
    assert [(pair.one, pair.other, pair.is_whole, pair.different_share) for pair in pairs] == [
        ("017", "900", True, 1 / 64)
    ]
    dark = {"x": {"front": (0,) * 8}, "y": {"front": (0,) * 8}}
    assert duplicate_pairs(dark) == []


def test_each_copy_is_told_once():
    def facts(name: str, *hashes: int) -> RecordingFacts:
        shown = {
            camera: PictureFacts(8, 0, 0, (one,) * 8) for camera, one in zip(("front", "rear"), hashes, strict=True)
        }
        times = {camera: np.arange(8) * 100_000 for camera in shown}
        return RecordingFacts(name, camera_facts(times, shown, {}, {}))

    told = [facts(f"copy-{n}", 2**60 + 5, 99) for n in range(20)] + [facts("front-alone", 2**60 + 5, 2**63 - 1)]
    found = [(one.code, one.recording, one.detail.split()[2]) for one in duplicate_findings(told)]
    copies = [("duplicate", name, "copy-0") for name in sorted(f"copy-{n}" for n in range(1, 20))]
    assert found == [*copies, ("duplicate-camera", "front-alone", "copy-0")]


def test_the_same_video_in_two_clips_is_told_without_decoding(root):
    with zipfile.ZipFile(pai.zip_path(root, pai.FRONT)) as archive:
        video = archive.read(pai.member(pai.FRONT, "video", CLIP))
    pai.edit_zip(pai.zip_path(root, pai.FRONT), {pai.member(pai.FRONT, "video", OTHER): video})
    found = run(root)["findings"]
    assert [(one["code"], one["severity"], one["recording"]) for one in found] == [("duplicate-video", "warn", OTHER)]


@pytest.mark.fault("F5", "F13")
def test_a_torn_chunk_is_moved_aside_and_bars_its_clips_until_it_is_back(root):
    path = pai.zip_path(root, pai.FRONT)
    whole, name = path.read_bytes(), path.relative_to(root)
    files.write_receipt(path)
    path.write_bytes(whole[:-300])
    result = run(root, quarantine=True)
    assert (result["refused"], result["quarantined"], result["moved"]) == (0, 2, [str(root / name)])
    assert not path.exists()
    assert (root / "quarantine" / name).read_bytes() == whole[:-300]
    assert set(read_quarantine(root)) == {CLIP, OTHER}
    assert "was moved to quarantine/" in read_quarantine(root)[CLIP]
    path.write_bytes(whole)  # as the next fetch does
    assert read_quarantine(root) == {}
    assert run(root)["refused"] == 0


@pytest.mark.fault("F5", "F13")
@pytest.mark.parametrize("feature", [pai.FRONT, "egomotion"])
def test_a_chunk_of_a_wrong_size_that_still_opens_bars_its_clips_no_longer_than_it_is_away(root, feature):
    path = pai.zip_path(root, feature)
    whole = path.read_bytes()
    files.write_receipt(path)
    path.write_bytes(whole + b"x")  # zip readers pass over what follows the directory
    for _ in range(2):  # the second audit finds that it is not there
        result = run(root, quarantine=True)
        assert (result["refused"], result["quarantined"]) == (0, 2)
    path.write_bytes(whole)
    assert read_quarantine(root) == {}
    assert run(root)["refused"] == 0


def test_nothing_of_a_hub_cache_is_moved(whole, tmp_path):
    snapshot = tmp_path / "physical_ai_av" / "snapshots" / ("c" * 40)
    shutil.copytree(whole, snapshot)
    path = pai.zip_path(snapshot, pai.FRONT)
    path.write_bytes(path.read_bytes()[:-300])
    result = run(tmp_path / "physical_ai_av", quarantine=True)
    assert (result["refused"], result["quarantined"], result["moved"]) == (0, 2, [])
    assert path.exists()


class _Canary:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["OMNI_TEST_CANARY"])),)


@pytest.mark.fault("F24")
def test_code_in_files_is_never_run(root, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNI_TEST_CANARY", str(tmp_path / "canary"))
    hostile = pickle.dumps(_Canary())
    run_folder = tmp_path / "runs" / "one"
    for name in ("optimizer.pt", "training_args.bin", ".metadata", "adapter_model.safetensors"):
        files.commit(run_folder / "checkpoint-1" / name, lambda stream: stream.write(hostile))
    for feature, alias in ((pai.FRONT, "video"), (pai.FRONT, "frame_timestamps"), ("egomotion", "egomotion")):
        pai.edit_zip(pai.zip_path(root, feature), {pai.member(feature, alias, CLIP): hostile})
    pai.zip_path(root, "camera_intrinsics").write_bytes(hostile)
    assert run(tmp_path / "runs", deep=True)["refused"] == 0
    unit = units_of("physical_ai_av", root, None)[0][0]
    assert {"unreadable-calibration", "damaged-member"} <= {one.code for one in check_unit(unit, deep=True).findings}
    assert not (tmp_path / "canary").exists()


def test_every_code_has_a_remedy():
    folder, found = Path(check_unit.__code__.co_filename).parent.parent, set()
    for path in [*folder.glob("audit/*.py"), *folder.glob("checks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
            name = getattr(node.func, "id", "") if is_call else ""
            if name in ("refuse", "warn", "make", "_disagreement", "_limit_findings", "_share_findings", "_Refused"):
                found.add(node.args[0].value)
    assert len(found) > 40
    assert found <= REMEDIES.keys()


def test_the_page_holds_everything_and_trusts_no_name(root, tmp_path):
    pai.edit_zip(pai.zip_path(root, pai.FRONT), {}, (("<script>alert(1)</script>", b"x"),))
    pai.edit_zip(pai.zip_path(root, pai.FRONT), {pai.member(pai.FRONT, "video", CLIP): b"no video"})
    first, second = (run(root, report=tmp_path / name) for name in ("a.html", "b.html"))
    assert first["report"] == str(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    for word in ("unreadable-video", "extra-member", CLIP, REMEDIES["extra-member"]):
        assert word in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("data:image", "")
    assert second["statistics"][str(root)]["recordings"] == 2


def test_a_page_that_cannot_be_written_is_told_and_costs_nothing(root, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    result = audit(AuditRequest(root, report=tmp_path / "folder"), Console())
    assert (result["report"], result["refused"]) == (None, 0)
    assert "no report" in capsys.readouterr().err
