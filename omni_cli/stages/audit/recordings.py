"""Checking the recordings of one source folder: in workers with limits, since files from outside are hostile."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omni_cli.report import Console
from omni_cli.stages.audit.subset import EVERYTHING, Subset
from omni_cli.stages.checks.facts import RecordingFacts
from omni_cli.stages.checks.findings import Checked, Finding, refuse
from omni_cli.stages.checks.units import Unit, check_unit
from omni_cli.stages.pool import run_pool

_RECORDINGS_A_WORKER = 32  # fewer are checked, by their headers, before a worker has started
_CLIP_TIMEOUT_S, _ROUTE_TIMEOUT_S = 900.0, 7200.0  # of a worker; a chunk's headers take less than its clips' pictures
_MEMORY_BYTES = 4 << 30  # private, of a worker: a picture that claims more is refused
Check = Callable[[Unit], Checked]


@dataclass
class Gathered:
    """What was found in one source folder, and measured."""

    findings: set[Finding] = field(default_factory=set)  # what concerns a whole zip is found by each that opens it
    facts: list[RecordingFacts] = field(default_factory=list)

    def add(self, checked: Checked) -> None:
        """Add what one unit gave."""
        self.findings.update(checked.findings)
        self.facts.extend(checked.facts)


def check_all(units: Sequence[Unit], folder: Path, *, deep: bool, subset: Subset, console: Console) -> Gathered:
    """Check the headers of all units, and every picture of those recordings of a subset where it is deep."""
    total = sum(len(unit.recordings) for unit in units)
    cores, gathered = len(os.sched_getaffinity(0)), Gathered()
    shallow, thorough = _divided(units, subset) if deep else (list(units), [])
    with console.progress(f"audit {folder.name}", total, "recordings") as step:
        for tasks, is_deep in ((shallow, False), (thorough, True)):
            count = sum(len(unit.recordings) for unit in tasks)
            workers = min(len(tasks), cores, count if is_deep else count // _RECORDINGS_A_WORKER)
            for unit, checked in _checked(tasks, partial(check_unit, deep=is_deep), workers):
                gathered.add(checked)
                step.advance(len(unit.recordings))
    gathered.facts.sort(key=lambda facts: facts.recording)
    return gathered


def _divided(units: Sequence[Unit], subset: Subset) -> tuple[list[Unit], list[Unit]]:
    """Return the recordings of which headers are read, and those whose pictures are decoded, each a unit of its own."""
    single = [one for unit in units for one in unit.by_recording()]
    is_chosen = [subset == EVERYTHING or subset.holds(one.recordings[0]) for one in single]
    told = list(zip(single, is_chosen, strict=True))
    return [one for one, known in told if not known], [one for one, known in told if known]


def _checked(units: Sequence[Unit], check: Check, workers: int) -> Iterator[tuple[Unit, Checked]]:
    """Check units; one that killed its worker is checked again by recordings, so that a bad file bars only its own."""
    again: list[Unit] = []
    timeout_s = _CLIP_TIMEOUT_S if units and units[0].chunk is not None else _ROUTE_TIMEOUT_S
    outcomes = run_pool(check, units, workers=workers, attempts=1, timeout_s=timeout_s, memory_bytes=_MEMORY_BYTES)
    for outcome in outcomes:
        unit = outcome.item
        if outcome.result is not None:
            yield unit, outcome.result
        elif len(unit.recordings) > 1:
            again += unit.by_recording()
        else:
            lost = refuse("audit-failed", f"the check did not end: {outcome.error}")
            yield unit, Checked((lost.about(unit.recordings[0]),))
    if again:
        yield from _checked(again, check, max(workers, 1))
