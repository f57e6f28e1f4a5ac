"""Checks of the car's motion: is it finite, possible, and consistent with itself. Pure functions."""

from collections.abc import Iterator

import numpy as np

from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import SpeedLog
from omni_cli.stages.checks.agreement import agreement_findings
from omni_cli.stages.checks.findings import Finding, is_refused, refuse
from omni_cli.stages.checks.timing import coverage_findings, timestamp_findings

MAX_SPEED_MPS = 70.0
MAX_ACCELERATION_MPS2 = 15.0
MAX_QUATERNION_ERROR = 1e-3  # as the reader
# A step may differ from what the velocities at its ends say by this much, plus this share of the step.
MAX_JUMP_M = 1.0
MAX_JUMP_SHARE = 0.25
# Messages of a car's bus are stamped when they are read: some come 0.2 ms apart, and a rate between two says nothing.
_RATE_OVER_US = 100_000


def ego_findings(ego: EgoMotion, camera_span_us: tuple[int, int] | None) -> Iterator[Finding]:
    """Check poses, velocities and accelerations.

    The log may run minutes past the video; what is said about motion is said of the cameras' span only. NaN and time
    are judged on the whole log, because a spline through it spreads them.

    Args:
        ego: as logged, not yet trusted.
        camera_span_us: from the first frame to the last; None where no camera can be read.
    """
    found = list(timestamp_findings(ego.timestamp_us, "egomotion times"))
    values = np.column_stack(
        [ego.position_m, ego.quaternion_xyzw, ego.velocity_mps, ego.acceleration_mps2, ego.curvature_per_m]
    )
    found += _finite_findings(values, "egomotion")
    if camera_span_us and not is_refused(found):
        found += coverage_findings(ego.span_us, camera_span_us, "egomotion")
        ego = ego.between(*camera_span_us)
    yield from found
    if not is_refused(found):
        of_motion = list(_motion_findings(ego))
        yield from of_motion
        yield from () if is_refused(of_motion) else agreement_findings(ego)


def speed_of_ego(ego: EgoMotion | None, at_us: Int64Array) -> Float64Array:
    """Return how fast the car was (m,), NaN outside of the log or without one."""
    if ego is None:
        return np.full(len(at_us), np.nan)
    speed = np.linalg.norm(ego.velocity_mps, axis=1)
    return np.asarray(np.interp(at_us, ego.timestamp_us, speed, left=np.nan, right=np.nan))


def speed_findings(
    log: SpeedLog, camera_span_us: tuple[int, int] | None, *, is_joined: bool = False
) -> Iterator[Finding]:
    """Check a log of speed and steering, whole: it belongs to its cameras' segments, several where it is joined."""
    found = list(timestamp_findings(log.timestamp_us, "speed times", is_joined=is_joined))
    found += _finite_findings(np.column_stack([log.speed_mps, log.steering_angle_deg]), "speed and steering")
    if camera_span_us and not is_refused(found):
        found += coverage_findings((int(log.timestamp_us[0]), int(log.timestamp_us[-1])), camera_span_us, "speed")
    yield from found
    if not is_refused(found):
        rate = _rate_per_s(log.speed_mps, log.timestamp_us)
        yield from _limit_findings(np.abs(log.speed_mps), MAX_SPEED_MPS, "impossible-speed", "m/s")
        yield from _limit_findings(np.abs(rate), MAX_ACCELERATION_MPS2, "impossible-acceleration", "m/s2")


def _motion_findings(ego: EgoMotion) -> Iterator[Finding]:
    norm_error = np.abs(np.linalg.norm(ego.quaternion_xyzw, axis=1) - 1)
    yield from _limit_findings(norm_error, MAX_QUATERNION_ERROR, "quaternion-norm", "away from norm 1")
    speed = np.linalg.norm(ego.velocity_mps, axis=1)
    yield from _limit_findings(speed, MAX_SPEED_MPS, "impossible-speed", "m/s")
    level = np.linalg.norm(ego.acceleration_mps2[:, :2], axis=1)  # potholes make the vertical part large
    yield from _limit_findings(level, MAX_ACCELERATION_MPS2, "impossible-acceleration", "m/s2")
    yield from _jump_findings(ego)


def _jump_findings(ego: EgoMotion) -> Iterator[Finding]:
    """A step between two poses must be about the mean of the velocities at its ends times its duration."""
    steps_s = _steps_s(ego.timestamp_us)[:, None]
    expected_m = (ego.velocity_mps[1:] + ego.velocity_mps[:-1]) / 2 * steps_s
    error_m = np.linalg.norm(np.diff(ego.position_m, axis=0) - expected_m, axis=1)
    excess_m = error_m - MAX_JUMP_SHARE * np.linalg.norm(expected_m, axis=1)
    yield from _limit_findings(excess_m, MAX_JUMP_M, "position-jump", "m more than its velocity explains")


def _finite_findings(values: Float64Array, what: str) -> Iterator[Finding]:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        yield refuse("not-finite", f"{what}: NaN or infinite in {len(bad)} rows, the first is row {int(bad[0])}")


def _limit_findings(values: Float64Array, limit: float, code: str, unit: str) -> Iterator[Finding]:
    if len(values) and (worst := float(values.max())) > limit:
        rows = int((values > limit).sum())
        yield refuse(code, f"{worst:.3g} {unit} at row {int(values.argmax())}, {rows} rows above {limit:g}")


def _rate_per_s(values: Float64Array, timestamp_us: Int64Array) -> Float64Array:
    """Return the rate from each sample to the first that is `_RATE_OVER_US` later, where there is one."""
    later = np.searchsorted(timestamp_us, timestamp_us + _RATE_OVER_US)
    first = np.flatnonzero(later < len(values))
    elapsed_s = (timestamp_us[later[first]] - timestamp_us[first]) / MICROSECONDS_PER_SECOND
    return np.asarray((values[later[first]] - values[first]) / elapsed_s)


def _steps_s(timestamp_us: Int64Array) -> Float64Array:
    return np.asarray(np.diff(timestamp_us) / MICROSECONDS_PER_SECOND)
