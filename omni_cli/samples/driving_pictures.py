"""Packed pictures of a recording for a driving model, decoded while they are asked for and forgotten behind.

One camera may give both views: it is decoded once for them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from omni_cli.formats.driving_model import PICTURE_SHAPE
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.frame_batches import StoredViews
from omni_cli.samples.model_frames import Sampling
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.model_views import WarpedCamera, warped_camera
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.windows import wanted_frames
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.model_frame import MODEL_VIEWS, ModelView
from omni_cli.scene.recording import Recording

_SIZE_PX = (2 * PICTURE_SHAPE[2], 2 * PICTURE_SHAPE[1])


@dataclass(frozen=True)
class SeenViews:
    """The views that are cut from one camera, and its frames that any window looks at."""

    camera: WarpedCamera
    views: tuple[ModelView, ...]
    frames: Int64Array  # (n,) ascending
    sampling: Sampling

    def pictures(self, only: Int64Array | None = None) -> Iterator[list[Uint8Array]]:
        """Yield the pictures of each frame, or of those few, one a view."""
        for _, pictures in self.camera.frames(self.frames, self.views, self.sampling, only):
            yield pictures

    def stored(self, kept: Int64Array) -> StoredViews:
        """Return what a shard stores of the frames that are kept."""
        names, times_us = tuple(view.name for view in self.views), self.camera.timestamp_us[kept]
        return StoredViews(names, kept, times_us, _SIZE_PX, prod(PICTURE_SHAPE), partial(self.pictures, kept))

    def ahead(self) -> "list[PicturesAhead]":
        """Return for each view its pictures, which must be asked for front to back."""
        decoded = _Decoded(self.pictures(), len(self.views))
        return [PicturesAhead(decoded, view) for view in range(len(self.views))]


class PicturesAhead:
    """The pictures of one view, as an array of them would give some; they must be asked for front to back."""

    def __init__(self, decoded: "_Decoded", view: int) -> None:
        self._decoded, self._view = decoded, view

    def __getitem__(self, rows: Int64Array) -> Uint8Array:
        """Return the pictures (rows, 6, 128, 256) of those frames; no earlier frame may be asked for later."""
        return self._decoded.take(self._view, rows.tolist())


class _Decoded:
    """Pictures by row, kept from when they are decoded until every view was asked for later ones."""

    def __init__(self, pictures: Iterator[list[Uint8Array]], views: int) -> None:
        self._more = enumerate(pictures)
        self._kept: dict[int, list[Uint8Array]] = {}
        self._begins = [0] * views

    def take(self, view: int, rows: Sequence[int]) -> Uint8Array:
        self._begins[view] = min(rows)
        for gone in [row for row in self._kept if row < min(self._begins)]:
            del self._kept[gone]
        while max(rows) not in self._kept:
            self._kept.update([next(self._more)])
        return np.stack([self._kept[row][view] for row in rows])


def camera_of_view(preprocess: ModelFramePreprocess) -> list[int]:
    """Return the number of the camera that each view is cut from: a single camera gives them all."""
    return [min(view, len(preprocess.cameras) - 1) for view in range(len(MODEL_VIEWS))]


def seen_views(
    recording: Recording, preprocess: ModelFramePreprocess, windows: Sequence[PlannedWindow]
) -> list[SeenViews]:
    """Open each camera.

    Args:
        recording: with the cameras of `preprocess`, calibrated.
        preprocess: cameras and warp.
        windows: of views.

    Raises:
        DataError: a camera is not calibrated, or its video is damaged or of another size.
    """
    of_view, wanted, found = camera_of_view(preprocess), wanted_frames(windows), []
    for number, name in enumerate(preprocess.cameras):
        views = [view for view, camera in enumerate(of_view) if camera == number]
        looks = tuple(MODEL_VIEWS[view] for view in views)
        found.append(SeenViews(warped_camera(recording, name), looks, wanted[views[0]], preprocess.sampling))
    return found


def window_pictures(
    recording: Recording, preprocess: ModelFramePreprocess, windows: Sequence[PlannedWindow]
) -> Iterator[Uint8Array]:
    """Yield the pictures (num_frames, views, 6, 128, 256) of each window of views, in order.

    Frames are decoded while they are asked for, and forgotten with the last window that looks at them.
    """
    views = [(of.frames, ahead) for of in seen_views(recording, preprocess, windows) for ahead in of.ahead()]
    for window in windows:
        columns = [
            ahead[np.searchsorted(frames, window.frame_index[:, view])] for view, (frames, ahead) in enumerate(views)
        ]
        yield np.stack(columns, axis=1)
