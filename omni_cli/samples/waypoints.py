"""Where the car goes after a window: 64 waypoints to 6.4 s, and the actions that drive them, from true poses.

Poses are interpolated as everywhere (scene/poses.py), and never beyond the log: a window whose future or past is not
known has no waypoints. The frame is the rig's at the window's last instant.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from omni_cli.errors import DataError
from omni_cli.samples.labels import ego_motion_columns
from omni_cli.samples.sync import MAX_MOTION_GAP_US, MOTION_GAP, PlannedWindow, WindowPlan, largest_gap_us
from omni_cli.samples.tables import EGO_MOTION_COLUMNS, WAYPOINT_COLUMNS, ShardTables
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.unicycle import actions_from_path, is_drivable, speed_from_history
from omni_cli.samples.windows import AssignSplit, ChosenWindows, Reach, plan_cameras, split_windows, tiled_tables
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import Recording

WAYPOINT_TARGETS = (*EGO_MOTION_COLUMNS, *WAYPOINT_COLUMNS)
NUM_FUTURE, NUM_HISTORY = 64, 16
STEP_US = 100_000
REACH = Reach(before_us=(NUM_HISTORY - 1) * STEP_US, after_us=NUM_FUTURE * STEP_US)
NO_FUTURE = "the ego motion ends less than 6.4 s after the window"
NO_PAST = "the ego motion begins less than 1.5 s before the window's last instant"
NO_CAR = "the poses leap: no car drives so"
_OFFSETS_US = np.arange(1 - NUM_HISTORY, NUM_FUTURE + 1, dtype=np.int64) * STEP_US


@dataclass(frozen=True)
class Waypoints:
    """The path around one instant, in the rig frame there, and what drives its future."""

    xyz_m: Float64Array  # (80, 3): the history, then the future
    yaw_rad: Float64Array  # (80,) without leaps of a turn
    speed_mps: float  # forward, at the instant
    actions: Float64Array  # (64, 2) acceleration in m/s^2, curvature in 1/m, left positive

    def columns(self) -> dict[str, Any]:
        """Return one value for each of `WAYPOINT_COLUMNS`."""
        history, future = slice(None, NUM_HISTORY), slice(NUM_HISTORY, None)
        return {
            "future_xyz_m": self.xyz_m[future].ravel(),
            "future_yaw_rad": self.yaw_rad[future],
            "history_xyz_m": self.xyz_m[history].ravel(),
            "history_yaw_rad": self.yaw_rad[history],
            "acceleration_mps2": self.actions[:, 0],
            "curvature_per_m": self.actions[:, 1],
            "end_speed_mps": self.speed_mps,
        }


def waypoint_tables(
    recording: Recording, preprocess: TiledPreprocess, *, stride: int, max_age_us: int, assign_split: AssignSplit
) -> ShardTables:
    """Cut a recording into windows with ego motion and waypoints; arguments as for `ego_motion_tables`.

    Raises:
        DataError: a camera or the poses are missing, a video is damaged, or no window is left.
    """
    plan, paths = _plan(recording, preprocess, stride, max_age_us)
    chosen = split_windows(plan, recording, preprocess, assign_split, REACH)

    def targets_at(at_us: int) -> dict[str, Any]:
        return paths[at_us].columns()

    return forecast_tables(recording, preprocess, chosen, targets_at=targets_at)


def waypoint_windows(
    recording: Recording, preprocess: TiledPreprocess, *, stride: int, max_age_us: int, assign_split: AssignSplit
) -> ChosenWindows:
    """Return the windows that `waypoint_tables` makes rows of; raises as it does, and decodes nothing."""
    plan, _ = _plan(recording, preprocess, stride, max_age_us)
    return split_windows(plan, recording, preprocess, assign_split, REACH)


def _plan(
    recording: Recording, preprocess: TiledPreprocess, stride: int, max_age_us: int
) -> tuple[WindowPlan, dict[int, Waypoints]]:
    check_poses(recording)
    plan = plan_cameras(recording, preprocess.cameras, preprocess, stride=stride, max_age_us=max_age_us)
    return with_waypoints(plan, recording)


def forecast_tables(
    recording: Recording,
    preprocess: TiledPreprocess,
    chosen: ChosenWindows,
    *,
    targets_at: Callable[[int], Mapping[str, Any]],
    more: Sequence[pa.Field] = (),
) -> ShardTables:
    """Return the tables of windows, with ego motion over each and targets at its last instant.

    Args:
        recording: with the cameras of `preprocess`, and poses.
        preprocess: cameras, canvas, decoder.
        chosen: the windows.
        targets_at: last instant of a window -> one value for each of `WAYPOINT_COLUMNS` and of `more`.
        more: columns of further targets.

    Raises:
        DataError: a camera is missing, or a video is damaged.
    """
    told = [targets_at(window.end_us) for window in chosen.windows]
    targets: dict[str, Any] = {field.name: [one[field.name] for one in told] for field in (*WAYPOINT_COLUMNS, *more)}
    targets |= ego_motion_columns(recording, chosen.spans_us)
    return tiled_tables(recording, preprocess, chosen, targets, (*WAYPOINT_TARGETS, *more))


def check_poses(recording: Recording) -> EgoMotion:
    """Return the poses of a recording.

    Raises:
        DataError: it has none.
    """
    if recording.ego is None:
        known = "a speed log alone" if recording.speed is not None else "no ego motion"
        raise DataError(
            f"{recording.id}: has {known}; waypoints need poses, choose --labels ego-motion or another source"
        )
    return recording.ego


def with_waypoints(plan: WindowPlan, recording: Recording) -> tuple[WindowPlan, dict[int, Waypoints]]:
    """Return the windows around whose last instant a car's path is known, and that path by its instant.

    Raises:
        DataError: the recording has no poses, or one that is not finite.
    """
    ego = check_poses(recording)
    reasons = {window.end_us: refusal(ego, window.end_us) for window in plan.windows}
    paths = waypoints_at(recording, np.array([end for end, why in reasons.items() if not why], dtype=np.int64))
    reasons |= {end: NO_CAR for end, path in paths.items() if not is_drivable(path.actions)}
    kept = tuple(window for window in plan.windows if not reasons[window.end_us])
    dropped = Counter(plan.dropped)
    dropped.update(reasons[window.end_us] for window in plan.windows if reasons[window.end_us])
    return WindowPlan(kept, dict(dropped)), paths


def known_waypoints(recording: Recording, windows: Sequence[PlannedWindow]) -> list[Waypoints | None]:
    """Return the path around each window's last instant; None where the recording does not know all of it."""
    if recording.ego is None:
        return [None] * len(windows)
    known = [window.end_us for window in windows if not refusal(recording.ego, window.end_us)]
    paths = waypoints_at(recording, np.array(known, dtype=np.int64))
    return [paths.get(window.end_us) for window in windows]


def waypoints_at(recording: Recording, at_us: Int64Array) -> dict[int, Waypoints]:
    """Return the paths around instants (n,), each with 1.5 s of poses before it and 6.4 s after it.

    Raises:
        DataError: a pose is not finite, or there are none.
    """
    ego = check_poses(recording)
    if not len(at_us):
        return {}
    state = ego.at((at_us[:, None] + _OFFSETS_US).ravel()).anchor_T_rig
    position = state.translation_m.reshape(-1, len(_OFFSETS_US), 3)
    anchor_R_rig = state.rotation.as_matrix().reshape(-1, len(_OFFSETS_US), 3, 3)
    if not (np.isfinite(position).all() and np.isfinite(anchor_R_rig).all()):
        raise DataError(f"{recording.id}: poses are not finite; fetch it again or audit it")
    now = NUM_HISTORY - 1
    rig_R_anchor = anchor_R_rig[:, now].transpose(0, 2, 1)
    xyz_m = np.einsum("nij,nkj->nki", rig_R_anchor, position - position[:, now : now + 1])
    turned = np.einsum("nij,nkjl->nkil", rig_R_anchor, anchor_R_rig)
    yaw_rad = np.unwrap(np.arctan2(turned[..., 1, 0], turned[..., 0, 0]), axis=1)
    yaw_rad -= yaw_rad[:, now : now + 1]
    return {at: _waypoints(*path) for at, path in zip(at_us.tolist(), zip(xyz_m, yaw_rad, strict=True), strict=True)}


def refusal(ego: EgoMotion, at_us: int) -> str:
    """Say why the path around an instant is not known; nothing where it is."""
    (first_us, last_us), (begin_us, end_us) = ego.span_us, REACH.around_us(at_us)
    if begin_us < first_us:
        return NO_PAST
    if end_us > last_us:
        return NO_FUTURE
    return MOTION_GAP if largest_gap_us(ego.timestamp_us, begin_us, end_us) > MAX_MOTION_GAP_US else ""


def _waypoints(xyz_m: Float64Array, yaw_rad: Float64Array) -> Waypoints:
    speed_mps = speed_from_history(xyz_m[:NUM_HISTORY, :2], yaw_rad[:NUM_HISTORY])
    actions = actions_from_path(xyz_m[NUM_HISTORY:, :2], yaw_rad[NUM_HISTORY:], speed_mps)
    return Waypoints(xyz_m, yaw_rad, speed_mps, actions)
