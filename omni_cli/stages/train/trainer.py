"""What omni adds to a Trainer of the Hugging Face family: true losses, checked gradients, sealed checkpoints.

The Trainer keeps the loop, the optimiser, the schedule, the saving and the many devices.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.recipe import Batch, Trainable, TrainSettings
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.disk import CHECKPOINTS_KEPT, writing
from omni_cli.stages.loading import Patient
from omni_cli.stages.train.guards import WINDOWS, Guarded
from omni_cli.stages.train.rates import OwnRates
from omni_cli.stages.train.validation import Validated


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
    """Return a Trainer class with our loss and guard; methods of `mixins` come before them."""
    return type("OmniTrainer", (*mixins, Guarded, Validated, OwnRates, TrueLoss, base), {})


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
        """Read the windows and stack them, with their numbers."""
        batch = self.recipe.collate([self.dataset[row["index"]] for row in rows], self.dataset.preprocess)
        return {**batch, WINDOWS: torch.tensor([row["index"] for row in rows])}
