"""The ground as a camera sees it: flat, so each pixel looks at one fixed point of the rig's plane.

That point, and how large the pixel is there, are found once a camera. A frame then costs one rotation and two
look-ups: the road surface by road coordinates and a noise texture by world position. Both are kept at halving
resolutions, and a pixel reads the one that matches its size on the ground: without that, far texture would flicker
and motion could not be read from it.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.clock import Float64Array
from omni_cli.world.roads import SURFACE_COLUMNS, SURFACE_HALF_WIDTH_M, SURFACE_ROWS, VIEW_M, RoadGrid

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
_TILE_TEXEL_M = 0.05
_TILE_SIDE = 512
_SURFACE_LEVELS = 8
_TILE_LEVELS = 9
_HAZE_M = 90.0
_BLOCK_PIXELS = 16_384


@dataclass(frozen=True)
class GroundTexture:
    """The surfaces of one drive, every resolution behind the other in one flat table."""

    surface_rgbx: npt.NDArray[np.uint32]
    dash_period_m: float
    noise: npt.NDArray[np.uint8]  # 128: unchanged brightness


@dataclass(frozen=True)
class GroundView:
    """What never changes between the frames of one camera. n: pixels that see ground."""

    pixels: npt.NDArray[np.int64]  # (n,) flat indices into the image
    x_m: Float32Array  # (n,) rig frame
    y_m: Float32Array
    surface_offset: Int32Array  # (n,) where the pixel's level starts in the surface table
    surface_columns: Int32Array
    surface_rows: Int32Array
    noise_offset: Int32Array
    noise_shift: Int32Array  # log2 of the level's side
    noise_mask: Int32Array  # side - 1
    noise_scale: Float32Array  # texels a metre
    clearness: npt.NDArray[np.uint16]  # (n, 1) 0: all haze, 256: none
    haze: npt.NDArray[np.uint16]  # (n, 4) the haze's share of the colour, times 256

    def blocks(self) -> "tuple[GroundView, ...]":
        """Return the same pixels in parts that are small enough for the processor's cache."""
        starts = range(0, len(self.pixels), _BLOCK_PIXELS)
        names = [field.name for field in fields(self)]
        return tuple(GroundView(**{n: getattr(self, n)[i : i + _BLOCK_PIXELS] for n in names}) for i in starts)


def pixel_rays(calibration: Calibration) -> Float64Array:
    """Return the viewing direction of every pixel in the rig frame, (height * width, 3)."""
    model = calibration.model
    columns, rows = np.meshgrid(np.arange(model.width_px), np.arange(model.height_px))
    pixels = np.stack([columns, rows], axis=-1).reshape(-1, 2).astype(np.float64)
    return np.asarray(calibration.rig_T_camera.rotation.apply(model.rays(pixels)))


def ground_view(model: FTheta, place_m: Float64Array, rays: Float64Array, haze_rgb: Float64Array) -> GroundView:
    """Find the ground point of every pixel that sees ground within `VIEW_M`.

    Args:
        model: the camera.
        place_m: (3,) its place in the rig frame.
        rays: (pixels, 3) from `pixel_rays`.
        haze_rgb: (3,) colour of the far distance, 0..255.
    """
    down = np.minimum(rays[:, 2], -1e-6)
    reach = -place_m[2] / down
    pixels = np.flatnonzero((rays[:, 2] < 0) & (reach < VIEW_M))
    reach = reach[pixels]
    points = place_m[:2] + rays[pixels, :2] * reach[:, None]
    across = reach / model.forward_poly[1]  # a pixel's width on the ground
    along = across * reach / place_m[2]  # and its length, stretched by the flat view
    surface = _levels(np.sqrt(across * along) / (2 * SURFACE_HALF_WIDTH_M / SURFACE_ROWS), _SURFACE_LEVELS)
    noise = _levels(along**0.8 * across**0.2 / _TILE_TEXEL_M / 1.4, _TILE_LEVELS)
    clearness = np.exp(-((reach / _HAZE_M) ** 2)) * np.clip((VIEW_M - reach) / 20, 0, 1) * 256
    haze = np.append(haze_rgb, 255) * (256 - clearness[:, None])
    return GroundView(
        pixels=pixels,
        x_m=points[:, 0].astype(np.float32),
        y_m=points[:, 1].astype(np.float32),
        surface_offset=_offsets(SURFACE_ROWS * SURFACE_COLUMNS, _SURFACE_LEVELS)[surface],
        surface_columns=(SURFACE_COLUMNS >> surface).astype(np.int32),
        surface_rows=(SURFACE_ROWS >> surface).astype(np.int32),
        noise_offset=_offsets(_TILE_SIDE**2, _TILE_LEVELS)[noise],
        noise_shift=(int(np.log2(_TILE_SIDE)) - noise).astype(np.int32),
        noise_mask=((_TILE_SIDE >> noise) - 1).astype(np.int32),
        noise_scale=(1 / _TILE_TEXEL_M / 2.0**noise).astype(np.float32),
        clearness=clearness.astype(np.uint16)[:, None],
        haze=haze.astype(np.uint16),
    )


def shade_ground(
    view: GroundView, texture: GroundTexture, grid: RoadGrid, pose: tuple[float, float, float]
) -> npt.NDArray[np.uint32]:
    """Return the packed RGBX colours (n,) of the ground pixels.

    Args:
        view: the camera's fixed part.
        texture: the drive's surfaces.
        grid: the drive's road coordinates.
        pose: x, y (m) and yaw (rad) of the rig in the anchor frame.
    """
    x, y = _to_grid(view, grid, pose)
    s, d = _road_coordinates(grid, x, y)
    packed = texture.surface_rgbx.take(_surface_index(view, texture, s, d))
    brightness = texture.noise.take(_noise_index(view, x, y)).astype(np.uint16)
    colour = packed.view(np.uint8).reshape(-1, 4) * brightness[:, None]
    colour >>= 7
    np.minimum(colour, 255, out=colour)
    colour *= view.clearness
    colour += view.haze
    colour >>= 8
    return colour.astype(np.uint8).view(np.uint32)[:, 0]


def ground_texture(
    rng: np.random.Generator, surface: npt.NDArray[np.float32], dash_period_m: float, light_rgb: Float64Array
) -> GroundTexture:
    """Make a drive's tables from its painted surface and a random noise of random contrast."""
    lit = np.minimum(surface * light_rgb.astype(np.float32), 255)
    levels = [_packed(level) for level in _halvings(lit, _SURFACE_LEVELS)]
    noise = _band_limited_noise(rng) + _patches(rng)
    noise = 128 + (noise - noise.mean()) * rng.uniform(24, 44)
    tiles = [np.clip(level, 30, 226).astype(np.uint8).ravel() for level in _halvings(noise, _TILE_LEVELS, smooth=0.6)]
    return GroundTexture(np.concatenate(levels), dash_period_m, np.concatenate(tiles))


def _to_grid(view: GroundView, grid: RoadGrid, pose: tuple[float, float, float]) -> tuple[Float32Array, Float32Array]:
    """Return the pixels' places relative to the grid's origin, where every coordinate is positive."""
    cos, sin = np.float32(np.cos(pose[2])), np.float32(np.sin(pose[2]))
    x = view.x_m * cos - view.y_m * sin + np.float32(pose[0] - grid.origin_xy_m[0])
    y = view.x_m * sin + view.y_m * cos + np.float32(pose[1] - grid.origin_xy_m[1])
    return x, y


def _road_coordinates(grid: RoadGrid, x_m: Float32Array, y_m: Float32Array) -> tuple[Float32Array, Float32Array]:
    u, v = x_m * np.float32(1 / grid.cell_m), y_m * np.float32(1 / grid.cell_m)
    column, row = u.astype(np.int32), v.astype(np.int32)
    u -= column
    v -= row
    corner = row * np.int32(grid.columns) + column
    near, far = grid.cells.take(corner), grid.cells.take(corner + np.int32(grid.columns))
    near += (grid.cells.take(corner + np.int32(1)) - near) * u
    far += (grid.cells.take(corner + np.int32(grid.columns + 1)) - far) * u
    near += (far - near) * v
    return near.real, near.imag


def _surface_index(view: GroundView, texture: GroundTexture, s_m: Float32Array, d_m: Float32Array) -> Int32Array:
    turns = s_m * np.float32(1 / texture.dash_period_m)
    turns -= np.floor(turns)
    column = (turns * view.surface_columns).astype(np.int32)
    np.minimum(column, view.surface_columns - 1, out=column)  # a turn just below 1 may round up to it
    share = d_m * np.float32(0.5 / SURFACE_HALF_WIDTH_M) + np.float32(0.5)
    np.clip(share, 0, np.float32(0.9999), out=share)
    row = (share * view.surface_rows).astype(np.int32)
    row *= view.surface_columns
    row += column
    row += view.surface_offset
    return row


def _noise_index(view: GroundView, x_m: Float32Array, y_m: Float32Array) -> Int32Array:
    column, row = (x_m * view.noise_scale).astype(np.int32), (y_m * view.noise_scale).astype(np.int32)
    row &= view.noise_mask
    row <<= view.noise_shift
    column &= view.noise_mask
    row += column
    row += view.noise_offset
    return row


def _levels(size_texels: Float64Array, count: int) -> npt.NDArray[np.int64]:
    return np.clip(np.round(np.log2(np.maximum(size_texels, 1e-6))), 0, count - 1).astype(np.int64)


def _offsets(first: int, count: int) -> Int32Array:
    sizes = [first >> (2 * level) for level in range(count)]
    return np.cumsum([0, *sizes[:-1]]).astype(np.int32)


def _halvings(picture: Float32Array, count: int, smooth: float = 0.0) -> list[Float32Array]:
    levels = [picture]
    for _ in range(count - 1):
        last = levels[-1]
        mean = (last[::2, ::2] + last[1::2, ::2] + last[::2, 1::2] + last[1::2, 1::2]) / np.float32(4)
        smoothed = gaussian_filter(mean, smooth, mode="wrap") if smooth else mean
        levels.append(smoothed.astype(np.float32))
    return levels


def _packed(rgb: Float32Array) -> npt.NDArray[np.uint32]:
    opaque = np.full((*rgb.shape[:2], 1), 255, np.float32)
    return np.concatenate([rgb, opaque], axis=2).astype(np.uint8).reshape(-1, 4).view(np.uint32)[:, 0]


def _band_limited_noise(rng: np.random.Generator) -> Float32Array:
    """Return a seamless random tile of unit spread, most of it at wavelengths between 1 and 8 m.

    A car at 20 m/s moves 2 m between two frames at 10 Hz: only structure longer than that can be followed.
    """
    frequency = np.fft.fftfreq(_TILE_SIDE, _TILE_TEXEL_M)
    per_metre = np.hypot(frequency[:, None], frequency[None, : _TILE_SIDE // 2 + 1])
    # Equal power in each octave of two dimensions is 1 / f; the steeper fall gives the long waves most of it, and the
    # exponentials close the band at both ends.
    gain = np.exp(-((0.12 / np.maximum(per_metre, 1e-3)) ** 2)) / np.maximum(per_metre, 1e-3) ** 1.7
    gain *= np.exp(-((per_metre / 5) ** 2))
    white = np.fft.rfft2(rng.standard_normal((_TILE_SIDE, _TILE_SIDE), dtype=np.float32))
    tile = np.fft.irfft2(white * gain, s=(_TILE_SIDE, _TILE_SIDE))
    return np.asarray(tile / tile.std(), dtype=np.float32)


def _patches(rng: np.random.Generator) -> Float32Array:
    """Return repairs and stains: rectangles of 0.3 to 2 m, darker or lighter than their surroundings."""
    tile = np.zeros((_TILE_SIDE, _TILE_SIDE), np.float32)
    for _ in range(120):
        height, width = (rng.uniform(0.3, 2.0, 2) / _TILE_TEXEL_M).astype(int)
        row, column = rng.integers(0, _TILE_SIDE, 2)
        rows, columns = (row + np.arange(height)) % _TILE_SIDE, (column + np.arange(width)) % _TILE_SIDE
        tile[np.ix_(rows, columns)] += np.float32(rng.uniform(-1.6, 1.2))
    return tile
