"""Whether the car in the pictures turns as the car of the log does, and when. Pure functions.

Two faults are seen nowhere else: a video of another drive of the same length, and a clock that is off by a constant.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.integrate import cumulative_trapezoid
from scipy.ndimage import uniform_filter1d
from scipy.spatial.transform import Rotation

from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.recording import Recording
from omni_cli.stages.checks.facts import SeenTurn
from omni_cli.stages.checks.findings import Finding, warn
from omni_cli.stages.checks.pictures import SpeedAt
from omni_cli.stages.checks.seen_turns import Turns, chosen, typical_rate_radps

_MAX_LAG_US, _LAG_STEP_US = 1_000_000, 20_000
_DRIFT_US = 4_000_000  # slower turning says little of when, and driving along a bend imitates it
_MOVING_MPS = 1.0
_MAX_PAIR_PERIODS = 1.5  # a pair across a gap is longer
_MIN_SPAN_S = 10.0
# Translation past near things bends the peak: healthy synthetic drives reach 0.14 s where the correlation is above 0.9,
# but never a gain of 1.7; of those shifted by 0.3 s about six in ten reach 2.
_MIN_SHIFT_US, _MIN_HALF_SHIFT_US = 150_000, 100_000
MIN_CORRELATION, _MIN_HALF_CORRELATION = 0.85, 0.6  # with less, a lag says nothing
_MIN_GAIN = 2.0  # variance that is left unexplained as they are, over that which is left at the lag
_UNLIKE_CORRELATION = 0.4
_TURNING_RADPS = 0.03
_MIN_MATCH = 0.05  # a camera that is blind, or looks into the night, shows noise that turns anyhow


@dataclass(frozen=True)
class Heading:
    """Where the car heads, by its log."""

    timestamp_us: Int64Array  # (n,) increasing
    yaw_rad: Float64Array  # (n,) left positive, without jumps


def heading_of(recording: Recording) -> Heading | None:
    """Return where the car heads: by its poses, or by a yaw rate that was logged; None without either."""
    if recording.ego is not None:
        forward = Rotation.from_quat(recording.ego.quaternion_xyzw).apply([1.0, 0.0, 0.0])
        return Heading(recording.ego.timestamp_us, np.unwrap(np.arctan2(forward[:, 1], forward[:, 0])))
    turning = recording.device.yaw_rate if recording.device is not None else None
    if turning is None or len(turning.timestamp_us) < 2:
        return None
    elapsed_s = (turning.timestamp_us - turning.timestamp_us[0]) / MICROSECONDS_PER_SECOND
    return Heading(turning.timestamp_us, cumulative_trapezoid(turning.yaw_rate_radps, elapsed_s, initial=0.0))


def seen_motion(recording: Recording, turns: Mapping[str, Turns], speed_at: SpeedAt) -> dict[str, SeenTurn]:
    """Compare each camera that looks along the way with the log, where there is enough to compare."""
    heading = heading_of(recording)
    if heading is None:
        return {}
    compared = {camera: compare(seen, heading, speed_at) for camera, seen in turns.items()}
    return {camera: found for camera, found in compared.items() if found is not None}


def seen_motion_findings(recording_id: str, seen: Mapping[str, SeenTurn]) -> Iterator[Finding]:
    """Name the cameras whose pictures turn at another time than the log, or as another drive."""
    for camera, found in seen.items():
        yield from (finding.about(recording_id, camera) for finding in _camera_findings(found))


def compare(turns: Turns, heading: Heading, speed_at: SpeedAt) -> SeenTurn | None:
    """Correlate what the pictures show with what the log tells, at lags of up to a second either way.

    Args:
        turns: of one camera.
        heading: of the log.
        speed_at: how fast the car was: where it stands, what moves in a picture is others.

    Returns:
        None where less than `_MIN_SPAN_S` can be compared.
    """
    turns = _comparable(turns, heading)
    is_moving = np.nan_to_num(speed_at(turns.first_us), nan=0.0) > _MOVING_MPS
    period_us = np.median(np.diff(turns.first_us)) if len(turns.first_us) > 1 else 0
    if is_moving.sum() * period_us < _MIN_SPAN_S * MICROSECONDS_PER_SECOND:
        return None
    window = max(round(_DRIFT_US / period_us), 1)
    lags_us = np.arange(-_MAX_LAG_US, _MAX_LAG_US + 1, _LAG_STEP_US)
    logged = np.array([_without_drift(_logged_rad(turns, heading, int(lag)), window)[is_moving] for lag in lags_us])
    seen = _without_drift(turns.seen_rad, window)[is_moving]
    curve = _correlations(logged, seen)
    best, half = int(curve.argmax()), len(seen) // 2
    halves = [_correlations(logged[:, part], seen[part]) for part in (slice(half), slice(half, None))]
    return SeenTurn(
        lag_us=int(lags_us[best]),
        correlation=float(curve[best]),
        correlation_unshifted=float(curve[len(lags_us) // 2]),
        half_lags_us=tuple(int(lags_us[one.argmax()]) for one in halves),
        half_correlations=tuple(float(one.max()) for one in halves),
        logged_radps=typical_rate_radps(turns, logged[len(lags_us) // 2]),
        seen_radps=typical_rate_radps(turns, seen),
        match=float(np.median(turns.match[is_moving])),
    )


def _camera_findings(found: SeenTurn) -> Iterator[Finding]:
    if _is_shifted(found):
        order = "after" if found.lag_us > 0 else "before"
        yield warn("pictures-shifted", f"its pictures turn {abs(found.lag_us) // 1000} ms {order} the log does "
                   f"(correlation {found.correlation:.2f}, as they are {found.correlation_unshifted:.2f}); the same "
                   "instant expected")  # fmt: skip
    elif _is_unlike(found):
        yield warn("pictures-of-another-drive", f"its pictures turn at {found.seen_radps:.3f} rad/s and the log at "
                   f"{found.logged_radps:.3f} rad/s (root mean square), and not at the same instants: correlation "
                   f"{found.correlation:.2f} at best within 1 s, {MIN_CORRELATION} or more expected")  # fmt: skip


def _is_shifted(found: SeenTurn) -> bool:
    """Say whether the lag explains far more, and both halves tell of it by themselves."""
    halves_us = np.array(found.half_lags_us) * np.sign(found.lag_us)
    left_unshifted, left = 1 - max(found.correlation_unshifted, 0) ** 2, 1 - found.correlation**2
    return bool(
        abs(found.lag_us) >= _MIN_SHIFT_US
        and halves_us.min() >= _MIN_HALF_SHIFT_US
        and found.correlation >= MIN_CORRELATION
        and min(found.half_correlations) >= _MIN_HALF_CORRELATION
        and left_unshifted >= _MIN_GAIN * left
    )


def _is_unlike(found: SeenTurn) -> bool:
    is_turning = min(found.logged_radps, found.seen_radps) > _TURNING_RADPS
    return is_turning and found.match > _MIN_MATCH and found.correlation < _UNLIKE_CORRELATION


def _comparable(turns: Turns, heading: Heading) -> Turns:
    """Leave out pairs across a gap, and those that the log does not reach at every lag."""
    if not len(turns.first_us):
        return turns
    elapsed = turns.later_us - turns.first_us
    is_reached = (turns.first_us - _MAX_LAG_US >= heading.timestamp_us[0]) & (
        turns.later_us + _MAX_LAG_US <= heading.timestamp_us[-1]
    )
    kept = is_reached & (elapsed < _MAX_PAIR_PERIODS * np.median(elapsed))
    return chosen(turns, kept)


def _logged_rad(turns: Turns, heading: Heading, lag_us: int) -> Float64Array:
    first, later = (
        np.interp(at_us - lag_us, heading.timestamp_us, heading.yaw_rad) for at_us in (turns.first_us, turns.later_us)
    )
    return np.asarray(later - first)


def _without_drift(values: Float64Array, window: int) -> Float64Array:
    return np.asarray(values - uniform_filter1d(values, window, mode="nearest"))


def _correlations(logged: Float64Array, seen: Float64Array) -> Float64Array:
    """Return Pearson's correlation of each row (k, n) with `seen` (n,); 0 where either does not vary."""
    logged = logged - logged.mean(axis=1, keepdims=True)
    seen = seen - seen.mean()
    norms = np.linalg.norm(logged, axis=1) * np.linalg.norm(seen)
    return np.asarray(np.divide(logged @ seen, norms, out=np.zeros(len(logged)), where=norms > 0))
