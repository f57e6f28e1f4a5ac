"""The plain lines of long work where no terminal draws a bar."""

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
