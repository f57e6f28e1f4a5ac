"""Files read through a memory map, without the danger of one.

To touch a page of a map that cannot be had, since the disk fails or the file was cut, ends the process (SIGBUS) without
a word. So the kernel is asked for the pages first. It says which it cannot bring (madvise(2), MADV_POPULATE_READ, Linux
5.14), and a plain read of the same bytes says why; where the kernel is older, that read is what brings them. The page
in which a cut file ends is given whole, with zeros behind the end: of that the size alone tells.

What is only copied is read without the map. Measured on windows of 6.8 MB in the page cache, as shares of a bare
`preadv` of the same bytes: to ask for the pages takes 0.35 to 0.5, to copy them from the map 0.7 to 0.8, to read them
straight into place 0.8 to 1.2. Where the page cache does not hold them, what the kernel is told to read ahead
comes in 3.5 times as fast as by the faults of a map alone, which wait for one another.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from omni_cli.errors import DataError, OmniError, refused_by_machine
from omni_cli.formats.video import Uint8Array

_POPULATE_READ = 22  # MADV_POPULATE_READ of linux/mman.h
_FAULT_BYTES = 1 << 17  # what one fault of a map reads ahead by itself
_BLOCK_BYTES = 1 << 20  # the kernel takes no more of one request than the disk takes at a time
_MARK_BYTES = 8  # before the metadata of a message: a mark, and their length (Arrow columnar format, IPC)
_CUT = "{}: was cut since it was opened; omni audit tells what is damaged"
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedFile:
    """A file among the addresses of this process; it holds no file descriptor. Bytes are brought before they are read.

    Raises:
        OSError: there is no such file, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._opened = path, path.stat()
        with pa.memory_map(str(path)) as source:
            self._buffer = source.read_buffer()
        self.bytes: Uint8Array = np.frombuffer(self._buffer, dtype=np.uint8)

    def place(self, buffer: pa.Buffer) -> slice:
        """Return which bytes of the file a buffer is that lies in its map."""
        start = buffer.address - self._buffer.address
        return slice(start, start + buffer.size)

    def bring(self, pieces: Sequence[slice]) -> None:
        """Have pieces of the file in memory.

        Raises:
            DataError: the file was cut, or another one took its place.
            OmniError: the disk does not give them.
        """
        self._read_ahead([piece for piece in pieces if piece.stop - piece.start > _FAULT_BYTES])
        address = self._buffer.address
        for piece in pieces:
            start = piece.start // mmap.PAGESIZE * mmap.PAGESIZE
            if _madvise(address + start, piece.stop - start, _POPULATE_READ):
                self._read(piece)
        self._require_whole()

    def read(self, targets: Sequence[tuple[slice, Uint8Array]]) -> None:
        """Copy pieces of the file into contiguous arrays of as many bytes; errors as `bring`.

        They are read straight into place; where that cannot be had, they come by way of the map, which says why.
        """
        if self._read_straight(targets):
            return
        self.bring([piece for piece, _ in targets])
        for piece, array in targets:
            array[...] = self.bytes[piece].reshape(array.shape)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches of the Arrow stream that the file is; no more than the head of each is brought.

        Raises:
            pa.ArrowException: it is no such stream.
        """
        source = pa.BufferReader(self._buffer)
        self._bring_head(0)
        with pa.ipc.open_stream(source) as stream:
            while True:
                self._bring_head(source.tell())
                try:
                    batch = stream.read_next_batch()
                except StopIteration:
                    return
                yield batch

    def _bring_head(self, at: int) -> None:
        begins, file_bytes = at + _MARK_BYTES, len(self.bytes)
        self.bring([slice(at, min(begins, file_bytes))])
        if begins < file_bytes:  # else the stream ends here, whole or not
            metadata_bytes = int.from_bytes(self.bytes[begins - 4 : begins].tobytes(), "little")
            self.bring([slice(begins, min(begins + metadata_bytes, file_bytes))])

    def _require_whole(self) -> None:
        """Refuse a file that was cut, wherever; one that was taken away or made anew is still whole in the map."""
        with suppress(OSError):
            state = self.path.stat()  # ten microseconds a window at most
            if os.path.samestat(state, self._opened) and state.st_size < len(self.bytes):
                raise DataError(_CUT.format(self.path))

    def _read_straight(self, targets: Sequence[tuple[slice, Uint8Array]]) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # half the time of a file object
        except OSError:
            return False
        try:
            state = os.fstat(descriptor)
            is_whole = os.path.samestat(state, self._opened) and state.st_size >= len(self.bytes)
            return is_whole and (_are_filled(descriptor, targets, os.RWF_NOWAIT) or _are_brought(descriptor, targets))
        finally:
            os.close(descriptor)

    def _read_ahead(self, pieces: Sequence[slice]) -> None:
        """Have the kernel read long pieces all at once."""
        if pieces:
            with self.path.open("rb", buffering=0) as stream:
                _advise_all(stream.fileno(), pieces)

    def _read(self, piece: slice) -> None:
        """Read what the map does not bring."""
        try:
            with self.path.open("rb", buffering=0) as stream:
                if not os.path.samestat(os.fstat(stream.fileno()), self._opened):
                    raise DataError(f"{self.path}: another file took its place since it was opened; run this again")
                for start in range(piece.start, piece.stop, _BLOCK_BYTES):
                    size = min(_BLOCK_BYTES, piece.stop - start)
                    if len(os.pread(stream.fileno(), size, start)) < size:
                        raise DataError(_CUT.format(self.path))
        except OSError as error:
            raise OmniError(refused_by_machine(error, self.path) or f"{self.path}: {error.strerror}") from None


def is_cached(descriptor: int, offset: int) -> bool | None:
    """Say whether a byte of an open file is in memory; None where the file system does not tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


def _are_brought(descriptor: int, targets: Sequence[tuple[slice, Uint8Array]]) -> bool:
    _advise_all(descriptor, [piece for piece, _ in targets])
    return _are_filled(descriptor, targets, 0)


def _are_filled(descriptor: int, targets: Sequence[tuple[slice, Uint8Array]], flags: int) -> bool:
    """Fill arrays, and say whether there was enough; RWF_NOWAIT gives only what is in memory."""
    with suppress(OSError):
        return all(os.preadv(descriptor, [array.data], piece.start, flags) == array.nbytes for piece, array in targets)
    return False


def _advise_all(descriptor: int, pieces: Sequence[slice]) -> None:
    for piece in pieces:
        if not is_cached(descriptor, piece.stop - 1):
            _advise(descriptor, piece)


def _advise(descriptor: int, piece: slice) -> None:
    for start in range(piece.start, piece.stop, _BLOCK_BYTES):
        os.posix_fadvise(descriptor, start, min(_BLOCK_BYTES, piece.stop - start), os.POSIX_FADV_WILLNEED)
