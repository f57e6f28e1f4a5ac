"""What `--quarantine` does: damaged files are moved aside, recordings are listed; nothing is deleted. And its undoing.

Moved are whole files that a fetch brings anew (chunk zips, their tables) and folders that etl makes anew (one recording
of a shard set). A clip inside a healthy zip is listed: its bytes cannot be moved without rewriting the zip. Of routes,
whose files belong to one segment each, runs and exports nothing is moved: their own commands make them anew.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.report import Console
from omni_cli.sources.quarantine import (
    QUARANTINE_FILE,
    Restored,
    move_to_quarantine,
    read_quarantine,
    restore,
    write_quarantine,
)
from omni_cli.stages.audit.targets import SHARDS
from omni_cli.stages.checks.findings import Finding, reasons
from omni_cli.stages.checks.units import Unit
from omni_cli.stages.raw_lock import alone

_CHUNKED = ("physical_ai_av", "synthetic")
_OF_CHUNKS = (".zip", ".parquet")
_LISTS = tuple(f"{folder}{QUARANTINE_FILE}" for folder in ("", "*/", "raw/*/", "shards/*/"))


def set_aside(
    kind: str, folder: Path, findings: Sequence[Finding], units: Sequence[Unit] = ()
) -> tuple[list[str], int]:
    """Move what is damaged, and list the recordings that are refused for another reason.

    A recording that is set aside already needs no line: one whose chunk was moved is free again once that is back.

    Args:
        kind: of the folder.
        folder: that was audited.
        findings: about it.
        units: what was audited of it; they tell which recordings are in a chunk's file.

    Returns:
        What was moved, relative to the folder, and how many recordings were listed.

    Raises:
        OmniError: another omni works on the folder, or reads what is to be moved.
    """
    damaged = _damaged(kind, folder, findings)
    known = read_quarantine(folder)
    told = reasons([finding for finding in findings if _unit(kind, finding) not in damaged])
    barred = {recording: why for recording, why in told.items() if recording not in known}
    if not damaged and not barred:
        return [], 0
    with alone(folder) if damaged else nullcontext(), files.exclusive(folder, "working on"):
        for name, about in damaged.items():
            clips = {finding.recording for finding in about if finding.recording} | _recordings_in(folder / name, units)
            move_to_quarantine(folder, name, f"{about[0].code}: {about[0].detail}", clips)
        if barred:
            write_quarantine(folder, barred)
    return sorted(damaged), len(barred)


def restore_all(path: Path, console: Console, *, is_choosy: bool = False) -> dict[str, Any]:
    """Undo `--quarantine` in a folder and in all that lie in it; run again, it finishes or finds nothing to do.

    Args:
        path: DATA, a source folder or a shard folder.
        console: names what is put back, and what is not.
        is_choosy: a part, or an audit, was asked for too.

    Returns:
        By folder what was `restored`, which recordings were `released`, and what was `kept` aside, and why.

    Raises:
        UsageError: there is no such folder, or more was asked for.
        DataError: a list is not one that omni wrote.
        OmniError: another omni works on a folder.
    """
    if is_choosy:
        raise UsageError("--restore audits nothing: leave out --cameras, --deep, --subset, --quarantine and --report")
    if not path.is_dir():
        raise UsageError(f"no folder {path}; give the one that was audited")
    undone: dict[str, Restored] = {}
    for folder in sorted({listed.parent for pattern in _LISTS for listed in path.glob(pattern)}):
        with files.exclusive(folder, "working on"):
            undone[str(folder)] = restore(folder)
        _tell(folder, undone[str(folder)], console)
    count = sum(len(one.put_back) + len(one.released) for one in undone.values())
    console.say(f"{path}: {count} files and recordings are back" if count else f"{path}: nothing to put back")
    return {
        "path": str(path),
        "restored": {folder: one.put_back for folder, one in undone.items()},
        "released": {folder: one.released for folder, one in undone.items()},
        "kept": {folder: one.kept for folder, one in undone.items()},
    }


def _tell(folder: Path, undone: Restored, console: Console) -> None:
    for name in undone.put_back:
        console.say(f"put back {folder / name}")
    for recording in undone.released:
        console.say(f"recording {recording} of {folder} is used again")
    for name, why in undone.kept.items():
        console.warn(f"{folder / name}: {why}")


def _recordings_in(path: Path, units: Sequence[Unit]) -> set[str]:
    chunks = [unit.chunk for unit in units if unit.chunk is not None]
    found = [chunk.expected(name) for chunk in chunks for name in FEATURES if chunk.path(name) == path]
    return {clip for clips in found for clip in clips}


def _damaged(kind: str, folder: Path, findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if (name := _unit(kind, finding)) and (folder / name).exists():
            found[name].append(finding)
    return dict(sorted(found.items()))


def _unit(kind: str, finding: Finding) -> str:
    """Return what is moved for a finding, relative to the folder: a chunk file, a recording's folder, or nothing."""
    path = PurePosixPath(finding.file)
    if finding.severity != "refuse" or not finding.file or ".." in path.parts:
        return ""
    if kind in _CHUNKED:
        return finding.file if path.suffix in _OF_CHUNKS else ""
    if kind == SHARDS and path.parts[0] == "recordings" and len(path.parts) > 1:
        return "/".join(path.parts[:2])
    return finding.file if kind == SHARDS and path.parts[0] == "tokens" else ""
