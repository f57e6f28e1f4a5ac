"""What a command shows: lines, a progress bar, a table, and one JSON document as the last line of stdout.

Everything for people goes to stderr, so that stdout holds data only. On a terminal long work draws a bar; elsewhere it
prints a plain line now and then.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import JustifyMethod
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from omni_cli import SCHEMA_VERSION

_PLAIN_INTERVAL_S = 15.0
_LOG_WIDTH = 120  # characters of a table that no terminal limits
_SPINS_HZ = 8
_NAME_WIDTH = 32  # a longer name wraps: it would push the numbers off a terminal
_NUMBER, _UNIT = r"[-+<~≈]?\d[\d.,_]*", r"[^\W\d_]{1,3}(?:/s)?|%"
_AMOUNT = re.compile(rf"{_NUMBER}(?: \.\. {_NUMBER})?(?: ?(?:{_UNIT}))?|n/a|no answer|\?|-?")  # of a column of numbers


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 recording, 2 recordings."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Step(Protocol):
    """Counts finished units of a long piece of work."""

    def advance(self, count: int = 1, note: str = "", under_way: float = 0.0) -> None:
        """Count finished units; the note appears beside the bar, and `under_way` is what is done of further ones."""

    def under_way(self, units: float) -> None:
        """Tell how much of further units is done, such as 1.25 of two; nothing of it is counted as finished."""


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
        """Print a table; columns of numbers are right-aligned, names and words left-aligned."""
        if self.quiet:
            return
        # All as Text: `[bnb]` and `[m/s]` are no markup.
        table = Table(title=Text(title, style="bold"), title_justify="left")
        is_short = all(len(str(row[0])) <= _NAME_WIDTH for row in rows)
        for index, name in enumerate(header):
            is_of_numbers = index > 0 and all(_AMOUNT.fullmatch(str(row[index])) for row in rows)
            side: JustifyMethod = "right" if is_of_numbers else "left"
            table.add_column(Text(name), justify=side, overflow="fold", no_wrap=index == 0 and is_short)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._rich.print(table)

    @contextmanager
    def passing(self, line: str) -> Iterator[None]:
        """Show a line with a spinner on a terminal, and nothing elsewhere, until the block ends."""
        if self.quiet or self.json_output or not self._is_terminal():
            yield
            return
        spinner = Spinner("dots", Text(line))
        # what is imported meanwhile may keep sys.stderr: it is left as it is
        with Live(
            spinner, console=self._rich, refresh_per_second=_SPINS_HZ, transient=True, redirect_stdout=False,
            redirect_stderr=False,
        ):  # fmt: skip
            yield

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Step]:
        """Show a bar with rate and remaining time on a terminal, plain and rare lines elsewhere.

        Args:
            label: of the work.
            total: how many units it is.
            unit: what they are called: recordings.
        """
        unit = unit.removesuffix("s") if total == 1 else unit
        if self.quiet or total == 0:
            yield _Silent()
        elif self._is_terminal():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
                TextColumn(unit),
            )
            clock = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, *clock, TextColumn("{task.fields[note]}"), console=self._rich) as bar:
                yield _Bar(bar, bar.add_task(label, total=total, done=f"0/{total}", rate="", note=""), total)
        else:
            yield _Plain(self, label, total, unit)

    def _is_terminal(self) -> bool:
        """Say whether what is shown can be drawn over; FORCE_COLOR, as in CI, makes rich take a log for a terminal."""
        return self._rich.is_terminal and self._rich.file.isatty()

    def finish(self, result: dict[str, Any]) -> None:
        """Print the result as the last line of stdout where `--json` asks for it."""
        if self.json_output:
            document = {"schema_version": SCHEMA_VERSION, **result}
            sys.stdout.write(json.dumps(document, sort_keys=True, allow_nan=False) + "\n")
            sys.stdout.flush()


class Mute(Console):
    """Talks to nobody: of the processes of one piece of work, one alone does."""

    def say(self, line: str) -> None:
        """Print nothing."""

    def warn(self, line: str) -> None:
        """Print nothing."""


def console_of_rank(*, quiet: bool, json_output: bool) -> Console:
    """Return what this process talks through; of those that torchrun started all but the first are mute."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return Mute(quiet=True)
    return Console(quiet=quiet, json_output=json_output)


class _Silent:
    def advance(self, count: int = 1, note: str = "", under_way: float = 0.0) -> None:
        pass

    def under_way(self, units: float) -> None:
        pass


@dataclass
class _Bar:
    bar: Progress
    task: Any
    total: int
    done: int = 0

    def advance(self, count: int = 1, note: str = "", under_way: float = 0.0) -> None:
        self.done += count
        self._draw(self.done + under_way, note)  # at once: a bar that steps back and forth gains speed by it

    def under_way(self, units: float) -> None:
        self._draw(self.done + units)

    def _draw(self, completed: float, note: str = "") -> None:
        self.bar.update(self.task, completed=completed)
        state = self.bar.tasks[self.bar.task_ids.index(self.task)]
        rate = state.speed
        finished = f"{self.done:{len(str(self.total))}}/{self.total}"
        note = note or state.fields["note"]
        self.bar.update(self.task, done=finished, rate=f"{rate:.2f}/s" if rate else "", note=note)


@dataclass
class _Plain:
    console: Console
    label: str
    total: int
    unit: str
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1, note: str = "", under_way: float = 0.0) -> None:
        is_ending = self.done < self.total <= self.done + count  # what is less than a unit may still come after it
        self.done += count
        if is_ending or self._is_due():
            self._print(round(self.done + under_way, 2), note)

    def under_way(self, units: float) -> None:
        if self._is_due():
            self._print(round(self.done + units, 2))

    def _is_due(self) -> bool:
        return time.monotonic() - self.printed >= _PLAIN_INTERVAL_S

    def _print(self, done: float, note: str = "") -> None:
        self.printed = now = time.monotonic()
        rate = done / max(now - self.started, 1e-9)
        left = (self.total - done) / rate if rate else 0.0
        ending = f", {left:.0f} s left" if rate and done < self.total else ""
        said = f"{self.label}: {done:.10g}/{self.total} {self.unit}, {rate:.2f}/s{ending}"
        self.console.say(f"{said} {note}" if note else said)
