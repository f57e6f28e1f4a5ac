"""What omni adds to a Trainer of the Hugging Face family: true losses, checked gradients, sealed checkpoints.

The Trainer keeps the loop, the optimiser, the schedule, the saving and the many devices.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from omni_cli import files
from omni_cli.models.adapters import check_gradients
from omni_cli.recipe import Batch, Trainable
from omni_cli.report import Step
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.runs import seal_folder


class TrueLoss:
    """Mixin: the loss is the recipe's sum over the number of labelled things in the whole step, on every rank."""

    recipe: Trainable
    preprocess: Preprocess
    accelerator: Any
    args: Any

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, scaled so that micro-batches and ranks add up to the mean."""
        loss = self.recipe.loss(model, inputs, self.preprocess)
        if num_items_in_batch is None:
            value = loss.total / loss.count
        else:
            # The count is over all ranks, whose gradients are then averaged: each contributes its share times ranks.
            value = loss.total * self.accelerator.num_processes / num_items_in_batch
        return (value, {}) if return_outputs else value


def compose_trainer(base: type, *mixins: type) -> type:
    """Return a Trainer class with our loss; methods of `mixins` come before it."""
    return type("OmniTrainer", (*mixins, TrueLoss, base), {})


@dataclass(frozen=True)
class RowCollator:
    """Turns window numbers into a batch, inside the loader's workers."""

    dataset: WindowDataset
    recipe: Trainable

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> Batch:
        """Read the windows and stack them."""
        return self.recipe.collate([self.dataset[row["index"]] for row in rows], self.dataset.preprocess)


class GradientCheck(TrainerCallback):
    """After the first step with a positive rate: every trainable tensor has a gradient, no frozen one has any."""

    def __init__(self, start_step: int) -> None:
        self.passed_at: int | None = None
        self._start_step = start_step
        self._moved = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once, when an earlier step has moved the weights."""
        if self._moved and self.passed_at is None:
            check_gradients(kwargs["model"])
            self.passed_at = state.global_step
        self._moved = self._moved or any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)


class Journal(TrainerCallback):
    """Appends to the history, seals each checkpoint, moves the progress bar."""

    def __init__(self, run_folder: Path, bar: Step) -> None:
        self._history = run_folder / "history.jsonl"
        self._bar = bar
        self._started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append one line; the final summary of the Trainer is left out."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "epoch": "epoch"}
        line = {new: float(logs[old]) for old, new in names.items() if old in logs}
        line |= {"step": state.global_step, "elapsed_s": round(time.monotonic() - self._started, 3)}
        with self._history.open("a") as stream:
            stream.write(files.canonical_json(line) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, with the last loss beside it."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.advance(note=f"loss {losses[-1]:.3f}" if losses else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the checkpoint count."""
        assert args.output_dir is not None
        if state.is_world_process_zero:
            seal_folder(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", step=state.global_step)


class StopOnSignal(TrainerCallback):
    """On SIGTERM the running step ends, a checkpoint is saved, and training stops: run again to go on."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where a signal came."""
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signal back to whoever had it."""
        signal.signal(signal.SIGTERM, self._previous)
