"""Several cameras on one canvas, row by row, aspects kept, cut into the patches of a vision-language model.

Pictures are stored as large as their cell of the canvas, one row a camera and instant, the bars beside a picture of
another aspect with it, so that a window is read in long pieces; the canvas is put together where the model is. What no
picture covers is black layout: those bars, and the last two cells of seven cameras in a 3 x 3 grid.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from omni_cli.config import Settings
from omni_cli.formats.video import Decoder, Uint8Array

Family = Literal["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"]
Labels = Literal["ego-motion", "speed", "waypoints", "reasoning"]


class VisionGrid(Settings):
    """What a vision backbone asks of its pixels."""

    family: Family
    patch_px: int
    merge: int  # patches a side that become one token
    temporal_patch: int  # frames a token
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    reads: Literal["patches", "frames"] = "patches"  # what its tower takes
    side_px: int | None = None  # of its canvases, where they are squares of one size
    closing_tokens: int = 0  # after the last frame

    @model_serializer(mode="wrap")
    def _as_ever(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what no backbone of omni 0.5 needed: its shards and runs are known by their hashes."""
        later = ("reads", "side_px", "closing_tokens")
        as_before = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in write(self).items() if name not in as_before}

    @property
    def multiple_px(self) -> int:
        """Every side of a canvas is a multiple of this."""
        return self.side_px or self.patch_px * self.merge

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Return how many tokens the patches (time, height, width) of one window become."""
        return grid[0] * math.prod(math.ceil(side / self.merge) for side in grid[1:]) + self.closing_tokens


class TiledPreprocess(Settings):
    """Cameras, tiles, canvas, time grid, patches and text format of one shard set and of every model trained on it."""

    # of `omni etl`: the option that each field follows from, and the setting that gives its value
    etl_options: ClassVar[Mapping[str, tuple[str, str]]] = {
        "cameras": ("--cameras ", "sample.cameras"),
        "canvas_width_px": ("--canvas ", "sample.canvas_px"),
        "canvas_height_px": ("--set sample.aspect=", "sample.aspect"),
        "num_frames": ("--window ", "sample.window"),
        "rate_hz": ("--rate-hz ", "sample.rate_hz"),
        "decoder": ("--set sample.decoder=", "sample.decoder"),
        "labels": ("--labels ", "sample.labels"),
        "past_speed": ("--set sample.past_speed=", "sample.past_speed"),
        "vision": ("--set model=", "model"),
    }
    filters: ClassVar[tuple[str, ...]] = ()  # every instant counts

    kind: Literal["tiled"] = "tiled"
    cameras: tuple[str, ...]
    columns: int
    canvas_width_px: int
    canvas_height_px: int
    num_frames: int
    rate_hz: float
    labels: Labels
    past_speed: bool
    decoder: Decoder
    decoder_id: str
    vision: VisionGrid

    @model_validator(mode="after")
    def _fits_the_grid(self) -> "TiledPreprocess":
        multiple = self.vision.multiple_px
        sides = (self.canvas_width_px, self.canvas_height_px)
        if any(side % multiple or side > (self.vision.side_px or side) for side in sides):
            expected = "the one of its model" if self.vision.side_px else "a multiple"
            raise ValueError(f"canvas {sides[0]}x{sides[1]} px is not {expected} of {multiple} px")
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """What is stored at each instant: one picture a camera."""
        return self.cameras

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of a stored picture, which fills a cell: (cell height, cell width, 3), RGB."""
        return self.cell_height_px, self.cell_width_px, 3

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Shape of a window's pictures: (num_frames, cameras, cell height, cell width, 3)."""
        return self.num_frames, len(self.cameras), *self.picture_shape

    @property
    def canvas_shape(self) -> tuple[int, ...]:
        """Shape of the canvas of one instant: (height, width, 3)."""
        return self.canvas_height_px, self.canvas_width_px, 3

    @property
    def rows(self) -> int:
        """Rows of tiles; the last may have empty cells."""
        return math.ceil(len(self.cameras) / self.columns)

    @property
    def cell_width_px(self) -> int:
        """Width of one camera's cell."""
        return self.canvas_width_px // self.columns

    @property
    def cell_height_px(self) -> int:
        """Height of one camera's cell."""
        return self.canvas_height_px // self.rows

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of one window: (time, height, width)."""
        patch = self.vision.patch_px
        time = math.ceil(self.num_frames / self.vision.temporal_patch)
        return time, self.canvas_height_px // patch, self.canvas_width_px // patch

    @property
    def visual_tokens(self) -> int:
        """Tokens that the pictures of one window become."""
        return self.vision.tokens(self.grid)

    @property
    def seconds_per_grid(self) -> float:
        """Seconds between the starts of two temporal patches."""
        return self.vision.temporal_patch / self.rate_hz

    def facts(self) -> dict[str, Any]:
        """Return what a window is, for a dry run."""
        return {
            "cameras": list(self.cameras),
            "canvas_px": [self.canvas_width_px, self.canvas_height_px],
            "window_frames": self.num_frames,
            "bytes_per_window": math.prod(self.window_shape),
            "grid": dict(zip(("time", "height", "width"), self.grid, strict=True)),
            "visual_tokens_per_window": self.visual_tokens,
        }

    def described(self) -> list[tuple[str, object]]:
        """Return the same for people, as rows of a table."""
        cell = f"{self.cell_width_px}x{self.cell_height_px}"
        canvas = f"{self.canvas_width_px}x{self.canvas_height_px}"
        return [
            ("cameras", f"{len(self.cameras)}, cells of {cell} px in {self.columns} columns"),
            ("canvas", f"{canvas} px, a multiple of {self.vision.multiple_px}"),
            ("window", f"{self.num_frames} frames at {self.rate_hz:g} Hz"),
            ("visual tokens of a window", self.visual_tokens),
        ]

    def fit_in_cell(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Return the (width, height) of the largest picture of that aspect which a cell holds."""
        scale = min(self.cell_width_px / width_px, self.cell_height_px / height_px)
        return max(round(width_px * scale), 1), max(round(height_px * scale), 1)

    def in_cell(self, picture: Uint8Array) -> Uint8Array:
        """Return a picture (height, width, 3) in the middle of a cell (cell height, cell width, 3), black beside it.

        Raises:
            ValueError: it is larger than a cell.
        """
        if picture.shape == self.picture_shape:
            return picture
        cell = np.zeros(self.picture_shape, dtype=np.uint8)
        height, width, _ = picture.shape
        cell[_middle(self.cell_height_px, height), _middle(self.cell_width_px, width)] = picture
        return cell

    def cut(self, canvas: Uint8Array) -> Uint8Array:
        """Return the cells (cameras, cell height, cell width, 3) of a canvas (height, width, 3) that is ready.

        What lies in no camera's cell is left out: it is black in all that a model was trained on.
        """
        return np.stack([canvas[place] for place in self._cells])

    def shown(self, instant: Sequence[Uint8Array]) -> Uint8Array:
        """Return a picture for people (height, width, 3) of one instant, a cell a camera: the canvas."""
        canvas = np.zeros(self.canvas_shape, dtype=np.uint8)
        for place, picture in zip(self._cells, instant, strict=True):
            canvas[place] = picture
        return canvas

    def canvases(self, pictures: Tensor) -> Tensor:
        """Put windows together, on the device where they are.

        Args:
            pictures: (windows, num_frames, cameras, cell height, cell width, 3).

        Returns:
            (windows, num_frames, height, width, 3), black where no camera has a cell.
        """
        canvases = pictures.new_zeros(*pictures.shape[:2], *self.canvas_shape)
        for camera, place in enumerate(self._cells):
            canvases[:, :, *place] = pictures[:, :, camera]
        return canvases

    def titles(self) -> list[tuple[int, int, str]]:
        """Return (x, y) in that picture, and the view that begins there."""
        cells = zip(self._cells, self.cameras, strict=True)
        return [(columns.start, rows.start, camera) for (rows, columns), camera in cells]

    @property
    def _cells(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the canvas in which each camera lies, row by row."""
        height, width = self.cell_height_px, self.cell_width_px
        cells = [divmod(number, self.columns) for number in range(len(self.cameras))]
        return [
            (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            for row, column in cells
        ]

    def pixel_values(self, pictures: Tensor) -> Tensor:
        """Put canvases together, normalise and cut them into patches, equal bit for bit to the models' own processors.

        Args:
            pictures: (windows, num_frames, cameras, cell height, cell width, 3) uint8.

        Returns:
            (windows * time * height * width patches, 3 * temporal_patch * patch_px ** 2) float32, on the same device;
            of a backbone that reads frames (windows, num_frames, 3, height, width).
        """
        frames = self.canvases(pictures).permute(0, 1, 4, 2, 3)
        if self.vision.reads == "frames":
            return torch.stack([normalise(window, self.vision) for window in frames])
        return torch.cat([patchify(normalise(window, self.vision), self.vision) for window in frames])


def normalise(frames: Tensor, vision: VisionGrid) -> Tensor:
    """Rescale to 0..1 and standardise, in the order of operations of transformers' fused rescale.

    Args:
        frames: (time, 3, height, width) uint8.
        vision: mean and standard deviation of the backbone.
    """
    rescale = 1.0 / (1 / 255)
    mean = (torch.tensor(vision.mean) * rescale).to(frames.device)
    std = (torch.tensor(vision.std) * rescale).to(frames.device)
    return frames.to(torch.float32).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def patchify(frames: Tensor, vision: VisionGrid) -> Tensor:
    """Cut frames into the patches that a Qwen-VL vision tower reads, merged groups together.

    Args:
        frames: (time, 3, height, width); an odd number of frames repeats the last, as the models' processors do.
        vision: patch sizes of the backbone.

    Returns:
        (patches, 3 * temporal_patch * patch_px ** 2).
    """
    patch, merge, temporal = vision.patch_px, vision.merge, vision.temporal_patch
    if missing := -frames.shape[0] % temporal:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    time, channels, height, width = frames.shape
    grid_t, grid_h, grid_w = time // temporal, height // patch, width // patch
    # axes: t, temporal, c, h/merge, merge_h, patch_h, w/merge, merge_w, patch_w
    cut = frames.reshape(grid_t, temporal, channels, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
    # axes: t, h/merge, w/merge, merge_h, merge_w, c, temporal, patch_h, patch_w
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(grid_t * grid_h * grid_w, -1)


def fit_canvas(width_px: int, aspect: float, vision: VisionGrid) -> tuple[int, int]:
    """Return the canvas (width, height) nearest to the one asked for that the backbone's grid allows.

    Args:
        width_px: the width asked for.
        aspect: width / height of the whole canvas, which keeps the aspect of the tiles.
        vision: the backbone's grid; one that reads squares of a single size leaves no choice.
    """
    if vision.side_px:
        return vision.side_px, vision.side_px
    multiple = vision.multiple_px
    width = max(round(width_px / multiple), 1) * multiple
    return width, max(round(width / aspect / multiple), 1) * multiple


def _middle(cell_px: int, picture_px: int) -> slice:
    if picture_px > cell_px:
        raise ValueError(f"a picture of {picture_px} px does not fit a cell of {cell_px} px")
    start = (cell_px - picture_px) // 2
    return slice(start, start + picture_px)
