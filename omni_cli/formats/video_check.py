"""What a video says of itself, and what a decoder says of each of its pictures: for audits, which trust neither.

`read_header` reads the index of a container and no picture: of an mp4 of minutes that is a few kilobytes wherever the
index lies. `examine` decodes everything. A decoder conceals damage: HEVC most of all, where a flipped bit is seldom
seen (measured: 7 of 120), so that nothing here replaces a hash.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats.containers import FileSlice, video_stream
from omni_cli.scene.recording import VideoLocation

THUMB_WIDTH_PX, THUMB_HEIGHT_PX = 36, 32  # nine columns and eight rows of four, for a difference hash
WIDE_FACTOR = 4  # columns of a wide picture in one of a thumb: enough to see small turns in
WIDE_WIDTH_PX = THUMB_WIDTH_PX * WIDE_FACTOR
_SNAPSHOT_WIDTH_PX = 320
_STRICT = {"err_detect": "explode"}  # a decoder that conceals some damage otherwise says so
_REMEDY = "check the file or fetch it again"


@dataclass(frozen=True)
class VideoHeader:
    """What a container's index and its codec's header say."""

    codec: str
    pixel_format: str
    width_px: int
    height_px: int
    num_frames: int | None  # that are presented; None where the packets must be read to know it
    start_us: int  # time of the first frame by the container's clock
    step_us: npt.NDArray[np.int64]  # (num_frames - 1,) between frames, in the order of decoding


@dataclass(frozen=True)
class Examined:
    """What decoding all of a video gave."""

    pts: tuple[int | None, ...]  # of each frame, in the order of presentation
    thumbs: npt.NDArray[np.uint8]  # (n, THUMB_HEIGHT_PX, THUMB_WIDTH_PX) luma, 16 is black
    wides: npt.NDArray[np.uint8]  # (n, THUMB_HEIGHT_PX, WIDE_WIDTH_PX) luma, of which the thumbs are means
    corrupt: tuple[int, ...]  # frames that the decoder marks as damaged
    sizes: tuple[tuple[int, int, str], ...]  # every (width, height, pixel format) that occurs, in order
    rotation_deg: int  # that a player applies, and omni does not
    error: str  # that ended the decoding; empty where it came to the end
    concealed: str  # that only a strict decoder tells


def as_stream(video: bytes | VideoLocation) -> io.BytesIO | FileSlice:
    """Return a video as a file that can be sought in; the caller closes it."""
    return io.BytesIO(video) if isinstance(video, bytes) else FileSlice(video)


def read_header(content: bytes | VideoLocation, name: str) -> VideoHeader:
    """Read the index and the headers of a video; of an mp4 that is all that is read.

    Args:
        content: the video.
        name: what to call it in an error.

    Raises:
        DataError: it is not a readable video.
    """
    try:
        with as_stream(content) as stream, av.open(stream, "r", metadata_errors="ignore") as container:
            video = video_stream(container, name)
            codec = video.codec_context
            base = video.time_base or Fraction(1)
            entries = [entry for entry in video.index_entries or () if not entry.is_discard]
            times = np.array([round(entry.timestamp * base * 1_000_000) for entry in entries], dtype=np.int64)
            is_plain = bool(entries) and entries[0].is_keyframe and not codec.has_b_frames
            return VideoHeader(
                codec=codec.name,
                pixel_format=str(codec.pix_fmt),
                width_px=codec.width,
                height_px=codec.height,
                num_frames=len(entries) if is_plain else None,
                start_us=round((video.start_time or 0) * base * 1_000_000),
                step_us=np.diff(times),
            )
    except av.FFmpegError as error:
        raise DataError(f"{name}: not a readable video ({error.strerror}); {_REMEDY}") from None


def examine(content: bytes, name: str) -> Examined:
    """Decode every frame, once as a strict decoder, and again as every later stage does where that fails.

    Args:
        content: the video file.
        name: what to call it in an error.

    Raises:
        DataError: it is not a readable video.
    """
    strict = _examined(content, name, _STRICT)
    if not strict.error:
        return strict
    lenient = _examined(content, name, {})
    return lenient if lenient.error else replace(lenient, concealed=strict.error)


def _examined(content: bytes, name: str, options: dict[str, str]) -> Examined:
    pts: list[int | None] = []
    wides: list[npt.NDArray[np.uint8]] = []
    corrupt: list[int] = []
    sizes: dict[tuple[int, int, str], None] = {}
    rotation_deg, error, scaler = 0, "", _Scaler()
    try:
        for number, frame in enumerate(_frames(content, name, options)):
            pts.append(frame.pts)
            sizes[frame.width, frame.height, frame.format.name] = None
            wides.append(scaler.wide(frame))
            rotation_deg = rotation_deg or int(frame.rotation)
            if frame.is_corrupt:
                corrupt.append(number)
    except av.FFmpegError as failure:
        error = f"{failure.strerror} after {len(pts)} frames"
    pictures = np.array(wides, dtype=np.uint8).reshape(-1, THUMB_HEIGHT_PX, WIDE_WIDTH_PX)
    told = (tuple(corrupt), tuple(sizes), rotation_deg, error)
    return Examined(tuple(pts), _thumbs(pictures), pictures, *told, concealed="")


def _thumbs(wides: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the rounded means of each `WIDE_FACTOR` columns."""
    columns = wides.reshape(-1, THUMB_HEIGHT_PX, THUMB_WIDTH_PX, WIDE_FACTOR)
    return np.asarray((columns.sum(axis=3, dtype=np.uint16) + WIDE_FACTOR // 2) // WIDE_FACTOR, dtype=np.uint8)


def _frames(content: bytes, name: str, options: dict[str, str]) -> Iterator[av.VideoFrame]:
    with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
        stream = video_stream(container, name)
        stream.thread_type = "NONE"
        stream.codec_context.options = options
        yield from container.decode(stream)


class _Scaler:
    """Makes the small luma picture of a frame; a stream may change its size in the middle."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int, str], av.filter.Graph] = {}

    def wide(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        graph = self._graph(frame)
        graph.push(frame)
        plane = graph.vpull().planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return rows[:THUMB_HEIGHT_PX, :WIDE_WIDTH_PX].copy()

    def _graph(self, frame: av.VideoFrame) -> av.filter.Graph:
        key = (frame.width, frame.height, frame.format.name)
        if key not in self._graphs:
            graph = av.filter.Graph()
            source = graph.add_buffer(width=key[0], height=key[1], format=key[2], time_base=Fraction(1, 1000))
            scale = graph.add("scale", f"{WIDE_WIDTH_PX}:{THUMB_HEIGHT_PX}:flags=area+bitexact:out_range=limited")
            graph.link_nodes(source, scale, graph.add("format", "yuv420p"), graph.add("buffersink")).configure()
            self._graphs[key] = graph
        return self._graphs[key]


def snapshots(content: VideoLocation, name: str, shares: tuple[float, ...]) -> list[npt.NDArray[np.uint8]]:
    """Return the pictures (height, width, 3) RGB at the keyframes before some shares of a video; fewer where it fails.

    Args:
        content: the video.
        name: what to call it in an error.
        shares: of its duration.

    Raises:
        DataError: it is not a readable video.
    """
    pictures = []
    try:
        with as_stream(content) as stream, av.open(stream, "r", metadata_errors="ignore") as container:
            video = video_stream(container, name)
            video.thread_type = "NONE"
            for share in shares:
                if video.duration:  # a raw stream has none, and shows its beginning
                    container.seek(round((video.start_time or 0) + share * video.duration), stream=video)
                frame = next(container.decode(video))
                height = max(round(_SNAPSHOT_WIDTH_PX * frame.height / frame.width), 1)
                pictures.append(frame.to_ndarray(format="rgb24", width=_SNAPSHOT_WIDTH_PX, height=height))
    except StopIteration:
        return pictures
    except av.FFmpegError as error:
        if not pictures:
            raise DataError(f"{name}: not a readable video ({error.strerror}); {_REMEDY}") from None
    return pictures
