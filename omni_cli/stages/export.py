"""`omni export`: a run as a folder for the hub's own tools, or as ONNX programs that were compared with the model."""

import copy
import importlib
import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.models.onnx_write import write_onnx
from omni_cli.recipe import BuiltModel, Exportable, Program, require
from omni_cli.report import Console
from omni_cli.stages import models, runs
from omni_cli.stages.merge import MergeRequest, merge

ONNX_CARD = models.ONNX_CARD
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LOWEST_OPSET = 18  # torch leaves a program at 18 without a word where less is asked for
# Largest difference of an output from torch in float32, as a share of the largest output.
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True)
class ExportRequest:
    """What a user asked of `omni export`."""

    format: str | None = None  # None: the first that the recipe has
    out: Path | None = None  # None: RUN/export/FORMAT
    opset: int = 20
    batches: tuple[int, ...] = (1,)  # numbers of windows; one ONNX file each where the recipe fixes them inside it
    dtype: str = "float32"  # of the ONNX program's weights and input


def export(recipe: Any, run: runs.Run, request: ExportRequest, console: Console) -> dict[str, Any]:
    """Export a finished run.

    Raises:
        UsageError: an unknown format or option, or the packages for ONNX are not installed.
        OmniError: the exported program answers otherwise; nothing is published.
    """
    exportable: Exportable = require(recipe, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    known, form = exportable.export_formats, request.format or exportable.export_formats[0]
    if form not in known:
        raise UsageError(f"--format {form}: recipe {run.manifest.recipe} is exported as {' or '.join(known)}")
    folder = request.out or run.folder / "export" / form
    if done := models.made_from(folder, **_facts(form, run, request)):
        console.say(f"{folder} is exported from these weights; nothing to do")
        return {"export": str(folder), "run": str(run.folder), **done["result"]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if form == "hf":
        result = _export_hf(folder, exportable, run, request, console)
    else:
        result = _export_onnx(folder, exportable, run, request, console)
    console.say(f"exported to {folder}")
    return {"export": str(folder), "run": str(run.folder), **result}


def parse_batches(text: str) -> tuple[int, ...]:
    """Read `4` as (4,) and `1-8` as 1 to 8.

    Raises:
        UsageError: it is neither.
    """
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or not 1 <= int(first) <= int(last or first) <= 64:
        raise UsageError(f"--batch {text}: expected a number of windows such as 1, or a range such as 1-8 (64 at most)")
    return tuple(range(int(first), int(last or first) + 1))


def _facts(form: str, run: runs.Run, request: ExportRequest) -> dict[str, Any]:
    """Return what the receipt says that an export was made from."""
    return {"run_weights": models.weights_key(run), "asked": _asked(form, request)}


def _asked(form: str, request: ExportRequest) -> dict[str, Any]:
    if form == "hf":
        return {"format": form}
    return {"format": form, "opset": request.opset, "batches": list(request.batches), "dtype": request.dtype}


def _export_hf(
    folder: Path, recipe: Exportable, run: runs.Run, request: ExportRequest, console: Console
) -> dict[str, Any]:
    """Copy the whole model, merged first where the run is an adapter, and add what the hub's processors read."""
    source = run.final
    if recipe.tune.mode != "full":
        source = Path(merge(recipe, run, MergeRequest(), console)["model"])
    with models.publish_folder(folder, "exporting to") as (made, facts):
        shutil.copytree(source, made, dirs_exist_ok=True)
        recipe.write_processor_files(made, run.manifest.preprocess)
        models.write_model_card(made, recipe, run)
        result = {"format": "hf", "files": sorted(path.name for path in made.iterdir())}
        facts |= {**_facts("hf", run, request), "result": result}
    return result


def _export_onnx(
    folder: Path, recipe: Exportable, run: runs.Run, request: ExportRequest, console: Console
) -> dict[str, Any]:
    """Write the recipe's programs, each compared with torch on seeded inputs before any is published."""
    runtime, preprocess = _check_onnx(request), run.manifest.preprocess
    built = _load(recipe, run)
    planned = recipe.programs(built, preprocess, request.batches)
    with models.publish_folder(folder, "exporting to") as (made, facts):
        written = []
        with console.progress("export", len(planned), "programs") as bar:
            for program in planned:
                written.append(_write(program, made, request, runtime))
                bar.advance()
        run_program = partial(_run_named, cache(partial(_session, runtime, made)), _DTYPES[request.dtype])
        rehearsed = dict(recipe.rehearse(built, planned, run_program, request.dtype))
        files.write_json(made / ONNX_CARD, _onnx_card(run, request, written, rehearsed))
        result = {"format": "onnx", "programs": written, "rehearsed": rehearsed}
        facts |= {**_facts("onnx", run, request), "result": result}
    worst = max(program["max_difference"] for program in written)
    console.say(f"{len(written)} programs, outputs differ from torch by {worst:.1e} at most")
    for what, difference in rehearsed.items():
        console.say(f"{what}: differ by {difference:.1e} of the largest number of a kind at most")
    return result


def _load(recipe: Exportable, run: runs.Run) -> BuiltModel:
    """Load the whole model in float32, never a quantised one."""
    preprocess = run.manifest.preprocess
    models.check_base(recipe, run)
    built = recipe.load_to_merge(preprocess, run.final)
    return BuiltModel(built.model.to(torch.float32), built.tokenizer)


def _check_onnx(request: ExportRequest) -> Any:
    """Return onnxruntime.

    Raises:
        UsageError: a package is absent, or an option is out of range.
    """
    if missing := [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; install them with: pip install 'omni-cli[onnx]'")
    if request.dtype not in _TOLERANCE:
        raise UsageError(f"--dtype {request.dtype}: ONNX programs are {' or '.join(_TOLERANCE)}")
    runtime = importlib.import_module("onnxruntime")
    highest = importlib.import_module("onnx").defs.onnx_opset_version()
    if not _LOWEST_OPSET <= request.opset <= highest:
        raise UsageError(f"--opset {request.opset}: expected {_LOWEST_OPSET} to {highest}")
    return runtime


def _write(program: Program, folder: Path, request: ExportRequest, runtime: Any) -> dict[str, Any]:
    """Write and compare one program; return its facts."""
    dtype, path = _DTYPES[request.dtype], folder / f"{program.name}.onnx"
    with torch.no_grad():
        expected = [output.numpy() for output in program.module(*program.inputs.values())]
    inputs = {name: as_type(tensor, dtype) for name, tensor in program.inputs.items()}
    module = copy.deepcopy(program.module).to(dtype)  # another program may hold the same weights
    write_onnx(
        module,
        inputs,
        program.output_names,
        path,
        opset=request.opset,
        dynamic_batch=program.batch is None,
        metadata=program.metadata,
    )
    said = _run_named(partial(_session, runtime, folder), dtype, program.name, program.inputs)
    found = [output.numpy() for output in said]
    return {
        "file": path.name,
        "windows": "any" if program.batch is None else program.batch,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "outputs": {name: list(array.shape) for name, array in zip(program.output_names, found, strict=True)},
        **compare_outputs(found, expected, _TOLERANCE[request.dtype]),
    }


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a program's type; whole numbers stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _session(runtime: Any, folder: Path, name: str) -> Any:
    return runtime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])


def _run_named(
    open_session: Callable[[str], Any], dtype: torch.dtype, name: str, inputs: Mapping[str, Tensor]
) -> list[Tensor]:
    """Return what a program says, in float32 as the model does."""
    said = open_session(name).run(None, {key: as_type(tensor, dtype).numpy() for key, tensor in inputs.items()})
    return [torch.from_numpy(array).float() for array in said]


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
    differences = [
        float(np.abs(one.astype(np.float32) - other).max()) for one, other in zip(found, expected, strict=True)
    ]
    allowed = [tolerance * float(np.abs(array).max()) for array in expected]
    worst = max(range(len(allowed)), key=lambda index: _share(differences[index], allowed[index]))
    if not differences[worst] <= allowed[worst]:
        raise OmniError(
            f"output {worst} of the ONNX program differs from torch's by {differences[worst]:.1e}, "
            f"{allowed[worst]:.1e} allowed; nothing is published: try --dtype float32 or another --opset"
        )
    return {"max_difference": differences[worst], "allowed_difference": allowed[worst]}


def _share(difference: float, allowed: float) -> float:
    """Return a difference as a share of what is allowed; one that is not a number is the largest."""
    return difference / allowed if allowed and not math.isnan(difference) else math.inf


def _onnx_card(
    run: runs.Run, request: ExportRequest, programs: Sequence[dict[str, Any]], rehearsed: Mapping[str, float]
) -> dict[str, Any]:
    preprocess = run.manifest.preprocess
    return {
        "format": 1,
        "from_run": run.name,
        "recipe": run.manifest.recipe,
        "opset": request.opset,
        "dtype": request.dtype,
        "window": preprocess.facts(),
        "preprocess": preprocess.model_dump(mode="json"),
        "programs": list(programs),
        "rehearsed": dict(rehearsed),
    }
