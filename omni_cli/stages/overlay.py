"""A video of what the model said: a camera's pictures, with the answer and the known truth beneath them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omni_cli import files
from omni_cli.formats.video import Decoder, Uint8Array, decode, encode_h264, probe
from omni_cli.recipe import Quantity
from omni_cli.samples.prompts import camera_title
from omni_cli.samples.sync import PlannedWindow
from omni_cli.scene.recording import CameraStream

WIDTH_PX, BAND_PX = 640, 64
_FONT_PX, _MARGIN_PX = 20, 10
_WHITE, _GREEN = (255, 255, 255), (120, 220, 120)


@dataclass(frozen=True)
class Said:
    """What was said about one window, and what was true where that is known."""

    window: PlannedWindow
    values: Mapping[str, float] | None
    truth: Mapping[str, float]


@dataclass(frozen=True)
class _Shown:
    """One picture of the overlay: a frame of the video, and the newest window that sees it."""

    frame: int
    said: Said


def write_overlay(
    path: Path,
    stream: CameraStream,
    said: Sequence[Said],
    quantities: Sequence[Quantity],
    *,
    rate_hz: float,
    decoder: Decoder,
) -> dict[str, Any]:
    """Write an H.264 mp4 in real time with its receipt; return the receipt.

    Args:
        path: the mp4.
        stream: the first camera of the windows, or the mosaic.
        said: answers, by the time of their windows.
        quantities: what is written beneath the pictures.
        rate_hz: of the windows' instants.
        decoder: of the video.
    """
    rate = Fraction(rate_hz).limit_denominator(1000)
    pictures = _pictures(stream, _shown(said), quantities, decoder)
    return files.commit(path, partial(_encode, pictures=pictures, rate=rate), camera=stream.name)


def caption(label: str, values: Mapping[str, float] | None, quantities: Sequence[Quantity]) -> str:
    """Return one line of text: `model: speed 5.23 m/s, displacement 42.15 m`."""
    if values is None:
        return f"{label}: no readable answer"
    parts = [f"{q.title} {values[q.column]:.2f} {q.unit}" for q in quantities if q.column in values]
    return f"{label}: {', '.join(parts)}"


def _shown(said: Sequence[Said]) -> list[_Shown]:
    """Return one entry an instant, in time; where windows overlap the one that began last speaks."""
    by_instant: dict[int, _Shown] = {}
    for one in said:
        for instant, frames in zip(one.window.instants_us.tolist(), one.window.frame_index, strict=True):
            by_instant[instant] = _Shown(int(frames[0]), one)
    return [by_instant[instant] for instant in sorted(by_instant)]


def _pictures(
    stream: CameraStream, shown: Sequence[_Shown], quantities: Sequence[Quantity], decoder: Decoder
) -> Iterator[Uint8Array]:
    video = stream.video.read()
    info = probe(video, stream.name)
    height = max(round(WIDTH_PX * info.height_px / info.width_px / 2), 1) * 2  # H.264 wants even sides
    frames = sorted({one.frame for one in shown})
    decoded = decode(video, stream.name, frames, width_px=WIDTH_PX, height_px=height, decoder=decoder, info=info)
    index, picture = -1, np.zeros((height, WIDTH_PX, 3), dtype=np.uint8)
    for one in shown:
        while index < one.frame:  # a slow camera shows one frame at several instants
            index, picture = next(decoded)
        yield _captioned(picture, one.said, camera_title(stream.name), quantities)


def _captioned(picture: Uint8Array, said: Said, title: str, quantities: Sequence[Quantity]) -> Uint8Array:
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (width, height + BAND_PX))
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_PX)
    draw.text((_MARGIN_PX, height + 6), caption("model", said.values, quantities), fill=_WHITE, font=font)
    if said.truth:
        draw.text((_MARGIN_PX, height + 34), caption("truth", said.truth, quantities), fill=_GREEN, font=font)
    draw.text((_MARGIN_PX, 6), title, fill=_WHITE, font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def _encode(stream: BinaryIO, pictures: Iterator[Uint8Array], rate: Fraction) -> None:
    encode_h264(stream, pictures, rate_hz=rate)
