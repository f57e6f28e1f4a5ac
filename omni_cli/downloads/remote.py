"""What the hub promises of one file of a pinned commit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_BLOCK_BYTES = 1 << 20


class Digest(Protocol):
    """A running hash of hashlib."""

    def update(self, data: bytes, /) -> None:
        """Hash more bytes."""

    def hexdigest(self) -> str:
        """Return the hash of the bytes so far."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a pinned commit: its repository path, its size in bytes and the hash that the hub promises."""

    path: str
    size: int
    git_sha1: str  # of the content for a small file, of the pointer for a large one
    sha256: str | None  # of the content of a large (LFS) file

    @property
    def content_hash(self) -> str:
        """Return the promised hash of the content: sha256 of a large file, the git blob id of a small one."""
        return self.sha256 or self.git_sha1

    def digest(self) -> Digest:
        """Return a hash of that kind that has seen nothing of the content yet.

        Git's blob id is the sha1 of `blob`, the size and a zero byte before the content (git's object format).
        """
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_content_of(self, path: Path) -> bool:
        """Return whether a local file is this one, byte for byte."""
        if path.stat().st_size != self.size:
            return False
        digest = self.digest()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest() == self.content_hash
