"""Several cameras on one canvas, row by row, aspects kept, cut into the patches of a vision-language model.

Pictures are stored at the size they have on the canvas, one row a camera and instant; the canvas is put together when
a window is read. What no picture covers is black layout: the bars beside a picture of another aspect, and the last two
cells of seven cameras in a 3 x 3 grid.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from omni_cli.config import Settings
from omni_cli.formats.video import Decoder, Uint8Array

Family = Literal["qwen2_5_vl", "qwen3_vl"]
Labels = Literal["ego-motion", "speed", "waypoints", "reasoning"]


class VisionGrid(Settings):
    """What a vision backbone asks of its pixels."""

    family: Family
    patch_px: int
    merge: int  # patches a side that become one token
    temporal_patch: int  # frames a token
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def multiple_px(self) -> int:
        """Every side of a canvas is a multiple of this."""
        return self.patch_px * self.merge


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
        if self.canvas_width_px % multiple or self.canvas_height_px % multiple:
            raise ValueError(
                f"canvas {self.canvas_width_px}x{self.canvas_height_px} px is not a multiple of {multiple} px"
            )
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """What is stored at each instant: one picture a camera."""
        return self.cameras

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Shape of a window's pictures: (num_frames, canvas height, canvas width, 3)."""
        return self.num_frames, self.canvas_height_px, self.canvas_width_px, 3

    @property
    def instant_bytes(self) -> int:
        """Bytes stored at one instant, at most."""
        return len(self.cameras) * self.cell_width_px * self.cell_height_px * 3

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
        time, height, width = self.grid
        return time * height * width // self.vision.merge**2

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

    def picture_shape(self, width_px: int, height_px: int) -> tuple[int, ...]:
        """Return the shape of a stored picture of that size: RGB."""
        return height_px, width_px, 3

    def fit_in_cell(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Return the (width, height) of the largest picture of that aspect which a cell holds."""
        scale = min(self.cell_width_px / width_px, self.cell_height_px / height_px)
        return max(round(width_px * scale), 1), max(round(height_px * scale), 1)

    def places(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[Any, ...], ...]:
        """Return where pictures lie on canvases (..., height, width, 3), each centred in its cell.

        Args:
            shapes: (height, width, 3) of the picture of each camera, in the order of the cameras.

        Raises:
            ValueError: there are not as many pictures as cameras, or one is larger than a cell.
        """
        if len(shapes) != len(self.cameras):
            raise ValueError(f"{len(shapes)} pictures for {len(self.cameras)} cameras")
        found = []
        for position, (height, width, _) in enumerate(shapes):
            row, column = divmod(position, self.columns)
            top = row * self.cell_height_px + _margin(self.cell_height_px, height)
            left = column * self.cell_width_px + _margin(self.cell_width_px, width)
            found.append((..., slice(top, top + height), slice(left, left + width), slice(None)))
        return tuple(found)

    def place(self, canvas: Uint8Array, pictures: Sequence[Uint8Array]) -> None:
        """Draw the pictures of one instant, one a camera, on a black canvas (height, width, 3); raises as `places`."""
        for place, picture in zip(self.places([one.shape for one in pictures]), pictures, strict=True):
            canvas[place] = picture

    def shown(self, instant: Uint8Array) -> Uint8Array:
        """Return a picture for people (height, width, 3) of one instant of a window: the canvas itself."""
        return instant

    def titles(self) -> list[tuple[int, int, str]]:
        """Return (x, y) in that picture, and the view that begins there."""
        cells = [divmod(number, self.columns) for number in range(len(self.cameras))]
        places = [(column * self.cell_width_px, row * self.cell_height_px) for row, column in cells]
        return [(*place, camera) for place, camera in zip(places, self.cameras, strict=True)]

    def pixel_values(self, canvases: Tensor) -> Tensor:
        """Normalise and cut canvases into patches, equal bit for bit to the models' own video processors.

        Args:
            canvases: (windows, num_frames, height, width, 3) uint8.

        Returns:
            (windows * time * height * width patches, 3 * temporal_patch * patch_px ** 2) float32, on the same device.
        """
        frames = canvases.permute(0, 1, 4, 2, 3)
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
        vision: the backbone's grid.
    """
    multiple = vision.multiple_px
    width = max(round(width_px / multiple), 1) * multiple
    return width, max(round(width / aspect / multiple), 1) * multiple


def _margin(cell_px: int, picture_px: int) -> int:
    if picture_px > cell_px:
        raise ValueError(f"a picture of {picture_px} px does not fit a cell of {cell_px} px")
    return (cell_px - picture_px) // 2
