"""Windows of a recording that no shard holds, for a model to be asked about: the same instants, pictures and tiles.

Pictures are decoded while they are asked for, front to back, and forgotten with the last window that looks at them, so
that an hour of video needs no more memory than a minute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_cli.errors import DataError
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.labels import ego_motion_columns
from omni_cli.samples.sync import PlannedWindow, WindowPlan
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.windows import camera_streams, decode_cells, plan_cameras
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording

MOSAIC = "mosaic"  # the one camera of a recording whose frames are whole canvases


def plan_views(recording: Recording, preprocess: TiledPreprocess, *, stride: int, max_age_us: int) -> WindowPlan:
    """Choose the windows of a recording, exactly as `etl` does where its ego motion is known.

    Args:
        recording: with the cameras of `preprocess`, or with a mosaic.
        preprocess: cameras and time grid.
        stride: instants between the starts of two windows.
        max_age_us: a window with a frame older than this at its instant is dropped.

    Raises:
        DataError: a camera is missing, or no window is left.
    """
    cameras = _cameras(recording, preprocess)
    plan = plan_cameras(recording, cameras, preprocess, stride=stride, max_age_us=max_age_us)
    if not plan.windows:
        dropped = "; ".join(f"{count} dropped: {reason}" for reason, count in plan.dropped.items())
        times = [recording.cameras[name].timestamp_us for name in cameras]
        length_s = min((one[-1] - one[0]) / 1e6 for one in times)
        needed = f"{preprocess.num_frames} frames at {preprocess.rate_hz:g} Hz"
        raise DataError(f"{recording.id}: {length_s:.1f} s hold no window of {needed}{dropped and f' ({dropped})'}")
    return plan


def has_motion(recording: Recording) -> bool:
    """Say whether it is known how the car moved."""
    return recording.ego is not None or recording.speed is not None


def known_motion(recording: Recording, windows: Sequence[PlannedWindow]) -> list[dict[str, float]]:
    """Return the ego-motion columns of each window; empty tables where the recording does not know them."""
    if not has_motion(recording):
        return [{} for _ in windows]
    spans = np.array([(window.start_us, window.end_us) for window in windows], dtype=np.int64)
    columns = ego_motion_columns(recording, spans)
    return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(windows))]


def tiled_pictures(
    recording: Recording, preprocess: TiledPreprocess, windows: Sequence[PlannedWindow]
) -> Iterator[Uint8Array]:
    """Yield the pictures (num_frames, cameras, cell height, cell width, 3) of each window, in order.

    Args:
        recording: with the cameras of `preprocess`, or with a mosaic.
        preprocess: cameras, canvas, decoder.
        windows: of `plan_views`.

    Raises:
        DataError: a video is damaged.
    """
    streams = camera_streams(recording, _cameras(recording, preprocess))
    index = np.stack([window.frame_index for window in windows])
    readers = [
        _reader(recording.id, stream, np.unique(index[:, :, camera]), preprocess)
        for camera, stream in enumerate(streams.values())
    ]
    for window in windows:
        for reader, first in zip(readers, window.frame_index[0], strict=True):
            reader.forget_before(int(first))
        yield np.stack([_instant(readers, frames) for frames in window.frame_index.tolist()])


def _instant(readers: Sequence["_Reader"], frames: Sequence[int]) -> Uint8Array:
    return np.concatenate([reader.cells(frame) for reader, frame in zip(readers, frames, strict=True)])


def _cameras(recording: Recording, preprocess: TiledPreprocess) -> tuple[str, ...]:
    return (MOSAIC,) if MOSAIC in recording.cameras else preprocess.cameras


def _reader(recording_id: str, stream: CameraStream, frames: Int64Array, preprocess: TiledPreprocess) -> "_Reader":
    camera = camera_frames(f"{recording_id} {stream.name}", stream)
    if stream.name != MOSAIC:
        return _Reader((index, cell[None]) for index, cell in decode_cells(camera, frames, preprocess))
    height, width, _ = preprocess.canvas_shape
    canvases = camera.decode(frames.tolist(), width_px=width, height_px=height, decoder=preprocess.decoder)
    return _Reader((index, preprocess.cut(canvas)) for index, canvas in canvases)


@dataclass
class _Reader:
    """The cells that each frame of a video fills, kept from when it is decoded until it is forgotten."""

    decoded: Iterator[tuple[int, Uint8Array]]
    kept: dict[int, Uint8Array] = field(default_factory=dict)

    def cells(self, frame: int) -> Uint8Array:
        while frame not in self.kept:
            index, cells = next(self.decoded)
            self.kept[index] = cells
        return self.kept[frame]

    def forget_before(self, frame: int) -> None:
        self.kept = {index: cells for index, cells in self.kept.items() if index >= frame}
