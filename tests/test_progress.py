"""The plain lines of long work where no terminal draws a bar."""

from io import StringIO

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress

from omni_cli import report
from omni_cli.report import Console


def lines_of(capsys, *counts, total=3):
    with Console().progress("hash shards", total, "MB") as step:
        for count in counts:
            step.advance(count)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("hash shards: ")]


def test_the_end_is_told_once(capsys):
    """Files of less than a megabyte come after the last whole one."""
    assert len(lines_of(capsys, 2, 1, 0, 0)) == 1
    assert len(lines_of(capsys, 2, 2, 1)) == 1
    assert lines_of(capsys, 2, 0) == []


def test_what_is_under_way_moves_the_line_but_counts_as_nothing(capsys, monkeypatch):
    monkeypatch.setattr(report, "_PLAIN_INTERVAL_S", 0.0)
    with Console().progress("etl", 2, "recordings") as step:
        step.under_way(0.42)
        step.advance()
        step.under_way(0.5)
        step.advance()
    told = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["etl: 0.42/2 recordings", "etl: 1/2 recordings", "etl: 1.5/2 recordings", "etl: 2/2 recordings"]


def test_what_others_have_done_is_no_step_back_and_adds_no_speed():
    """Rich adds up every move forward: eight workers once told four times their rate."""
    clock = [0.0]
    with Progress(console=RichConsole(file=StringIO()), get_time=lambda: clock[0], auto_refresh=False) as shown:
        bar = report._Bar(shown, shown.add_task("etl", total=100, done="", rate="", note=""), 100)
        for second in range(1, 40):  # a unit a second: eight workers, at even distances in theirs of 8 s
            clock[0] = second - 0.5
            bar.under_way(4.0)
            clock[0] = float(second)
            bar.advance(under_way=3.5)
        assert shown.tasks[0].completed == 42.5
        assert shown.tasks[0].speed == pytest.approx(1.0, rel=0.05)
