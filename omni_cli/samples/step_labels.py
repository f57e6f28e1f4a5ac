"""What a driving student should have said at each instant: the path truly driven, and what its teacher says.

Two teachers need no weights: `motion`, the car itself, whose later path is the target; and `log`, the driving model
that ran in the car. Paths and lanes are in calib: x forward, y right, z down.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import NUM_POINTS
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.driven_path import DrivenPaths
from omni_cli.scene.clock import Int64Array, latest_at, nearest_to
from omni_cli.scene.driving_log import BoolArray, DesireLog, DeviceLog, LoggedModel
from omni_cli.scene.recording import Recording

Float32Array = npt.NDArray[np.float32]

MOTION, LOG = "motion", "log"
_MOST = 0.5  # of a grid's frames: a whole log has nearly all, a short one a fortieth
_SAME_FRAME_US = 1_000  # a log writes a frame's time in nanoseconds, a container in 1/90 ms
_FIX_LASTS_US = 2_500_000  # short logs keep one word of the receiver a second: two are missed
_STEP_US = 200_000


@dataclass(frozen=True)
class Scene:
    """What a teacher saw at n instants; where `is_known` is False the rest is 0."""

    is_known: BoolArray  # (n,)
    lane_lines_m: Float32Array  # (n, 4, 33, 2) y and z
    lane_line_prob: Float32Array  # (n, 4)
    road_edges_m: Float32Array  # (n, 2, 33, 2)
    lead: Float32Array  # (n, 3, 4) x, y, v, a
    lead_prob: Float32Array  # (n, 3)


@dataclass(frozen=True)
class StepLabels:
    """Targets of n instants."""

    xy_m: Float32Array  # (n, 33, 2)
    num_points: Int64Array  # (n,) of the path's points that are targets, from the first
    scene: Scene | None = None  # None: the teacher says nothing of the road
    facts: dict[str, str] = field(default_factory=dict)  # of how they were computed, for provenance


class Pictures(Protocol):
    """The pictures (frames, 6, 128, 256) of one view; they may be decoded only now, so they are asked for in order."""

    def __getitem__(self, rows: Int64Array, /) -> Uint8Array:
        """Return the pictures of those frames."""


@dataclass(frozen=True)
class Looks:
    """What a driving model is shown at n instants of one recording, 0.2 s apart unless windows were dropped."""

    instants_us: Int64Array  # (n,) on the time grid, ascending
    timestamp_us: Int64Array  # (n,) true time of the road camera's frame
    pictures: "tuple[Pictures, ...]"  # of each view
    rows: Int64Array  # (n, views) where an instant's pictures lie in them
    desire_pulse: Int64Array  # (n,) the desire that began since the instant before, or 0
    is_left_hand_traffic: bool

    @property
    def begins(self) -> BoolArray:
        """Where there is no look 0.2 s before (n,): no step ends there, and memories begin anew."""
        return np.concatenate([[True], np.diff(self.instants_us) > _STEP_US])


class Labeller(Protocol):
    """A teacher, as the workers of a pool know it: picklable."""

    def __call__(self, recording: Recording, looks: Looks, driven: DrivenPaths) -> StepLabels:
        """Return targets of every look.

        Raises:
            DataError: the recording does not hold what the teacher needs.
        """


def driven_labels(recording: Recording, looks: Looks, driven: DrivenPaths) -> StepLabels:
    """Return the path truly driven as the target: the `motion` teacher."""
    return StepLabels(driven.xy_m, driven.num_points)


def logged_labels(recording: Recording, looks: Looks, driven: DrivenPaths) -> StepLabels:
    """Return what the car's own model said of the very same frames: the `log` teacher.

    Raises:
        DataError: the log holds no model, or none of these frames.
    """
    model = _known_model(recording)
    row = nearest_to(model.timestamp_us, looks.timestamp_us)
    is_known = np.abs(model.timestamp_us[row] - looks.timestamp_us) <= _SAME_FRAME_US
    if not is_known.any():
        raise DataError(
            f"{recording.id}: modelV2 was logged at none of the {len(row)} frames looked at; use an rlog, or a smaller "
            "--stride"
        )
    xy_m = np.where(is_known[:, None, None], from_the_camera(model.path_m[row]), 0).astype(np.float32)
    return StepLabels(xy_m, np.where(is_known, NUM_POINTS, 0), _scene(model, row, is_known))


def logged_phase_us(recording: Recording, frame_us: Int64Array, *, period_us: int, max_age_us: int) -> int:
    """Return the phase of the time grid that looks at most of the frames of which the car's own model was logged.

    A short log (qlog) keeps one word of the model in 40, always of the same frame of four, and three phases of four
    pass them all by. A frame is looked at from its own time until the next one's. Where most of what a grid that begins
    at 0 looks at was logged, as in a whole log (rlog), it stays, and looks where it does for every other teacher.

    Args:
        recording: with what its model said.
        frame_us: (n,) true times of the road camera's frames.
        period_us: of the grid.
        max_age_us: how old a frame may be at an instant.

    Raises:
        DataError: the log holds no model.
    """
    model_us = _known_model(recording).timestamp_us
    frame = nearest_to(frame_us, model_us)
    frame = frame[np.abs(frame_us[frame] - model_us) <= _SAME_FRAME_US]
    begins_us = frame_us[:-1] % period_us  # the grid ends with the last frame
    shown_us = np.minimum(np.diff(frame_us), min(period_us, max_age_us + 1))
    is_logged = np.isin(np.arange(len(begins_us)), frame)
    seen_from_0 = is_logged[-begins_us % period_us < shown_us]
    if len(seen_from_0) and seen_from_0.mean() > _MOST:
        return 0
    return _busiest_phase_us(begins_us[is_logged], shown_us[is_logged], period_us)


def from_the_camera(path_m: Float32Array) -> Float32Array:
    """Return x and y (n, 33, 2) of a driving model's paths (n, 33, 3), moved along x to begin where the camera is.

    openpilot's plans begin up to 1.5 m behind or before it; driven paths, which they are compared with, begin at it.
    y stays: the model's lanes lie beside it, and moved it is further from where the car went (on the real segment).
    """
    return np.stack([path_m[:, :, 0] - path_m[:, :1, 0], path_m[:, :, 1]], axis=2)


def desire_pulses(log: DesireLog | None, instants_us: Int64Array) -> Int64Array:
    """Return the desire (n,) that began last in the 0.2 s up to each instant, or 0.

    A model is told of a beginning only, once: where the logged desire becomes another than it was and is not none
    (openpilot `modeld.py`, `new_desire`, merged over the frames of a step). What a log begins with began before it.

    Args:
        log: what the driver wanted.
        instants_us: (n,) ascending, of the time grid, whose periods of 0.2 s neither overlap nor leave anything out.
    """
    if log is None:
        return np.zeros(len(instants_us), dtype=np.int64)
    begins = np.flatnonzero((np.diff(log.desire) != 0) & (log.desire[1:] != 0)) + 1
    times_us, pulses = log.timestamp_us[begins], np.zeros(len(instants_us), dtype=np.int64)
    row = np.searchsorted(instants_us, times_us)  # the first instant that is not before
    waited_us = instants_us[np.minimum(row, len(instants_us) - 1)] - times_us
    is_told = (waited_us >= 0) & (waited_us < _STEP_US)
    pulses[row[is_told]] = log.desire[begins][is_told]
    return pulses


def counted(device: DeviceLog | None, timestamp_us: Int64Array, *, calibrated: bool, fix: bool) -> BoolArray:
    """Return which instants (n,) may be learned from and measured; what is not logged is not known.

    Args:
        device: what was logged.
        timestamp_us: (n,) of the instants.
        calibrated: only while the device knew its mount, as it last said.
        fix: only while there was a satellite fix, as the receiver said within the last 2.5 s.
    """
    mount, receiver = (device.mount, device.fix) if device else (None, None)
    counts = np.ones(len(timestamp_us), dtype=bool)
    if calibrated:
        counts &= mount is not None and _as_of(mount.timestamp_us, mount.is_calibrated, timestamp_us)
    if fix:
        counts &= receiver is not None and _as_of(
            receiver.timestamp_us, receiver.has_fix, timestamp_us, within_us=_FIX_LASTS_US
        )
    return counts


def _known_model(recording: Recording) -> LoggedModel:
    if recording.device is None or recording.device.model is None:
        raise DataError(
            f"{recording.id}: its log holds no modelV2; take another teacher, or the rlog in place of a qlog"
        )
    return recording.device.model


def _busiest_phase_us(begins_us: Int64Array, shown_us: Int64Array, period_us: int) -> int:
    """Return the phase that lies in most of n intervals, each from where it begins and so long, modulo the period.

    Of phases that lie in equally many 0 is taken, or else one as far as can be from where intervals begin and end, so
    that their jitter changes nothing.
    """
    edges_us = np.unique(np.concatenate([[0], begins_us, (begins_us + shown_us) % period_us]))
    hits = np.array([((edge_us - begins_us) % period_us < shown_us).sum() for edge_us in edges_us])
    if hits[0] == hits.max():
        return 0
    length_us = np.where(hits == hits.max(), np.diff(edges_us, append=period_us), 0)
    longest = int(length_us.argmax())
    return int(edges_us[longest] + length_us[longest] // 2)


def _as_of(log_us: Int64Array, values: BoolArray, at_us: Int64Array, within_us: int | None = None) -> BoolArray:
    """Return the last value up to each instant; False before the first, and where the last is too old."""
    row = latest_at(log_us, at_us)
    is_known = (row >= 0) & (True if within_us is None else at_us - log_us[row] <= within_us)
    return np.asarray(is_known & values[row])


def _scene(model: LoggedModel, row: Int64Array, is_known: BoolArray) -> Scene:
    def known(values: Float32Array) -> Float32Array:
        mask = is_known.reshape(-1, *[1] * (values.ndim - 1))
        return np.where(mask, values[row], 0).astype(np.float32)

    return Scene(
        is_known,
        known(model.lane_lines_m),
        known(model.lane_line_prob),
        known(model.road_edges_m),
        known(model.lead),
        known(model.lead_prob),
    )
