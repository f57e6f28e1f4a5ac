"""What an audit measures of each recording: small enough to keep for ten thousand, and to add up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array, latest_at, nearest_to, seconds
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import SpeedLog

SKEW_EDGES_MS = np.arange(0.0, 101, 2)
SPEED_EDGES_MPS = np.arange(0.0, 46, 1)
CURVATURE_EDGES_PER_M = np.round(np.arange(-0.1, 0.1001, 0.005), 4)
PAST_US, FUTURE_US = 1_600_000, 6_400_000  # what a model is shown of the motion before t0, and plans after it
_GRID_US = 100_000
_MOVING_MPS = 1.0  # curvature of a car that stands is noise
_REFERENCE = "camera_front_wide_120fov"
Counts = tuple[int, ...]


@dataclass(frozen=True)
class PictureFacts:
    """What decoding every frame of a camera showed."""

    num_decoded: int
    num_black: int
    num_frozen: int  # like the one before while the car moves, in runs
    hashes: tuple[int, ...]  # 64-bit difference hashes at fixed shares of the video; empty where it shows nothing


@dataclass(frozen=True)
class SeenTurn:
    """How the turning that a camera shows agrees with that of the log; drifts of several seconds are taken off both."""

    lag_us: int  # by which the pictures turn after the log, where the two agree best; within a second either way
    correlation: float  # there
    correlation_unshifted: float
    half_lags_us: tuple[int, ...]  # the same of the first half and of the second
    half_correlations: tuple[float, ...]
    logged_radps: float  # root mean square
    seen_radps: float
    match: float  # median correlation of two pictures, one turned to the other: near 0 where they show little


@dataclass(frozen=True)
class CameraFacts:
    """One camera of one recording."""

    num_frames: int  # timestamps
    span_us: tuple[int, int]
    period_us: int  # median
    jitter_us: int  # 95th percentile of how far an interval is from the median
    phase_us: int  # median of how much later its frames are than the nearest ones of the reference camera
    pictures: PictureFacts | None = None  # None: not decoded
    content_key: str = ""  # of the video's bytes, where a directory tells it without reading them
    seen_turn: SeenTurn | None = None  # None: it looks aside, is not calibrated or decoded, or there is no log


@dataclass(frozen=True)
class MotionFacts:
    """How the car moved while the cameras looked, every 0.1 s."""

    speed_counts: Counts  # by SPEED_EDGES_MPS
    curvature_counts: Counts  # by CURVATURE_EDGES_PER_M; empty where no log tells it
    distance_m: float
    max_speed_mps: float
    past_video_s: float  # how far the log goes on after the last frame
    t0_us: tuple[int, int] | None  # instants with 1.6 s of motion behind and 6.4 s ahead; None: there are none


@dataclass(frozen=True)
class RecordingFacts:
    """One recording."""

    recording: str
    cameras: Mapping[str, CameraFacts] = field(default_factory=dict)
    motion: MotionFacts | None = None
    rig: str = ""  # A, B, unknown; empty where no calibration tells it
    skew_counts: Counts = ()  # by SKEW_EDGES_MS, of instants every 0.1 s; empty with fewer than two cameras
    max_skew_us: int = 0


def camera_facts(
    times_us: Mapping[str, Int64Array],
    pictures: Mapping[str, PictureFacts | None],
    content_keys: Mapping[str, str],
    seen_turns: Mapping[str, SeenTurn],
) -> dict[str, CameraFacts]:
    """Measure each camera's times.

    Args:
        times_us: camera -> (n,) strictly increasing, two or more.
        pictures: camera -> what decoding showed.
        content_keys: camera -> what tells its video's bytes from others.
        seen_turns: camera -> how its pictures turn with the log.
    """
    reference = times_us.get(_REFERENCE, next(iter(times_us.values()), np.zeros(0, np.int64)))
    return {
        camera: _one_camera(
            times, reference, pictures.get(camera), content_keys.get(camera, ""), seen_turns.get(camera)
        )
        for camera, times in times_us.items()
    }


def skews_us(times_us: Mapping[str, Int64Array]) -> Int64Array:
    """Return, every 0.1 s of the span that all cameras share, how far apart their latest frames are (m,)."""
    start, end = max(t[0] for t in times_us.values()), min(t[-1] for t in times_us.values())
    at_us = np.arange(start, end + 1, _GRID_US, dtype=np.int64)
    shown = np.array([times[latest_at(times, at_us)] for times in times_us.values()]).reshape(len(times_us), -1)
    return np.asarray(np.ptp(shown, axis=0) if at_us.size else np.zeros(0, np.int64))


def motion_of_ego(ego: EgoMotion, span_us: tuple[int, int] | None) -> MotionFacts | None:
    """Measure poses over the cameras' span; None where they share no time."""
    at_us = _grid(ego.span_us, span_us)
    if not len(at_us):
        return None
    speed = np.linalg.norm(_at(at_us, ego.timestamp_us, ego.velocity_mps), axis=1)
    curvature = np.interp(at_us, ego.timestamp_us, ego.curvature_per_m)
    return _motion(speed, curvature, ego.span_us, span_us or ego.span_us)


def motion_of_speed(
    log: SpeedLog, span_us: tuple[int, int] | None, yaw_rate: tuple[Int64Array, Float64Array] | None
) -> MotionFacts | None:
    """Measure a speed log, with the car's yaw rate where it is known: (times, rad/s left positive)."""
    log_span = int(log.timestamp_us[0]), int(log.timestamp_us[-1])
    at_us = _grid(log_span, span_us)
    if not len(at_us):
        return None
    speed = np.interp(at_us, log.timestamp_us, log.speed_mps)
    curvature = None
    if yaw_rate is not None and len(yaw_rate[0]):
        curvature = np.interp(at_us, *yaw_rate) / np.maximum(np.abs(speed), _MOVING_MPS)
    return _motion(np.abs(speed), curvature, log_span, span_us or log_span)


def histogram(values: Float64Array, edges: Float64Array) -> Counts:
    """Count values by edges; what lies outside is counted in the outermost bins."""
    return tuple(map(int, np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]))


def _one_camera(
    times: Int64Array,
    reference: Int64Array,
    pictures: PictureFacts | None,
    content_key: str,
    seen_turn: SeenTurn | None,
) -> CameraFacts:
    steps = np.diff(times)
    period = int(np.median(steps))
    phase = int(np.median(times - reference[nearest_to(reference, times)]))
    jitter = int(np.percentile(np.abs(steps - period), 95))
    span = (int(times[0]), int(times[-1]))
    return CameraFacts(len(times), span, period, jitter, phase, pictures, content_key, seen_turn)


def _motion(
    speed: Float64Array, curvature: Float64Array | None, log_us: tuple[int, int], span_us: tuple[int, int]
) -> MotionFacts:
    is_moving = speed > _MOVING_MPS
    bends = () if curvature is None else histogram(curvature[is_moving], CURVATURE_EDGES_PER_M)
    first, last = max(span_us[0], log_us[0] + PAST_US), min(span_us[1], log_us[1] - FUTURE_US)
    return MotionFacts(
        speed_counts=histogram(speed, SPEED_EDGES_MPS),
        curvature_counts=bends,
        distance_m=float(speed.sum() * _GRID_US / MICROSECONDS_PER_SECOND),
        max_speed_mps=float(speed.max()),
        past_video_s=seconds(max(0, log_us[1] - span_us[1])),
        t0_us=(first, last) if first <= last else None,
    )


def _grid(log_us: tuple[int, int], span_us: tuple[int, int] | None) -> Int64Array:
    start, end = (max(log_us[0], span_us[0]), min(log_us[1], span_us[1])) if span_us else log_us
    return np.arange(start, end + 1, _GRID_US, dtype=np.int64)


def _at(at_us: Int64Array, times_us: Int64Array, values: Float64Array) -> Float64Array:
    return np.column_stack([np.interp(at_us, times_us, column) for column in values.T])
