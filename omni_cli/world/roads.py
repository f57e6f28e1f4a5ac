"""The road under a drive: its centre line, its surface, and where any point of the ground lies on it.

Road coordinates: s (m) along the ego car's own path from t = 0, d (m) across it, left positive. The surface repeats
along s with the period of the lane dashes, so one picture of one period paints the whole road.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from omni_cli.scene.clock import Float64Array
from omni_cli.world.motion import Drive

VIEW_M = 120.0  # nothing on the ground is drawn farther away
LANE_M = 3.5
_STEP_M = 0.5
_CELL_M = 2.0
_MARGIN_M = VIEW_M + 8.0
SURFACE_HALF_WIDTH_M = 16.0
SURFACE_ROWS, SURFACE_COLUMNS = 1024, 256


@dataclass(frozen=True)
class CentreLine:
    """The ego car's path, prolonged straight at both ends."""

    s_m: Float64Array  # (n,) increasing
    xy_m: Float64Array  # (n, 2) anchor
    yaw_rad: Float64Array  # (n,)

    def at(self, s_m: Float64Array, d_m: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Return the anchor positions (k, 2) and headings (k,) of points in road coordinates (k,)."""
        x, y, yaw = (np.interp(s_m, self.s_m, column) for column in (*self.xy_m.T, self.yaw_rad))
        return np.stack([x - d_m * np.sin(yaw), y + d_m * np.cos(yaw)], axis=-1), yaw

    def distance_m(self, xy_m: Float64Array) -> Float64Array:
        """Return how far points (k, 2) lie from the line."""
        return np.asarray(self._tree.query(xy_m)[0])

    def nearest(self, xy_m: Float64Array) -> npt.NDArray[np.int64]:
        """Return which of the line's points lies nearest to each of points (k, 2)."""
        return np.asarray(self._tree.query(xy_m)[1], np.int64)

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.xy_m)


@dataclass(frozen=True)
class Layout:
    """The cross-section of a road."""

    lanes_right: int  # beside the ego lane, same direction
    lanes_left: int  # oncoming
    ego_offset_m: float  # of the ego lane's middle from the car
    dash_period_m: float
    dash_m: float
    sidewalk_m: float

    @property
    def right_edge_m(self) -> float:
        """Where the asphalt ends on the right (negative d)."""
        return self.ego_offset_m - LANE_M * (0.5 + self.lanes_right) - 0.6

    @property
    def left_edge_m(self) -> float:
        """Where the asphalt ends on the left."""
        return self.ego_offset_m + LANE_M * (0.5 + self.lanes_left) + 0.6


@dataclass(frozen=True)
class RoadGrid:
    """Road coordinates of a coarse grid of ground points, to be interpolated."""

    origin_xy_m: Float64Array  # (2,) anchor position of cell (0, 0)
    cells: npt.NDArray[np.complex64]  # (rows * columns,) s + i d
    columns: int
    cell_m: float = _CELL_M


def centre_line(drive: Drive) -> CentreLine:
    """Return the centre line of a drive's road, a point every half metre."""
    way = drive.distance_m
    moved = np.concatenate([[True], np.diff(way) > 1e-7])
    way, position, yaw = way[moved], drive.position_m[moved], drive.yaw_rad[moved]
    s = np.arange(way[0], way[-1] + _STEP_M, _STEP_M)
    middle = [np.interp(s, way, column) for column in (*position.T, yaw)]
    before, after = np.arange(-_MARGIN_M - 60, 0, _STEP_M), np.arange(_STEP_M, _MARGIN_M + 60, _STEP_M)
    x = np.concatenate([middle[0][0] + before * np.cos(yaw[0]), middle[0], middle[0][-1] + after * np.cos(yaw[-1])])
    y = np.concatenate([middle[1][0] + before * np.sin(yaw[0]), middle[1], middle[1][-1] + after * np.sin(yaw[-1])])
    heading = np.concatenate([np.full(len(before), yaw[0]), middle[2], np.full(len(after), yaw[-1])])
    return CentreLine(np.concatenate([s[0] + before, s, s[-1] + after]), np.stack([x, y], axis=1), heading)


def random_layout(rng: np.random.Generator) -> Layout:
    """Return a random cross-section."""
    period = rng.uniform(7, 14)
    return Layout(
        lanes_right=int(rng.integers(0, 2)),
        lanes_left=int(rng.integers(1, 3)),
        ego_offset_m=rng.uniform(-0.3, 0.3),
        dash_period_m=period,
        dash_m=period * rng.uniform(0.3, 0.5),
        sidewalk_m=rng.uniform(1.5, 3.0),
    )


def road_grid(line: CentreLine, drive: Drive) -> RoadGrid:
    """Return road coordinates for every place that a camera of the drive can see."""
    low = drive.position_m.min(axis=0) - _MARGIN_M
    columns, rows = (np.ceil((drive.position_m.max(axis=0) + _MARGIN_M - low) / _CELL_M) + 1).astype(int)
    x, y = low[0] + np.arange(columns) * _CELL_M, low[1] + np.arange(rows) * _CELL_M
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    nearest = line.nearest(points)
    offset, yaw = points - line.xy_m[nearest], line.yaw_rad[nearest]
    along = line.s_m[nearest] + offset[:, 0] * np.cos(yaw) + offset[:, 1] * np.sin(yaw)
    across = offset[:, 1] * np.cos(yaw) - offset[:, 0] * np.sin(yaw)
    return RoadGrid(low, (along + 1j * across).astype(np.complex64), int(columns))


def paint_surface(rng: np.random.Generator, layout: Layout) -> npt.NDArray[np.float32]:
    """Return one period of the surface: (rows over d from right to left, columns over s, 3) RGB in 0..255."""
    d = (np.arange(SURFACE_ROWS) + 0.5) / SURFACE_ROWS * 2 * SURFACE_HALF_WIDTH_M - SURFACE_HALF_WIDTH_M
    s = (np.arange(SURFACE_COLUMNS) + 0.5) / SURFACE_COLUMNS * layout.dash_period_m
    verge = np.array([rng.uniform(70, 125), rng.uniform(85, 130), rng.uniform(50, 85)])
    asphalt = rng.uniform(70, 125) + np.array([0.0, 0.0, rng.uniform(0, 6)])
    paving, white = rng.uniform(125, 175) + np.array([4.0, 0.0, -6.0]), np.full(3, rng.uniform(200, 240))
    yellow = np.array([225.0, 185.0, 70.0]) if rng.random() < 0.4 else white
    right, left = layout.right_edge_m, layout.left_edge_m
    picture = np.tile(verge, (SURFACE_ROWS, SURFACE_COLUMNS, 1))
    picture[(d > right - layout.sidewalk_m) & (d < left + layout.sidewalk_m)] = paving
    picture[(d > right - 0.25) & (d < left + 0.25)] = paving * 1.2  # the curb
    picture[(d > right) & (d < left)] = asphalt
    for edge in (right + 0.4, left - 0.4):
        picture[np.abs(d - edge) < 0.08] = white
    dashed = s < layout.dash_m
    for lane in range(-layout.lanes_right, layout.lanes_left):
        middle = layout.ego_offset_m + LANE_M * (lane + 0.5)
        rows = np.abs(d - middle) < 0.08
        picture[np.ix_(rows, dashed)] = yellow if lane == 0 else white
    joints = (d < right - 0.25) & (d > right - layout.sidewalk_m) | (d > left + 0.25) & (d < left + layout.sidewalk_m)
    picture[np.ix_(joints, np.mod(s, layout.dash_period_m / 4) < 0.12)] *= 0.75
    return picture.clip(0, 255).astype(np.float32)
