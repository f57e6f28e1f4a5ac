"""What a user asks `omni fetch` for, as plain values."""

import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from omni_cli import files
from omni_cli.world.clip import SyntheticSpec


@dataclass(frozen=True)
class FetchRequest:
    """One call of `omni fetch`.

    `chunks` is `"5"` (the first five), `"0-4"` (inclusive) or `"3,7"`; `cameras` are full names, none means all seven;
    `features` come beside what omni reads itself; `origin` is a folder to import from instead of the network;
    `retry_wait_s` is the first pause between attempts.
    """

    source: str
    data: Path
    chunks: str | None = None
    clips: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    origin: Path | None = None
    max_gb: float = 150.0
    workers: int = 12
    revision: str | None = None
    dry_run: bool = False
    synthetic: SyntheticSpec = field(default_factory=SyntheticSpec)  # its cameras are those of `cameras`
    retry_wait_s: float = 1.0

    @property
    def folder(self) -> Path:
        """Return where this source's raw data lie."""
        return self.data / "raw" / self.source

    def command(self, data: Path) -> str:
        """Return the command that asks for the same of a source's newest revision, into another folder."""
        chosen = {"--chunks": self.chunks, "--clips": ",".join(self.clips), "--cameras": ",".join(self.cameras)}
        chosen |= {"--features": ",".join(self.features), "--data": str(data)}
        words = [word for option, value in chosen.items() if value for word in (option, value)]
        return shlex.join(["omni", "fetch", *words])

    def held(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Return the lock of that folder: what it holds is read and changed inside; a dry run only reads.

        Fetches from the hub hold it `shared`: several work side by side, file by file.

        Raises:
            OmniError: on entering, where another process holds it.
        """
        return nullcontext() if self.dry_run else files.exclusive(self.folder, "fetching into", shared=shared)
