"""How fetched files land: verified first, then renamed into place, the receipt last; and what guards the folder.

A receipt holds size, sha256 and the modification time. A file that has all three is taken as done without reading it;
one whose time differs is read and hashed again. `omni audit --deep` reads everything.
"""

import datetime
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.downloads import Meter, claimed
from omni_cli.errors import OmniError, UsageError
from omni_cli.formats.fetched import read_origin
from omni_cli.formats.physical_ai_av import LICENCE, REVISION_FILE
from omni_cli.stages.fetch.record import recorded_origin
from omni_cli.stages.raw_lock import alone

_RESERVE_BYTES = 256_000_000  # left free: receipts, other processes
MEGABYTE = 1_000_000
_GIGABYTE = 1e9
_NAMES_SHOWN = 4
_REPLACED = "replaced"
_BLOCK_BYTES = 4 << 20


def is_unchanged(path: Path, **expect: Any) -> bool:
    """Return whether a receipt that holds the facts in `expect` vouches for a file by its size and time, unread."""
    receipt = files.read_receipt(path)
    if receipt is None or not path.is_file() or any(receipt.get(key) != value for key, value in expect.items()):
        return False
    state = path.stat()
    return (receipt.get("size"), receipt.get("mtime_ns")) == (state.st_size, state.st_mtime_ns)


def is_landed(path: Path, *, renew: bool = False, **expect: Any) -> bool:
    """Return whether a receipt that holds the facts in `expect` vouches for a file, by size and time or by content.

    Args:
        path: the file.
        renew: note the time of one that its content proves, so that it is not read again each time.
        expect: facts.
    """
    if is_unchanged(path, **expect):
        return True
    modified_ns = path.stat().st_mtime_ns if path.is_file() else 0
    receipt = files.verified_receipt(path, expect=expect)
    if receipt is not None and renew:
        files.put_receipt(path, {**receipt, "mtime_ns": modified_ns})
    return receipt is not None


def names_text(names: Sequence[str]) -> str:
    """Return the first few names, and how many follow."""
    first = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return f"{first} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else first


def vouch(path: Path, *, sha256: str | None = None, **facts: Any) -> dict[str, Any]:
    """Write the receipt of a whole file, with its modification time; return it.

    Args:
        path: the file.
        sha256: of its content, where that was computed as it came; None: the file is read for it.
        facts: what else the receipt says.
    """
    state = path.stat()
    receipt = {**facts, "mtime_ns": state.st_mtime_ns, "size": state.st_size}
    receipt["sha256"] = sha256 or files.sha256_of(path)
    files.put_receipt(path, receipt)
    return receipt


@contextmanager
def replacing(path: Path, staging: Path) -> Iterator[None]:
    """Put another file in the place of one that is there while nobody reads it: readers know where in it things lie.

    Args:
        path: the place; one that is free needs no such care.
        staging: of the source folder, in which one file is replaced at a time.

    Raises:
        HeldError: another omni reads the folder.
    """
    if not path.is_file():
        yield
        return
    with claimed(staging, _REPLACED, Meter(lambda _: None)), alone(staging.parent):
        yield


def land(staged: Path, path: Path, *, sha256: str | None, **facts: Any) -> None:
    """Move a file that was verified and flushed to its place, then its receipt; both are on the disk afterwards.

    Raises:
        HeldError: a file is there, and another omni reads the folder.
    """
    vouch(staged, sha256=sha256, **facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, staged.parent):
        staged.rename(path)
        files.sync_folder(path.parent)
        files.receipt_path(staged).rename(files.receipt_path(path))
        files.sync_folder(path.parent)


def is_copied(source: Path, path: Path) -> bool:
    """Return whether `path` is a verified copy of `source` as it is now."""
    state = source.stat()
    if not is_landed(path, size=state.st_size, source_mtime_ns=state.st_mtime_ns):
        return False
    receipt = files.read_receipt(path) or {}
    return bool(receipt.get("sha256") == receipt.get("source_sha256"))


def copy(source: Path, path: Path, meter: Meter) -> None:
    """Copy a file whole, read the copy back and compare; its receipt holds both hashes.

    Raises:
        OmniError: the copy differs from what was read.
    """
    source_mtime_ns = source.stat().st_mtime_ns
    digest = hashlib.sha256()
    with files.atomic_write(path) as target, source.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            target.write(block)
            meter.add(len(block))
    facts = {**_part_facts(source), "source_sha256": digest.hexdigest(), "source_mtime_ns": source_mtime_ns}
    if vouch(path, **facts)["sha256"] != digest.hexdigest():
        path.unlink()
        raise OmniError(f"{path}: the copy differs from {source}; check the disk and run the same command again")


def _part_facts(source: Path) -> dict[str, Any]:
    """Return what the receipt of a chunk's part says of it: its copy is a part of the same."""
    receipt = files.read_receipt(source) or {}
    return {key: receipt[key] for key in ("partial", "clips", "whole", "git_sha1") if receipt.get("partial")}


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        OmniError: too little space is free.
    """
    if needed_bytes == 0:
        return
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + _RESERVE_BYTES:
        raise OmniError(
            f"{folder}: {needed_bytes / _GIGABYTE:.1f} GB are needed and {free_bytes / _GIGABYTE:.1f} GB are free; "
            "free space, ask for fewer chunks or cameras, or put --data on another disk"
        )


def today() -> str:
    """Return the date in UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def size_text(size_bytes: int) -> str:
    """Return a size for people."""
    return f"{size_bytes / _GIGABYTE:.2f} GB" if size_bytes >= _GIGABYTE / 10 else f"{size_bytes / MEGABYTE:.1f} MB"


def pinned_revision(folder: Path) -> str | None:
    """Return the revision that a folder's files belong to, or None where it has none yet.

    Where `revision.json` is lost the manifest tells.

    Raises:
        DataError: `revision.json` is damaged.
    """
    return read_origin(folder).get("revision") or recorded_origin(folder).get("revision")


def check_revision(folder: Path, revision: str) -> None:
    """Refuse to mix two revisions of a dataset in one folder.

    Raises:
        UsageError: the folder holds another one.
    """
    held = pinned_revision(folder)
    if held is not None and held != revision:
        raise UsageError(
            f"{folder} holds revision {held} and {revision} was asked for; clips change between revisions: use another "
            f"--data, or delete {folder}"
        )


def pin_revision(folder: Path, repository: str, revision: str, since: str | None = None) -> None:
    """Record which revision a folder holds, under which licence, and since when: the licence ends a year later.

    Called with the folder's lock held: another process may have pinned it since it was looked at.

    Args:
        folder: the source folder.
        repository: where its files come from.
        revision: the one that they belong to.
        since: the day on which they were first fetched, in ISO 8601; None: today.

    Raises:
        UsageError: the folder holds another revision.
    """
    check_revision(folder, revision)
    if not read_origin(folder):
        first = since or recorded_origin(folder).get("first_fetched") or today()
        facts = {"repository": repository, "revision": revision, "licence": LICENCE, "first_fetched": first}
        files.write_json(folder / REVISION_FILE, facts)
