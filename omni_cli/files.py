"""How omni puts things on disk: whole or not at all, and provably so.

An artefact is written to a temporary name in its own folder, flushed to the disk, renamed, and the folder flushed;
then its *receipt* (`NAME.receipt.json`: size, sha256, and whatever the writer adds) is written the same way. Only the
receipt means "done": a file without one, or one that does not match it, is as good as absent.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from omni_cli.errors import OmniError

RECEIPT_SUFFIX = ".receipt.json"
RECEIPT_PROOF = "receipt_sha256"  # in a receipt: the hash of all the rest of it
TEMPORARY_MARK = ".omni-tmp-"
_CHUNK_BYTES = 1 << 20
_ABANDONED_S = 86_400.0  # a write that nobody here can ask about, and that has not grown for a day


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return one spelling of a JSON value: sorted keys, no spaces, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(value: Any) -> str:
    """Return the hex sha256 of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and itself: what others wrote there survives a power loss."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content appears at `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{writer_mark()}")
    try:
        with io.BufferedWriter(_Named(temporary, "xb")) as stream:
            yield stream
            stream.flush()
            with _named(path):
                os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that failed may refuse this too; the next run removes it
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class _Named(io.FileIO):
    """A file whose failed writes name it, which Python's own do not: a full disk is told from a bad input by that."""

    def write(self, data: Any, /) -> int:
        with _named(self.name):
            return super().write(data)


@contextlib.contextmanager
def _named(path: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole text file atomically, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, indented and with sorted keys."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a JSON document for people: indented, with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text())


def receipt_path(path: Path) -> Path:
    """Return where the receipt of an artefact lies: beside it, of `.` too."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(named.name + RECEIPT_SUFFIX)


def commit(path: Path, write: Callable[[BinaryIO], None], **facts: Any) -> dict[str, Any]:
    """Write an artefact atomically, then its receipt; return the receipt."""
    with atomic_write(path) as stream:
        write(stream)
    return write_receipt(path, **facts)


def commit_stream(path: Path, write: Callable[[BinaryIO], None], **facts: Any) -> dict[str, Any]:
    """Do the same for a writer that only appends: its bytes are hashed on their way, and not read again.

    The writer may not change a block after it gave it away: that is hashed in a thread while the next one is made.
    """
    with atomic_write(path) as stream, _Hashed(stream) as hashed:
        write(hashed)  # type: ignore[arg-type]  # it can be written to, and no more
    receipt = {**facts, "size": hashed.size, "sha256": hashed.hash.hexdigest()}
    put_receipt(path, receipt)
    return receipt


class _Hashed(io.RawIOBase):
    """A stream that hashes what passes through it: a large block in a thread, and what follows it meanwhile too.

    No more than one large block waits there, so that the writer is never far ahead.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.hash, self.size = hashlib.sha256(), 0
        self._stream = stream
        self._thread = ThreadPoolExecutor(1)
        self._behind: Future[None] | None = None  # the last block of those in the thread

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        is_large = len(view) >= _CHUNK_BYTES
        if is_large and self._behind is not None:
            self._behind.result()
        if is_large or (self._behind is not None and not self._behind.done()):
            self._behind = self._thread.submit(self.hash.update, view)
        else:
            self.hash.update(view)
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        self._thread.shutdown()  # when all is hashed
        if self._behind is not None:
            self._behind.result()
        super().close()


def commit_json(path: Path, value: Any) -> None:
    """Write a JSON document and its receipt; another process may take the document away meanwhile."""
    content = json_text(value).encode()
    write_bytes(path, content)
    put_receipt(path, {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()})


def write_receipt(path: Path, **facts: Any) -> dict[str, Any]:
    """Write the receipt of a file that is whole on disk; return it."""
    receipt = {**facts, "size": path.stat().st_size, "sha256": sha256_of(path)}
    put_receipt(path, receipt)
    return receipt


def put_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    """Write a receipt, with the hash that proves the receipt itself."""
    as_read = json.loads(canonical_json(receipt))  # keys that are numbers become text, and sort otherwise
    write_json(receipt_path(path), {**as_read, RECEIPT_PROOF: hash_json(as_read)})


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return the receipt of an artefact, or None where there is none that can be read."""
    try:
        receipt = read_json(receipt_path(path))
        if not isinstance(receipt, dict):
            return None
        proof = receipt.pop(RECEIPT_PROOF, None)  # receipts of omni 0.2 have none
        return receipt if proof in (None, hash_json(receipt)) else None
    except (FileNotFoundError, ValueError):  # an infinite number, which JSON does not know, has no hash
        return None


def verified_receipt(path: Path, *, expect: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the receipt if the artefact matches it, byte for byte, and holds the facts in `expect`; else None."""
    receipt = read_receipt(path)
    if receipt is None or not path.is_file() or path.stat().st_size != receipt.get("size"):
        return None
    if any(receipt.get(key) != value for key, value in (expect or {}).items()):
        return None
    return receipt if sha256_of(path) == receipt.get("sha256") else None


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left directly in `folder`.

    On a shared disk other hosts write there too. Whether their processes live cannot be told from here: what they left
    is deleted when it is a day old by the clock of the disk that both write to, whatever the clocks of the hosts say.
    """
    for path in folder.glob(f"*{TEMPORARY_MARK}*"):
        is_gone = is_writer_gone(path.name.rpartition(TEMPORARY_MARK)[2])
        if _is_abandoned(path) if is_gone is None else is_gone:
            path.unlink(missing_ok=True)


def writer_mark() -> str:
    """Return what no other name of a file holds: where this process runs, its number and start, a random token.

    A number alone is given again, and after a container's restart soon.
    """
    return f"{_here()}-{os.getpid()}.{_start_ticks(os.getpid())}-{secrets.token_hex(4)}"


def is_writer_gone(mark: str) -> bool | None:
    """Return whether the process of a `writer_mark` has ended; None where that cannot be told from here."""
    host, _, rest = mark.partition("-")
    pid, _, start = rest.partition("-")[0].partition(".")
    if host != _here() or not pid.isdigit():
        return None
    return not _is_alive(int(pid)) or _start_ticks(int(pid)) != start


def _start_ticks(pid: int) -> str:
    """Return when a process started, in ticks since the boot (proc(5), stat); nothing where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@cache
def _here() -> str:
    """Return what tells the processes that this one can see from all others: a hash of host and PID namespace.

    Containers of one host may share its name and still number their processes apart.
    """
    namespace = Path("/proc/self/ns/pid")  # Linux
    seen = f"{socket.gethostname()} {namespace.readlink() if namespace.is_symlink() else ''}"
    return hashlib.sha256(seen.encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_abandoned(path: Path) -> bool:
    with tempfile.TemporaryFile(dir=path.parent) as probe, contextlib.suppress(FileNotFoundError):  # finished meanwhile
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime > _ABANDONED_S
    return False


@contextlib.contextmanager
def exclusive(folder: Path, doing: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder for one process; the lock ends with the process, however it ends.

    Args:
        folder: what is held; made where it is not there.
        doing: what is said to the process that comes second.
        shared: hold it against those alone who want it for themselves.

    Raises:
        OmniError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OmniError(f"another omni is {doing} {folder}; wait for it, or choose another folder") from None
        yield
