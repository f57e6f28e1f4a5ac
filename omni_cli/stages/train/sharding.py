"""What omni adds to a Trainer whose model is cut over the ranks: it is cut late, saved whole, and loaded as a part.

transformers 5.23 leaves a model alone that says of itself that it was cut when it was loaded
(`is_distributed_loading_by_transformers`), and refuses then to keep what the optimiser does. So it is told so once the
Trainer is made and its checkpoint is loaded, and both are kept here: whole, so that any number of ranks can go on.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from omni_cli.errors import UsageError
from omni_cli.models import sharded


class Sharded:
    """Mixin of a Trainer: inert unless `train.sharding` says that the model is cut over the ranks."""

    recipe: Any
    args: Any
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    is_distributed_loading_by_transformers: bool
    _unwritten: Exception | None = None  # of rank 0, until no other waits for what it gives

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Cut the model, before the optimiser that moves its parts is made."""
        if self.recipe.train.sharding != "none":
            self.recipe.trainer().shard(self.model)
            self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]  # of the Trainer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients; return their norm from before, the same number on every rank."""
        return sharded.whole_norm(super()._clip_grad_norm(model))  # type: ignore[misc]  # as above

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the whole model, on rank 0; what it meets is raised once what the optimiser keeps is gathered too."""
        if not sharded.is_sharded(self.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]  # as above
            return
        state_dict = sharded.gathered(self.model)
        if self.args.should_save:
            try:
                with sharded.as_uncut(self.model):
                    super()._save(output_dir, state_dict)  # type: ignore[misc]  # as above
            except Exception as error:
                self._unwritten = error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write all that the optimiser keeps, on rank 0."""
        if not sharded.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]  # as above
            return
        kept = sharded.gathered_optimizer(self.model, self.optimizer)
        if self._unwritten:
            raise self._unwritten
        if self.args.should_save:
            torch.save(kept, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Give each rank its part of what the optimiser kept, whatever their number was."""
        if checkpoint is None or not sharded.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]  # as above
            return
        kept = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        sharded.load_optimizer(self.model, self.optimizer, kept)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def check_sharding(recipe: Any, ranks: int) -> None:
    """Refuse to cut what cannot be cut.

    Args:
        recipe: what learns, and how.
        ranks: processes of this training.

    Raises:
        UsageError: there is one rank, or the recipe's model cannot be cut.
    """
    asked = recipe.train.sharding
    if asked == "none":
        return
    if recipe.trainer().shard is None:
        raise UsageError(f"train.sharding = {asked}: a model of recipe {recipe.name!r} is not cut; leave it at none")
    if ranks == 1:
        raise UsageError(
            f"train.sharding = {asked} cuts the model over the ranks of torchrun, and there is one; start several: "
            "torchrun --nproc-per-node N -m -- omni_cli train ..., or leave it at none"
        )
