"""What is here of a file, across kills and processes.

A partial is named by the hash of the whole content, so that no other file is ever continued with it, and by its writer,
so that one process alone writes to it. What another process left is copied, not taken over: that process may
live, where a disk's locks do not tell (flock does nothing on some network disks). A lock, named by the same hash, only
keeps two processes from fetching the same bytes.

    STAGING/<hash>.<writer>.part    the first bytes of the content
    STAGING/<hash>.lock             held while one process fetches and lands the file
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from omni_cli import files
from omni_cli.downloads.meter import Meter
from omni_cli.downloads.remote import RemoteFile
from omni_cli.downloads.retries import WrongContentError

_BLOCK_BYTES = 4 << 20
_LOOK_S = 0.1
_AFTER_NAME = re.compile(r"[^a-z0-9]")


class Partial:
    """The first bytes of a file in the staging folder, and the hash of them.

    A context manager: leaving it closes the file and keeps what is in it.
    """

    def __init__(self, file: RemoteFile, folder: Path, meter: Meter) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.path = folder / f"{file.content_hash}.{files.writer_mark()}.part"
        self.have = 0
        self.best = 0  # the most that was ever here: what is fetched again is no progress
        self._wrong = 0
        self._meter = meter
        self._digest = file.digest()
        self._stream = self.path.open("xb", buffering=0)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        if self.have < min(1, self.file.size):
            self.path.unlink(missing_ok=True)

    @property
    def first(self) -> int:
        """Return the byte of the file that an answer must begin with."""
        return self.have

    @property
    def end(self) -> int:
        """Return the byte of the file after the last one that is wanted."""
        return self.file.size

    def append(self, block: bytes) -> None:
        """Write what follows.

        Raises:
            OSError: the disk refuses.
            StoppedError: the run ends.
        """
        rest = memoryview(block)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._digest.update(block)
        self.have += len(block)
        self.best = max(self.best, self.have)
        self._meter.add(len(block))

    def restart(self) -> bool:
        """Forget everything: a server does not continue what is here. Return that this can be done."""
        self._meter.add(-self.have)
        self._stream.seek(0)
        self._stream.truncate()
        self.have, self._digest = 0, self.file.digest()
        return True

    def adopt(self) -> None:
        """Copy the longest of what others left of this file; what surely is a dead process's is removed.

        The rest goes when a run is complete (`sweep`): a process that lives lands its file, or finds it landed.
        """
        left = [path for path in self.path.parent.glob(f"{self.file.content_hash}.*.part") if path != self.path]
        sizes = {path: _size(path) for path in left}
        longest = max((path for path in left if sizes[path] <= self.file.size), key=sizes.__getitem__, default=None)
        with contextlib.suppress(FileNotFoundError):  # its owner lives, and has just landed it
            self._copy(longest) if longest else None
        for path in left:
            if files.is_writer_gone(path.stem.partition(".")[2]):
                path.unlink(missing_ok=True)

    def check(self) -> None:
        """Flush a file that is here whole and compare it with the hub's promise; a wrong one is forgotten.

        Raises:
            WrongContentError: it differs.
        """
        if self._digest.hexdigest() == self.file.content_hash:
            os.fsync(self._stream.fileno())
            return
        self._wrong += 1
        self.restart()
        self.best = 0
        raise WrongContentError(self._wrong)

    def _copy(self, path: Path) -> None:
        with path.open("rb") as stream:
            while block := stream.read(min(_BLOCK_BYTES, self.file.size - self.have)):
                self.append(block)


@contextlib.contextmanager
def claimed(folder: Path, name: str, meter: Meter, *, wait: bool = True) -> Iterator[bool]:
    """Hold what a name stands for against other threads and processes that share a staging folder.

    Args:
        folder: the staging folder.
        name: a file's content hash, held until the file is landed; or any other word without a dot.
        meter: ends a wait when the run ends.
        wait: until it is free.

    Yields:
        False where another holds it and `wait` is off.

    Raises:
        StoppedError: the run ends while this waits.
    """
    path = folder / f"{name}.lock"
    while (descriptor := _hold(path)) is None and wait:
        meter.wait(_LOOK_S)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def sweep(folder: Path) -> None:
    """Remove from a staging folder what no process works on, and the folder itself where nothing is left.

    Called when a run is complete: what killed processes left of other files would stay for ever. All that belongs to a
    file begins with its content hash.
    """
    for name in {_AFTER_NAME.split(path.name)[0] for path in folder.glob("*")}:
        lock = folder / f"{name}.lock"
        if (descriptor := _hold(lock)) is not None:
            for path in set(folder.glob(f"{name}*")) - {lock}:
                path.unlink(missing_ok=True)
            _release(lock, descriptor)
    with contextlib.suppress(OSError):  # another process fetches into it, or has removed it
        folder.rmdir()


def _hold(path: Path) -> int | None:
    """Lock a file that is removed when it is released: what was locked must still be what lies there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # its folder was removed in between
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
