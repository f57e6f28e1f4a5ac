"""Frames by torchcodec in exact mode; its approximate mode returns wrong frames, silently, and is never used."""

import io
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats import ffmpeg
from omni_cli.formats.containers import FileSlice, Video, VideoInfo, open_container, presented_hevc, video_stream

_SAME_TIME_S = 1e-6
_BLOCK_FRAMES = 32  # decoded at once
_TURN_S = Fraction(1, 25)  # between the frames of a stream that has no times: any step will do
_USE_PYAV = "check the file, or decode it with: --set sample.decoder=pyav"


def decode(
    video: Video, name: str, info: VideoInfo, indices: Sequence[int], size_px: tuple[int, int]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (index, picture) as `formats.video.decode` does; arguments and errors as there."""
    if indices and indices[-1] >= info.num_frames:
        raise DataError(f"{name}: ends before frame {indices[-1]}; the video is shorter than its timestamps")
    codec = ffmpeg.load_torchcodec()
    try:
        plain = _timed(video, name) if not info.pts and info.codec == "hevc" else _plain(video, name)
        reader = codec.decoders.VideoDecoder(
            plain.content,
            dimension_order="NHWC",
            seek_mode="exact",
            transforms=[codec.transforms.Resize(size_px[::-1])],
        )
        for start in range(0, len(indices), _BLOCK_FRAMES):
            block = list(indices[start : start + _BLOCK_FRAMES])
            wanted = [info.pts[index] if info.pts else plain.pts[index] for index in block]
            frames = reader.get_frames_at([bisect_left(plain.pts, pts) for pts in wanted])
            asked_s = np.array([float((pts - plain.start) * plain.unit_s) for pts in wanted])
            _check_times(frames.pts_seconds.numpy(), asked_s, name)
            yield from zip(block, frames.data.numpy(), strict=True)
    except (RuntimeError, av.FFmpegError) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{name}: torchcodec cannot decode it ({first_line}); {_USE_PYAV}") from None


@dataclass(frozen=True)
class _PlainVideo:
    """A video in which torchcodec finds every frame."""

    content: Any  # bytes or a file
    pts: list[int]  # of all its frames, ascending, presented or not
    start: int  # the pts that is 0 here
    unit_s: Fraction  # of both


def _plain(video: Video, name: str) -> _PlainVideo:
    """Copy the packets of a video that torchcodec 0.13 seeks wrongly in: MPEG-TS, and behind an edit list.

    The copy hides nothing; frames that share a time cannot be told apart in it.
    """
    with open_container(video) as source:
        packets = [packet for packet in source.demux(video_stream(source, name)) if packet.size]
        times = {packet.pts for packet in packets} - {None}
        if len(times) < len(packets):
            raise DataError(f"{name}: torchcodec cannot tell its frames apart by their times; {_USE_PYAV}")
        pts, unit_s = sorted(times), video_stream(source, name).time_base or Fraction(1)
        if source.format.name != "mpegts" and not any(packet.is_discard for packet in packets):
            return _PlainVideo(video if isinstance(video, bytes) else FileSlice(video), pts, 0, unit_s)
        start = min(pts[0], *(packet.dts for packet in packets if packet.dts is not None))
        return _PlainVideo(_copy(video_stream(source, name), packets, _earlier(start)), pts, start, unit_s)


def _timed(video: Video, name: str) -> _PlainVideo:
    """Copy the packets of a raw HEVC stream that are presented, and give each its turn as its time."""
    shown = [packet for packet, is_presented in presented_hevc(video, name) if is_presented]
    turns = _turns(video, name, len(shown))
    late = max(place - turn for place, turn in enumerate(turns))  # a frame is decoded before it is shown
    pts = [turn + late for turn in sorted(turns)]

    def stamp(packet: av.Packet, place: int) -> None:
        packet.dts, packet.pts, packet.time_base = place, turns[place] + late, _TURN_S

    with open_container(video) as source:
        return _PlainVideo(_copy(video_stream(source, name), shown, stamp), pts, 0, _TURN_S)


def _copy(stream: av.VideoStream, packets: Sequence[av.Packet], stamp: Callable[[av.Packet, int], None]) -> bytes:
    """Return packets as a NUT file, which keeps times exactly."""
    copy = io.BytesIO()
    with av.open(copy, "w", format="nut") as target:
        track = target.add_stream_from_template(stream)
        for place, packet in enumerate(packets):
            stamp(packet, place)
            packet.stream = track
            target.mux(packet)
    return copy.getvalue()


def _earlier(start: int) -> Callable[[av.Packet, int], None]:
    def stamp(packet: av.Packet, _place: int) -> None:
        packet.pts -= start
        packet.dts = None if packet.dts is None else packet.dts - start

    return stamp


def _turns(video: Video, name: str, count: int) -> list[int]:
    """Return when each presented picture of a raw stream is shown, 0 .. count - 1, in the order of the file.

    The order is told by decoding, where the stream holds pictures that are shown later than they are decoded.
    """
    with open_container(video) as container:
        stream = video_stream(container, name)
        if not stream.codec_context.has_b_frames:
            return list(range(count))
        stream.thread_type = "NONE"
        places = [frame.pts for frame in _with_places(container, stream)]
    turns = [0] * count
    for turn, place in enumerate(np.argsort(np.argsort(places)).tolist()):
        turns[place] = turn
    return turns


def _with_places(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decode; each frame's pts is the place of its packet in the file."""
    for place, packet in enumerate(container.demux(stream)):
        packet.pts = place
        yield from packet.decode()


def _check_times(got_s: npt.NDArray[np.float64], asked_s: npt.NDArray[np.float64], name: str) -> None:
    """Refuse other frames than those asked for."""
    if (wrong := np.flatnonzero(np.abs(got_s - asked_s) > _SAME_TIME_S)).size:
        got, asked = got_s[wrong[0]], asked_s[wrong[0]]
        raise DataError(f"{name}: torchcodec gives the frame at {got:.6f} s for the one at {asked:.6f} s; {_USE_PYAV}")
