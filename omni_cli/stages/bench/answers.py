"""How fast a model answers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from omni_cli.recipe import Benchable, BuiltModel, Inferable, require
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure
from omni_cli.stages.etl import ensure_sidecar


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
