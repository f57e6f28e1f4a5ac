"""The offline calibration, from hub to shard: when it is used, that it is the renderer's own, what it changes."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import FEATURES, OFFLINE_CALIBRATION, PRESENCE_FILE
from omni_cli.report import Console
from omni_cli.samples.shards import windows_path
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fetch import FetchRequest, feature_names, fetch
from omni_cli.world.clip import SyntheticSpec, build_clip, clip_id
from omni_cli.world.dataset import render_clip, write_chunk, write_indices
from omni_cli.world.render import camera_view, image_points
from tests.support.folders import tree
from tests.support.hub import serve_hub
from tests.support.plain_recipe import SAMPLE, Plain

WIDE, REAR = "camera_front_wide_120fov", "camera_rear_tele_30fov"
LINEAR = (1.03, 0.04, -0.02)
SPEC = SyntheticSpec(
    clips_per_chunk=2, seconds=2.0, fps=20, width_px=160, height_px=90, cameras=(WIDE, REAR), clutter=0.0
)
CLIP, OTHER = clip_id(SPEC, 0, 0), clip_id(SPEC, 0, 1)
LENSES, MOUNTS = OFFLINE_CALIBRATION


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sheared lenses: what the online table cannot tell."""
    root = tmp_path_factory.mktemp("whole")
    write_chunk(root, SPEC, 0, [render_clip(SPEC, 0, i, linear_cde=LINEAR) for i in (0, 1)], with_offline=True)
    write_indices(root, SPEC, [0], with_offline=True)
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "raw" / "physical_ai_av")


def table_of(root, feature):
    return root / FEATURES[feature].chunk_path(0)


def edit(path, change):
    table = pq.read_table(path).to_pydict()
    change(table)
    pq.write_table(pa.table(table), path)


def calibrated(root, clip=CLIP, camera=WIDE):
    recording = PhysicalAiAv(root).open(clip)
    return recording.cameras[camera].calibration, recording.provenance[f"calibration_{camera}"]


def seen_ground(clip, camera):
    """Where the renderer's own rays meet the ground, in the rig frame (n, 3), and at which pixels (n, 2)."""
    view = camera_view(clip.world, clip.calibrations[camera])
    points = np.concatenate([np.stack([b.x_m, b.y_m, 0 * b.x_m], axis=1) for b in view.ground]).astype(np.float64)
    rows, columns = np.divmod(np.concatenate([b.pixels for b in view.ground]), view.model.width_px)
    return points, np.stack([columns, rows], axis=1)


@pytest.mark.parametrize("camera", [WIDE, REAR])
def test_a_reader_projects_where_the_renderer_sees_with_the_linear_term(root, camera):
    clip = build_clip(SPEC, 0, 0, LINEAR)
    points_m, pixels = seen_ground(clip, camera)
    errors = {}
    for used in ("offline", "online"):
        calibration, told = calibrated(root, camera=camera)
        assert told.partition(":")[0] == used
        mount = calibration.rig_T_camera
        in_camera = mount.rotation.inv().apply(points_m - mount.translation_m)
        found, is_inside = calibration.model.project(in_camera)
        errors[used] = np.linalg.norm(found - pixels, axis=1).max()
        if used == "offline":
            assert is_inside.all()
            boxes_px, _ = image_points(clip.calibrations[camera].model, in_camera)  # how boxes are drawn
            assert np.linalg.norm(boxes_px - pixels, axis=1).max() < 0.05
        table_of(root, LENSES).unlink(missing_ok=True)
    assert errors["offline"] < 0.01
    assert errors["online"] > 1  # so that the offline one is worth its while


def without(feature):
    return lambda root: table_of(root, feature).unlink()


def not_promised(feature):
    def change(root):
        edit(root / PRESENCE_FILE, lambda table: table.update({feature: [clip != CLIP for clip in table["clip_id"]]}))

    return change


def described(**said):
    """Describe the front camera otherwise."""

    def change(root):
        def other(table):
            rows = zip(table["clip_id"], table["camera_name"], table["model_parameters"], strict=True)
            table["model_parameters"] = [
                json.dumps({**json.loads(text), **said}) if (clip, camera) == (CLIP, WIDE) else text
                for clip, camera, text in rows
            ]

        edit(table_of(root, LENSES), other)

    return change


CHOICES = {
    "all": (lambda _: None, "offline"),
    "no lenses": (without(LENSES), f"online: {LENSES} is not here"),
    "no mounts": (without(MOUNTS), f"online: {MOUNTS} is not here"),
    "none": (lambda root: [without(name)(root) for name in OFFLINE_CALIBRATION], "online"),
    "lens taken back": (not_promised(LENSES), "online: the presence table promises no offline one"),
    "mount taken back": (not_promised(MOUNTS), "online: the presence table promises no offline one"),
    "no presence": (
        lambda root: (root / PRESENCE_FILE).unlink(),
        f"online: {PRESENCE_FILE}, which would promise the offline one, is not here",
    ),
    "windshield": (
        described(external_distortion_parameters={"reference_poly": "FORWARD"}),
        "online: the offline one is a lens behind a windshield, which omni does not apply",
    ),
}


@pytest.mark.fault("F17")
@pytest.mark.parametrize("name", CHOICES)
def test_the_offline_calibration_is_used_where_it_is_promised_whole_and_can_be_applied(root, name):
    change, expected = CHOICES[name]
    edit(table_of(root, MOUNTS), lambda table: table.update(x=[x + 0.5 for x in table["x"]]))
    mounts = pq.read_table(table_of(root, "sensor_extrinsics")).to_pylist()
    online_x = next(row["x"] for row in mounts if (row["clip_id"], row["sensor_name"]) == (CLIP, WIDE))
    change(root)
    calibration, told = calibrated(root)
    assert told == expected
    is_offline = told == "offline"  # lens and mount are of one pair
    assert calibration.model.linear_cde == (LINEAR if is_offline else (1.0, 0.0, 0.0))
    assert calibration.rig_T_camera.translation_m[0] == online_x + 0.5 * is_offline
    if name == "windshield":
        codes = {
            (found["code"], found["camera"]) for found in audit(AuditRequest(root), Console(quiet=True))["findings"]
        }
        assert ("lens-not-applied", WIDE) in codes
        assert calibrated(root, camera=REAR)[1] == "offline"
    if "taken back" in name:
        assert calibrated(root, OTHER)[1] == "offline"


def test_either_pair_is_enough_and_neither_is_told(root):
    for feature in ("camera_intrinsics", "sensor_extrinsics"):
        table_of(root, feature).unlink()
    assert calibrated(root)[1] == "offline"
    table_of(root, LENSES).unlink()
    assert calibrated(root) == (None, f"its tables were not fetched: {LENSES} is not here")


def test_half_of_the_pair_is_told_when_it_is_fetched(whole, tmp_path, monkeypatch, capsys):
    with serve_hub(whole) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for features in ((LENSES,), OFFLINE_CALIBRATION):
            ask = FetchRequest("physical_ai_av", tmp_path, chunks="0-0", cameras=(WIDE,), features=features)
            fetch(dataclasses.replace(ask, dry_run=True), Console(quiet=True))
    assert capsys.readouterr().err.count(f"--features {LENSES}: it is used with the other one of") == 1


def lost(table):
    for name, column in table.items():
        table[name] = column[1:]


def twice(table):
    for name, column in table.items():
        table[name] = [*column, column[0]]


def nested(table):
    table["model_parameters"] = ["[" * 90_000 for _ in table["model_parameters"]]


def flat(table):
    said = map(json.loads, table["model_parameters"])
    table["model_parameters"] = [json.dumps({**one, "linear_cde": [0.5, 1.0, 0.5]}) for one in said]


DAMAGE = {
    "flat": (LENSES, flat, "lays the picture on a line"),
    "lost": (LENSES, lost, rf"camera_intrinsics\.offline\.chunk_0000\.parquet: no row for {WIDE} of clip {CLIP}"),
    "twice": (LENSES, twice, "1 cameras have two rows"),
    "nested": (LENSES, nested, "model_parameters is no JSON object"),
    "numbers": (LENSES, lambda t: t.update(model_parameters=[7] * 4), "model_parameters is no JSON object"),
    "huge": (LENSES, lambda t: t.update(model_parameters=[described_huge()] * 4), "not the parameters of an f-theta"),
    "zero": (MOUNTS, lambda t: t.update(dict.fromkeys(("qx", "qy", "qz", "qw"), [0.0] * 4)), "is off unit norm"),
    "nan": (MOUNTS, lambda t: t.update(x=[float("nan")] * 4), "x is nan at row 0"),
}


def described_huge():
    return json.dumps({"resolution": [10**400, 1], "principal_point": [10**400, 0]})


@pytest.mark.fault("F14", "F16", "F17")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_promised_calibration_that_is_damaged_is_refused_by_name(root, name):
    feature, change, message = DAMAGE[name]
    edit(table_of(root, feature), change)
    with pytest.raises(DataError, match=message):
        PhysicalAiAv(root).open(CLIP)
    files.write_receipt(table_of(root, feature))
    found = audit(AuditRequest(root), Console(quiet=True))
    assert CLIP in {finding["recording"] for finding in found["findings"] if finding["severity"] == "refuse"}
    assert "audit-failed" not in {finding["code"] for finding in found["findings"]}


def test_shards_of_one_calibration_are_not_taken_for_those_of_the_other(whole, tmp_path, monkeypatch):
    out, data = tmp_path / "shards" / "out", tmp_path
    split = tmp_path / "split.csv"
    split.write_text(f"recording,split\n{CLIP},train\n{OTHER},val\n")
    recipe = Plain(sample=SAMPLE.model_copy(update={"cameras": WIDE, "window": 4}))

    def made():
        request = EtlRequest(data, "physical_ai_av", out, workers=0, split_file=split)
        return etl(recipe, request, Console(quiet=True))["made"]

    def told():
        return {
            files.read_receipt(windows_path(out, clip))["provenance"][f"calibration_{WIDE}"] for clip in (CLIP, OTHER)
        }

    with serve_hub(whole) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        ask = FetchRequest("physical_ai_av", data, chunks="0-0", cameras=(WIDE,), retry_wait_s=0.01)
        fetch(ask, Console(quiet=True))
        assert (made(), told(), made()) == (2, {"online"}, 0)
        before = tree(out / "recordings")
        features = feature_names(",".join(OFFLINE_CALIBRATION))
        fetch(dataclasses.replace(ask, features=features), Console(quiet=True))
    assert (made(), told(), made()) == (2, {"offline"}, 0)
    after = tree(out / "recordings")
    changed = {name for name in after if after[name] != before[name]}
    assert {name.rpartition(".arrow")[2] for name in changed} == {
        ".receipt.json"
    }  # this recipe's pixels do not need it
