"""What omni adds to a Trainer of the Hugging Face family: true losses, checked gradients, sealed checkpoints.

The Trainer keeps the loop, the optimiser, the schedule, the saving and the many devices.
"""

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from omni_cli import files
from omni_cli.config import nearest
from omni_cli.errors import OmniError, UsageError
from omni_cli.models.adapters import check_gradients, has_gradient
from omni_cli.recipe import Batch, Trainable, TrainSettings
from omni_cli.report import Console, Step
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.checkpoints import remove_stray_receipts
from omni_cli.stages.disk import CHECKPOINTS_KEPT, writing
from omni_cli.stages.loading import Patient
from omni_cli.stages.runs import HISTORY, Run, seal_folder


class TrueLoss:
    """Mixin: the loss is the recipe's sum over the number of labelled things in the whole step, on every rank."""

    recipe: Trainable
    preprocess: Preprocess
    accelerator: Any
    args: Any
    state: Any

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, scaled so that micro-batches and ranks add up to the mean."""
        loss = self.recipe.loss(model, inputs, self.preprocess)
        if num_items_in_batch is None:
            value = loss.total / loss.count
        else:
            # The count is over all ranks, whose gradients are then averaged: each contributes its share times ranks.
            # A step without a label, whose sum is 0, teaches nothing; 0 / 0 would end the training.
            value = loss.total * self.accelerator.num_processes / max(num_items_in_batch, 1)
        return (value, {}) if return_outputs else value

    def get_train_dataloader(self) -> Any:
        """Return the loader of the training rows; its workers stay until the step that a signal interrupts is saved."""
        loader = super().get_train_dataloader()  # type: ignore[misc]  # of the Trainer that this is mixed into
        loader.base_dataloader.worker_init_fn = Patient(loader.worker_init_fn)
        return loader

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole, or leave nothing of it: the one before it is there as long as it does not count."""
        with writing(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]  # of the Trainer that this is mixed into

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of a resume in full: the recipe built the model from the checkpoint, key by key, before.

        The library then loads the file a second time by names that a Qwen-VL has only in memory, and lists them all.
        """


def compose_trainer(base: type, *mixins: type) -> type:
    """Return a Trainer class with our loss; methods of `mixins` come before it."""
    return type("OmniTrainer", (*mixins, TrueLoss, base), {})


def trainer_arguments(folder: Path, recipe: Any, steps: int) -> Any:
    """Return what the recipe's Trainer is told.

    Args:
        folder: of its checkpoints.
        recipe: a `TrainableRecipe`.
        steps: of the optimiser.
    """
    settings: TrainSettings = recipe.train
    kind, on_gpu = recipe.trainer(), torch.cuda.is_available()
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": math.ceil(settings.warmup_ratio * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "max_steps": steps,
        "gradient_checkpointing": None,
        "activation_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": CHECKPOINTS_KEPT,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,  # it would put the mean of the others in place of a loss that is no number
        "dataloader_num_workers": settings.workers,
        # A worker forked from a process with threads and a GPU may hang. It ends with its epoch: one that stayed would
        # draw no seed for the next, which a resumed run does draw.
        "dataloader_multiprocessing_context": "forkserver" if settings.workers else None,
        "dataloader_pin_memory": on_gpu,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and recipe.precision == "bfloat16",
        "fp16": on_gpu and recipe.precision == "float16",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return use_one_gpu(kind.arguments(**arguments, **kind.always))


def use_one_gpu(arguments: Any) -> Any:
    """Return a Trainer's arguments with no more than one GPU: of several it would make one of N times the batch."""
    if arguments.n_gpu > 1:  # to ask is to set up the device; set before, it would be overwritten
        arguments._n_gpu = 1
    return arguments


def check_optimizer_name(name: str) -> None:
    """Refuse an optimiser that the Trainer does not know.

    Raises:
        UsageError: it is unknown; the nearest name is given.
    """
    known = [each.value for each in OptimizerNames]
    if name not in known:
        raise UsageError(f"train.optimizer = {name!r}: no such optimizer; {nearest(name, known)}")


def check_runnable(recipe: Any) -> None:
    """Refuse what would only fail once the model is built: a launcher of many processes, an optimiser that is absent.

    Raises:
        UsageError: this process is one of several, or the optimiser cannot be used here.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise UsageError(
            f"WORLD_SIZE = {processes}: training in several processes is not supported yet; run omni train by itself"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(trainer_arguments(Path(), recipe, steps=1))
    except (ImportError, ValueError) as error:
        raise UsageError(f"train.optimizer = {recipe.train.optimizer!r}: {_remedy(error)}") from None


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError) and "bitsandbytes" in str(error):
        return "needs bitsandbytes; install it with: pip install 'omni-cli[bnb]'"
    return f"cannot be used here: {str(error).splitlines()[0]}"


@dataclass(frozen=True)
class RowCollator:
    """Turns window numbers into a batch, inside the loader's workers."""

    dataset: WindowDataset
    recipe: Trainable

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> Batch:
        """Read the windows and stack them."""
        return self.recipe.collate([self.dataset[row["index"]] for row in rows], self.dataset.preprocess)


class GradientCheck(TrainerCallback):
    """After the first step with a positive rate: every trainable tensor has a gradient, no frozen one has any.

    A step without a label has no gradient at all, and counts for nothing here.

    Args:
        saved: the facts of the checkpoint that training goes on from; none where it begins.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.passed_at: int | None = saved.get("gradients_checked_at_step")
        self._moved: bool = saved.get("weights_moved", False)
        self.had_label: bool = saved.get("had_label", False)  # at any step

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run checks when an undisturbed one does."""
        facts = {"gradients_checked_at_step": self.passed_at, "weights_moved": self._moved}
        return {**facts, "had_label": self.had_label}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once, when an earlier step has moved the weights."""
        if self.passed_at is not None or not has_gradient(kwargs["model"]):
            return
        self.had_label = True
        if self._moved:
            check_gradients(kwargs["model"])
            self.passed_at = state.global_step
        self._moved = self._moved or any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)


class Journal(TrainerCallback):
    """Appends to the history, seals each checkpoint for its run, moves the progress bar."""

    def __init__(self, run: Run, gradients: GradientCheck, bar: Step) -> None:
        self._run_key = run.manifest.key()
        self._history = run.folder / HISTORY
        self._gradients = gradients
        self._bar = bar
        self._started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append one line, on disk before a checkpoint counts; the final summary of the Trainer is left out."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        names = ("loss", "learning_rate", "grad_norm", "epoch")
        if wrong := [name for name in names if not math.isfinite(logs.get(name, 0.0))]:
            raise OmniError(
                f"{wrong[0]} is {logs[wrong[0]]} at step {state.global_step}; the last checkpoint is good: go on from "
                "it with a lower --set train.learning_rate in a run of another name"
            )
        line = {name: float(logs[name]) for name in names if name in logs}
        line |= {"step": state.global_step, "elapsed_s": round(time.monotonic() - self._started, 3)}
        with self._history.open("a") as stream:
            stream.write(files.canonical_json(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, with the last loss beside it; log where a checkpoint is due.

        A mean that began before a checkpoint would be another one after a resume, and the last step has its line.
        """
        control.should_log = control.should_log or control.should_save
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.advance(note=f"loss {losses[-1]:.3f}" if losses else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the checkpoint count."""
        assert args.output_dir is not None
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with writing(checkpoint):
                seal_folder(checkpoint, run=self._run_key, step=state.global_step, **self._gradients.facts)
            remove_stray_receipts(checkpoint.parent)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C the running step ends, a checkpoint is saved, and training stops: run again to go on."""

    def __init__(self, console: Console) -> None:
        self.signal: int | None = None
        self._console = console
        heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {each: signal.signal(each, self._note) for each in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now, without saving
        self.signal = number
        self._console.warn("stopping after this step, to save it")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where a signal came."""
        if self.signal:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for each, previous in self._previous.items():
            signal.signal(each, previous)
