"""One rank of two that hold a model together, cut by `fully_shard`; rank 0 writes down what both found.

As a program: `cases FOLDER` takes one step of the optimiser in each of CASES; `train RUNS SHARDS NAME SETTINGS` trains
`cut_recipe` as `omni train` does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from omni_cli.models import sharded
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTrain, VlmTune
from omni_cli.report import console_of_rank
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import tiny_recipe
from tests.test_models import make_rows

# family, what is frozen, what is computed in
CASES = (
    ("qwen2_5_vl", (), "float32"),
    ("qwen2_5_vl", ("vision",), "bfloat16"),
    ("qwen3_vl", ("vision", "merger"), "float32"),
    ("llava_onevision", ("vision",), "float32"),
    ("internvl", (), "float32"),
)
SPEEDS = (3.2, 115.75, -0.5)  # of three windows, no two of one length: rank 0 takes two, rank 1 one
RATE, LONGEST = 1e-4, 1.0  # of the step; of the gradient


def case_recipe(family: str, freeze: tuple[str, ...], precision: str, sharding: str = "fsdp2") -> Vlm:
    tune, settings = VlmTune(mode="full", freeze=freeze), VlmTrain(sharding=sharding, workers=0)
    return tiny_recipe(family, tune=tune, train=settings, precision=precision)


def built(vlm: Vlm) -> Any:
    """The model that learns; of Qwen2.5-VL embedding and head are two, as in its 7B, of the others one."""
    model = vlm.build(vlm.preprocess()).model
    if vlm.model == "tiny:qwen2_5_vl":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0))
    return model


def cut_recipe(**changes: Any) -> Vlm:
    values = {"batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2,
              "log_steps": 1, "workers": 0, "warmup_ratio": 0.0, "sharding": "fsdp2"}  # fmt: skip
    return tiny_recipe(tune=VlmTune(mode="full"), train=VlmTrain(**values | changes))


def stepped(vlm: Vlm, model: Any, rows: list[Any], weight: float) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """Take one step; return the summed loss, the gradient's norm before it is clipped, and the gradients and optimiser.

    Args:
        vlm: the recipe.
        model: that learns, in the mode of training, its layers checkpointed.
        rows: of this rank.
        weight: of a label.
    """
    model.train().activation_checkpointing_enable()
    loss = vlm.loss(model, vlm.collate(rows, vlm.preprocess()), vlm.preprocess())
    (loss.total * weight).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LONGEST)
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, fused=True)
    optimizer.step()
    return loss.total.detach(), norm, gradients, optimizer


def labels_of(rows: list[Any]) -> int:
    return sum(int((row["labels"] != -100).sum()) for row in rows)


def take_case(case: tuple[str, tuple[str, ...], str], rank: int) -> dict[str, Any]:
    vlm = case_recipe(*case)
    rows = make_rows(vlm, SPEEDS)
    model = vlm.trainer().shard(built(vlm))
    mine = rows[:2] if rank == 0 else rows[2:]
    total, norm, gradients, optimizer = stepped(vlm, model, mine, distributed.get_world_size() / labels_of(rows))
    distributed.all_reduce(total)
    kept = sharded.gathered_optimizer(model, optimizer)
    return {
        "total": total,
        "norm": sharded.whole_norm(norm),
        "gradients": {name: sharded.whole_norm(each) for name, each in gradients.items()},
        "weights": sharded.gathered(model),
        "moments": {name: each["exp_avg"] for name, each in kept["state"].items()} if rank == 0 else {},
        "plain": {name for name, each in model.named_parameters() if not isinstance(each.data, DTensor)},
        "types": {name: str(each.dtype) for name, each in model.named_parameters()},
        "held": sum(each.to_local().numel() for each in model.parameters() if isinstance(each.data, DTensor)),
        "cut": sum(each.numel() for each in model.parameters() if isinstance(each.data, DTensor)),
    }


def take_cases(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = [take_case(case, rank) for case in CASES]
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def train_cut(runs: str, shards: str, name: str, settings: str) -> None:
    asked = TrainRequest(Path(shards), Path(runs), Path(runs), name, "test")
    train(cut_recipe(**json.loads(settings)), asked, console_of_rank(quiet=False, json_output=False))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "cases":
        take_cases(Path(sys.argv[2]))
    else:
        train_cut(*sys.argv[2:])
