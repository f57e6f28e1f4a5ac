"""What the car did in a window, as numbers: in the rig frame at the window's first instant, signed, over its very time.

With poses: the chord and the heading change come from interpolated poses, the path and the mean speed from the same
interpolation every 10 ms. With a speed log alone the columns that need a pose (dx, dy, dyaw) are NaN, which says
"unknown"; displacement is the path driven, forward minus backward, which for a window that turns by theta exceeds the
true chord by theta^2 / 24 of itself (1 % at half a radian).
"""

import numpy as np

from omni_cli.errors import DataError
from omni_cli.samples.tables import EGO_MOTION_COLUMNS
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import Recording, SpeedLog

_STEP_US = 10_000
Columns = dict[str, Float64Array]


def motion_timestamps_us(recording: Recording) -> Int64Array:
    """Return the times of the ego motion that labels a recording's windows.

    Raises:
        DataError: the recording has neither poses nor speed.
    """
    motion = recording.ego or recording.speed
    if motion is None:
        raise DataError(f"{recording.id}: has no ego motion; ego-motion labels need poses or a speed log")
    return motion.timestamp_us


def ego_motion_columns(recording: Recording, spans_us: Int64Array) -> Columns:
    """Return the columns `EGO_MOTION_COLUMNS` of windows that all last equally long.

    Args:
        recording: with poses, or else with a speed log, that cover the windows.
        spans_us: (windows, 2) first and last instants.

    Raises:
        DataError: the motion inside a window is not finite.
    """
    times = _sample_times_us(spans_us)
    if recording.ego is not None:
        columns = _from_poses(recording.ego, times)
        known = set(columns)
    elif recording.speed is not None:
        columns = _from_speed(recording.speed, times)
        known = set(columns) - {"dx_m", "dy_m", "dyaw_rad"}
    else:
        raise DataError(f"{recording.id}: has no ego motion; ego-motion labels need poses or a speed log")
    if wrong := sorted(name for name in known if not np.isfinite(columns[name]).all()):
        raise DataError(f"{recording.id}: ego motion is not finite ({', '.join(wrong)}); fetch it again or audit it")
    return {field.name: columns[field.name] for field in EGO_MOTION_COLUMNS}


def _sample_times_us(spans_us: Int64Array) -> Int64Array:
    """Return (windows, samples) instants every 10 ms, the last one at the window's end."""
    duration = int(spans_us[0, 1] - spans_us[0, 0])
    offsets = np.append(np.arange(0, duration, _STEP_US, dtype=np.int64), duration)
    return np.asarray(spans_us[:, :1] + offsets[None, :])


def _from_poses(ego: EgoMotion, times_us: Int64Array) -> Columns:
    state = ego.at(times_us.ravel())
    windows, samples = times_us.shape
    first, last = np.arange(windows) * samples, np.arange(windows) * samples + samples - 1
    position = np.asarray(state.anchor_T_rig.translation_m).reshape(windows, samples, 3)
    start_R_anchor = state.anchor_T_rig.rotation[first].inv()
    chord = start_R_anchor.apply(position[:, -1] - position[:, 0])
    turn = (start_R_anchor * state.anchor_T_rig.rotation[last]).as_matrix()
    speed = state.body_velocity_mps()[:, 0].reshape(windows, samples)
    return {
        "dx_m": chord[:, 0],
        "dy_m": chord[:, 1],
        "dyaw_rad": np.arctan2(turn[:, 1, 0], turn[:, 0, 0]),
        "displacement_m": np.where(chord[:, 0] < 0, -1.0, 1.0) * np.hypot(chord[:, 0], chord[:, 1]),
        "path_length_m": np.linalg.norm(np.diff(position, axis=1), axis=2).sum(axis=1),
        "mean_speed_mps": _time_mean(speed, times_us),
        "start_speed_mps": speed[:, 0],
    }


def _from_speed(log: SpeedLog, times_us: Int64Array) -> Columns:
    first = log.timestamp_us[0]  # relative times keep the precision of float64
    speed = np.interp(
        (times_us - first).astype(np.float64), (log.timestamp_us - first).astype(np.float64), log.speed_mps
    )
    mean, duration_s = _time_mean(speed, times_us), _duration_s(times_us)
    unknown = np.full(len(times_us), np.nan)
    return {
        "dx_m": unknown,
        "dy_m": unknown,
        "dyaw_rad": unknown,
        "displacement_m": mean * duration_s,
        "path_length_m": _time_mean(np.abs(speed), times_us) * duration_s,
        "mean_speed_mps": mean,
        "start_speed_mps": speed[:, 0],
    }


def _time_mean(values: Float64Array, times_us: Int64Array) -> Float64Array:
    """Return the mean over time (windows,) by the trapezoidal rule; a window of one instant is its own mean."""
    if values.shape[1] == 1 or times_us[0, 0] == times_us[0, -1]:
        return values[:, 0]
    relative_s = (times_us - times_us[:, :1]) / MICROSECONDS_PER_SECOND
    return np.asarray(np.trapezoid(values, relative_s, axis=1) / _duration_s(times_us))


def _duration_s(times_us: Int64Array) -> Float64Array:
    return np.asarray((times_us[:, -1] - times_us[:, 0]) / MICROSECONDS_PER_SECOND)
