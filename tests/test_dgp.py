"""DGP scenes: the motion and the cameras that their poses mean, their import, and refusals that name what is wrong."""

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import dgp as layout
from omni_cli.samples.shards import open_shards
from omni_cli.scene.poses import Pose
from omni_cli.sources import open_source
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fetch import FetchRequest, fetch
from omni_cli.stages.locate import layout_of, raw_folder
from tests.support.driving import real_data, real_folder
from tests.support.pipeline import QUIET, tiny_recipe

CAMERAS = ("CAMERA_01", "CAMERA_05")
START_US, PERIOD_US, COUNT = 1_561_645_824_993_653, 100_000, 7  # between them six instants of whole tenths
SPEED_MPS, YAW_RATE = 8.0, 0.2  # a turn to the left
SIZE_PX = (64, 40)
HASH = "0123456789abcdef" * 2 + "01234567"
AHEAD = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # right, down, forward -> forward, left, up
MOUNTS = {
    "CAMERA_01": Pose(AHEAD, np.array([1.5, 0.2, 1.6])),
    "CAMERA_05": Pose(Rotation.from_euler("z", 52, degrees=True) * AHEAD, np.array([1.4, 0.5, 1.5])),
}


def world_T_rig(time_s):
    yaw = YAW_RATE * time_s
    at = SPEED_MPS / YAW_RATE * np.array([np.sin(yaw), 1 - np.cos(yaw), 0]) + [400.0, -260.0, 12.5]
    return Pose(Rotation.from_euler("z", yaw), at)


def as_json(pose):
    (x, y, z), (qx, qy, qz, qw) = pose.translation_m.tolist(), pose.rotation.as_quat().tolist()
    return {"translation": {"x": x, "y": y, "z": z}, "rotation": {"qw": qw, "qx": qx, "qy": qy, "qz": qz}}


def stamp(time_us):
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat().replace("+00:00", "Z")


def write_scene(folder, name="000150", *, tenths=True, count=COUNT):
    """A scene of two cameras, whose times are told as DDAD tells them, ten times too large, or as they should be."""
    data, scene = [], folder / name
    for number in range(count):
        time_us = START_US + number * PERIOD_US
        told = time_us * 10 if tenths else time_us
        for shade, (camera, mount) in enumerate(MOUNTS.items()):
            file = f"rgb/{camera}/{told}.png"
            (scene / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE_PX, (60 + 20 * number, 90 * shade, 50)).save(scene / file)
            pose = as_json(world_T_rig(number * PERIOD_US / 1e6) @ mount)
            image = {"filename": file, "width": SIZE_PX[0], "height": SIZE_PX[1], "channels": 3, "pose": pose}
            data.append({"id": {"name": camera, "timestamp": stamp(told)}, "datum": {"image": image}, "key": HASH})
    cloud = {"id": {"name": "LIDAR", "timestamp": stamp(START_US)}, "datum": {"point_cloud": {"filename": "x.npz"}}}
    samples = [{"calibration_key": HASH, "datum_keys": []} for _ in range(count)]
    write_json(scene / f"scene_{HASH}.json", {"data": [*data[::-1], cloud], "samples": samples, "log": "L"})
    intrinsics = {"fx": 60.0, "fy": 61.0, "cx": 31.0, "cy": 19.0, "skew": 0.0}
    write_json(
        scene / "calibration" / f"{HASH}.json",
        {
            "names": [*CAMERAS],
            "extrinsics": [*map(as_json, MOUNTS.values())],
            "intrinsics": [intrinsics] * len(CAMERAS),
        },
    )
    return scene


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("tenths", [True, False], ids=["tenths of a microsecond", "microseconds"])
def test_a_scene_is_its_images_at_their_true_times_and_the_motion_of_its_poses(tmp_path, tenths):
    write_scene(tmp_path, tenths=tenths)
    source = open_source("dgp", tmp_path)
    (ref,) = source.recordings()
    recording = source.open(ref.id)
    times_us = START_US + PERIOD_US * np.arange(COUNT)
    assert recording.provenance["times"] == ("stated tenfold, divided by ten" if tenths else "as stated")
    assert (ref.id, ref.group, recording.group) == ("000150", "000150", "000150")
    assert list(recording.cameras) == list(CAMERAS)
    for name, stream in recording.cameras.items():
        assert np.array_equal(stream.timestamp_us, times_us)
        assert [video.num_frames for video in stream.videos] == [1] * COUNT
        model, mount = stream.calibration.model, stream.calibration.rig_T_camera
        expected = (*SIZE_PX, 60.0, 61.0, 31.0, 19.0)
        assert (model.width_px, model.height_px, model.fx_px, model.fy_px, model.cx_px, model.cy_px) == expected
        assert np.allclose(mount.translation_m, MOUNTS[name].translation_m)
        assert (mount.rotation.inv() * MOUNTS[name].rotation).magnitude() < 1e-9
    state = recording.ego.at(times_us[1:-1])  # in the middle differences are central
    assert np.allclose(state.body_velocity_mps(), [SPEED_MPS, 0, 0], atol=0.01)
    assert np.allclose(state.curvature_per_m, YAW_RATE / SPEED_MPS, atol=1e-3)
    truth = np.stack([world_T_rig(number * 0.1).translation_m for number in range(COUNT)])
    assert np.allclose(recording.ego.position_m, truth - truth[0], atol=1e-9)
    assert source.open(ref.id, CAMERAS[:1]).ego.position_m.tolist() == recording.ego.position_m.tolist()
    with pytest.raises(UsageError, match="no camera 'CAMERA_77' in DGP scenes; known: CAMERA_01"):
        source.open(ref.id, ("CAMERA_77",))


def test_times_without_a_zone_are_utc_and_those_of_a_lidar_are_not_read(tmp_path, monkeypatch):
    scene = write_scene(tmp_path, tenths=False)
    path = scene / f"scene_{HASH}.json"
    expected = open_source("dgp", tmp_path).open("000150").cameras[CAMERAS[0]].timestamp_us

    def edit(content):
        for datum in content["data"]:
            datum["id"]["timestamp"] = datum["id"]["timestamp"].removesuffix("Z")
        content["data"][-1]["id"]["timestamp"] = "never"

    change(path, edit)
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    time.tzset()
    try:
        found = open_source("dgp", tmp_path).open("000150").cameras[CAMERAS[0]].timestamp_us
    finally:
        monkeypatch.undo()
        time.tzset()
    assert np.array_equal(found, expected)


def image_of(scene, number=0):
    return scene["data"][number]["datum"]["image"]


def set_first(key, value):
    return lambda scene: image_of(scene).update({key: value})


def turn_off_unit(scene):
    image_of(scene)["pose"]["rotation"]["qw"] += 0.1


def move_one(scene):
    image_of(scene)["pose"]["translation"]["x"] += 0.2


WRONG_SCENES = {
    "escape": (
        set_first("filename", "../../etc/passwd"),
        r"CAMERA_05: names the image '\.\./\.\./etc/passwd', outside",
    ),
    "absolute": (set_first("filename", "/etc/passwd"), "outside of its rgb folder"),
    "dots": (set_first("filename", "rgb/CAMERA_05/../../../x.jpg"), "outside of its rgb folder"),
    "missing": (set_first("filename", "rgb/CAMERA_05/1.png"), r"1\.png: is missing; copy the whole scene"),
    "size": (set_first("width", 63), r"has images of the sizes \[\(63, 40\), \(64, 40\)\]"),
    "text": (set_first("width", "wide"), r"no scene of DGP \(data\.0\.datum\.image\.width: "),
    "quaternion": (turn_off_unit, "CAMERA_05: poses hold a quaternion that is not of length 1"),
    "poses": (move_one, "CAMERA_05: places the car 0.20 m from where other cameras do"),
    "time": (lambda s: s["data"][0]["id"].update(timestamp="1999-01-01T00:00:00Z"), "no time since 2000, nor ten"),
    "late": (lambda s: s["data"][0]["id"].update(timestamp="9999-01-01T00:00:00Z"), "no time since 2000, nor ten"),
    "no time": (lambda s: s["data"][0]["id"].update(timestamp="noon"), "timestamp 'noon': no time since 2000"),
    "twice": (lambda s: s["data"].append(s["data"][0]), "CAMERA_05: two images have the same time"),
    "calibrations": (lambda s: s["samples"][0].update(calibration_key="f" * 40), "has 2 calibrations; expected one"),
    "key": (
        lambda s: [one.update(calibration_key="../x") for one in s["samples"]],
        r"'calibration/\.\./x\.json', which",
    ),
    "no images": (lambda s: s.update(data=s["data"][-1:]), "000150: lists no image"),
    "one": (lambda s: s.update(data=s["data"][:2]), "has images of one instant; a motion needs two"),
}


@pytest.mark.fault("F14", "F18", "F19")
@pytest.mark.parametrize("wrong", WRONG_SCENES)
def test_a_scene_that_cannot_be_is_refused_in_one_line(tmp_path, wrong):
    edit, message = WRONG_SCENES[wrong]
    scene = write_scene(tmp_path)
    change(scene / f"scene_{HASH}.json", edit)
    with pytest.raises(DataError, match=message) as refused:
        open_source("dgp", tmp_path).open("000150")
    assert "\n" not in str(refused.value)


def bend(calibration):
    calibration["intrinsics"][1] = {**calibration["intrinsics"][1], "k1": -0.2}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (bend, r"intrinsics have k1 -0\.2; only plain pinhole"),
        (lambda c: c["intrinsics"][1].pop("fx"), "focal lengths 0 and 61; expected two above zero"),
        (lambda c: c["names"].pop(), "lists of different lengths"),
        (lambda c: c["names"].__setitem__(1, "X"), "CAMERA_05: has no calibration"),
        (lambda c: c["extrinsics"][1]["translation"].update(x=float("nan")), r"no calibration of DGP \(extrinsics"),
    ],
)
@pytest.mark.fault("F17")
def test_a_calibration_that_cannot_be_is_refused_in_one_line(tmp_path, edit, message):
    scene = write_scene(tmp_path)
    change(scene / "calibration" / f"{HASH}.json", edit)
    with pytest.raises(DataError, match=message):
        open_source("dgp", tmp_path).open("000150")


@pytest.mark.fault("F14", "F23")
def test_a_link_out_of_the_scene_a_huge_list_and_no_scene_are_refused(tmp_path, monkeypatch):
    scene = write_scene(tmp_path / "data")
    picture = next((scene / "rgb" / "CAMERA_01").iterdir())
    shutil.copy(picture, tmp_path / "elsewhere.png")
    picture.unlink()
    picture.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match="outside of its rgb folder"):
        open_source("dgp", tmp_path / "data").open("000150")
    with (scene / f"scene_{HASH}.json").open("ab") as stream:
        stream.truncate(layout.MAX_JSON_BYTES + 1)  # sparse: takes no room
    with pytest.raises(DataError, match=f"holds {layout.MAX_JSON_BYTES + 1} bytes, more than"):
        open_source("dgp", tmp_path / "data").open("000150")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no scene such as 000150"):
        open_source("dgp", tmp_path / "empty").recordings()


def test_a_scene_is_fetched_audited_and_cut_into_windows(tmp_path):
    write_scene(tmp_path / "origin")
    write_scene(tmp_path / "origin" / "more", "000151")
    (tmp_path / "origin" / "000150" / "point_cloud").mkdir()
    (tmp_path / "origin" / "000150" / "point_cloud" / "x.npz").write_bytes(b"not copied")
    assert layout_of(tmp_path / "origin") == "dgp"
    data = tmp_path / "data"
    fetched = fetch(FetchRequest("dgp", data, origin=tmp_path / "origin"), QUIET)
    assert (fetched["segments"], fetched["fetched"]) == (["000150", "000151"], 2 * (2 + 2 * COUNT))
    assert fetch(FetchRequest("dgp", data, origin=tmp_path / "origin"), QUIET)["fetched"] == 0
    assert raw_folder(data, None) == ("dgp", data / "raw" / "dgp")
    assert not list(data.rglob("*.npz"))
    assert audit(AuditRequest(data, deep=True), QUIET)["refused"] == 0
    recipe = tiny_recipe(cameras="CAMERA_01,CAMERA_05")
    recipe = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"window": 3, "stride": 3})})
    shards = open_shards(Path(etl(recipe, EtlRequest(data, out=tmp_path / "shards", workers=0), QUIET)["shards"]))
    for entry in shards.manifest.recordings:
        frames, rows = shards.frames(entry.id).to_pylist(), shards.windows(entry.id).to_pylist()
        assert len(rows) == COUNT // 3
        for row in rows:
            shown = [frames[number] for number in row["frames"]]
            assert [one["frame_index"] for one in shown] == [row["window"] * 3 + step for step in (0, 0, 1, 1, 2, 2)]
            assert [one["timestamp_us"] for one in shown] == row["timestamps_us"]
            cells = [np.frombuffer(one["pixels"], np.uint8).reshape(one["height_px"], -1, 3) for one in shown]
            reds = [cell[len(cell) // 2, cell.shape[1] // 2, 0] for cell in cells]  # beside it may be bars
            assert np.allclose(reds, [60 + 20 * one["frame_index"] for one in shown], atol=4)
            assert row["mean_speed_mps"] == pytest.approx(SPEED_MPS, abs=0.02)


@pytest.fixture(scope="module")
def real():
    source = open_source("dgp", real_folder() / "ddad_dgp_test_scene")
    return source.open("scene_02")


@real_data
def test_the_real_car_drives_forward_on_its_wheels(real):
    """Where the car is, is told by six cameras; that it moves along its own x axis, nobody told."""
    ego = real.ego
    state = ego.at(ego.timestamp_us)
    assert np.allclose(np.diff(ego.timestamp_us), 100_000, atol=10)  # documented: 10 Hz
    assert np.allclose(state.body_velocity_mps(), [12.7, 0, 0], atol=0.06)
    assert (state.anchor_T_rig.rotation.apply([0, 0, 1])[:, 2] > 0.99).all()
    assert {(s.calibration.model.width_px, s.calibration.model.height_px) for s in real.cameras.values()} == {
        (1936, 1216)
    }
    yaws = [np.arctan2(*s.calibration.rig_T_camera.rotation.apply([0, 0, 1])[1::-1]) for s in real.cameras.values()]
    assert np.allclose(np.degrees(yaws), [3.9, 51.7, -53.1, 123.7, -124.5, -179.0], atol=0.1)


@real_data
def test_real_things_that_stand_stay_where_they_are_in_the_world(real):
    """The boxes were drawn around points of the lidar, sweep by sweep, in the car's frame."""
    path = next((real_folder() / "ddad_dgp_test_scene").glob("test_scene/scene_02/agent/agent_tracks_*.json"))
    moved_m, passed_m = [], []
    for track in json.loads(path.read_text())["agent_tracks"]:
        seen = {
            one["slice_id"]["timestamp"]: one["agent_snapshot_3D"]["box"]["pose"] for one in track["agent_snapshots"]
        }
        times_us = np.array([layout.microseconds(time) for time in sorted(seen)])
        known = (times_us >= real.ego.span_us[0]) & (times_us <= real.ego.span_us[1])
        if known.sum() < 2:
            continue
        boxes = [[seen[time]["translation"][axis] for axis in "xyz"] for time in sorted(seen)]
        in_car_m = np.array(boxes)[known]
        in_world_m = real.ego.at(times_us[known]).anchor_T_rig.apply(in_car_m)
        passed_m.append(np.linalg.norm(in_car_m[1, :2] - in_car_m[0, :2]))
        moved_m.append(np.linalg.norm(in_world_m[1, :2] - in_world_m[0, :2]))
    assert len(moved_m) >= 10
    stands = np.array(moved_m) < 0.1
    assert stands.mean() > 0.5
    assert np.median(np.array(passed_m)[stands]) > 1.0


@real_data
def test_a_real_camera_sees_what_its_neighbour_sees_where_both_calibrations_say_so(real):
    """No other place within 12 px of the full picture fits better, for things some 60 m away."""
    ahead, left = (real.cameras[name] for name in ("CAMERA_01", "CAMERA_05"))
    size_px = (968, 608)
    models = [stream.calibration.model.resized(*size_px) for stream in (ahead, left)]
    pictures = []
    for stream in (ahead, left):
        with Image.open(stream.videos[0].path) as picture:
            small = picture.convert("L").resize(size_px, Image.Resampling.BOX)
        pictures.append(gaussian_filter(np.asarray(small, dtype=np.float64), 1))
    pixels = np.stack(np.meshgrid(np.arange(0.0, 968, 3), np.arange(0.0, 380, 3)), axis=-1).reshape(-1, 2)
    points_m = ahead.calibration.rig_T_camera.apply(models[0].rays(pixels) * 60.0)
    there, is_seen = models[1].project(left.calibration.rig_T_camera.inverse().apply(points_m))
    is_seen &= (there > 12).all(axis=1) & (there < np.array(size_px) - 12).all(axis=1)
    assert is_seen.sum() > 5000
    here = map_coordinates(pictures[0], pixels[is_seen].T[::-1], order=1)
    fits = {
        (x, y): np.corrcoef(here, map_coordinates(pictures[1], there[is_seen].T[::-1] + np.array([[y], [x]]), order=1))[
            0, 1
        ]
        for x in range(-6, 7, 2)
        for y in range(-6, 7, 2)
    }
    assert max(fits, key=fits.get) == (0, 0)
    assert fits[0, 0] > 0.95


@real_data
def test_the_real_scenes_pass_audit_and_etl(tmp_path):
    fetch(FetchRequest("dgp", tmp_path, origin=real_folder() / "ddad_dgp_test_scene"), QUIET)
    result = audit(AuditRequest(tmp_path, deep=True), QUIET)
    assert (result["audited"], result["refused"]) == (2, 0)
    recipe = tiny_recipe(cameras="CAMERA_01,CAMERA_05,CAMERA_06")
    recipe = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"window": 2, "stride": 1})})
    shards = open_shards(Path(etl(recipe, EtlRequest(tmp_path, out=tmp_path / "shards", workers=0), QUIET)["shards"]))
    (row,) = shards.windows("scene_02").to_pylist()
    assert row["mean_speed_mps"] == pytest.approx(12.7, abs=0.1)
    assert row["timestamps_us"] == [1_561_645_824_993_653] * 3 + [1_561_645_825_093_652] * 3
