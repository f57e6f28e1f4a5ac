"""The vision tower as a function of pixels alone, for a fixed grid, and its ONNX program.

What depends on the grid (positions, window order, sequence lengths) is computed once and kept as constants: the loops
that compute it cannot be traced, and for a rig of cameras the grid never changes.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.exporters import exporter_onnx
from transformers.exporters.utils import apply_patches, prepare_for_export

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


def write_onnx(
    module: nn.Module, example: Tensor, input_name: str, output_names: tuple[str, ...], path: Path, *, opset: int
) -> None:
    """Trace a module and write its ONNX program; weights over 2 GB go to a file beside it.

    Args:
        module: a function of one tensor that returns a tuple.
        example: fixes the input's shape and type.
        input_name: of the program.
        output_names: of the program.
        path: the .onnx file.
        opset: version of the ONNX operators.
    """
    with _quiet(), torch.no_grad(), apply_patches("dynamo"), apply_patches(exporter_onnx.ExportFormat.ONNX.value):
        traced = torch.export.export(module.eval(), (example,), strict=False)
        names: dict[str, Any] = {"input_names": [input_name], "output_names": list(output_names)}
        program = torch.onnx.export(traced, args=(), opset_version=opset, verbose=False, **names)
        assert program is not None
        program.save(str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what torch and onnxscript tell of their own parts; an error still gets through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _deepstack(output: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(output, "deepstack_features", None) or ())
