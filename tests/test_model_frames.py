"""Packed model frames against scipy and loops, decoded planes against those that were coded, and a real road."""

import io
import itertools
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from omni_cli.errors import DataError
from omni_cli.formats import driving_model, video
from omni_cli.samples import model_frames
from omni_cli.samples.model_frames import Warp, unpack_luma, unpack_rgb
from omni_cli.scene.cameras import FTheta, Pinhole
from omni_cli.scene.model_frame import (
    BIG_IMG,
    IMG,
    MODEL_VIEWS,
    VIEW_FROM_DEVICE,
    project_calib_points,
    sampling_map,
)
from omni_cli.sources.openpilot_schema import decompress, log_schema
from tests.support.model_frames import QCAMERA, mapped, openpilot_matrix, resampled, rotation

RPY_RAD = np.array([0.03, 0.0157, -0.0209])
ODD = Pinhole(527, 331, 720.0, 720.0, 263.0, 165.0)
SAMPLINGS = pytest.mark.parametrize("sampling", ["nearest", "bilinear"])
VIEWS = pytest.mark.parametrize("view", MODEL_VIEWS, ids=lambda view: view.name)


def test_what_is_packed_has_the_shape_that_models_are_told_of():
    """Its one definition: equal numbers of two places could part."""
    assert model_frames.PICTURE_SHAPE is driving_model.PICTURE_SHAPE


def planes(width: int, height: int, seed: int = 0) -> video.Planes:
    rng = np.random.default_rng(seed)
    half = (-(-height // 2), -(-width // 2))
    y, u, v = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((height, width), half, half))
    return y, u, v


def packed_by_loops(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    picture = np.zeros((6, 128, 256), np.uint8)
    for row in range(256):
        for column in range(512):
            image = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}[row % 2, column % 2]
            picture[image, row // 2, column // 2] = y[row, column]
    picture[4], picture[5] = u, v
    return picture


@VIEWS
@SAMPLINGS
@pytest.mark.parametrize("camera", [QCAMERA, ODD], ids=["qcamera", "odd"])
def test_a_packed_frame_is_the_resampled_frame_in_openpilots_order(view, sampling, camera):
    y, u, v = planes(camera.width_px, camera.height_px)
    matrix = openpilot_matrix(view, camera, RPY_RAD)
    if sampling == "nearest":  # 2026
        chroma_matrix = matrix * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]])
    else:  # chroma pixels centred between luma pixels
        shrink = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
        chroma_matrix = shrink @ matrix @ np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    luma = resampled(y, mapped(matrix, 512, 256), sampling)
    chroma = (resampled(plane, mapped(chroma_matrix, 256, 128), sampling) for plane in (u, v))
    picture = Warp.of(view, camera, VIEW_FROM_DEVICE @ rotation(RPY_RAD), sampling).pack(y, u, v)
    assert (picture.dtype, picture.shape) == (np.uint8, (6, 128, 256))
    np.testing.assert_array_equal(picture, packed_by_loops(luma, *chroma))
    np.testing.assert_array_equal(unpack_luma(picture), luma)


@SAMPLINGS
def test_an_f_theta_camera_is_packed_alike(sampling):
    camera = FTheta(640, 360, 319.5, 180.0, (0.0, 310.0, 1.3, -6.0), (0.0, 1 / 310), np.radians(70))
    y, u, v = planes(640, 360)
    camera_R = VIEW_FROM_DEVICE @ rotation(RPY_RAD)
    picture = Warp.of(BIG_IMG, camera, camera_R, sampling).pack(y, u, v)
    luma_px = sampling_map(BIG_IMG, camera, camera_R)
    np.testing.assert_array_equal(unpack_luma(picture), resampled(y, luma_px, sampling))
    if sampling == "nearest":
        np.testing.assert_array_equal(picture[4], resampled(u, luma_px[::2, ::2] / 2, sampling))


def test_weights_of_the_kernels_scale_round_as_ours():
    """The kernel holds weights in units of 2^-15 in a signed short, where 1 becomes 32767; ours are exact in 2^-10."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 256, (200_000, 4))
    across, along = rng.integers(0, 32, (2, 200_000))
    across[:1000] = along[:1000] = 0
    weights = np.stack([(32 - along) * (32 - across), (32 - along) * across, along * (32 - across), along * across], 1)
    theirs = ((values * np.minimum(weights * 32, 32767)).sum(1) + (1 << 14)) >> 15
    np.testing.assert_array_equal(theirs, ((values * weights).sum(1) + 512) >> 10)


def test_a_frame_of_another_size_is_refused():
    warp = Warp.of(IMG, QCAMERA, VIEW_FROM_DEVICE, "nearest")
    with pytest.raises(ValueError, match="a frame of 64x48 for a warp of 526x330"):
        warp.pack(*planes(64, 48))


def test_a_picture_is_shown_in_its_colours():
    rgb = np.zeros((256, 512, 3), np.uint8)
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (128, 128, 128), (200, 180, 30), (255, 255, 255)]
    for index, colour in enumerate(colours):
        rgb[:, index * 80 : (index + 1) * 80] = colour
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU601")
    y, u, v = video._planes(frame)
    shown = unpack_rgb(packed_by_loops(y, u, v))
    inside = np.arange(512) % 80 // 20 == 1  # away from where colours meet
    assert np.abs(shown[:, inside].astype(int) - rgb[:, inside]).max() <= 3


def encoded(frames, pixel_format: str, *, codec: str = "ffv1", **tags: int) -> bytes:
    """Code planes without loss."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as out:
        track = out.add_stream(codec, rate=20)
        track.height, track.width = frames[0][0].shape
        track.pix_fmt = pixel_format
        for name, value in tags.items():
            setattr(track.codec_context, name, value)
        for index, coded in enumerate(frames):
            frame = av.VideoFrame(track.width, track.height, pixel_format)
            for plane, samples in zip(frame.planes, coded, strict=True):
                padded = np.zeros((plane.height, plane.line_size // samples.itemsize), samples.dtype)
                padded[:, : samples.shape[1]] = samples
                plane.update(padded.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 20)
            for name, value in tags.items():
                setattr(frame, name, value)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()


@pytest.mark.parametrize("size", [(96, 64), (95, 63)], ids=["even", "odd"])
def test_planes_come_out_as_they_were_coded(size):
    frames = [planes(*size, seed=seed) for seed in range(9)]
    clip = encoded(frames, "yuv420p")
    wanted = [1, 4, 8]
    for info in (None, video.probe(clip, "clip")):
        decoded = dict(video.decode_yuv(clip, "clip", wanted, info))
        assert list(decoded) == wanted
        for index, got in decoded.items():
            for plane, expected in zip(got, frames[index], strict=True):
                np.testing.assert_array_equal(plane, expected)
                assert plane.flags.owndata
    with pytest.raises(DataError, match="clip: ends before frame 9; the video is shorter than its timestamps"):
        list(video.decode_yuv(clip, "clip", [2, 9]))


def block_planes(size: tuple[int, int], chroma_step: int, scale: int = 1) -> tuple[np.ndarray, ...]:
    """Blocks of 16 x 16 pixels of one colour each, all of which exist in RGB."""
    rng = np.random.default_rng(5)
    width, height = size
    planes = []
    for low, high, step in ((90, 165, 1), (108, 148, chroma_step), (108, 148, chroma_step)):
        block = rng.integers(low, high, (4, 6)) * scale
        whole = np.kron(block, np.ones((16, 16), int))[:height:step, :width:step]
        planes.append(whole.astype(np.uint8 if scale == 1 else np.uint16))
    return tuple(planes)


def at_centres(plane: np.ndarray, block: int) -> np.ndarray:
    return plane[block // 2 :: block, block // 2 :: block].astype(np.float64)


def full_to_limited(y, u, v):
    return 16 + y * 219 / 255, 128 + (u - 128) * 224 / 255, 128 + (v - 128) * 224 / 255


def bt709_to_bt601(y, u, v):
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    red, blue = y + 1.5748 * v, y + 1.8556 * u
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return 16 + 219 * y, 128 + 224 * (blue - y) / 1.772, 128 + 224 * (red - y) / 1.402


@pytest.mark.parametrize(
    ("coding", "tags", "expected"),  # pixel format, luma pixels a chroma pixel, units a step of eight bits
    [
        (("yuv444p", 1, 1), {}, lambda *coded: coded),
        (("yuv420p10le", 2, 4), {}, lambda *coded: tuple(plane / 4 for plane in coded)),
        (("yuv420p", 2, 1), {"color_range": 2}, full_to_limited),
        (("yuv420p", 2, 1), {"color_range": 1, "colorspace": 1}, bt709_to_bt601),
        (("yuv420p", 2, 1), {"color_range": 1, "colorspace": 5}, lambda *coded: coded),
    ],
    ids=["4:4:4", "ten bits", "full range", "BT.709", "BT.601 by name"],
)
@pytest.mark.parametrize("size", [(96, 64), (95, 63)], ids=["even", "odd"])
def test_other_formats_are_converted_to_limited_bt601(coding, tags, expected, size):
    pixel_format, chroma_step, scale = coding
    coded = block_planes(size, chroma_step, scale)
    ((_, got),) = video.decode_yuv(encoded([coded], pixel_format, **tags), "clip", [0])
    assert [plane.shape for plane in got] == [plane.shape for plane in planes(*size)]
    blocks = 16, 16 // chroma_step, 16 // chroma_step
    colours = (at_centres(plane, block) for plane, block in zip(coded, blocks, strict=True))
    for plane, block, true in zip(got, (16, 8, 8), expected(*colours), strict=True):
        np.testing.assert_allclose(at_centres(plane, block), true, atol=1.0)


real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")
OFFSETS_M = np.linspace(-1.5, 1.5, 61)
AHEAD_M = np.linspace(6, 30, 60)


@pytest.fixture(scope="module")
def route() -> Path:
    return Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"


@pytest.fixture(scope="module")
def road(route):
    """Of each qcamera frame that the device's own model was logged for: planes, mount, its lane lines."""
    folder = route / "a2a0ccea32023010" / "2023-07-27--13-01-19--0"
    content, _ = decompress((folder / "qlog.bz2").read_bytes(), "qlog.bz2")
    events = [(event.which(), event) for event in log_schema().Event.read_multiple_bytes(content)]
    segment_ids = {e.qRoadEncodeIdx.frameId: e.qRoadEncodeIdx.segmentId for k, e in events if k == "qRoadEncodeIdx"}
    mounts = [(e.logMonoTime, np.array(e.liveCalibration.rpyCalib)) for k, e in events if k == "liveCalibration"]
    models = {segment_ids.get(e.modelV2.frameId): e for k, e in events if k == "modelV2"}
    models.pop(None)  # of the frame before the video's first
    decoded = dict(video.decode_yuv((folder / "qcamera.ts").read_bytes(), "qcamera.ts", sorted(models)))
    road = []
    for index, event in sorted(models.items()):
        *_, rpy_rad = [rpy for at, rpy in mounts if at <= event.logMonoTime]
        lines = [np.stack([line.x, line.y, line.z], axis=1) for line in event.modelV2.laneLines]
        road.append((decoded[index], rpy_rad, lines))
    return road


def cross_profile(luma: np.ndarray, camera: Pinhole, camera_R: np.ndarray, line) -> np.ndarray:
    """Brightness across a lane line, over that of the road beside it: (rows ahead, offsets to the right)."""
    y, z = (np.interp(AHEAD_M, line[:, 0], values)[:, None] for values in line[:, 1:].T)
    points = np.stack(np.broadcast_arrays(AHEAD_M[:, None], y + OFFSETS_M, z), axis=-1)
    pixels, inside = project_calib_points(points.reshape(-1, 3), camera, camera_R)
    values = map_coordinates(luma.astype(np.float64), pixels.T[::-1], order=1, mode="nearest").reshape(points.shape[:2])
    values = values[inside.reshape(values.shape).all(axis=1)]
    return values - np.median(values, axis=1, keepdims=True)


def packed_luma_by_loops(picture: np.ndarray) -> np.ndarray:
    rows, columns = np.indices((256, 512))
    image = np.array([[0, 2], [1, 3]])[rows % 2, columns % 2]
    return picture[image, rows // 2, columns // 2]


def of_qcamera(frame, camera_R):
    return frame[0], QCAMERA, camera_R


def of_packed(view, sampling):
    def packed(frame, camera_R):
        picture = Warp.of(view, QCAMERA, camera_R, sampling).pack(*frame)
        return packed_luma_by_loops(picture), view.intrinsics, VIEW_FROM_DEVICE

    return packed


PICTURES = {
    "qcamera": of_qcamera,
    "img, nearest": of_packed(IMG, "nearest"),
    "big_img, bilinear": of_packed(BIG_IMG, "bilinear"),
}


def on_the_line(road, shown_on, signs) -> tuple[np.ndarray, np.ndarray]:
    """Mean brightness within 0.2 m of the lane's left and right line, and how far off each the brightest place is.

    Over all frames whose mount was known by then.
    """
    profiles = [[], []]
    for frame, rpy_rad, lines in road:
        if rpy_rad.any():
            shown = shown_on(frame, VIEW_FROM_DEVICE @ rotation(rpy_rad * signs))
            for profile, line in zip(profiles, lines[1:3], strict=True):
                profile.append(cross_profile(*shown, line))
    means = np.stack([np.concatenate(profile).mean(axis=0) for profile in profiles])
    return means[:, np.abs(OFFSETS_M) <= 0.2].mean(axis=1), OFFSETS_M[means.argmax(axis=1)]


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("picture", PICTURES)
def test_logged_lane_lines_fall_on_the_paint(road, picture):
    """The device's model draws the inner edge of the paint, which is 10 to 15 cm wide. (Roll is 0 on this device.)"""
    near, brightest_m = on_the_line(road, PICTURES[picture], (1, 1, 1))
    assert (near > (3, 7)).all()
    assert -0.2 <= brightest_m[0] < 0 < brightest_m[1] <= 0.2
    for wrong in ((1, -1, 1), (1, 1, -1)):
        near, brightest_m = on_the_line(road, PICTURES[picture], wrong)
        assert (near < 1).all()
        assert (np.abs(brightest_m) > 0.4).all()


@real_data
@pytest.mark.real_data
def test_no_other_order_of_the_luma_images_gives_as_smooth_a_picture(road):
    frame, rpy_rad, _ = road[-1]
    picture = Warp.of(IMG, QCAMERA, VIEW_FROM_DEVICE @ rotation(rpy_rad), "bilinear").pack(*frame)

    def roughness(order) -> float:
        luma = packed_luma_by_loops(picture[list(order)]).astype(np.float64)
        return np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()

    others = [roughness(order) for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]
    assert roughness((0, 1, 2, 3)) < 0.9 * min(others)


@real_data
@pytest.mark.real_data
def test_a_picture_that_others_made_is_the_same(route, road):
    """`demo_model_frame.png`, by other code: luma of `img`, nearest, twice the size, under the segment's last mount."""
    demo = np.asarray(Image.open(route / "demo_model_frame.png").convert("RGB")).astype(np.float64)
    demo = demo.reshape(256, 2, 512, 2, 3).mean(axis=(1, 3))
    is_plain = np.ptp(demo, axis=2) < 6  # no coloured line is drawn there
    last_rpy_rad = road[-1][1]
    off = []
    for frame, _, _ in road:
        picture = Warp.of(IMG, QCAMERA, VIEW_FROM_DEVICE @ rotation(last_rpy_rad), "nearest").pack(*frame)
        off.append(np.abs(packed_luma_by_loops(picture) - demo[..., 1])[is_plain].mean())
    assert min(off) < 0.2
    assert sorted(off)[1] > 5
