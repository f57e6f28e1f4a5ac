"""What a command shows: lines, a progress bar, a table, and one JSON document as the last line of stdout.

Everything for people goes to stderr, so that stdout holds data only. On a terminal long work draws a bar; elsewhere it
prints a plain line now and then.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omni_cli import SCHEMA_VERSION

_PLAIN_INTERVAL_S = 15.0
_LOG_WIDTH = 120  # characters of a table that no terminal limits


class Step(Protocol):
    """Counts finished units of a long piece of work."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; the note appears beside the bar."""


def _stderr() -> RichConsole:
    console = RichConsole(stderr=True, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH
    return console


@dataclass
class Console:
    """The one place that stages talk to people through."""

    quiet: bool = False
    json_output: bool = False
    _rich: RichConsole = field(default_factory=_stderr)

    def say(self, line: str) -> None:
        """Print one line for the user."""
        if not self.quiet:
            self._rich.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print one line that matters even to a quiet run."""
        self._rich.print(f"warning: {line}", markup=False, soft_wrap=True, style="yellow")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        if self.quiet:
            return
        # All as Text: `[bnb]` and `[m/s]` are no markup.
        table = Table(title=Text(title, style="bold"), title_justify="left")
        for index, name in enumerate(header):
            side: JustifyMethod = "left" if index == 0 else "right"
            table.add_column(Text(name), justify=side, overflow="fold", no_wrap=index == 0)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._rich.print(table)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Step]:
        """Show a bar with rate and remaining time on a terminal, plain and rare lines elsewhere."""
        if self.quiet or total == 0:
            yield _Silent()
        elif self._rich.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            clock = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, *clock, TextColumn("{task.fields[note]}"), console=self._rich) as bar:
                yield _Bar(bar, bar.add_task(label, total=total, rate="", note=""))
        else:
            yield _Plain(self, label, total, unit)

    def finish(self, result: dict[str, Any]) -> None:
        """Print the result as the last line of stdout where `--json` asks for it."""
        if self.json_output:
            document = {"schema_version": SCHEMA_VERSION, **result}
            sys.stdout.write(json.dumps(document, sort_keys=True, allow_nan=False) + "\n")
            sys.stdout.flush()


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        pass


@dataclass
class _Bar:
    bar: Progress
    task: Any

    def advance(self, count: int = 1, note: str = "") -> None:
        self.bar.advance(self.task, count)
        state = self.bar.tasks[self.bar.task_ids.index(self.task)]
        rate = state.speed
        self.bar.update(self.task, rate=f"{rate:.2f}/s" if rate else "", note=note or state.fields["note"])


@dataclass
class _Plain:
    console: Console
    label: str
    total: int
    unit: str
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1, note: str = "") -> None:
        is_ending = self.done < self.total <= self.done + count  # what is less than a unit may still come after it
        self.done += count
        now = time.monotonic()
        if now - self.printed < _PLAIN_INTERVAL_S and not is_ending:
            return
        self.printed = now
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        ending = f", {left:.0f} s left" if self.done < self.total else ""
        self.console.say(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.2f}/s{ending}{f' {note}' if note else ''}"
        )
