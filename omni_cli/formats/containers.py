"""Video files as they lie: opened wherever their bytes are, and told how many frames a decoder presents of them.

A container lists more frames than a decoder presents: those before the start of an edit list, before the first random
access point of a file that was cut out of a longer one, and pictures that lean on what was cut away. `probe` counts and
times the presented ones alone.
"""

import io
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.scene.recording import VideoLocation

Video = bytes | VideoLocation  # a file's content, or where it lies: then no more than a buffer of it is in memory
_BUFFER = 1 << 18  # bytes asked of a file at once
_TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that say when each packet is shown
_NAL_UNIT = re.compile(rb"\x00\x00\x01(.)", re.DOTALL)
_HEVC_RASL, _HEVC_BLA, _HEVC_IRAP, _HEVC_LAST_SLICE = (8, 9), range(16, 19), range(16, 24), 31  # H.265, table 7-1


@dataclass(frozen=True)
class VideoInfo:
    """What a video presents."""

    codec: str
    width_px: int
    height_px: int
    num_frames: int  # that a decoder presents
    pts: tuple[int, ...]  # (num_frames,) of those, ascending; empty where the container has no times (raw HEVC)
    time_base_s: Fraction  # unit of `pts`
    packet_bytes: tuple[int, ...] = ()  # of a raw stream: how long each packet is, in the order of the file

    @cached_property
    def pts_us(self) -> npt.NDArray[np.int64]:
        """The frames' times; empty where the container has none."""
        unit_us = self.time_base_s * 1_000_000
        return np.array([round(pts * unit_us) for pts in self.pts], dtype=np.int64)


def probe(video: Video, name: str) -> VideoInfo:
    """Read a video's headers and packet times; of one that was cut, decode the first frame: it tells where it begins.

    Args:
        video: the file.
        name: what to call it in an error.

    Raises:
        DataError: it is not a readable video.
    """
    try:
        with _listing(video) as container:
            stream = video_stream(container, name)
            packets = [(p.pts, p.is_keyframe, p.size) for p in container.demux(stream) if p.size and not p.is_discard]
            codec, base = stream.codec_context, stream.time_base or Fraction(1)
            header = codec.name, codec.width, codec.height
        listed = [pts for pts, _, _ in packets]
        if None in listed:
            count = _num_presented_hevc(video, name) if codec.name == "hevc" else len(listed)
            return VideoInfo(*header, count, (), base, tuple(size for _, _, size in packets))
        listed.sort()
        is_cut = bool(listed) and packets[0][:2] != (listed[0], True)  # it does not begin with a keyframe, shown first
        presented = tuple(listed[bisect_left(listed, _first_pts(video, name)) if is_cut else 0 :])
        return VideoInfo(*header, len(presented), presented, base)
    except av.FFmpegError as error:
        raise DataError(f"{name}: not a readable video ({error.strerror}); check the file or fetch it again") from None


@contextmanager
def open_container(video: Video, options: Mapping[str, str] | None = None) -> Iterator[av.container.InputContainer]:
    """Yield a video, opened; of one in a file no more is read at a time than a buffer holds.

    Args:
        video: the file.
        options: of FFmpeg, for what it decodes to learn what the headers do not say.
    """
    source = io.BytesIO(video) if isinstance(video, bytes) else FileSlice(video)
    told = dict(options or {})
    with source as stream, av.open(stream, "r", options=told, metadata_errors="ignore", buffer_size=_BUFFER) as opened:
        yield opened


@contextmanager
def _listing(video: Video) -> Iterator[av.container.InputContainer]:
    """Yield a video whose packets are listed and not decoded.

    FFmpeg decodes seven frames of H.264 to learn in what order they are shown, which takes as long as 1 % of a clip of
    20 s. It is spared that where the container itself says when each packet is shown.
    """
    with open_container(video, {"skip_frame": "all"}) as opened:
        if opened.format.name in _TIMED:
            yield opened
            return
    with open_container(video) as opened:
        yield opened


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """Return a container's first video stream.

    Raises:
        DataError: it has none, or one that FFmpeg cannot decode.
    """
    if not container.streams.video:
        raise DataError(f"{name}: holds no video stream; give a video file such as clip.mp4")
    if container.streams.video[0].codec_context is None:
        raise DataError(f"{name}: is coded in a way that FFmpeg does not know; check the file or fetch it again")
    return container.streams.video[0]


class FileSlice(io.RawIOBase):
    """A file, or a part of one (a stored member of a zip), as a file of its own for reading."""

    def __init__(self, location: VideoLocation) -> None:
        super().__init__()
        self._file = location.path.open("rb", buffering=0)
        self._start, self._at = location.offset_bytes, 0
        rest = max(os.fstat(self._file.fileno()).st_size - self._start, 0)
        self._size = rest if location.size_bytes is None else min(location.size_bytes, rest)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be sought in."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset from the start, the present place, or the end."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most `size`; none at the end."""
        left = max(self._size - self._at, 0)
        content = os.pread(self._file.fileno(), left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(content)
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def presented_hevc(video: Video, name: str) -> Iterator[tuple[av.Packet, bool]]:
    """Yield every packet of a raw HEVC stream that holds a picture, and whether a decoder presents it.

    Such a stream has no times to tell that by. Decoding begins at the first random access picture (IRAP). The leading
    pictures called RASL refer to pictures before theirs: where that is the first, or one at a splice (BLA), they are
    not output (H.265, 8.1.3).
    """
    began, drops_rasl = False, True
    with open_container(video) as container:
        for packet in container.demux(video_stream(container, name)):
            if (kind := _hevc_picture_type(packet)) is None:
                continue
            if kind in _HEVC_IRAP:
                drops_rasl = not began or kind in _HEVC_BLA
                began = True
            yield packet, began and not (drops_rasl and kind in _HEVC_RASL)


def _num_presented_hevc(video: Video, name: str) -> int:
    return sum(is_presented for _, is_presented in presented_hevc(video, name))


def _hevc_picture_type(packet: av.Packet) -> int | None:
    """Return the NAL unit type of a packet's first slice; None where it holds no picture."""
    types = ((unit[1][0] >> 1) & 63 for unit in _NAL_UNIT.finditer(bytes(packet)))
    return next((kind for kind in types if kind <= _HEVC_LAST_SLICE), None)


def _first_pts(video: Video, name: str) -> float:
    """Decode until the first frame; return its time in the stream's unit, infinity where none can be decoded."""
    with open_container(video) as container:
        stream = video_stream(container, name)
        stream.thread_type = "NONE"
        first = next(container.decode(stream), None)
        return math.inf if first is None else first.pts
