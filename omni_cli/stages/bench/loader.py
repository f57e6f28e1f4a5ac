"""How fast shards become batches."""

from collections.abc import Sequence

from omni_cli.recipe import Batch
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure
from omni_cli.stages.etl import ensure_sidecar

_BATCHES = 4  # in one go of the loader


def bench_loader(inputs: Inputs, repeats: int) -> Part:
    """Time windows on their way from mapped shards into batches, in one process."""
    recipe, shards = inputs.recipe, inputs.shards
    dataset = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, inputs.console))
    size = recipe.train.batch_size
    numbers = [index % len(dataset) for index in range(size * _BATCHES)]
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def load() -> list[Batch]:
        return [_batch(inputs, dataset, batch) for batch in batches]

    timing = measure({"load": load}, repeats)["load"]
    window_bytes = dataset.pictures(0).numel()
    amounts = {"windows": len(numbers), "MB": len(numbers) * window_bytes / 1e6}
    line = Line(f"{_BATCHES} batches of {size}", timing, amounts)
    return Part("loader", f"{shards.folder}, {len(dataset)} windows, one process", (line,))


def _batch(inputs: Inputs, dataset: WindowDataset, numbers: Sequence[int]) -> Batch:
    batch: Batch = inputs.recipe.collate([dataset[number] for number in numbers], dataset.preprocess)
    return batch
