"""What an answer in numbers states, how wrong it is, and what it must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np

from omni_cli.recipe import Metric, Pair, Prediction, Row, Stroke
from omni_cli.samples.sync import PlannedWindow
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array
from omni_cli.scene.recording import Recording
from omni_cli.scores import strata
from omni_cli.scores.baselines import constant_velocity
from omni_cli.scores.metrics import absolute_errors
from omni_cli.scores.strata import Strata

CONSTANT = "constant median"
_QUANTITIES = {"mean_speed_mps": ("speed", "m/s"), "displacement_m": ("displacement", "m")}  # title, unit
Medians = Mapping[str, Any]


class Answers(Protocol):
    """One kind of answer; arguments as of `Evaluable` and `Inferable`."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """How wrong an answer is."""

    def medians(self, rows: Sequence[Row]) -> dict[str, float | tuple[float, ...]]:
        """Return what the constant baseline will say."""

    def errors(
        self, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Medians
    ) -> dict[str, Float64Array]:
        """Return how wrong each answer is, by metric."""

    def baselines(self, rows: Sequence[Row], medians: Medians, *, past_speed: bool) -> dict[str, list[Prediction]]:
        """Return what needs no picture, by name; `past_speed`: the prompt tells the speed at the first instant."""

    def strata(self, rows: Sequence[Row]) -> tuple[Strata, ...]:
        """Return windows by manoeuvre and by speed."""

    def drawn_metrics(self, count: int) -> dict[str, Metric]:
        """Return how the best of several drawn answers is scored, by the key of the metric it is the best of."""

    def pairs(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
        """Return what is worth drawing."""

    def caption(self, values: Mapping[str, Any] | None) -> str:
        """Return an answer in one line for people."""

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer as JSON knows it."""

    def truth(
        self, recording: Recording, windows: Sequence[PlannedWindow], motion: Sequence[Mapping[str, float]]
    ) -> list[dict[str, Any]]:
        """Return what the true answers are, as far as they are known, in the form of a prediction's values.

        Args:
            recording: where the windows are from.
            windows: that no shard holds.
            motion: the ego motion over each; empty where it is not known.
        """

    def spoken_at(self, num_frames: int) -> Sequence[int]:
        """Return at which of a window's instants its answer is drawn."""

    def strokes(
        self, recording: Recording, camera: str, values: Mapping[str, Any], seen_us: tuple[int, int]
    ) -> tuple[Stroke, ...]:
        """Return what to draw over a camera's picture; `seen_us`: when it was taken, and the instant of the answer."""


@dataclass(frozen=True)
class Quantities:
    """Answers of a few numbers, each a column of the targets."""

    columns: tuple[str, ...]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The absolute error of each quantity."""
        quantities = [_QUANTITIES[column] for column in self.columns]
        return tuple(Metric(f"{title}_mae", f"{title} MAE", unit) for title, unit in quantities)

    def medians(self, rows: Sequence[Row]) -> dict[str, float | tuple[float, ...]]:
        """Return the median of each quantity."""
        return {name: median(row[name] for row in rows) for name in self.columns}

    def errors(
        self, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Medians
    ) -> dict[str, Float64Array]:
        """Return the absolute errors (windows,); an answer that could not be read counts as the median."""
        found = zip(self.metrics, self.columns, self.pairs(predictions, rows), strict=True)
        return {metric.key: absolute_errors(pair.predicted, pair.truth, medians[name]) for metric, name, pair in found}

    def baselines(self, rows: Sequence[Row], medians: Medians, *, past_speed: bool) -> dict[str, list[Prediction]]:
        """Return the median, and where the speed at the start is told also constant velocity."""
        said = {CONSTANT: [Prediction("", {name: medians[name] for name in self.columns})] * len(rows)}
        if past_speed:
            said["constant velocity"] = [Prediction("", constant_velocity(row, self.columns)) for row in rows]
        return said

    def strata(self, rows: Sequence[Row]) -> tuple[Strata, ...]:
        """Return windows by what the car did in them, and by its mean speed."""
        mean_mps, start_mps, turn_rad = (
            column(rows, name) for name in ("mean_speed_mps", "start_speed_mps", "dyaw_rad")
        )
        duration_s = (column(rows, "end_us") - column(rows, "start_us")) / MICROSECONDS_PER_SECOND
        acceleration_mps2 = strata.mean_acceleration(start_mps, mean_mps, duration_s)
        yaw_rate_radps = strata.per_second(turn_rad, duration_s)
        return strata.motion_strata(mean_mps, acceleration_mps2, yaw_rate_radps, mean_mps)

    def drawn_metrics(self, count: int) -> dict[str, Metric]:
        """Return the smallest error of each quantity."""
        return {
            one.key: replace(one, key=f"min_{one.key}_of_{count}", title=f"{one.title}, best of {count}", is_drawn=True)
            for one in self.metrics
        }

    def pairs(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
        """Return each quantity as predicted and as it was."""
        values = [prediction.values for prediction in predictions]
        return tuple(
            Pair(
                *_QUANTITIES[name],
                truth=np.array([row[name] for row in rows], dtype=float),
                predicted=np.array([np.nan if one is None else one[name] for one in values], dtype=float),
            )
            for name in self.columns
        )

    def caption(self, values: Mapping[str, Any] | None) -> str:
        """Return `speed 5.23 m/s, displacement 42.15 m`."""
        if values is None:
            return "no readable answer"
        known = [(values[name], *_QUANTITIES[name]) for name in self.columns if name in values]
        return ", ".join(f"{title} {value:.2f} {unit}" for value, title, unit in known)

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the quantities."""
        return dict(values)

    def truth(
        self, recording: Recording, windows: Sequence[PlannedWindow], motion: Sequence[Mapping[str, float]]
    ) -> list[dict[str, Any]]:
        """Return the quantities that the ego motion knows."""
        return [{name: known[name] for name in self.columns if name in known} for known in motion]

    def spoken_at(self, num_frames: int) -> Sequence[int]:
        """Every instant: where windows overlap, the one that began last speaks."""
        return range(num_frames)

    def strokes(
        self, recording: Recording, camera: str, values: Mapping[str, Any], seen_us: tuple[int, int]
    ) -> tuple[Stroke, ...]:
        """Nothing: numbers are a text."""
        return ()


def column(rows: Sequence[Row], name: str) -> Float64Array:
    """Return one number of each row (n,)."""
    return np.array([row[name] for row in rows], dtype=float)
