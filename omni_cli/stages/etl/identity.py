"""What says that a recording's inputs are the same as before, and how long its work may take."""

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.samples.preprocess import Preprocess
from omni_cli.scene.recording import CameraStream, Recording

OPENING_S = 600.0  # an index, a log and the headers of videos, from a slow disk
_BASE_S = 180.0
_FRAME_S = 0.25  # thirty times what decoding a 1080p frame takes (facts: 120 a second on one core)
_SLOWER = 0.95  # a camera's clock is its own: 9.97 Hz is no mistake


def inputs_of(recording: Recording, preprocess: Preprocess) -> dict[str, Any]:
    """Return what says that these are the same inputs.

    Sizes of the videos and their checksums where one is known, every timestamp and motion sample, and the source's
    provenance (hashes of fetched files).
    """
    return {
        "cameras": {stream.name: _camera_identity(stream) for stream in _streams(recording, preprocess)},
        "motion": _hashes(recording.ego or recording.speed),
        "device": _hashes(recording.device),
        "provenance": dict(recording.provenance),
        "captions": [[caption.timestamp_us, caption.text] for caption in recording.captions],
    }


def allowed_s(recording: Recording, preprocess: Preprocess) -> float:
    """Return how long a healthy worker may take for a recording, on a slow machine too."""
    return _BASE_S + _FRAME_S * sum(len(stream.timestamp_us) for stream in _streams(recording, preprocess))


def slow_cameras(recording: Recording, preprocess: Preprocess) -> dict[str, float]:
    """Return the rate in Hz of each camera that sees less often than windows look: its pictures repeat."""
    steps_us = {
        stream.name: float(np.median(np.diff(stream.timestamp_us)))
        for stream in _streams(recording, preprocess)
        if len(stream.timestamp_us) > 1
    }
    return {name: 1e6 / step for name, step in steps_us.items() if 0 < 1e6 / step < _SLOWER * preprocess.rate_hz}


def _streams(recording: Recording, preprocess: Preprocess) -> list[CameraStream]:
    return [recording.cameras[name] for name in preprocess.cameras if name in recording.cameras]


def _camera_identity(stream: CameraStream) -> list[Any]:
    sizes = [
        video.path.stat().st_size - video.offset_bytes if video.size_bytes is None else video.size_bytes
        for video in stream.videos
    ]
    checksums = [video.checksum for video in stream.videos]
    return [sizes, checksums, _hashes(stream.timestamp_us), _hashes(stream.calibration)]


def _hashes(value: Any) -> Any:
    """Return a value of the scene with every array, at any depth, as its hash."""
    if isinstance(value, Rotation):
        value = value.as_quat()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return [_hashes(getattr(value, part.name)) for part in fields(value)] if is_dataclass(value) else value
