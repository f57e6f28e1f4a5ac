"""omni audit: find and name what is wrong with raw data, shards, runs and exports, before anything learns from it.

What is found is told once a kind, with examples, and in full as JSON. A recording with a finding that refuses it is
kept on disk; `--quarantine` lists it with its reasons, and every later stage leaves it out.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omni_cli.config import nearest
from omni_cli.errors import DataError, UsageError
from omni_cli.files import RECEIPT_SUFFIX, receipt_path
from omni_cli.formats import comma2k19, openpilot, physical_ai_av
from omni_cli.report import Console
from omni_cli.sources import open_source, openpilot_schema, source_names
from omni_cli.sources.physical_ai_av import find_root
from omni_cli.sources.quarantine import read_quarantine, write_quarantine
from omni_cli.stages.audit.artefacts import receipt_findings, shard_findings, unfinished_findings
from omni_cli.stages.checks.findings import Finding, reasons, refuse, table_rows, warn
from omni_cli.stages.checks.repository import read_repository
from omni_cli.stages.checks.units import Unit, check_unit
from omni_cli.stages.pool import run_pool
from omni_cli.stages.runs import RUN_FILE

_FETCH = "get data first, for example: omni fetch --source synthetic --chunks 2"
_TIMEOUT_S = 7200.0  # of a worker, for one chunk or route
_RECORDINGS_A_WORKER = 32  # fewer are checked before a worker has started
_DATA_FOLDERS = ("raw", "shards")


@dataclass(frozen=True)
class AuditRequest:
    """What to audit."""

    path: Path  # DATA, a source folder, a shard folder, a run or an export
    cameras: tuple[str, ...] | None = None  # None: every camera that is there
    deep: bool = False  # decode every frame, hash every artefact
    quarantine: bool = False  # list refused recordings in their source folder


@dataclass(frozen=True)
class Audited:
    """What was found in one folder."""

    folder: Path
    recordings: tuple[str, ...]  # looked at; none for shards and runs, which are one unit each
    findings: tuple[Finding, ...]


def audit(request: AuditRequest, console: Console) -> dict[str, Any]:
    """Audit a folder and tell what is wrong with it.

    Returns:
        `audited` units (recordings, shard sets, runs), how many are `refused`, `quarantined` and `warned`, and all
        `findings`. Data are refused when `refused` is not 0.

    Raises:
        UsageError: the folder does not exist, or a camera is unknown.
        DataError: the folder holds nothing that omni knows, or nothing at all.
    """
    _require_known(request.cameras)
    audited = [_audit_folder(kind, folder, request, console) for kind, folder in _targets(request.path)]
    result = _summary(audited, quarantine=request.quarantine)
    findings = [finding for found in audited for finding in found.findings]
    if findings:
        console.table(
            "what the audit found", ("code", "severity", "findings", "units", "examples"), table_rows(findings)
        )
    counts = "{audited} audited, {refused} refused, {quarantined} in quarantine, {warned} with warnings".format(
        **result
    )
    tell = console.warn if result["refused"] else console.say  # an exit code of 3 is never silent
    tell(f"{request.path}: {counts}")
    return {"path": str(request.path), "deep": request.deep, **result, "findings": [f.as_json() for f in findings]}


def _require_known(cameras: tuple[str, ...] | None) -> None:
    known = (*physical_ai_av.CAMERAS, *openpilot.CAMERAS, *comma2k19.CAMERAS)
    if unknown := [camera for camera in cameras or () if camera not in known]:
        raise UsageError(f"unknown camera {unknown[0]!r}; {nearest(unknown[0], known)}")


def _targets(path: Path) -> list[tuple[str, Path]]:
    """Return (kind, folder) of all that can be audited: a source's name, `shards` or `artefacts`."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file; audit a folder of raw data, shards, runs or exports")
    if not path.is_dir():
        raise UsageError(f"no folder {path} to audit; {_FETCH}")
    inside = [path / name for name in _DATA_FOLDERS if (path / name).is_dir()] or [path]
    if inside == [path] and not _holds_others(path):
        targets = [(_kind(path), path)]
    else:
        children = [child for folder in inside for child in sorted(folder.iterdir()) if child.is_dir()]
        targets = [(_kind(child) or _named(child), child) for child in children]
    if known := [(kind, folder) for kind, folder in targets if kind]:
        return known
    raise DataError(f"{path}: holds no raw data, shards or runs; {_FETCH}")


def _holds_others(path: Path) -> bool:
    """Say whether a folder holds source folders, shard sets or runs, as DATA/raw, DATA/shards and `runs` do."""
    marks = (*source_names(), "*/recordings", f"*/{RUN_FILE}")
    return any(mark.is_dir() or mark.name == RUN_FILE for pattern in marks for mark in path.glob(pattern))


def _kind(folder: Path) -> str:
    """Tell what a folder holds by what lies in it; empty where it is nothing that omni reads."""
    if (folder / "recordings").is_dir():
        return "shards"
    with suppress(DataError):
        find_root(folder)
        return "synthetic" if folder.name == "synthetic" else "physical_ai_av"
    if any(folder.rglob(comma2k19.POSES_FOLDER)):
        return "comma2k19"
    if any(openpilot.parse_segment_file(path.as_posix()) for path in folder.absolute().rglob("*")):
        return "openpilot"
    receipts = (*folder.glob(f"**/*{RECEIPT_SUFFIX}"), receipt_path(folder), folder / RUN_FILE)
    return "artefacts" if any(path.is_file() for path in receipts) else ""


def _named(folder: Path) -> str:
    """A source's folder that holds nothing readable is a broken download, not a folder to pass over."""
    return folder.name if folder.parent.name == "raw" and folder.name in source_names() else ""


def _audit_folder(kind: str, folder: Path, request: AuditRequest, console: Console) -> Audited:
    recordings: Sequence[str] = ()
    found: list[Finding] = []
    try:
        if kind == "shards":
            found += shard_findings(folder)
        elif kind != "artefacts":
            units, of_indices = _units(kind, folder, request.cameras)
            recordings = tuple(recording for unit in units for recording in unit.recordings)
            found += [*of_indices, *_check_all(units, len(recordings), folder, request.deep, console)]
            found += _mended(folder, recordings, found)
    except DataError as error:
        found.append(refuse("unusable", str(error)))
    found += [*receipt_findings(folder, deep=request.deep), *unfinished_findings(folder)]
    if request.quarantine and (refused := reasons(found)):
        console.say(f"set aside {len(refused)} recordings: {write_quarantine(folder, refused)}")
    return Audited(folder, tuple(recordings), tuple(replace(finding, place=str(folder)) for finding in found))


def _units(kind: str, folder: Path, cameras: tuple[str, ...] | None) -> tuple[list[Unit], Sequence[Finding]]:
    if kind == "openpilot":
        openpilot_schema.log_schema()  # a missing extra is the user's to mend, not a fault of every segment
        return _route_units(kind, folder, _known_to(openpilot.CAMERAS, cameras)), ()
    if kind == "comma2k19":
        return _route_units(kind, folder, _known_to(comma2k19.CAMERAS, cameras)), ()
    repository = read_repository(find_root(folder), _known_to(physical_ai_av.CAMERAS, cameras))
    if not repository.chunks:
        raise DataError(f"{folder}: has an index, and no chunk of its clips; {_FETCH}")
    return [Unit(kind, folder, chunk.clips, None, chunk) for chunk in repository.chunks], repository.findings


def _route_units(kind: str, folder: Path, cameras: tuple[str, ...] | None) -> list[Unit]:
    routes: dict[str, list[str]] = {}
    for ref in open_source(kind, folder).recordings():
        routes.setdefault(ref.bundle, []).append(ref.id)
    return [Unit(kind, folder, tuple(segments), cameras) for segments in routes.values()]


def _known_to(names: Iterable[str], cameras: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the asked cameras that a source has; None where it has none of them: then all of its own are audited."""
    return tuple(camera for camera in cameras or () if camera in set(names)) or None


def _check_all(units: Sequence[Unit], total: int, folder: Path, deep: bool, console: Console) -> list[Finding]:
    workers = min(len(units), len(os.sched_getaffinity(0)), total // _RECORDINGS_A_WORKER)
    found: set[Finding] = set()  # what concerns a whole zip is found by each unit that opens it
    with console.progress(f"audit {folder.name}", total, "recordings") as step:
        for unit, findings in _checked(units, partial(check_unit, deep=deep), workers):
            found.update(findings)
            step.advance(len(unit.recordings))
    return sorted(found, key=lambda finding: (finding.recording, finding.camera, finding.code, finding.detail))


def _checked(
    units: Sequence[Unit], check: Callable[[Unit], list[Finding]], workers: int
) -> Iterator[tuple[Unit, list[Finding]]]:
    """Check units; one that killed its worker is checked again by recordings, so that a bad file bars only its own."""
    again: list[Unit] = []
    for outcome in run_pool(check, units, workers=workers, attempts=1, timeout_s=_TIMEOUT_S):
        unit = outcome.item
        if outcome.result is not None:
            yield unit, outcome.result
        elif len(unit.recordings) > 1:
            again += unit.by_recording()
        else:
            lost = refuse("audit-failed", f"the check did not end: {outcome.error}")
            yield unit, [lost.about(unit.recordings[0])]
    if again:
        yield from _checked(again, check, workers)


def _mended(folder: Path, recordings: Sequence[str], found: Sequence[Finding]) -> list[Finding]:
    healthy = (read_quarantine(folder).keys() & set(recordings)) - reasons(found).keys()
    detail = "in quarantine, but nothing that refuses it is found now; delete its line from quarantine.json to use it"
    return [warn("mended", detail).about(recording) for recording in sorted(healthy)]


def _summary(audited: Sequence[Audited], *, quarantine: bool) -> dict[str, Any]:
    refused: set[tuple[str, str]] = set()
    warned: set[tuple[str, str]] = set()
    aside = {(str(found.folder), recording) for found in audited for recording in read_quarantine(found.folder)}
    for finding in (finding for found in audited for finding in found.findings):
        (refused if finding.severity == "refuse" else warned).add(finding.unit)
    lists = [str(found.folder / "quarantine.json") for found in audited if quarantine and reasons(found.findings)]
    return {
        "audited": sum(max(len(found.recordings), 1) for found in audited),
        "refused": len(refused - aside),
        "quarantined": len(aside),
        "warned": len(warned - refused - aside),
        "quarantine_files": lists,
    }
