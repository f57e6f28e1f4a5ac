"""Plain video files, for `omni infer`: times from the container, no ego motion.

Each file's clock starts at its first frame. Several files are taken to start together: nothing in a plain video file
says otherwise.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import video
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation


def open_video(path: Path, camera: str) -> CameraStream:
    """Open one video file as one camera.

    Args:
        path: any container that FFmpeg reads; constant and variable frame rates alike.
        camera: the name that the model knows the view by.

    Returns:
        The stream, with microseconds since its first frame.

    Raises:
        UsageError: there is no such file.
        DataError: it is no video, is empty, or its container has no usable frame times.
    """
    if not path.is_file():
        raise UsageError(f"no video file {path}; give the path of a clip such as clip.mp4")
    info = video.probe(VideoLocation(path), str(path))
    if not info.num_frames:
        raise DataError(f"{path}: holds no frame; check the file")
    if not len(info.pts_us):
        raise DataError(f"{path}: a raw {info.codec} stream has no times; put it into an mp4 or mkv at its true rate")
    if (np.diff(info.pts_us) <= 0).any():
        raise DataError(f"{path}: two frames have the same time; remux the file with its true frame times")
    return CameraStream(camera, (VideoLocation(path),), info.pts_us - info.pts_us[0])


def video_recording(files: Mapping[str, Path]) -> Recording:
    """Open camera name -> video file as one recording whose cameras started together; its id is the first file's stem.

    Raises:
        UsageError: no file was given, or one does not exist.
        DataError: one is no video.
    """
    if not files:
        raise UsageError("no video file was given; give one, such as clip.mp4")
    cameras = {camera: open_video(path, camera) for camera, path in files.items()}
    first = next(iter(files.values()))
    provenance = {camera: str(path) for camera, path in files.items()}
    return Recording(id=first.stem, source="video_file", cameras=cameras, provenance=provenance)
