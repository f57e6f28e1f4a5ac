"""Import of openpilot routes, in any layout that devices, uploads and downloads leave (formats/openpilot.py).

All become `<dongle>/<log>--<n>/FILE`, with `unknown` for a dongle that no name tells.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omni_cli.errors import DataError, UsageError
from omni_cli.files import sha256_of
from omni_cli.formats.openpilot import parse_segment_file
from omni_cli.report import Console, counted
from omni_cli.stages.fetch.imports import copy_all, describe
from omni_cli.stages.fetch.request import FetchRequest

UNKNOWN_DONGLE = "unknown"
_EXPECTED = "segments like <dongle>|<log>--0/ or <log>--0/ with qcamera.ts, fcamera.hevc, ecamera.hevc, qlog*, rlog*"


def import_openpilot(request: FetchRequest, origin: Path, console: Console) -> dict[str, Any]:
    """Copy the cameras and logs of every segment under a folder, verified; raises as `import_segments`."""
    return import_segments(request, origin, console, place_of=segment_place, expected=_EXPECTED)


def import_segments(
    request: FetchRequest,
    origin: Path,
    console: Console,
    *,
    place_of: Callable[[Path], Path | None],
    expected: str,
    depth: int = 2,
) -> dict[str, Any]:
    """Copy the files of every segment under a folder, verified.

    Args:
        request: where to, and whether it is a dry run.
        origin: the folder.
        console: shows the progress.
        place_of: a file's place under the source's folder, its segment in the first parts; None for any other.
        expected: what a folder with segments looks like, for the error.
        depth: how many parts of a place name its segment.

    Raises:
        UsageError: a part of it is asked for.
        DataError: no segment is there, or two different files claim one place.
        OmniError: too little disk space, or a copy that differs.
    """
    _check_whole(request)
    links: list[Path] = []
    pairs: dict[Path, Path] = {}
    for source in _walk(origin, links):
        if place := place_of(source):
            _claim(pairs, request.folder / place, source)
    if links:
        console.warn(f"{len(links)} links that lead out of {origin} or to folders are not followed: {links[0]}")
    if not pairs:
        raise DataError(f"{origin}: found {describe(origin)}; expected {expected}")
    segments = sorted({"/".join(path.relative_to(request.folder).parts[:depth]) for path in pairs})
    console.say(f"{counted(len(segments), 'segment')}, {counted(len(pairs), 'file')} in {origin}")
    with request.held():
        result = copy_all(request, pairs, console)
    return {**result, "segments": segments, "links_not_followed": len(links)}


def _check_whole(request: FetchRequest) -> None:
    """Refuse to choose a part of what is imported whole."""
    asked = {"--chunks": request.chunks, "--clips": request.clips, "--cameras": request.cameras}
    if given := [option for option, value in asked.items() if value]:
        raise UsageError(
            f"{given[0]}: {request.source} segments are imported whole, with every camera; leave it out, and name a "
            "folder that holds less with --from; etl --cameras chooses what is looked at"
        )


def segment_place(path: Path) -> Path | None:
    """Return `<dongle>/<log>--<n>/FILE` for a file of a segment, told by its whole path; None for any other file."""
    parsed = parse_segment_file(path.absolute().as_posix())
    if parsed is None:
        return None
    segment, name = parsed
    return Path(segment.dongle or UNKNOWN_DONGLE, f"{segment.log_id}--{segment.number}", name)


def _walk(origin: Path, links: list[Path]) -> Iterator[Path]:
    """Yield the files under a folder, sorted; links to folders, or to files elsewhere, are listed and left."""
    inside = origin.resolve()
    for folder, folders, names in os.walk(origin):
        folders.sort()
        links += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                links.append(path)
            elif path.is_file():
                yield path


def _claim(pairs: dict[Path, Path], place: Path, source: Path) -> None:
    """Give a place its source; the same content twice is one file.

    Raises:
        DataError: another file with other content claims the place.
    """
    first = pairs.setdefault(place, source)
    if first != source and sha256_of(first) != sha256_of(source):
        raise DataError(f"{first} and {source} are both {place.name} of {place.parent.name} and differ; keep one")
