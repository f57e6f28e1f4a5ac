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
from omni_cli.formats.video import Decoder, Uint8Array, encode_h264
from omni_cli.recipe import Inferable, Stroke
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.prompts import camera_title
from omni_cli.samples.sync import PlannedWindow
from omni_cli.scene.clock import Float64Array, period_us
from omni_cli.scene.recording import CameraStream, Recording

WIDTH_PX, BAND_PX = 640, 64
_FONT_PX, _MARGIN_PX = 20, 10
_WHITE, _GREEN = (255, 255, 255), (120, 220, 120)


@dataclass(frozen=True)
class Said:
    """What was said about one window, and what was true where that is known."""

    window: PlannedWindow
    values: Mapping[str, Any] | None
    truth: Mapping[str, Any]


@dataclass(frozen=True)
class _Shown:
    """One picture of the overlay: a frame of the video, and instant `at` of the window that speaks for it."""

    frame: int
    at: int
    said: Said

    @property
    def instant_us(self) -> int:
        """When it is, on the recording's clock."""
        return int(self.said.window.instants_us[self.at])


def write_overlay(
    path: Path,
    recording: Recording,
    camera: str,
    said: Sequence[Said],
    *,
    recipe: Inferable,
    preprocess: Preprocess,
) -> dict[str, Any]:
    """Write an H.264 mp4 with its receipt; return the receipt.

    It runs in real time and leaps over what no answer speaks for, `skipped_us` in all; each picture bears its time.

    Args:
        path: the mp4.
        recording: what was asked about.
        camera: the first camera of the windows, or the mosaic.
        said: answers, by the time of their windows.
        recipe: draws and captions them.
        preprocess: of the model.
    """
    rate = Fraction(preprocess.rate_hz).limit_denominator(1000)
    shown = _shown(said, recipe)
    pictures = _pictures(recording, camera, shown, recipe, preprocess.decoder)
    skipped_us = shown[-1].instant_us - shown[0].instant_us - (len(shown) - 1) * period_us(preprocess.rate_hz)
    write = partial(_encode, pictures=pictures, rate=rate)
    return files.commit(path, write, camera=camera, skipped_us=skipped_us)


def _shown(said: Sequence[Said], recipe: Inferable) -> list[_Shown]:
    """Return one entry an instant, in time."""
    by_instant: dict[int, _Shown] = {}
    for one in said:
        for at in recipe.speaks_for(one.window.instants_us, by_instant.keys()):
            shown = _Shown(int(one.window.frame_index[at, 0]), at, one)
            by_instant[shown.instant_us] = shown
    return [by_instant[instant] for instant in sorted(by_instant)]


def _pictures(
    recording: Recording, camera: str, shown: Sequence[_Shown], recipe: Inferable, decoder: Decoder
) -> Iterator[Uint8Array]:
    stream = recording.cameras[camera]
    seen = camera_frames(stream.name, stream)
    own_width_px, own_height_px = seen.size_px
    height = max(round(own_height_px * (WIDTH_PX / own_width_px) / 2), 1) * 2  # H.264 wants even sides
    frames = sorted({one.frame for one in shown})
    decoded = seen.decode(frames, width_px=WIDTH_PX, height_px=height, decoder=decoder)
    index, picture = -1, np.zeros((height, WIDTH_PX, 3), dtype=np.uint8)
    for one in shown:
        while index < one.frame:  # a slow camera shows one frame at several instants
            index, picture = next(decoded)
        yield _drawn(picture, one, recording, stream, recipe)


def _drawn(
    picture: Uint8Array, shown: _Shown, recording: Recording, stream: CameraStream, recipe: Inferable
) -> Uint8Array:
    """Return the picture with the answer over it, and what was said and what is true beneath it."""
    height, width = picture.shape[:2]
    said, at_us = shown.said, int(stream.timestamp_us[shown.frame])
    canvas = Image.new("RGB", (width, height + BAND_PX))
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_PX)
    for values in (said.truth, said.values):
        for stroke in _strokes(recipe, recording, values, shown, at_us) if values else ():
            scaled = (stroke.points_px + 0.5) * _scale(stroke, picture) - 0.5
            draw.line([tuple(point) for point in scaled.tolist()], fill=stroke.colour, width=stroke.width_px)
    draw.text((_MARGIN_PX, height + 6), f"model: {recipe.caption(said.values, shown.at)}", fill=_WHITE, font=font)
    if said.truth:
        draw.text((_MARGIN_PX, height + 34), f"truth: {recipe.caption(said.truth, shown.at)}", fill=_GREEN, font=font)
    title = f"{camera_title(stream.name)}  {shown.instant_us / 1e6:.2f} s"
    draw.text((_MARGIN_PX, 6), title, fill=_WHITE, font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def _strokes(
    recipe: Inferable, recording: Recording, values: Mapping[str, Any], shown: _Shown, at_us: int
) -> Sequence[Stroke]:
    return recipe.strokes(recording, values, shown.at, at_us, shown.instant_us)


def _scale(stroke: Stroke, picture: Uint8Array) -> Float64Array:
    """Return the width and height of a picture as shares of the camera's own."""
    height, width = picture.shape[:2]
    return np.asarray(np.array([width, height]) / np.array(stroke.of_size_px))


def _encode(stream: BinaryIO, pictures: Iterator[Uint8Array], rate: Fraction) -> None:
    encode_h264(stream, pictures, rate_hz=rate)
