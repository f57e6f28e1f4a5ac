"""Holding what a step is foreseen to take against what a profile promises, and against the GPU that is here."""

from typing import Any

import psutil
import torch

from omni_cli.errors import UsageError
from omni_cli.profiles import Machine
from omni_cli.recipe import Outlined
from omni_cli.report import Console
from omni_cli.stages.memory import GIB
from omni_cli.stages.train.cut_forecast import CutMemory
from omni_cli.stages.train.forecast import Memory


def check_fits(recipe: Any, memory: Memory | CutMemory, machine: Machine, profile: str) -> str:
    """Hold a forecast against what a profile promises; return one line on it.

    Raises:
        UsageError: it is more; the message says what to change.
    """
    beside = psutil.Process().memory_info().rss if machine.accelerator == "cpu" else 0
    promised = f"profile {profile} has {machine.memory_gib:g} GiB"
    return _hold(recipe, memory, int(machine.memory_gib * GIB), promised, beside)


def check_gpu(recipe: Any, memory: Memory | CutMemory, machine: Machine, console: Console) -> None:
    """Hold a forecast against the GPU that this process trains on; tell where others hold what it needs.

    What is free of a memory that the host shares is not told of: its driver does not count what the host would give
    back.

    Raises:
        UsageError: it is more than the GPU has; the message says what to change.
    """
    device = torch.cuda.current_device()
    found = torch.cuda.get_device_properties(device)
    _hold(recipe, memory, found.total_memory, f"GPU {found.name} has {found.total_memory / GIB:.2f} GiB")
    free, _ = torch.cuda.mem_get_info(device)
    if free < memory.peak and not machine.unified_memory:
        console.warn(
            f"{memory.needs(memory.peak)}, and of GPU {found.name} {free / GIB:.2f} GiB are free of "
            f"{found.total_memory / GIB:.2f} GiB: memory may run out unless other processes let go of it"
        )


def _hold(recipe: Any, memory: Memory | CutMemory, held_bytes: int, has: str, beside_bytes: int = 0) -> str:
    """Return a line on what is needed and what there is.

    Args:
        recipe: what learns, and how.
        memory: that a step needs.
        held_bytes: that there are.
        has: says whose they are, and how many.
        beside_bytes: that the process takes for itself.

    Raises:
        UsageError: more is needed.
    """
    needed = memory.peak + beside_bytes
    said = f"{memory.needs(needed)}, {has}"
    if needed <= held_bytes:
        return said
    less = [f"{setting} takes less" for setting in lighter(recipe)]
    ways = [*memory.remedies(recipe, held_bytes - beside_bytes), *less]
    raise UsageError(f"{said}; {', or '.join(ways) or smaller_shards(recipe)}")


def smaller_shards(recipe: Any) -> str:
    """Say which shards would take less."""
    flags = "--canvas or --window" if hasattr(recipe.sample, "canvas_px") else "--window"
    return f"make a smaller {flags} at etl"


def lighter(recipe: Any) -> list[str]:
    """Return the settings of a recipe with which any step of it takes less."""
    is_full, is_cut = recipe.tune.mode == "full", recipe.train.sharding != "none"
    can_recompute = isinstance(recipe, Outlined)
    ways = (
        ["--set train.gradient_checkpointing=true"] if can_recompute and not recipe.train.gradient_checkpointing else []
    )
    if getattr(recipe, "quantization", None) == "none" and not is_full:
        ways.append("--set quantization=nf4")
    if is_full:
        ways.append(f"{'--set train.sharding=none ' if is_cut else ''}--set tune.mode=lora")
    if is_full and not is_cut and "8bit" not in recipe.train.optimizer:
        ways.append("--set train.optimizer=adamw_8bit")
    return ways
