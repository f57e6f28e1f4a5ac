"""What `eval` can ask of a recipe beyond answers and errors; a recipe that lacks it is measured without."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from omni_cli.recipe.values import BuiltModel, Metric, Prediction, Row
from omni_cli.samples.preprocess import Preprocess
from omni_cli.scores.strata import Strata


@runtime_checkable
class Stratified(Protocol):
    """A recipe that knows what kind of driving a window shows."""

    def strata(self, rows: Sequence[Row]) -> Sequence[Strata]:
        """Return the ways to tell these windows apart by what their targets hold; each names every window."""


@runtime_checkable
class Drawable(Protocol):
    """A recipe whose model can also answer by chance, to be scored by the best of several answers."""

    def draw(
        self, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess, seeds: Sequence[int], temperature: float
    ) -> list[Prediction]:
        """Answer windows from their pictures and prompts, by chance.

        Args:
            built: the model.
            rows: of the windows.
            preprocess: how they were made.
            seeds: one a window: its answer depends on this one, and not on what is asked beside it.
            temperature: above 0; 1 draws as the model says.
        """

    def drawn_metrics(self, count: int) -> Mapping[str, Metric]:
        """Return how the best of `count` drawn answers is scored: of some keys of `metrics`, the metric of the best."""
