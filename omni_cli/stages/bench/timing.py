"""Timings that can be trusted: synchronised with the device, warmed up, repeated, and compared in turn."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How long one piece of work took, each time."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def facts(self) -> dict[str, float | int]:
        """Return the median, the tail and the spread for a report; of few repeats the tail is the slowest."""
        p95_s, p99_s = np.quantile(self.seconds, [0.95, 0.99], method="higher").tolist()
        spread = {"min_s": min(self.seconds), "max_s": max(self.seconds)}
        return {"median_s": self.median_s, "p95_s": p95_s, "p99_s": p99_s, **spread, "repeats": len(self.seconds)}


@dataclass(frozen=True)
class Line:
    """One measured piece of work, and how much of what it does at a time."""

    what: str
    timing: Timing
    amounts: Mapping[str, float] = field(default_factory=dict)  # unit -> how many in one go
    notes: Mapping[str, Any] = field(default_factory=dict)  # what else a report tells

    def rates(self) -> dict[str, float]:
        """Return how many of each unit a second, at the median."""
        return {unit: amount / self.timing.median_s for unit, amount in self.amounts.items()}

    def facts(self) -> dict[str, Any]:
        """Return the line for a report."""
        return {**self.timing.facts(), "per_second": self.rates(), **self.notes}


@dataclass(frozen=True)
class Part:
    """What was measured of one stage."""

    name: str
    on: str  # what it was measured on
    lines: tuple[Line, ...]
    ratios: Mapping[str, float] = field(default_factory=dict)  # between lines of this part
    settings: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the part for a report."""
        lines = {line.what: line.facts() for line in self.lines}
        return {"on": self.on, **self.settings, "lines": lines, "ratios": dict(self.ratios)}


def synchronise() -> None:
    """Wait until the accelerator has done what it was told; a CPU always has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summed(timings: Sequence[Timing]) -> Timing:
    """Return how long pieces of work that were measured in turn take one after the other, round by round."""
    return Timing(tuple(map(sum, zip(*(timing.seconds for timing in timings), strict=True))))


def measure(
    work: Mapping[Name, Callable[[], object]],
    repeats: int,
    warmups: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[Name, Timing]:
    """Time several pieces of work in turn, so that what else the machine does falls on all of them alike.

    Args:
        work: by name.
        repeats: how often each is timed.
        warmups: how often each runs before it counts.
        before: what is done before each time and is not timed.
    """
    for function in [*work.values()] * warmups:
        function()
    seconds: dict[Name, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            if before is not None:
                before()
            seconds[name].append(_time(function))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time(function: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started
