"""How the cameras of comma devices look at the road: lenses, and where the device settled."""

import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from omni_cli.errors import DataError
from omni_cli.formats import openpilot, video
from omni_cli.sources.openpilot_cameras import wanted_cameras
from omni_cli.sources.openpilot_logs import OpenpilotLogs
from omni_cli.stages.audit import AuditRequest, audit
from tests.support import openpilot as made
from tests.support.openpilot import calibration, event, every, frame_indices, rotation
from tests.support.pipeline import QUIET

FRAMES = 40
RPY = (0.02, -0.03, 0.05)
ALONG_CAR = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # device -> camera: right, down, forward
SEGMENT = f"{made.LOG_ID}--0"
ID = f"{made.DONGLE}_{SEGMENT}"


@pytest.mark.parametrize(
    ("device", "sensor", "camera", "size_px", "focal_px"),
    [
        ("tici", "ar0231", "fcamera", (1928, 1208), 2648.0),
        ("tizi", "ox03c10", "fcamera", (1928, 1208), 2648.0),
        ("unknown", "ox03c10", "ecamera", (1928, 1208), 567.0),
        ("mici", "os04c10", "fcamera", (1344, 760), 1141.5),
        ("mici", "os04c10", "ecamera", (1344, 760), 425.25),
        ("neo", "unknown", "fcamera", (1164, 874), 910.0),
    ],
)
def test_a_lens_is_openpilots_matrix_at_the_cameras_own_size(device, sensor, camera, size_px, focal_px):
    lens = openpilot.lens(camera, device, sensor, width_px=size_px[0], height_px=size_px[1])
    found = (lens.fx_px, lens.fy_px, lens.cx_px, lens.cy_px)
    np.testing.assert_allclose(found, (focal_px, focal_px, size_px[0] / 2, size_px[1] / 2))


@pytest.mark.parametrize("device", ["tici", "neo"])
def test_the_small_videos_lens_shows_the_same_points_in_the_smaller_frame(device):
    sensor = "unknown"
    whole_size, size = ((1928, 1208), (526, 330)) if device == "tici" else ((1164, 874), (480, 360))
    whole = openpilot.lens("fcamera", device, sensor, width_px=whole_size[0], height_px=whole_size[1])
    small = openpilot.lens("qcamera", device, sensor, width_px=size[0], height_px=size[1])
    points = np.random.default_rng(1).normal(size=(50, 3)) * [4, 2, 1] + [0, 0, 20]
    scale = np.array(size) / whole_size
    np.testing.assert_allclose(small.project(points)[0], (whole.project(points)[0] + 0.5) * scale - 0.5)
    assert small.fx_px == pytest.approx(whole.fx_px * scale[0])
    assert small.fy_px == pytest.approx(whole.fy_px * scale[1])


@pytest.mark.parametrize(
    ("camera", "device", "sensor"),
    [("ecamera", "neo", "unknown"), ("fcamera", "tizi", "unknown"), ("fcamera", "unknown", "os04c10")],
)
def test_a_pair_that_comma_does_not_list_has_no_lens(camera, device, sensor):
    assert openpilot.lens(camera, device, sensor, width_px=1928, height_px=1208) is None


@pytest.fixture(scope="module")
def segment_files(tmp_path_factory) -> Path:
    return made.write_segment(tmp_path_factory.mktemp("segment"))


@pytest.fixture
def folder(segment_files, tmp_path) -> Path:
    return Path(shutil.copytree(segment_files, tmp_path / made.DONGLE / SEGMENT))


def opened(folder: Path, *extra: bytes, cameras: tuple[str, ...] = ("qcamera",)):
    (folder / "qlog").write_bytes(made.events(FRAMES) + b"".join(extra))
    return OpenpilotLogs(folder.parents[1]).open(ID, cameras)


def tici(sensor: str = "ox03c10") -> bytes:
    return event("deviceState", {"deviceType": "tici"}) + event("roadCameraState", {"sensor": sensor})


@pytest.mark.parametrize(
    ("asked", "there", "choice"),
    [
        ("fcamera,ecamera", "qcamera,fcamera", "fcamera"),  # never qcamera,fcamera: that is one view twice
        ("qcamera,ecamera", "qcamera,fcamera", "qcamera"),
        ("fcamera,ecamera", "qcamera", "qcamera"),
        ("ecamera", "qcamera,fcamera", "fcamera"),
        ("fcamera", "qcamera,ecamera", "qcamera"),
        ("qcamera", "ecamera", "ecamera"),
    ],
)
def test_where_a_camera_is_missing_what_can_be_had_of_those_asked_for_is_named(asked, there, choice):
    has = ", ".join(there.split(","))
    with pytest.raises(DataError, match=rf"^r: has no \w+; it has {has}; choose with --cameras {choice}$"):
        wanted_cameras("r", there.split(","), tuple(asked.split(",")))


def test_points_of_the_road_fall_where_openpilots_matrices_put_them(folder):
    recording = opened(folder, tici(), event("liveCalibration", calibration(RPY)))
    found = recording.cameras["qcamera"].calibration
    road = np.array([[8.0, 0.0, 0.0], [20.0, 2.0, 0.0], [30.0, -3.0, 0.5]])  # rig: forward, left, up; on the ground
    pixels, _ = found.model.project(found.rig_T_camera.inverse().apply(road))
    calib = road * [1, -1, -1] + [0, 0, 1.3]  # right, down; from the camera, which is 1.3 m up
    rays = calib @ (ALONG_CAR @ rotation(*RPY)).T
    whole = rays[:, :2] / rays[:, 2:] * 2648.0 + [964, 604]
    expected = (whole + 0.5) * np.array([96 / 1928, 64 / 1208]) - 0.5  # the made video's size
    np.testing.assert_allclose(pixels, expected, atol=1e-4)
    assert recording.provenance["calibration_qcamera"] == "tici ox03c10, calibrated"


def test_the_wide_camera_is_turned_against_the_device(folder):
    wide = (-0.001, 0.055, -0.03)
    (folder / "ecamera.hevc").write_bytes(made.raw_hevc(made.frame_times_us(FRAMES)))
    indices = frame_indices("wideRoadEncodeIdx", FRAMES, 2)
    mount = event("liveCalibration", calibration(RPY, wideFromDeviceEuler=list(wide)))
    found = opened(folder, tici(), indices, mount, cameras=("ecamera",)).cameras["ecamera"].calibration
    ahead = np.array([[30.0, 1.0, 0.2]])
    in_camera = found.rig_T_camera.rotation.inv().apply(ahead)
    turned = (ALONG_CAR @ rotation(*wide) @ rotation(*RPY)) @ (ahead[0] * [1, -1, -1])
    np.testing.assert_allclose(in_camera[0], turned, atol=1e-5)
    plain = opened(folder, tici(), indices, event("liveCalibration", calibration(RPY)), cameras=("ecamera",))
    rotated = plain.cameras["ecamera"].calibration.rig_T_camera.rotation.inv().apply(ahead)
    np.testing.assert_allclose(rotated[0], ALONG_CAR @ rotation(*RPY) @ (ahead[0] * [1, -1, -1]), atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"liveCalibration": calibration(RPY)}, "none: the log holds no roadCameraState"),
        ({"roadCameraState": {"sensor": "ox03c10"}}, "none: the log holds no liveCalibration"),
        (
            {"roadCameraState": {"sensor": "os04c10"}, "liveCalibration": calibration(RPY)},
            "none: no lens of qcamera is known for device unknown with sensor os04c10",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_not_and_provenance_says_why(folder, extra, why):
    recording = opened(folder, *(event(kind, body) for kind, body in extra.items()))
    assert recording.cameras["qcamera"].calibration is None
    assert recording.provenance["calibration_qcamera"].startswith(why)


def test_the_device_is_told_by_its_state_or_else_by_the_start_of_the_log(folder):
    start = event("initData", {"deviceType": "neo", "version": "0.7"}, made.BOOT_US)
    camera = event("roadCameraState", {}) + event("liveCalibration", calibration(RPY, "uncalibrated"))
    recording = opened(folder, start, camera, event("deviceState", {}))
    assert recording.provenance["calibration_qcamera"] == "neo unknown, uncalibrated"
    recording = opened(folder, start, camera, event("deviceState", {"deviceType": "tici"}))
    assert recording.provenance["calibration_qcamera"] == "tici unknown, uncalibrated"


def test_a_small_video_has_the_logs_times_and_its_own_past_the_end_of_a_cut_log(folder):
    container_us = made.frame_times_us(FRAMES)
    logged = [{"segmentId": i, "timestampEof": int(time_us + 4) * 1000} for i, time_us in enumerate(container_us)]
    speed = every("carState", [{"vEgo": 10.0}] * 9)

    def times_us(num_logged: int, tail: bytes) -> np.ndarray:
        (folder / "qlog").write_bytes(speed + every("qRoadEncodeIdx", logged[:num_logged]) + tail)
        return OpenpilotLogs(folder.parents[1]).open(ID).cameras["qcamera"].timestamp_us

    np.testing.assert_array_equal(times_us(FRAMES, b""), container_us + 4)
    np.testing.assert_array_equal(times_us(30, speed[:100]), container_us + np.where(np.arange(FRAMES) < 30, 4, 0))


# -- a raw video that was cut inside its last frame


@pytest.fixture(scope="module")
def coded() -> list[bytes]:
    """What a device's encoder gives for each frame, in HEVC without B-frames: noise, so that frames are long."""
    rng = np.random.default_rng(0)
    coder = av.CodecContext.create("libx265", "w")
    coder.width, coder.height, coder.pix_fmt, coder.time_base = 320, 192, "yuv420p", Fraction(1, 20)
    quiet = "bframes=0:keyint=5:qp=20:log-level=none:pools=none:frame-threads=1"
    coder.options = {"preset": "ultrafast", "x265-params": quiet}
    pictures = rng.integers(0, 256, (12, 288, 320), dtype=np.uint8)
    frames = [av.VideoFrame.from_ndarray(picture, format="yuv420p") for picture in pictures]
    packets = [bytes(packet) for frame in (*frames, None) for packet in coder.encode(frame)]
    assert len(packets) == 12
    assert min(map(len, packets)) > 6000
    return packets


def write_raw(folder: Path, coded: list[bytes], *, cut: int, lengths: list[int], tail: bytes = b"") -> bytes:
    """Write a raw video without its last bytes, and a log of the length of each frame; return the video."""
    content = b"".join(coded)[: -cut or None]
    (folder / "qcamera.ts").unlink()
    (folder / "fcamera.hevc").write_bytes(content)
    times_us = made.frame_times_us(len(lengths))
    indices = [
        {"segmentId": i, "frameId": i, "timestampEof": int(time_us) * 1000, "len": length}
        for i, (time_us, length) in enumerate(zip(times_us, lengths, strict=True))
    ]
    (folder / "qlog").write_bytes(every("carState", [{"vEgo": 10.0}] * 9) + every("roadEncodeIdx", indices) + tail)
    return content


@pytest.mark.parametrize("cut", [1, 200, 1500, 5000])
def test_a_raw_video_that_was_cut_inside_its_last_frame_is_refused(folder, coded, cut):
    """Its decoder presents every frame and says nothing."""
    lengths = [len(packet) for packet in coded]
    content = write_raw(folder, coded, cut=cut, lengths=[lengths[0] - 80, *lengths[1:]])  # the headers are not counted
    assert video.decode_only(content, "cut") == len(coded)
    lacks = rf"fcamera.hevc: its last frame has {lengths[-1] - cut} of the {lengths[-1]} bytes that the log lists; the"
    with pytest.raises(DataError, match=lacks) as refused:
        OpenpilotLogs(folder.parents[1]).open(ID)
    assert "\n" not in str(refused.value)
    (finding,) = audit(AuditRequest(folder.parents[1], deep=True), QUIET)["findings"]
    assert (finding["code"], finding["severity"], finding["recording"]) == ("refused-by-reader", "refuse", ID)
    assert finding["detail"] == str(refused.value)


@pytest.mark.parametrize(
    ("cut", "logged"),
    [
        (0, lambda lengths: lengths),
        (0, lambda lengths: [lengths[0] - 80, *lengths[1:]]),
        (200, lambda lengths: [0] * len(lengths)),  # an old log
        (200, lambda lengths: [length + 300 for length in lengths]),  # of the video before it was encoded anew
        (200, lambda lengths: lengths[:8]),  # a log that was cut too: of the last frames it knows nothing
    ],
    ids=["whole", "without headers", "no lengths", "encoded anew", "log cut too"],
)
def test_other_raw_videos_are_taken(folder, coded, cut, logged):
    lengths = logged([len(packet) for packet in coded])
    write_raw(folder, coded, cut=cut, lengths=lengths, tail=b"\x00" * 9 if len(lengths) < len(coded) else b"")
    stream = OpenpilotLogs(folder.parents[1]).open(ID).cameras["fcamera"]
    np.testing.assert_array_equal(stream.timestamp_us, made.frame_times_us(len(lengths)))
