"""One drive as a source gives it: where its videos are and when each frame was seen. Nothing is decoded yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.driving_log import DeviceLog
from omni_cli.scene.poses import EgoMotion


@dataclass(frozen=True)
class VideoLocation:
    """A video file, or the bytes of one inside another file (a stored zip member)."""

    path: Path
    offset_bytes: int = 0
    size_bytes: int | None = None  # None: to the end of the file
    num_frames: int | None = None  # that have a time, the first ones; None: each of the camera's times is of this video

    def read(self) -> bytes:
        """Return the bytes of the video."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset_bytes)
            return stream.read(-1 if self.size_bytes is None else self.size_bytes)


@dataclass(frozen=True)
class CameraStream:
    """One camera's videos, one after the other, and the true time of each frame, in presentation order over them all.

    Several videos are of one size, and each says its `num_frames`.
    """

    name: str
    videos: tuple[VideoLocation, ...]
    timestamp_us: Int64Array  # (num_frames,) strictly increasing
    calibration: Calibration | None = None


@dataclass(frozen=True)
class SpeedLog:
    """Forward speed and steering where a source has no poses. Steering is left positive."""

    timestamp_us: Int64Array  # (n,) strictly increasing
    speed_mps: Float64Array  # (n,)
    steering_angle_deg: Float64Array  # (n,)


@dataclass(frozen=True)
class Caption:
    """A text about an instant of the recording."""

    timestamp_us: int
    text: str


@dataclass(frozen=True)
class Recording:
    """One drive: what was seen, how the car moved, and where all of it came from."""

    id: str  # never reaches a prompt or a target
    source: str
    cameras: Mapping[str, CameraStream]
    ego: EgoMotion | None = None
    speed: SpeedLog | None = None
    device: DeviceLog | None = None
    captions: tuple[Caption, ...] = ()
    group: str = ""  # drive or place, where the source knows it: recordings of one group share a split
    parts: tuple[str, ...] = ()  # ids of what it was joined of, one a video; each can be set aside without the others
    provenance: Mapping[str, str] = field(default_factory=dict)  # revision, licence, input hashes
