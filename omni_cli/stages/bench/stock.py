"""Stock TRL's Trainer, with nothing of ours but the rows, their order and the arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from transformers import PrinterCallback

from omni_cli.models.qwen_vl import DTYPES
from omni_cli.recipe import Batch, Row, StockTraining
from omni_cli.samples.dataset import WindowDataset
from omni_cli.stages.bench.turns import Timed
from omni_cli.stages.train.trainer import trainer_arguments


@dataclass(frozen=True)
class StockCollator:
    """Turns window numbers into a batch as the library wants it, inside the loader's workers."""

    dataset: WindowDataset
    collate: Callable[[Sequence[Row]], Batch]

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> Batch:
        """Read the windows and stack them."""
        return self.collate([self.dataset[row["index"]] for row in rows])


def make_stock_trainer(folder: Path, recipe: Any, tokenizer: Any, stock: StockTraining, dataset: WindowDataset) -> Any:
    """Return the library's Trainer with its own loss, timed.

    Args:
        folder: of its checkpoints.
        recipe: how many steps there are, and all that its Trainer is told.
        tokenizer: of the model.
        stock: the model and its batches.
        dataset: the windows to learn from.
    """
    trainer = type("StockTrainer", (Timed, recipe.trainer().trainer), {})(
        model=stock.model,
        args=trainer_arguments(folder, recipe, recipe.train.max_steps),
        train_dataset=Dataset.from_dict({"index": list(range(len(dataset)))}),
        data_collator=StockCollator(dataset, stock.collate),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.tune.mode == "full" and recipe.precision != "float32" and not torch.cuda.is_available():
        _autocast_on_cpu(trainer.model, DTYPES[recipe.precision])
    return trainer


def _autocast_on_cpu(model: Any, dtype: torch.dtype) -> None:
    """Have a model whose weights are held in float32 compute in 16 bits, as `bf16=True` does.

    That is TRL's default, on a CPU too, and this is what accelerate 1.15 does then (`prepare_model`). The argument
    itself would hold for our Trainer as well, since accelerate keeps one state for a process; ours computes in 16 bits
    by itself. On a GPU both are told it. A float16 accelerate refuses on a CPU, and ours has it.
    """
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
