"""What a user asks `omni fetch` for, as plain values."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SyntheticOptions:
    """How the synthetic world is drawn: a seed, and the size of what is drawn."""

    seed: int = 0
    clips_per_chunk: int = 4
    seconds: float = 20.0
    fps: int = 30
    width_px: int = 320
    height_px: int = 180
    rig: str = "mixed"  # a, b, or each clip its own
    clutter: float = 1.0  # 0: an empty road, 1: a town


@dataclass(frozen=True)
class FetchRequest:
    """One call of `omni fetch`.

    `chunks` is `"5"` (the first five), `"0-4"` (inclusive) or `"3,7"`; `cameras` are full names, none means all seven;
    `origin` is a folder to import from instead of the network; `retry_wait_s` is the first pause between attempts.
    """

    source: str
    data: Path
    chunks: str | None = None
    clips: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    origin: Path | None = None
    max_gb: float = 150.0
    workers: int = 12
    revision: str | None = None
    dry_run: bool = False
    synthetic: SyntheticOptions = field(default_factory=SyntheticOptions)
    retry_wait_s: float = 1.0

    @property
    def folder(self) -> Path:
        """Return where this source's raw data lie."""
        return self.data / "raw" / self.source
