"""Video in and out, behind one small seam.

Frames are named by their *index in presentation order*; their times come from the source's own timestamps, never from
a frame rate. `probe` (formats/containers.py) counts and times what a decoder presents, and `decode` tells a frame by
its time, not by its turn.

Two decoders, the same frames: PyAV (default: measured faster on a CPU for whole clips) and torchcodec in exact mode
(exact random access). Each scales in its own way, so the decoder is part of the preprocessing that a shard, a run and
an inference share. A frame is scaled from the colours that it was coded in straight to the size that is wanted: at full
size, RGB is never made. `omni bench etl` measures what all of that costs beside a decoder that keeps nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import islice
from typing import BinaryIO, Literal, TypeVar

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats import ffmpeg, torchcodec_video
from omni_cli.formats.containers import Video, VideoInfo, open_container, probe, video_stream

__all__ = [
    "Decoder",
    "Planes",
    "Uint8Array",
    "Video",
    "VideoInfo",
    "decode",
    "decode_only",
    "decode_yuv",
    "decoder_id",
    "encode_h264",
    "probe",
    "rgb_scaler",
]

Decoder = Literal["pyav", "torchcodec"]
Uint8Array = npt.NDArray[np.uint8]
Planes = tuple[Uint8Array, Uint8Array, Uint8Array]  # Y (height, width), U and V of half the size, rounded up
_Picture = TypeVar("_Picture", Uint8Array, Planes)
_SCALE_FLAGS = "area+accurate_rnd+full_chroma_int+bitexact"
_REPEATABLE = {"flags": "+bitexact", "bf": "0", "mbtree": "0"}  # of libx264
_TO_BT601 = "out_range=limited:out_color_matrix=bt601"
_BT601_OR_UNSPECIFIED = (5, 6, 2)  # AVColorSpace; FFmpeg too takes what is unspecified for BT.601
_FULL_RANGE = 2  # AVColorRange


def decode(
    video: Video,
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
        video: the file.
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
        yield from torchcodec_video.decode(video, name, info, indices, size_px)
    else:
        yield from _decode_pyav(video, name, info, indices, partial(rgb_scaler, size_px=size_px))


def decode_yuv(
    video: Video, name: str, indices: Sequence[int], info: VideoInfo | None = None
) -> Iterator[tuple[int, Planes]]:
    """Yield (index, planes) for each wanted frame, in ascending order and at the video's own size.

    The planes are YUV 4:2:0 in BT.601 limited range. Frames that are coded so, or do not say otherwise, come out as
    they were coded, bit for bit; of others (4:4:4, ten bits, RGB, full range, BT.709) the scaler makes such planes.

    Args:
        video: the file.
        name: what to call it in an error.
        indices: frames in presentation order, ascending and unique.
        info: what `probe` said of this video, where it was asked before.

    Yields:
        The index and (y, u, v): uint8 (height, width), and twice (ceil(height / 2), ceil(width / 2)).

    Raises:
        DataError: the video is damaged, or ends before the last wanted frame.
    """
    yield from _decode_pyav(video, name, info or probe(video, name), indices, _to_planes)


def decode_only(video: Video, name: str, num_frames: int | None = None) -> int:
    """Decode every frame (or so many) in one thread and keep none; return how many: what the codec alone costs.

    Raises:
        DataError: the video is damaged.
    """
    try:
        with open_container(video) as container:
            stream = video_stream(container, name)
            stream.thread_type = "NONE"
            return sum(1 for _ in islice(container.decode(stream), num_frames))
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

    The same frames give the same bytes on one pin set: one thread, bit-exact flags, no creation time, and no MB-tree,
    of which x264's AVX-512 code reads memory that nobody wrote where a picture is narrower than eight macroblocks.
    """
    count = 0
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        track = None
        for picture in frames:
            if track is None:
                track = container.add_stream("libx264", rate=rate_hz)
                track.height, track.width = picture.shape[0], picture.shape[1]
                track.pix_fmt, track.thread_count = "yuv420p", 1
                track.options = {**_REPEATABLE, "preset": preset, "crf": str(crf), "g": str(gop)}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate_hz
            container.mux(track.encode(frame))
            count += 1
        if track is not None:
            container.mux(track.encode(None))
    return count


def _decode_pyav(
    video: Video,
    name: str,
    info: VideoInfo,
    indices: Sequence[int],
    converter: Callable[[av.VideoStream], Callable[[av.VideoFrame], _Picture]],
) -> Iterator[tuple[int, _Picture]]:
    wanted = iter(indices)
    if (target := next(wanted, None)) is None:
        return
    try:
        with open_container(video) as container:
            stream = video_stream(container, name)
            stream.thread_type = "NONE"
            picture_of = converter(stream)
            for position, frame in _numbered(container.decode(stream), info, name):
                if position > target:
                    raise DataError(f"{name}: frame {target} is listed but cannot be decoded; fetch the file again")
                if frame.is_corrupt:  # wanted or not: later frames are made of it, and are not marked
                    raise DataError(f"{name}: frame {position} is damaged; fetch the file again")
                if position == target:
                    yield position, picture_of(frame)
                    if (target := next(wanted, None)) is None:
                        return
    except av.FFmpegError as error:
        raise DataError(f"{name}: decoding failed ({error.strerror}); check the file or fetch it again") from None
    raise DataError(f"{name}: ends before frame {target}; the video is shorter than its timestamps")


def _numbered(frames: Iterable[av.VideoFrame], info: VideoInfo, name: str) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame): by the frame's time, or in turn where the container has no times."""
    index_of = {pts: index for index, pts in enumerate(info.pts)}
    if len(index_of) < len(info.pts):
        raise DataError(f"{name}: two frames have the same time; remux the file with its true frame times")
    for turn, frame in enumerate(frames):
        if info.pts and frame.pts not in index_of:
            raise DataError(f"{name}: decodes to a frame that its container does not list; encode the video anew")
        yield (index_of[frame.pts] if info.pts else turn), frame


def rgb_scaler(stream: av.VideoStream, size_px: tuple[int, int]) -> Callable[[av.VideoFrame], Uint8Array]:
    """Scale to packed RGB, at half the height or less by way of planes: the same bytes in two thirds of the time.

    swscale has vector instructions for planes of RGB, and none for packed RGB. Its arithmetic is the same, but where
    no more than two rows are weighed for one, which packed RGB is made of without rounding (FFmpeg 8,
    libswscale/output.c: yuv2gbrp_full_X, yuv2rgb_full_X, yuv2rgb_full_2).
    """
    width, height = size_px
    planes = (("format", "gbrp"), ("scale", f"flags={_SCALE_FLAGS}")) if 2 * height <= stream.height else ()
    scaled = _scaler(stream, ("scale", f"{width}:{height}:flags={_SCALE_FLAGS}"), *planes, ("format", "rgb24"))
    return lambda frame: scaled(frame).to_ndarray(format="rgb24")


def _to_planes(stream: av.VideoStream) -> Callable[[av.VideoFrame], Planes]:
    to_bt601 = f"{stream.width}:{stream.height}:{_TO_BT601}:flags={_SCALE_FLAGS}"
    converted = _scaler(stream, ("scale", to_bt601), ("format", "yuv420p"))
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


def _scaler(stream: av.VideoStream, *filters: tuple[str, str]) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Return what filters frames; how their colours are coded is asked of them, a damaged header does not tell."""
    size = {"width": stream.width, "height": stream.height, "time_base": stream.time_base}

    @cache
    def graph_for(coded: str) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1  # one process a core
        source, sink = graph.add_buffer(format=coded, **size), graph.add("buffersink")
        graph.link_nodes(source, *(graph.add(*one) for one in filters), sink).configure()
        return graph

    def scaled(frame: av.VideoFrame) -> av.VideoFrame:
        graph = graph_for(frame.format.name)
        graph.push(frame)
        return graph.pull()

    return scaled
