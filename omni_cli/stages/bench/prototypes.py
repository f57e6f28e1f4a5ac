"""The same pictures made as the prototypes that omni grew from made them: what `omni bench etl` is compared with.

Every wanted frame becomes a full-size RGB array, Pillow scales it, each window's pictures are tiled anew, and every
window is a file of its own, with its own copy of the pictures that it shares with others.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from omni_cli.files import commit
from omni_cli.formats.containers import open_container, video_stream
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording

Pictures = Mapping[int, Uint8Array]  # by frame


def write_windows(recording: Recording, preprocess: TiledPreprocess, windows: pa.Table, folder: Path) -> None:
    """Make and write the canvases of every window.

    Args:
        recording: with the cameras of `preprocess`, each of one video.
        preprocess: cameras, canvas, decoder.
        windows: of the recording, as etl makes them.
        folder: where the files go; as whole and as surely on the disk as what etl writes.
    """
    count = len(preprocess.cameras)
    streams = [recording.cameras[name] for name in preprocess.cameras]
    times_us = [np.asarray(row).reshape(-1, count) for row in windows["timestamps_us"].to_pylist()]
    index = [_indices(streams, window_us) for window_us in times_us]
    wanted = [np.unique(np.concatenate([window[:, camera] for window in index])) for camera in range(count)]
    pictures = [_pictures(*of, preprocess) for of in zip(streams, wanted, strict=True)]
    for number, window in enumerate(index):
        instants = [[of[frame] for of, frame in zip(pictures, frames, strict=True)] for frames in window.tolist()]
        canvases = np.stack([preprocess.shown([*map(preprocess.in_cell, seen)]) for seen in instants])
        commit(folder / f"{number}.npy", partial(np.save, arr=canvases))


def _indices(streams: list[CameraStream], window_us: Int64Array) -> Int64Array:
    """Return the frames (instants, cameras) that were seen at these true times."""
    columns = [np.searchsorted(of.timestamp_us, window_us[:, camera]) for camera, of in enumerate(streams)]
    return np.stack(columns, axis=1)


def _pictures(stream: CameraStream, wanted: Int64Array, preprocess: TiledPreprocess) -> Pictures:
    found, frames = {}, set(wanted.tolist())
    with open_container(stream.videos[0]) as container:
        track = video_stream(container, stream.name)
        track.thread_type = "NONE"
        for number, frame in enumerate(container.decode(track)):
            if number in frames:
                found[number] = _scaled(frame, preprocess)
            if len(found) == len(frames):
                return found
    return found


def _scaled(frame: av.VideoFrame, preprocess: TiledPreprocess) -> Uint8Array:
    whole = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return np.asarray(whole.resize(preprocess.fit_in_cell(*whole.size), Image.Resampling.BILINEAR))
