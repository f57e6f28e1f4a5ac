"""What people are shown of an evaluation: tables, and sentences that must not be overlooked."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_cli.recipe import Metric
from omni_cli.report import Console, counted
from omni_cli.stages.evaluate.request import CAMERAS_SHUFFLED, MODEL, SWAPPED, TIME_SHUFFLED

_HARDLY = 0.05  # worse is what the pictures of somewhere else cost a model that hardly looks
_SILENT = (
    "{}: no answer could be read, of {} in all; what follows is no score of it; train it longer, or look at what it "
    "says with: omni infer"
)
_UNKNOWN = (
    "nobody can say what {} learned from: no recording of these could be checked for having been trained on, and the "
    "constant is that of {}"
)
_CHOSEN = "the weights were chosen by their loss on this very split, {}: what follows flatters them a little"
_HELD = "answers were held to their format, so that each could be read: "
_FORCED = "{:.1%} had to be forced, at {:.1%} of all tokens, and are scored as if the model had said them of itself"
_NO_ANSWER = ["no answer", "n/a", "n/a"]
_OF_ORDER = {  # what a shuffled axis tells of a model that does look
    TIME_SHUFFLED: "the order of the frames hardly matters to it, which a model of motion would need",
    CAMERAS_SHUFFLED: "which camera sees what hardly matters to it",
}


def is_silent(report: Mapping[str, Any]) -> bool:
    """Say whether none of a model's answers could be read: its numbers are the reference's, and no score of it."""
    return float(report["conditions"][0]["unreadable"]) == 1.0


def is_silent_by(scores: Mapping[str, Any], metric: Metric) -> bool:
    """Say whether none of the answers that a metric is of could be read: its number would be no score."""
    return float(scores.get(_share_of(metric), 0.0)) == 1.0


def _share_of(metric: Metric, what: str = "unreadable") -> str:
    return f"drawn_{what}" if metric.is_drawn else what


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """Return what must be known before a report is read."""
    source = report.get("run", report.get("model"))
    notes = [_SILENT.format(source, report["windows"])] if is_silent(report) else []
    if report["learned_from"] is None:
        notes.append(_UNKNOWN.format(source, report["constant_of"]))
    if report["chosen_on"]:
        notes.append(_CHOSEN.format(report["chosen_on"]))
    model = report["conditions"][0]
    if counts_forced(report):
        forced = _FORCED.format(model["forced"], model["off_grammar"]) if model["forced"] else "none had to be forced"
        notes.append(_HELD + forced)
    if model["unreadable"] and not is_silent(report):
        notes.append(
            f"{model['unreadable']:.1%} of the answers could not be read; they count as the {report['reference']}"
        )
    if failed := model.get("drawn_unreadable"):
        notes.append(_of_drawn(failed, report["temperature"]))
    return notes


def _of_drawn(failed: float, temperature: float) -> str:
    if failed == 1.0:
        return f"none of the answers drawn at temperature {temperature:g} could be read: no number is a score of them"
    return f"{failed:.1%} of the answers drawn at temperature {temperature:g} could not be read"


def counts_forced(report: Mapping[str, Any]) -> bool:
    """Say whether answers were held to their format, where none is unreadable and some are forced."""
    return bool(report.get("constrained"))  # reports of 0.6 do not know of it


def failures_title(report: Mapping[str, Any]) -> str:
    """Return the title of a table's last column: what share of the answers was not the model's own, or no answer."""
    return "forced" if counts_forced(report) else "unreadable"


def title_of(report: Mapping[str, Any]) -> str:
    """Return the title of a report's tables."""
    marked = " (split by time inside each recording)" if report["split_rule"] == "time" else ""
    of = f"{counted(report['windows'], 'window')} of {counted(report['recordings'], 'recording')}"
    return f"{report['name']} on {of}{marked}"


def verdicts(report: Mapping[str, Any], metric: Metric) -> list[str]:
    """Return what a reader must not overlook: that pictures hardly matter, or that what sees nothing does as well.

    Of a model that said nothing there is nothing to judge.

    Args:
        report: of an evaluation.
        metric: by which to judge; less is better.
    """
    if is_silent(report):
        return []
    of = {line["name"]: line[metric.key] for line in report["conditions"]}
    model, reference = of[MODEL], of.get(report["reference"])
    said = [] if model is None else _of_pictures(of, model, metric, _whose(report["recordings"]))
    if None not in (model, reference) and reference <= model:
        said.append(f"no better than {report['reference']}, which sees nothing: {model:.2f} and {reference:.2f}")
    if model is not None and report["conditions"][0][f"{metric.key}_interval"] is None:
        said.append(f"no intervals: they need several recordings, {_how_few(report['recordings'])}")
    return said


def _how_few(recordings: int) -> str:
    return "this is 1" if recordings == 1 else f"of {recordings} one alone counts in it"


def _whose(recordings: int) -> str:
    """Return whose pictures a model was shown in place of its own; see `conditions`."""
    return "another stretch of the same drive" if recordings == 1 else "another drive"


def _of_pictures(of: Mapping[str, float | None], model: float, metric: Metric, whose: str) -> list[str]:
    """Return whether pictures matter; of a model that hardly looks, their order need not be told as well."""

    def cost_little(name: str) -> bool:
        error = of.get(name)
        return error is not None and error <= model * (1 + _HARDLY)

    if cost_little(SWAPPED):
        shown = f"{model:.2f} {metric.unit} with the right pictures, {of[SWAPPED]:.2f} with those of {whose}"
        return [f"the answers hardly depend on the pictures: {metric.title} is {shown}"]
    return [
        f"{why}: {metric.title} is {model:.2f} {metric.unit}, and {of[name]:.2f} with {name}"
        for name, why in _OF_ORDER.items()
        if cost_little(name)
    ]


def show_scores(title: str, report: Mapping[str, Any], metrics: Sequence[Metric], console: Console) -> None:
    """Show a table for each metric that people are shown: side by side they would not fit a terminal."""
    for metric in metrics:
        if metric.is_shown:
            (condition, name, *others), rows = table_of(report, [metric])
            console.table(f"{title}: {name}", [condition, "mean", *others], rows)


def show_strata(title: str, report: Mapping[str, Any], metrics: Sequence[Metric], console: Console) -> None:
    """Show how the first metric that people are shown is in each stratum."""
    metric = next(metric for metric in metrics if metric.is_shown)
    if report["strata"]:
        header, rows = strata_table(report, [metric])
        console.table(f"{title}, {MODEL}: {header[3]}", [*header[:3], "mean", *header[4:]], rows)


def table_of(report: Mapping[str, Any], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of an evaluation's table."""
    last = failures_title(report)
    header = ["condition", *_columns(report, metrics), last]
    return header, [condition_row(scores, metrics, last) for scores in report["conditions"]]


def strata_table(report: Mapping[str, Any], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of strata."""
    header = ["stratum", "windows", "recordings", *_columns(report, metrics)]
    model = report["conditions"][0]
    return header, [_stratum_row(model, scores, metrics) for scores in report["strata"]]


def condition_row(scores: Mapping[str, Any], metrics: Sequence[Metric], last: str = "unreadable") -> list[str]:
    """Return the row of a model, a control or a baseline; the numbers of who said nothing would be the reference's.

    What could not be read, or was forced, as `last` says, is told of the answers that the metrics are of; of a control
    none are drawn, and a baseline is never forced.
    """
    cells = [
        cell
        for metric in metrics
        for cell in (_NO_ANSWER if is_silent_by(scores, metric) else _scores_cells(scores, metric))
    ]
    return [scores["name"], *cells, number(scores.get(_share_of(metrics[0], last)), ".1%")]


def metric_title(metric: Metric) -> str:
    """Return a metric with its unit."""
    return f"{metric.title} [{metric.unit}]" if metric.unit else metric.title


def _scores_cells(scores: Mapping[str, Any], metric: Metric) -> list[str]:
    """Return a metric's mean, its interval and its share of the reference."""
    key = metric.key
    return [number(scores[key]), span(scores[f"{key}_interval"]), number(scores[f"{key}_of_reference"])]


def number(value: float | None, form: str = ".2f") -> str:
    """Return a number for people."""
    return "n/a" if value is None else format(value, form)


def span(interval: Sequence[float] | None, form: str = ".2f") -> str:
    """Return an interval for people."""
    return "n/a" if interval is None else f"{interval[0]:{form}} .. {interval[1]:{form}}"


def _columns(report: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    of_each = [(metric_title(metric), "95 % interval", f"/ {report['reference']}") for metric in metrics]
    return [name for names in of_each for name in names]


def _stratum_row(model: Mapping[str, Any], scores: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    begins = [f"{scores['strata']}: {scores['name']}", str(scores["windows"]), str(scores["recordings"])]
    return [*begins, *(cell for metric in metrics for cell in _stratum_cells(model, scores, metric))]


def _stratum_cells(model: Mapping[str, Any], scores: Mapping[str, Any], metric: Metric) -> list[str]:
    """Return a metric in a stratum; `too few` are windows that count in it, `n/a` is where none does."""
    if is_silent_by(model, metric):
        return _NO_ANSWER
    is_too_few = scores[metric.key] is None and scores[f"{metric.key}_windows"]
    return ["too few", "n/a", "n/a"] if is_too_few else _scores_cells(scores, metric)
