"""From one recording to the shard tables of a driving student: packed model frames, and the targets of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa

from omni_cli.errors import DataError
from omni_cli.samples.driven_path import DrivenPaths, driven_paths
from omni_cli.samples.driving_pictures import SeenViews, camera_of_view, seen_views
from omni_cli.samples.frame_batches import frame_batches
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.step_labels import LOG, Labeller, Looks, StepLabels, counted, desire_pulses, logged_phase_us
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.tables import STEP_COLUMNS, ShardTables
from omni_cli.samples.windows import (
    AssignSplit,
    ChosenWindows,
    camera_streams,
    choose_windows,
    frame_rows,
    wanted_frames,
    windows_table,
)
from omni_cli.scene.clock import Int64Array, nearest_to, period_us
from omni_cli.scene.recording import Recording

NOTHING_COUNTS = "no step of it can be learned from or measured"
MAX_PAIR_US = 10_000  # between the exposures of two cameras that a driving model looks at together
UNPAIRED = f"the wide camera has no frame within {MAX_PAIR_US / 1000:g} ms of one of the road's"
_DTYPES = {one.name: one.type.value_type.to_pandas_dtype() for one in STEP_COLUMNS if pa.types.is_list(one.type)}


@dataclass(frozen=True)
class StepFilters:
    """Which steps count; the others are looked at, so that memories are whole, and never learned from or measured."""

    calibrated: bool = False  # only while the device knew its mount
    fix: bool = False  # only while there was a satellite fix


def driving_tables(
    recording: Recording,
    preprocess: ModelFramePreprocess,
    *,
    stride: int,
    max_age_us: int,
    filters: StepFilters,
    label: Labeller,
    assign_split: AssignSplit,
) -> ShardTables:
    """Cut a recording into windows of steps, and ask the teacher about what they look at.

    Windows of which no step is of any use are dropped after that: the teacher remembers what they show. A teacher that
    looks has the frames decoded for it; those that are stored are decoded (again) when they are written, so that the
    pictures of a drive are never all in memory.

    Args:
        recording: with the cameras of `preprocess`, calibrated, and how the car moved.
        preprocess: cameras, warp, time grid.
        stride: instants between the starts of two windows.
        max_age_us: a window with a frame older than this at its instant is dropped.
        filters: which steps count.
        label: the teacher.
        assign_split: (start_us, end_us) of a window -> its split, or None where it belongs to no split.

    Raises:
        DataError: a camera, its calibration, the motion or what the teacher needs is missing, or no window is left.
    """
    chosen, phase_us = _choose(recording, preprocess, stride=stride, max_age_us=max_age_us, assign_split=assign_split)
    seen = seen_views(recording, preprocess, chosen.windows)
    looks = _looks(recording, chosen.windows, seen)
    driven = driven_paths(recording, looks.timestamp_us, camera=preprocess.cameras[0])
    labels = label(recording, looks, driven)
    columns = _per_instant(recording, looks, driven, labels, filters)
    chosen = _of_use(recording.id, chosen, looks, columns)
    kept, of_view = wanted_frames(chosen.windows), camera_of_view(preprocess)
    stored = [of.stored(kept[of_view.index(camera)]) for camera, of in enumerate(seen)]
    steps = [_steps(looks, window) for window in chosen.windows]
    targets: dict[str, Any] = {name: [_flat(name, values[rows]) for rows in steps] for name, values in columns.items()}
    targets["left_hand_traffic"] = np.full(len(steps), looks.is_left_hand_traffic, dtype=np.int32)
    table = windows_table(chosen, frame_rows(chosen.windows, stored), targets, STEP_COLUMNS)
    facts = {"grid_phase_us": str(phase_us), **labels.facts}
    return ShardTables(frame_batches(stored), table, chosen.dropped, facts)


def driving_windows(
    recording: Recording,
    preprocess: ModelFramePreprocess,
    *,
    stride: int,
    max_age_us: int,
    assign_split: AssignSplit,
) -> ChosenWindows:
    """Return the windows that `driving_tables` asks the teacher about; raises as it does, and decodes nothing."""
    chosen, _ = _choose(recording, preprocess, stride=stride, max_age_us=max_age_us, assign_split=assign_split)
    return chosen


def _choose(
    recording: Recording,
    preprocess: ModelFramePreprocess,
    *,
    stride: int,
    max_age_us: int,
    assign_split: AssignSplit,
) -> tuple[ChosenWindows, int]:
    """Return the windows, and the phase of the time grid."""
    phase_us = _grid_phase_us(recording, preprocess, max_age_us)
    chosen = choose_windows(
        recording, preprocess, stride=stride, max_age_us=max_age_us, assign_split=assign_split, phase_us=phase_us
    )
    windows, is_paired = per_view(recording, chosen.windows, preprocess)
    return _only(replace(chosen, windows=windows), is_paired, UNPAIRED), phase_us


def per_view(
    recording: Recording, windows: Sequence[PlannedWindow], preprocess: ModelFramePreprocess
) -> tuple[tuple[PlannedWindow, ...], list[bool]]:
    """Return windows of cameras as ones of views, and whether each can be looked at.

    It cannot where the wide camera has no frame within 10 ms of one of the road's, as where it lost one: openpilot
    would not look either.

    Raises:
        DataError: none can.
    """
    of_views = tuple(_of_views(recording, window, preprocess) for window in windows)
    if (least_us := min(window.max_skew_us for window in of_views)) > MAX_PAIR_US:
        road, wide = preprocess.cameras
        raise DataError(
            f"{recording.id}: in every window {wide} and {road} are {least_us / 1000:.1f} ms apart or more, at most "
            f"{MAX_PAIR_US / 1000:g} ms was expected; look with one camera: --cameras {road}"
        )
    return of_views, [window.max_skew_us <= MAX_PAIR_US for window in of_views]


def _of_views(recording: Recording, window: PlannedWindow, preprocess: ModelFramePreprocess) -> PlannedWindow:
    """Return a window of cameras as one of views: a single camera gives both, a wide one is paired with the road's.

    Two cameras are exposed together, the wide one most often a fraction of a millisecond later: its last frame up to
    the road's time would be the one before.
    """
    road_us = window.timestamp_us[:, 0]
    index, times_us = [window.frame_index[:, 0]], [road_us]
    for camera in preprocess.cameras[1:]:
        own_us = recording.cameras[camera].timestamp_us
        index.append(nearest_to(own_us, road_us))
        times_us.append(own_us[index[-1]])
    of_view = camera_of_view(preprocess)
    return PlannedWindow(
        window.instants_us,
        np.stack([index[camera] for camera in of_view], axis=1),
        np.stack([times_us[camera] for camera in of_view], axis=1),
    )


def _grid_phase_us(recording: Recording, preprocess: ModelFramePreprocess, max_age_us: int) -> int:
    """Return the phase of the time grid: 0, or the one with most labels where only some frames have one."""
    if preprocess.teacher != LOG:
        return 0
    frame_us = camera_streams(recording, preprocess.cameras)[preprocess.cameras[0]].timestamp_us
    return logged_phase_us(recording, frame_us, period_us=period_us(preprocess.rate_hz), max_age_us=max_age_us)


def _looks(recording: Recording, windows: Sequence[PlannedWindow], seen: Sequence[SeenViews]) -> Looks:
    """Return every instant that a window looks at, once."""
    instants_us, first = np.unique(np.concatenate([window.instants_us for window in windows]), return_index=True)
    frames = np.concatenate([window.frame_index for window in windows])[first]
    times_us = np.concatenate([window.timestamp_us for window in windows])[first, 0]
    of_view = [of.frames for of in seen for _ in of.views]
    rows = np.stack([np.searchsorted(mine, frames[:, view]) for view, mine in enumerate(of_view)], axis=1)
    pictures = tuple(ahead for of in seen for ahead in of.ahead())
    device = recording.device
    pulses = desire_pulses(device.desire if device else None, instants_us)
    return Looks(instants_us, times_us, pictures, rows, pulses, bool(device and device.is_right_hand_drive))


def _per_instant(
    recording: Recording, looks: Looks, driven: DrivenPaths, labels: StepLabels, filters: StepFilters
) -> Mapping[str, np.ndarray]:
    """Return the value of every list column at each instant."""
    counts = counted(recording.device, looks.timestamp_us, calibrated=filters.calibrated, fix=filters.fix)
    columns: dict[str, np.ndarray] = {
        "driven_xy_m": driven.xy_m,
        "driven_points": driven.num_points,
        "speed_mps": driven.speed_mps,
        "yaw_rate_radps": driven.yaw_rate_radps,
        "target_xy_m": labels.xy_m,
        "target_points": labels.num_points,
        "desire_pulse": looks.desire_pulse,
        "counts": counts,
    }
    count, scene = len(looks.timestamp_us), labels.scene
    nothing = np.zeros((count, 0))
    names = ("is_known", "lane_lines_m", "lane_line_prob", "road_edges_m", "lead", "lead_prob")
    return columns | {f"scene_{name}": nothing if scene is None else getattr(scene, name) for name in names}


def _steps(looks: Looks, window: PlannedWindow) -> Int64Array:
    """Return which looks the steps of a window end with."""
    return np.searchsorted(looks.instants_us, window.instants_us[1:])


def _of_use(recording_id: str, chosen: ChosenWindows, looks: Looks, columns: Mapping[str, np.ndarray]) -> ChosenWindows:
    """Drop windows to train on without a step to learn from, and the others without one to measure.

    Raises:
        DataError: no window is left.
    """
    counts, target, driven = columns["counts"] > 0, columns["target_points"] > 0, columns["driven_points"] > 0
    teaches, measures = counts & target, counts & (target | driven)
    pairs = zip(chosen.windows, chosen.splits, strict=True)
    is_of_use = [
        bool((teaches if split == "train" else measures)[_steps(looks, window)].any()) for window, split in pairs
    ]
    if not any(is_of_use):
        raise DataError(
            f"{recording_id}: no step can be learned from: of {len(counts)}, {counts.sum()} pass the filters, "
            f"{target.sum()} have a target and {driven.sum()} a path truly driven; expected some that pass and have "
            "one: allow more with sample.require_calibrated and sample.require_fix, or take another drive"
        )
    return _only(chosen, is_of_use, NOTHING_COUNTS)


def _only(chosen: ChosenWindows, is_kept: Sequence[bool], otherwise: str) -> ChosenWindows:
    """Drop the other windows, and count them for a reason."""
    dropped = chosen.dropped if all(is_kept) else {**chosen.dropped, otherwise: is_kept.count(False)}
    return ChosenWindows(tuple(compress(chosen.windows, is_kept)), tuple(compress(chosen.splits, is_kept)), dropped)


def _flat(name: str, values: np.ndarray) -> np.ndarray:
    return values.ravel().astype(_DTYPES[name])
