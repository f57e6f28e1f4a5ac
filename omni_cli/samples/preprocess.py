"""How pictures and text become model inputs: one frozen object that etl, train, eval, infer and export share.

It is made once, at etl, saved in the shard manifest, and copied from there into every run and export.
"""

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from omni_cli.config import Settings
from omni_cli.formats.video import Decoder

Family = Literal["qwen2_5_vl", "qwen3_vl"]
Labels = Literal["ego-motion", "speed"]


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


class Preprocess(Settings):
    """Cameras, tiles, canvas, time grid, patches and text format of one shard set and of every model trained on it."""

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
    def _fits_the_grid(self) -> "Preprocess":
        multiple = self.vision.multiple_px
        if self.canvas_width_px % multiple or self.canvas_height_px % multiple:
            raise ValueError(
                f"canvas {self.canvas_width_px}x{self.canvas_height_px} px is not a multiple of {multiple} px"
            )
        return self

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
