"""Which frames a model looks at, chosen on one clock from true timestamps.

Instants lie on a grid of integer microseconds. At an instant each camera shows its last frame with timestamp <= t, as
it would in the car. Row numbers of different sensors are never paired: a 30 Hz video and 100 Hz ego motion drift apart
by a second in a second and a half.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from omni_cli.scene.clock import Int64Array, latest_at, period_us

MAX_MOTION_GAP_US = 250_000  # ego motion interpolated over a longer gap would be invented
STALE_FRAME = "a frame is older than the tolerance"
MOTION_GAP = "ego motion has a gap"
OUTSIDE = "cameras and ego motion do not reach over it"


@dataclass(frozen=True)
class PlannedWindow:
    """One window: which frame of which camera stands for which instant."""

    instants_us: Int64Array  # (num_frames,)
    frame_index: Int64Array  # (num_frames, num_cameras) in each camera's video
    timestamp_us: Int64Array  # (num_frames, num_cameras) true time of those frames

    @property
    def start_us(self) -> int:
        """The first instant."""
        return int(self.instants_us[0])

    @property
    def end_us(self) -> int:
        """The last instant."""
        return int(self.instants_us[-1])

    @property
    def max_age_us(self) -> int:
        """Largest (instant - true time)."""
        return int((self.instants_us[:, None] - self.timestamp_us).max())

    @property
    def max_skew_us(self) -> int:
        """Largest spread between cameras at one instant."""
        return int(np.ptp(self.timestamp_us, axis=1).max())


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one recording, and how many were refused for which reason."""

    windows: tuple[PlannedWindow, ...]
    dropped: dict[str, int]


def common_span_us(cameras: Mapping[str, Int64Array], motion_us: Int64Array | None) -> tuple[int, int]:
    """Return the first and the last instant at which every signal is known; the last may lie before the first."""
    signals = [*cameras.values(), *([] if motion_us is None else [motion_us])]
    return max(int(signal[0]) for signal in signals), min(int(signal[-1]) for signal in signals)


def time_grid(first_us: int, last_us: int, rate_hz: float, phase_us: int = 0) -> Int64Array:
    """Return the multiples of the rate's period, each `phase_us` later, inside [first_us, last_us]."""
    period = period_us(rate_hz)
    first, last = -((phase_us - first_us) // period), (last_us - phase_us) // period
    return np.arange(first, last + 1, dtype=np.int64) * period + phase_us


def plan_windows(
    cameras: Mapping[str, Int64Array],
    motion_us: Int64Array | None,
    *,
    rate_hz: float,
    num_frames: int,
    stride: int,
    max_age_us: int,
    phase_us: int = 0,
) -> WindowPlan:
    """Choose the windows of a recording.

    Args:
        cameras: true frame times of each camera, in the order of the tiles; each strictly increasing, not empty.
        motion_us: true times of the ego motion that labels the windows; None where none is needed.
        rate_hz: rate of the time grid.
        num_frames: instants in a window.
        stride: instants between the starts of two windows.
        max_age_us: a window with an older frame is dropped.
        phase_us: of the time grid.
    """
    grid = time_grid(*common_span_us(cameras, motion_us), rate_hz, phase_us)
    index = np.stack([latest_at(times, grid) for times in cameras.values()], axis=1)
    seen = np.stack([times[index[:, k]] for k, times in enumerate(cameras.values())], axis=1)
    windows, dropped = [], Counter[str]()
    for start in range(0, len(grid) - num_frames + 1, stride):
        kept = slice(start, start + num_frames)
        window = PlannedWindow(grid[kept], index[kept], seen[kept])
        if reason := _refusal(window, motion_us, max_age_us):
            dropped[reason] += 1
        else:
            windows.append(window)
    return WindowPlan(tuple(windows), dict(dropped))


def plan_ending_at(
    cameras: Mapping[str, Int64Array],
    motion_us: Int64Array,
    ends_us: Int64Array,
    *,
    rate_hz: float,
    num_frames: int,
    max_age_us: int,
) -> WindowPlan:
    """Choose the windows whose last instants are given (n,), in that order; other arguments as for `plan_windows`."""
    first_us, last_us = common_span_us(cameras, motion_us)
    before_us = np.arange(1 - num_frames, 1, dtype=np.int64) * period_us(rate_hz)
    windows, dropped = [], Counter[str]()
    for instants_us in ends_us[:, None] + before_us:
        if instants_us[0] < first_us or instants_us[-1] > last_us:
            dropped[OUTSIDE] += 1
            continue
        index = np.stack([latest_at(times, instants_us) for times in cameras.values()], axis=1)
        seen = np.stack([times[index[:, k]] for k, times in enumerate(cameras.values())], axis=1)
        window = PlannedWindow(instants_us, index, seen)
        if reason := _refusal(window, motion_us, max_age_us):
            dropped[reason] += 1
        else:
            windows.append(window)
    return WindowPlan(tuple(windows), dict(dropped))


def _refusal(window: PlannedWindow, motion_us: Int64Array | None, max_age_us: int) -> str:
    if window.max_age_us > max_age_us:
        return STALE_FRAME
    if motion_us is not None and largest_gap_us(motion_us, window.start_us, window.end_us) > MAX_MOTION_GAP_US:
        return MOTION_GAP
    return ""


def largest_gap_us(timestamps_us: Int64Array, start_us: int, end_us: int) -> int:
    """Return the largest interval between the samples that interpolation over [start_us, end_us] touches."""
    low = int(np.searchsorted(timestamps_us, start_us, side="right")) - 1
    high = int(np.searchsorted(timestamps_us, end_us, side="left"))
    return int(np.diff(timestamps_us[low : high + 1]).max(initial=0))
