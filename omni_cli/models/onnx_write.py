"""A torch module as an ONNX program: traced, named, and checked to be of the opset that was asked for."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.exporters import exporter_onnx
from transformers.exporters.utils import apply_patches

from omni_cli.errors import OmniError


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    path: Path,
    *,
    opset: int,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str],
) -> None:
    """Trace a module and write its ONNX program; weights over 2 GB go to a file beside it.

    Args:
        module: a function of the inputs, in their order, that returns a tuple.
        inputs: examples by name, which fix shapes and types.
        output_names: of the program.
        path: the .onnx file.
        opset: version of the ONNX operators.
        dynamic_batch: the first axis of every input may have any length.
        metadata: of the program.

    Raises:
        OmniError: the exporter wrote another opset.
    """
    with _quiet(), torch.no_grad(), apply_patches("dynamo"), apply_patches(exporter_onnx.ExportFormat.ONNX.value):
        shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None
        traced = torch.export.export(module.eval(), tuple(inputs.values()), strict=False, dynamic_shapes=shapes)
        names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(output_names)}
        program = torch.onnx.export(traced, args=(), opset_version=opset, verbose=False, **names)
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(str(path))
    if (written := program.model.opset_imports[""]) != opset:
        raise OmniError(f"opset {opset} was asked for, the exporter wrote {written}; ask for --opset {written}")


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
