"""The vision tower as a function of pixels alone, as ONNX can hold it.

What depends on the grid of a tower that reads patches (positions, window order, sequence lengths) is computed once and
kept as constants: the loops that compute it cannot be traced, and for a rig of cameras the grid never changes. A tower
that reads whole frames of one size depends on nothing of the kind, and takes any number of windows.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.exporters.utils import prepare_for_export

from omni_cli.models import wiring
from omni_cli.models.batched_vision import PLAIN, set_attention
from omni_cli.models.qwen_vl import base_of

INPUT_NAME = "pixel_values"


class VisionTower(nn.Module):
    """From the patches of `batch` windows to what the language model reads in place of its video tokens."""

    def __init__(self, model: nn.Module, grid: tuple[int, int, int], batch: int, example: Tensor) -> None:
        super().__init__()
        self.visual = base_of(model).model.visual
        set_attention(self.visual, PLAIN)  # the library's exporter knows how to trace its own loop
        inputs = {"hidden_states": example, "grid_thw": torch.tensor([grid] * batch)}
        _, prepared, _ = prepare_for_export(self.visual, inputs)
        self.constants = {name: value for name, value in prepared.items() if name != "hidden_states"}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the embeddings (tokens, hidden), then those of each deepstack level.

        Args:
            pixel_values: (patches, values) of all windows.
        """
        output = self.visual(hidden_states=pixel_values, **self.constants)
        return (output.pooler_output, *_deepstack(output))

    def output_names(self) -> tuple[str, ...]:
        """Return the names of what `forward` returns."""
        levels = len(getattr(self.visual.config, "deepstack_visual_indexes", ()))
        return ("image_embeds", *(f"deepstack_{level}" for level in range(levels)))


def _deepstack(output: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(output, "deepstack_features", None) or ())


class FrameTower(nn.Module):
    """From whole frames to the same: the tower, the projector, and how the family pools or shuffles what they see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        base = base_of(model)
        self.look = wiring.wiring_of(base).look
        self.seeing = copy.copy(base.model)  # of the same weights, without the language model's
        parts = {name: part for name, part in base.model.named_children() if name != "language_model"}
        self.seeing._modules = parts

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """Return the embeddings (tokens of all windows, hidden).

        Args:
            pixel_values: (windows, frames, 3, height, width).
        """
        seen: Tensor = self.look(self.seeing, pixel_values, None).pooler_output
        return (seen.flatten(0, 1),)

    def output_names(self) -> tuple[str]:
        """Return the name of what `forward` returns."""
        return ("image_embeds",)

    def free_axes(self) -> dict[str, dict[int, str]]:
        """Return what the axes are called whose length follows the number of windows."""
        return {INPUT_NAME: {0: "windows"}, "image_embeds": {0: "visual_tokens"}}
