"""`omni train --dry-run`: what a training would be, on this machine or another."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from omni_cli.errors import DataError, UsageError
from omni_cli.recipe import ModelSize, TrainSettings
from omni_cli.report import Console
from omni_cli.stages import disk, locate, runs
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.fitting import short
from omni_cli.stages.train.cut_forecast import CutMemory, forecast_cut
from omni_cli.stages.train.fits import check_fits, check_gpu
from omni_cli.stages.train.forecast import Memory, forecast
from omni_cli.stages.train.ranks import with_share
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.shards import chosen_shards
from omni_cli.stages.train.telemetry import read_telemetry

_OF_A_STEP = ("batch_size", "accumulation", "optimizer", "gradient_checkpointing")
_NOT_EVERYWHERE = {"blind": False, "sharding": "none", "compile": False}  # of a step; of a run that does not know them
_OF_A_SAVE = ("validation_windows", "publish")


def dry_run(recipe: Any, request: TrainRequest, console: Console, processes: int = 1) -> dict[str, Any]:
    """Say what a training would be, on this machine or another; touch nothing.

    Args:
        recipe: what would learn.
        request: of the user.
        console: told of it.
        processes: that would share each step; memory is that of one of them.

    Raises:
        UsageError: a step needs more memory than the profile's machine has.
    """
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
        **({"notes": size.notes} if size.notes else {}),
    }
    machine, shared = request.machine, with_share(recipe, processes)
    memory = _foreseen(shared, processes, on_gpu=machine is not None and machine.accelerator != "cpu")
    facts |= {"processes": processes} if processes > 1 else {}
    facts |= _planned_memory(size, shared, memory)
    facts |= _planned_steps(recipe, request, console)
    facts |= _planned_disk(size, recipe, facts.get("steps"))
    facts |= {"hours": _planned_hours(recipe, request, facts.get("steps"), processes)}
    console.table(f"plan of omni train --profile {request.profile}", ("what", "value"), [*_readable(facts)])
    if memory is not None and machine is not None:
        console.say(check_fits(shared, memory, machine, request.profile))
    return {"dry_run": True, **facts}


def check_memory(recipe: Any, request: TrainRequest, console: Console, processes: int = 1) -> None:
    """Refuse what the accelerator of a profile, or the GPU that is here, cannot hold.

    That is before an hour of etl and minutes of loading. On a CPU nothing is foreseen: a tiny model fits, and to walk
    through a step takes as long as a few real ones.

    Args:
        recipe: what learns, and how; its step is the share of one process.
        request: of the user.
        console: told of it.
        processes: that train it.

    Raises:
        UsageError: a step needs more memory than the profile's machine or the GPU has.
    """
    machine, is_gpu_here = request.machine, torch.cuda.is_available()
    if machine is None or (machine.accelerator == "cpu" and not is_gpu_here):
        return
    memory = _foreseen(recipe, processes, on_gpu=True)
    if memory is None:
        return
    if machine.accelerator != "cpu":
        console.say(check_fits(recipe, memory, machine, request.profile))
    if is_gpu_here:
        check_gpu(recipe, memory, machine, console)


def _foreseen(recipe: Any, processes: int, *, on_gpu: bool) -> Memory | CutMemory | None:
    """Return what a step takes on one process: at its peak, or at least where the model is cut; None: not known."""
    preprocess = recipe.preprocess()
    if recipe.train.sharding != "none" and processes == 1:  # over how many it would be cut
        return None
    return forecast_cut(recipe, preprocess, processes) or forecast(recipe, preprocess, on_gpu=on_gpu)


def _planned_memory(size: ModelSize, recipe: Any, memory: Memory | CutMemory | None) -> dict[str, Any]:
    """Return the peak of a step and what it is made of; of a recipe that cannot foresee it, what is there without.

    Of a model that is cut it is that of all processes together, and what is sure of each.
    """
    names = ("weights", "gradients", "optimizer")
    if isinstance(memory, Memory):
        parts = {name: _gib(getattr(memory, name)) for name in (*names, "activations")}
        tokens = {"tokens_per_sample": memory.tokens // recipe.train.batch_size} if memory.tokens else {}
        return {**tokens, "memory_gib": {"peak": _gib(memory.peak), **parts}}
    kept = disk.optimizer_bytes(size, recipe.train.optimizer)
    planned: dict[str, Any] = {"memory_without_activations_gib": _gib(size.weight_bytes + size.learning * 4 + kept)}
    if memory is not None:
        sure = {name: _gib(getattr(memory, name)) for name in (*names, "gathered", "uncut")}
        planned["memory_of_each_process_gib"] = {"at_least": _gib(memory.peak), **sure}
    return planned


def _gib(amount: float) -> float:
    return round(amount / 2**30, 2)


def _planned_hours(recipe: Any, request: TrainRequest, steps: int | None, processes: int) -> float | str:
    """Return how long it takes at the pace of the newest finished run of this profile that did the same.

    The pace is that of steps alone; what stands still at each checkpoint, to be measured and saved, comes on top.
    """
    if steps is None:
        return "unknown: it is not known how many steps there are"
    for folder in locate.finished_runs(request.runs):
        manifest = runs.open_run(folder).manifest
        is_alike = manifest.profile == request.profile and _is_alike(manifest.settings, recipe)
        if not is_alike or _processes(folder) != {processes}:
            continue
        lines = [line for line in read_history(folder) if line.keys() >= {"samples_per_s", "elapsed_s"}]
        pause_s = _pause_s(lines, read_telemetry(folder / runs.TELEMETRY), manifest.settings["train"]["save_steps"])
        if pause_s is not None:
            samples: int = steps * recipe.train.batch_size * recipe.train.accumulation
            steps_s = samples / statistics.median(line["samples_per_s"] for line in lines)
            pauses = math.ceil(steps / recipe.train.save_steps)
            return float(f"{(steps_s + pauses * pause_s) / 3600:.3g}")
    return (
        "unknown: no finished run of this profile, model, batch and validation is here, of two logged lines or more; "
        "omni bench train measures a step"
    )


def _pause_s(
    history: Sequence[Mapping[str, float]], telemetry: Sequence[Mapping[str, Any]], save_steps: int
) -> float | None:
    """Return how long a run stood still at a checkpoint, None where it has none after its first line.

    That is all time between two lines of one session, and after the last, in which no step was taken. Before the first
    line of a session much else is done, once: it gets ready, and what a kill lost was taken in vain.
    """
    begun_s = [line["elapsed_s"] for line in telemetry if "opened" in line]
    still_s, count = 0.0, 0
    for before, line in pairwise(history):
        if any(before["elapsed_s"] <= at_s <= line["elapsed_s"] for at_s in begun_s):
            continue
        steps_s = (line["samples"] - before["samples"]) / line["samples_per_s"]
        still_s += max(line["elapsed_s"] - before["elapsed_s"] - steps_s, 0.0)
        count += line["step"] % save_steps == 0 or line is history[-1]
    if not count:
        return None
    ended_s: float = max(line["elapsed_s"] for line in (history[-1], *telemetry))
    return (still_s + ended_s - history[-1]["elapsed_s"]) / count


def _is_alike(settings: Mapping[str, Any], recipe: Any) -> bool:
    """Say whether a step and a checkpoint of a run did what those of this recipe will do."""
    ours = recipe.model_dump(mode="json")
    same = all(
        settings.get(name) == ours.get(name) for name in ("model", "precision", "quantization", "sample", "tune")
    )
    here, there = ({**_NOT_EVERYWHERE, **each["train"]} for each in (ours, settings))
    return same and all(there.get(name) == here[name] for name in (*_OF_A_STEP, *_NOT_EVERYWHERE, *_OF_A_SAVE))


def _processes(folder: Path) -> set[int]:
    """Return how many processes trained a run, in each of its sessions; one that does not say had one."""
    lines = read_telemetry(folder / runs.TELEMETRY)
    return {line["opened"].get("processes", 1) for line in lines if "opened" in line} or {1}


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
    if isinstance(value, tuple):  # of sentences
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else short(value)
