"""How fast a model answers, and how its exported vision tower compares with torch."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.models.qwen_vl import base_of
from omni_cli.recipe import BuiltModel, Exportable, Inferable, require
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages import models
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure
from omni_cli.stages.etl import ensure_sidecar

_TORCH, _ONNX = "torch eager", "ONNX Runtime"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def bench_infer(inputs: Inputs, repeats: int) -> Part:
    """Time whole answers at batch 1 and at the profile's batch; pictures are in memory already."""
    recipe: Inferable = require(inputs.recipe, Inferable)  # type: ignore[type-abstract]  # a protocol names it
    built, subject = _model(inputs, recipe)
    dataset = WindowDataset(inputs.shards, ALL, ensure_sidecar(inputs.shards, recipe, inputs.console))
    lines = []
    for size in sorted({1, recipe.train.batch_size}):
        rows = [dataset[index % len(dataset)] for index in range(size)]
        with _counted_forwards(built.model) as count:
            recipe.predict(built, rows, inputs.preprocess)
        timings = measure({"ask": partial(recipe.predict, built, rows, inputs.preprocess)}, repeats)
        lines.append(Line(f"batch {size}", timings["ask"], {"windows": size, "tokens": size * count[0]}))
    on = f"{subject}, on {inputs.preprocess.visual_tokens} visual tokens a window"
    return Part("infer", on, tuple(lines), _gain(lines))


def bench_export(inputs: Inputs, repeats: int) -> Part:
    """Time the exported vision tower in ONNX Runtime beside the same tower in torch, on the CPU.

    Raises:
        UsageError: the newest run has no ONNX export.
    """
    folder, run = find_export(inputs), inputs.run
    if folder is None or run is None:
        raise UsageError("no run of this profile with an ONNX export; make one with: omni export --format onnx")
    card = files.read_json(folder / models.ONNX_CARD)
    program = card["programs"][0]
    trained = run.recipe_settings(type(inputs.recipe))
    recipe: Exportable = require(trained, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    built = recipe.load(inputs.preprocess, run.final)
    part = recipe.export_part(built, inputs.preprocess, program["windows"])
    module, pixels = part.module.to(_DTYPES[card["dtype"]]), part.example.to(_DTYPES[card["dtype"]])
    session = _session(folder / program["file"])

    def in_torch() -> Any:
        with torch.no_grad():
            return module(pixels)

    work = {_TORCH: in_torch, _ONNX: lambda: session.run(list(part.output_names), {part.input_name: pixels.numpy()})}
    timings = measure(work, repeats)
    lines = tuple(Line(name, timing, {"windows": program["windows"]}) for name, timing in timings.items())
    ratio = timings[_TORCH].median_s / timings[_ONNX].median_s
    on = f"{folder / program['file']}, {card['dtype']}, {program['windows']} windows at once, on the CPU"
    return Part("export", on, lines, {f"{_ONNX} / {_TORCH}, in windows a second": ratio})


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
def _counted_forwards(model: nn.Module) -> Iterator[list[int]]:
    """Count the forward passes inside the block: each one gives every row of a batch a token."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    handle = base_of(model).register_forward_hook(note)
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
