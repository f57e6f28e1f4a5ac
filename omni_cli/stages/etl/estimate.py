"""What an etl will need, from a few recordings opened but not decoded."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from omni_cli.errors import DataError, OmniError
from omni_cli.report import counted
from omni_cli.samples.splits import SPLITS, SplitRule
from omni_cli.samples.windows import ChosenWindows, span_us
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.scene.recording import Recording
from omni_cli.stages.etl.identity import slow_cameras
from omni_cli.stages.etl.memory import peak_bytes
from omni_cli.stages.etl.plan import Job, Unit
from omni_cli.stages.etl.unit import assign_split

_OPENED = 3
_RESERVE_BYTES = 256 << 20
_FILES_A_RECORDING = 10  # tables, tokens, a receipt of each, folders, what is being written
_ANY = "any"
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Scaled up from a few recordings, cut as etl cuts them; what a teacher or a damaged video drops is not known."""

    recordings: int
    hours: float
    windows: dict[str, int]  # by split
    stored_bytes: int
    slow_hz: dict[str, float]  # rate of the cameras whose pictures will repeat
    worker_bytes: int  # memory at the peak, of one of them; 0 where no recording could be opened
    why_none: str = ""  # of the first that gives no window

    def facts(self) -> dict[str, Any]:
        """Return the estimate for a report."""
        return {
            "recordings": self.recordings,
            "hours": round(self.hours, 3),
            "windows": sum(self.windows.values()),
            "windows_by_split": self.windows,
            "stored_bytes": self.stored_bytes,
            "worker_bytes": self.worker_bytes,
        }


@dataclass(frozen=True)
class _Sample:
    """One recording, opened and not decoded."""

    seconds: float
    instants: int  # that a window looks at
    windows: Counter[str]  # of each split; _ANY: of all
    slow_hz: dict[str, float]
    worker_bytes: int
    why_none: str  # it gives no window


def estimate(job: Job, units: Sequence[Unit], most_opened: int = _OPENED) -> Estimate:
    """Estimate what `units` become. Recordings that cannot be opened or planned count as nothing.

    Args:
        job: what etl does.
        units: to be estimated.
        most_opened: how many of them are opened, evenly over all.
    """
    chosen = sorted({round(place) for place in np.linspace(0, len(units) - 1, most_opened)}) if units else []
    opened = [found for place in chosen if (found := _one(job, units[place])) is not None]
    if not opened:
        return Estimate(len(units), 0.0, dict.fromkeys(SPLITS, 0), 0, {}, 0)
    seconds, instants = (
        float(np.mean(values)) for values in zip(*((s.seconds, s.instants) for s in opened), strict=True)
    )
    slow_hz = {name: rate for found in opened for name, rate in found.slow_hz.items()}
    stored = len(units) * instants * prod(job.preprocess.window_shape[1:])
    windows: dict[str, int] = {split: _expected(opened, units, split) for split in SPLITS}
    peak = max(found.worker_bytes for found in opened)
    why_none = next((found.why_none for found in opened if found.why_none), "")
    return Estimate(len(units), len(units) * seconds / 3600, windows, round(stored), slow_hz, peak, why_none)


def _expected(opened: Sequence[_Sample], units: Sequence[Unit], split: str) -> int:
    """Return how many windows of one split to expect: those of the units it has, and its share of the others."""
    own = sum(unit.split == split for unit in units) * float(np.mean([found.windows[_ANY] for found in opened]))
    by_time = sum(unit.split == "by time" for unit in units)
    return round(own + by_time * float(np.mean([found.windows[split] for found in opened])))


def slow_line(slow_hz: Mapping[str, float], rate_hz: float) -> str:
    """Return what to tell of cameras that see less often than windows look."""
    rates = ", ".join(f"{name} at {rate:.3g} Hz" for name, rate in sorted(slow_hz.items()))
    return f"pictures repeat: windows look at {rate_hz:g} Hz, and {rates} sees less often"


_TOO_FEW = {
    "hash": "there are too few drives to split; fetch more, or use --split time",
    "time": "the drives are too short for the window and for split.gap_s; lower one of them, or take longer drives",
}


def too_few(split: str, rule: SplitRule) -> str:
    """Return what to tell where a split has no window."""
    return f"no {split} window: {_TOO_FEW[rule]}"


def check_space(out: Path, needed_bytes: int, recordings: int) -> None:
    """Refuse to start what the disk cannot hold: bytes, or files.

    Raises:
        OmniError: less is free than is needed.
    """
    existing, free, files = _room(out)
    remedy = "free some space, or choose another disk with --out"
    if free < needed_bytes + _RESERVE_BYTES:
        raise OmniError(
            f"{existing}: about {needed_bytes / _GIB:.1f} GiB are needed and {free / _GIB:.1f} GiB are free; {remedy}"
        )
    if files is not None and files < recordings * _FILES_A_RECORDING:
        raise OmniError(
            f"{existing}: about {recordings * _FILES_A_RECORDING} files are needed and {files} more can be; {remedy}"
        )


def room_line(job: Job, left: Sequence[Unit]) -> str:
    """Return what a stopped run still needs, and what the disk has."""
    _, free, files = _room(job.out)
    needed = estimate(job, left).stored_bytes
    room = f"{free:,} bytes" if files is None else f"{free:,} bytes and {files:,} files"
    return f"{counted(len(left), 'recording')} left, about {needed:,} bytes are needed, {room} are free"


def _room(out: Path) -> tuple[Path, int, int | None]:
    """Return the folder that is there, and the bytes and files that it has room for (None: of any number)."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    state = os.statvfs(existing)
    return existing, state.f_bavail * state.f_frsize, state.f_favail if state.f_files else None


def _one(job: Job, unit: Unit) -> _Sample | None:
    """Look at one recording; None where that fails, whatever fails: a worker tells of it, and goes on without it."""
    try:
        return _looked_at(job, unit)
    except Exception:
        return None


def _looked_at(job: Job, unit: Unit) -> _Sample:
    preprocess = job.preprocess
    recording = job.reader.open(unit.recording_id, preprocess.cameras)
    first_us, last_us = span_us(recording, preprocess.cameras)
    peak = peak_bytes(recording, preprocess)
    chosen, why_none = _chosen(job, unit, recording)
    windows = Counter(chosen.splits) | Counter({_ANY: len(chosen.splits)})
    instants = {int(instant) for window in chosen.windows for instant in window.instants_us}
    seconds = max(last_us - first_us, 0) / MICROSECONDS_PER_SECOND
    return _Sample(seconds, len(instants), windows, slow_cameras(recording, preprocess), peak, why_none)


def _chosen(job: Job, unit: Unit, recording: Recording) -> tuple[ChosenWindows, str]:
    """Return the windows of a recording as etl chooses them, and why there are none where it would refuse it."""
    try:
        chosen = job.make_tables.choose(recording, job.preprocess, assign_split=assign_split(job, unit, recording))
    except DataError as error:
        return ChosenWindows((), (), {}), str(error)
    dropped = ", ".join(f"{count} because {reason}" for reason, count in sorted(chosen.dropped.items()))
    return chosen, "" if chosen.windows else f"{recording.id}: dropped: {dropped}"
