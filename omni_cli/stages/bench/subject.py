"""One recording as `omni bench etl` works on it, in every way that is compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omni_cli.formats.containers import probe
from omni_cli.formats.video import Decoder, decode_only
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import frames_path, write_recording
from omni_cli.samples.tables import ShardTables
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.windows import TableMaker
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation
from omni_cli.sources import Source
from omni_cli.stages.bench.prototypes import write_windows

_HARD_HEIGHT_PX, _HARD_BITS_PER_S = 1080, 10e6
_UNIT_KEY = "bench"


@dataclass(frozen=True)
class VideoFacts:
    """What the first camera's first video is."""

    codec: str
    width_px: int
    height_px: int
    bits_per_s: float

    @property
    def is_hard(self) -> bool:
        """Whether it is as hard to decode as what the cars of today record."""
        return self.height_px >= _HARD_HEIGHT_PX and self.bits_per_s >= _HARD_BITS_PER_S

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.codec} {self.width_px}x{self.height_px}, {self.bits_per_s / 1e6:.1f} Mb/s"


@dataclass(frozen=True)
class Subject:
    """A recording, and what becomes of it."""

    recording: Recording
    reader: Source
    preprocess: Preprocess
    maker: TableMaker
    folder: Path  # where it is written
    windows: pa.Table
    num_pictures: int

    @classmethod
    def of(cls, recording: Recording, reader: Source, preprocess: Any, maker: TableMaker, folder: Path) -> "Subject":
        """Cut a recording once, to know what there is to do; nothing is decoded."""
        tables = maker(recording, preprocess, assign_split=_to_train)
        return cls(recording, reader, preprocess, maker, folder, tables.windows, tables.frames.num_rows)

    def open(self) -> Recording:
        """Open the recording, and read its log."""
        return self.reader.open(self.recording.id, self.preprocess.cameras)

    def make(self, recording: Recording) -> ShardTables:
        """Cut it into windows."""
        return self.maker(recording, self.preprocess, assign_split=_to_train)

    def whole(self) -> None:
        """Do all that a worker does: open, plan, decode, scale, write, hash, flush."""
        opened = self.open()
        write_recording(self.folder, opened.id, self.make(opened), _UNIT_KEY)

    def pictures(self) -> None:
        """Do the same without writing."""
        for _ in self.make(self.recording).frames.batches():
            pass

    def decode_alone(self) -> int:
        """Decode as many frames as are wanted, and keep none; return how many."""
        return sum(decode_only(video, name, count) for name, video, count in self._videos())

    @property
    def other_ways(self) -> dict[str, Callable[[], None]]:
        """What else makes such pictures, by name."""
        if not isinstance(self.preprocess, TiledPreprocess):
            return {}
        ways: dict[str, Callable[[], None]] = {}
        if all(len(stream.videos) == 1 for stream in self._streams()):
            ways["the prototypes' way"] = self._as_prototypes
        return ways | {
            "first camera, pyav": lambda: self._first_camera("pyav"),
            "first camera, torchcodec": lambda: self._first_camera("torchcodec"),
        }

    @property
    def stored_bytes(self) -> int:
        """Size of the frames file."""
        return frames_path(self.folder, self.recording.id).stat().st_size

    @property
    def driven_s(self) -> float:
        """How long the drive is that its windows cover."""
        first_us, last_us = self.windows["start_us"][0].as_py(), self.windows["end_us"][-1].as_py()
        return float(last_us - first_us) / MICROSECONDS_PER_SECOND

    @property
    def video(self) -> VideoFacts:
        """What its first camera's first video is."""
        stream = self._streams()[0]
        info, size = probe(stream.videos[0], stream.name), _size_bytes(stream.videos[0])
        period_us = np.ptp(stream.timestamp_us) / max(len(stream.timestamp_us) - 1, 1)
        seconds = period_us * info.num_frames / MICROSECONDS_PER_SECOND
        return VideoFacts(info.codec, info.width_px, info.height_px, float(8 * size / max(seconds, 1e-6)))

    def _streams(self) -> list[CameraStream]:
        return [self.recording.cameras[name] for name in self.preprocess.cameras]

    def _videos(self) -> list[tuple[str, VideoLocation, int]]:
        """Return (camera, video, how many of its frames must be decoded): as many as etl decodes.

        A video that no window looks at is not decoded at all, and of the others nothing after the last such frame.
        """
        seen_us = np.unique(self.windows["timestamps_us"].combine_chunks().flatten().to_numpy())
        found = []
        for stream in self._streams():
            wanted, first = np.flatnonzero(np.isin(stream.timestamp_us, seen_us)), 0
            for video in stream.videos:
                end = first + (len(stream.timestamp_us) if video.num_frames is None else video.num_frames)
                if (last := int(np.searchsorted(wanted, end)) - 1) >= 0 and wanted[last] >= first:
                    found.append((stream.name, video, int(wanted[last]) + 1 - first))
                first = end
        return found

    def _as_prototypes(self) -> None:
        assert isinstance(self.preprocess, TiledPreprocess)
        write_windows(self.recording, self.preprocess, self.windows, self.folder / "prototypes")

    def _first_camera(self, decoder: Decoder) -> None:
        assert isinstance(self.preprocess, TiledPreprocess)
        stream, count = self._streams()[0], len(self.preprocess.cameras)
        times_us = np.unique([row[::count] for row in self.windows["timestamps_us"].to_pylist()])
        camera = camera_frames(stream.name, stream)
        width, height = self.preprocess.fit_in_cell(*camera.size_px)
        wanted = np.searchsorted(stream.timestamp_us, times_us).tolist()
        for _ in camera.decode(wanted, width_px=width, height_px=height, decoder=decoder):
            pass


def _to_train(_start_us: int, _end_us: int) -> str:
    return "train"


def _size_bytes(video: VideoLocation) -> int:
    return video.path.stat().st_size - video.offset_bytes if video.size_bytes is None else video.size_bytes
