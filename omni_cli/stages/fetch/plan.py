"""What a fetch must transfer: every file asked for, there already, to come whole, or to come by clips."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_cli.downloads import FileAbsentError, Hub, Meter, RemoteFile, TransferError, unsafe_path_reason
from omni_cli.errors import DataError, UsageError
from omni_cli.report import Console
from omni_cli.sources.zip_ranges import TAIL_BYTES
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.directories import Members, keep_directory, kept_directory, read_directory
from omni_cli.stages.fetch.partial import Piece, has_clips, is_landed, lacking_here
from omni_cli.stages.fetch.record import PRUNED, UNLISTED, Record
from omni_cli.stages.fetch.request import FetchRequest

_GIGABYTE = 1e9
_WORTH_A_PART = 0.8  # of a file's bytes: from there on the whole comes, which its own hash proves


@dataclass
class Job:
    """One fetch on one pinned commit, and what is known of it so far."""

    hub: Hub
    commit: str
    request: FetchRequest
    console: Console
    record: Record
    pieces: list[Piece] = field(default_factory=list)  # what is asked for and exists
    absent: dict[str, str] = field(default_factory=dict)  # what is asked for and does not exist -> why
    skipped: dict[str, str] = field(default_factory=dict)  # paths that the hub should not have -> why
    failures: list[str] = field(default_factory=list)
    lacking: dict[str, tuple[str, ...]] = field(default_factory=dict)  # zip -> clips asked for that it does not hold
    read_bytes: int = 0  # of directories

    @property
    def folder(self) -> Path:
        """Where the data lie."""
        return self.request.folder

    @property
    def missing(self) -> list[Piece]:
        """What must come."""
        return [piece for piece in self.pieces if not piece.is_there]

    @property
    def transfer_bytes(self) -> int:
        """Bytes of what must come, and of what was read to know it."""
        return self.read_bytes + sum(piece.transfer_bytes for piece in self.pieces)

    def facts(self, file: RemoteFile) -> dict[str, Any]:
        """Return what a receipt of a whole file must say."""
        promised = {"git_sha1": file.git_sha1, **({"sha256": file.sha256} if file.sha256 else {})}
        return {**promised, "size": file.size}

    def has_size(self, file: RemoteFile) -> bool:
        """Return whether what lies in a file's place is as long as it."""
        path = self.folder / file.path
        return path.is_file() and path.stat().st_size == file.size

    def is_done(self, file: RemoteFile) -> bool:
        """Return whether a file is there and verified; one that came another way is hashed and adopted."""
        path = self.folder / file.path
        if landing.is_landed(path, renew=not self.request.dry_run, **self.facts(file)):
            return True
        if self.request.dry_run or not path.is_file() or not file.is_content_of(path):
            return False
        landing.vouch(path, sha256=file.sha256, git_sha1=file.git_sha1, fetched=landing.today())
        return True


def list_files(job: Job, paths: Sequence[str]) -> dict[str, RemoteFile]:
    """Return those of the named files that exist, by path; the hub is asked only for what no earlier call noted.

    A commit does not change. What was listed and yet missing is asked for again where `--revision` is given.
    """
    known = {path: file for path in paths if (file := job.record.known_file(path)) is not None}
    absent = job.record.absent | job.record.unlisted
    noted = {path: absent[path] for path in paths if path in absent}
    if job.request.revision is not None:
        noted = {path: reason for path, reason in noted.items() if reason != PRUNED}
    job.absent |= noted
    unknown = [path for path in paths if path not in known and path not in noted]
    found = job.hub.list_files(unknown, job.commit) if unknown else {}
    job.absent |= {path: UNLISTED for path in unknown if path not in found}
    listed = known | found
    job.skipped |= _unsafe_paths(job.folder, listed)
    return {path: file for path, file in listed.items() if path not in job.skipped}


def _unsafe_paths(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """Return those of a repository's paths at which nothing is put, and why.

    Through a link that leads out of the folder a copy would come to lie where no ledger and no purge looks for it.
    """
    unsafe = {path: reason for path in paths if (reason := unsafe_path_reason(path)) is not None}
    parents = {path: (folder / path).parent for path in paths if path not in unsafe}
    inside = folder.resolve()
    out = {parent for parent in set(parents.values()) if not parent.resolve().is_relative_to(inside)}
    return unsafe | {path: f"{at} leads out of {folder}: a link" for path, at in parents.items() if at in out}


def plan_files(job: Job, remote: Iterable[RemoteFile], clips: Mapping[str, tuple[str, ...]]) -> None:
    """Enter files into the plan.

    Args:
        job: what the plan belongs to.
        remote: the files.
        clips: path -> the clips that are wanted of it, for zips that are not wanted whole.
    """
    by_clips: list[RemoteFile] = []
    remote = tuple(remote)
    done = _done(job, remote)
    for file in remote:
        if file in done:
            job.pieces.append(Piece(file, is_there=True))
        elif file.path not in clips or file.size <= TAIL_BYTES or file.sha256 is None:
            job.pieces.append(Piece(file))
        elif has_clips(job.folder / file.path, file, clips[file.path], renew=not job.request.dry_run):
            job.pieces.append(Piece(file, True, clips[file.path]))
        else:
            by_clips.append(file)
    for file, directory in _directories(job, by_clips).items():
        job.pieces.append(_piece(job, file, directory, clips[file.path]))


def check_size(needed_bytes: int, max_gb: float) -> None:
    """Refuse more than the user allows.

    Raises:
        UsageError: the plan is larger.
    """
    if math.isfinite(max_gb) and needed_bytes > round(max_gb * _GIGABYTE):
        raise UsageError(
            f"the plan is {needed_bytes / _GIGABYTE:,.3f} GB and --max-gb allows {max_gb:g}; ask for fewer chunks, "
            f"clips or cameras, or give --max-gb {needed_bytes // int(_GIGABYTE) + 1}"
        )


def _done(job: Job, remote: Sequence[RemoteFile]) -> set[RemoteFile]:
    """Return the files that are there whole; those whose size and time do not prove it are read."""
    done = {file for file in remote if landing.is_unchanged(job.folder / file.path, **job.facts(file))}
    unsure = [file for file in remote if file not in done and job.has_size(file)]
    with (
        job.console.progress("check what is there", len(unsure), "files") as step,
        ThreadPoolExecutor(job.request.workers) as pool,
    ):
        for file, is_done in zip(unsure, pool.map(job.is_done, unsure), strict=True):
            step.advance()
            if is_done:
                done.add(file)
    return done


def _piece(job: Job, file: RemoteFile, directory: Members, clips: tuple[str, ...]) -> Piece:
    in_zip = {member.clip for member in directory}
    if unlisted := tuple(clip for clip in clips if clip not in in_zip):
        job.lacking[file.path] = unlisted
    path = job.folder / file.path
    missing = lacking_here(path, file, directory, clips)
    is_there = not missing and (is_landed(path, file) or not path.is_file())  # all there and no receipt: made anew
    piece = Piece(file, is_there, clips, directory, missing)
    return piece if piece.transfer_bytes <= _WORTH_A_PART * file.size else Piece(file)


def _directories(job: Job, remote: Sequence[RemoteFile]) -> dict[RemoteFile, Members]:
    """Return the directories of zips, read from the hub where none is kept; a zip that cannot be read is a failure."""
    found = {file: kept for file in remote if (kept := kept_directory(job.folder, file)) is not None}
    unread = [file for file in remote if file not in found]
    with (
        job.console.progress("directories", len(unread), "zips") as step,
        ThreadPoolExecutor(job.request.workers) as pool,
    ):
        for file, directory, read_bytes in pool.map(lambda file: _read(job, file), unread):
            job.read_bytes += read_bytes
            step.advance()
            if directory is not None:
                found[file] = directory
    return found


def _read(job: Job, file: RemoteFile) -> tuple[RemoteFile, Members | None, int]:
    """Return a zip, its directory, None where it cannot be had, and the bytes that came to know it."""
    lengths: list[int] = []

    def read_range(start: int, size: int) -> bytes:
        content = job.hub.read_range(file, job.commit, start, size, Meter(lambda _: None))
        lengths.append(len(content))
        return content

    directory = None
    try:
        directory = read_directory(file, read_range)
    except FileAbsentError:
        job.absent[file.path] = PRUNED
    except (TransferError, DataError) as error:
        job.failures.append(str(error))
    if directory is not None and not job.request.dry_run:
        keep_directory(job.folder, file, directory)
    return file, directory, sum(lengths)
