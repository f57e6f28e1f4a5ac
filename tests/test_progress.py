"""The plain lines of long work where no terminal draws a bar."""

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
