"""Who reads raw data or shards, and who takes files of them away: a lock of the folder itself.

etl, audit, infer and bench read raw data, by offsets into zips whose directories they read once; train, eval and bench
read shards through maps, whose files are opened as they are needed. Whoever takes files away under them, as a purge and
a quarantine do, asks for the folder alone; whoever only adds files, or makes some anew, needs no lock.

It is flock(2) of the folder itself, opened for reading. No file is made, so that data may lie on a read-only disk or
belong to someone else, and it ends with the process, however that ends; the workers of a pool, of a loader or of Ray
are covered by the process that started them, and never hold it themselves. It holds among the processes of one host,
and on a disk that knows such locks.
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
_GONE = "{} was just taken away by another omni; run the same command again"
_PROGRAMS = ("omni", "omni_cli")
_held: set[int] = set()  # descriptors whose locks this process holds


class HeldError(OmniError):
    """Data are in use so that this may not go on beside it."""


@contextmanager
def reading(raw: Path) -> Iterator[None]:
    """Read raw data or shards: inside the block nobody takes a file of them away; others may read and add.

    Raises:
        HeldError: another process is taking files away, or has.
    """
    with _locked(raw, fcntl.LOCK_SH, "taking files away from", "wait for it, then run the same command again"):
        yield


@contextmanager
def alone(raw: Path) -> Iterator[None]:
    """Take files of raw data or shards away: inside the block nobody reads them.

    Raises:
        HeldError: another process reads them, or takes files away too.
    """
    with _locked(raw, fcntl.LOCK_EX, "using", "wait for it or end it, then run the same command again"):
        yield


@contextmanager
def _locked(raw: Path, kind: int, doing: str, remedy: str) -> Iterator[None]:
    try:
        descriptor = os.open(raw, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise HeldError(_GONE.format(raw)) from None
    _held.add(descriptor)
    try:
        if not _is_locked(descriptor, kind):
            raise HeldError(f"{_holders(descriptor)} {doing} {raw}; {remedy}")
        if not raw.is_dir() or not os.path.samestat(os.fstat(descriptor), raw.stat()):
            raise HeldError(_GONE.format(raw))
        yield
    finally:
        _let_go(descriptor)


def _let_go(*descriptors: int) -> None:
    for descriptor in _held.intersection(descriptors):
        _held.remove(descriptor)
        os.close(descriptor)


# A lock lasts until the last copy of its descriptor is closed: a fork that outlives its parent would keep it.
os.register_at_fork(after_in_child=lambda: _let_go(*_held))


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
