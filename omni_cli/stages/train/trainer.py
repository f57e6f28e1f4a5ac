"""What omni adds to a Trainer of the Hugging Face family: true losses, checked gradients, sealed checkpoints.

The Trainer keeps the loop, the optimiser, the schedule, the saving and the many devices.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.models.losses import IGNORED
from omni_cli.recipe import Batch, Loss, Trainable, TrainSettings
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.disk import CHECKPOINTS_KEPT, writing
from omni_cli.stages.loading import Patient
from omni_cli.stages.train.guards import WINDOWS, Guarded
from omni_cli.stages.train.order import dealt
from omni_cli.stages.train.ranks import ALONE, Ranks, asked_for, seed_apart, share_of, through
from omni_cli.stages.train.rates import OwnRates
from omni_cli.stages.train.sharding import Sharded, check_sharding
from omni_cli.stages.train.validation import Validated

SPARE = "is_spare"  # in a batch: it only keeps a rank in step with the others, and counts nothing
_STATE, _STATES = "rng_state.pth", "rng_state_{}.pth"  # as the Trainer names them, of one rank and of several


class TrueLoss:
    """Mixin: the loss is the recipe's sum over the number of labelled things in the whole step, on every rank."""

    recipe: Trainable
    preprocess: Preprocess
    accelerator: Any
    args: Any
    state: Any
    model: nn.Module
    train_dataset: Any
    ranks: Ranks = ALONE
    _drawn: Sequence[dict[str, Any]] = ()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, scaled so that micro-batches and ranks add up to the mean."""
        loss = self._loss(model, inputs)
        if num_items_in_batch is None:
            value = loss.total / loss.count
        else:
            # The count is over all ranks, whose gradients are then averaged: each contributes its share times ranks.
            # A step without a label, whose sum is 0, teaches nothing; 0 / 0 would end the training.
            value = loss.total * self.accelerator.num_processes / max(num_items_in_batch, 1)
        return (value, {}) if return_outputs else value

    def _loss(self, model: nn.Module, inputs: Any) -> Loss:
        """Return the loss of one micro-batch, computed where what keeps ranks alike sees it."""
        is_spare = inputs.pop(SPARE, None) is not None
        if (
            model is self.model
        ):  # alone, or cut over the ranks: its parts gather what they need wherever they are called
            loss = self.recipe.loss(model, inputs, self.preprocess)
        else:
            loss = through(model, self.model, lambda whole: self.recipe.loss(whole, inputs, self.preprocess))
        return replace(loss, total=loss.total * 0) if is_spare else loss

    def get_train_dataloader(self) -> Any:
        """Return the loader of the training rows; its workers stay until the step that a signal interrupts is saved."""
        loader = super().get_train_dataloader()  # type: ignore[misc]  # of the Trainer that this is mixed into
        if self.ranks.count > 1:
            windows, share = len(self.train_dataset) - 1, share_of(self.recipe.train, self.ranks.count)
            loader = dealt(loader, windows, self.args.data_seed, share, self.ranks)
        loader.base_dataloader.worker_init_fn = Patient(loader.worker_init_fn)
        return loader

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole, or leave nothing of it: the one before it is there as long as it does not count."""
        self._drawn = self.ranks.gather(_drawing()) if self.ranks.count > 1 else ()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.ranks.alike(), writing(folder) if self.ranks.is_first else nullcontext():
            super()._save_checkpoint(model, trial)  # type: ignore[misc]  # of the Trainer that this is mixed into

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what each rank draws at random from; of several the first writes for all."""
        if self.ranks.count == 1:
            super()._save_rng_state(output_dir)  # type: ignore[misc]  # of the Trainer that this is mixed into
        elif self.ranks.is_first:
            for index, state in enumerate(self._drawn):
                torch.save(state, Path(output_dir) / _STATES.format(index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on drawing as when it was saved; after another number of ranks, which drew otherwise, begin anew."""
        if checkpoint is None:
            return
        if _ranks_saved(Path(checkpoint)) != self.ranks.count:
            seed_apart(self.ranks, self.args.seed, self.state.global_step)
        elif self.ranks.count == 1:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]  # of the Trainer that this is mixed into
        else:
            _draw_on(torch.load(Path(checkpoint) / _STATES.format(self.ranks.index), weights_only=True))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of a resume in full: the recipe built the model from the checkpoint, key by key, before.

        The library then loads the file a second time by names that a Qwen-VL has only in memory, and lists them all.
        """


def _drawing() -> dict[str, Any]:
    """Return what this process draws at random from: of dropout, the one thing that is, on its device."""
    on_gpu = torch.cuda.is_available()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_gpu else None}


def _draw_on(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _ranks_saved(checkpoint: Path) -> int:
    """Return how many ranks wrote a checkpoint."""
    return 1 if (checkpoint / _STATE).is_file() else len([*checkpoint.glob(_STATES.format("*"))])


def compose_trainer(base: type, *mixins: type) -> type:
    """Return a Trainer class with our loss and guard; methods of `mixins` come before them."""
    return type("OmniTrainer", (*mixins, Guarded, Validated, OwnRates, TrueLoss, Sharded, base), {})


def trainer_arguments(folder: Path, recipe: Any, steps: int, ranks: Ranks = ALONE) -> Any:
    """Return what the recipe's Trainer is told.

    Args:
        folder: of its checkpoints.
        recipe: a `TrainableRecipe`.
        steps: of the optimiser.
        ranks: of the training.
    """
    settings: TrainSettings = recipe.train
    kind, on_gpu, share = recipe.trainer(), torch.cuda.is_available(), share_of(recipe.train, ranks.count)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": share.batch_size,
        "gradient_accumulation_steps": share.accumulation,
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
        "bf16": on_gpu and recipe.precision == "bfloat16" and settings.sharding == "none",  # FSDP2's layers cast
        "fp16": on_gpu and recipe.precision == "float16",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if ranks.count > 1:
        # Every weight that learns is part of every loss (`check_gradients`), and no buffer moves (`check_norms`).
        arguments |= {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
        arguments |= {} if on_gpu else {"ddp_backend": "gloo"}
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


def check_runnable(recipe: Any, ranks: Ranks = ALONE) -> None:
    """Refuse what would only fail once the model is built: processes that nobody joined, an optimiser that is absent.

    Raises:
        UsageError: this process is one of several that train nothing together, or the optimiser cannot be used here.
    """
    if (processes := asked_for()) != ranks.count:
        raise UsageError(f"WORLD_SIZE = {processes}: only omni train runs in several processes; run this by itself")
    check_sharding(recipe, ranks.count)
    try:
        Trainer.get_optimizer_cls_and_kwargs(trainer_arguments(Path(), recipe, 1, ranks))
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
        """Read the windows and stack them, with their numbers; the number past the last is a batch to be spared."""
        numbers = [row["index"] for row in rows]
        if numbers == [len(self.dataset)]:
            return self._spare()
        return {**self._batch(numbers), WINDOWS: torch.tensor(numbers)}

    def _batch(self, numbers: Sequence[int]) -> Batch:
        return self.recipe.collate([self.dataset[number] for number in numbers], self.dataset.preprocess)

    def _spare(self) -> Batch:
        """Return a batch of the shape of any other, without a label that the Trainer would count."""
        batch = self._batch([0])
        ignored = torch.full_like(batch["labels"], IGNORED)
        return {**batch, "labels": ignored, WINDOWS: torch.empty(0, dtype=torch.long), SPARE: torch.empty(0)}
