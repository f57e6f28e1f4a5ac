"""Runs of segments: what of a route is opened as one recording.

A device cuts its drive at every minute, and nothing happens there. The path driven in ten seconds and the five seconds
of a driving model's memory reach across the cut, so that segments whose numbers follow each other are opened as one.

What a run is can be told by names alone, because a folder of routes may hold thousands of segments, and a run can be
opened with each of the cameras that its first segment has: it ends where the cameras change, or where a log lacks. A
segment in quarantine stands alone, so that it costs its neighbours nothing. Whether times continue can be seen in the
logs only. Where a tail was lost they do not, and that is no reason to refuse the minutes before and after: frames keep
their true times, so that no window or path reaches across a gap, there or elsewhere.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from omni_cli.formats import openpilot
from omni_cli.formats.openpilot import SegmentName

# Of one recording. Its packed model frames are 2 MB a second, and are in memory twice while a shard is written.
MAX_SEGMENTS = 5

SegmentFiles = Mapping[SegmentName, Mapping[str, Path]]  # each segment's files by name


@dataclass(frozen=True)
class SegmentRun:
    """Segments of one route, their numbers one after the other."""

    segments: tuple[SegmentName, ...]

    @property
    def route(self) -> str:
        """Return the name of the drive."""
        return self.segments[0].route

    def __str__(self) -> str:
        """`ROUTE--2` of one segment, `ROUTE--2-5` of several; a file can be called so."""
        first, last = self.segments[0], self.segments[-1]
        return str(first) if first == last else f"{first}-{last.number}"


def segment_runs(files: SegmentFiles, alone: Container[str]) -> tuple[SegmentRun, ...]:
    """Join segments that can be opened together, by route and number.

    Args:
        files: of every segment.
        alone: names of segments that are not to be joined.
    """
    runs: list[list[SegmentName]] = []
    for name in sorted(files):
        if runs and len(runs[-1]) < MAX_SEGMENTS and _goes_on(runs[-1][-1], name, files, alone):
            runs[-1].append(name)
        else:
            runs.append([name])
    return tuple(SegmentRun(tuple(run)) for run in runs)


def log_path(segment_files: Mapping[str, Path]) -> Path | None:
    """Return the log of a segment that says most, or None where it has none."""
    return next((segment_files[file] for file in openpilot.LOG_FILES if file in segment_files), None)


def camera_paths(segment_files: Mapping[str, Path]) -> dict[str, Path]:
    """Return camera -> video of the cameras that a segment has, in the order of `CAMERAS`."""
    return {
        camera.name: segment_files[file]
        for camera in openpilot.CAMERAS.values()
        for file in camera.files
        if file in segment_files
    }


def _goes_on(before: SegmentName, after: SegmentName, files: SegmentFiles, alone: Container[str]) -> bool:
    is_next = (before.route, before.number + 1) == (after.route, after.number)
    is_alone = str(before) in alone or str(after) in alone
    return is_next and not is_alone and _kinds(files[before]) == _kinds(files[after])


def _kinds(segment_files: Mapping[str, Path]) -> tuple[list[str], bool]:
    return list(camera_paths(segment_files)), log_path(segment_files) is None
