"""Errors of predictions, as pure functions of what was said and what is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_cli.scene.clock import Float64Array


@dataclass(frozen=True)
class Answers:
    """What was said about n windows, and the truth."""

    predicted: Float64Array  # (n,) NaN where the answer could not be read
    truth: Float64Array  # (n,)
    recordings: tuple[str, ...]  # (n,) which recording each window is from

    @property
    def unreadable(self) -> float:
        """Share of answers that could not be read."""
        return float(np.isnan(self.predicted).mean())


def collect(
    column: str,
    values: Sequence[Mapping[str, float] | None],
    truth: Sequence[float],
    recordings: Sequence[str],
) -> Answers:
    """Gather one predicted column over windows."""
    predicted = [np.nan if value is None else value[column] for value in values]
    return Answers(np.array(predicted, dtype=float), np.array(truth, dtype=float), tuple(recordings))


def absolute_errors(answers: Answers, fallback: float) -> Float64Array:
    """Return |error| of each window (n,).

    An unreadable answer is scored as if it had been `fallback` (the train set's median): it knows nothing, and must
    not improve the mean by being left out.
    """
    predicted = np.where(np.isnan(answers.predicted), fallback, answers.predicted)
    return np.asarray(np.abs(predicted - answers.truth))
