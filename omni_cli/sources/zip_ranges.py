"""Members of a stored zip that lies far away: its directory by one or two short reads, neighbours by one.

Nothing that such a zip says is believed: its directory may be at most so long, members are stored, named once, inside
the file and apart from each other (zip_members.py), and a member counts only when its own header bears its name and
its content has the CRC-32 that the directory promises. Layout: PKWARE APPNOTE 6.3.10, 4.3.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from omni_cli.errors import DataError
from omni_cli.sources.zip_members import NO_ZIP, check_entries

TAIL_BYTES = (1 << 16) + 22  # the end record and the longest comment after it: what zipfile looks at first
MAX_DIRECTORY_BYTES = 4 << 20  # of a hundred clips it is 40 kB
MAX_GAP_BYTES = 1 << 16  # between two members that one read still covers
_MAX_HEADER_BYTES = 30 + 2 * 0xFFFF  # a local header with the longest name and extra field
_BLOCK_BYTES = 1 << 20
_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field

ReadRange = Callable[[int, int], bytes]  # start, size -> exactly these bytes


class WrongBytesError(Exception):
    """What arrived is not what the directory promises; the message says of which member and how."""


@dataclass(frozen=True)
class RemoteMember:
    """One stored member: where its local header begins, where the next thing begins, its size and CRC-32."""

    name: str
    offset: int
    end: int
    size: int
    crc32: int

    @property
    def clip(self) -> str:
        """The clip that its name begins with."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Span:
    """Neighbouring members that one read covers."""

    start: int
    end: int
    members: tuple[RemoteMember, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return self.end - self.start


def remote_members(name: str, size: int, read_range: ReadRange) -> tuple[RemoteMember, ...]:
    """Read and check the directory of a zip of `size` bytes; the members come in the order of their bytes.

    Raises:
        DataError: it is no whole zip, its directory is too long, or a member is not what a chunk may hold.
    """
    try:
        with zipfile.ZipFile(_Distant(size, read_range)) as archive:
            entries, directory_start = archive.infolist(), archive.start_dir
    except (*NO_ZIP, _TooLongError) as error:
        raise DataError(f"{name}: not a zip of stored members ({error}); choose another revision") from None
    check_entries(entries, name)
    entries.sort(key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in entries[1:]), directory_start]
    members = tuple(
        RemoteMember(entry.filename, entry.header_offset, end, entry.file_size, entry.CRC)
        for entry, end in zip(entries, ends, strict=True)
    )
    for member in members:
        if member.offset + _HEADER.size + member.size > member.end:
            raise DataError(f"{name}: member {member.name!r} overlaps what follows it; choose another revision")
    return members


def spans_of(members: Sequence[RemoteMember]) -> tuple[Span, ...]:
    """Return the reads that cover these members, one for neighbours; sorted by their bytes."""
    spans: list[Span] = []
    for member in sorted(members, key=lambda member: member.offset):
        end = min(member.end, member.offset + member.size + _MAX_HEADER_BYTES)
        if spans and member.offset - spans[-1].end <= MAX_GAP_BYTES:
            spans[-1] = Span(spans[-1].start, end, (*spans[-1].members, member))
        else:
            spans.append(Span(member.offset, end, (member,)))
    return tuple(spans)


def read_member(stream: BinaryIO, start: int, member: RemoteMember) -> Iterator[bytes]:
    """Yield a member's content in blocks, from a stream whose first byte is byte `start` of the zip.

    Raises:
        WrongBytesError: its header bears another name, bytes are missing, or, at its end, the CRC-32 is another.
    """
    stream.seek(member.offset - start)
    header = stream.read(_HEADER.size)
    signature, name_bytes, extra_bytes = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0)
    named = stream.read(name_bytes)
    stream.seek(extra_bytes, io.SEEK_CUR)
    if signature != b"PK\x03\x04" or named != member.name.encode():
        raise WrongBytesError(f"{member.name}: not where the directory says")
    left, crc32 = member.size, 0
    while left:
        if not (block := stream.read(min(left, _BLOCK_BYTES))):
            raise WrongBytesError(f"{member.name}: ends {left} bytes early")
        left, crc32 = left - len(block), zlib.crc32(block, crc32)
        yield block
    if crc32 != member.crc32:
        raise WrongBytesError(f"{member.name}: CRC-32 is {crc32:08x}, {member.crc32:08x} promised")


def is_whole(stream: BinaryIO, start: int, member: RemoteMember) -> bool:
    """Return whether a stream holds a member as the directory promises it."""
    try:
        return all(True for _ in read_member(stream, start, member))
    except WrongBytesError:
        return False


class _TooLongError(Exception):
    """A directory that no chunk has."""


class _Distant:
    """The end of a distant file as zipfile reads it: what it looks at is fetched once, and never much."""

    def __init__(self, size: int, read_range: ReadRange) -> None:
        self._size, self._read_range = size, read_range
        self._start = max(0, size - TAIL_BYTES)  # of what is here
        self._here = read_range(self._start, size - self._start)
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if self._position < 0:
            raise OSError("before the beginning")  # what zipfile expects of a file
        return self._position

    def read(self, count: int = -1) -> bytes:
        first, last = self._position, self._size if count < 0 else min(self._position + count, self._size)
        if self._size - first > MAX_DIRECTORY_BYTES:
            raise _TooLongError(f"its directory is longer than {MAX_DIRECTORY_BYTES} bytes")
        if first < self._start:
            self._here = self._read_range(first, self._start - first) + self._here
            self._start = first
        self._position = max(first, last)
        return self._here[first - self._start : last - self._start]
