"""What a model must beat: answers that need no picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_cli.scene.clock import MICROSECONDS_PER_SECOND


def constant_velocity(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, float]:
    """Return what follows if the speed at the first instant of a window never changed.

    Args:
        row: the window, with `start_us`, `end_us` and `start_speed_mps`.
        columns: `mean_speed_mps` or `displacement_m`.

    Raises:
        KeyError: constant velocity says nothing about a column.
    """
    speed_mps, duration_s = row["start_speed_mps"], (row["end_us"] - row["start_us"]) / MICROSECONDS_PER_SECOND
    said = {"mean_speed_mps": speed_mps, "displacement_m": speed_mps * duration_s}
    return {column: said[column] for column in columns}
