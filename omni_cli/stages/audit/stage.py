"""The stage itself: each folder checked by its kind, then the table, the page and the JSON."""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.config import nearest
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats import comma2k19, dgp, openpilot, physical_ai_av
from omni_cli.report import Console, counted
from omni_cli.samples.shards import ShardSet, frames_path, open_shards
from omni_cli.sources.physical_ai_av import find_root
from omni_cli.sources.quarantine import QUARANTINE_FILE, read_quarantine
from omni_cli.stages.audit import artefacts
from omni_cli.stages.audit.artefacts import Read
from omni_cli.stages.audit.aside import set_aside
from omni_cli.stages.audit.duplicates import duplicate_findings
from omni_cli.stages.audit.leaks import picture_findings, split_findings
from omni_cli.stages.audit.recordings import check_all
from omni_cli.stages.audit.reporting import write_report
from omni_cli.stages.audit.statistics import rig_line, statistics
from omni_cli.stages.audit.subset import EVERYTHING, Subset, parse_subset
from omni_cli.stages.audit.targets import ARTEFACTS, SHARDS, targets, units_of
from omni_cli.stages.checks.facts import RecordingFacts
from omni_cli.stages.checks.findings import Finding, reasons, refuse, table_rows, warn
from omni_cli.stages.checks.licence import licence_findings
from omni_cli.stages.checks.units import Unit
from omni_cli.stages.ledger import first_fetched
from omni_cli.stages.raw_lock import reading

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class AuditRequest:
    """What to audit."""

    path: Path  # DATA, a source folder, a shard folder, a run or an export
    cameras: tuple[str, ...] | None = None  # None: every camera that is there
    deep: bool = False  # decode every frame, hash every artefact
    quarantine: bool = False  # move damaged files aside, list refused recordings
    subset: str | None = None  # 5% or 3/30: read deeply what the names' hashes choose; the rest by headers
    report: Path | None = None  # where the page is written; None: nowhere

    @property
    def is_thorough(self) -> bool:
        """Say whether any picture is decoded and any file hashed."""
        return self.deep or self.subset is not None

    def chosen(self) -> Subset:
        """Return what is read deeply.

        Raises:
            UsageError: it is no subset.
        """
        return EVERYTHING if self.subset is None else parse_subset(self.subset)


@dataclass
class Audited:
    """What was found in one folder."""

    kind: str
    folder: Path
    units: list[Unit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: list[RecordingFacts] = field(default_factory=list)
    read: Read = field(default_factory=Read)
    moved: list[str] = field(default_factory=list)
    listed: int = 0  # recordings that were put into quarantine
    hindered: OmniError | None = None  # what kept them out of it

    @property
    def recordings(self) -> tuple[str, ...]:
        """Names of what was looked at; none for shards and runs, which are one unit each."""
        return tuple(recording for unit in self.units for recording in unit.recordings)


def audit(request: AuditRequest, console: Console) -> dict[str, Any]:
    """Audit a folder and tell what is wrong with it.

    Returns:
        `audited` units (recordings, shard sets, runs), how many are `refused`, `quarantined` and have warnings
        (`warned`; a refused one may), all `findings`, what was `read` and hashed, `statistics` of the recordings by
        folder, and the `report`. Data are refused when `refused` is not 0.

    Raises:
        UsageError: the folder does not exist, a camera is unknown, or a subset is none.
        DataError: the folder holds nothing that omni knows, or nothing at all.
        OmniError: another omni takes files away from it, or uses it while damaged ones are to be moved.
    """
    _require_known(request.cameras)
    subset = request.chosen()
    audited = [_audit_folder(kind, folder, request, subset, console) for kind, folder in targets(request.path)]
    findings = [finding for one in audited for finding in one.findings]
    result = {
        "path": str(request.path),
        "deep": request.deep,
        "subset": request.subset,
        **_summary(audited, quarantine=request.quarantine),
        "statistics": {str(one.folder): statistics(one.facts) for one in audited if one.units},
    }
    report = write_report(request.report, result, audited, console) if request.report else None
    _tell(request, result, findings, console)
    for one in audited:  # at the end: hours of looking are not lost
        if one.hindered:
            raise one.hindered
    return {**result, "report": str(report) if report else None, "findings": [one.as_json() for one in findings]}


def _require_known(cameras: tuple[str, ...] | None) -> None:
    known = (*physical_ai_av.CAMERAS, *openpilot.CAMERAS, *comma2k19.CAMERAS, *dgp.CAMERAS)
    if unknown := [camera for camera in cameras or () if camera not in known]:
        raise UsageError(f"unknown camera {unknown[0]!r}; {nearest(unknown[0], (*physical_ai_av.CAMERA_SETS, *known))}")


def _tell(request: AuditRequest, result: dict[str, Any], findings: Sequence[Finding], console: Console) -> None:
    if findings:
        header = ("code", "severity", "findings", "units", "examples")
        console.table("what the audit found", header, table_rows(findings))
    for folder, told in result["statistics"].items():
        if line := rig_line(told["rigs"]):
            console.say(f"{folder}: {line}")
    if request.is_thorough:
        console.say(
            "read {files} of {of_files} files with receipts, {bytes} of {of_bytes} bytes".format(**result["read"])
        )
    counts = "{audited} audited, {refused} refused, {quarantined} in quarantine, {warned} with warnings".format(
        **result
    )
    tell = console.warn if result["refused"] else console.say  # an exit code of 3 is never silent
    tell(f"{request.path}: {counts}")


def _audit_folder(kind: str, folder: Path, request: AuditRequest, subset: Subset, console: Console) -> Audited:
    with reading(folder):
        audited = _checked(kind, folder, request, subset, console)
    if request.quarantine:
        _set_aside(audited, console)
    return audited


def _set_aside(audited: Audited, console: Console) -> None:
    kind, folder = audited.kind, audited.folder
    try:
        audited.moved, audited.listed = set_aside(kind, folder, audited.findings, audited.units)
    except OmniError as error:
        audited.hindered = error
    if audited.moved or audited.listed:
        told = (
            f"moved {counted(len(audited.moved), 'damaged file')} aside, listed {counted(audited.listed, 'recording')}"
        )
        console.say(f"{told}: {folder / QUARANTINE_FILE}")


def _checked(kind: str, folder: Path, request: AuditRequest, subset: Subset, console: Console) -> Audited:
    audited = Audited(kind, folder)
    try:
        if kind not in (SHARDS, ARTEFACTS):
            _audit_source(audited, request, subset, console)
        elif kind == SHARDS:
            audited.findings += artefacts.shard_findings(folder)
            audited.findings += _licence_findings(folder)
    except DataError as error:
        audited.findings.append(refuse("unusable", str(error)))
    _audit_artefacts(audited, request, subset, console)
    if kind == SHARDS:
        _audit_split(audited, request, subset)
    audited.findings = [replace(finding, place=str(folder)) for finding in audited.findings]
    return audited


def _audit_source(audited: Audited, request: AuditRequest, subset: Subset, console: Console) -> None:
    folder = audited.folder
    audited.units, of_indices = units_of(audited.kind, folder, request.cameras)
    audited.findings += of_indices
    gathered = check_all(audited.units, folder, deep=request.is_thorough, subset=subset, console=console)
    audited.findings += sorted(gathered.findings, key=_order)
    audited.facts = gathered.facts
    audited.findings += duplicate_findings(gathered.facts)
    audited.findings += _licence_findings(folder)
    audited.findings += _mended(folder, audited.recordings, audited.findings)


def _order(finding: Finding) -> tuple[str, ...]:
    return finding.recording, finding.camera, finding.code, finding.detail


def _licence_findings(folder: Path) -> list[Finding]:
    today = datetime.datetime.now(datetime.UTC).date()
    if not (folder / physical_ai_av.REVISION_FILE).is_file():  # DATA/shards/NAME: its raw data may be gone
        listed = first_fetched(folder.absolute().parent.parent, folder)
        return [] if listed is None else list(licence_findings(listed, today))
    try:
        first = files.read_json(find_root(folder) / physical_ai_av.REVISION_FILE).get("first_fetched")
    except (DataError, ValueError, AttributeError):
        return []
    return [] if first is None else list(licence_findings(str(first), today))


def _audit_artefacts(audited: Audited, request: AuditRequest, subset: Subset, console: Console) -> None:
    receipts = artefacts.read_receipts(audited.folder)
    audited.findings += receipts.findings
    audited.findings += artefacts.size_findings(receipts)
    if request.is_thorough and receipts.listed:
        total = sum(file.size for file in receipts.listed if isinstance(file.size, int)) // _MEGABYTE
        with console.progress(f"hash {audited.folder.name}", total, "MB") as step:
            count = len(os.sched_getaffinity(0))
            found, audited.read = artefacts.content_findings(receipts, subset, count, _in_megabytes(step.advance))
        audited.findings += found
    audited.findings += artefacts.stray_findings(receipts)
    audited.findings += artefacts.unfinished_findings(audited.folder)


def _in_megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Return what counts bytes and advances by whole megabytes."""
    pending = 0

    def count(size_bytes: int) -> None:
        nonlocal pending
        whole, pending = divmod(pending + size_bytes, _MEGABYTE)
        advance(whole)

    return count


def _audit_split(audited: Audited, request: AuditRequest, subset: Subset) -> None:
    """Look for one drive on both sides; pictures are read of recordings whose files are as their receipts say."""
    try:
        shards: ShardSet = open_shards(audited.folder)
    except DataError:
        return  # named already
    audited.findings += split_findings(shards)
    if request.is_thorough:
        damaged = {finding.file for finding in audited.findings if finding.file}
        entries = [entry for entry in shards.manifest.recordings if subset.holds(entry.id)]
        of_frames = {entry.id: frames_path(audited.folder, entry.id) for entry in entries}
        names = {name: path.relative_to(audited.folder).as_posix() for name, path in of_frames.items()}
        audited.findings += picture_findings(shards, [entry for entry in entries if names[entry.id] not in damaged])


def _mended(folder: Path, recordings: Sequence[str], found: Sequence[Finding]) -> list[Finding]:
    healthy = (read_quarantine(folder).keys() & set(recordings)) - reasons(found).keys()
    detail = "in quarantine, but nothing that refuses it is found now; delete its line, or --restore all"
    return [warn("mended", detail).about(recording) for recording in sorted(healthy)]


def _summary(audited: Sequence[Audited], *, quarantine: bool) -> dict[str, Any]:
    findings = [finding for one in audited for finding in one.findings]
    refused = {finding.unit for finding in findings if finding.severity == "refuse"}
    warned = {finding.unit for finding in findings if finding.severity == "warn"}
    aside = {(str(one.folder), recording) for one in audited for recording in read_quarantine(one.folder)}
    moved = {finding.unit for one in audited for finding in one.findings if _is_moved(finding, one.moved)}
    total = Read()
    for one in audited:
        total.add(one.read)
    return {
        "audited": sum(max(len(one.recordings), 1) for one in audited),
        "refused": len(refused - aside - moved),
        "quarantined": len(aside),
        "warned": len(warned - aside),
        "moved": [str(one.folder / name) for one in audited for name in one.moved],
        "quarantine_files": [
            str(one.folder / QUARANTINE_FILE) for one in audited if quarantine and (one.moved or one.listed)
        ],
        "read": asdict(total),
    }


def _is_moved(finding: Finding, moved: Sequence[str]) -> bool:
    """Say whether what a finding is about lies in quarantine now: the file itself, or the folder that it is in."""
    return bool(finding.file) and any(finding.file == name or finding.file.startswith(f"{name}/") for name in moved)
