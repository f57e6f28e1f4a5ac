"""The true path, projected by what a reader finds on disk, lies where the renderer's own rays meet the ground."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from omni_cli.errors import DataError
from omni_cli.recipes.vlm.forecast import Forecast
from omni_cli.samples.waypoints import NUM_HISTORY, waypoints_at
from omni_cli.scene.clock import latest_at
from omni_cli.scene.ground_paths import path_pixels, path_runs
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.stages.pictures import driven_path, write_driven_path
from omni_cli.world.clip import SyntheticSpec, build_clip, clip_id
from omni_cli.world.dataset import render_clip, write_chunk, write_indices
from omni_cli.world.render import camera_view, render

WIDE, TELE = "camera_front_wide_120fov", "camera_front_tele_30fov"
RIGHT, REAR = "camera_cross_right_120fov", "camera_rear_tele_30fov"
MARK_RGB, MARK_RADIUS_M = (255, 0, 255), 0.45
AT_US = 2_000_000
AHEAD, BEND = 5, 3  # seeds
AFTER_S = np.arange(-2.1, 6.41, 0.15)  # of the marks; rear cameras see the way that was driven
SPEC = SyntheticSpec(clips_per_chunk=1, seconds=9.0, fps=2, width_px=960, height_px=540, roads="winding", clutter=0.3)


def made(root, rig, seed):
    """A clip as it was made, and as a reader finds it on disk; its pictures are small, its cameras are not."""
    spec = dataclasses.replace(SPEC, seed=seed, rig=rig, cameras=(WIDE, TELE, RIGHT, REAR))
    small = dataclasses.replace(spec, width_px=160, height_px=90)
    write_chunk(root, small, 0, [render_clip(small, 0, 0)])
    write_indices(root, small, [0])
    return build_clip(spec, 0, 0), PhysicalAiAv(root).open(clip_id(spec, 0, 0))


@pytest.fixture(scope="module", params=["a", "b"])
def drives(request, tmp_path_factory):
    """A road that tele cameras see some way of, and one that bends into the view of the right one."""
    return {seed: made(tmp_path_factory.mktemp(request.param), request.param, seed) for seed in (AHEAD, BEND)}


@pytest.fixture
def drive(drives):
    return drives[AHEAD]


def full_size(recording, camera):
    """The reader's calibration, for pictures six times as wide."""
    calibration = recording.cameras[camera].calibration
    return dataclasses.replace(calibration, model=calibration.model.resized(960, 540))


def marked_picture(clip, camera, taken_us, anchor_xy):
    """Render a frame and paint discs on the ground where the renderer's rays meet it; no camera model projects."""
    view = camera_view(clip.world, clip.calibrations[camera])
    picture = render(clip.world, view, taken_us).reshape(-1, 3).copy()
    owner = np.full(len(picture), -1)
    marks, (x, y, yaw) = cKDTree(anchor_xy), clip.drive.pose_at(taken_us)
    for block in view.ground:
        ground = np.stack([block.x_m, block.y_m], axis=1).astype(np.float64)
        ground = ground @ np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]) + [x, y]
        distance, number = marks.query(ground, distance_upper_bound=MARK_RADIUS_M)
        on_it = np.isfinite(distance)
        picture[block.pixels[on_it]], owner[block.pixels[on_it]] = MARK_RGB, number[on_it]
    return picture.reshape(540, 960, 3), owner.reshape(540, 960)


def middle_of(outline_px):
    """The centroid of a polygon's area (shoelace)."""
    (x, y), (u, v) = outline_px.T, np.roll(outline_px, -1, axis=0).T
    cross = x * v - u * y
    return np.array([((x + u) * cross).sum(), ((y + v) * cross).sum()]) / (3 * cross.sum())


@pytest.mark.parametrize("camera", [WIDE, TELE, RIGHT, REAR])
def test_the_true_path_lies_on_the_road_to_under_a_pixel_of_the_full_image(drives, camera):
    clip, recording = drives[BEND if camera == RIGHT else AHEAD]
    calibration = full_size(recording, camera)
    times_us = recording.cameras[camera].timestamp_us
    taken_us = int(times_us[latest_at(times_us, np.array([AT_US]))[0]])
    assert 0 < AT_US - taken_us < 500_000  # the car moved meanwhile
    at_us = AT_US + np.round(AFTER_S * 1e6).astype(np.int64)
    picture, owner = marked_picture(clip, camera, taken_us, [clip.drive.pose_at(at)[:2] for at in at_us])
    now = recording.ego.at(np.array([AT_US])).anchor_T_rig
    centres = now.rotation[0].inv().apply(recording.ego.at(at_us).anchor_T_rig.translation_m - now.translation_m[0])
    around = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    circle = MARK_RADIUS_M * np.stack([np.cos(around), np.sin(around), 0 * around], axis=1)
    errors = []
    for number, centre in enumerate(centres):
        outline, is_inside = path_pixels(calibration, recording.ego, centre + circle, taken_us, AT_US)
        lines, columns = np.nonzero(owner == number)
        if is_inside.all() and len(lines) >= 40 and np.ptp(lines) >= 4:  # a sliver has no middle
            assert (picture[lines, columns] == MARK_RGB).all()
            errors.append(middle_of(outline) - [columns.mean(), lines.mean()])

    assert len(errors) >= 2
    assert np.linalg.norm(errors, axis=1).max() * 2 < 0.7  # pixels of the full image, which is twice as wide


def test_a_wrong_principal_point_or_instant_would_be_seen(drive):
    _, recording = drive
    calibration = full_size(recording, WIDE)
    path_m = waypoints_at(recording, np.array([AT_US]))[AT_US].xyz_m[NUM_HISTORY:]
    times_us = recording.cameras[WIDE].timestamp_us
    taken_us = int(times_us[latest_at(times_us, np.array([AT_US]))[0]])
    right, is_inside = path_pixels(calibration, recording.ego, path_m, taken_us, AT_US)
    centred = dataclasses.replace(calibration, model=dataclasses.replace(calibration.model, cy_px=269.5))
    for wrong in (
        path_pixels(centred, recording.ego, path_m, taken_us, AT_US)[0],
        path_pixels(calibration, recording.ego, path_m, AT_US, AT_US)[0],
    ):
        assert np.abs(wrong - right)[is_inside].max() > 1


def test_a_path_is_drawn_in_the_parts_that_the_image_holds(drive):
    _, recording = drive
    calibration = recording.cameras[WIDE].calibration
    around = np.linspace(-np.pi, np.pi, 64)
    ring = 10 * np.stack([np.cos(around), np.sin(around), 0 * around], axis=1)  # passes behind the car
    runs = path_runs(calibration, None, ring, 0, 0)
    assert len(runs) >= 1
    for run in runs:
        assert ((run >= -0.5) & (run < [159.5, 89.5])).all()
        assert np.linalg.norm(np.diff(run, axis=0), axis=1).max() < 30  # no line across what was left out


def test_an_overlay_draws_what_was_said_and_what_is_true(drive):
    _, recording = drive
    path = waypoints_at(recording, np.array([AT_US]))[AT_US].xyz_m[NUM_HISTORY:]
    truth, said = {"xy_m": path[:, :2], "xyz_m": path}, {"xy_m": path[:, :2]}
    forecast = Forecast(says_why=False)
    beneath, above = (forecast.strokes(recording, WIDE, values, (AT_US, AT_US)) for values in (truth, said))
    np.testing.assert_allclose(beneath[0].points_px, above[0].points_px, atol=1e-6)  # the ground is flat
    assert beneath[0].width_px > above[0].width_px
    assert beneath[0].of_size_px == (160, 90)
    assert forecast.strokes(recording, "camera_roof", said, (AT_US, AT_US)) == ()


def test_a_picture_of_the_driven_path_is_written(drive, tmp_path):
    _, recording = drive
    path = write_driven_path(tmp_path / "path.png", recording, AT_US, (WIDE, TELE))
    with Image.open(path) as picture:
        assert picture.size[0] > 1000
        red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), int), 2, 0)
    assert ((green > red + 60) & (green > blue + 60)).sum() > 300
    with pytest.raises(DataError, match=r"no driven path at 8\.00 s, the ego motion ends less than 6\.4 s after"):
        driven_path(recording, 8_000_000, (WIDE,))
