"""What an answer states, how wrong it is, and what it must beat."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_cli.recipe import Metric, Pair, Prediction, Row
from omni_cli.scene.clock import Float64Array
from omni_cli.scores.baselines import constant_velocity
from omni_cli.scores.metrics import absolute_errors

CONSTANT = "constant median"
_QUANTITIES = {"mean_speed_mps": ("speed", "m/s"), "displacement_m": ("displacement", "m")}  # title, unit
Columns = Sequence[str]


def metrics(columns: Columns) -> tuple[Metric, ...]:
    """Return the absolute error of each quantity."""
    quantities = [_QUANTITIES[column] for column in columns]
    return tuple(Metric(f"{title}_mae", f"{title} MAE", unit) for title, unit in quantities)


def errors(
    columns: Columns, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Mapping[str, float]
) -> dict[str, Float64Array]:
    """Return the absolute errors (windows,); an answer that could not be read counts as the median."""
    found = zip(metrics(columns), columns, pairs(columns, predictions, rows), strict=True)
    return {metric.key: absolute_errors(pair.predicted, pair.truth, medians[name]) for metric, name, pair in found}


def baselines(
    columns: Columns, rows: Sequence[Row], medians: Mapping[str, float], *, past_speed: bool
) -> dict[str, list[Prediction]]:
    """Return the median, and where the speed at the start is told also constant velocity."""
    said = {CONSTANT: [Prediction("", {name: medians[name] for name in columns})] * len(rows)}
    if past_speed:
        said["constant velocity"] = [Prediction("", constant_velocity(row, columns)) for row in rows]
    return said


def pairs(columns: Columns, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
    """Return each quantity as predicted and as it was."""
    values = [prediction.values for prediction in predictions]
    return tuple(
        Pair(
            *_QUANTITIES[name],
            truth=np.array([row[name] for row in rows], dtype=float),
            predicted=np.array([np.nan if one is None else one[name] for one in values], dtype=float),
        )
        for name in columns
    )


def caption(columns: Columns, values: Mapping[str, Any] | None) -> str:
    """Return `speed 5.23 m/s, displacement 42.15 m`."""
    if values is None:
        return "no readable answer"
    known = [(values[name], *_QUANTITIES[name]) for name in columns if name in values]
    return ", ".join(f"{title} {value:.2f} {unit}" for value, title, unit in known)
