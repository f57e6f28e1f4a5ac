"""What people are shown: nothing of it may be taken for markup, and it fits a terminal."""

import re

import pytest

from omni_cli.recipe.values import Metric
from omni_cli.report import Console, counted
from omni_cli.stages.evaluate import show_scores


def test_units_and_extras_in_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("of [demo]", ("what", "speed MAE [m/s]"), [("omni-cli[bnb]", "[red]")])
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("of [demo]", "[m/s]", "omni-cli[bnb]", "[red]"))


def test_the_scores_of_two_metrics_fit_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    metrics = [Metric(f"{name}_mae", f"{name} MAE", "m/s") for name in ("speed", "displacement")]
    metrics.append(Metric("hidden", "hidden", "", is_shown=False))
    score = {"name": "first frame repeated", "unreadable": 0.0}
    for metric in metrics:
        score |= {metric.key: 12.34, f"{metric.key}_interval": (10.0, 14.0), f"{metric.key}_of_reference": 1.0}
    show_scores("run", {"conditions": [score], "reference": "constant median"}, metrics, Console())
    shown = capsys.readouterr().err
    assert re.findall(r"speed MAE \[m/s\]|displacement MAE \[m/s\]|hidden", shown) == [
        "speed MAE [m/s]",
        "displacement MAE [m/s]",
    ]
    assert len(re.findall(r"first frame repeated .* 12\.34 .* 10\.00 \.\. 14\.00 .* 1\.00 .* 0\.0%", shown)) == 2


def test_numbers_stand_right_and_words_left(capsys: pytest.CaptureFixture[str]) -> None:
    header = ("what", "bytes", "found", "share")
    rows = [("a", "1.50 GB", "4 frames at 10 Hz", "n/a"), ("b", "12 B", "3.11.7, of two", "0.9 .. 1.2")]
    Console().table("t", header, rows)
    lines = capsys.readouterr().err.splitlines()
    assert "│ a    │ 1.50 GB │ 4 frames at 10 Hz │        n/a │" in lines
    assert "│ b    │    12 B │ 3.11.7, of two    │ 0.9 .. 1.2 │" in lines


def test_a_long_name_wraps_and_nothing_is_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = [f"word{number}" for number in range(12)]
    Console().table("t", ("what", "a second"), [(" ".join(words), "1.00 s")])
    shown = capsys.readouterr().err
    assert all(word in shown for word in (*words, "1.00 s"))


def test_one_is_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    assert [counted(number, "recording") for number in (0, 1, 2)] == ["0 recordings", "1 recording", "2 recordings"]
    with Console().progress("etl", 1, "recordings") as step:
        step.advance()
    assert "etl: 1/1 recording," in capsys.readouterr().err
