"""How wrong each condition is beside the reference, over all windows and in each stratum."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_cli.recipe import Metric, Prediction, Row, Stratified
from omni_cli.scene.clock import Float64Array
from omni_cli.scores import intervals
from omni_cli.scores.drawn import best_of
from omni_cli.scores.strata import Strata
from omni_cli.stages.evaluate.asking import Condition

Errors = Mapping[str, Float64Array]
BoolArray = npt.NDArray[np.bool_]
FEWEST_WINDOWS, FEWEST_RECORDINGS = 20, 5  # of a stratum in which a metric counts, for its number to say anything
_NOBODY = Prediction("", None)


@dataclass(frozen=True)
class Scored:
    """The answers of each condition to the same windows, the model's first, and what they are measured against.

    Attributes:
        recipe: knows how wrong an answer is.
        rows: of the windows, with their targets.
        medians: as the recipe's `errors` takes them.
        conditions: the model, its controls and the baselines.
        samples: answers that were drawn of each window.
    """

    recipe: Any
    rows: Sequence[Row]
    medians: Mapping[str, Any]
    conditions: Sequence[Condition]
    samples: int = 0

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The recipe's, and those of the best of several drawn answers."""
        return metrics_of(self.recipe, self.samples)

    def lines(self) -> list[dict[str, Any]]:
        """Return the scores of each condition, as a report holds them."""
        everywhere = np.ones(len(self.rows), bool)
        return [{"name": one.name, **_failures(one), **self._summary(one.name, everywhere)} for one in self.conditions]

    def strata(self) -> list[dict[str, Any]]:
        """Return the model's scores in each stratum that any window is in; None where these are too few."""
        if not isinstance(self.recipe, Stratified):
            return []
        return [line for strata in self.recipe.strata(self.rows) for line in self._in_strata(strata)]

    def windows(self) -> list[dict[str, Any]]:
        """Return what the model said of each window and how wrong it and the reference were; None where not known."""
        model = self.conditions[0]
        errors = {"errors": self._errors[model.name], "reference": self._errors[self.recipe.reference]}
        return [
            {
                **{name: row[name] for name in ("recording", "start_us", "end_us")},
                "text": said.text,
                "is_readable": said.values is not None,
                **(said.held.line() if said.held else {}),
                **{name: _at(of, index) for name, of in errors.items()},
            }
            for index, (row, said) in enumerate(zip(self.rows, model.predictions, strict=True))
        ]

    @cached_property
    def _errors(self) -> dict[str, Errors]:
        return {one.name: self._errors_of(one) for one in self.conditions}

    @cached_property
    def _recordings(self) -> npt.NDArray[np.str_]:
        return np.array([row["recording"] for row in self.rows])

    @cached_property
    def _compared(self) -> dict[str, BoolArray]:
        """Say where each metric counts: where the reference states it; what it never states stands by itself."""
        stated = {key: np.isfinite(error) for key, error in self._errors[self.recipe.reference].items()}
        return {key: where | (not where.any()) for key, where in stated.items()}

    def _errors_of(self, condition: Condition) -> Errors:
        plain = self._plain(condition.predictions)
        return {**plain, **self._best(condition)} if self.samples else plain

    def _plain(self, predictions: Sequence[Prediction]) -> Errors:
        errors: Errors = self.recipe.errors(predictions, self.rows, self.medians)
        return errors

    def _best(self, condition: Condition) -> Errors:
        """Return the errors of the best drawn answer; NaN for a control, of which none was drawn."""
        best: Mapping[str, Metric] = self.recipe.drawn_metrics(self.samples)
        if not condition.drawn:
            return {metric.key: np.full(len(self.rows), np.nan) for metric in best.values()}
        errors, nobody = [self._plain(one) for one in condition.drawn], self._plain([_NOBODY] * len(self.rows))
        readable = np.array([[said.values is not None for said in one] for one in condition.drawn])
        return {
            metric.key: best_of([one[key] for one in errors], readable, nobody[key]) for key, metric in best.items()
        }

    def _in_strata(self, strata: Strata) -> Iterator[dict[str, Any]]:
        for name in strata.names:
            where = strata.where(name)
            windows, recordings = int(where.sum()), len(np.unique(self._recordings[where]))
            line = {"strata": strata.title, "name": name, "windows": windows, "recordings": recordings}
            if windows:
                yield {**line, **self._summary(self.conditions[0].name, where, FEWEST_WINDOWS, FEWEST_RECORDINGS)}

    def _summary(
        self, name: str, where: BoolArray, fewest_windows: int = 1, fewest_recordings: int = 1
    ) -> dict[str, Any]:
        """Return a condition's metrics over some windows; None of those that count at fewer."""
        line: dict[str, Any] = {}
        for metric in self.metrics:
            error, reference = self._errors[name][metric.key], self._errors[self.recipe.reference][metric.key]
            both = np.isfinite(error) & self._compared[metric.key] & where
            recordings = self._recordings[both]
            if both.sum() < fewest_windows or len(np.unique(recordings)) < fewest_recordings:
                line |= _nothing(metric.key, int(both.sum()))
            else:
                line |= _summary(metric.key, error[both], reference[both], recordings.tolist())
        return line


def metrics_of(recipe: Any, samples: int) -> tuple[Metric, ...]:
    """Return the metrics of a report: the recipe's, and those of the best of `samples` drawn answers."""
    return (*recipe.metrics, *(recipe.drawn_metrics(samples).values() if samples else ()))


def _failures(condition: Condition) -> dict[str, Any]:
    """Return how many answers could not be read, and their share, or were forced; of drawn ones likewise."""
    failed = sum(one.values is None for one in condition.predictions)
    counts = {"unreadable_windows": failed, "unreadable": failed / len(condition.predictions)}
    if condition.drawn:
        drawn = [one for those in condition.drawn for one in those]
        counts["drawn_unreadable"] = float(np.mean([one.values is None for one in drawn]))
        counts |= {f"drawn_{name}": share for name, share in _forced(drawn).items()}
    return {**counts, **_forced(condition.predictions)}


def _forced(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return how many answers are not the model's own, their share and that of their tokens; nothing of free ones."""
    held = [one.held for one in predictions if one.held]
    if not held:
        return {}
    tokens, off = sum(one.tokens for one in held), sum(one.off_grammar for one in held)
    forced = sum(one.off_grammar > 0 for one in held)
    return {"forced_windows": forced, "forced": forced / len(held), "off_grammar": off / tokens}


def _summary(key: str, values: Float64Array, reference: Float64Array, recordings: Sequence[str]) -> dict[str, Any]:
    """Return a metric's mean over windows, its interval and its share of the reference's."""
    return {
        key: float(values.mean()),
        f"{key}_interval": intervals.interval_by_recording(values, recordings),
        f"{key}_of_reference": float(values.mean() / reference.mean()) if reference.mean() > 0 else None,
        f"{key}_windows": len(values),
    }


def _nothing(key: str, windows: int) -> dict[str, Any]:
    """Return that too few windows count for a metric to say anything."""
    return {key: None, f"{key}_interval": None, f"{key}_of_reference": None, f"{key}_windows": windows}


def _at(errors: Errors, index: int) -> dict[str, float | None]:
    """Return one window's errors, as JSON knows them."""
    return {key: float(values[index]) if np.isfinite(values[index]) else None for key, values in errors.items()}
