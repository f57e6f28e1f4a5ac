"""The path truly driven after an instant, as a driving model's plan describes it.

Frame: calib at the instant: x along the car, y to its right, level with it; the origin is the point whose path it is.
A plan describes the motion of the camera, which in a curve is not that of the rear axle: 1.8 m ahead of it, the camera
swings out by up to 1.8 m in a right-angled turn. So where poses and a camera's place on the rig are known, the path is
that camera's; otherwise it is that of the rig's origin.

Poses are interpolated as everywhere (scene/poses.py). Where there are none, speed and yaw rate are integrated to poses
(dead reckoning): the heading by the trapezoidal rule, exact for a yaw rate that is linear between samples, and the way
along it by the same rule on a grid of 10 ms, which errs by (yaw rate x 10 ms)^2 / 12 of itself, under a millionth.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.integrate import cumulative_trapezoid
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import NUM_POINTS, T_IDXS_S
from omni_cli.samples.sync import MAX_MOTION_GAP_US, common_span_us
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.driving_log import YawRateLog
from omni_cli.scene.poses import EgoMotion, EgoState
from omni_cli.scene.recording import Recording, SpeedLog

# A device's short log (qlog) keeps its yaw rate at 4 Hz, since 2024 at 2 Hz. A heading is too inert to hide a turn
# in half a second; a longer gap is one.
MAX_YAW_RATE_GAP_US = 600_000
_STEP_US = 10_000
_TURN_US = 50_000  # the yaw rate is the turn from this long before an instant to as long after it
_OFFSETS_US = np.round(T_IDXS_S * MICROSECONDS_PER_SECOND).astype(np.int64)
_PER_INSTANT = NUM_POINTS + 2  # states: the path's, and one on either side for the yaw rate
_NEVER_US = np.iinfo(np.int64).min


@dataclass(frozen=True)
class DrivenPaths:
    """Paths of a recording's motion after n instants, in calib at each: x forward, y right."""

    xy_m: npt.NDArray[np.float32]  # (n, 33, 2) at T_IDXS_S; 0 past the valid prefix
    num_points: Int64Array  # (n,) how many points lie inside the log; 0 where the instant itself does not
    speed_mps: Float64Array  # (n,) forward, at the instant; 0 where num_points is
    yaw_rate_radps: Float64Array  # (n,) left positive, at the instant; 0 where num_points is


def driven_paths(recording: Recording, at_us: Int64Array, *, camera: str | None = None) -> DrivenPaths:
    """Return the paths driven after instants (n,); nothing is extrapolated, and nothing is bridged over a gap.

    Args:
        recording: with poses, or else with speed and yaw rate.
        at_us: in any order.
        camera: whose path, where the recording knows its calibration; None is the rig's origin.

    Raises:
        DataError: there are neither poses nor speed with yaw rate, or these are never known together.
    """
    at_us = np.asarray(at_us, dtype=np.int64)
    ego, logs_us = _motion(recording)
    times_us = at_us[:, None] + _OFFSETS_US
    is_known = times_us <= np.min([_known_until_us(*log, at_us) for log in logs_us], axis=0)[:, None]
    around_us = np.clip(at_us[:, None], *ego.span_us) + np.array([-_TURN_US, _TURN_US])
    # One call: a spline and a slerp are built from the whole log.
    state = ego.at(np.clip(np.hstack([times_us, around_us]), *ego.span_us).ravel())
    xy_m = _paths(state, _lever_m(recording, camera))
    speed_mps, yaw_rate_radps = state.body_velocity_mps()[::_PER_INSTANT, 0], _yaw_rate_radps(state)
    return DrivenPaths(
        xy_m=np.where(is_known[..., None], xy_m, 0).astype(np.float32),
        num_points=is_known.sum(axis=1),
        speed_mps=np.where(is_known[:, 0], speed_mps, 0),
        yaw_rate_radps=np.where(is_known[:, 0], yaw_rate_radps, 0),
    )


def dead_reckoned(speed: SpeedLog, yaw_rate: YawRateLog) -> EgoMotion:
    """Integrate speed along the heading, over the span in which both logs are known, which must not be empty.

    Both are linear between their samples. The anchor is the rig at the first instant; the ground is flat.
    """
    first, last = common_span_us({"speed": speed.timestamp_us}, yaw_rate.timestamp_us)
    time_us = np.concatenate([np.arange(first, last, _STEP_US), [last], speed.timestamp_us, yaw_rate.timestamp_us])
    time_us = np.unique(time_us[(time_us >= first) & (time_us <= last)])
    elapsed_s = (time_us - first) / MICROSECONDS_PER_SECOND
    forward_mps = np.interp(time_us - first, speed.timestamp_us - first, speed.speed_mps)
    turn_radps = np.interp(time_us - first, yaw_rate.timestamp_us - first, yaw_rate.yaw_rate_radps)
    yaw = cumulative_trapezoid(turn_radps, elapsed_s, initial=0)
    heading = np.column_stack([np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)])
    velocity = heading * forward_mps[:, None]
    return EgoMotion(
        timestamp_us=time_us,
        position_m=cumulative_trapezoid(velocity, elapsed_s, axis=0, initial=0),
        quaternion_xyzw=Rotation.from_rotvec(np.outer(yaw, [0, 0, 1])).as_quat(),
        velocity_mps=velocity,
        acceleration_mps2=np.gradient(velocity, elapsed_s, axis=0),
        curvature_per_m=np.divide(turn_radps, forward_mps, out=np.zeros_like(yaw), where=forward_mps > 0),
    )


def _motion(recording: Recording) -> tuple[EgoMotion, list[tuple[Int64Array, int]]]:
    """Return the poses, and the times of each log that they come from with the longest gap that it may have."""
    if recording.ego is not None:
        return recording.ego, [(recording.ego.timestamp_us, MAX_MOTION_GAP_US)]
    speed, yaw_rate = recording.speed, recording.device.yaw_rate if recording.device else None
    if speed is None or yaw_rate is None:
        lacks = " and ".join(name for name, log in (("speed", speed), ("yaw rate", yaw_rate)) if log is None)
        raise DataError(
            f"{recording.id}: has no poses and no {lacks}; a driven path needs poses, or speed and yaw rate"
        )
    first, last = common_span_us({"speed": speed.timestamp_us}, yaw_rate.timestamp_us)
    if first >= last:
        raise DataError(f"{recording.id}: speed and yaw rate have no time in common; fetch the log again")
    logs_us = [(speed.timestamp_us, MAX_MOTION_GAP_US), (yaw_rate.timestamp_us, MAX_YAW_RATE_GAP_US)]
    return dead_reckoned(speed, yaw_rate), logs_us


def _known_until_us(timestamp_us: Int64Array, max_gap_us: int, at_us: Int64Array) -> Int64Array:
    """Return where the first gap after each instant begins (n,); the end of the log is one, and so is its start.

    An instant inside a gap lies after the gap's beginning, so that not even its own point is known.
    """
    is_gap = np.diff(timestamp_us) > max_gap_us
    begins = np.concatenate([[_NEVER_US], timestamp_us[:-1][is_gap], timestamp_us[-1:]])
    ends = np.concatenate([timestamp_us[:1], timestamp_us[1:][is_gap]])
    return np.asarray(begins[np.searchsorted(ends, at_us, side="right")])


def _lever_m(recording: Recording, camera: str | None) -> Float64Array:
    calibration = recording.cameras[camera].calibration if camera is not None else None
    return calibration.rig_T_camera.translation_m if calibration is not None else np.zeros(3)


def _paths(state: EgoState, lever_m: Float64Array) -> Float64Array:
    """Return (n, 33, 2) where the point `lever_m` of the rig goes, in calib at each path's first instant."""
    pose = state.anchor_T_rig
    point_m = (pose.rotation.apply(lever_m) + pose.translation_m).reshape(-1, _PER_INSTANT, 3)[:, :NUM_POINTS]
    rig_R_anchor = pose.rotation[::_PER_INSTANT].inv().as_matrix()
    ahead_left_m = np.einsum("nij,nkj->nki", rig_R_anchor[:, :2], point_m - point_m[:, :1])
    return np.asarray(ahead_left_m * [1, -1])


def _yaw_rate_radps(state: EgoState) -> Float64Array:
    """Return the turn (n,) between the last two states of each instant over the time between them."""
    rotation, time_us = state.anchor_T_rig.rotation, state.timestamp_us.reshape(-1, _PER_INSTANT)
    turn = (rotation[_PER_INSTANT - 2 :: _PER_INSTANT].inv() * rotation[_PER_INSTANT - 1 :: _PER_INSTANT]).as_matrix()
    elapsed_s = (time_us[:, -1] - time_us[:, -2]) / MICROSECONDS_PER_SECOND
    return np.asarray(np.arctan2(turn[:, 1, 0], turn[:, 0, 0]) / elapsed_s)
