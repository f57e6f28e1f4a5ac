"""A torch module as an ONNX program: traced, named, and checked to be of the opset that was asked for."""

import contextlib
import inspect
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

FreeAxes = Mapping[str, Mapping[int, str]]


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    path: Path,
    *,
    opset: int,
    free_axes: FreeAxes,
    metadata: Mapping[str, str],
) -> None:
    """Trace a module and write its ONNX program; weights over 2 GB go to a file beside it.

    Args:
        module: a function of the inputs, in their order, that returns a tuple.
        inputs: examples by name, which fix types, and the lengths of all axes but the free ones.
        output_names: of the program.
        path: the .onnx file.
        opset: version of the ONNX operators.
        free_axes: what the axes are called that may have any length, by input or output. An input's has the same
            length as others of its name; a length that only follows from others is traced as the sum that it is.
        metadata: of the program.

    Raises:
        OmniError: the exporter wrote another opset.
    """
    with _quiet(), torch.no_grad(), apply_patches("dynamo"), apply_patches(exporter_onnx.ExportFormat.ONNX.value):
        shapes = _shapes(module, inputs, free_axes)
        traced = torch.export.export(module.eval(), tuple(inputs.values()), strict=False, dynamic_shapes=shapes)
        names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(output_names)}
        program = torch.onnx.export(traced, args=(), opset_version=opset, verbose=False, **names)
        assert program is not None
        program.model.metadata_props.update(metadata)
        _name_axes(program.model.graph, free_axes)
        program.save(str(path))
    if (written := program.model.opset_imports[""]) != opset:
        raise OmniError(f"opset {opset} was asked for, the exporter wrote {written}; ask for --opset {written}")


def _shapes(module: nn.Module, inputs: Mapping[str, Tensor], free_axes: FreeAxes) -> tuple[Any, ...]:
    """Return the free axes of each input as the exporter takes them: those of `*others` in a tuple of their own."""
    each = tuple(dict.fromkeys(free_axes.get(name, ()), torch.export.Dim.DYNAMIC) for name in inputs)
    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else None
    return each if named is None else (*each[:named], each[named:])


def _name_axes(graph: Any, free_axes: FreeAxes) -> None:
    """Name the free axes of inputs and outputs, which the exporter calls by numbers."""
    for value in (*graph.inputs, *graph.outputs):
        for axis, name in free_axes.get(value.name, {}).items():
            value.shape[axis] = name


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
