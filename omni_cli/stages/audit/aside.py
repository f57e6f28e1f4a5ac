"""What `--quarantine` does: damaged files are moved aside, recordings are listed; nothing is deleted.

Moved are whole files that a fetch brings anew (chunk zips, their tables) and folders that etl makes anew (one recording
of a shard set). A clip inside a healthy zip is listed: its bytes cannot be moved without rewriting the zip. Of routes,
whose files belong to one segment each, runs and exports nothing is moved: their own commands make them anew.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from omni_cli import files
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.sources.quarantine import move_to_quarantine, read_quarantine, write_quarantine
from omni_cli.stages.audit.targets import SHARDS
from omni_cli.stages.checks.findings import Finding, reasons
from omni_cli.stages.checks.units import Unit

_CHUNKED = ("physical_ai_av", "synthetic")
_OF_CHUNKS = (".zip", ".parquet")


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
        OmniError: another omni works on the folder.
    """
    damaged = _damaged(kind, folder, findings)
    known = read_quarantine(folder)
    told = reasons([finding for finding in findings if _unit(kind, finding) not in damaged])
    barred = {recording: why for recording, why in told.items() if recording not in known}
    if not damaged and not barred:
        return [], 0
    with files.exclusive(folder, "working on"):
        for name, about in damaged.items():
            clips = {finding.recording for finding in about if finding.recording} | _recordings_in(folder / name, units)
            move_to_quarantine(folder, name, f"{about[0].code}: {about[0].detail}", clips)
        if barred:
            write_quarantine(folder, barred)
    return sorted(damaged), len(barred)


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
