"""ONNX programs of a run: written, each compared with torch output by output, before anybody sees them."""

import copy
import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omni_cli.errors import OmniError, UsageError
from omni_cli.models.onnx_write import write_onnx
from omni_cli.recipe import BuiltModel, Exportable, Program
from omni_cli.report import Console
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import models, parity, runs

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LOWEST_OPSET = 18  # torch leaves a program at 18 without a word where less is asked for
DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Largest difference of an output from torch in float32, as a share of the largest output.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
_GRAPH_BYTES = 4 << 20  # of a program beside its weights
_PEAK = {"float32": 2.4, "float16": 2.9}  # of the memory of the weights in float32, measured with 0.96 GiB of them


@dataclass(frozen=True)
class Writer:
    """Where programs are written, and how."""

    folder: Path
    runtime: Any  # onnxruntime
    opset: int
    dtype: str  # key of DTYPES
    sessions: dict[str, Any] = field(default_factory=dict)  # of programs that were run, by name

    def write(self, program: Program) -> dict[str, Any]:
        """Write and compare one program; return its facts.

        Raises:
            OmniError: it answers otherwise than torch.
        """
        dtype, path = DTYPES[self.dtype], self.folder / f"{program.name}.onnx"
        with torch.no_grad():
            expected = [output.numpy() for output in program.module(*program.inputs.values())]
        inputs = {name: as_type(tensor, dtype) for name, tensor in (program.traced or program.inputs).items()}
        free_axes = program.free_axes or _free_batch(program)
        write_onnx(
            of_type(program.module, dtype),
            inputs,
            program.output_names,
            path,
            opset=self.opset,
            free_axes=free_axes,
            metadata=program.metadata,
        )
        found = [output.numpy() for output in self._ask(self._open(program.name), program.inputs)]
        named = dict(zip(program.output_names, found, strict=True))
        return {
            "file": path.name,
            "windows": "any" if program.batch is None else program.batch,
            "inputs": {name: _shape(tensor.shape, program.free_axes.get(name)) for name, tensor in inputs.items()},
            "outputs": {name: _shape(array.shape, program.free_axes.get(name)) for name, array in named.items()},
            **compare_outputs(found, expected, _TOLERANCE[self.dtype]),
            "allowed_share": _TOLERANCE[self.dtype],
            "shares": dict(zip(named, shares(found, expected), strict=True)),
        }

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what a written program says, in float32 as the model does."""
        if name not in self.sessions:
            self.sessions[name] = self._open(name)
        return self._ask(self.sessions[name], inputs)

    def _open(self, name: str) -> Any:
        path = self.folder / f"{name}.onnx"
        return self.runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def _ask(self, session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        said = session.run(None, {key: as_type(tensor, DTYPES[self.dtype]).numpy() for key, tensor in inputs.items()})
        return [torch.from_numpy(array).float() for array in said]


def load(recipe: Exportable, run: runs.Run, console: Console) -> BuiltModel:
    """Load the whole model in float32, never a quantised one, and fold its adapter into it.

    Raises:
        OmniError: with the adapter folded in it answers otherwise.
    """
    preprocess = run.manifest.preprocess
    models.check_base(recipe, run)
    built = recipe.load_to_merge(preprocess, run.final)
    whole = BuiltModel(built.model.to(torch.float32), built.tokenizer)
    return whole if recipe.tune.mode == "full" else _merged(recipe, whole, preprocess, console)


def _merged(recipe: Exportable, adapted: BuiltModel, preprocess: Preprocess, console: Console) -> BuiltModel:
    expected = parity.probe(recipe, adapted, preprocess)
    merged = recipe.merge(adapted)
    difference = parity.difference(parity.probe(recipe, merged, preprocess), expected)
    allowed = parity.TOLERANCE[torch.float32][0] * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise OmniError(
            f"with the adapter folded into its base outputs differ by {difference:.1e}, {allowed:.1e} allowed; "
            "nothing is published"
        )
    console.say(f"the adapter is folded into its base: outputs differ by {difference:.1e}, {allowed:.1e} allowed")
    return merged


def peak_bytes(weights: int, dtype: str) -> float:
    """Return the memory that it takes to write and compare programs of a model of so many weights."""
    return weights * torch.float32.itemsize * _PEAK[dtype]


def needed_bytes(planned: Sequence[Program], dtype: str) -> int:
    """Return what programs take on a disk: each holds its own weights."""
    weights = [sum(weight.numel() for weight in program.module.parameters()) for program in planned]
    return sum(weights) * DTYPES[dtype].itemsize + _GRAPH_BYTES * len(planned)


def ready(opset: int, dtype: str) -> Any:
    """Return onnxruntime.

    Raises:
        UsageError: a package is absent, or an option is out of range.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; install them with: pip install 'omni-cli[onnx]'")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: ONNX programs are {' or '.join(DTYPES)}")
    highest = importlib.import_module("onnx").defs.onnx_opset_version()
    if not _LOWEST_OPSET <= opset <= highest:
        raise UsageError(f"--opset {opset}: expected {_LOWEST_OPSET} to {highest}")
    return importlib.import_module("onnxruntime")


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a program's type; whole numbers stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def of_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a module whose weights are of a type: itself where they are, or a copy that shares none of them.

    Tables that a model computes for itself, such as those of rope, keep their type, as they do where it is loaded.
    """
    weights = dict(module.named_parameters(remove_duplicate=False)) | module.state_dict(keep_vars=True)
    other = [weight for weight in weights.values() if as_type(weight, dtype).dtype != weight.dtype]
    if not other:
        return module
    memo = {id(weight): _cast(weight, dtype) for weight in other}
    return copy.deepcopy(module, memo)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.detach().to(dtype)
    return nn.Parameter(cast, requires_grad=False) if isinstance(weight, nn.Parameter) else cast


def _free_batch(program: Program) -> dict[str, dict[int, str]]:
    if program.batch is not None:
        return {}
    return {name: {0: "batch"} for name in (*program.inputs, *program.output_names)}


def _shape(shape: Sequence[int], free: Mapping[int, str] | None) -> list[int | str]:
    """Return a shape with its free axes by name."""
    return [(free or {}).get(axis, length) for axis, length in enumerate(shape)]


def shares(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Return the largest difference of each output as a share of its largest number."""
    pairs = zip(found, expected, strict=True)
    return [_share(_difference(one, other), float(np.abs(other).max())) for one, other in pairs]


def compare_outputs(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> dict[str, float]:
    """Return the difference of the output that comes nearest to what is allowed for it, and that.

    Args:
        found: outputs of the program.
        expected: outputs of torch in float32.
        tolerance: as a share of each output's largest value.

    Raises:
        OmniError: shapes differ, or the difference is larger than allowed; nothing is published.
    """
    if [array.shape for array in found] != [array.shape for array in expected]:
        raise OmniError("the ONNX program's outputs have other shapes than torch's; nothing is published")
    differences = [_difference(one, other) for one, other in zip(found, expected, strict=True)]
    allowed = [tolerance * float(np.abs(array).max()) for array in expected]
    worst = max(range(len(allowed)), key=lambda index: _share(differences[index], allowed[index]))
    if not differences[worst] <= allowed[worst]:
        raise OmniError(
            f"output {worst} of the ONNX program differs from torch's by {differences[worst]:.1e}, "
            f"{allowed[worst]:.1e} allowed; nothing is published: try --dtype float32 or another --opset"
        )
    return {"max_difference": differences[worst], "allowed_difference": allowed[worst]}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float32) - expected).max())


def _share(difference: float, allowed: float) -> float:
    """Return a difference as a share of what is allowed; one that is not a number is the largest."""
    return difference / allowed if allowed and not math.isnan(difference) else math.inf
