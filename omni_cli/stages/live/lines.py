"""The answers about live cameras, on disk line by line: whatever ends the process, those before it are there."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from omni_cli import files
from omni_cli.formats.live_video import monotonic_us
from omni_cli.stages.live.feed import Ready

_OFTEN_S = 1.0
_NAME_LENGTH = 80  # characters


@dataclass
class Lines:
    """A JSONL file that grows by a line an answer; it is there from the first one on, its receipt at the end."""

    out: Path
    titles: Sequence[str]  # of the cameras, fit to be shown
    latency_s: list[float] = field(default_factory=list)
    unreadable: int = 0
    forced: int = 0
    _began: str = field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    _stream: TextIO | None = None
    _shown_s: float = 0.0

    @property
    def title(self) -> str:
        """What the cameras are called in each line."""
        return ", ".join(self.titles)

    @property
    def path(self) -> Path:
        """The file: of each watch one of its own."""
        return (
            self.out / f"{re.sub('[^A-Za-z0-9_]+', '-', self.titles[0])[:_NAME_LENGTH].strip('-')}-{self._began}.jsonl"
        )

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self.latency_s)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of all answers."""
        late = np.percentile(self.latency_s, [50, 95]).tolist() if self.count else [None, None]
        latency = dict(zip(("median", "p95"), late, strict=True))
        facts = {
            "clip": self.title,
            "windows": self.count,
            "unreadable": self.unreadable,
            "forced": self.forced,
            "latency_s": latency,
        }
        return {**facts, "file": str(self.path) if self.count else None}

    def append(self, line: dict[str, Any], of: Ready) -> None:
        """Write an answer, when its window ended by the wall clock, and how late it is."""
        now_us = monotonic_us()
        latency_s = (now_us - of.taken_us) / 1e6
        end_unix_us = time.time_ns() // 1000 - (now_us - of.origin_us - of.window.planned.end_us)
        timed = {**line, "end_unix_us": end_unix_us, "latency_s": round(latency_s, 6)}
        stream = self._open()
        stream.write(json.dumps(timed, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        self.latency_s.append(latency_s)
        self.unreadable += line["values"] is None
        self.forced += line.get("forced", False)

    def seldom(self, say: Callable[[], None]) -> None:
        """Speak, if the last time was a while ago."""
        if time.monotonic() - self._shown_s >= _OFTEN_S:
            self._shown_s = time.monotonic()
            say()

    def close(self, **facts: Any) -> None:
        """Close the file and write its receipt, if there was any answer."""
        if self._stream is not None:
            self._stream.close()
            files.write_receipt(self.path, windows=self.count, **facts)

    def _open(self) -> TextIO:
        if self._stream is None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("x", encoding="utf-8")
        return self._stream
