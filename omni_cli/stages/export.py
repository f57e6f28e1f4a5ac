"""`omni export`: a run as a folder for the hub's own tools, or its vision tower as ONNX for a fixed rig of cameras."""

import copy
import importlib
import importlib.util
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.models.vision_tower import write_onnx
from omni_cli.recipe import BuiltModel, Exportable, ExportedPart, require
from omni_cli.report import Console
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import models, runs
from omni_cli.stages.merge import MergeRequest, merge

FORMATS = ("onnx", "hf")
ONNX_CARD = models.ONNX_CARD
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LOWEST_OPSET = 18  # torch leaves a program at 18 without a word where less is asked for
_SEED = 20_261
# Largest difference of an output from torch in float32, as a share of the largest output.
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True)
class ExportRequest:
    """What a user asked of `omni export`."""

    format: str = "hf"
    out: Path | None = None  # None: RUN/export/FORMAT
    opset: int = 20
    batches: tuple[int, ...] = (1,)  # one ONNX file for each number of windows: the grid is fixed inside it
    dtype: str = "float32"  # of the ONNX program's weights and input


def export(recipe: Any, run: runs.Run, request: ExportRequest, console: Console) -> dict[str, Any]:
    """Export a finished run.

    Raises:
        UsageError: an unknown format or option, or the packages for ONNX are not installed.
        OmniError: the exported program answers otherwise; nothing is published.
    """
    exportable: Exportable = require(recipe, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    if request.format not in FORMATS:
        raise UsageError(f"--format {request.format}: expected {' or '.join(FORMATS)}")
    folder = request.out or run.folder / "export" / request.format
    facts = {"run_weights": models.weights_key(run), "asked": _asked(request)}
    if done := models.made_from(folder, **facts):
        console.say(f"{folder} is exported from these weights; nothing to do")
        return {"export": str(folder), "run": str(run.folder), **done["result"]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if request.format == "hf":
        result = _export_hf(folder, exportable, run, console)
    else:
        result = _export_onnx(folder, exportable, run, request, console)
    runs.seal_folder(folder, **facts, result=result)
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


def _asked(request: ExportRequest) -> dict[str, Any]:
    if request.format == "hf":
        return {"format": "hf"}
    return {
        "format": "onnx",
        "opset": request.opset,
        "batches": list(request.batches),
        "dtype": request.dtype,
    }


def _export_hf(folder: Path, recipe: Exportable, run: runs.Run, console: Console) -> dict[str, Any]:
    """Copy the whole model, merged first where the run is an adapter, and add what the hub's processors read."""
    source = run.final
    if recipe.tune.mode != "full":
        source = Path(merge(recipe, run, MergeRequest(), console)["model"])
    with models.publish_folder(folder, "exporting to") as made:
        shutil.copytree(source, made, dirs_exist_ok=True)
        recipe.write_processor_files(made, run.manifest.preprocess)
        models.write_model_card(made, recipe, run)
        names = sorted(path.name for path in made.iterdir())
    return {"format": "hf", "files": names}


def _export_onnx(
    folder: Path, recipe: Exportable, run: runs.Run, request: ExportRequest, console: Console
) -> dict[str, Any]:
    """Write one program a batch size, each compared with torch on seeded windows before it is published."""
    runtime = _check_onnx(request)
    built = _load(recipe, run)
    with models.publish_folder(folder, "exporting to") as made:
        writer = _Writer(recipe, built, run.manifest.preprocess, request, runtime, made)
        programs = []
        with console.progress("export", len(request.batches), "programs") as bar:
            for batch in request.batches:
                programs.append(writer.write(batch))
                bar.advance()
        files.write_json(made / ONNX_CARD, _onnx_card(run, request, programs))
    worst = max(program["max_difference"] for program in programs)
    console.say(f"{len(programs)} programs, outputs differ from torch by {worst:.1e} at most")
    return {"format": "onnx", "programs": programs}


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


@dataclass(frozen=True)
class _Writer:
    """Writes the programs of one export."""

    recipe: Exportable
    built: BuiltModel
    preprocess: Preprocess
    request: ExportRequest
    runtime: Any
    folder: Path

    def write(self, batch: int) -> dict[str, Any]:
        """Write and compare the program for one number of windows; return its facts."""
        request, dtype = self.request, _DTYPES[self.request.dtype]
        pixels = self.recipe.export_pixels(_noise(batch, self.preprocess), self.preprocess)
        part = self.recipe.export_part(self.built, self.preprocess, batch)
        with torch.no_grad():
            expected = [output.numpy() for output in part.module(pixels)]
        path = self.folder / f"vision-b{batch}.onnx"
        module = copy.deepcopy(part.module).to(dtype)  # the next batch size starts from the true weights again
        write_onnx(module, part.example.to(dtype), part.input_name, part.output_names, path, opset=request.opset)
        found = _run(self.runtime, path, part, pixels.to(dtype).numpy())
        return {
            "file": path.name,
            "windows": batch,
            "inputs": {part.input_name: list(pixels.shape)},
            "outputs": {name: list(array.shape) for name, array in zip(part.output_names, found, strict=True)},
            **compare_outputs(found, expected, _TOLERANCE[request.dtype]),
        }


def _noise(batch: int, preprocess: Preprocess) -> torch.Tensor:
    shape = (batch, preprocess.num_frames, preprocess.canvas_height_px, preprocess.canvas_width_px, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(_SEED))


def _run(runtime: Any, path: Path, part: ExportedPart, pixels: np.ndarray) -> list[np.ndarray]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return cast(list[np.ndarray], session.run(list(part.output_names), {part.input_name: pixels}))


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


def _onnx_card(run: runs.Run, request: ExportRequest, programs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    preprocess = run.manifest.preprocess
    return {
        "format": 1,
        "from_run": run.name,
        "recipe": run.manifest.recipe,
        "opset": request.opset,
        "dtype": request.dtype,
        "grid": {"time": preprocess.grid[0], "height": preprocess.grid[1], "width": preprocess.grid[2]},
        "preprocess": preprocess.model_dump(mode="json"),
        "programs": list(programs),
    }
