"""Several models measured on the same windows: one table, and whether one is really better than another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.recipe import Metric
from omni_cli.report import Console, counted
from omni_cli.samples.shards import open_shards
from omni_cli.scene.clock import Float64Array
from omni_cli.scores.intervals import paired_difference
from omni_cli.stages.evaluate.candidates import Candidate, is_own
from omni_cli.stages.evaluate.page import Page, Table, write_page
from omni_cli.stages.evaluate.request import CONSTRAINED, EvalRequest
from omni_cli.stages.evaluate.scored import metrics_of
from omni_cli.stages.evaluate.stage import answer, open_session
from omni_cli.stages.evaluate.tables import (
    condition_row,
    failures_title,
    is_silent_by,
    metric_title,
    notes_of,
    number,
    span,
)
from omni_cli.stages.pictures import save

COMPARISON = "comparison"  # .json, .html and .png
FEWEST_TO_JUDGE = 6  # recordings, for one model to be called better: of 5, chance alone gives all one sign once in 16
_LONGEST_NAME = 28  # letters beside a panel
_ONE_PAIR = (
    "An interval is of its pair alone: of a hundred pairs of equal models four to eight are expected to look unequal, "
    "and more where few drives are very different from the others."
)
_OTHER_CONSTANTS = (
    "The {} is not the same for all, as they learned from other windows ({}): the column of shares has another "
    "divisor for each, and what could not be read counts as another answer."
)


def compare(candidates: Sequence[Candidate], request: EvalRequest, out: Path, console: Console) -> dict[str, Any]:
    """Measure each of several models on the same windows, and compare them in one table and in pairs.

    Args:
        candidates: at least two.
        request: of each of them.
        out: folder of the comparison; each model's own report stays where it is.
        console: shows the tables.

    Raises:
        UsageError: they learned from different shards and none are named, or their answers are measured differently.
        DataError: as of `measure`; before any of them is measured.
    """
    _check_one_table(candidates, request)
    asked = _of_one_split(candidates, request)
    sessions = [open_session(candidate, asked, console) for candidate in _told_apart(candidates)]
    reports = [answer(session) for session in sessions]
    metrics = metrics_of(candidates[0].recipe, request.samples)
    found = {
        **{key: reports[0][key] for key in ("split", "split_rule", "windows", "recordings", "reference", "samples")},
        "constrained": request.constrained,
        "shards": str(sessions[0].shards.folder),
        "models": [_model_line(report) for report in reports],
        "pairs": pairs_of(reports, metrics),
        "notes": notes_of_all(reports, metrics),
    }
    return {**_publish(found, metrics, out, console), "reports": reports}


def _check_one_table(candidates: Sequence[Candidate], request: EvalRequest) -> None:
    """Refuse what no one table can hold, before anything is measured.

    Raises:
        UsageError: a model is named twice, the metrics differ, or the windows would.
    """
    names, sources = [one.name for one in candidates], [_where(one) for one in candidates]
    if len(set(sources)) < len(sources):
        twice = names[sources.index(max(sources, key=sources.count))]
        raise UsageError(f"{twice} is named twice; name each model once")
    first, *others = candidates
    for other in others:
        if _measured_by(first) != _measured_by(other):
            raise UsageError(
                f"{first.name} is measured by {_measured_by(first)}, {other.name} by {_measured_by(other)}: no one "
                "table holds both; compare models that learned the same labels"
            )
    learned_from = {one.run.manifest.shards.fingerprint for one in candidates if one.run is not None}
    if request.shards is None and len(learned_from) > 1:
        raise UsageError(
            f"{', '.join(names)} learned from different shards; name windows that none of them learned from with "
            "--shards"
        )


def _where(candidate: Candidate) -> str:
    """Return what a model is, however it was called: its folder, or its id on the hub."""
    path = Path(candidate.source)
    return str(path.resolve() if path.is_dir() else candidate.source)


def _told_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return them so that no two have one name: runs that do are named by their folders."""
    names = [one.name for one in candidates]
    return [one if names.count(one.name) == 1 else replace(one, name=str(one.source)) for one in candidates]


def _of_one_split(candidates: Sequence[Candidate], request: EvalRequest) -> EvalRequest:
    """Return the request with its split fixed: whose own shards these are, others are asked no more of them."""
    if request.split or request.shards is None:
        return request
    shards = open_shards(request.shards)
    return replace(request, split="val" if any(is_own(one, shards) for one in candidates) else "all")


def _measured_by(candidate: Candidate) -> str:
    titles = [metric.title for metric in candidate.recipe.metrics if metric.is_shown]
    return f"{' and '.join(titles)} beside {candidate.recipe.reference}"


@dataclass(frozen=True)
class WindowErrors:
    """How wrong one model was at each window, in the order of the windows."""

    keys: tuple[tuple[str, int, int], ...]  # recording, start and end
    errors: tuple[Mapping[str, float | None], ...]

    @staticmethod
    def read(report: Mapping[str, Any]) -> "WindowErrors":
        """Read what was written beside a report."""
        lines = [json.loads(line) for line in Path(report["answers"]).read_text(encoding="utf-8").splitlines()]
        keys = tuple((line["recording"], line["start_us"], line["end_us"]) for line in lines)
        return WindowErrors(keys, tuple(line["errors"] for line in lines))

    def of(self, key: str) -> Float64Array:
        """Return the errors (n,) of one metric, NaN where there is none."""
        return np.array([np.nan if one[key] is None else one[key] for one in self.errors], dtype=float)


def pairs_of(reports: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return each pair of models by each metric; none by what one of them was silent at, for that is no score of it."""
    said = [(report, WindowErrors.read(report)) for report in reports]
    lines = []
    for (one, ones), (other, others) in combinations(said, 2):
        scores = one["conditions"][0], other["conditions"][0]
        judged = [metric for metric in metrics if not any(is_silent_by(those, metric) for those in scores)]
        lines += pair_lines(one["name"], other["name"], ones, others, judged)
    return lines


def pair_lines(
    one: str, other: str, ones: WindowErrors, others: WindowErrors, metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Return of each error how much larger the other's is, at the windows where both have one."""
    assert ones.keys == others.keys  # of one split of the same shards
    recordings = np.array([key[0] for key in ones.keys])
    lines = []
    for metric in [metric for metric in metrics if metric.is_error]:
        apart = ones.of(metric.key), others.of(metric.key)
        both = np.isfinite(apart[0]) & np.isfinite(apart[1])
        if both.any():
            mean, interval = paired_difference(apart[0][both], apart[1][both], recordings[both].tolist())
            count = len(np.unique(recordings[both]))
            found = {"difference": mean, "interval": interval, "windows": int(both.sum()), "recordings": count}
            says = _says(other, interval, count)
            lines.append({"metric": metric.key, "one": one, "other": other, **found, "says": says})
    return lines


def _says(other: str, interval: tuple[float, float] | None, recordings: int) -> str:
    """Return whether the other's errors are surely smaller or larger."""
    if interval is None:
        return "one recording says nothing of others"
    if recordings < FEWEST_TO_JUDGE:
        return f"too few recordings to say: {recordings}, and it takes {FEWEST_TO_JUDGE}"
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return f"{other} is {'better' if interval[1] < 0 else 'worse'}"


def _model_line(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a comparison holds of one model: how it is named, its report, its scores."""
    named = {key: report[key] for key in ("run", "model") if key in report}
    facts = {key: report[key] for key in ("report", "learned_from", "chosen_on")}
    return {**named, **facts, **report["conditions"][0], "name": report["name"]}


def _publish(found: dict[str, Any], metrics: Sequence[Metric], out: Path, console: Console) -> dict[str, Any]:
    """Show a comparison, and write it as JSON and as a page."""
    shown = [metric for metric in metrics if metric.is_shown]
    tables = [table for metric in shown for table in tables_of(found, metric)]
    for table in tables:
        console.table(table.title, table.header, table.rows)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{COMPARISON}-{CONSTRAINED}" if found["constrained"] else COMPARISON  # one must not replace the other
    page = out / f"{name}.html"
    files.write_json(out / f"{name}.json", found)
    drawn = [save(scores_with_intervals(found, shown), out / f"{name}.png")]
    of = f"{counted(found['windows'], 'window')} of {counted(found['recordings'], 'recording')}"
    write_page(page, Page(f"{len(found['models'])} models on {of}", found["notes"], tables, drawn, found))
    console.say(f"comparison {page}")
    return {**found, "report": str(page)}


def notes_of_all(reports: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> list[str]:
    """Return what must be known before a comparison is read: the notes of each report, and of all of them together."""
    notes = [f"{report['name']}: {note}" for report in reports for note in notes_of(report)]
    shown = [metric for metric in metrics if metric.is_shown and not metric.is_drawn]
    constants = [_of_reference(report, shown) for report in reports]
    if any(constant != constants[0] for constant in constants):
        told = ", ".join(f"{one['name']} {said}" for one, said in zip(reports, constants, strict=True))
        notes.append(_OTHER_CONSTANTS.format(reports[0]["reference"], told))
    return [*notes, *([_ONE_PAIR] if len(reports) > 2 else [])]


def _of_reference(report: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    """Return how wrong what a report's column of shares is of is."""
    line = next(line for line in report["conditions"] if line["name"] == report["reference"])
    return " and ".join(f"{number(line[metric.key])} {metric.unit}".rstrip() for metric in metrics)


def tables_of(found: Mapping[str, Any], metric: Metric) -> list[Table]:
    """Return the table of the models and that of their pairs, by one metric; no table of no pairs."""
    header = ["model", "mean", "95 % interval", f"/ {found['reference']}", failures_title(found)]
    rows = [condition_row(line, [metric], header[-1]) for line in found["models"]]
    pairs = [
        [f"{line['other']} - {line['one']}", number(line["difference"], "+.3f"), span(line["interval"], "+.3f"),
         line["says"]]
        for line in found["pairs"] if line["metric"] == metric.key
    ]  # fmt: skip
    title = metric_title(metric)
    of_pairs = Table(f"{title}, at the same windows", ["pair", "mean", *header[2:3], "says"], pairs)
    return [Table(title, header, rows), *([of_pairs] if pairs else [])]


def scores_with_intervals(found: Mapping[str, Any], metrics: Sequence[Metric]) -> Figure:
    """Draw each model's mean and interval, one panel a metric, the first model on top; of who is silent, nothing."""
    models = found["models"]
    figure = Figure(figsize=(5 * len(metrics), 1.2 + 0.5 * len(models)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for place, line in enumerate(reversed(models)):
            if line[metric.key] is None or is_silent_by(line, metric):
                continue
            low, high = line[f"{metric.key}_interval"] or (line[metric.key], line[metric.key])
            axis.plot([low, high], [place, place], "-", color="#2463a8", linewidth=2)
            axis.plot(line[metric.key], place, "o", color="#2463a8")
        axis.set_yticks(range(len(models)), [_end_of(line["name"]) for line in reversed(models)])
        axis.set_ylim(-0.6, len(models) - 0.4)
        axis.set_xlabel(metric_title(metric))
    return figure


def _end_of(name: str) -> str:
    """Return as much of the end of a name as leaves room for the panel beside it: folders may have long ones."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
