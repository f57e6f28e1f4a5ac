"""The answers about live cameras, on disk line by line: whatever ends the process, those before it are there."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
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
    """A JSONL file that grows by a line an answer; its receipt is there at the end. Without an answer there is none."""

    out: Path
    titles: Sequence[str]  # of the cameras, fit to be shown
    latency_s: list[float] = field(default_factory=list)
    unreadable: int = 0
    forced: int | None = None  # None where no answer is held to its format
    path: Path = field(init=False)
    _stream: TextIO = field(init=False)
    _shown_s: float = 0.0

    def __post_init__(self) -> None:
        """Open a file of its own: another watch may have begun in the same second."""
        self.out.mkdir(parents=True, exist_ok=True)
        began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        stem = f"{re.sub('[^A-Za-z0-9_]+', '-', self.titles[0])[:_NAME_LENGTH].strip('-')}-{began}"
        for number in count(1):
            self.path = self.out / (f"{stem}.jsonl" if number == 1 else f"{stem}-{number}.jsonl")
            try:
                self._stream = self.path.open("x", encoding="utf-8")
            except FileExistsError:
                continue
            return

    @property
    def title(self) -> str:
        """What the cameras are called in each line."""
        return ", ".join(self.titles)

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
            "latency_s": latency,
        }
        forced = {} if self.forced is None else {"forced": self.forced}
        return {**facts, **forced, "file": str(self.path) if self.count else None}

    def append(self, line: dict[str, Any], of: Ready) -> None:
        """Write an answer, when its window ended by the wall clock, and how late it is."""
        now_us, now_unix_us = monotonic_us(), time.time_ns() // 1000
        latency_s = (now_us - of.taken_us) / 1e6
        timed = {**line, "end_unix_us": now_unix_us - (now_us - of.ended_us), "latency_s": round(latency_s, 6)}
        self._stream.write(json.dumps(timed, ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()
        self.latency_s.append(latency_s)
        self.unreadable += line["values"] is None
        if "forced" in line:
            self.forced = (self.forced or 0) + line["forced"]

    def seldom(self, say: Callable[[], None]) -> None:
        """Speak, if the last time was a while ago."""
        if time.monotonic() - self._shown_s >= _OFTEN_S:
            self._shown_s = time.monotonic()
            say()

    def close(self, **facts: Any) -> None:
        """Close the file and write its receipt; take it away if there was no answer."""
        self._stream.close()
        if self.count:
            files.write_receipt(self.path, windows=self.count, **facts)
        else:
            self.path.unlink()
