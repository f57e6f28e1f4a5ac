"""F-theta cameras against NVIDIA's devkit, away from its bugs, and against formulas written out."""

import json

import numpy as np
import pytest

from omni_cli.errors import DataError
from omni_cli.formats.offline_intrinsics import offline_camera_model
from omni_cli.formats.physical_ai_av import INTRINSIC_COLUMNS
from omni_cli.scene.cameras import FTheta
from omni_cli.world.rig import random_rig

FRONT = "camera_front_wide_120fov"
RIG = random_rig(np.random.default_rng(4), "b", width_px=1920, height_px=1080)
MODEL = RIG[FRONT].model


def seen_points(model: FTheta, num: int = 400) -> np.ndarray:
    """Points in front of a camera that its image holds, none on the axis."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform([0, 0], [model.width_px - 1, model.height_px - 1], (num, 2))
    return model.rays(pixels) * rng.uniform(2, 60, (num, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the devkit's
@pytest.mark.parametrize("camera", sorted(RIG))
def test_it_projects_as_nvidias_devkit_does(camera: str) -> None:
    from physical_ai_av.utils.camera_models import FThetaCameraModel

    model = RIG[camera].model
    row = (model.width_px, model.height_px, model.cx_px, model.cy_px, *model.backward_poly, *model.forward_poly)
    theirs = FThetaCameraModel.from_camera_row(dict(zip(INTRINSIC_COLUMNS, row, strict=True)))
    points = seen_points(model)
    pixels, _ = model.project(points)
    np.testing.assert_allclose(pixels, theirs.ray2pixel(points), atol=1e-8)
    np.testing.assert_allclose(model.rays(pixels), theirs.pixel2ray(pixels), atol=1e-10)


def test_the_axis_and_what_lies_behind_are_well_defined() -> None:
    centre, inside = MODEL.project(np.array([[0.0, 0.0, 7.0], [0.0, 0.0, -7.0], [1.0, 0.0, -1.0]]))
    np.testing.assert_allclose(centre[0], [MODEL.cx_px, MODEL.cy_px])  # the devkit gives NaN
    assert inside.tolist() == [True, False, False]
    np.testing.assert_allclose(MODEL.rays(np.array([[MODEL.cx_px, MODEL.cy_px]])), [[0, 0, 1]], atol=1e-12)


def test_beyond_the_maximal_angle_nothing_is_seen_though_the_polynomial_comes_back() -> None:
    bent = FTheta(200, 100, 99.5, 49.5, (0.0, 100.0, 0.0, -20.0), (0.0, 0.01), max_angle_rad=0.9)
    angles = np.array([0.5, 0.89, 0.91, 2.2])  # at 2.2 rad the radius is 7 px again
    pixels, inside = bent.project(np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=1))
    assert abs(pixels[3, 0] - 99.5) < 10
    assert inside.tolist() == [True, True, False, False]


def offline(**changes) -> str:
    said = {
        "resolution": [1920, 1080],
        "shutter_type": "ROLLING_TOP_TO_BOTTOM",
        "shutter_delay_us": 31_612,
        "principal_point": [MODEL.cx_px, MODEL.cy_px],
        "reference_poly": "PIXELDIST_TO_ANGLE",
        "pixeldist_to_angle_poly": [*MODEL.backward_poly, 0.0],
        "angle_to_pixeldist_poly": [*MODEL.forward_poly, 0.0],
        "max_angle": MODEL.max_angle_rad,
        "linear_cde": [1.0002, 0.0004, -0.0003],
        "external_distortion_parameters": None,
    }
    return json.dumps({**said, **changes})


@pytest.mark.parametrize("reference", ["PIXELDIST_TO_ANGLE", "ANGLE_TO_PIXELDIST"])
def test_the_offline_table_says_which_polynomial_is_exact_and_the_other_follows(reference: str) -> None:
    model = offline_camera_model("ftheta", offline(reference_poly=reference), "row")
    pixels = np.random.default_rng(1).uniform([40, 40], [1880, 1040], (300, 2))
    rays = model.rays(pixels)
    np.testing.assert_allclose(model.project(rays)[0], pixels, atol=1e-6)  # the fitted inverses part by 0.02 px
    c, d, e = 1.0002, 0.0004, -0.0003
    x, y = np.linalg.solve([[c, d], [e, 1]], (pixels - [model.cx_px, model.cy_px]).T)
    theta, radius = np.arctan2(np.hypot(*rays.T[:2]), rays[:, 2]), np.hypot(x, y)
    if reference == "PIXELDIST_TO_ANGLE":
        np.testing.assert_allclose(theta, np.polyval(MODEL.backward_poly[::-1], radius), atol=1e-12)
    else:
        np.testing.assert_allclose(np.polyval(MODEL.forward_poly[::-1], theta), radius, atol=1e-9)


def test_the_linear_term_shears_and_all_zeros_are_none() -> None:
    plain = offline_camera_model("ftheta", offline(linear_cde=[0, 0, 0]), "row")
    assert plain.linear_cde == (1.0, 0.0, 0.0)
    sheared = offline_camera_model("ftheta", offline(linear_cde=[1.1, 0.2, 0.3]), "row")
    points, centre = seen_points(MODEL), np.array([MODEL.cx_px, MODEL.cy_px])
    expected = (plain.project(points)[0] - centre) @ np.array([[1.1, 0.2], [0.3, 1.0]]).T + centre
    np.testing.assert_allclose(sheared.project(points)[0], expected, atol=1e-9)


def test_half_the_size_sees_the_same_rays_between_the_pixels() -> None:
    model = offline_camera_model("ftheta", offline(), "row")
    small, points = model.resized(960, 540), seen_points(MODEL)
    np.testing.assert_allclose((model.project(points)[0] + 0.5) / 2 - 0.5, small.project(points)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("opencv-fisheye", offline(), r"row: camera model 'opencv-fisheye'; expected ftheta"),
        ("ftheta", "not json", r"row: model_parameters is no JSON object \('not json'\)"),
        ("ftheta", "{}", r"row: not the parameters of an f-theta camera \(KeyError\('resolution'\)\)"),
        ("ftheta", offline(max_angle=float("nan")), r"row: a size, an angle or a coefficient cannot be"),
        ("ftheta", offline(linear_cde=[1.0]), r"row: expected 3 linear and 2 to 6 coefficients each"),
        ("ftheta", offline(pixeldist_to_angle_poly=[0.1] * 9), r"row: expected 3 linear and 2 to 6 coefficients each"),
        ("ftheta", offline(external_distortion_parameters={"a": 1}), r"row: a windshield model, which omni does not"),
    ],
)
def test_what_is_no_f_theta_camera_is_refused(model_type: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        offline_camera_model(model_type, text, "row")
