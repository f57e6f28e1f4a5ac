"""Which part of a big store is read: chosen by the hash of each name, so that the same is read again tomorrow."""

import hashlib
import re
from dataclasses import dataclass

from omni_cli.errors import UsageError

_PART = re.compile(r"(\d+)/(\d+)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_SPACE = 1 << 32


@dataclass(frozen=True)
class Subset:
    """The names whose hash lies in [low, high) of all hashes."""

    low: float = 0.0
    high: float = 1.0

    def holds(self, name: str) -> bool:
        """Say whether a name is of it."""
        place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / _SPACE
        return self.low <= place < self.high


EVERYTHING = Subset()


def parse_subset(text: str) -> Subset:
    """Read `5%`, or `3/30`: the third of thirty parts, which together are everything.

    Raises:
        UsageError: it is neither.
    """
    if (share := _SHARE.fullmatch(text)) and 0 < float(share[1]) <= 100:
        return Subset(0.0, float(share[1]) / 100)
    if (part := _PART.fullmatch(text)) and 1 <= int(part[1]) <= int(part[2]):
        return Subset((int(part[1]) - 1) / int(part[2]), int(part[1]) / int(part[2]))
    raise UsageError(f"--subset {text}: expected a share such as 5%, or a part such as 3/30 (the third of thirty)")
