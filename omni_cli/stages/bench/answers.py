"""How fast a model answers, and how its exported programs compare with torch."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.recipe import Benchable, BuiltModel, Exportable, Inferable, Program, require
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages import models
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.export import as_type

_TORCH, _ONNX = "torch eager", "ONNX Runtime"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def bench_infer(inputs: Inputs, repeats: int) -> Part:
    """Time whole answers at batch 1 and at the profile's batch; pictures are in memory already."""
    recipe: Benchable = require(inputs.recipe, Benchable)  # type: ignore[type-abstract]  # a protocol names it
    built, subject = _model(inputs, recipe)
    dataset = WindowDataset(inputs.shards, ALL, ensure_sidecar(inputs.shards, recipe, inputs.console))
    lines = []
    for size in sorted({1, recipe.train.batch_size}):
        rows = [dataset[index % len(dataset)] for index in range(size)]
        with _counted_forwards(recipe.core(built)) as count:
            recipe.predict(built, rows, inputs.preprocess)
        timings = measure({"ask": partial(recipe.predict, built, rows, inputs.preprocess)}, repeats)
        units = {unit: size * amount for unit, amount in recipe.answer_units(count[0], inputs.preprocess).items()}
        lines.append(Line(f"batch {size}", timings["ask"], {"windows": size, **units}))
    on = f"{subject}, on windows of {math.prod(inputs.preprocess.window_shape) / 1e6:.1f} MB"
    return Part("infer", on, tuple(lines), _gain(lines))


def bench_export(inputs: Inputs, repeats: int) -> Part:
    """Time the exported programs in ONNX Runtime beside the same modules in torch, on the CPU.

    Raises:
        UsageError: the newest run has no ONNX export.
    """
    folder, run = find_export(inputs), inputs.run
    if folder is None or run is None:
        raise UsageError("no run of this profile with an ONNX export; make one with: omni export --format onnx")
    card = files.read_json(folder / models.ONNX_CARD)
    trained = run.recipe_settings(type(inputs.recipe))
    recipe: Exportable = require(trained, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    batches = sorted({1 if one["windows"] == "any" else one["windows"] for one in card["programs"]})
    built = recipe.load_to_merge(inputs.preprocess, run.final)
    work: dict[str, Callable[[], object]] = {}
    for program in recipe.programs(built, inputs.preprocess, batches):
        work |= _two_ways(program, folder, _DTYPES[card["dtype"]])
    timings = measure(work, repeats)
    lines = tuple(Line(name, timing, {"calls": 1}) for name, timing in timings.items())
    pairs = zip(lines[::2], lines[1::2], strict=True)
    ratios = {
        f"{onnx.what} / {_TORCH}, in calls a second": torch_.timing.median_s / onnx.timing.median_s
        for torch_, onnx in pairs
    }
    return Part("export", f"{folder}, {card['dtype']}, on the CPU", lines, ratios)


def _two_ways(program: Program, folder: Path, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the work of one program in torch, and in ONNX Runtime."""
    module = program.module.to(dtype)
    inputs = {name: as_type(tensor, dtype) for name, tensor in program.inputs.items()}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    session = _session(folder / f"{program.name}.onnx")

    def in_torch() -> object:
        with torch.no_grad():
            return module(*inputs.values())

    return {
        f"{program.name}, {_TORCH}": in_torch,
        f"{program.name}, {_ONNX}": lambda: session.run(list(program.output_names), arrays),
    }


def find_export(inputs: Inputs) -> Path | None:
    """Return the folder of the finished ONNX export of the run that is measured, or None."""
    if inputs.run is None:
        return None
    folder = inputs.run.folder / "export" / "onnx"
    return folder if models.made_from(folder, run_weights=models.weights_key(inputs.run)) else None


def _model(inputs: Inputs, recipe: Inferable) -> tuple[BuiltModel, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if inputs.run is None:
        built, note = recipe.load_base_to_ask(inputs.preprocess)
        return recipe.place(built, device, None), f"base model {note}"
    return recipe.place(recipe.load(inputs.preprocess, inputs.run.final), device, None), f"run {inputs.run.folder}"


@contextmanager
def _counted_forwards(core: nn.Module) -> Iterator[list[int]]:
    """Count the forward passes inside the block: each one gives every row of a batch a token."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    handle = core.register_forward_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def _gain(lines: list[Line]) -> dict[str, float]:
    if len(lines) < 2:
        return {}
    one, many = (line.rates()["windows"] for line in lines)
    return {f"{lines[1].what} / {lines[0].what}, in windows a second": many / one}


def _session(path: Path) -> Any:
    """Open a program on as many threads as torch has."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
