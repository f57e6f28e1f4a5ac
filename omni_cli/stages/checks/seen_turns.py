"""How far the car turns from picture to picture, by the pictures alone. Pure functions.

A turn of the camera moves what it sees sideways by the same angle, near or far. Driving moves it too, but not in the
direction of travel, out of which all of it flows: so only a patch around that direction is compared, where the
calibration says that it lies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter, uniform_filter1d
from scipy.spatial.transform import Rotation

from omni_cli.formats.video_check import THUMB_HEIGHT_PX, WIDE_WIDTH_PX
from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import Float64Array, Int64Array, seconds

Wides = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
PAIR_US = 200_000  # between the two pictures that are compared: from one to the next a gentle turn is hardly seen
_SMOOTH_US = 500_000
_HALF_ANGLE_RAD = np.radians(15.0)
_MAX_OFF_AXIS_RAD = np.radians(30.0)  # beyond, a lens shows the direction of travel at its rim
_ROWS = THUMB_HEIGHT_PX // 2
_MIN_COLUMNS = 16
_MEDIAN_OF = 5  # pairs; a wrong match seldom lasts
_PLAIN_LUMA = 20.0  # root of the summed squares of a row's gradient: a plain row has less, and counts for little
_PAIRS_AT_ONCE = 512


@dataclass(frozen=True)
class View:
    """The part of a wide picture around the direction of travel."""

    rows: slice
    columns: slice
    rad_per_column: float


@dataclass(frozen=True)
class Turns:
    """How far the car turned between pairs of pictures."""

    first_us: Int64Array  # (n,)
    later_us: Int64Array  # (n,)
    seen_rad: Float64Array  # (n,) left positive
    match: Float64Array  # (n,) correlation of the two pictures so turned, 0..1: near 0 where they show little


_NO_TURNS = Turns(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


def view_of_travel(calibration: Calibration) -> View | None:
    """Return where a camera shows the direction of travel, forward or backward; None where it looks elsewhere."""
    rig_R_camera = calibration.rig_T_camera.rotation
    axis = rig_R_camera.apply([0.0, 0.0, 1.0])
    if abs(axis[0]) < np.cos(_MAX_OFF_AXIS_RAD):
        return None
    around = Rotation.from_euler("z", [[_HALF_ANGLE_RAD], [0.0], [-_HALF_ANGLE_RAD]])
    rays = rig_R_camera.inv().apply(around.apply([np.sign(axis[0]), 0.0, 0.0]))
    pixels, _ = calibration.model.project(rays)
    if not np.isfinite(pixels).all():
        return None
    left, middle, right = pixels[:, 0] * (WIDE_WIDTH_PX / calibration.model.width_px)
    row = pixels[1, 1] * (THUMB_HEIGHT_PX / calibration.model.height_px)
    first, last = (int(np.clip(round(column), 0, WIDE_WIDTH_PX)) for column in (left, right))
    if last - first < _MIN_COLUMNS or not (first <= middle <= last and 0 <= row <= THUMB_HEIGHT_PX):
        return None
    top = int(np.clip(round(row) - _ROWS // 2, 0, THUMB_HEIGHT_PX - _ROWS))
    return View(slice(top, top + _ROWS), slice(first, last), 2 * float(_HALF_ANGLE_RAD) / float(right - left))


def seen_turns(wides: Wides, timestamp_us: Int64Array, view: View) -> Turns:
    """Measure the turns in one video.

    Args:
        wides: (n, THUMB_HEIGHT_PX, WIDE_WIDTH_PX) luma.
        timestamp_us: (m,) of the first m pictures.
        view: of its camera.
    """
    count = min(len(wides), len(timestamp_us))
    times = timestamp_us[:count]
    if count < 2:
        return _NO_TURNS
    period_us = max(float(np.median(np.diff(times))), 1.0)
    step = max(round(PAIR_US / period_us), 1)
    if count <= step:
        return _NO_TURNS
    patches = wides[:count, view.rows, view.columns]
    curves = uniform_filter1d(match_curves(patches, step), _odd(_SMOOTH_US / period_us), axis=0, mode="nearest")
    shift_px = median_filter(peaks(curves), _MEDIAN_OF, mode="nearest")
    return Turns(times[:-step], times[step:], shift_px * view.rad_per_column, curves.max(axis=1).astype(np.float64))


def joined(parts: Sequence[Turns]) -> Turns:
    """Return the turns of videos that follow one another; none across two of them."""
    return Turns(*(np.concatenate([getattr(part, name) for part in parts]) for name in Turns.__annotations__))


def match_curves(patches: Wides, step: int) -> Float32Array:
    """Return how well each picture matches the one `step` later, moved by each number of columns.

    Each row's gradient, faded at the rims and of one length, is correlated with that of the same row; the rows vote.

    Args:
        patches: (n, rows, columns) luma, n > step.
        step: pictures from one to the other.

    Returns:
        (n - step, 2 m + 1) correlations at -m .. m columns; positive: what is seen moves to the right.
    """
    farthest = patches.shape[2] // 3
    chunks = (patches[start : end + step] for start, end in pairwise(_edges(len(patches) - step)))
    return np.concatenate([_curves_of_chunk(chunk, step, farthest) for chunk in chunks])


def peaks(curves: Float32Array) -> Float64Array:
    """Return at how many columns each curve (n, 2 m + 1) is highest, (n,): the vertex of the parabola there."""
    last = curves.shape[1] - 1
    top = np.clip(curves.argmax(axis=1), 1, last - 1)
    row = np.arange(len(curves))
    before, at, after = (curves[row, top + offset].astype(np.float64) for offset in (-1, 0, 1))
    bend = before - 2 * at + after
    vertex = np.divide(before - after, 2 * bend, out=np.zeros_like(bend), where=bend < 0)
    return np.asarray(top - last // 2 + np.clip(vertex, -1, 1))


def chosen(turns: Turns, is_kept: npt.NDArray[np.bool_]) -> Turns:
    """Return the turns (n,) that are marked."""
    return Turns(*(getattr(turns, name)[is_kept] for name in Turns.__annotations__))


def typical_rate_radps(turns: Turns, turned_rad: Float64Array) -> float:
    """Return the root mean square of turns (n,) as a rate."""
    return float(np.sqrt(np.mean(turned_rad**2)) / seconds(int(np.median(turns.later_us - turns.first_us))))


def _edges(count: int) -> Iterator[int]:
    yield from range(0, count, _PAIRS_AT_ONCE)
    yield count


def _curves_of_chunk(patches: Wides, step: int, farthest: int) -> Float32Array:
    gradient = np.diff(patches.astype(np.float32), axis=2)
    gradient -= gradient.mean(axis=2, keepdims=True)
    gradient *= np.hanning(gradient.shape[2]).astype(np.float32)
    gradient /= np.linalg.norm(gradient, axis=2, keepdims=True) + _PLAIN_LUMA
    length = gradient.shape[2] + farthest  # zeros beyond the rim: nothing wraps around
    spectrum = np.fft.rfft(gradient, length, axis=2)
    product = (np.conj(spectrum[:-step]) * spectrum[step:]).mean(axis=1)
    curves = np.fft.irfft(product, length, axis=1)
    return np.concatenate([curves[:, -farthest:], curves[:, : farthest + 1]], axis=1).astype(np.float32)


def _odd(count: float) -> int:
    """Return a window of about so many samples that has a middle, and so delays nothing."""
    return max(round(count), 1) | 1
