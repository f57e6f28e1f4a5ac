"""How omni puts things on disk: whole or not at all, and provably so.

An artefact is written to a temporary name in its own folder, flushed to the disk, renamed, and the folder flushed;
then its *receipt* (`NAME.receipt.json`: size, sha256, and whatever the writer adds) is written the same way. Only the
receipt means "done": a file without one, or one that does not match it, is as good as absent.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from omni_cli.errors import OmniError

RECEIPT_SUFFIX = ".receipt.json"
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
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{_here()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole text file atomically, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, indented and with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text())


def receipt_path(path: Path) -> Path:
    """Return where the receipt of an artefact lies."""
    return path.with_name(path.name + RECEIPT_SUFFIX)


def commit(path: Path, write: Callable[[BinaryIO], None], **facts: Any) -> dict[str, Any]:
    """Write an artefact atomically, then its receipt; return the receipt."""
    with atomic_write(path) as stream:
        write(stream)
    return write_receipt(path, **facts)


def write_receipt(path: Path, **facts: Any) -> dict[str, Any]:
    """Write the receipt of a file that is whole on disk; return it."""
    receipt = {**facts, "size": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(receipt_path(path), receipt)
    return receipt


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return the receipt of an artefact, or None where there is none that can be read."""
    try:
        receipt = read_json(receipt_path(path))
    except (FileNotFoundError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) else None


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
    is deleted when it is a day old.
    """
    for path in folder.glob(f"*{TEMPORARY_MARK}*"):
        host, _, rest = path.name.rpartition(TEMPORARY_MARK)[2].partition("-")
        pid = rest.partition("-")[0]
        if not _is_alive(int(pid)) if host == _here() and pid.isdigit() else _is_abandoned(path):
            path.unlink(missing_ok=True)


@cache
def _here() -> str:
    """Return what tells the processes that this one can see from all others: a hash of host and PID namespace.

    Containers of one host may share its name and still number their processes apart.
    """
    namespace = Path("/proc/self/ns/pid")  # Linux
    seen = f"{socket.gethostname()} {namespace.readlink() if namespace.is_symlink() else ''}"
    return hashlib.sha256(seen.encode()).hexdigest()[:8]


def _is_abandoned(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:  # finished or removed meanwhile
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder for one process; the lock ends with the process, however it ends.

    Raises:
        OmniError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OmniError(f"another omni is {doing} {folder}; wait for it, or choose another folder") from None
        yield
