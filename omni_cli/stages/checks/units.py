"""The unit of an audit's work: a chunk, or the segments of a route, checked in one worker."""

from dataclasses import dataclass, replace
from pathlib import Path

from omni_cli.sources import open_source
from omni_cli.stages.checks.findings import Finding
from omni_cli.stages.checks.raw import chunk_findings
from omni_cli.stages.checks.recordings import opened, recording_findings
from omni_cli.stages.checks.repository import Chunk


@dataclass(frozen=True)
class Unit:
    """Recordings whose files are opened together. Picklable."""

    source: str
    folder: Path
    recordings: tuple[str, ...]
    cameras: tuple[str, ...] | None  # None: all that are there; a chunk carries its own
    chunk: Chunk | None = None

    def by_recording(self) -> list["Unit"]:
        """Return one unit a recording."""
        return [replace(self, recordings=(recording,)) for recording in self.recordings]


def check_unit(unit: Unit, *, deep: bool) -> list[Finding]:
    """Check the recordings of one unit."""
    source = open_source(unit.source, unit.folder)
    if unit.chunk is not None:
        return list(chunk_findings(unit.chunk, unit.recordings, source, deep=deep))
    found: list[Finding] = []
    for recording_id in unit.recordings:
        recording = opened(source, recording_id, unit.cameras)
        found += [recording] if isinstance(recording, Finding) else recording_findings(recording, deep=deep)
    return found
