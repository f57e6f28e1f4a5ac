"""comma2k19: the motion that its arrays mean, its camera, its import, and a refusal that names what is wrong."""

import io
import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import comma2k19 as layout
from omni_cli.formats.openpilot import SegmentName
from omni_cli.report import Console
from omni_cli.samples.driven_path import driven_paths
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.scene.driving_log import DeviceLog, YawRateLog
from omni_cli.scene.model_frame import camera_R_calib
from omni_cli.scene.recording import Recording, SpeedLog
from omni_cli.sources import open_source
from omni_cli.sources.comma2k19 import Comma2k19
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.checks.motion import speed_findings
from omni_cli.stages.fetch import FetchRequest, fetch
from omni_cli.stages.locate import layout_of, raw_folder

DONGLE, LOG = "b0c9d2329ad1606b", "2018-08-02--08-34-47"
ROUTE = f"{DONGLE}|{LOG}"
ID = f"{DONGLE}_{LOG}--40"
COUNT = 260
SPEED_MPS, YAW_RATE = 15.0, -0.02  # a gentle turn to the right
PITCH, YAW = np.radians(3.5), np.radians(-1.2)  # of the device in the car
LATITUDE, LONGITUDE, ALTITUDE_M = np.radians(37.7), np.radians(-122.4), 120.0
BOOT_S = 46_408.5


def ecef_R_enu() -> np.ndarray:
    sin_lat, cos_lat, sin_lon, cos_lon = *_sin_cos(LATITUDE), *_sin_cos(LONGITUDE)
    east, up = [-sin_lon, cos_lon, 0], [cos_lat * cos_lon, cos_lat * sin_lon, sin_lat]
    return np.stack([east, [-sin_lat * cos_lon, -sin_lat * sin_lon, cos_lat], up], axis=1)


def _sin_cos(angle: float) -> tuple[float, float]:
    return np.sin(angle), np.cos(angle)


def geodetic_to_ecef() -> np.ndarray:
    """Textbook WGS84."""
    squared_eccentricity = 6.69437999014e-3
    normal = 6_378_137.0 / np.sqrt(1 - squared_eccentricity * np.sin(LATITUDE) ** 2)
    level = (normal + ALTITUDE_M) * np.cos(LATITUDE)
    z = (normal * (1 - squared_eccentricity) + ALTITUDE_M) * np.sin(LATITUDE)
    return np.array([level * np.cos(LONGITUDE), level * np.sin(LONGITUDE), z])


def arrays(speed_mps: float = SPEED_MPS) -> dict[str, np.ndarray]:
    """A car on a circle that starts to the east; its device looks down and to a side."""
    t = np.arange(COUNT) / 20
    heading, radius = YAW_RATE * t, speed_mps / YAW_RATE
    zeros = np.zeros(COUNT)
    enu_m = np.stack([radius * np.sin(heading), radius * (1 - np.cos(heading)), zeros], axis=1)
    velocity = speed_mps * np.stack([np.cos(heading), np.sin(heading), zeros], axis=1)
    enu_R_calib = Rotation.from_euler("z", heading[:, None]) * Rotation.from_matrix(np.diag([1.0, -1, -1]))
    device_R_calib = Rotation.from_euler("ZYX", [YAW, PITCH, 0])
    quaternion = (Rotation.from_matrix(ecef_R_enu()) * enu_R_calib * device_R_calib.inv()).as_quat()
    can_s = BOOT_S - 0.05 + np.arange(round(COUNT / 20 * 80) + 10) / 80
    return {
        layout.FRAME_TIMES: BOOT_S + t,
        layout.POSITIONS: geodetic_to_ecef() + enu_m @ ecef_R_enu().T,
        layout.VELOCITIES: velocity @ ecef_R_enu().T,
        layout.ORIENTATIONS: quaternion[:, [3, 0, 1, 2]],
        layout.SPEED_TIMES: can_s,
        layout.SPEEDS: np.full((len(can_s), 1), speed_mps),
        layout.STEERING_TIMES: can_s[3:-3] + 0.001,
        layout.STEERING_ANGLES: 100 * (can_s[3:-3] + 0.001 - BOOT_S),
    }


def write_segment(folder: Path, values: dict[str, np.ndarray] | None = None) -> Path:
    for name, array in (values or arrays()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            np.save(stream, array)
    return folder


def hevc(count: int, width: int = 128, height: int = 96) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="hevc") as out:
        track = out.add_stream("libx265", rate=20)
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        quiet = "bframes=0:keyint=20:log-level=none:pools=none:frame-threads=1"
        track.options = {"preset": "ultrafast", "x265-params": quiet}
        for number in range(count):
            picture = np.empty((height, width, 3), np.uint8)
            picture[:] = 40 + (2 * np.arange(width)[None, :, None] + 8 * number) % 200  # neither black nor still
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 20)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comma2k19")
    write_segment(folder / "Chunk_1" / ROUTE / "40")
    (folder / "Chunk_1" / ROUTE / "40" / layout.VIDEO_FILE).write_bytes(hevc(COUNT))
    return folder


@pytest.fixture
def chunks(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "chunks")


def segment(folder: Path) -> Path:
    return folder / "Chunk_1" / ROUTE / "40"


def test_the_device_s_poses_become_the_car_s_motion(whole):
    recording = open_source("comma2k19", whole).open(ID)
    mount, ego = recording.device.mount, recording.ego
    assert mount.rpy_rad == pytest.approx(np.array([[0, PITCH, YAW]]), abs=1e-6)
    assert mount.is_calibrated.tolist() == [True]
    t = np.arange(COUNT) / 20
    assert ego.timestamp_us.tolist() == np.round((BOOT_S + t) * 1e6).astype(int).tolist()
    state = ego.at(ego.timestamp_us)
    assert state.body_velocity_mps() == pytest.approx(np.tile([SPEED_MPS, 0, 0], (COUNT, 1)), abs=1e-5)
    radius, heading = SPEED_MPS / YAW_RATE, YAW_RATE * t
    level_m = np.stack([radius * np.sin(heading), radius * (1 - np.cos(heading))], axis=1)
    assert ego.position_m[:, :2] == pytest.approx(level_m, abs=1e-4)
    assert ego.position_m[:, 2] == pytest.approx(-layout.CAMERA_HEIGHT_M, abs=1e-4)  # the ground under the camera
    assert ego.curvature_per_m == pytest.approx(YAW_RATE / SPEED_MPS, abs=1e-8)
    inwards = np.linalg.norm(ego.acceleration_mps2[1:-1], axis=1)
    assert inwards == pytest.approx(SPEED_MPS * abs(YAW_RATE), rel=1e-3)
    paths = driven_paths(recording, ego.timestamp_us[:2], camera="video")
    assert paths.xy_m[0, -1] == pytest.approx(
        [radius * np.sin(10 * YAW_RATE), -radius * (1 - np.cos(10 * YAW_RATE))], abs=1e-3
    )
    assert paths.xy_m[0, -1, 1] > 10  # a right turn leads to the right


def test_speed_and_steering_come_with_the_bus_s_own_times(whole):
    speed = Comma2k19(whole).open(ID, ()).speed
    kept = arrays()[layout.SPEED_TIMES][4:-3]  # where the steering angle is known, too
    assert speed.timestamp_us.tolist() == np.round(kept * 1e6).astype(int).tolist()
    assert speed.steering_angle_deg == pytest.approx(100 * (kept - BOOT_S), abs=1e-3)
    assert (speed.speed_mps == SPEED_MPS).all()


def test_the_camera_looks_where_the_mount_says(whole):
    recording = Comma2k19(whole).open(ID)
    stream = recording.cameras["video"]
    assert (stream.timestamp_us == recording.ego.timestamp_us).all()
    assert stream.calibration.model == layout.INTRINSICS.resized(128, 96)
    by_rig = camera_R_calib(stream.calibration, None)
    by_mount = camera_R_calib(stream.calibration, recording.device.mount.device_R_calib(0))
    assert by_rig == pytest.approx(by_mount, abs=1e-12)
    far_ahead = by_rig @ [1000.0, 0, 0]  # x right, y down, z forward
    assert far_ahead[0] / far_ahead[2] == pytest.approx(np.tan(YAW))
    assert far_ahead[1] < -50  # the device looks down: the horizon lies above its axis
    assert stream.calibration.rig_T_camera.translation_m == pytest.approx([0, 0, layout.CAMERA_HEIGHT_M])


def test_an_absent_video_matters_only_where_it_is_asked_for(chunks):
    (segment(chunks) / layout.VIDEO_FILE).unlink()
    assert Comma2k19(chunks).open(ID).cameras == {}
    assert Comma2k19(chunks).open(ID).ego is not None
    with pytest.raises(DataError, match=r"--40: has no video.hevc, only poses and logs; copy the whole segment"):
        Comma2k19(chunks).open(ID, ("video",))


def test_a_car_that_stands_tells_nothing_of_the_mount(tmp_path):
    write_segment(tmp_path / ROUTE / "40", arrays(speed_mps=0.5))
    mount = Comma2k19(tmp_path).open(ID).device.mount
    assert mount.is_calibrated.tolist() == [False]
    assert not mount.rpy_rad.any()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("Chunk_3/{r}/7/video.hevc", (7, "video.hevc")),
        ("{u}/12/global_pose/frame_times", (12, "global_pose/frame_times")),
        ("a/Example_1/{r}/40/processed_log/CAN/speed/value", (40, "processed_log/CAN/speed/value")),
        ("{r}/40/processed_log/IMU/gyro/value", None),
        ("{r}/40/raw_log.bz2", None),
        ("{r}/40/preview.png", None),
        ("{r}/40/global_pose/frame_times.receipt.json", None),
        ("{r}--40/video.hevc", None),
        ("notes/40/video.hevc", None),
    ],
)
def test_segments_are_told_by_their_paths(path, found):
    parsed = layout.parse_segment_file(path.format(r=ROUTE, u=ROUTE.replace("|", "_")))
    assert parsed == (found and (SegmentName(DONGLE, LOG, found[0]), found[1]))


def _saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _claims_72_terabytes() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (3 * 10**12, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(99)


def _changed(name: str, rows: object, value: float) -> np.ndarray:
    array = arrays()[name]
    array[rows] = value
    return array


class Hostile:
    def __reduce__(self):
        return os._exit, (7,)


DAMAGE = {
    "no poses": (layout.POSITIONS, None, "lacks global_pose/frame_positions"),
    "a pickle": (layout.POSITIONS, pickle.dumps(Hostile()), "frame_positions: no array of numbers"),
    "objects": (layout.SPEEDS, _saved(np.array([Hostile()] * 99)), "value: no array of numbers"),
    "empty": (layout.FRAME_TIMES, b"", "frame_times: no array of numbers"),
    "truncated": (layout.POSITIONS, _saved(arrays()[layout.POSITIONS])[:-9], "frame_positions: no array of numbers"),
    "72 TB": (layout.POSITIONS, _claims_72_terabytes(), "no array of numbers .*length"),
    "text": (layout.POSITIONS, _saved(np.full((COUNT, 3), "x")), r"holds <U1 \(260, 3\); expected numbers \(n, 3\)"),
    "flat": (layout.POSITIONS, _saved(np.zeros(COUNT)), r"holds float64 \(260,\); expected numbers \(n, 3\)"),
    "a number": (layout.SPEEDS, _saved(np.array(3.0)), "expected numbers"),
    "NaN": (layout.VELOCITIES, _saved(_changed(layout.VELOCITIES, 7, np.nan)), "holds NaN or infinite values"),
    "time stands": (layout.FRAME_TIMES, _saved(_changed(layout.FRAME_TIMES, 5, BOOT_S)), "frame_times do not increase"),
    "short": (layout.ORIENTATIONS, _saved(arrays()[layout.ORIENTATIONS][:-1]), "holds 259 poses for 260 frames"),
    "no turn": (layout.ORIENTATIONS, _saved(np.zeros((COUNT, 4))), "quaternions that are not of length 1"),
    "half a log": (layout.SPEEDS, _saved(np.zeros((9, 1))), "value holds 9 rows for"),
    "apart": (layout.STEERING_TIMES, _saved(arrays()[layout.STEERING_TIMES] + 99), "no time in common"),
    "few frames": (layout.VIDEO_FILE, hevc(20), "video.hevc: holds 20 frames for 260 frame times"),
    "cut": (layout.VIDEO_FILE, hevc(COUNT, 128, 64), "is 128x64; expected 1164x874 or the same picture"),
    "no video": (layout.VIDEO_FILE, b"no video" * 99, "not a readable video"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name_in_one_line(chunks, damage):
    file, content, message = DAMAGE[damage]
    path = segment(chunks) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Comma2k19(chunks).open(ID)
    assert "\n" not in str(caught.value)


def test_wrong_requests_say_what_is_there(whole, tmp_path):
    with pytest.raises(UsageError, match="no camera 'fcamera' in comma2k19; known: video"):
        Comma2k19(whole).open(ID, ("fcamera",))
    with pytest.raises(DataError, match="holds no segment nothing--1"):
        Comma2k19(whole).open("nothing--1")
    with pytest.raises(DataError, match=r"no folder .*omni fetch --source comma2k19 --from CHUNKS"):
        Comma2k19(tmp_path / "nowhere").recordings()
    with pytest.raises(DataError, match=r"holds no segment such as Chunk_1/DONGLE"):
        Comma2k19(tmp_path).recordings()


def test_messages_that_are_stamped_together_are_no_crash():
    """A bus log read in bursts: 0.07 m/s within 0.2 ms. A car that loses 5 m/s in a tenth of a second is a crash."""
    time_us = np.sort(np.concatenate([np.arange(160) * 12_500, np.arange(20) * 100_000 + 200]))
    ripple = 10 + 0.07 * (np.arange(180) % 2)
    assert list(speed_findings(SpeedLog(time_us, ripple, 0 * ripple), None)) == []
    crash = np.where(time_us < 1_000_000, 10.0, 5.0)
    (found,) = speed_findings(SpeedLog(time_us, crash, 0 * crash), None)
    assert (found.code, found.severity) == ("impossible-acceleration", "refuse")


def get(data: Path, **options) -> dict:
    return fetch(FetchRequest(source="comma2k19", data=data, **options), Console(quiet=True))


def test_chunks_are_imported_once_and_found_again(whole, tmp_path):
    result = get(tmp_path, origin=whole)
    raw = tmp_path / "raw" / "comma2k19"
    assert result["segments"] == [f"{DONGLE}_{LOG}/40"]
    assert result["fetched"] == len(layout.FILES)
    assert get(tmp_path, origin=whole)["fetched"] == 0
    assert layout_of(whole) == layout_of(whole / "Chunk_1") == layout_of(raw) == "comma2k19"
    assert raw_folder(tmp_path, None) == raw_folder(tmp_path, "comma2k19") == ("comma2k19", raw)
    ours, theirs = (Comma2k19(folder).open(ID) for folder in (raw, whole))
    assert (ours.ego.position_m == theirs.ego.position_m).all()
    assert audit(AuditRequest(tmp_path, deep=True), Console(quiet=True))["findings"] == []
    (raw / f"{DONGLE}_{LOG}" / "40" / layout.VIDEO_FILE).write_bytes(hevc(20))
    result = audit(
        AuditRequest(raw, cameras=("qcamera",)), Console(quiet=True)
    )  # of another source: its own is audited
    assert "refused-by-reader" in {finding["code"] for finding in result["findings"]}


def test_what_cannot_be_imported_says_how(tmp_path):
    with pytest.raises(UsageError, match="omni fetch --source comma2k19 --from CHUNKS"):
        get(tmp_path)
    with pytest.raises(UsageError, match="get it with: omni fetch --source comma2k19 --from CHUNKS"):
        raw_folder(tmp_path, "comma2k19")
    (tmp_path / "raw_log.bz2").touch()
    with pytest.raises(DataError, match=r"found raw_log.bz2; expected unpacked segments like Chunk_1/"):
        get(tmp_path, origin=tmp_path)


real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")


@pytest.fixture
def example() -> Recording:
    source = Comma2k19(Path(os.environ["OMNI_REAL_DATA"]) / "comma2k19_example1")
    assert [ref.id for ref in source.recordings()] == [ID]
    return source.open(ID)


@real_data
@pytest.mark.real_data
def test_the_real_example(example):
    ego, mount, speed = example.ego, example.device.mount, example.speed
    assert len(ego.timestamp_us) == 1200
    assert np.degrees(mount.rpy_rad[0]) == pytest.approx([0, 3.81, 0.81], abs=0.05)

    within = (speed.timestamp_us >= ego.span_us[0]) & (speed.timestamp_us <= ego.span_us[1])
    forward = ego.at(speed.timestamp_us[within]).body_velocity_mps()
    assert np.sqrt(np.mean((forward[:, 0] - speed.speed_mps[within]) ** 2)) == pytest.approx(0.16, abs=0.01)
    assert np.abs(forward[:, 1:]).mean() < 0.06  # along the car, and level

    state = ego.at(ego.timestamp_us[[600, 620]])
    camera_m = state.anchor_T_rig.apply(np.array([[0, 0, layout.CAMERA_HEIGHT_M]] * 2))
    rig_m = state.anchor_T_rig.rotation[0].inv().apply(camera_m[1] - camera_m[0])
    device_m = mount.device_R_calib(0) @ (rig_m * [1, -1, -1])
    assert device_m == pytest.approx([16.56, 0.23, -1.12], abs=0.005)

    angle = np.interp(ego.timestamp_us, speed.timestamp_us, speed.steering_angle_deg)
    assert np.corrcoef(angle, ego.curvature_per_m)[0, 1] > 0.7  # both left positive
    assert audit(AuditRequest(Path(os.environ["OMNI_REAL_DATA"]) / "comma2k19_example1"), Console())["refused"] == 0


@real_data
@pytest.mark.real_data
def test_the_real_poses_agree_with_wheels_and_gyroscope(example):
    """The path driven by poses, and by CAN speed with the IMU's own yaw rate (z down), which nothing ties together."""
    root = next(Path(os.environ["OMNI_REAL_DATA"]).glob(f"comma2k19_example1/*/{ROUTE}/40/processed_log/IMU/gyro"))
    time_us = np.round(np.load(root / "t") * MICROSECONDS_PER_SECOND).astype(np.int64)
    yaw_rate = YawRateLog(time_us, -np.load(root / "value")[:, 2])
    logs = Recording("logs", "test", {}, speed=example.speed, device=DeviceLog(yaw_rate=yaw_rate))
    at_us = np.arange(example.ego.span_us[0] + 1_000_000, example.ego.span_us[1] - 11_000_000, 200_000)
    by_poses, by_logs = driven_paths(example, at_us), driven_paths(logs, at_us)
    assert by_poses.num_points.min() == by_logs.num_points.min() == 33
    apart_m = np.abs(by_poses.xy_m - by_logs.xy_m)
    assert apart_m[:, 14].max() < 0.5  # at 1.9 s
    assert apart_m[:, 22].mean(axis=0) == pytest.approx([0, 0], abs=0.8)  # at 4.7 s
    assert np.corrcoef(by_poses.xy_m[:, 22, 1], by_logs.xy_m[:, 22, 1])[0, 1] > 0.85
