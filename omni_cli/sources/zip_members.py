"""Members of a chunk zip by byte range, without trusting the zip: names, sizes and offsets are checked first."""

import struct
import zipfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from omni_cli.errors import DataError
from omni_cli.scene.recording import VideoLocation

MAX_MEMBERS = 10_000
MAX_MEMBER_BYTES = 2 << 30
# What zipfile raises of a damaged directory; NotImplementedError of a flipped bit in "version needed to extract".
NO_ZIP = (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class ZipDirectory:
    """What one zip file says of its members."""

    path: Path
    entries: Mapping[str, zipfile.ZipInfo]

    def locate(self, name: str) -> VideoLocation:
        """Return where a member's bytes are, and the CRC-32 that they must have.

        Raises:
            DataError: there is no such member, another's header stands in its place, or the file ends before its end.
        """
        if name not in self.entries:
            raise DataError(f"{self.path}: has no member {name}; fetch this clip or its chunk, or quarantine the clip")
        entry = self.entries[name]
        with self.path.open("rb") as stream:
            stream.seek(entry.header_offset)
            header = stream.read(_LOCAL_HEADER.size)
            named = stream.read(len(name.encode()))
        start = entry.header_offset + _LOCAL_HEADER.size
        if len(header) == _LOCAL_HEADER.size:
            signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start += name_bytes + extra_bytes
            is_it = signature == _LOCAL_SIGNATURE and name_bytes == len(named) and named == name.encode()
            if is_it and start + entry.file_size <= self.path.stat().st_size:
                return VideoLocation(self.path, start, entry.file_size, crc32=entry.CRC)
        raise DataError(f"{self.path}: member {name} is not where the directory says; fetch this chunk again")

    def read(self, name: str) -> bytes:
        """Return a member's content.

        Raises:
            DataError: as of `locate`, or its bytes are not those of its CRC-32.
        """
        return self.locate(name).read()


def read_directory(path: Path) -> ZipDirectory:
    """Read and check the directory of a zip whose members are all stored.

    Raises:
        DataError: the file is missing or not a whole zip, or a member is compressed, too large, named twice, or has a
            name that could leave its folder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except FileNotFoundError:
        raise DataError(f"{path}: no such chunk file; fetch it with omni fetch") from None
    except (*NO_ZIP, OSError) as error:
        raise DataError(f"{path}: not a whole zip file ({error}); fetch this chunk again") from None
    check_entries(entries, str(path))
    return ZipDirectory(path, {entry.filename: entry for entry in entries})


def check_entries(entries: Sequence[zipfile.ZipInfo], name: str) -> None:
    """Refuse a directory that no chunk has.

    Raises:
        DataError: it lists too many members, or one that is compressed, too large, named twice, or named so that it
            could leave its folder.
    """
    if len(entries) > MAX_MEMBERS:
        raise DataError(f"{name}: {len(entries)} members, a chunk has at most {MAX_MEMBERS}; not a chunk of this set")
    known: set[str] = set()
    for entry in entries:
        if problem := _problem(entry, known):
            raise DataError(f"{name}: member {entry.filename!r} {problem}; do not use this file, fetch the chunk again")
        known.add(entry.filename)


def _problem(entry: zipfile.ZipInfo, known: Set[str]) -> str:
    """Return what is wrong with a directory entry, or nothing."""
    name = entry.orig_filename
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(character in name for character in "\\:\0"):
        return "has a name that leaves its folder"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        return "is compressed or encrypted, expected stored bytes"
    if entry.file_size > MAX_MEMBER_BYTES:
        return f"states {entry.file_size} bytes, more than {MAX_MEMBER_BYTES}"
    if entry.header_offset < 0:
        return "begins before the file does"
    return "is there twice" if entry.filename in known else ""
