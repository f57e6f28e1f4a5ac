"""Faults of single training steps, put into a recipe's loss; validation, which learns nothing, is spared.

As a program it trains through a night in which a number goes wrong once and the machine is wanted back:
RUNS SHARDS MODE NAN_AT SIGTERM_AT, steps counted by what is taken.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni_cli.errors import OmniError
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTrain, VlmTune
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, tiny_recipe

Spoil = Callable[[int, Any, Any], Any]  # (how many losses came before, the batch, the loss) -> the loss


@contextmanager
def spoilt(spoil: Spoil, recipe: type = Vlm) -> Iterator[None]:
    """Change what a recipe's loss is while it trains; one call a step where nothing is accumulated."""
    loss, taken = recipe.loss, iter(range(1, 1_000_000))

    def changed(self, model, batch, preprocess):
        made = loss(self, model, batch, preprocess)
        return spoil(next(taken), batch, made) if model.training else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "loss", changed)
        yield


def times(made, number: float):
    """The loss, multiplied."""
    return replace(made, total=made.total * number)


def night_recipe(mode: str, **changes) -> Vlm:
    """A run of 90 steps that saves every 18."""
    values = {"batch_size": 2, "learning_rate": 1e-3, "max_steps": 90, "save_steps": 18, "log_steps": 5, "workers": 0}
    tune = VlmTune(mode=mode, rank=4, alpha=8, dropout=0.1 if mode == "lora" else 0.0)
    train_table = VlmTrain(**{**values, "gradient_checkpointing": False, **changes})
    return tiny_recipe(cameras="1-cam", mode=mode, tune=tune, train=train_table)


def train_night(shards: Path, runs: Path, mode: str) -> dict[str, Any]:
    return train(night_recipe(mode), TrainRequest(shards, runs, runs, "r", "test"), QUIET)


def _meet(nan_at: int, sigterm_at: int) -> Spoil:
    def spoil(number, batch, made):
        if number == sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return times(made, float("nan")) if number == nan_at else made

    return spoil


if __name__ == "__main__":
    runs_folder, shards_folder, mode_of_tuning, *numbers = sys.argv[1:]
    with spoilt(_meet(*map(int, numbers))):
        try:
            train_night(Path(shards_folder), Path(runs_folder), mode_of_tuning)
        except OmniError as error:
            sys.exit(error.exit_code)
