"""Which shards a training learns from, and whether they have what it needs."""

from pathlib import Path
from typing import Any

import torch

from omni_cli import telemetry
from omni_cli.errors import DataError, UsageError
from omni_cli.models.losses import IGNORED
from omni_cli.recipe import Tokenized
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages import locate
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fitting import check_fit
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.validation import longest_measured

MORE_LABELS = "make other shards with omni etl, with fewer filters, a shorter warm-up of windows, or another teacher"


def find_shards(recipe: Any, request: TrainRequest, console: Console) -> ShardSet:
    """Return the shards to learn from; where there are none yet, the raw data is cut into some first."""
    if request.shards or locate.has_shards(request.data):
        return chosen_shards(recipe, request)
    source, raw = locate.raw_folder(request.data, None)
    console.say(f"no shards yet: omni etl comes first, on {raw}")
    made = etl(recipe, EtlRequest(request.data, source, workers=telemetry.usable_cores()), console)
    return open_shards(Path(made["shards"]))


def chosen_shards(recipe: Any, request: TrainRequest) -> ShardSet:
    """Return the shards that were named, or the newest that fit; where none fit, the newest says why."""
    refusals = []
    for folder in [request.shards] if request.shards else locate.finished_shards(request.data):
        try:
            shards = open_shards(folder)
            check_fit(recipe, shards, request.profile)
        except (UsageError, DataError) as error:
            refusals.append(error)
        else:
            return shards
    raise refusals[0]


def check_rows(dataset: WindowDataset, recipe: Any, folder: Path) -> None:
    """Refuse shards that teach nothing, or hold a sample that is too long, be it one to measure on.

    Raises:
        DataError: they do.
    """
    if not len(dataset):
        raise DataError(f"{folder}: no window in the train split; make other shards with: omni etl")
    if not any(_has_label(dataset, index, recipe) for index in range(len(dataset))):
        raise DataError(f"{folder}: none of its {len(dataset)} windows has a label that counts; {MORE_LABELS}")
    settings = recipe.train
    if not isinstance(recipe, Tokenized):
        return
    longest = max([*dataset.token_lengths(), longest_measured(dataset, settings)])
    if longest > recipe.max_tokens:
        raise DataError(
            f"{folder}: a sample has {longest} tokens, more than train.max_tokens = {recipe.max_tokens}; nothing is "
            "ever cut: make a smaller --canvas or --window at etl, or raise --set train.max_tokens"
        )


def _has_label(dataset: WindowDataset, index: int, recipe: Any) -> bool:
    """Say whether a window has a label as training counts them; its pictures hold none and are not read."""
    batch = recipe.collate([{**dataset.row(index), "pictures": torch.empty(0)}], dataset.preprocess)
    return bool((batch["labels"] != IGNORED).any())
