"""From one recording to the two tables of its shard: each picture decoded once, each window with its targets."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from omni_cli.errors import DataError
from omni_cli.formats.video import Uint8Array, decode, probe
from omni_cli.samples.labels import ego_motion_columns, motion_timestamps_us
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.sync import PlannedWindow, common_span_us, plan_windows
from omni_cli.samples.tables import EGO_MOTION_COLUMNS, FRAMES, ShardTables, windows_schema
from omni_cli.samples.tiling import fit_in_cell
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording

AssignSplit = Callable[[int, int], str | None]
BETWEEN_SPLITS = "lies between train and val"


class TableMaker(Protocol):
    """Cuts one recording into windows with targets; `ego_motion_tables` with its settings filled in is one."""

    def __call__(self, recording: Recording, preprocess: Preprocess, *, assign_split: AssignSplit) -> ShardTables:
        """Decode and cut.

        Args:
            recording: with the cameras of `preprocess`.
            preprocess: cameras, canvas, time grid, decoder.
            assign_split: (start_us, end_us) of a window -> its split, or None where it belongs to none.

        Raises:
            DataError: the recording cannot give what is asked for.
        """


def ego_motion_tables(
    recording: Recording,
    preprocess: Preprocess,
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
    streams = camera_streams(recording, preprocess.cameras)
    times = {name: stream.timestamp_us for name, stream in streams.items()}
    plan = plan_windows(
        times,
        motion_timestamps_us(recording),
        rate_hz=preprocess.rate_hz,
        num_frames=preprocess.num_frames,
        stride=stride,
        max_age_us=max_age_us,
    )
    splits = [assign_split(window.start_us, window.end_us) for window in plan.windows]
    kept = [(window, split) for window, split in zip(plan.windows, splits, strict=True) if split is not None]
    dropped = Counter(plan.dropped)
    if outside := len(splits) - len(kept):
        dropped[BETWEEN_SPLITS] = outside
    if not kept:
        raise DataError(f"{recording.id}: no window of {preprocess.num_frames} frames; {_why(dropped, times)}")
    windows = [window for window, _ in kept]
    wanted = _wanted_frames(windows)
    targets = ego_motion_columns(recording, np.array([(w.start_us, w.end_us) for w in windows], dtype=np.int64))
    table = _windows_table(windows, [split for _, split in kept], wanted, targets)
    return ShardTables(_frames_table(recording.id, streams, wanted, preprocess), table, dict(dropped))


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


def _why(dropped: Mapping[str, int], times: Mapping[str, Int64Array]) -> str:
    if dropped:
        return "dropped: " + ", ".join(f"{count} because {reason}" for reason, count in sorted(dropped.items()))
    shortest = min(times, key=lambda name: int(times[name][-1] - times[name][0]))
    length_s = (times[shortest][-1] - times[shortest][0]) / 1e6
    return f"cameras and ego motion overlap too little ({shortest} lasts {length_s:.1f} s); lower --window"


def _wanted_frames(windows: Sequence[PlannedWindow]) -> list[Int64Array]:
    """Return, for each camera, the frames that any window looks at, ascending."""
    index = np.stack([window.frame_index for window in windows])
    return [np.unique(index[:, :, camera]) for camera in range(index.shape[2])]


def _windows_table(
    windows: Sequence[PlannedWindow],
    splits: Sequence[str],
    wanted: Sequence[Int64Array],
    targets: Mapping[str, np.ndarray],
) -> pa.Table:
    first_row = np.concatenate([[0], np.cumsum([len(frames) for frames in wanted])])[:-1]
    columns = {
        "window": np.arange(len(windows), dtype=np.int32),
        "start_us": [window.start_us for window in windows],
        "end_us": [window.end_us for window in windows],
        "split": list(splits),
        "frames": [_frame_rows(window, wanted, first_row) for window in windows],
        "timestamps_us": [window.timestamp_us.ravel() for window in windows],
        "max_age_us": [window.max_age_us for window in windows],
        "max_skew_us": [window.max_skew_us for window in windows],
        **targets,
    }
    return pa.table(columns, schema=windows_schema(EGO_MOTION_COLUMNS))


def _frame_rows(window: PlannedWindow, wanted: Sequence[Int64Array], first_row: Int64Array) -> Int64Array:
    """Return the rows of `frames` that a window looks at, time-major."""
    columns = [np.searchsorted(frames, window.frame_index[:, camera]) for camera, frames in enumerate(wanted)]
    return np.asarray((np.stack(columns, axis=1) + first_row).ravel().astype(np.int32))


def _frames_table(
    recording_id: str, streams: Mapping[str, CameraStream], wanted: Sequence[Int64Array], preprocess: Preprocess
) -> pa.Table:
    parts = [
        _camera_frames(f"{recording_id} {stream.name}", stream, frames, preprocess)
        for stream, frames in zip(streams.values(), wanted, strict=True)
    ]
    return pa.concat_tables(parts)


def _camera_frames(name: str, stream: CameraStream, frames: Int64Array, preprocess: Preprocess) -> pa.Table:
    width, height, decoded = decode_camera(name, stream, frames, preprocess)
    pictures = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for row, (_, picture) in enumerate(decoded):
        pictures[row] = picture
    columns = [
        pa.array([stream.name] * len(frames), pa.string()),
        pa.array(frames, pa.int32()),
        pa.array(stream.timestamp_us[frames], pa.int64()),
        pa.array(np.full(len(frames), width, dtype=np.int32)),
        pa.array(np.full(len(frames), height, dtype=np.int32)),
        _binary_column(pictures),
    ]
    return pa.Table.from_arrays(columns, schema=FRAMES)


def decode_camera(
    name: str, stream: CameraStream, frames: Int64Array, preprocess: Preprocess, *, is_mosaic: bool = False
) -> tuple[int, int, Iterator[tuple[int, Uint8Array]]]:
    """Decode frames of one camera at the size that they have on the canvas.

    Args:
        name: what to call the video in an error.
        stream: the camera.
        frames: indices, ascending and unique.
        preprocess: canvas and decoder.
        is_mosaic: every frame is a whole canvas already, of any size.

    Returns:
        Width and height of the pictures, and (index, picture) one after the other.

    Raises:
        DataError: the video is damaged, or is not as long as its timestamps.
    """
    video = stream.video.read()
    info = probe(video, name)
    if info.num_frames != len(stream.timestamp_us):
        raise DataError(f"{name}: {info.num_frames} frames for {len(stream.timestamp_us)} timestamps; fetch it again")
    width, height = preprocess.canvas_width_px, preprocess.canvas_height_px
    if not is_mosaic:
        width, height = fit_in_cell(info.width_px, info.height_px, preprocess)
    wanted = [int(index) for index in frames]
    decoded = decode(video, name, wanted, width_px=width, height_px=height, decoder=preprocess.decoder, info=info)
    return width, height, decoded


def _binary_column(pictures: np.ndarray) -> pa.Array:
    """Wrap pictures (n, height, width, 3) as n binary values without copying them."""
    size = pictures[0].nbytes
    offsets = np.arange(len(pictures) + 1, dtype=np.int64) * size
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(pictures)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pictures), buffers)
