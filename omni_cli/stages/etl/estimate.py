"""What an etl will need, from a few recordings opened but not decoded."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_cli.errors import DataError, OmniError
from omni_cli.samples.sync import time_grid
from omni_cli.samples.windows import span_us
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.stages.etl.plan import Job, Unit

_OPENED = 3
_RESERVE_BYTES = 256 << 20
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Scaled up from a few recordings; no window is counted as refused."""

    recordings: int
    hours: float
    windows: int
    stored_bytes: int

    def facts(self) -> dict[str, Any]:
        """Return the estimate for a report."""
        return {
            "recordings": self.recordings,
            "hours": round(self.hours, 3),
            "windows": self.windows,
            "stored_bytes": self.stored_bytes,
        }


def estimate(job: Job, units: Sequence[Unit]) -> Estimate:
    """Estimate what `units` become. Recordings that cannot be opened count as nothing."""
    chosen = sorted({round(place) for place in np.linspace(0, len(units) - 1, _OPENED)}) if units else []
    opened = [found for place in chosen if (found := _one(job, units[place])) is not None]
    if not opened:
        return Estimate(len(units), 0.0, 0, 0)
    seconds, windows, stored = (len(units) * float(np.mean(values)) for values in zip(*opened, strict=True))
    return Estimate(len(units), seconds / 3600, round(windows), round(stored))


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        OmniError: less is free than is needed.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + _RESERVE_BYTES:
        raise OmniError(
            f"{existing}: about {needed_bytes / _GIB:.1f} GiB are needed and {free / _GIB:.1f} GiB are free; "
            "free some space, or choose another disk with --out"
        )


def _one(job: Job, unit: Unit) -> tuple[float, int, int] | None:
    """Return seconds, windows and stored bytes of one recording."""
    preprocess = job.preprocess
    try:
        recording = job.reader.open(unit.recording_id, preprocess.cameras)
        first_us, last_us = span_us(recording, preprocess.cameras)
    except DataError:
        return None
    instants = len(time_grid(first_us, last_us, preprocess.rate_hz))
    windows = max((instants - preprocess.num_frames) // int(job.settings["sample"]["stride"]) + 1, 0)
    return max(last_us - first_us, 0) / MICROSECONDS_PER_SECOND, windows, instants * preprocess.instant_bytes
