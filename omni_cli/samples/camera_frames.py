"""The frames of a camera, numbered over all its videos: a recording that was joined of segments has one video of each.

A video is probed once, when its turn comes, and never held: it is read through a window however long it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omni_cli.errors import DataError
from omni_cli.formats.video import Decoder, Planes, Uint8Array, VideoInfo, decode, decode_yuv, probe
from omni_cli.scene.recording import CameraStream, VideoLocation


class _Video(NamedTuple):
    name: str  # for an error
    location: VideoLocation
    info: VideoInfo


@dataclass(frozen=True)
class CameraFrames:
    """Decodes frames of one camera by their index in its timestamps."""

    name: str
    stream: CameraStream
    first: _Video

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of every frame as it was coded."""
        return self.first.info.width_px, self.first.info.height_px

    def decode(
        self, indices: Sequence[int], *, width_px: int, height_px: int, decoder: Decoder
    ) -> Iterator[tuple[int, Uint8Array]]:
        """Yield (index, RGB picture (height, width, 3)) as `formats.video.decode` does; arguments and errors as there.

        Raises:
            DataError: also where a video's bytes are not what they were, or a later one is damaged, of another size, or
                not as long as its timestamps.
        """
        for offset, (name, video, info), wanted in self._by_video(indices):
            pictures = decode(video, name, wanted, width_px=width_px, height_px=height_px, decoder=decoder, info=info)
            yield from ((offset + index, picture) for index, picture in pictures)

    def decode_yuv(self, indices: Sequence[int]) -> Iterator[tuple[int, Planes]]:
        """Yield (index, planes) as `formats.video.decode_yuv` does; errors as of `decode`."""
        for offset, (name, video, info), wanted in self._by_video(indices):
            yield from ((offset + index, planes) for index, planes in decode_yuv(video, name, wanted, info))

    def _by_video(self, indices: Sequence[int]) -> Iterator[tuple[int, _Video, list[int]]]:
        """Yield (index of its first frame, video, frames wanted of it) of each video in which any is."""
        wanted, counts = np.asarray(indices, dtype=np.int64), _counts(self.stream)
        offsets = np.cumsum([0, *counts[:-1]])
        place = np.searchsorted(offsets, wanted, side="right") - 1
        for number in np.unique(place).tolist():
            self.stream.videos[number].check()
            video = self.first if number == 0 else self._later(number)
            yield int(offsets[number]), video, (wanted[place == number] - offsets[number]).tolist()

    def _later(self, number: int) -> _Video:
        video = _probed(self.name, self.stream, number)
        if (video.info.width_px, video.info.height_px) != self.size_px:
            size, first = f"{video.info.width_px}x{video.info.height_px}", "x".join(map(str, self.size_px))
            raise DataError(f"{video.name}: is {size} px where the camera's first video is {first}; fetch it again")
        return video


def camera_frames(name: str, stream: CameraStream) -> CameraFrames:
    """Open a camera.

    Args:
        name: what to call it in an error.
        stream: the camera.

    Raises:
        DataError: its first video is damaged, or is not as long as its timestamps.
    """
    return CameraFrames(name, stream, _probed(name, stream, 0))


def _probed(name: str, stream: CameraStream, number: int) -> _Video:
    location, count = stream.videos[number], _counts(stream)[number]
    if len(stream.videos) > 1:
        name = f"{name}, {location.path}"
    info = probe(location, name)
    has_surplus = location.num_frames is not None and info.num_frames > count  # the reader vouches for the first ones
    if info.num_frames != count and not has_surplus:
        raise DataError(f"{name}: {info.num_frames} frames for {count} timestamps; fetch it again")
    return _Video(name, location, info)


def _counts(stream: CameraStream) -> list[int]:
    """Return how many of the camera's times are of each video."""
    return [len(stream.timestamp_us) if one.num_frames is None else one.num_frames for one in stream.videos]
