"""`omni train --dry-run`: what a training would be, on this machine or another."""

import math
from typing import Any

from omni_cli.errors import DataError, UsageError
from omni_cli.recipe import ModelSize, TrainSettings
from omni_cli.report import Console
from omni_cli.stages import disk
from omni_cli.stages.fitting import short
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.shards import chosen_shards


def dry_run(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Say what a training would be, on this machine or another; touch nothing."""
    preprocess, settings = recipe.preprocess(), recipe.train
    size = recipe.size(preprocess)
    samples = settings.batch_size * settings.accumulation
    facts = {
        "model": recipe.model,
        "tuning": recipe.tune.mode,
        **preprocess.facts(),
        "samples_per_step": samples,
        "parameters": size.weights,
        "trainable_parameters": size.learning,
        "memory_without_activations_gib": round((size.weight_bytes + size.learning * 12) / 2**30, 2),
        **({"notes": size.notes} if size.notes else {}),
    }
    facts |= _planned_steps(recipe, request, console)
    facts |= _planned_disk(size, recipe, facts.get("steps"))
    console.table(f"plan of omni train --profile {request.profile}", ("what", "value"), [*_readable(facts)])
    return {"dry_run": True, **facts}


def _planned_disk(size: ModelSize, recipe: Any, steps: int | None) -> dict[str, int]:
    tuning, settings = recipe.tune.mode, recipe.train
    return {
        "checkpoint_bytes": disk.checkpoint_bytes(size, tuning, settings.optimizer),
        "disk_bytes": disk.run_bytes(size, tuning, settings, steps),
    }


def _planned_steps(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    try:
        shards = chosen_shards(recipe, request)
    except (UsageError, DataError) as error:
        console.warn(f"no shards to count the steps of an epoch: {error}")
        return {"steps": recipe.train.max_steps, "shards": None} if recipe.train.max_steps > 0 else {"shards": None}
    windows = shards.manifest.count("train")
    return {"windows": windows, "steps": planned_steps(recipe.train, windows), "shards": str(shards.folder)}


def planned_steps(settings: TrainSettings, windows: int) -> int:
    """Return the number of optimiser steps on one process."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(windows / settings.batch_size)
    return math.ceil(settings.epochs * max(math.ceil(batches / settings.accumulation), 1))


def _readable(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _worded(value)) for key, value in facts.items()]


def _worded(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else short(value)
