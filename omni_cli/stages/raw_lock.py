"""Who reads raw data, and who takes files of them away: a lock of the folder itself.

etl, audit and bench read for hours, by offsets into zips whose directories they read once. Whoever takes files away
under them, as a purge and a quarantine do, asks for the folder alone; whoever only adds files needs no lock.

It is flock(2) of the folder itself, opened for reading. No file is made, so that raw data may lie on a read-only disk
or belong to someone else, and it ends with the process, however that ends; the workers of a pool or of Ray are covered
by the process that started them. It holds among the processes of one host, and on a disk that knows such locks.
"""

import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omni_cli.errors import OmniError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre and NFS where they are mounted without
_PATIENCE_S, _POLL_S = 2.0, 0.05  # a file that is replaced takes an instant
_LOCKS = Path("/proc/locks")  # Linux; proc(5)
_PROGRAMS = ("omni", "omni_cli")


class HeldError(OmniError):
    """Raw data are in use so that this may not go on beside it."""


@contextmanager
def reading(raw: Path) -> Iterator[None]:
    """Read raw data: inside the block nobody takes a file of them away; others may read and add.

    Raises:
        HeldError: another process is taking files away.
    """
    with _locked(raw, fcntl.LOCK_SH, "taking files away from", "wait for it, then run the same command again"):
        yield


@contextmanager
def alone(raw: Path) -> Iterator[None]:
    """Take files of raw data away: inside the block nobody reads them.

    Raises:
        HeldError: another process reads them, or takes files away too.
    """
    with _locked(raw, fcntl.LOCK_EX, "using", "wait for it or end it, then run the same command again"):
        yield


@contextmanager
def _locked(raw: Path, kind: int, doing: str, remedy: str) -> Iterator[None]:
    descriptor = os.open(raw, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _is_locked(descriptor, kind):
            raise HeldError(f"{_holders(descriptor)} {doing} {raw}; {remedy}")
        if not raw.is_dir() or not os.path.samestat(os.fstat(descriptor), raw.stat()):
            raise HeldError(f"{raw} was just taken away by another omni; run the same command again")
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, kind: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True
            raise


def _holders(descriptor: int) -> str:
    """Return in words who holds a lock of an open folder; another container's processes are not told by number."""
    state = os.fstat(descriptor)
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    rows = [line.split() for line in _LOCKS.read_text().splitlines()] if _LOCKS.is_file() else []
    pids = sorted({int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] == place})
    if not pids:
        return "another omni is"
    return f"{', '.join(map(_named, pids))} {'is' if len(pids) == 1 else 'are'}"


def _named(pid: int) -> str:
    """Return the number of a process, and the verb of omni that it runs where its command line tells."""
    words: list[str] = []
    with suppress(OSError):  # it has just ended, or is not ours to look at
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    verbs = [verb for program, verb in itertools.pairwise(words) if Path(program).name in _PROGRAMS]
    return f"omni {verbs[0]} (process {pid})" if verbs and verbs[0] else f"process {pid}"
