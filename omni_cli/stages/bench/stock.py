"""Stock TRL's Trainer, with nothing of ours but the rows, their order and the arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback

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
    return trainer
