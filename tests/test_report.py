"""What people are shown: nothing of it may be taken for markup, and it fits a terminal."""

import re

import pytest

from omni_cli.recipe.values import Metric
from omni_cli.report import Console
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
