"""A video of what the model said: what it looked at, with the answer and the known truth beneath.

The first camera is large, since paths are drawn over it; the others that the model looks at stand small below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

WIDTH_PX, BAND_PX = 640, 64  # of one camera alone
TILED_WIDTH_PX, TILES_A_ROW = 960, 3  # where others stand below it
_FONT_PX, _SMALL_FONT_PX, _MARGIN_PX = 20, 14, 10
_WHITE, _GREEN = (255, 255, 255), (120, 220, 120)


@dataclass(frozen=True)
class Said:
    """What was said about one window, and what was true where that is known."""

    window: PlannedWindow
    values: Mapping[str, Any] | None
    truth: Mapping[str, Any]
    mark: str = ""  # after the answer: that it is not the model's own


@dataclass(frozen=True)
class _Shown:
    """One picture of the overlay: instant `at` of the window that speaks for it."""

    at: int
    said: Said

    @property
    def instant_us(self) -> int:
        """When it is, on the recording's clock."""
        return int(self.said.window.instants_us[self.at])

    def frame(self, column: int) -> int:
        """Return the frame that a view shows then, by its column among the window's."""
        return int(self.said.window.frame_index[self.at, column])


@dataclass
class _View:
    """One camera of the overlay, decoded front to back."""

    stream: CameraStream
    column: int  # in the windows' frames
    size_px: tuple[int, int]
    decoded: Iterator[tuple[int, Uint8Array]]
    index: int = -1
    picture: Uint8Array = field(default_factory=lambda: np.zeros((0, 0, 3), dtype=np.uint8))

    def at(self, shown: _Shown) -> Uint8Array:
        """Return the picture of an instant; a slow camera shows one frame at several."""
        while self.index < shown.frame(self.column):
            self.index, self.picture = next(self.decoded)
        return self.picture


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
        camera: the first camera of the windows, or the mosaic; shown large.
        said: answers, by the time of their windows.
        recipe: draws and captions them.
        preprocess: of the model.
    """
    rate = Fraction(preprocess.rate_hz).limit_denominator(1000)
    shown = _shown(said, recipe)
    pictures = _pictures(recording, camera, shown, recipe, preprocess)
    skipped_us = shown[-1].instant_us - shown[0].instant_us - (len(shown) - 1) * period_us(preprocess.rate_hz)
    write = partial(_encode, pictures=pictures, rate=rate)
    return files.commit(path, write, camera=camera, skipped_us=skipped_us)


def _shown(said: Sequence[Said], recipe: Inferable) -> list[_Shown]:
    """Return one entry an instant, in time."""
    by_instant: dict[int, _Shown] = {}
    for one in said:
        for at in recipe.speaks_for(one.window.instants_us, by_instant.keys()):
            shown = _Shown(at, one)
            by_instant[shown.instant_us] = shown
    return [by_instant[instant] for instant in sorted(by_instant)]


def _pictures(
    recording: Recording, camera: str, shown: Sequence[_Shown], recipe: Inferable, preprocess: Preprocess
) -> Iterator[Uint8Array]:
    others = {name: at for at, name in enumerate(preprocess.views) if name in recording.cameras and name != camera}
    width = TILED_WIDTH_PX if others else WIDTH_PX
    view = _view(recording.cameras[camera], 0, shown, preprocess.decoder, (width, None))
    columns = min(max(len(others), 2), TILES_A_ROW)
    cell_px = width // columns, view.size_px[1] // columns
    small = [_view(recording.cameras[name], at, shown, preprocess.decoder, cell_px) for name, at in others.items()]
    for one in shown:
        drawn = [_drawn(view.at(one), one, recording, view.stream, recipe), *_rows(small, one, columns, cell_px)]
        yield np.concatenate([*drawn, _band(one, width, recipe)])


def _view(
    stream: CameraStream, column: int, shown: Sequence[_Shown], decoder: Decoder, room_px: tuple[int, int | None]
) -> _View:
    """Open a camera whose pictures are to fill a width, or to fit into a width and a height."""
    width_px, height_px = room_px
    seen = camera_frames(stream.name, stream)
    own_width_px, own_height_px = seen.size_px
    scale = min(width_px / own_width_px, (height_px or np.inf) / own_height_px)
    size = max(round(own_width_px * scale), 1), max(round(own_height_px * scale / 2), 1) * 2  # H.264 wants even sides
    size = size if height_px is None else (min(size[0], width_px), min(size[1], height_px))
    frames = sorted({one.frame(column) for one in shown})
    return _View(stream, column, size, seen.decode(frames, width_px=size[0], height_px=size[1], decoder=decoder))


def _rows(views: Sequence[_View], shown: _Shown, columns: int, cell_px: tuple[int, int]) -> list[Uint8Array]:
    """Return what is below the first camera: the others with their names, some in a row, in even sizes."""
    if not views:
        return []
    width, height = cell_px
    rows = -(-len(views) // columns)
    canvas = Image.new("RGB", (width * columns, -(-rows * height // 2) * 2))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_SMALL_FONT_PX)
    for number, view in enumerate(views):
        left, top = number % columns * width, number // columns * height
        picture = Image.fromarray(view.at(shown))
        canvas.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        _write(draw, (left + 6, top + 4), camera_title(view.stream.name), font)
    return [np.asarray(canvas)]


def _drawn(
    picture: Uint8Array, shown: _Shown, recording: Recording, stream: CameraStream, recipe: Inferable
) -> Uint8Array:
    """Return the picture with the answer and the truth over it."""
    said, at_us = shown.said, int(stream.timestamp_us[shown.frame(0)])
    canvas = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_PX)
    for values in (said.truth, said.values):
        for stroke in _strokes(recipe, recording, values, shown, at_us) if values else ():
            scaled = (stroke.points_px + 0.5) * _scale(stroke, picture) - 0.5
            draw.line([tuple(point) for point in scaled.tolist()], fill=stroke.colour, width=stroke.width_px)
    _write(draw, (_MARGIN_PX, 6), f"{camera_title(stream.name)}  {shown.instant_us / 1e6:.2f} s", font)
    return np.asarray(canvas)


def _band(shown: _Shown, width: int, recipe: Inferable) -> Uint8Array:
    """Return what was said, and what is true, in words."""
    canvas, said = Image.new("RGB", (width, BAND_PX)), shown.said
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_PX)
    draw.text((_MARGIN_PX, 6), f"model: {recipe.caption(said.values, shown.at)}{said.mark}", fill=_WHITE, font=font)
    if said.truth:
        draw.text((_MARGIN_PX, 34), f"truth: {recipe.caption(said.truth, shown.at)}", fill=_GREEN, font=font)
    return np.asarray(canvas)


def _write(draw: ImageDraw.ImageDraw, at_px: tuple[int, int], text: str, font: Any) -> None:
    draw.text(at_px, text, fill=_WHITE, font=font, stroke_width=2, stroke_fill=(0, 0, 0))


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
