"""Readers of the outside worlds, behind one protocol. Found by name, imported only when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Protocol, cast

from omni_cli.config import nearest
from omni_cli.errors import DataError, UsageError
from omni_cli.scene.recording import Recording


@dataclass(frozen=True)
class RecordingRef:
    """A recording that a source holds, before it is opened."""

    id: str
    group: str  # drive, place or chunk: recordings of one group stay in one split where the source knows drives
    bundle: str  # files that are opened together (a chunk): units are worked on in this order
    declared_split: str = ""  # the source's own split, kept as provenance


class PartRefused(DataError):
    """A part of a recording is refused; once it is in quarantine, the others are recordings without it."""

    def __init__(self, message: str, part_id: str) -> None:
        super().__init__(message)
        self.part_id = part_id  # what a quarantine list names


class Source(Protocol):
    """What the stages ask of a reader."""

    known_cameras: ClassVar[tuple[str, ...]]  # that a recording of this source can have

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every recording, sorted by bundle and id; reads indices only.

        Raises:
            DataError: the folder is not this source's layout.
        """

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one recording with the cameras asked for (None: every camera that is there).

        Raises:
            DataError: a member is missing, truncated or wrong; the message names it and what to do.
        """


_SOURCES: Mapping[str, str] = {
    "physical_ai_av": "omni_cli.sources.physical_ai_av:PhysicalAiAv",
    "synthetic": "omni_cli.sources.physical_ai_av:PhysicalAiAv",  # the synthetic world writes the same layout
    "openpilot": "omni_cli.sources.openpilot_logs:OpenpilotLogs",
    "comma2k19": "omni_cli.sources.comma2k19:Comma2k19",
    "dgp": "omni_cli.sources.dgp:Dgp",
}


def source_names() -> tuple[str, ...]:
    """Return the names a user can type."""
    return tuple(_SOURCES)


def open_source(name: str, folder: Path) -> Source:
    """Return the reader of `folder`; each reader is a class whose only argument is the folder.

    Raises:
        UsageError: there is no source of that name.
    """
    if name not in _SOURCES:
        raise UsageError(f"unknown source {name!r}; {nearest(name, _SOURCES)}")
    module, _, attribute = _SOURCES[name].partition(":")
    return cast(Source, getattr(import_module(module), attribute)(folder))
