"""The vision tower as ONNX holds it, and the noise that models are probed with."""

from typing import Any

import torch
from torch import Tensor

from omni_cli.models import vision_tower
from omni_cli.recipe import Program
from omni_cli.samples.tiling import TiledPreprocess

PROBE_SEED = 20_260


def tower_program(model: Any, preprocess: TiledPreprocess, batch: int) -> Program:
    """Return the vision tower of a model for a fixed number of windows: the grid is fixed inside it."""
    windows = noise((batch, *preprocess.window_shape), torch.Generator().manual_seed(PROBE_SEED))
    pixels = preprocess.pixel_values(windows)
    tower = vision_tower.VisionTower(model, preprocess.grid, batch, pixels)
    inputs = {vision_tower.INPUT_NAME: pixels}
    return Program(f"vision-b{batch}", tower, inputs, tower.output_names(), batch)


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uint8 pictures of noise."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
