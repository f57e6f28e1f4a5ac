"""`omni eval`: what a run knows about recordings it never saw, and whether it knows it from its pictures.

Every metric stands beside what needs no picture (the train set's median, constant velocity) and beside controls: the
same model shown the pictures of another recording, or its first frame again and again, and a twin trained blind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from omni_cli import __version__, files
from omni_cli.errors import DataError
from omni_cli.recipe import BuiltModel, Evaluable, Prediction, Quantity
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.scores import baselines, controls, intervals, metrics
from omni_cli.stages import models, pictures, runs
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.train import TrainableRecipe, check_fit, train_in

BLIND = "blind"
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
    answers: dict[str, metrics.Answers]  # by target column


Pictures = Callable[[int], Tensor]


def evaluate(recipe: Any, run: runs.Run, request: EvalRequest, console: Console) -> dict[str, Any]:
    """Measure a finished run, unless its sealed report answers the very same question.

    Raises:
        DataError: there is nothing to measure on, it was trained on, or the base is not the adapter's.
        OmniError: another process is training or measuring this run.
    """
    own = _own_shards(run)
    shards = open_shards(request.shards) if request.shards else own
    if shards is None:
        raise DataError(f"the shards of run {run.name} are gone or were made anew; name others with --shards")
    check_fit(recipe, shards, run.manifest.profile)
    split = request.split or ("val" if _is_own(run, shards) else "all")
    twin_learns_from = own if request.blind and not recipe.train.blind else None
    facts = _facts(run, shards, split, blind=twin_learns_from is not None)
    folder = run.folder / EVAL
    with files.exclusive(run.folder, "measuring"):
        if models.made_from(folder, **facts):
            console.say(f"{folder} answers for these weights, shards and split; nothing to do")
        else:
            _measure(recipe, run, _dataset(shards, split, recipe, console), twin_learns_from, console)
            runs.seal_folder(folder, **facts)
    return _result(run, shards, folder, recipe.quantities, console)


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
    conditions += _baselines(recipe, dataset, learned)
    report = _report(recipe, run, dataset, conditions, learned)
    _publish(run.folder / EVAL, run, dataset, conditions[0], report, quantities=recipe.quantities)


def _is_own(run: runs.Run, shards: ShardSet) -> bool:
    return shards.manifest.fingerprint == run.manifest.shards.fingerprint


def _own_shards(run: runs.Run) -> ShardSet | None:
    """Return the shards that a run learned from, if they are still there and still those."""
    folder = Path(run.manifest.shards.folder)
    shards = open_shards(folder) if folder.is_dir() else None
    return shards if shards and _is_own(run, shards) else None


def _facts(run: runs.Run, shards: ShardSet, split: str, *, blind: bool) -> dict[str, Any]:
    """Return what a report depends on: another of these, another report."""
    weights, fingerprint = models.weights_key(run), shards.manifest.fingerprint
    return {"version": __version__, "run_weights": weights, "shards": fingerprint, "split": split, "blind": blind}


def _result(
    run: runs.Run, shards: ShardSet, folder: Path, quantities: Sequence[Quantity], console: Console
) -> dict[str, Any]:
    """Show a published report, and return it with the paths as they are now."""
    report = {**files.read_json(folder / REPORT_FILE), "run": str(run.folder), "shards": str(shards.folder)}
    marked = " (split by time inside each recording)" if report["split_rule"] == "time" else ""
    title = f"{run.name} on {report['windows']} windows of {report['recordings']} recordings{marked}"
    console.table(title, *table_of(report, quantities))
    if unreadable := report["conditions"][0]["unreadable"]:
        console.warn(f"{unreadable:.1%} of the model's answers could not be read; they count as the constant median")
    page, drawn = folder / "report.html", sorted(folder.glob("*.png"))
    console.say(f"report {page}")
    return {**report, "report": str(page), "pictures": [str(path) for path in drawn]}


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
        found = f"{len(shared)} recordings, or others of their drives, were trained on, first {min(shared)}"
        raise DataError(f"{dataset.shards.folder}, split {dataset.split}: {found}; evaluate on others")


def _conditions(recipe: Any, run: runs.Run, dataset: WindowDataset, console: Console) -> list[Condition]:
    asker = Asker(recipe, _load(recipe, dataset.preprocess, run.final), dataset, console)
    groups = _groups(dataset)
    shown: dict[str, Pictures] = {"model": dataset.canvases}
    if len(set(groups)) > 1:
        swapped = controls.swap_between_groups(groups)
        shown["pictures swapped"] = lambda index: dataset.canvases(int(swapped[index]))
    else:
        console.warn(f"no control with swapped pictures: all windows are of {_BLOCK_US / 1e6:g} s of one recording")
    shown["first frame repeated"] = lambda index: dataset.canvases(index)[:1].expand(
        dataset.preprocess.num_frames, -1, -1, -1
    )
    return [asker.ask(name, see) for name, see in shown.items()]


def _load(recipe: Any, preprocess: Preprocess, weights: Path) -> BuiltModel:
    placed: BuiltModel = recipe.place(recipe.load(preprocess, weights), models.best_device(), None)
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
    return Asker(twin, built, dataset, console).ask("trained blind", dataset.canvases)


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
                rows = [{**self.dataset.row(index), "canvases": see(index)} for index in block]
                said += self.recipe.predict(self.built, rows, self.dataset.preprocess)
                bar.advance(len(block))
        return _condition(name, self.recipe.quantities, self.dataset, [prediction.values for prediction in said])


def _condition(name: str, quantities: Sequence[Quantity], dataset: WindowDataset, values: Sequence[Any]) -> Condition:
    rows = [dataset.row(index) for index in range(len(dataset))]
    recordings = [row["recording"] for row in rows]
    answers = {
        quantity.column: metrics.collect(quantity.column, values, [row[quantity.column] for row in rows], recordings)
        for quantity in quantities
    }
    return Condition(name, answers)


def _baselines(recipe: Any, dataset: WindowDataset, learned: runs.Learned) -> list[Condition]:
    columns = [quantity.column for quantity in recipe.quantities]
    medians = {column: learned.medians[column] for column in columns}
    result = [_condition("constant median", recipe.quantities, dataset, [medians] * len(dataset))]
    if dataset.preprocess.past_speed:
        rows = [dataset.row(index) for index in range(len(dataset))]
        speed = np.array([row["start_speed_mps"] for row in rows])
        duration = np.array([(row["end_us"] - row["start_us"]) / 1e6 for row in rows])
        said = {column: baselines.constant_velocity(column, speed, duration) for column in columns}
        values = [{column: float(said[column][i]) for column in columns} for i in range(len(rows))]
        result.append(_condition("constant velocity", recipe.quantities, dataset, values))
    return result


def _report(
    recipe: Any, run: runs.Run, dataset: WindowDataset, conditions: Sequence[Condition], learned: runs.Learned
) -> dict[str, Any]:
    manifest = dataset.shards.manifest
    return {
        "run": str(run.folder),
        "recipe": recipe.name,
        "shards": str(dataset.shards.folder),
        "split": dataset.split,
        "split_rule": manifest.split_rule,
        "windows": len(dataset),
        "recordings": len(dataset.entries),
        "learned_from": {"windows": learned.windows, "recordings": len(learned.recordings)},
        "conditions": [
            {"name": condition.name, **_scores(condition, recipe.quantities, learned)} for condition in conditions
        ],
    }


def _scores(condition: Condition, quantities: Sequence[Quantity], learned: runs.Learned) -> dict[str, Any]:
    first = condition.answers[quantities[0].column]
    scores: dict[str, Any] = {"unreadable": first.unreadable}
    for quantity in quantities:
        answers, median = condition.answers[quantity.column], learned.medians[quantity.column]
        errors = metrics.absolute_errors(answers, median)
        constant = float(np.abs(answers.truth - median).mean())
        scores[f"{quantity.title}_mae"] = float(errors.mean())
        scores[f"{quantity.title}_interval"] = intervals.interval_by_recording(errors, answers.recordings)
        scores[f"{quantity.title}_of_constant"] = float(errors.mean()) / constant if constant else None
    return scores


def _publish(
    folder: Path,
    run: runs.Run,
    dataset: WindowDataset,
    model: Condition,
    report: dict[str, Any],
    *,
    quantities: Sequence[Quantity],
) -> None:
    """Write the numbers and the pictures beside the run."""
    files.receipt_path(folder).unlink(missing_ok=True)
    files.write_json(folder / REPORT_FILE, report)
    drawn = pictures.evaluation_pictures(folder, run.folder, dataset, model.answers, quantities)
    pictures.write_html(folder / "report.html", report, *table_of(report, quantities), drawn)


def table_of(report: dict[str, Any], quantities: Sequence[Quantity]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of an evaluation's table."""
    header = ["condition"]
    for quantity in quantities:
        header += [f"{quantity.title} MAE [{quantity.unit}]", "95 % interval", "/ constant"]
    header.append("unreadable")
    return header, [_table_row(scores, quantities) for scores in report["conditions"]]


def _table_row(scores: dict[str, Any], quantities: Sequence[Quantity]) -> list[str]:
    row = [scores["name"]]
    for quantity in quantities:
        interval, ratio = scores[f"{quantity.title}_interval"], scores[f"{quantity.title}_of_constant"]
        row.append(f"{scores[f'{quantity.title}_mae']:.2f}")
        row.append("n/a" if interval is None else f"{interval[0]:.2f} .. {interval[1]:.2f}")
        row.append("n/a" if ratio is None else f"{ratio:.2f}")
    return [*row, f"{scores['unreadable']:.1%}"]
