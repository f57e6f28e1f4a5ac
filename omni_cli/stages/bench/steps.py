"""How long a training step takes, phase by phase, in the real Trainer: and in that of stock TRL, on the same rows."""

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from omni_cli.models.qwen_vl import DTYPES
from omni_cli.recipe import BuiltModel, Comparable
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.peak import peak_of
from omni_cli.stages.bench.stock import make_stock_trainer
from omni_cli.stages.bench.timing import Line, Part
from omni_cli.stages.bench.turns import PHASES, WARMUPS, Clock, Timed, Turns, train_in_turn
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.train import make_trainer

PEAK = "peak_memory_gib"  # of a GPU, by one trainer with its model
PEAK_BESIDE_WEIGHTS = "peak_memory_beside_weights_gib"  # of this machine: the rest of a step, with optimiser state
_GIB, _GIGA = 2**30, 1e9
_STOCK = "stock TRL: "
_DIFFERENCE = "largest_relative_loss_difference"


class Cycled(WindowDataset):
    """A dataset that begins anew until it has as many rows as are wanted, so that every batch is full."""

    def __init__(self, dataset: WindowDataset, rows: int) -> None:
        super().__init__(dataset.shards, dataset.split, dataset.sidecar_key)
        self._windows, self._rows = len(dataset), rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index % self._windows)


def bench_train(inputs: Inputs, repeats: int) -> Part:
    """Time optimiser steps of one batch each, after two that do not count; beside stock TRL's where there is such.

    Model FLOPs utilisation (MFU) is the operations that the model needs for a step (the rule is in `models/flops.py`),
    over the time that it took, over the best that the device could do: of its data sheet, or measured (`peak.py`).
    """
    steps = WARMUPS + repeats
    train = inputs.recipe.train.model_copy(update={"accumulation": 1, "max_steps": steps})
    recipe = inputs.recipe.model_copy(update={"train": train})
    windows = WindowDataset(inputs.shards, ALL, ensure_sidecar(inputs.shards, recipe, inputs.console))
    set_seed(train.seed)
    clock = Clock(Turns())
    built = recipe.build(inputs.preprocess)
    cycled = Cycled(windows, train.batch_size * steps)
    trainers = _trainers(inputs.work, recipe, built, cycled, clock, is_beside_stock=inputs.is_beside_stock)
    flops = train.batch_size * _flops_a_sample(recipe, built, windows)
    train_in_turn(list(trainers.values()))
    units = {"samples": 1.0, **recipe.sample_units(windows)}
    amounts = {unit: train.batch_size * amount for unit, amount in units.items()}
    amounts |= {"GFLOP of the model": flops / _GIGA} if flops else {}
    clocks = {name: trainer.clock for name, trainer in trainers.items()}
    lines = tuple(line for name, clock in clocks.items() for line in _lines(name, clock, amounts))
    size = ", ".join(f"{amount:.0f} {unit} a sample" for unit, amount in units.items() if unit != "samples")
    on = f"{recipe.model}, {recipe.tune.mode}, batch {train.batch_size}, {size}"
    best_s, best = _best(recipe, flops)
    settings = {**_loss_difference(recipe, clocks), **best}
    for line in _told(settings):
        inputs.console.say(line)
    return Part("train", on, lines, _ratios(clocks, best_s), settings)


def _best(recipe: Any, flops: float) -> tuple[float, dict[str, Any]]:
    """Return how long a step would take at the device's best, and what that is; 0 where nobody counted operations."""
    if not flops:
        return 0.0, {}
    peak = peak_of(DTYPES[recipe.precision])
    return flops / peak.flops_per_s, {"peak_gigaflops_per_s": peak.flops_per_s / _GIGA, "peak": peak.source}


def _trainers(
    folder: Path, recipe: Any, built: BuiltModel, dataset: WindowDataset, clock: Clock, *, is_beside_stock: bool
) -> dict[str, Any]:
    """Return our Trainer under an empty name, and stock TRL's where it is wanted and the recipe has such a thing."""
    steps, preprocess = recipe.train.max_steps, dataset.preprocess
    ours = make_trainer(folder / "steps", recipe, built, dataset, steps, Timed)
    ours.clock, beside = clock.now_built(), Clock(clock.turns)
    stock = recipe.stock(built, preprocess) if is_beside_stock and isinstance(recipe, Comparable) else None
    if stock is None:
        beside.turns.leave(beside, has_failed=False)
        return {"": ours}
    theirs = make_stock_trainer(folder / "stock", recipe, built.tokenizer, stock, dataset)
    theirs.clock = beside.now_built()
    return {"": ours, _STOCK: theirs}


def _flops_a_sample(recipe: Any, built: BuiltModel, windows: WindowDataset) -> float:
    if not isinstance(recipe, Comparable):
        return 0.0
    rows = [windows.row(index) for index in range(len(windows))]
    return recipe.step_flops(built, rows, windows.preprocess) / len(rows)


def _lines(name: str, clock: Clock, amounts: dict[str, float]) -> list[Line]:
    key = PEAK if torch.cuda.is_available() else PEAK_BESIDE_WEIGHTS
    notes = {key: round(clock.peak_bytes / _GIB, 3) if clock.peak_bytes else None}
    timings = clock.timings()
    phases = [Line(f"{name}{phase}", timings[phase]) for phase in PHASES]
    return [Line(f"{name}step", timings["step"], amounts, notes), *phases]


def _ratios(clocks: dict[str, Clock], best_s: float) -> dict[str, float]:
    """Return what each phase is of a step, how much of the device's best a step was, and stock's time over ours."""
    steps: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name, clock in clocks.items():
        timings = {phase: timing.median_s for phase, timing in clock.timings().items()}
        steps[name] = timings["step"]
        ratios |= {f"{name}{phase} / {name}step": timings[phase] / steps[name] for phase in PHASES}
        ratios |= {f"{name}MFU": best_s / steps[name]} if best_s else {}
    return ratios | {f"{name}step / step": step_s / steps[""] for name, step_s in steps.items() if name}


def _loss_difference(recipe: Any, clocks: dict[str, Clock]) -> dict[str, float]:
    """Return how far the losses of the two part at most, of a step's; with dropout they are drawn apart."""
    if _STOCK not in clocks or recipe.tune.dropout:
        return {}
    pairs = zip(clocks[""].losses, clocks[_STOCK].losses, strict=True)
    return {_DIFFERENCE: max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)}


def _told(settings: dict[str, Any]) -> list[str]:
    lines = []
    if "peak" in settings:
        lines.append(f"MFU is of {settings['peak_gigaflops_per_s']:,.0f} GFLOP/s ({settings['peak']})")
    if _DIFFERENCE in settings:
        lines.append(f"the losses of our steps and stock TRL's part by {settings[_DIFFERENCE]:.1e} at most, relative")
    return lines
