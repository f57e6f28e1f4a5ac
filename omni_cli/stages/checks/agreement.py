"""Checks of one log of motion against another, or against itself: each may be smooth and still wrong. Pure."""

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import SpeedLog
from omni_cli.stages.checks.findings import Finding, refuse, warn

_OVER_US = 500_000  # between two poses that are compared: one step apart is mostly noise
_FROZEN_US = 500_000
_MOVING_MPS, _FAST_MPS = 1.0, 3.0
# Allowed between two tellings of one velocity: so much, plus this share of the speed.
_WARN_MPS, _WARN_SHARE = 0.5, 0.1
_REFUSE_MPS, _REFUSE_SHARE = 2.0, 0.25
_MAX_HEADING_RAD = np.radians(30)
_TURNING_RAD = 0.02  # in _OVER_US
_MIN_TURNS = 5
_OPPOSITE_SHARE = 0.8
_MAX_CURVATURE_RATIO = 1.5  # a log of half or twice its size is then found


def agreement_findings(ego: EgoMotion) -> Iterator[Finding]:
    """Check that positions, velocities, headings and curvatures of one log tell of one motion.

    Args:
        ego: finite, its times increasing, cut to the span that counts.
    """
    first, later = _pairs(ego.timestamp_us)
    yield from _frozen_findings(ego)
    if len(first):
        yield from _velocity_findings(ego, first, later)
        yield from _heading_findings(ego)
        yield from _curvature_findings(ego, first, later)


def wheel_findings(log: SpeedLog, ego: EgoMotion) -> Iterator[Finding]:
    """Check that the speed of the wheels is that of the poses, where both were logged."""
    shared = (log.timestamp_us >= ego.timestamp_us[0]) & (log.timestamp_us <= ego.timestamp_us[-1])
    if shared.sum() < 2:
        return
    speed = np.linalg.norm(ego.velocity_mps, axis=1)
    of_poses = np.interp(log.timestamp_us[shared], ego.timestamp_us, speed)
    error = float(np.median(np.abs(np.abs(log.speed_mps[shared]) - of_poses)))
    yield from _disagreement("speed-disagrees", "speed of the wheels and of the poses", error, float(of_poses.mean()))


def _velocity_findings(ego: EgoMotion, first: Int64Array, later: Int64Array) -> Iterator[Finding]:
    """Where a car is later is the integral of its velocity (trapezoids); compared as vectors, so that frames count."""
    steps_s = np.diff(ego.timestamp_us)[:, None] / MICROSECONDS_PER_SECOND
    travelled = np.cumsum((ego.velocity_mps[1:] + ego.velocity_mps[:-1]) / 2 * steps_s, axis=0)
    travelled = np.vstack([np.zeros(3), travelled])
    expected = travelled[later] - travelled[first]
    elapsed_s = (ego.timestamp_us[later] - ego.timestamp_us[first]) / MICROSECONDS_PER_SECOND
    found = ego.position_m[later] - ego.position_m[first]
    error = float(np.median(np.linalg.norm(found - expected, axis=1) / elapsed_s))
    speed = float(np.median(np.linalg.norm(found, axis=1) / elapsed_s))
    told = float(np.median(np.linalg.norm(expected, axis=1) / elapsed_s))
    what = f"positions move at {speed:.2f} m/s and the logged velocity says {told:.2f} m/s; they"
    yield from _disagreement("velocity-disagrees", what, error, max(speed, told))


def _disagreement(code: str, what: str, error_mps: float, speed_mps: float) -> Iterator[Finding]:
    if error_mps > _WARN_MPS + _WARN_SHARE * speed_mps:
        make = refuse if error_mps > _REFUSE_MPS + _REFUSE_SHARE * speed_mps else warn
        yield make(code, f"{what} differ by {error_mps:.2f} m/s (median)")


def _frozen_findings(ego: EgoMotion) -> Iterator[Finding]:
    same = (np.diff(ego.position_m, axis=0) == 0).all(axis=1) & (np.diff(ego.quaternion_xyzw, axis=0) == 0).all(axis=1)
    moving = np.linalg.norm(ego.velocity_mps, axis=1)[1:] > _MOVING_MPS
    longest_us, row = _longest_run_us(same & moving, ego.timestamp_us)
    if longest_us > _FROZEN_US:
        yield refuse(
            "frozen-ego",
            f"egomotion: the pose stands still for {longest_us / MICROSECONDS_PER_SECOND:.2f} s from row {row} while "
            "its velocity says that the car moves",
        )


def _heading_findings(ego: EgoMotion) -> Iterator[Finding]:
    body = Rotation.from_quat(ego.quaternion_xyzw).inv().apply(ego.velocity_mps)
    fast = np.linalg.norm(body, axis=1) > _FAST_MPS
    if not fast.any():
        return
    course = np.abs(np.arctan2(body[fast, 1], body[fast, 0]))
    error = float(np.median(np.minimum(course, np.pi - course)))  # a car may drive backward
    if error > _MAX_HEADING_RAD:
        yield refuse(
            "heading-disagrees",
            f"egomotion: the car drives {np.degrees(error):.0f} degrees away from where it heads (median); velocities "
            "in the anchor frame and quaternions as x, y, z, w expected",
        )


def _curvature_findings(ego: EgoMotion, first: Int64Array, later: Int64Array) -> Iterator[Finding]:
    """Curvature is yaw over distance, left positive; compared where the car truly turns."""
    rotation = Rotation.from_quat(ego.quaternion_xyzw)
    forward = rotation.apply([1.0, 0.0, 0.0])
    yaw = np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))
    turned = yaw[later] - yaw[first]
    moved = ego.position_m[later] - ego.position_m[first]
    along_m = np.einsum("ij,ij->i", moved, forward[first])
    turning = (np.abs(turned) > _TURNING_RAD) & (np.abs(along_m) > _MOVING_MPS)
    if turning.sum() < _MIN_TURNS:
        return
    of_poses = turned[turning] / along_m[turning]
    logged = np.interp((ego.timestamp_us[first] + ego.timestamp_us[later]) / 2, ego.timestamp_us, ego.curvature_per_m)
    ratio = float(np.median(logged[turning] / of_poses))
    opposite = float((np.sign(logged[turning]) != np.sign(of_poses)).mean())
    if opposite > _OPPOSITE_SHARE and ratio < 0:
        yield warn("curvature-sign", f"egomotion: curvature bends against the poses in {opposite:.0%} of the turns; "
                   "left positive expected")  # fmt: skip
    elif not 1 / _MAX_CURVATURE_RATIO < abs(ratio) < _MAX_CURVATURE_RATIO:
        yield warn("curvature-scale", f"egomotion: curvature is {ratio:.2f} times that of the poses (median); 1/m "
                   "expected")  # fmt: skip


def _pairs(timestamp_us: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return rows and, for each, the first row that is `_OVER_US` later; rows without one are left out."""
    later = np.searchsorted(timestamp_us, timestamp_us + _OVER_US)
    first = np.flatnonzero(later < len(timestamp_us))
    return first, np.asarray(later[first], np.int64)


def _longest_run_us(is_so: np.ndarray, timestamp_us: Int64Array) -> tuple[int, int]:
    """Return how long the longest run of true steps lasts, and the row it begins at; step i ends at row i + 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_so, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    lengths = timestamp_us[ends] - timestamp_us[starts]
    return int(lengths.max()), int(starts[lengths.argmax()])
