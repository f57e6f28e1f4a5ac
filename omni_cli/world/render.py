"""Pictures of the world: sky, then ground, then boxes from far to near."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.polynomial.polynomial import polyval
from PIL import Image, ImageDraw

from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.clock import Float64Array
from omni_cli.world.ground import GroundTexture, GroundView, ground_texture, ground_view, pixel_rays, shade_ground
from omni_cli.world.motion import Drive
from omni_cli.world.objects import Quads, Sun, Traffic, join, random_traffic, scenery, traffic_at
from omni_cli.world.roads import CentreLine, RoadGrid, centre_line, paint_surface, random_layout, road_grid

Uint8Array = npt.NDArray[np.uint8]
_BOX_VIEW_M = 80.0
_PANEL_REACH_M = 9.0  # how far a quadrilateral may reach from its middle
_SMALLEST_PX = 0.8  # narrower ones would be drawn too wide
_WIDE_RAD = 0.9  # beyond this angle straight edges bend visibly and are cut finer


@dataclass(frozen=True)
class Sky:
    """Colours of the zenith and of the horizon (3,), 0..255; the far distance fades into the latter."""

    zenith_rgb: Float64Array
    horizon_rgb: Float64Array


@dataclass(frozen=True)
class World:
    """Everything that one drive's cameras see."""

    drive: Drive
    way_m: Float64Array  # driven since t = 0, on the drive's own grid
    line: CentreLine
    grid: RoadGrid
    texture: GroundTexture
    scenery: Quads
    traffic: Traffic
    sky: Sky


@dataclass(frozen=True)
class CameraView:
    """One camera's fixed part in one world."""

    calibration: Calibration
    model: FTheta
    background: npt.NDArray[np.uint32]  # (height * width,) packed RGBX: sky and far distance
    ground: tuple[GroundView, ...]
    edge_weights: Float64Array  # (points, 4): points around a quadrilateral's edge from its corners


def build_world(rng: np.random.Generator, drive: Drive, clutter: float = 1.0) -> World:
    """Make the random surroundings of a drive; `clutter` 0..1 is how much stands and drives beside the road."""
    line, layout = centre_line(drive), random_layout(rng)
    sun, sky = _random_light(rng)
    surface = paint_surface(rng, layout)
    return World(
        drive=drive,
        way_m=drive.distance_m,
        line=line,
        grid=road_grid(line, drive),
        texture=ground_texture(rng, surface, layout.dash_period_m, sun.light_rgb),
        scenery=scenery(rng, line, layout, sun, clutter),
        traffic=random_traffic(rng, drive, layout, sun, clutter),
        sky=sky,
    )


def camera_view(world: World, calibration: Calibration) -> CameraView:
    """Prepare a camera for a world; its model must be f-theta."""
    model = calibration.model
    assert isinstance(model, FTheta)
    rays = pixel_rays(calibration)
    place = calibration.rig_T_camera.translation_m
    ground = ground_view(model, place, rays, world.sky.horizon_rgb)
    cuts = 3 + model.width_px // 480 if model.max_angle_rad > _WIDE_RAD else 1
    return CameraView(calibration, model, _paint_sky(world.sky, rays), ground.blocks(), _edge_weights(cuts))


def render(world: World, view: CameraView, at_us: int) -> Uint8Array:
    """Return the (height, width, 3) picture that a camera takes at an instant."""
    pose = world.drive.pose_at(at_us)
    picture = view.background.copy()
    for block in view.ground:
        picture[block.pixels] = shade_ground(block, world.texture, world.grid, pose)
    shape = view.model.height_px, view.model.width_px
    image = Image.fromarray(picture.view(np.uint8).reshape(*shape, 4), "RGBX")
    ego_s = float(np.interp(at_us, world.drive.time_us, world.way_m))
    cars = traffic_at(world.traffic, world.line, ego_s, at_us / 1e6)
    _draw(ImageDraw.Draw(image), view, join([world.scenery, cars]), pose)
    return np.asarray(image)[:, :, :3]


def image_points(model: FTheta, points_m: Float64Array) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
    """Map points (n, 3) in the camera frame to pixels (n, 2), and say which lie within the maximal angle.

    Beyond the maximal angle the radius goes on linearly, so that a shape that is partly outside keeps its outline.
    """
    across = np.hypot(points_m[:, 0], points_m[:, 1])
    theta = np.arctan2(across, points_m[:, 2])
    inside = np.minimum(theta, model.max_angle_rad)
    radius = polyval(inside, model.forward_poly) + (theta - inside) * model.forward_poly[1]
    scale = radius / np.maximum(across, 1e-9)
    x, y = points_m[:, 0] * scale, points_m[:, 1] * scale
    c, d, e = model.linear_cde
    pixels = np.stack([c * x + d * y + model.cx_px, e * x + y + model.cy_px], axis=1)
    return pixels, theta <= model.max_angle_rad


def _draw(canvas: ImageDraw.ImageDraw, view: CameraView, quads: Quads, pose: tuple[float, float, float]) -> None:
    x, y, yaw = pose
    cos, sin = np.cos(yaw), np.sin(yaw)
    rig_R_anchor = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    mount = view.calibration.rig_T_camera
    camera_R_anchor = mount.rotation.as_matrix().T @ rig_R_anchor
    eye = np.array([x, y, 0.0]) + rig_R_anchor.T @ mount.translation_m
    order = _far_to_near(quads, eye, camera_R_anchor[2], view.model)
    if not order.size:
        return
    outline = view.edge_weights @ ((quads.corners_m[order] - eye) @ camera_R_anchor.T)
    pixels, inside = image_points(view.model, outline.reshape(-1, 3))
    pixels = pixels.reshape(len(outline), -1)
    seen = inside.reshape(len(outline), -1).any(axis=1)
    colours = quads.colour_rgb[order][seen].astype(int).tolist()
    for points, colour in zip(pixels[seen].tolist(), colours, strict=True):
        canvas.polygon(points, fill=(*colour, 255))


def _far_to_near(quads: Quads, eye_m: Float64Array, axis: Float64Array, model: FTheta) -> npt.NDArray[np.int64]:
    """Return which quadrilaterals face the eye, are near, roughly ahead of it and large enough to see, in order."""
    offset = quads.corners_m[:, 0] - eye_m
    near = np.flatnonzero(np.einsum("ij,ij->i", offset[:, :2], offset[:, :2]) < _BOX_VIEW_M**2)
    near = near[np.einsum("ij,ij->i", offset[near], quads.normal[near]) < 0]
    centre = quads.corners_m[near].mean(axis=1) - eye_m
    distance = np.sqrt(np.einsum("ij,ij->i", centre, centre))
    ahead = centre @ axis > distance * np.cos(model.max_angle_rad) - _PANEL_REACH_M
    edge = quads.corners_m[near, 1] - quads.corners_m[near, 0]
    wide = np.einsum("ij,ij->i", edge, edge) * (model.forward_poly[1] / _SMALLEST_PX) ** 2 > distance**2
    kept = np.flatnonzero(ahead & wide)
    chosen: npt.NDArray[np.int64] = near[kept[np.argsort(-(distance + quads.bias_m[near])[kept], kind="stable")]]
    return chosen


def _edge_weights(cuts: int) -> Float64Array:
    steps = np.arange(cuts) / cuts
    rows = [(1 - t) * np.eye(4)[i] + t * np.eye(4)[(i + 1) % 4] for i in range(4) for t in steps]
    return np.array(rows)


def _paint_sky(sky: Sky, rays: Float64Array) -> npt.NDArray[np.uint32]:
    height = np.sqrt(np.clip(rays[:, 2:], 0, 1))
    colour = sky.horizon_rgb * (1 - height) + sky.zenith_rgb * height
    packed = np.concatenate([colour, np.full((len(rays), 1), 255.0)], axis=1).astype(np.uint8)
    return packed.view(np.uint32)[:, 0]


def _random_light(rng: np.random.Generator) -> tuple[Sun, Sky]:
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.2)
    direction = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    strength, warmth = rng.uniform(0.6, 1.15), rng.uniform(-0.06, 0.08)
    light = strength * np.array([1 + warmth, 1.0, 1 - warmth])
    horizon = np.minimum(np.array([205.0, 215, 225]) * rng.uniform(0.8, 1.05) * light, 255)
    zenith = np.minimum(np.array([95.0, 140, 205]) * rng.uniform(0.7, 1.1) * light, 255)
    return Sun(direction, light), Sky(zenith, horizon)
