"""Some clips of a chunk: a zip at the chunk's own place that holds their members alone, and a receipt that says so.

NVIDIA's devkit and omni read it as they read a whole chunk. Its bytes depend on its members only. Every member was
compared with the CRC-32 in the directory of the promised file; the receipt names that file's hash, the clips, and the
hash of what lies here. More clips later unite with these, the whole chunk later replaces them.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.downloads import Meter, RemoteFile, TransferError
from omni_cli.errors import DataError
from omni_cli.formats.fetched import partial_clips
from omni_cli.sources.zip_ranges import (
    ReadRange,
    RemoteMember,
    Span,
    WrongBytesError,
    is_whole,
    read_member,
    remote_members,
    spans_of,
)
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.directories import Members, keep_directory, read_directory

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ATTEMPTS = 3


@dataclass(frozen=True)
class FarZip:
    """A zip on the hub: its bytes from `start` on."""

    read: ReadRange  # start, size -> the bytes
    append: Callable[[int, int, Path], None]  # start, size, path -> the file there holds them, after what it had


@dataclass(frozen=True)
class _Held:
    """A member, and which byte of which file its zip's byte `start` is."""

    member: RemoteMember
    path: Path
    start: int


@dataclass(frozen=True)
class Piece:
    """One file of the plan: the whole of it, or those of its members that belong to some clips."""

    file: RemoteFile
    is_there: bool = False
    clips: tuple[str, ...] = ()  # none: the whole file
    directory: Members = ()  # all members of the zip, where only some clips are wanted
    missing: Members = ()  # of them, those that must come

    @property
    def transfer_bytes(self) -> int:
        """Bytes that must come."""
        if self.is_there:
            return 0
        return sum(span.size for span in spans_of(self.missing)) if self.clips else self.file.size


def whole_facts(file: RemoteFile) -> dict[str, Any]:
    """Return what the receipt of a part says of the file that it is a part of."""
    return {"size": file.size, "sha256": file.sha256}


def is_landed(path: Path, file: RemoteFile, *, renew: bool = False) -> bool:
    """Return whether a receipt vouches for a part of this very file; `renew` as in landing.is_landed."""
    return landing.is_landed(path, renew=renew, partial=True, whole=whole_facts(file))


def has_clips(path: Path, file: RemoteFile, clips: Sequence[str], *, renew: bool = False) -> bool:
    """Return whether a receipt vouches for a part of this very file that holds these clips."""
    held = partial_clips(files.read_receipt(path))
    return held is not None and held.issuperset(clips) and is_landed(path, file, renew=renew)


def lacking_here(path: Path, file: RemoteFile, directory: Members, clips: Sequence[str]) -> Members:
    """Return the members that must come so that the part here holds these clips beside those that it promises.

    What a valid receipt vouches for is taken as there; any other file is read and compared.
    """
    promised = partial_clips(files.read_receipt(path)) or frozenset()
    asked = [member for member in directory if member.clip in promised.union(clips)]
    if is_landed(path, file):
        return tuple(member for member in asked if member.clip not in promised)
    held = _held(path, directory)
    return tuple(member for member in asked if member.name not in held)


def fetch_clips(far: FarZip, piece: Piece, path: Path, staging: Path, meter: Meter) -> None:
    """Bring the members of clips to the zip at `path`, beside those of the same file that are there already.

    Args:
        far: the zip on the hub.
        piece: the zip, its directory and the clips.
        path: where to.
        staging: in the source folder; keeps what has come so far, and a later call continues it.
        meter: counts.

    Raises:
        TransferError: a member stays wrong.
        OmniError: what `far` raises.
    """
    staging.mkdir(parents=True, exist_ok=True)
    try:
        _bring(far, piece, path, staging, meter)
    except WrongBytesError:  # or is it the directory that is wrong? no hash vouched for it either
        again = read_directory(piece.file, far.read)
        keep_directory(staging.parent, piece.file, again)
        try:
            _bring(far, replace(piece, directory=again), path, staging, meter)
        except WrongBytesError as error:
            raise TransferError(f"{piece.file.path}: {error}, again and again; fetch its whole chunk") from None


def _bring(far: FarZip, piece: Piece, path: Path, staging: Path, meter: Meter) -> None:
    file, held = piece.file, _held(path, piece.directory)
    asked = (partial_clips(files.read_receipt(path)) or frozenset()).union(piece.clips)
    spans = spans_of([member for member in piece.directory if member.clip in asked and member.name not in held])
    if not spans and is_landed(path, file):  # another process brought them meanwhile
        return meter.add(piece.transfer_bytes)
    parts = {span: staging / f"{file.sha256}-{span.start}-{span.end}.part" for span in spans}
    for span, part in parts.items():
        _fetch_span(far, span, part, meter)
        held |= {member.name: _Held(member, part, span.start) for member in span.members}
    staged = staging / f"{file.sha256}.zip"
    _write_zip(staged, [held[name] for name in sorted(held)])
    held_clips = sorted({found.member.clip for found in held.values()})
    _land(staged, path, partial=True, clips=held_clips, whole=whole_facts(file), git_sha1=file.git_sha1,
          fetched=landing.today())  # fmt: skip
    for part in parts.values():
        part.unlink()
    return None


def _held(path: Path, directory: Members) -> dict[str, _Held]:
    """Return the members of a directory that a zip here holds with the same content; none where it is no zip."""
    promised = {member.name: member for member in directory}
    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        try:
            here = remote_members(path.name, path.stat().st_size, lambda at, size: os.pread(stream.fileno(), size, at))
        except DataError:
            return {}
        same = [member for member in here if _is_same(member, promised.get(member.name))]
        return {member.name: _Held(member, path, 0) for member in same if is_whole(stream, 0, member)}


def _is_same(here: RemoteMember, promised: RemoteMember | None) -> bool:
    return promised is not None and (here.size, here.crc32) == (promised.size, promised.crc32)


def _fetch_span(far: FarZip, span: Span, part: Path, meter: Meter) -> None:
    """Fetch neighbouring members; what an earlier call left of them is continued, and all are compared.

    Raises:
        WrongBytesError: one stays wrong.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        _complete(far, span, part, meter)
        try:
            return _check(part, span)
        except WrongBytesError:
            meter.add(-span.size)
            part.unlink()
            if attempt == _ATTEMPTS:
                raise
    return None


def _complete(far: FarZip, span: Span, part: Path, meter: Meter) -> None:
    here = part.stat().st_size if part.is_file() else 0
    if here > span.size:
        part.unlink()
        here = 0
    meter.add(here)
    far.append(span.start, span.size, part)


def _check(part: Path, span: Span) -> None:
    with part.open("rb") as stream:
        for member in span.members:
            for _ in read_member(stream, span.start, member):
                pass


def _write_zip(path: Path, members: Sequence[_Held]) -> None:
    with files.atomic_write(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for held in members:
            info = zipfile.ZipInfo(held.member.name, _ZIP_TIME)
            info.file_size = held.member.size
            with held.path.open("rb") as stream, archive.open(info, "w") as entry:
                for block in read_member(stream, held.start, held.member):
                    entry.write(block)


def _land(staged: Path, path: Path, **facts: Any) -> None:
    """Move a zip and its receipt into place so that at no instant a receipt says more than the zip holds.

    A part that replaces a smaller part comes before its receipt; where no part is yet, the receipt comes first: it is
    worth nothing without the file, and a file without it would be taken for a whole chunk.
    """
    landing.vouch(staged, **facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    receipts = (files.receipt_path(staged), files.receipt_path(path))
    grows = partial_clips(files.read_receipt(path)) is not None and path.is_file()
    with landing.replacing(path, staged.parent):
        for source, target in ((staged, path), receipts) if grows else (receipts, (staged, path)):
            source.rename(target)
            files.sync_folder(path.parent)
