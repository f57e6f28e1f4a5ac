"""How far apart two programs of one driving model are: every kind of number by itself.

Metres ahead, hundreds of them, would hide a wrong logit or a wrong yaw. So a difference is told in units of the largest
number of its own kind: of one column of a plan, of a lane's heights, of the scores of leads.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_cli.formats.driving_model import MEAN_SHAPES, PLAN_COLUMNS

FloatArray = npt.NDArray[np.floating]

_LEAST, _LEAST_ANGLE = 1.0, 0.05  # m, m/s, m/s^2, logits, logarithms; rad, rad/s: less than that counts as that
_ANGLES = range(PLAN_COLUMNS["euler"].start, PLAN_COLUMNS["euler_rate"].stop)


@dataclass(frozen=True)
class Apart:
    """The kind of number that is furthest apart."""

    kind: str  # for people
    difference: float  # in its own unit
    largest: float  # number of its kind, or what counts as that

    @property
    def share(self) -> float:
        """Return the difference as a share; one that is not a number is the largest."""
        return math.inf if math.isnan(self.difference) else self.difference / self.largest


def furthest_apart(found: FloatArray, wanted: FloatArray, slices: Mapping[str, slice]) -> Apart:
    """Return the kind of number in which two programs' answers (n, width) differ most.

    Args:
        found: of the one.
        wanted: of the other, which says how large each kind is.
        slices: of a program's output; `pad` means nothing.
    """
    kinds = [kind for name, place in slices.items() if name != "pad" for kind in _kinds(name, place)]
    return max((_apart(kind, found[:, place], wanted[:, place], least) for kind, place, least in kinds),
               key=lambda one: one.share)  # fmt: skip


def _apart(kind: str, found: FloatArray, wanted: FloatArray, least: float) -> Apart:
    difference = np.abs(found.astype(np.float64) - wanted).max()
    return Apart(kind, float(difference), max(float(np.abs(wanted).max()), least))


def _kinds(name: str, place: slice) -> Iterator[tuple[str, slice, float]]:
    """Yield the kinds of number of a part: each column of its means and of its scales, or the part itself."""
    if name not in MEAN_SHAPES:
        yield name, place, _LEAST
        return
    count, columns = math.prod(MEAN_SHAPES[name]), MEAN_SHAPES[name][-1]
    for column in range(columns):
        least = _LEAST_ANGLE if name == "plan" and column in _ANGLES else _LEAST
        yield f"{name}, column {column}", slice(place.start + column, place.start + count, columns), least
        yield f"{name}, scales of column {column}", slice(place.start + count + column, place.stop, columns), _LEAST
