"""Take two training steps of one batch in a process of its own, and print by how many bytes it grew at most.

Arguments: the recipe as JSON. The peak is the kernel's (VmHWM of /proc/self/status, reset by /proc/self/clear_refs), so
nothing of torch's own counting is in it. A tiny step before it brings in what every process loads once.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch

from omni_cli.recipes.vlm import Vlm


def status(name: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def take_steps(recipe: Vlm, count: int) -> None:
    """Train on copies of one window as the Trainer does: gradients of several parts, then the optimiser."""
    preprocess = recipe.preprocess()
    built = recipe.build(preprocess)
    model = built.model.train()
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    row = recipe.probe_rows(built, preprocess)[0]
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], fused=True)
    for _ in range(count):
        for _ in range(recipe.train.accumulation):
            loss = recipe.loss(model, recipe.collate([row] * recipe.train.batch_size, preprocess), preprocess)
            (loss.total / loss.count).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Print the growth."""
    recipe = Vlm.model_validate_json(sys.argv[1])
    small = recipe.model_copy(
        update={
            "sample": recipe.sample.model_copy(update={"window": 2, "canvas_px": 112}),
            "train": recipe.train.model_copy(update={"batch_size": 1}),
        }
    )
    take_steps(small, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    take_steps(recipe, 2)
    sys.stdout.write(f"{status('VmHWM') - before}\n")


main()
