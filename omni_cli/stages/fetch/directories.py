"""Directories of chunk zips on the hub: read once by ranges, then kept beside the data under the zip's own hash."""

from dataclasses import astuple
from pathlib import Path

from omni_cli import files
from omni_cli.downloads import RemoteFile
from omni_cli.errors import DataError
from omni_cli.sources.zip_ranges import ReadRange, RemoteMember, remote_members

FOLDER = ".directories"
_READINGS = 4  # at most; no hash vouches for a range, so what counts is what was read twice

Members = tuple[RemoteMember, ...]


def kept_directory(folder: Path, file: RemoteFile) -> Members | None:
    """Return the directory that an earlier call kept, or None."""
    path = _path(folder, file)
    if files.verified_receipt(path) is None:
        return None
    return tuple(RemoteMember(*row) for row in files.read_json(path)["members"])


def read_directory(file: RemoteFile, read_range: ReadRange) -> Members:
    """Read a zip's directory from the hub until two readings in turn agree.

    Raises:
        DataError: it is not a zip that a chunk may be, however often it is read.
        OmniError: what `read_range` raises.
    """
    read: list[Members | DataError] = []
    while len(read) < 2 or (read[-1] != read[-2] and len(read) < _READINGS):
        try:
            read.append(remote_members(file.path, file.size, read_range))
        except DataError as error:
            read.append(error)
    if isinstance(last := read[-1], DataError):
        raise last
    if last != read[-2]:
        raise DataError(f"{file.path}: its directory reads otherwise each time; run again, or fetch its whole chunk")
    return last


def keep_directory(folder: Path, file: RemoteFile, members: Members) -> None:
    """Keep a directory for later calls; the name is the hash of the zip that it describes."""
    path = _path(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(path.parent)
    files.commit_json(path, {"path": file.path, "members": [list(astuple(member)) for member in members]})


def _path(folder: Path, file: RemoteFile) -> Path:
    return folder / FOLDER / f"{file.sha256}.json"
