"""What is asked of a training step beside the training itself: what it costs here, and in a stock library."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from omni_cli.recipe.values import Batch, BuiltModel, Row, StockTraining
from omni_cli.samples.preprocess import Preprocess


@runtime_checkable
class Comparable(Protocol):
    """A recipe whose training a stock library can do too, which `bench` measures beside ours."""

    def stock(self, built: BuiltModel, preprocess: Preprocess) -> StockTraining:
        """Return the library's training of what was built, from the same weights."""

    def step_flops(self, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess) -> float:
        """Return how many operations forward and backward pass over some rows need; 0 where nobody has counted them.

        Args:
            built: what learns.
            rows: of the windows, without pictures.
            preprocess: of the model.
        """


@runtime_checkable
class Outlined(Protocol):
    """A recipe whose training step can be walked through without memory, to foresee how much it will take."""

    def outline(self, preprocess: Preprocess) -> nn.Module:
        """Return the model as `build` makes it, of shapes alone, on the `meta` device."""

    def outline_batch(self, model: nn.Module, preprocess: Preprocess) -> Batch:
        """Return a batch of equal windows, as long as they are, whose pictures are on the `meta` device.

        Args:
            model: what `outline` returned.
            preprocess: of the model.
        """
