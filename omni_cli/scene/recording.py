"""One drive as a source gives it: where its videos are and when each frame was seen. Nothing is decoded yet."""

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from omni_cli.errors import DataError
from omni_cli.files import sha256_of
from omni_cli.scene.cameras import Calibration
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.driving_log import DeviceLog
from omni_cli.scene.poses import EgoMotion

_BLOCK_BYTES = 1 << 20
_SHOWN = 12  # digits of a hash, for people
COPY_AGAIN = "damaged, delete it and copy it again with omni fetch --from"


@dataclass(frozen=True)
class VideoLocation:
    """A video file, or the bytes of one inside another file (a stored zip member)."""

    path: Path
    offset_bytes: int = 0
    size_bytes: int | None = None  # None: to the end of the file
    num_frames: int | None = None  # that have a time, the first ones; None: each of the camera's times is of this video
    crc32: int | None = None  # of the bytes, where the file around them says it
    sha256: str | None = None  # of a video that is a whole file, where it was noted as it was copied

    def read(self) -> bytes:
        """Return the bytes of the video; those of a whole file are not compared, audit hashes files by itself.

        Raises:
            DataError: they are not those of their CRC-32.
        """
        content = b"".join(self._blocks())
        self._compare(zlib.crc32(content))
        return content

    def check(self) -> None:
        """Read the bytes once, where it is known what they must be: a decoder makes a picture of damaged ones too.

        Raises:
            DataError: they are not those of their CRC-32, or of their hash.
        """
        if self.crc32 is not None:
            self._compare(reduce(lambda crc32, block: zlib.crc32(block, crc32), self._blocks(), 0))
        if self.sha256 is not None:
            require_noted(self.path, sha256_of(self.path), self.sha256)

    @property
    def checksum(self) -> str | int | None:
        """What is known of the bytes without reading them; None where nothing is."""
        return self.crc32 if self.sha256 is None else self.sha256

    def _blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            stream.seek(self.offset_bytes)
            end = os.fstat(stream.fileno()).st_size if self.size_bytes is None else self.offset_bytes + self.size_bytes
            while block := stream.read(min(_BLOCK_BYTES, max(end - stream.tell(), 0))):
                yield block

    def _compare(self, crc32: int) -> None:
        if self.crc32 not in (None, crc32):
            raise DataError(
                f"{self.path}: {self.size_bytes} bytes at {self.offset_bytes} have CRC-32 {crc32:08x}, the directory "
                f"says {self.crc32:08x}: damaged; omni audit --deep --quarantine sets it aside, to be fetched again"
            )


def require_noted(path: Path, sha256: str, noted: str) -> None:
    """Compare the hash of a whole file with the one that was noted as it was copied.

    Raises:
        DataError: they differ.
    """
    if sha256 != noted:
        told = f"have SHA-256 {sha256[:_SHOWN]}.., omni fetch noted {noted[:_SHOWN]}.."
        raise DataError(f"{path}: its {path.stat().st_size} bytes {told}; {COPY_AGAIN}")


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
