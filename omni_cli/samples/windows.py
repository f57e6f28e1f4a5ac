"""From one recording to the two tables of its shard: each picture decoded once, each window with its targets."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from omni_cli.errors import DataError
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.camera_frames import CameraFrames, camera_frames
from omni_cli.samples.frame_batches import StoredViews, frame_batches, row_of_view
from omni_cli.samples.labels import ego_motion_columns, motion_timestamps_us
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.sync import PlannedWindow, WindowPlan, common_span_us, plan_windows
from omni_cli.samples.tables import EGO_MOTION_COLUMNS, ShardTables, windows_schema
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording

AssignSplit = Callable[[int, int], str | None]
BETWEEN_SPLITS = "lies between train and val"


@dataclass(frozen=True)
class ChosenWindows:
    """The windows of one recording that belong to a split, and how many do not count for which reason."""

    windows: tuple[PlannedWindow, ...]
    splits: tuple[str, ...]
    dropped: dict[str, int]

    @property
    def spans_us(self) -> Int64Array:
        """First and last instant of each window (windows, 2)."""
        return np.array([(window.start_us, window.end_us) for window in self.windows], dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Reach:
    """How far labels look around a window's last instant; a window around which less is known is dropped."""

    before_us: int = 0
    after_us: int = 0

    def around_us(self, at_us: int) -> tuple[int, int]:
        """Return the first and the last instant of what they look at."""
        return at_us - self.before_us, at_us + self.after_us


AT_HAND = Reach()  # of labels that tell of the window itself


@dataclass(frozen=True)
class TableMaker:
    """How a recipe cuts one recording into windows with targets: functions of this package, their settings filled in.

    Both take a recording with the cameras of the preprocessing, that preprocessing, and `assign_split`, and raise a
    DataError where the recording cannot give what is asked for.
    """

    choose: Callable[..., ChosenWindows]  # the windows that `cut` makes rows of; nothing is decoded, no teacher asked
    cut: Callable[..., ShardTables]
    reach: Reach = AT_HAND

    def __call__(self, recording: Recording, preprocess: Any, *, assign_split: AssignSplit) -> ShardTables:
        """Decode and cut.

        Args:
            recording: with the cameras of `preprocess`.
            preprocess: the recipe's own kind.
            assign_split: (start_us, end_us) of a window -> its split, or None where it belongs to none.

        Raises:
            DataError: the recording cannot give what is asked for.
        """
        return self.cut(recording, preprocess, assign_split=assign_split)


def ego_motion_tables(
    recording: Recording,
    preprocess: TiledPreprocess,
    *,
    stride: int,
    max_age_us: int,
    assign_split: AssignSplit,
) -> ShardTables:
    """Cut a recording into windows with ego-motion targets, and decode the frames that they look at.

    Args:
        recording: with the cameras of `preprocess` and ego motion.
        preprocess: cameras, canvas, time grid, decoder.
        stride: instants between the starts of two windows.
        max_age_us: a window with a frame older than this at its instant is dropped.
        assign_split: (start_us, end_us) of a window -> its split, or None where it belongs to no split.

    Raises:
        DataError: a camera or the ego motion is missing, a video is damaged, or no window is left.
    """
    chosen = choose_windows(recording, preprocess, stride=stride, max_age_us=max_age_us, assign_split=assign_split)
    targets = ego_motion_columns(recording, chosen.spans_us)
    return tiled_tables(recording, preprocess, chosen, targets, EGO_MOTION_COLUMNS)


def tiled_tables(
    recording: Recording,
    preprocess: TiledPreprocess,
    chosen: ChosenWindows,
    targets: Mapping[str, Any],
    columns: Sequence[pa.Field],
) -> ShardTables:
    """Return the windows, and the frames that they look at, which are decoded when they are asked for.

    Args:
        recording: with the cameras of `preprocess`.
        preprocess: cameras, canvas, decoder.
        chosen: the windows.
        targets: by column, one value a window.
        columns: of the targets.

    Raises:
        DataError: a camera is missing, or a video is damaged.
    """
    streams, wanted = camera_streams(recording, preprocess.cameras), wanted_frames(chosen.windows)
    stored = [
        _stored(f"{recording.id} {stream.name}", stream, frames, preprocess)
        for stream, frames in zip(streams.values(), wanted, strict=True)
    ]
    table = windows_table(chosen, frame_rows(chosen.windows, stored), targets, columns)
    return ShardTables(frame_batches(stored), table, chosen.dropped)


def choose_windows(
    recording: Recording,
    preprocess: Preprocess,
    *,
    stride: int,
    max_age_us: int,
    assign_split: AssignSplit,
    phase_us: int = 0,
) -> ChosenWindows:
    """Choose the windows of a recording and give each its split; arguments as for `ego_motion_tables`.

    The time grid is that of `plan_windows`, with its phase.

    Raises:
        DataError: a camera or the ego motion is missing, or no window is left.
    """
    motion_timestamps_us(recording)  # there are no targets without
    plan = plan_cameras(
        recording, preprocess.cameras, preprocess, stride=stride, max_age_us=max_age_us, phase_us=phase_us
    )
    return split_windows(plan, recording, preprocess, assign_split)


def split_windows(
    plan: WindowPlan,
    recording: Recording,
    preprocess: Preprocess,
    assign_split: AssignSplit,
    reach: Reach = AT_HAND,
) -> ChosenWindows:
    """Give each planned window its split; arguments as for `choose_windows`.

    What its labels reach belongs to a window, and so decides its split, too.

    Raises:
        DataError: no window is left.
    """
    spans_us = [(window.start_us, *reach.around_us(window.end_us)) for window in plan.windows]
    splits = [assign_split(min(start_us, first_us), last_us) for start_us, first_us, last_us in spans_us]
    kept = [(window, split) for window, split in zip(plan.windows, splits, strict=True) if split is not None]
    dropped = Counter(plan.dropped)
    if outside := len(splits) - len(kept):
        dropped[BETWEEN_SPLITS] = outside
    if not kept:
        why = _why(dropped, recording, preprocess.cameras)
        raise DataError(f"{recording.id}: no window of {preprocess.num_frames} frames; {why}")
    return ChosenWindows(tuple(window for window, _ in kept), tuple(split for _, split in kept), dict(dropped))


def plan_cameras(
    recording: Recording,
    cameras: Sequence[str],
    preprocess: Preprocess,
    *,
    stride: int,
    max_age_us: int,
    phase_us: int = 0,
) -> WindowPlan:
    """Choose the windows in which all these cameras see, and the motion is known if any of it is; else as above.

    Raises:
        DataError: a camera is missing.
    """
    streams = camera_streams(recording, cameras)
    motion = recording.ego or recording.speed
    return plan_windows(
        {name: stream.timestamp_us for name, stream in streams.items()},
        None if motion is None else motion.timestamp_us,
        rate_hz=preprocess.rate_hz,
        num_frames=preprocess.num_frames,
        stride=stride,
        max_age_us=max_age_us,
        phase_us=phase_us,
    )


def span_us(recording: Recording, cameras: Sequence[str]) -> tuple[int, int]:
    """Return the first and the last instant at which all these cameras and the ego motion are known.

    Raises:
        DataError: a camera or the ego motion is missing.
    """
    times = {name: stream.timestamp_us for name, stream in camera_streams(recording, cameras).items()}
    return common_span_us(times, motion_timestamps_us(recording))


def camera_streams(recording: Recording, cameras: Sequence[str]) -> dict[str, CameraStream]:
    """Return the streams of the named cameras, in that order.

    Raises:
        DataError: one is missing or has no frame.
    """
    if missing := [name for name in cameras if name not in recording.cameras]:
        raise DataError(f"{recording.id}: lacks {', '.join(missing)}; fetch them, or choose others with --cameras")
    streams = {name: recording.cameras[name] for name in cameras}
    if empty := [name for name, stream in streams.items() if not len(stream.timestamp_us)]:
        raise DataError(f"{recording.id}: {', '.join(empty)} has no frame; fetch it again")
    return streams


def _why(dropped: Mapping[str, int], recording: Recording, cameras: Sequence[str]) -> str:
    times = {name: recording.cameras[name].timestamp_us for name in cameras}
    if dropped:
        return "dropped: " + ", ".join(f"{count} because {reason}" for reason, count in sorted(dropped.items()))
    shortest = min(times, key=lambda name: int(times[name][-1] - times[name][0]))
    length_s = (times[shortest][-1] - times[shortest][0]) / 1e6
    return f"cameras and ego motion overlap too little ({shortest} lasts {length_s:.1f} s); lower --window"


def wanted_frames(windows: Sequence[PlannedWindow]) -> list[Int64Array]:
    """Return, for each camera, the frames that any window looks at, ascending."""
    index = np.stack([window.frame_index for window in windows])
    return [np.unique(index[:, :, camera]) for camera in range(index.shape[2])]


def windows_table(
    chosen: ChosenWindows, frames: Sequence[Int64Array], targets: Mapping[str, Any], columns: Sequence[pa.Field]
) -> pa.Table:
    """Return the windows of one recording.

    Args:
        chosen: the windows.
        frames: of each window the rows of the frames table, time-major.
        targets: by column, one value a window.
        columns: of the targets.
    """
    windows = chosen.windows
    values = {
        "window": np.arange(len(windows), dtype=np.int32),
        "start_us": [window.start_us for window in windows],
        "end_us": [window.end_us for window in windows],
        "split": list(chosen.splits),
        "frames": list(frames),
        "timestamps_us": [window.timestamp_us.ravel() for window in windows],
        "max_age_us": [window.max_age_us for window in windows],
        "max_skew_us": [window.max_skew_us for window in windows],
        **targets,
    }
    return pa.table(values, schema=windows_schema(tuple(columns)))


def frame_rows(windows: Sequence[PlannedWindow], stored: Sequence[StoredViews]) -> list[Int64Array]:
    """Return for each window the rows of the frames table in which `stored` lies, time-major."""
    frames = [of.frame_index for of in stored for _ in of.names]
    views = list(enumerate(zip(frames, row_of_view(stored), strict=True)))
    found = []
    for window in windows:
        columns = [rows[np.searchsorted(index, window.frame_index[:, view])] for view, (index, rows) in views]
        found.append(np.stack(columns, axis=1).ravel())
    return found


def _stored(name: str, stream: CameraStream, frames: Int64Array, preprocess: TiledPreprocess) -> StoredViews:
    camera = camera_frames(name, stream)

    def decode() -> Iterator[tuple[Uint8Array]]:
        return ((cell,) for _, cell in decode_cells(camera, frames, preprocess))

    size_px, size = (preprocess.cell_width_px, preprocess.cell_height_px), prod(preprocess.picture_shape)
    return StoredViews((stream.name,), frames, stream.timestamp_us[frames], size_px, size, decode)


def decode_cells(
    camera: CameraFrames, frames: Int64Array, preprocess: TiledPreprocess
) -> Iterator[tuple[int, Uint8Array]]:
    """Yield (index, cell (cell height, cell width, 3)) of frames of one camera.

    Args:
        camera: whose frames.
        frames: indices, ascending and unique.
        preprocess: canvas and decoder.

    Raises:
        DataError: a video is damaged.
    """
    width, height = preprocess.fit_in_cell(*camera.size_px)
    decoded = camera.decode(frames.tolist(), width_px=width, height_px=height, decoder=preprocess.decoder)
    return ((index, preprocess.in_cell(picture)) for index, picture in decoded)
