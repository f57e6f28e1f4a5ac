"""Video in and out, behind one small seam.

Frames are named by their *index in presentation order*; their times come from the source's own timestamps, never from
a frame rate. Two decoders, the same frames: PyAV (default: measured faster on a CPU for whole clips) and torchcodec in
exact mode (exact random access; its approximate mode returns wrong frames, silently, and is never used). Each scales
in its own way, so the decoder is part of the preprocessing that a shard, a run and an inference share.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats import ffmpeg

Decoder = Literal["pyav", "torchcodec"]
Uint8Array = npt.NDArray[np.uint8]
_SCALE_FLAGS = "area+accurate_rnd+full_chroma_int+bitexact"


@dataclass(frozen=True)
class VideoInfo:
    """What the headers of a video say, without decoding."""

    codec: str
    width_px: int
    height_px: int
    num_frames: int
    pts_us: npt.NDArray[np.int64]  # (num_frames,) sorted; empty where the container has no times (raw HEVC)


def probe(video: bytes, name: str) -> VideoInfo:
    """Read a video's headers and packet times.

    Args:
        video: the file's content.
        name: what to call it in an error.

    Raises:
        DataError: it is not a readable video.
    """
    try:
        with _open(video) as container:
            stream = _video_stream(container, name)
            times = [packet.pts for packet in container.demux(stream) if packet.size]
            base = stream.time_base or Fraction(1)
            known = [] if any(t is None for t in times) else sorted(round(t * base * 1_000_000) for t in times)
            codec = stream.codec_context
            return VideoInfo(codec.name, codec.width, codec.height, len(times), np.array(known, dtype=np.int64))
    except av.FFmpegError as error:
        raise DataError(f"{name}: not a readable video ({error.strerror}); check the file or fetch it again") from None


def decode(
    video: bytes, name: str, indices: Sequence[int], *, width_px: int, height_px: int, decoder: Decoder = "pyav"
) -> Iterator[tuple[int, Uint8Array]]:
    """Yield (index, picture) for each wanted frame, in ascending order, scaled to the given size.

    Args:
        video: the file's content.
        name: what to call it in an error.
        indices: frames in presentation order, ascending and unique.
        width_px: width of the pictures.
        height_px: height of the pictures.
        decoder: which library decodes and scales.

    Yields:
        The index and a (height, width, 3) uint8 RGB picture.

    Raises:
        DataError: the video is damaged, or ends before the last wanted frame.
    """
    if decoder == "torchcodec":
        yield from _decode_torchcodec(video, name, indices, width_px, height_px)
    else:
        yield from _decode_pyav(video, name, indices, width_px, height_px)


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

    One thread, bit-exact flags and no creation time: the same frames give the same bytes on one machine and pin set.
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


def _decode_pyav(
    video: bytes, name: str, indices: Sequence[int], width_px: int, height_px: int
) -> Iterator[tuple[int, Uint8Array]]:
    wanted = iter(indices)
    target = next(wanted, None)
    try:
        with _open(video) as container:
            stream = _video_stream(container, name)
            stream.thread_type = "NONE"
            graph = _scaler(stream, width_px, height_px)
            for position, frame in enumerate(container.decode(stream)):
                if target is None:
                    return
                if position == target:
                    if frame.is_corrupt:
                        raise DataError(f"{name}: frame {position} is damaged; fetch the file again")
                    graph.push(frame)
                    yield position, graph.pull().to_ndarray(format="rgb24")
                    target = next(wanted, None)
    except av.FFmpegError as error:
        raise DataError(f"{name}: decoding failed ({error.strerror}); check the file or fetch it again") from None
    if target is not None:
        raise DataError(f"{name}: ends before frame {target}; the video is shorter than its timestamps")


def _scaler(stream: av.VideoStream, width_px: int, height_px: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream)
    scale = graph.add("scale", f"{width_px}:{height_px}:flags={_SCALE_FLAGS}")
    rgb = graph.add("format", "rgb24")
    sink = graph.add("buffersink")
    graph.link_nodes(source, scale, rgb, sink).configure()
    return graph


def _decode_torchcodec(
    video: bytes, name: str, indices: Sequence[int], width_px: int, height_px: int
) -> Iterator[tuple[int, Uint8Array]]:
    codec = ffmpeg.load_torchcodec()
    try:
        reader = codec.decoders.VideoDecoder(
            video,
            dimension_order="NHWC",
            seek_mode="exact",
            transforms=[codec.transforms.Resize((height_px, width_px))],
        )
        for start in range(0, len(indices), 32):
            block = list(indices[start : start + 32])
            yield from zip(block, reader.get_frames_at(block).data.numpy(), strict=True)
    except IndexError:
        raise DataError(f"{name}: ends before frame {max(indices)}; the video is shorter than its timestamps") from None
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{name}: decoding failed ({first_line}); check the file or fetch it again") from None
