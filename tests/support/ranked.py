"""Training in several processes that talk over gloo, as torchrun would start them, and what each of them saw.

As a program it trains one rank: RECIPE RUNS SHARDS RUN SEEN SETTINGS FAULTS, where SETTINGS is a JSON table of the
recipe's changes, and FAULTS one of what befalls this rank or that: {"nan": [rank, step]}, steps counted as taken.
"""

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from omni_cli.__main__ import _calm_libraries
from omni_cli.errors import OmniError
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTrain, VlmTune
from omni_cli.report import console_of_rank
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.guards import Guard, Guarded
from tests.support.driving import tiny_student
from tests.support.pipeline import tiny_recipe
from tests.support.warm import Warm, WarmProcess

SAMPLE = {"window": 4, "stride": 3, "canvas_px": 112}


def ranked_recipe(mode: str = "lora", **changes) -> Vlm:
    """20 steps of 2 x 2 windows: an epoch of 14 ends with half a step, of which a second rank of two has nothing."""
    values = {"batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "max_steps": 20, "save_steps": 10,
              "log_steps": 1, "workers": 0, "max_grad_norm": 1e9, "gradient_checkpointing": False,
              "validation_windows": 8}  # fmt: skip
    tune = VlmTune(mode=mode, rank=4, alpha=8)
    recipe = tiny_recipe(cameras="camera_front_wide_120fov", mode=mode, tune=tune, train=VlmTrain(**values | changes))
    return recipe.model_copy(update={"sample": recipe.sample.model_copy(update=SAMPLE)})


def ranked_student(**changes) -> Distill:
    """Three steps of 4 x 2 windows."""
    values = {"batch_size": 4, "accumulation": 2, "max_steps": 3, "log_steps": 1, "max_grad_norm": 1e9}
    return tiny_student("convnextv2", sample={"stride": 2}, train=values | changes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(warm: Warm, count: int, module: str, *words: str, **environment: str) -> list[WarmProcess]:
    """Start a module in several processes, told of each other as torchrun tells them."""
    port = str(free_port())
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        warm.start(module, *words, environment={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank, **environment})
        for rank in map(str, range(count))
    ]


def train_ranked(
    warm: Warm, count: int, runs: Path, shards: Path, name: str, *, recipe: str = "vlm",
    faults: dict[str, list[int]] | None = None, **changes
) -> list[WarmProcess]:  # fmt: skip
    """Train `ranked_recipe` or `ranked_student` in so many processes, to their ends; see `seen`."""
    words = [
        recipe,
        str(runs),
        str(shards),
        name,
        str(runs / f"{name}.seen"),
        json.dumps(changes),
        json.dumps(faults or {}),
    ]
    processes = start_ranks(warm, count, "tests.support.ranked", *words)
    for process in processes:
        process.wait(300)
    return processes


def seen(runs: Path, name: str, rank: int) -> dict[str, Any]:
    """What a rank saw: by step its windows, and every gradient of its first."""
    return torch.load(runs / f"{name}.seen.{rank}")


def windows_of(runs: Path, name: str, count: int) -> dict[int, list[int]]:
    """The windows of each step, of all ranks."""
    of_ranks = [seen(runs, name, rank)["windows"] for rank in range(count)]
    return {step: sorted(number for each in of_ranks for number in each[step]) for step in of_ranks[0]}


@contextmanager
def watched(path: Path, faults: dict[str, int]) -> Iterator[None]:
    """Write down what this process learns from, and let it meet its faults."""
    step, windows, gradients, taken = [], {}, {}, iter(range(1, 1000))
    note, norm, save = Guard.note, Guarded._get_grad_norm, torch.save
    write = PreTrainedModel.save_pretrained

    def noting(self, loss, numbers, labels):
        if len(windows) + 1 == faults.get("memory"):  # in the middle of a step, the others in theirs
            raise torch.OutOfMemoryError("CUDA out of memory")
        step.extend(numbers.tolist())
        note(self, loss, numbers, labels)

    def norming(self, model, grad_norm=None):
        windows[self.state.global_step + 1] = [*step]
        step.clear()
        learning = self.model.named_parameters()
        gradients.update({} if gradients else {n: w.grad.clone() for n, w in learning if w.grad is not None})
        meet(self, next(taken))
        return norm(self, model, grad_norm)

    def meet(trainer, number):
        if number == faults.get("nan"):
            trainer.guard._loss = trainer.guard._loss * float("nan")
        for name, sent in (("term", signal.SIGTERM), ("kill", signal.SIGKILL)):
            if number == faults.get(name):
                os.kill(os.getpid(), sent)

    def saving(what, to, **how):
        if "full" in faults and str(to).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        save(what, to, **how)

    def writing(model, to, **how):
        if "full_at_once" in faults:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        write(model, to, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", writing)
        patch.setattr(Guard, "note", noting)
        patch.setattr(Guarded, "_get_grad_norm", norming)
        patch.setattr(torch, "save", saving)
        try:
            yield
        finally:
            save({"windows": windows, "gradients": gradients}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _calm_libraries(quiet=True)
    rank = int(os.environ.get("RANK", "0"))
    kind, runs_folder, shards_folder, run_name, seen_path, settings, befalling = sys.argv[1:]
    changed = {"vlm": ranked_recipe, "distill": ranked_student}[kind](**json.loads(settings))
    asked = TrainRequest(Path(shards_folder), Path(runs_folder), Path(runs_folder), run_name, "test")
    own = {name: step for name, (whose, step) in json.loads(befalling).items() if whose == rank}
    with watched(Path(f"{seen_path}.{rank}"), own):
        try:
            train(changed, asked, console_of_rank(quiet=False, json_output=False))
        except OmniError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(error.exit_code)
