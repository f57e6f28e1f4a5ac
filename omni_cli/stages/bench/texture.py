"""A video that is as hard to decode as a real one, made in seconds where the user has none: moving 1/f texture."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

from omni_cli.formats.video import Uint8Array, encode_h264

_SEED = 20_261
_MARGIN_PX = 128  # the larger texture's period must not be the picture's
_CONTRAST, _OVERLAY = 30.0, 5.0  # grey levels; the overlay moves otherwise, so that motion does not explain everything
_STEP_PX, _OVERLAY_STEP_PX = (2, 11), (-3, 7)  # down and right a frame


@dataclass(frozen=True)
class TextureSpec:
    """Its size and rate. The group of pictures, one second, is coded once and repeated."""

    width_px: int = 1920
    height_px: int = 1080
    fps: int = 30


FULL_HD = TextureSpec()


def texture_video(spec: TextureSpec, seconds: float) -> bytes:
    """Return an H.264 mp4 of whole seconds, at least as long as asked for; the same each time."""
    group = io.BytesIO()
    encode_h264(group, _frames(spec), rate_hz=Fraction(spec.fps), gop=spec.fps)
    return _repeated(group.getvalue(), math.ceil(seconds), spec.fps)


def _frames(spec: TextureSpec) -> Iterator[Uint8Array]:
    rng = np.random.default_rng(_SEED)
    shape = spec.height_px, spec.width_px
    colours = [_CONTRAST * _pink(rng, shape) for _ in range(3)]
    overlay = _OVERLAY * _pink(rng, shape)
    for frame in range(spec.fps):
        over = _moved(overlay, frame, _OVERLAY_STEP_PX, shape)
        planes = [128 + _moved(colour, frame, _STEP_PX, shape) + over for colour in colours]
        yield np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def _pink(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return a seamless tile of unit spread whose amplitude falls as 1 / f, as that of natural pictures does."""
    height, width = (side + _MARGIN_PX for side in shape)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    white = np.fft.rfft2(rng.standard_normal((height, width)))
    tile = np.fft.irfft2(white / np.maximum(frequency, 1 / width), s=(height, width))
    return np.asarray(tile / tile.std())


def _moved(
    tile: npt.NDArray[np.float64], frame: int, step_px: tuple[int, int], shape: tuple[int, int]
) -> npt.NDArray[np.float64]:
    shifted = np.roll(tile, (frame * step_px[0], frame * step_px[1]), axis=(0, 1))
    return shifted[: shape[0], : shape[1]]


def _repeated(group: bytes, count: int, fps: int) -> bytes:
    """Return a video of a group's packets, one time after the other."""
    video = io.BytesIO()
    with av.open(io.BytesIO(group)) as source, av.open(video, "w", format="mp4") as target:
        stream = source.streams.video[0]
        track = target.add_stream_from_template(stream)
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(stream) if packet.size]
        for number in range(count * len(packets)):
            content, is_keyframe = packets[number % len(packets)]
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, fps), is_keyframe, track
            target.mux(packet)
    return video.getvalue()
