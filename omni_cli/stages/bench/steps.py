"""How long a training step takes, and what of it is forward, backward and the optimiser: in the real Trainer."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, Timing, synchronise
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.train import make_trainer
from omni_cli.stages.train.trainer import TrueLoss

_WARMUPS = 2
_PHASES = ("forward", "backward", "optimiser")  # the last with clipping and zeroing the gradients


@dataclass
class Clock(TrainerCallback):
    """Notes when each phase of a step ended."""

    steps: list[list[float]] = field(default_factory=list)

    def start(self) -> None:
        """Begin a step."""
        self.steps.append([])
        self.mark()

    def mark(self) -> None:
        """Note that what came before is done, on the device too."""
        synchronise()
        self.steps[-1].append(time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the end of the optimiser's work."""
        self.mark()

    def timings(self) -> dict[str, Timing]:
        """Return the phases and the whole step, without the first steps."""
        counted = self.steps[_WARMUPS:]
        phases = {
            name: Timing(tuple(marks[at + 1] - marks[at] for marks in counted)) for at, name in enumerate(_PHASES)
        }
        return {"step": Timing(tuple(marks[-1] - marks[0] for marks in counted)), **phases}


class TimedSteps(TrueLoss):
    """Mixin of a Trainer: tells a clock where forward and backward begin and end."""

    clock: Clock

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Time the forward pass."""
        self.clock.start()
        value = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.clock.mark()
        return value

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Time what follows the forward pass."""
        value = super().training_step(*args, **kwargs)  # type: ignore[misc]  # of the Trainer beside it
        self.clock.mark()
        return value


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
    """Time optimiser steps of one batch each, after two that do not count."""
    shards, steps = inputs.shards, _WARMUPS + repeats
    train = inputs.recipe.train.model_copy(update={"accumulation": 1, "max_steps": steps})
    recipe = inputs.recipe.model_copy(update={"train": train})
    windows = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, inputs.console))
    units = recipe.sample_units(windows)
    dataset = Cycled(windows, train.batch_size * steps)
    trainer = make_trainer(inputs.work / "steps", recipe, recipe.build(inputs.preprocess), dataset, steps, TimedSteps)
    trainer.clock = clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    timings = clock.timings()
    amounts = {"samples": train.batch_size} | {unit: train.batch_size * amount for unit, amount in units.items()}
    lines = [Line(name, timing, amounts if name == "step" else {}) for name, timing in timings.items()]
    shares = {f"{name} / step": timings[name].median_s / timings["step"].median_s for name in _PHASES}
    size = ", ".join(f"{amount:.0f} {unit} a sample" for unit, amount in units.items())
    on = f"{recipe.model}, {recipe.tune.mode}, batch {train.batch_size}, {size}"
    return Part("train", on, tuple(lines), shares, _memory())


def _memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
