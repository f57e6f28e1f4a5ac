"""`omni eval`: what a run knows about recordings it never saw, and whether it knows it from its pictures.

Every metric stands beside what needs no picture (the train set's median, constant velocity) and beside controls: the
same model shown the pictures of another recording, or its first frame again and again, and a twin trained blind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from omni_cli import __version__, files
from omni_cli.errors import DataError
from omni_cli.recipe import BuiltModel, Evaluable, Metric, Pair, Prediction, Row
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.scene.clock import Float64Array
from omni_cli.scores import controls, intervals
from omni_cli.stages import models, pictures, runs
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.fitting import check_fit
from omni_cli.stages.raw_lock import reading
from omni_cli.stages.train import TrainableRecipe, train_in

BLIND = "blind"
SWAPPED = "pictures swapped"
_HARDLY = 0.05  # worse is what the pictures of another drive cost a model that hardly looks
_SILENT = (
    "{run}: no answer could be read, of {windows} in all; what follows is no score of it; train it longer, or look at "
    "what it says with: omni infer"
)
EVAL = "eval"  # the folder of a run's report
REPORT_FILE = "report.json"
_BATCH = 32
_BLOCK_US = 5_000_000  # of one recording: where there is no other, pictures are swapped between stretches of it


@runtime_checkable
class EvaluableRecipe(TrainableRecipe, Evaluable, Protocol):
    """What `eval` needs a recipe to be."""


@dataclass(frozen=True)
class EvalRequest:
    """What a user asked of `omni eval`."""

    shards: Path | None = None  # None: those the run was trained on
    split: str | None = None  # None: val of its own shards, every window of others
    blind: bool = True  # train the blind twin if it is not there


@dataclass(frozen=True)
class Condition:
    """One row of the table: a name, and what was said of each window."""

    name: str
    predictions: Sequence[Prediction]


Pictures = Callable[[int], Tensor]
Errors = Mapping[str, Float64Array]


def evaluate(recipe: Any, run: runs.Run, request: EvalRequest, console: Console) -> dict[str, Any]:
    """Measure a finished run, unless its sealed report answers the very same question.

    Raises:
        DataError: there is nothing to measure on, it was trained on, or the base is not the adapter's.
        OmniError: another process is training or measuring this run, or is taking the shards away.
    """
    own = _own_shards(run, are_needed=request.shards is None)
    shards = open_shards(request.shards) if request.shards else own
    if shards is None:
        raise DataError(f"the shards of run {run.name} are gone or were made anew; name others with --shards")
    check_fit(recipe, shards, run.manifest.profile, is_to_measure=True)
    _say_filters(run, shards, console)
    split = request.split or ("val" if _is_own(run, shards) else "all")
    wants_twin = request.blind and not recipe.train.blind
    if wants_twin and own is None:
        console.warn("no twin trained blind: the shards that the run learned from are gone or were made anew")
    twin_learns_from = own if wants_twin else None
    facts = _facts(run, shards, split, blind=twin_learns_from is not None)
    folder = run.folder / EVAL
    learned_from = own or shards
    with reading(shards.folder), reading(learned_from.folder), files.exclusive(run.folder, "measuring"):
        if models.made_from(folder, **facts):
            console.say(f"{folder} answers for these weights, shards and split; nothing to do")
        else:
            _measure(recipe, run, _dataset(shards, split, recipe, console), twin_learns_from, console)
            runs.seal_folder(folder, **facts)
    return _result(run, shards, folder, recipe, console)


def _measure(
    recipe: Any, run: runs.Run, dataset: WindowDataset, twin_learns_from: ShardSet | None, console: Console
) -> None:
    """Put every question to the model and its controls, and write the report."""
    learned = run.learned()
    check_leak(dataset, learned, is_own=_is_own(run, dataset.shards))
    models.check_base(recipe, run)
    conditions = _conditions(recipe, run, dataset, console)
    if twin_learns_from is not None:
        conditions.append(_blind_twin(recipe, run, twin_learns_from, dataset, console))
    rows = [dataset.row(index) for index in range(len(dataset))]
    said = recipe.baselines(rows, learned.medians)
    conditions += [Condition(name, predictions) for name, predictions in said.items()]
    report = _report(recipe, run, dataset, Scored(recipe, rows, learned, conditions))
    _publish(run, dataset, report, recipe, recipe.pairs(conditions[0].predictions, rows))


def _is_own(run: runs.Run, shards: ShardSet) -> bool:
    return shards.manifest.fingerprint == run.manifest.shards.fingerprint


def _say_filters(run: runs.Run, shards: ShardSet, console: Console) -> None:
    """Say where other steps are measured than those that were learned from."""
    learned, measured = run.manifest.preprocess, shards.manifest.preprocess
    for name in learned.filters:
        if (here := getattr(measured, name)) != (there := getattr(learned, name)):
            console.say(f"measuring with {name} {here}, as shards {shards.folder} are; the run learned with {there}")


def _own_shards(run: runs.Run, *, are_needed: bool) -> ShardSet | None:
    """Return the shards that a run learned from, if they are still there and still those.

    Raises:
        DataError: they are damaged or of an older format, and needed.
    """
    folder = Path(run.manifest.shards.folder)
    try:
        shards = open_shards(folder) if folder.is_dir() else None
    except DataError:
        if are_needed:
            raise
        return None
    return shards if shards and _is_own(run, shards) else None


def _facts(run: runs.Run, shards: ShardSet, split: str, *, blind: bool) -> dict[str, Any]:
    """Return what a report depends on: another of these, another report."""
    weights, fingerprint = models.weights_key(run), shards.manifest.fingerprint
    return {"version": __version__, "run_weights": weights, "shards": fingerprint, "split": split, "blind": blind}


def _result(run: runs.Run, shards: ShardSet, folder: Path, recipe: Any, console: Console) -> dict[str, Any]:
    """Show a published report, and return it with the paths as they are now."""
    report = {**files.read_json(folder / REPORT_FILE), "run": str(run.folder), "shards": str(shards.folder)}
    marked = " (split by time inside each recording)" if report["split_rule"] == "time" else ""
    of = f"{counted(report['windows'], 'window')} of {counted(report['recordings'], 'recording')}"
    title = f"{run.name} on {of}{marked}"
    if is_silent(report):
        console.warn(_SILENT.format(**report))
    show_scores(title, report, recipe.metrics, console)
    unreadable = report["conditions"][0]["unreadable"]
    if unreadable and not is_silent(report):
        console.warn(f"{unreadable:.1%} of the answers could not be read; they count as the {recipe.reference}")
    for line in verdicts(report, next(metric for metric in recipe.metrics if metric.is_shown)):
        console.warn(line)
    page, drawn = folder / "report.html", sorted(folder.glob("*.png"))
    console.say(f"report {page}")
    return {**report, "report": str(page), "pictures": [str(path) for path in drawn]}


def is_silent(report: Mapping[str, Any]) -> bool:
    """Say whether none of a model's answers could be read: its numbers are the reference's, and no score of it."""
    return float(report["conditions"][0]["unreadable"]) == 1.0


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
    model, swapped, reference = of["model"], of.get(SWAPPED), of.get(report["reference"])
    said = []
    if None not in (model, swapped) and swapped <= model * (1 + _HARDLY):
        shown = f"{model:.2f} {metric.unit} with the right pictures, {swapped:.2f} with those of another drive"
        said.append(f"the answers hardly depend on the pictures: {metric.title} is {shown}")
    if None not in (model, reference) and reference <= model:
        said.append(f"no better than {report['reference']}, which sees nothing: {model:.2f} and {reference:.2f}")
    if report["conditions"][0][f"{metric.key}_interval"] is None:
        said.append(f"no intervals: they need several recordings, this is {report['recordings']}")
    return said


def _dataset(shards: ShardSet, split: str, recipe: Any, console: Console) -> WindowDataset:
    dataset = WindowDataset(shards, split, ensure_sidecar(shards, recipe, console))
    if not len(dataset):
        raise DataError(f"{shards.folder}: no window in split {split!r}; it has {_splits(shards)}")
    return dataset


def _splits(shards: ShardSet) -> str:
    names = sorted({name for entry in shards.manifest.recordings for name in entry.windows})
    return ", ".join(f"{name} ({shards.manifest.count(name)})" for name in names)


def check_leak(dataset: WindowDataset, learned: runs.Learned, *, is_own: bool) -> None:
    """Refuse to measure on what was learned.

    A split by time shares its recordings and is marked as such; only the run's own shards know where it was cut.

    Raises:
        DataError: a recording was trained on, or another part of its drive.
    """
    if is_own and dataset.split == "val" and dataset.shards.manifest.split_rule == "time":
        return
    shared = {entry.id for entry in dataset.entries} & set(learned.recordings)
    shared |= {entry.id for entry in dataset.entries if entry.group and entry.group in learned.groups}
    if shared:
        found = f"trained on: {counted(len(shared), 'recording')}, or others of their drives, first {min(shared)}"
        raise DataError(f"{dataset.shards.folder}, split {dataset.split}: {found}; evaluate on others")


def _conditions(recipe: Any, run: runs.Run, dataset: WindowDataset, console: Console) -> list[Condition]:
    asker = Asker(recipe, _load(recipe, dataset.preprocess, run.final), dataset, console)
    groups = _groups(dataset)
    shown: dict[str, Pictures] = {"model": dataset.pictures}
    if len(set(groups)) > 1:
        swapped = controls.swap_between_groups(groups)
        shown[SWAPPED] = lambda index: dataset.pictures(int(swapped[index]))
    else:
        console.warn(f"no control with swapped pictures: all windows are of {_BLOCK_US / 1e6:g} s of one recording")
    shown["first frame repeated"] = lambda index: dataset.pictures(index)[:1].expand(dataset.preprocess.window_shape)
    return [asker.ask(name, see) for name, see in shown.items()]


def _load(recipe: Any, preprocess: Preprocess, weights: Path) -> BuiltModel:
    placed: BuiltModel = recipe.place(recipe.load(preprocess, weights), models.ready_device(), None)
    return placed


def _groups(dataset: WindowDataset) -> list[str]:
    if len(dataset.entries) > 1:
        return [dataset.recording_of(index) for index in range(len(dataset))]
    return [str(dataset.row(index)["start_us"] // _BLOCK_US) for index in range(len(dataset))]


def _blind_twin(recipe: Any, run: runs.Run, own: ShardSet, dataset: WindowDataset, console: Console) -> Condition:
    """Train the same recipe on the same rows with every picture grey, and ask it."""
    twin = recipe.model_copy(update={"train": recipe.train.model_copy(update={"blind": True})})
    folder = run.folder / BLIND
    with files.exclusive(folder, "training in"):
        train_in(folder, twin, own, run.manifest.profile, console)
    built = _load(twin, dataset.preprocess, folder / runs.FINAL)
    return Asker(twin, built, dataset, console).ask("trained blind", dataset.pictures)


@dataclass(frozen=True)
class Asker:
    """Puts every window of a dataset to one model."""

    recipe: Any
    built: BuiltModel
    dataset: WindowDataset
    console: Console

    def ask(self, name: str, see: Pictures) -> Condition:
        """Ask about each window while showing what `see` returns for it."""
        said: list[Prediction] = []
        with self.console.progress(f"eval: {name}", len(self.dataset), "windows") as bar:
            for start in range(0, len(self.dataset), _BATCH):
                block = range(start, min(start + _BATCH, len(self.dataset)))
                rows = [{**self.dataset.row(index), "pictures": see(index)} for index in block]
                said += self.recipe.predict(self.built, rows, self.dataset.preprocess)
                bar.advance(len(block))
        return Condition(name, said)


@dataclass(frozen=True)
class Scored:
    """How wrong each condition is, beside the reference."""

    recipe: Any
    rows: Sequence[Row]
    learned: runs.Learned
    conditions: Sequence[Condition]

    def lines(self) -> list[dict[str, Any]]:
        """Return the scores of each condition, as a report holds them."""
        errors = {one.name: self._errors(one) for one in self.conditions}
        reference = errors[self.recipe.reference]
        return [self._line(one, errors[one.name], reference) for one in self.conditions]

    def _errors(self, condition: Condition) -> Errors:
        errors: Errors = self.recipe.errors(condition.predictions, self.rows, self.learned.medians)
        return errors

    def _line(self, condition: Condition, errors: Errors, reference: Errors) -> dict[str, Any]:
        recordings = np.array([row["recording"] for row in self.rows])
        unreadable = float(np.mean([prediction.values is None for prediction in condition.predictions]))
        line: dict[str, Any] = {"name": condition.name, "unreadable": unreadable}
        for metric in self.recipe.metrics:
            is_compared = np.isfinite(reference[metric.key])
            is_compared |= not is_compared.any()  # what the reference never states stands by itself
            both = np.isfinite(errors[metric.key]) & is_compared
            values, against = errors[metric.key][both], reference[metric.key][both]
            line |= _summary(metric.key, values, against, recordings[both].tolist())
        return line


def _summary(key: str, values: Float64Array, reference: Float64Array, recordings: Sequence[str]) -> dict[str, Any]:
    """Return a metric's mean over windows, its interval and its share of the reference's; None where nothing counts."""
    if not len(values):
        return {key: None, f"{key}_interval": None, f"{key}_of_reference": None, f"{key}_windows": 0}
    return {
        key: float(values.mean()),
        f"{key}_interval": intervals.interval_by_recording(values, recordings),
        f"{key}_of_reference": float(values.mean() / reference.mean()) if reference.mean() > 0 else None,
        f"{key}_windows": len(values),
    }


def _report(recipe: Any, run: runs.Run, dataset: WindowDataset, scored: Scored) -> dict[str, Any]:
    manifest, learned = dataset.shards.manifest, scored.learned
    return {
        "run": str(run.folder),
        "recipe": recipe.name,
        "shards": str(dataset.shards.folder),
        "split": dataset.split,
        "split_rule": manifest.split_rule,
        "windows": len(dataset),
        "recordings": len(dataset.entries),
        "learned_from": {"windows": learned.windows, "recordings": len(learned.recordings)},
        "reference": recipe.reference,
        "conditions": scored.lines(),
    }


def _publish(run: runs.Run, dataset: WindowDataset, report: dict[str, Any], recipe: Any, pairs: Sequence[Pair]) -> None:
    """Write the numbers and the pictures beside the run."""
    folder = run.folder / EVAL
    files.receipt_path(folder).unlink(missing_ok=True)
    files.write_json(folder / REPORT_FILE, report)
    drawn = pictures.evaluation_pictures(folder, run.folder, dataset, pairs)
    note = _SILENT.format(**report) if is_silent(report) else ""
    pictures.write_html(folder / "report.html", report, *table_of(report, recipe.metrics), drawn, note=note)


def show_scores(title: str, report: dict[str, Any], metrics: Sequence[Metric], console: Console) -> None:
    """Show a table for each metric that people are shown: side by side they would not fit a terminal."""
    for metric in metrics:
        if metric.is_shown:
            (condition, name, *others), rows = table_of(report, [metric])
            console.table(f"{title}: {name}", [condition, "mean", *others], rows)


def table_of(report: dict[str, Any], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of an evaluation's table."""
    header = ["condition"]
    for metric in metrics:
        header += [
            f"{metric.title} [{metric.unit}]" if metric.unit else metric.title,
            "95 % interval",
            f"/ {report['reference']}",
        ]
    header.append("unreadable")
    return header, [_table_row(scores, metrics) for scores in report["conditions"]]


def _table_row(scores: dict[str, Any], metrics: Sequence[Metric]) -> list[str]:
    row = [scores["name"]]
    if scores["unreadable"] == 1.0:  # the numbers would be those of the reference
        return [*row, *["no answer", "n/a", "n/a"] * len(metrics), "100.0%"]
    for key in [metric.key for metric in metrics]:
        interval = scores[f"{key}_interval"]
        row.append(_number(scores[key]))
        row.append("n/a" if interval is None else f"{interval[0]:.2f} .. {interval[1]:.2f}")
        row.append(_number(scores[f"{key}_of_reference"]))
    return [*row, f"{scores['unreadable']:.1%}"]


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
