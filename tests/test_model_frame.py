"""Where model pixels lie in a camera: openpilot's own matrix, an f-theta camera by hand, and what no ray meets."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from omni_cli.scene.cameras import Calibration, FTheta, Pinhole
from omni_cli.scene.driving_log import MountLog
from omni_cli.scene.model_frame import (
    BIG_IMG,
    IMG,
    MODEL_VIEWS,
    VIEW_FROM_DEVICE,
    ModelView,
    camera_R_calib,
    chroma_sampling_map,
    project_calib_points,
    sampling_map,
)
from omni_cli.scene.poses import Pose
from tests.support.model_frames import QCAMERA, k_matrix, mapped, openpilot_matrix, rotation

RPY_RAD = (0.03, 0.0157, -0.0209)
FCAM = Pinhole(1928, 1208, 2648.0, 2648.0, 964.0, 604.0)
FISHEYE = FTheta(1920, 1080, 958.5, 541.0, (0.0, 930.0, 4.0, -20.0), (0.0, 1 / 930), math.radians(75))
RIG_R_FORWARD = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # of a camera that looks along the rig's x
VIEWS = pytest.mark.parametrize("view", MODEL_VIEWS, ids=lambda view: view.name)


def on_rig(model, rig_R_camera: Rotation) -> Calibration:
    return Calibration(model, Pose(rig_R_camera, np.array([1.8, 0.0, 1.4])))


def device_rotation(rpy_rad=RPY_RAD) -> np.ndarray:
    mount = MountLog(np.array([0, 1]), np.array([(0, 0, 0), rpy_rad]), np.array([1.2, 1.2]), np.array([False, True]))
    return camera_R_calib(on_rig(FCAM, RIG_R_FORWARD), mount.device_R_calib(1))


@VIEWS
@pytest.mark.parametrize("camera", [QCAMERA, FCAM], ids=["qcamera", "fcam"])
def test_a_pinhole_is_sampled_where_openpilots_matrix_says(view, camera):
    matrix = openpilot_matrix(view, camera, RPY_RAD)
    pixels = sampling_map(view, camera, device_rotation())
    assert pixels.shape == (256, 512, 2)
    np.testing.assert_allclose(pixels, mapped(matrix, 512, 256), atol=1e-9)


@VIEWS
def test_chroma_is_sampled_as_each_generation_of_openpilot_did(view):
    matrix = openpilot_matrix(view, FCAM, RPY_RAD)
    on_luma = mapped(matrix * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]]), 256, 128)
    actual = chroma_sampling_map(view, FCAM, device_rotation(), centred=False)
    np.testing.assert_allclose(actual, on_luma, atol=1e-9)
    shrink = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
    grow = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    actual = chroma_sampling_map(view, FCAM, device_rotation(), centred=True)
    np.testing.assert_allclose(actual, mapped(shrink @ matrix @ grow, 256, 128), atol=1e-9)
    scale = FCAM.fx_px / view.intrinsics.fx_px
    np.testing.assert_allclose(actual - on_luma, (scale - 1) / 4, atol=0.1)  # 0.5 and 1.2 pixels: not the same


@VIEWS
def test_integer_coordinates_are_pixels_on_both_sides(view):
    columns, rows = np.meshgrid(np.arange(512), np.arange(256))
    itself = sampling_map(view, view.intrinsics, VIEW_FROM_DEVICE)
    np.testing.assert_allclose(itself, np.stack([columns, rows], axis=-1), atol=1e-9)


def test_the_views_are_those_of_the_models():
    assert [view.name for view in MODEL_VIEWS] == ["img", "big_img"]
    np.testing.assert_array_equal(k_matrix(IMG.intrinsics), [[910, 0, 256], [0, 910, 47.6], [0, 0, 1]])
    np.testing.assert_array_equal(k_matrix(BIG_IMG.intrinsics), [[455, 0, 256], [0, 455, 151.8], [0, 0, 1]])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["roll", "pitch", "yaw"])
def test_the_sign_of_each_angle_matters(axis):
    """A point far ahead, right and low: by roll it sinks, by pitch it rises, by yaw it goes right."""
    rpy = np.zeros(3)
    rpy[axis] = 0.1
    point = np.array([20.0, 2.0, 0.2])
    device = rotation(rpy) @ point
    pixels, inside = project_calib_points(point[None], FCAM, device_rotation(rpy))
    expected = [964 + 2648 * device[1] / device[0], 604 + 2648 * device[2] / device[0]]
    np.testing.assert_allclose(pixels[0], expected, atol=1e-9)
    straight, _ = project_calib_points(point[None], FCAM, device_rotation(np.zeros(3)))
    moved = pixels[0] - straight[0]
    down, up, right = moved[1] > 20, moved[1] < -20, moved[0] > 20
    assert (down, up, right) == {0: (True, False, False), 1: (False, True, False), 2: (False, False, True)}[axis]
    assert inside.all()


def test_points_fall_on_the_pixel_that_shows_them():
    rng = np.random.default_rng(1)
    points = np.stack([rng.uniform(5, 60, 50), rng.uniform(-4, 4, 50), rng.uniform(-1, 1.3, 50)], axis=1)
    on_a_rig = camera_R_calib(on_rig(FISHEYE, RIG_R_FORWARD), None)
    for camera, focal_px, camera_R in ((FCAM, 2648, device_rotation()), (FISHEYE, 930, on_a_rig)):
        in_view, seen = project_calib_points(points, IMG.intrinsics, VIEW_FROM_DEVICE)
        in_camera, inside = project_calib_points(points, camera, camera_R)
        both = seen & inside
        assert both.sum() > 20
        pixels = sampling_map(IMG, camera, camera_R)
        near = np.rint(in_view[both]).astype(int)
        off_px = np.abs(pixels[near[:, 1], near[:, 0]] - in_camera[both])
        assert off_px.max() < 0.6 * focal_px / 910  # half a pixel of the view
    behind = project_calib_points(np.array([[-10.0, 0, 1]]), FCAM, device_rotation())[1]
    assert not behind.any()


@VIEWS
def test_an_f_theta_camera_of_a_rig_by_hand(view):
    rig_R_camera = Rotation.from_euler("ZYX", [0.12, -0.05, 0.02]) * RIG_R_FORWARD
    pixels = sampling_map(view, FISHEYE, camera_R_calib(on_rig(FISHEYE, rig_R_camera), None))
    camera_R_rig = rig_R_camera.as_matrix().T
    rng = np.random.default_rng(2)
    for column, row in zip(rng.integers(0, 512, 40), rng.integers(0, 256, 40), strict=True):
        right = (column - view.intrinsics.cx_px) / view.intrinsics.fx_px
        down = (row - view.intrinsics.cy_px) / view.intrinsics.fy_px
        x, y, z = camera_R_rig @ np.array([1.0, -right, -down])  # rig: forward, left, up
        theta = math.atan2(math.hypot(x, y), z)
        radius = 930 * theta + 4 * theta**2 - 20 * theta**3
        expected = [958.5 + radius * x / math.hypot(x, y), 541 + radius * y / math.hypot(x, y)]
        np.testing.assert_allclose(pixels[row, column], expected, atol=1e-9)


def test_a_level_camera_of_a_rig_is_a_device_without_tilt():
    np.testing.assert_allclose(camera_R_calib(on_rig(FCAM, RIG_R_FORWARD), None), VIEW_FROM_DEVICE, atol=1e-12)
    to_the_left = Rotation.from_euler("z", 10, degrees=True) * RIG_R_FORWARD
    ahead, _ = project_calib_points(np.array([[30.0, 0, 0]]), FCAM, camera_R_calib(on_rig(FCAM, to_the_left), None))
    np.testing.assert_allclose(ahead, [[964 + 2648 * math.tan(math.radians(10)), 604]], atol=1e-9)


def test_rays_behind_a_pinhole_go_to_its_near_edge():
    """Turned 80 degrees to the left, it has the view's right half behind it: those pixels take its right edge."""
    camera_R = device_rotation((0.0, 0.0, math.radians(80)))
    pixels = sampling_map(IMG, FCAM, camera_R)
    mirrored = mapped(openpilot_matrix(IMG, FCAM, (0.0, 0.0, math.radians(80))), 512, 256)
    seen = (np.arange(512) - 256) / 910 < math.tan(math.radians(9.9))
    np.testing.assert_allclose(pixels[:, seen], mirrored[:, seen], rtol=1e-9)
    assert (pixels[:, ~seen, 0] > FCAM.width_px).all()
    assert (mirrored[:, -1, 0] < 0).all()
    backwards = sampling_map(IMG, FCAM, device_rotation((0.0, 0.0, math.radians(170))))
    assert not ((backwards >= 0) & (backwards < [FCAM.width_px, FCAM.height_px])).all(axis=2).any()


def test_rays_beyond_an_f_theta_cameras_angle_go_to_its_rim():
    narrow = FTheta(1920, 1080, 958.5, 541.0, (0.0, 930.0, 4.0, -20.0), (0.0, 1 / 930), math.radians(12))
    wide = FTheta(1920, 1080, 958.5, 541.0, (0.0, 930.0, 4.0, -20.0), (0.0, 1 / 930), math.radians(75))
    camera_R = camera_R_calib(on_rig(narrow, RIG_R_FORWARD), None)
    inner, full = (sampling_map(BIG_IMG, camera, camera_R) - [958.5, 541.0] for camera in (narrow, wide))
    angle = math.radians(12)
    rim = 930 * angle + 4 * angle**2 - 20 * angle**3
    beyond = np.hypot(full[..., 0], full[..., 1]) > rim
    assert 0.5 < beyond.mean() < 0.9
    np.testing.assert_allclose(inner[~beyond], full[~beyond], atol=1e-9)
    np.testing.assert_allclose(np.hypot(inner[beyond, 0], inner[beyond, 1]), rim, rtol=1e-9)
    across, along = (np.arctan2(offset[..., 1], offset[..., 0]) for offset in (inner, full))
    np.testing.assert_allclose(across, along, atol=1e-9)


def test_a_ray_straight_behind_is_finite():
    tiny = ModelView("tiny", Pinhole(4, 2, 1.0, 1.0, 2.0, 1.0))
    backwards = Rotation.from_euler("z", 180, degrees=True) * RIG_R_FORWARD
    for camera in (FCAM, FISHEYE):
        assert np.isfinite(sampling_map(tiny, camera, camera_R_calib(on_rig(camera, backwards), None))).all()
