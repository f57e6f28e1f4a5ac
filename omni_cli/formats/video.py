"""Video in and out, behind one small seam.

Frames are named by their *index in presentation order*; their times come from the source's own timestamps, never from
a frame rate. A container lists more frames than a decoder presents: those before the start of an edit list, before the
first random access point of a file that was cut out of a longer one, and pictures that lean on what was cut away.
`probe` counts and times the presented ones alone, and `decode` tells a frame by its time, not by its turn.

Two decoders, the same frames: PyAV (default: measured faster on a CPU for whole clips) and torchcodec in exact mode
(exact random access; its approximate mode returns wrong frames, silently, and is never used). Each scales in its own
way, so the decoder is part of the preprocessing that a shard, a run and an inference share.
"""

import io
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import BinaryIO, Literal, TypeVar

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats import ffmpeg

Decoder = Literal["pyav", "torchcodec"]
Uint8Array = npt.NDArray[np.uint8]
Planes = tuple[Uint8Array, Uint8Array, Uint8Array]  # Y (height, width), U and V of half the size, rounded up
_Picture = TypeVar("_Picture", Uint8Array, Planes)
_SCALE_FLAGS = "area+accurate_rnd+full_chroma_int+bitexact"
_TO_BT601 = "out_range=limited:out_color_matrix=bt601"
_BT601_OR_UNSPECIFIED = (5, 6, 2)  # AVColorSpace; FFmpeg too takes what is unspecified for BT.601
_FULL_RANGE = 2  # AVColorRange
_SAME_TIME_S = 1e-6
_USE_PYAV = "check the file, or decode it with: --set sample.decoder=pyav"
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


def probe(video: bytes, name: str) -> VideoInfo:
    """Read a video's headers and packet times; of one that was cut, decode the first frame: it tells where it begins.

    Args:
        video: the file's content.
        name: what to call it in an error.

    Raises:
        DataError: it is not a readable video.
    """
    try:
        with _open(video) as container:
            stream = _video_stream(container, name)
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


def decode(
    video: bytes,
    name: str,
    indices: Sequence[int],
    *,
    width_px: int,
    height_px: int,
    decoder: Decoder = "pyav",
    info: VideoInfo | None = None,
) -> Iterator[tuple[int, Uint8Array]]:
    """Yield (index, picture) for each wanted frame, in ascending order, scaled to the given size.

    Args:
        video: the file's content.
        name: what to call it in an error.
        indices: frames in presentation order, ascending and unique.
        width_px: width of the pictures.
        height_px: height of the pictures.
        decoder: which library decodes and scales.
        info: what `probe` said of this video, where it was asked before.

    Yields:
        The index and a (height, width, 3) uint8 RGB picture.

    Raises:
        DataError: the video is damaged, or ends before the last wanted frame.
    """
    info, size_px = info or probe(video, name), (width_px, height_px)
    if decoder == "torchcodec":
        yield from _decode_torchcodec(video, name, info, indices, size_px)
    else:
        yield from _decode_pyav(video, name, info, indices, partial(_to_rgb, size_px=size_px))


def decode_yuv(
    video: bytes, name: str, indices: Sequence[int], info: VideoInfo | None = None
) -> Iterator[tuple[int, Planes]]:
    """Yield (index, planes) for each wanted frame, in ascending order and at the video's own size.

    The planes are YUV 4:2:0 in BT.601 limited range. Frames that are coded so, or do not say otherwise, come out as
    they were coded, bit for bit; of others (4:4:4, ten bits, RGB, full range, BT.709) the scaler makes such planes.

    Args:
        video: the file's content.
        name: what to call it in an error.
        indices: frames in presentation order, ascending and unique.
        info: what `probe` said of this video, where it was asked before.

    Yields:
        The index and (y, u, v): uint8 (height, width), and twice (ceil(height / 2), ceil(width / 2)).

    Raises:
        DataError: the video is damaged, or ends before the last wanted frame.
    """
    yield from _decode_pyav(video, name, info or probe(video, name), indices, _to_planes)


def decode_only(video: bytes, name: str) -> int:
    """Decode every frame in one thread and keep none; return how many: what the codec alone costs.

    Raises:
        DataError: the video is damaged.
    """
    try:
        with _open(video) as container:
            stream = _video_stream(container, name)
            stream.thread_type = "NONE"
            return sum(1 for _ in container.decode(stream))
    except av.FFmpegError as error:
        raise DataError(f"{name}: decoding failed ({error.strerror}); check the file or fetch it again") from None


def decoder_id(decoder: Decoder) -> str:
    """Return the name and version of the library that decodes: part of a shard's identity."""
    libraries = av.library_versions["libavcodec"], av.library_versions["libswscale"]
    version = ".".join(map(str, libraries[0])) + "/" + ".".join(map(str, libraries[1]))
    return f"pyav-{av.__version__}-{version}" if decoder == "pyav" else f"torchcodec-{ffmpeg.torchcodec_version()}"


def encode_h264(
    stream: BinaryIO,
    frames: Iterable[Uint8Array],
    *,
    rate_hz: Fraction,
    crf: int = 23,
    gop: int = 30,
    preset: str = "veryfast",
) -> int:
    """Write (height, width, 3) uint8 RGB frames as an H.264 mp4; return how many.

    One thread, bit-exact flags and no creation time: the same frames give the same bytes on one machine and pin set,
    though of 2000 clips written under load 5 and 9 differed by a block or two (seen twice, not yet explained).
    """
    count = 0
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        track = None
        for picture in frames:
            if track is None:
                track = container.add_stream("libx264", rate=rate_hz)
                track.height, track.width = picture.shape[0], picture.shape[1]
                track.pix_fmt, track.thread_count = "yuv420p", 1
                track.options = {"preset": preset, "crf": str(crf), "flags": "+bitexact", "bf": "0", "g": str(gop)}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate_hz
            container.mux(track.encode(frame))
            count += 1
        if track is not None:
            container.mux(track.encode(None))
    return count


def _open(video: bytes) -> av.container.InputContainer:
    return av.open(io.BytesIO(video), "r", metadata_errors="ignore")


def _video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    if not container.streams.video:
        raise DataError(f"{name}: holds no video stream; give a video file such as clip.mp4")
    return container.streams.video[0]


def _first_pts(video: bytes, name: str) -> float:
    """Decode until the first frame; return its time in the stream's unit, infinity where none can be decoded."""
    with _open(video) as container:
        stream = _video_stream(container, name)
        stream.thread_type = "NONE"
        first = next(container.decode(stream), None)
        return math.inf if first is None else first.pts


def _num_presented_hevc(video: bytes, name: str) -> int:
    """Count the pictures that a decoder presents of a raw HEVC stream, which has no times to tell them by.

    Decoding begins at the first random access picture (IRAP). The leading pictures called RASL refer to pictures before
    theirs: where that is the first, or one at a splice (BLA), they are not output (H.265, 8.1.3).
    """
    count, began, drops_rasl = 0, False, True
    with _open(video) as container:
        for kind in map(_hevc_picture_type, container.demux(_video_stream(container, name))):
            if kind in _HEVC_IRAP:
                drops_rasl = not began or kind in _HEVC_BLA
                began = True
            count += kind is not None and began and not (drops_rasl and kind in _HEVC_RASL)
    return count


def _hevc_picture_type(packet: av.Packet) -> int | None:
    """Return the NAL unit type of a packet's first slice; None where it holds no picture."""
    types = ((unit[1][0] >> 1) & 63 for unit in _NAL_UNIT.finditer(bytes(packet)))
    return next((kind for kind in types if kind <= _HEVC_LAST_SLICE), None)


def _decode_pyav(
    video: bytes,
    name: str,
    info: VideoInfo,
    indices: Sequence[int],
    converter: Callable[[av.VideoStream], Callable[[av.VideoFrame], _Picture]],
) -> Iterator[tuple[int, _Picture]]:
    wanted = iter(indices)
    target = next(wanted, None)
    try:
        with _open(video) as container:
            stream = _video_stream(container, name)
            stream.thread_type = "NONE"
            picture_of = converter(stream)
            for position, frame in _numbered(container.decode(stream), info, name):
                if target is None:
                    return
                if position > target:
                    raise DataError(f"{name}: frame {target} is listed but cannot be decoded; fetch the file again")
                if position == target:
                    if frame.is_corrupt:
                        raise DataError(f"{name}: frame {position} is damaged; fetch the file again")
                    yield position, picture_of(frame)
                    target = next(wanted, None)
    except av.FFmpegError as error:
        raise DataError(f"{name}: decoding failed ({error.strerror}); check the file or fetch it again") from None
    if target is not None:
        raise DataError(f"{name}: ends before frame {target}; the video is shorter than its timestamps")


def _numbered(frames: Iterable[av.VideoFrame], info: VideoInfo, name: str) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame): by the frame's time, or in turn where the container has no times."""
    index_of = {pts: index for index, pts in enumerate(info.pts)}
    for turn, frame in enumerate(frames):
        if info.pts and frame.pts not in index_of:
            raise DataError(f"{name}: decodes to a frame that its container does not list; encode the video anew")
        yield (index_of[frame.pts] if info.pts else turn), frame


def _to_rgb(stream: av.VideoStream, size_px: tuple[int, int]) -> Callable[[av.VideoFrame], Uint8Array]:
    scaled = _scaler(stream, "rgb24", f"{size_px[0]}:{size_px[1]}:flags={_SCALE_FLAGS}")
    return lambda frame: scaled(frame).to_ndarray(format="rgb24")


def _to_planes(stream: av.VideoStream) -> Callable[[av.VideoFrame], Planes]:
    converted = _scaler(stream, "yuv420p", f"{stream.width}:{stream.height}:{_TO_BT601}:flags={_SCALE_FLAGS}")
    return lambda frame: _planes(frame if _is_plain_yuv(frame) else converted(frame))


def _is_plain_yuv(frame: av.VideoFrame) -> bool:
    is_bt601 = frame.color_range != _FULL_RANGE and frame.colorspace in _BT601_OR_UNSPECIFIED
    return frame.format.name == "yuv420p" and is_bt601


def _planes(frame: av.VideoFrame) -> Planes:
    """Copy the planes of a yuv420p frame without the padding at the end of their rows."""
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].copy()
        for plane in frame.planes
    )
    return y, u, v


def _scaler(stream: av.VideoStream, pixel_format: str, options: str) -> Callable[[av.VideoFrame], av.VideoFrame]:
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream)
    scale = graph.add("scale", options)
    formatted = graph.add("format", pixel_format)
    sink = graph.add("buffersink")
    graph.link_nodes(source, scale, formatted, sink).configure()

    def scaled(frame: av.VideoFrame) -> av.VideoFrame:
        graph.push(frame)
        return graph.pull()

    return scaled


def _decode_torchcodec(
    video: bytes, name: str, info: VideoInfo, indices: Sequence[int], size_px: tuple[int, int]
) -> Iterator[tuple[int, Uint8Array]]:
    if indices and indices[-1] >= info.num_frames:
        raise DataError(f"{name}: ends before frame {indices[-1]}; the video is shorter than its timestamps")
    if not info.pts:
        raise DataError(f"{name}: a raw {info.codec} stream has no times, which torchcodec needs; {_USE_PYAV}")
    codec = ffmpeg.load_torchcodec()
    try:
        plain = _plain(video, name)
        reader = codec.decoders.VideoDecoder(
            plain.content,
            dimension_order="NHWC",
            seek_mode="exact",
            transforms=[codec.transforms.Resize(size_px[::-1])],
        )
        for start in range(0, len(indices), 32):
            block = list(indices[start : start + 32])
            wanted = [info.pts[index] for index in block]
            frames = reader.get_frames_at([bisect_left(plain.pts, pts) for pts in wanted])
            asked_s = np.array([float((pts - plain.start) * info.time_base_s) for pts in wanted])
            _check_times(frames.pts_seconds.numpy(), asked_s, name)
            yield from zip(block, frames.data.numpy(), strict=True)
    except (RuntimeError, av.FFmpegError) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{name}: torchcodec cannot decode it ({first_line}); {_USE_PYAV}") from None


@dataclass(frozen=True)
class _PlainVideo:
    """A video in which torchcodec finds every frame."""

    content: bytes
    pts: list[int]  # of all its frames, ascending, presented or not, in the original's time base
    start: int  # the original's pts that is 0 here


def _plain(video: bytes, name: str) -> _PlainVideo:
    """Copy the packets of a video that torchcodec 0.13 seeks wrongly in: MPEG-TS, and behind an edit list.

    The copy is NUT, which keeps times exactly and hides nothing; frames that share a time cannot be told apart in it.
    """
    with _open(video) as source:
        stream = _video_stream(source, name)
        packets = [packet for packet in source.demux(stream) if packet.size]
        times = {packet.pts for packet in packets} - {None}
        if len(times) < len(packets):
            raise DataError(f"{name}: torchcodec cannot tell its frames apart by their times; {_USE_PYAV}")
        pts = sorted(times)
        if source.format.name != "mpegts" and not any(packet.is_discard for packet in packets):
            return _PlainVideo(video, pts, 0)
        start, copy = min(pts[0], *(packet.dts for packet in packets if packet.dts is not None)), io.BytesIO()
        with av.open(copy, "w", format="nut") as target:
            track = target.add_stream_from_template(stream)
            for packet in packets:
                packet.pts -= start
                packet.dts = None if packet.dts is None else packet.dts - start
                packet.stream = track
                target.mux(packet)
    return _PlainVideo(copy.getvalue(), pts, start)


def _check_times(got_s: npt.NDArray[np.float64], asked_s: npt.NDArray[np.float64], name: str) -> None:
    """Refuse other frames than those asked for."""
    if (wrong := np.flatnonzero(np.abs(got_s - asked_s) > _SAME_TIME_S)).size:
        got, asked = got_s[wrong[0]], asked_s[wrong[0]]
        raise DataError(f"{name}: torchcodec gives the frame at {got:.6f} s for the one at {asked:.6f} s; {_USE_PYAV}")
