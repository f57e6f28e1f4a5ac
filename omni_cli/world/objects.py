"""What stands and drives beside the road: buildings, poles, parked and moving cars, as boxes of flat quadrilaterals."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from omni_cli.scene.clock import Float64Array
from omni_cli.world.motion import Drive
from omni_cli.world.roads import LANE_M, VIEW_M, CentreLine, Layout

_FACES = (  # two corners of the ground plan, and the outward normal: front, back, left, right
    ((1, -1), (1, 1), (1, 0)),
    ((-1, 1), (-1, -1), (-1, 0)),
    ((1, 1), (-1, 1), (0, 1)),
    ((-1, -1), (1, -1), (0, -1)),
)
_PANEL_M = 4.5
_QUADS_PER_CAR = 15
_CAR_COLOURS = ((235, 235, 235), (40, 42, 46), (150, 152, 158), (150, 28, 30), (30, 60, 130), (90, 96, 80))


@dataclass(frozen=True)
class Quads:
    """Flat quadrilaterals seen from one side."""

    corners_m: Float64Array  # (n, 4, 3) in order around the edge
    normal: Float64Array  # (n, 3) unit, outward
    colour_rgb: Float64Array  # (n, 3) 0..255, light included
    bias_m: Float64Array  # (n,) added to the distance when sorting: shadows lie under everything


@dataclass(frozen=True)
class Traffic:
    """Moving and parked cars: a body each, and where it is on the road at any time."""

    bodies: Quads  # of all cars, `_QUADS_PER_CAR` each in turn, around each car's own origin
    start_s_m: Float64Array  # (n,)
    d_m: Float64Array  # (n,)
    speed_mps: Float64Array  # (n,) along s; negative: oncoming
    gap_m: float  # to the car ahead in the ego lane, which is body 0; it drives as the ego car does


@dataclass(frozen=True)
class Sun:
    """Where the light comes from and how strong it is."""

    direction: Float64Array  # (3,) unit, towards the sun
    light_rgb: Float64Array  # (3,)

    def shaded(self, colour_rgb: Float64Array, normal: Float64Array) -> Float64Array:
        """Return colours (n, 3) as lit on surfaces (n, 3)."""
        facing = 0.62 + 0.38 * np.maximum(normal @ self.direction, 0)
        return np.asarray(np.minimum(colour_rgb * facing[:, None] * self.light_rgb, 255))


def join(parts: list[Quads]) -> Quads:
    """Return all quadrilaterals as one set."""
    return Quads(
        np.concatenate([p.corners_m for p in parts]),
        np.concatenate([p.normal for p in parts]),
        np.concatenate([p.colour_rgb for p in parts]),
        np.concatenate([p.bias_m for p in parts]),
    )


def moved(quads: Quads, xy_m: Float64Array, yaw_rad: float) -> Quads:
    """Return quadrilaterals turned about z, then shifted over the ground; their light is kept."""
    turn = _turns(np.array([yaw_rad]))[0]
    shift = np.array([xy_m[0], xy_m[1], 0.0])
    return Quads(quads.corners_m @ turn.T + shift, quads.normal @ turn.T, quads.colour_rgb, quads.bias_m)


def scenery(rng: np.random.Generator, line: CentreLine, layout: Layout, sun: Sun, clutter: float) -> Quads:
    """Return the buildings and poles along both sides of the road; `clutter` is the share of buildings that stand."""
    parts: list[Quads] = []
    for edge_d in (layout.right_edge_m, layout.left_edge_m):
        parts += _row_of_buildings(rng, line, (edge_d, layout.sidewalk_m), sun, clutter)
        parts += _row_of_poles(rng, line, edge_d, sun)
    return join(parts)


def random_traffic(rng: np.random.Generator, drive: Drive, layout: Layout, sun: Sun, clutter: float) -> Traffic:
    """Return a car ahead, cars in the other lanes, and parked ones; `clutter` is the share of them that is there."""
    first, last = float(drive.distance_m[0]), float(drive.distance_m[-1])
    places: list[tuple[float, float, float]] = [(0.0, layout.ego_offset_m, 0.0)]
    for lane in range(1, layout.lanes_left + 1):
        speed = -rng.uniform(4, 16)
        end = last - speed * drive.seconds + VIEW_M
        places += _lane(rng, first - VIEW_M, end, layout.ego_offset_m + LANE_M * lane, speed, every_m=140)
    for lane in range(1, layout.lanes_right + 1):
        speed = rng.uniform(4, 16)
        start = first - speed * drive.seconds - VIEW_M
        places += _lane(rng, start, last + VIEW_M, layout.ego_offset_m - LANE_M * lane, speed, every_m=120)
    for edge, side in ((layout.right_edge_m, -1), (layout.left_edge_m, 1)):
        if rng.random() < 0.5:
            places += _lane(rng, first - 60, last + 60, edge + side * 1.2, 0.0, every_m=80)
    places = places[:1] + [place for place in places[1:] if rng.random() < clutter]
    s, d, speeds = np.array(places).T
    bodies = join([_car(rng, sun) for _ in places])
    gap_m = rng.uniform(15, 50) if rng.random() < clutter else VIEW_M  # out of sight
    return Traffic(bodies, s, d, speeds, gap_m=gap_m)


def traffic_at(traffic: Traffic, line: CentreLine, ego_s_m: float, at_s: float) -> Quads:
    """Return the cars in view of the ego car at an instant, in the anchor frame."""
    s = traffic.start_s_m + traffic.speed_mps * at_s
    s[0] = ego_s_m + traffic.gap_m
    seen = np.flatnonzero(np.abs(s - ego_s_m) < VIEW_M * 0.7)
    xy, yaw = line.at(s[seen], traffic.d_m[seen])
    turned = np.where(traffic.speed_mps[seen] < 0, yaw + np.pi, yaw)
    quads = (seen[:, None] * _QUADS_PER_CAR + np.arange(_QUADS_PER_CAR)).ravel()
    turn = np.repeat(_turns(turned), _QUADS_PER_CAR, axis=0)
    corners = traffic.bodies.corners_m[quads] @ turn.transpose(0, 2, 1)
    corners[:, :, :2] += np.repeat(xy, _QUADS_PER_CAR, axis=0)[:, None]
    normal = np.einsum("nij,nj->ni", turn, traffic.bodies.normal[quads])
    return Quads(corners, normal, traffic.bodies.colour_rgb[quads], traffic.bodies.bias_m[quads])


def _turns(yaw_rad: Float64Array) -> Float64Array:
    turns = np.zeros((len(yaw_rad), 3, 3))
    turns[:, 0, 0] = turns[:, 1, 1] = np.cos(yaw_rad)
    turns[:, 1, 0] = np.sin(yaw_rad)
    turns[:, 0, 1] = -turns[:, 1, 0]
    turns[:, 2, 2] = 1
    return turns


def _lane(
    rng: np.random.Generator, start_m: float, end_m: float, d_m: float, speed_mps: float, *, every_m: float
) -> list[tuple[float, float, float]]:
    gaps = 9 + rng.exponential(every_m - 9, max(int((end_m - start_m) / every_m), 1))
    return [(float(s), d_m, speed_mps) for s in start_m + np.cumsum(gaps)]


def _row_of_buildings(
    rng: np.random.Generator, line: CentreLine, verge_m: tuple[float, float], sun: Sun, clutter: float
) -> list[Quads]:
    parts, s = [], float(line.s_m[0])
    edge_d_m, sidewalk_m = verge_m
    while s < line.s_m[-1]:
        length, depth, height = rng.uniform(7, 18), rng.uniform(7, 12), rng.uniform(3.5, 16)
        setback = abs(edge_d_m) + sidewalk_m + rng.uniform(0.8, 6)
        xy, yaw = line.at(np.array([s + length / 2]), np.array([np.sign(edge_d_m) * (setback + depth / 2)]))
        colour = np.clip(rng.uniform(70, 200) + rng.normal(0, 18, 3), 30, 240)
        box = _box(rng, (length, depth), (0.0, height), colour, sun, yaw_rad=yaw[0], panel_m=_PANEL_M)
        placed = moved(box, xy[0], yaw[0])
        # On the inside of a bend the row would run into the road elsewhere.
        clear = line.distance_m(placed.corners_m.reshape(-1, 3)[:, :2]).min() > abs(edge_d_m) + 1
        if clear and rng.random() < clutter:
            parts.append(placed)
        s += length + rng.exponential(7)
    return parts


def _row_of_poles(rng: np.random.Generator, line: CentreLine, edge_d_m: float, sun: Sun) -> list[Quads]:
    spacing = rng.uniform(15, 35)
    s = np.arange(line.s_m[0] + rng.uniform(0, spacing), line.s_m[-1], spacing)
    s += rng.uniform(-4, 4, len(s))
    xy, yaw = line.at(s, np.full(len(s), edge_d_m + np.sign(edge_d_m) * 0.7))
    colour = np.full(3, rng.uniform(40, 130))
    pole = _box(rng, (0.25, 0.25), (0.0, rng.uniform(4, 8)), colour, sun)
    kept = line.distance_m(xy) > abs(edge_d_m) + 0.3
    return [moved(pole, place, heading) for place, heading in zip(xy[kept], yaw[kept], strict=True)]


def _car(rng: np.random.Generator, sun: Sun) -> Quads:
    length, width, height = rng.uniform(3.9, 5.2), rng.uniform(1.75, 2.0), rng.uniform(1.4, 1.9)
    colour = np.array(_CAR_COLOURS[rng.integers(len(_CAR_COLOURS))], float)
    belt = 0.6 * height
    body = _box(rng, (length, width), (0.28, belt), colour, sun, top=True)
    glass = _box(rng, (length * 0.55, width * 0.88), (belt, height), np.array([45.0, 52, 60]), sun)
    roof = _plate(length * 0.55, width * 0.88, height, sun.shaded(colour[None], np.array([[0.0, 0, 1]]))[0], 0.0)
    shadow = _plate(length + 0.3, width + 0.3, 0.01, np.full(3, 28.0) * sun.light_rgb, 40.0)
    chassis = _box(rng, (length * 0.86, width * 0.9), (0.02, 0.28), np.full(3, 22.0), sun)
    chassis = Quads(chassis.corners_m, chassis.normal, chassis.colour_rgb, chassis.bias_m + 6)
    return join([shadow, chassis, body, glass, roof])


def _box(
    rng: np.random.Generator,
    plan_m: tuple[float, float],
    z_m: tuple[float, float],
    colour_rgb: Float64Array,
    sun: Sun,
    *,
    yaw_rad: float = 0.0,
    panel_m: float = np.inf,
    top: bool = False,
) -> Quads:
    """Return a box around the origin, its walls cut into panels of slightly different tones (inf: one panel)."""
    corners, normals = [], []
    half = np.array(plan_m) / 2
    for start, end, normal in _FACES:
        a, b = np.array(start) * half, np.array(end) * half
        count = max(round(float(np.linalg.norm(b - a)) / panel_m), 1)
        cuts = a + (b - a) * np.linspace(0, 1, count + 1)[:, None]
        for low, high in pairwise(cuts):
            corners.append([[*low, z_m[0]], [*high, z_m[0]], [*high, z_m[1]], [*low, z_m[1]]])
            normals.append([*normal, 0.0])
    normal_array = np.array(normals)
    tone = np.ones((len(corners), 1)) if np.isinf(panel_m) else rng.uniform(0.72, 1.28, (len(corners), 1))
    cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
    world_normal = normal_array @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    walls = Quads(np.array(corners), normal_array, sun.shaded(colour_rgb * tone, world_normal), np.zeros(len(corners)))
    if not top:
        return walls
    lid = sun.shaded(colour_rgb[None], np.array([[0.0, 0, 1]]))[0]
    return join([walls, _plate(plan_m[0], plan_m[1], z_m[1], lid, 0.0)])


def _plate(length_m: float, width_m: float, z_m: float, colour_rgb: Float64Array, bias_m: float) -> Quads:
    x, y = length_m / 2, width_m / 2
    corners = np.array([[[x, -y, z_m], [x, y, z_m], [-x, y, z_m], [-x, -y, z_m]]])
    return Quads(corners, np.array([[0.0, 0, 1]]), colour_rgb[None], np.array([bias_m]))
