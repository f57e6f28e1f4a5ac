"""What `eval`, and in part `infer`, can ask of a recipe beyond answers and errors; a recipe may lack each of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from omni_cli.recipe.values import BuiltModel, Metric, Prediction, Row
from omni_cli.samples.preprocess import Preprocess
from omni_cli.scores.strata import Strata


@runtime_checkable
class Stratified(Protocol):
    """A recipe that knows what kind of driving a window shows."""

    def strata(self, rows: Sequence[Row]) -> Sequence[Strata]:
        """Return the ways to tell these windows apart by what their targets hold; each names every window."""


@runtime_checkable
class Formatted(Protocol):
    """A recipe whose model answers in a text that may not be of the format, and can be held to it."""

    def held_to_format(self, built: BuiltModel, preprocess: Preprocess) -> BuiltModel:
        """Return the model so that each of its answers can be read, and tells how far it was forced to that.

        Args:
            built: the model, where it will answer.
            preprocess: of the windows, which says what is asked.

        Raises:
            DataError: its tokenizer is of another kind than those that the formats are known for.
        """


@runtime_checkable
class Watchful(Protocol):
    """A recipe that can be asked about what live cameras see."""

    def prompt_row(self, pictures: Tensor, preprocess: Preprocess, tokenizer: Any, start_speed_mps: float) -> Row:
        """Return a row for a window that no shard holds.

        Args:
            pictures: of the window, as `preprocess` makes them.
            preprocess: of the model.
            tokenizer: of the model.
            start_speed_mps: forward speed at the first instant, for a model that is told it.
        """


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
