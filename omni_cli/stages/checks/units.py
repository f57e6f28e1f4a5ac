"""The unit of an audit's work: a chunk, or the segments of a route, checked in one worker."""

from dataclasses import dataclass, replace
from pathlib import Path

from omni_cli.sources import Source, open_source
from omni_cli.stages.checks.findings import Checked, Finding
from omni_cli.stages.checks.raw import check_chunk
from omni_cli.stages.checks.recordings import check_recording, opened
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


def check_unit(unit: Unit, *, deep: bool) -> Checked:
    """Check the recordings of one unit."""
    source = open_source(unit.source, unit.folder)
    if unit.chunk is not None:
        return check_chunk(unit.chunk, unit.recordings, source, deep=deep)
    checked = [_check_one(source, recording_id, unit, deep=deep) for recording_id in unit.recordings]
    findings = tuple(finding for one in checked for finding in one.findings)
    return Checked(findings, tuple(facts for one in checked for facts in one.facts))


def _check_one(source: Source, recording_id: str, unit: Unit, *, deep: bool) -> Checked:
    recording = opened(source, recording_id, unit.cameras)
    return Checked((recording,)) if isinstance(recording, Finding) else check_recording(recording, deep=deep)
