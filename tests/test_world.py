"""The synthetic world against independent computations: geometry by projection, speed by brute-force matching."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from numpy.polynomial.polynomial import polyval
from scipy.ndimage import label

from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERAS
from omni_cli.scene.poses import Pose
from omni_cli.world import ground, roads
from omni_cli.world.clip import SyntheticSpec, build_clip, clip_id
from omni_cli.world.dataset import render_clip
from omni_cli.world.motion import Drive, random_drive, winding_drive
from omni_cli.world.objects import Quads
from omni_cli.world.render import build_world, camera_view, image_points, render
from omni_cli.world.rig import field_of_view_deg, random_rig

FRONT, LEFT, REAR = "camera_front_wide_120fov", "camera_cross_left_120fov", "camera_rear_tele_30fov"
SMALL = SyntheticSpec(seed=5, clips_per_chunk=2, seconds=0.4, fps=10, width_px=160, height_px=90, cameras=(FRONT, REAR))
DIGEST = """
import hashlib
from omni_cli.world.dataset import SyntheticSpec, render_clip
spec = SyntheticSpec(5, 2, 0.4, 10, 160, 90, ("{0}", "{1}"))
print(hashlib.sha256(repr(render_clip(spec, 1, 1)).encode()).hexdigest())
"""


def steady_drive(speed_mps: float, curvature_per_m: float = 0.0, seconds: float = 3.0) -> Drive:
    time_us = np.arange(-500_000, round(seconds * 1e6) + 601_000, 1_000)
    way = speed_mps * time_us / 1e6
    yaw = way * curvature_per_m
    if curvature_per_m:
        position = np.stack([np.sin(yaw), 1 - np.cos(yaw)], axis=1) / curvature_per_m
    else:
        position = np.stack([way, 0 * way], axis=1)
    same = np.ones(len(time_us))
    return Drive(time_us, position, yaw, same * speed_mps, same * 0, same * curvature_per_m, seconds)


def bare_world(drive):
    """The world of a drive without anything that stands or drives on the ground."""
    world = build_world(np.random.default_rng(0), drive)
    none = Quads(np.zeros((1, 4, 3)), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1))
    far_away = dataclasses.replace(world.traffic, start_s_m=world.traffic.start_s_m + 1e5, gap_m=1e5)
    return dataclasses.replace(world, scenery=none, traffic=far_away)


def in_image(world, calibration, at_us, anchor_xy):
    """Project ground points (n, 2) with the camera model alone."""
    x, y, yaw = world.drive.pose_at(at_us)
    cos, sin = np.cos(yaw), np.sin(yaw)
    offset = anchor_xy - [x, y]
    rig = np.column_stack([offset @ [cos, sin], offset @ [-sin, cos], 0 * offset[:, 0]])
    return calibration.model.project(calibration.rig_T_camera.inverse().apply(rig))


def test_a_clip_is_the_same_bytes_in_any_order_and_process():
    here = render_clip(SMALL, 1, 1)
    render_clip(SMALL, 1, 0)
    assert render_clip(SMALL, 1, 1) == here
    command = [sys.executable, "-c", DIGEST.format(FRONT, REAR)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"})
    assert there.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


def test_a_camera_does_not_depend_on_the_others_and_clips_differ():
    alone = render_clip(dataclasses.replace(SMALL, cameras=(REAR,)), 1, 1)
    assert alone.members[REAR] == render_clip(SMALL, 1, 1).members[REAR]
    names = {
        clip_id(dataclasses.replace(SMALL, seed=seed), chunk, i) for seed in (0, 1) for chunk in (0, 1) for i in (0, 1)
    }
    assert len(names) == 8
    assert alone.members[REAR][0][1] != render_clip(dataclasses.replace(SMALL, seed=6), 1, 1).members[REAR][0][1]


@pytest.mark.parametrize("rig", ["a", "b"])
@pytest.mark.parametrize(("camera", "curvature"), [(FRONT, 0.0), (FRONT, 0.04), (LEFT, -0.01), (REAR, 0.01)])
def test_a_painted_mark_appears_where_the_camera_model_projects_it(camera, rig, curvature):
    world = bare_world(steady_drive(10.0, curvature))
    period, low_s, high_s, low_d, high_d = 6.0, 3.0, 4.5, 2.0, 4.0  # whole texels at every resolution
    surface = np.zeros((roads.SURFACE_ROWS, roads.SURFACE_COLUMNS, 3), np.float32)
    half = roads.SURFACE_HALF_WIDTH_M
    rows = slice(*(round((d + half) / 2 / half * roads.SURFACE_ROWS) for d in (low_d, high_d)))
    surface[rows, round(low_s / period * 256) : round(high_s / period * 256)] = 255
    texture = ground.ground_texture(np.random.default_rng(0), surface, period, np.ones(3))
    texture = dataclasses.replace(texture, noise=np.full_like(texture.noise, 128))
    world = dataclasses.replace(world, texture=texture)
    calibration = random_rig(np.random.default_rng(1), rig, width_px=640, height_px=360)[camera]
    at_us = 1_234_567
    picture = render(world, camera_view(world, calibration), at_us)
    s, d = np.meshgrid(np.linspace(low_s, high_s, 250), np.linspace(low_d, high_d, 250))
    expected = np.zeros(picture.shape[:2], bool)
    for turn in range(-6, 9):
        points = world.line.at(s.ravel() + period * turn, d.ravel())[0]
        pixels, inside = in_image(world, calibration, at_us, points)
        columns, lines = np.round(pixels[inside]).astype(int).T
        expected[lines, columns] = True
    marks, count = label(expected)
    assert count
    mark = marks == 1 + np.argmax(np.bincount(marks.ravel())[1:])  # the largest one
    assert mark.sum() > 30
    lines, columns = (slice(max(axis.min() - 3, 0), axis.max() + 4) for axis in np.nonzero(mark))
    drawn, mark = picture.mean(axis=2)[lines, columns], mark[lines, columns]
    bright = drawn > drawn.max() / 2
    tolerance_px = 0.6 if curvature == 0 else 1.5  # road coordinates are interpolated: 2 cm in a bend
    assert (bright & mark).sum() / (bright | mark).sum() > 0.7
    assert np.abs(np.argwhere(bright).mean(axis=0) - np.argwhere(mark).mean(axis=0)).max() < tolerance_px


@pytest.mark.parametrize("speed_mps", [0.0, 3.0, 8.0, 15.0])
def test_near_ground_moves_between_frames_by_exactly_the_way_driven(speed_mps):
    world = bare_world(steady_drive(speed_mps))
    calibration = random_rig(np.random.default_rng(1), "a", width_px=320, height_px=180)[FRONT]
    view = camera_view(world, calibration)
    first_us, later_us = 1_000_000, 1_100_000
    x, y = np.meshgrid(np.arange(6.0, 9.0, 0.1), np.arange(-2.5, 2.5, 0.1))
    plan = np.stack([x.ravel(), y.ravel()], axis=1)

    def seen_from_above(at_us, shift_m):
        """Grey values at rig-frame points moved back by `shift_m`."""
        moved = plan + np.array([world.drive.pose_at(at_us)[0] - shift_m, 0])
        pixels, inside = in_image(world, calibration, at_us, moved)
        assert inside.all()
        columns, lines = np.round(pixels).astype(int).T
        values = render(world, view, at_us)[lines, columns].mean(axis=1)
        return (values - values.mean()) / values.std()

    before = seen_from_above(first_us, 0.0)
    shifts = np.arange(0, 2.0, 0.05)
    scores = [np.mean(before * seen_from_above(later_us, shift)) for shift in shifts]
    assert shifts[int(np.argmax(scores))] == pytest.approx(speed_mps * 0.1, abs=0.11)
    assert max(scores) > 0.7


def test_texture_does_not_flicker_when_the_car_creeps():
    world = bare_world(steady_drive(0.1))
    view = camera_view(world, random_rig(np.random.default_rng(1), "b", width_px=160, height_px=90)[FRONT])
    frames = [render(world, view, 1_000_000 + 10_000 * i).astype(float) for i in range(2)]  # a millimetre apart
    assert np.abs(frames[1] - frames[0]).mean() < 0.6


def test_boxes_are_projected_as_the_camera_model_does():
    model = random_rig(np.random.default_rng(0), "b", width_px=320, height_px=180)[FRONT].model
    points = np.random.default_rng(1).normal(0, 10, (2000, 3))
    expected, inside = model.project(points)
    found, within = image_points(model, points)
    assert inside.sum() > 50
    assert within[inside].all()
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-9)


@pytest.mark.parametrize("roads", ["gentle", "winding"])
@pytest.mark.parametrize("seed", range(4))
def test_ego_motion_is_consistent_with_itself(seed, roads):
    rng = np.random.default_rng(seed)
    gentle = random_drive(rng, seconds=8.0, start_phase=seed / 4)
    drive = gentle if roads == "gentle" else winding_drive(rng, seconds=8.0)
    log = drive.log()
    time_s = log.timestamp_us / 1e6
    assert log.span_us == (-200_000, 8_500_000)
    steps = (log.velocity_mps[1:] + log.velocity_mps[:-1]) / 2 * np.diff(time_s)[:, None]
    np.testing.assert_allclose(np.cumsum(steps, axis=0), log.position_m[1:] - log.position_m[0], atol=2e-3)
    np.testing.assert_allclose(
        np.gradient(log.velocity_mps, time_s, axis=0)[1:-1], log.acceleration_mps2[1:-1], atol=0.02
    )
    state = log.at(np.array([0, 4_000_000]))
    np.testing.assert_allclose(state.anchor_T_rig.translation_m[0], 0, atol=1e-9)
    assert state.anchor_T_rig.rotation[0].magnitude() < 1e-9
    everywhere = log.at(log.timestamp_us)
    body = everywhere.body_velocity_mps()
    np.testing.assert_allclose(body[:, 1:], 0, atol=1e-9)
    assert body[:, 0].min() >= -1e-12
    yaw_rate = np.gradient(np.unwrap(everywhere.anchor_T_rig.rotation.as_euler("ZYX")[:, 0]), time_s)
    np.testing.assert_allclose(yaw_rate[1:-1], (body[:, 0] * log.curvature_per_m)[1:-1], atol=5e-3)
    np.testing.assert_allclose(
        everywhere.body_acceleration_mps2()[:, 1], body[:, 0] ** 2 * log.curvature_per_m, atol=1e-9
    )


def test_speeds_of_a_data_set_spread_over_the_whole_range():
    speeds = []
    for i in range(80):
        drive = random_drive(np.random.default_rng([2, i]), seconds=6.0, start_phase=(i * 0.618) % 1)
        speeds += [drive.speed_mps[at : at + 1600].mean() for at in range(500, 5000, 800)]
    shares = np.histogram(speeds, bins=5, range=(0, 20))[0] / len(speeds)
    assert (shares > 0.12).all()
    assert (shares < 0.35).all()
    assert np.min(speeds) < 0.01


def test_on_a_winding_road_the_car_slows_for_the_bends_ahead():
    drives = [winding_drive(np.random.default_rng([4, i]), seconds=30.0) for i in range(10)]
    for drive in drives:
        sideways = np.abs(drive.speed_mps**2 * drive.curvature_per_m)
        assert 2.5 < sideways.max() < 3.6
        assert np.abs(drive.acceleration_mps2).max() < 2.01
        assert drive.speed_mps.min() > 7
        assert drive.speed_mps.max() <= 12 + 1e-9
    speed, bend = (np.concatenate([getattr(one, name) for one in drives]) for name in ("speed_mps", "curvature_per_m"))
    assert np.corrcoef(speed, np.abs(bend))[0, 1] < -0.7
    assert abs(bend.mean()) < 0.1 * np.abs(bend).mean()  # to the left as often as to the right
    braking = np.concatenate([one.speed_mps[2000:] - one.speed_mps[:-2000] for one in drives]) < -2
    ahead = np.concatenate([np.abs(one.curvature_per_m[2000:]) for one in drives])
    assert ahead[braking].mean() > 1.5 * ahead.mean()


@pytest.mark.parametrize("rig", ["a", "b"])
def test_rigs_see_what_their_names_say_and_their_polynomials_invert(rig):
    cameras = random_rig(np.random.default_rng(3), rig, width_px=1920, height_px=1080)
    assert set(cameras) == set(CAMERAS)
    assert cameras[FRONT].model.cy_px == {"a": 543, "b": 755}[rig]
    for name, calibration in cameras.items():
        model = calibration.model
        radius = np.linspace(
            0, np.hypot(max(model.cx_px, 1920 - model.cx_px), max(model.cy_px, 1080 - model.cy_px)), 500
        )
        assert np.abs(polyval(polyval(radius, model.backward_poly), model.forward_poly) - radius).max() < 0.1
        edges = model.rays(np.array([[0.0, model.cy_px], [1919.0, model.cy_px]]))
        assert np.degrees(np.arccos(edges[0] @ edges[1])) == pytest.approx(field_of_view_deg(name), abs=0.3)
        assert isinstance(calibration.rig_T_camera, Pose)


def test_cameras_keep_their_own_time():
    clip = build_clip(SyntheticSpec(seed=1, seconds=2, fps=30, width_px=64, height_px=36), 0, 0)
    firsts = [int(times[0]) for times in clip.timestamp_us.values()]
    assert len(set(firsts)) == 7
    for times in clip.timestamp_us.values():
        assert len(times) == 60
        assert times[0] >= 0
        assert times[-1] < 2_000_000
        assert np.abs(np.diff(times) - 1e6 / 30).max() <= 52


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width_px": 300}, "300x180 px: expected even sides at 16:9"),
        ({"cameras": ("camera_roof",)}, "unknown camera 'camera_roof'; known: camera_cross_left"),
        ({"rig": "c"}, "unknown rig 'c'; known: a, b, mixed"),
        ({"roads": "straight"}, "unknown roads 'straight'; known: gentle, winding"),
        ({"seconds": 0.01}, "needs two frames or more"),
    ],
)
def test_what_cannot_be_rendered_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        SyntheticSpec(**wrong)
