"""Gathering what the page shows, and writing it where it may be written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from omni_cli import files
from omni_cli.errors import refused_by_machine
from omni_cli.report import Console
from omni_cli.stages.audit.page import Section, Worst, page, worst_recordings
from omni_cli.stages.audit.targets import is_one
from omni_cli.stages.checks.facts import RecordingFacts
from omni_cli.stages.checks.findings import Finding
from omni_cli.stages.checks.thumbnails import Wanted, strip
from omni_cli.stages.checks.units import Unit
from omni_cli.stages.pool import run_pool

REPORT_FILE = "audit.html"
_MOST_SHOWN = 12
_TIMEOUT_S = 60.0
_MEMORY_BYTES = 4 << 30


class FolderAudit(Protocol):
    """What is shown of one folder."""

    folder: Path
    units: list[Unit]
    findings: list[Finding]
    facts: list[RecordingFacts]


def default_report(path: Path) -> Path:
    """Return where the page of an audit belongs: in a folder of several things, beside a single one."""
    whole = path.absolute()
    return whole.with_name(f"{whole.name}.{REPORT_FILE}") if path.is_dir() and is_one(path) else path / REPORT_FILE


def write_report(
    place: Path, result: Mapping[str, Any], audited: Sequence[FolderAudit], console: Console
) -> Path | None:
    """Write the page; where the disk or its rights refuse, say so and return None: the audit itself is done."""
    sections = [_section(one, result["statistics"][str(one.folder)]) for one in audited if one.units]
    findings = [finding for one in audited for finding in one.findings]
    try:
        files.write_text(place, page(result, findings, sections))
    except OSError as error:
        if not (reason := refused_by_machine(error, place)):
            raise
        console.warn(f"no report: {reason}, with --report FILE")
        return None
    console.say(f"report: {place}")
    return place


def _section(one: FolderAudit, told: Mapping[str, Any]) -> Section:
    recordings = tuple(sorted({name for unit in one.units for name in unit.recordings}))
    known = set(recordings)
    there = {facts.recording: tuple(facts.cameras) for facts in one.facts if facts.recording in known}
    return Section(str(one.folder), recordings, there, told, tuple(one.findings), _worst(one))


def _worst(one: FolderAudit) -> tuple[Worst, ...]:
    """Take pictures of the worst recordings, in a worker: they are the ones whose files may be hostile."""
    unit_of = {name: unit for unit in one.units for name in unit.recordings}
    chosen = [(name, found) for name, found in worst_recordings(one.findings, _MOST_SHOWN) if name in unit_of]
    wanted = [Wanted(_alone(unit_of[name], name), _camera(one, name, found)) for name, found in chosen]
    shown = {}
    for outcome in run_pool(strip, wanted, workers=1, attempts=1, timeout_s=_TIMEOUT_S, memory_bytes=_MEMORY_BYTES):
        shown[outcome.item.unit.recordings[0]] = outcome
    return tuple(
        Worst(name, ask.camera, found, shown[name].result, (shown[name].error or "").removeprefix("DataError: "))
        for (name, found), ask in zip(chosen, wanted, strict=True)
    )


def _alone(unit: Unit, recording: str) -> Unit:
    return next(one for one in unit.by_recording() if one.recordings == (recording,))


def _camera(one: FolderAudit, recording: str, found: Sequence[Finding]) -> str:
    """Return the camera that the gravest finding names, or the first one that there is."""
    named = [finding.camera for finding in sorted(found, key=lambda each: each.severity) if finding.camera]
    unit = next(unit for unit in one.units if recording in unit.recordings)
    known = [camera for facts in one.facts if facts.recording == recording for camera in facts.cameras]
    return next(iter([*named, *known, *(unit.chunk.cameras if unit.chunk else ())]), "")
