"""One model measured: every question put to it and to its controls, and the report written, unless it is there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from omni_cli import __version__, files
from omni_cli.errors import DataError, UsageError
from omni_cli.recipe import BuiltModel, Drawable, Formatted, Pair, Row, require
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages import models, pictures, runs
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.evaluate.asking import Asker, Condition
from omni_cli.stages.evaluate.candidates import Candidate, candidate_of_run, is_own, placed
from omni_cli.stages.evaluate.conditions import shown
from omni_cli.stages.evaluate.page import write_report_page
from omni_cli.stages.evaluate.request import (
    BLIND,
    CONSTRAINED,
    PAGE,
    REPORT_FILE,
    TRAINED_BLIND,
    WINDOWS_FILE,
    EvalRequest,
)
from omni_cli.stages.evaluate.scored import Scored, metrics_of
from omni_cli.stages.evaluate.tables import notes_of, show_scores, show_strata, title_of, verdicts
from omni_cli.stages.fitting import check_fit, own_shards
from omni_cli.stages.origins import origin_of_shards
from omni_cli.stages.raw_lock import reading
from omni_cli.stages.train import train_in

_FORMAT = 3  # of a report; 1 had neither strata nor windows, 2 did not say whose data they are


def evaluate(recipe: Any, run: runs.Run, request: EvalRequest, console: Console) -> dict[str, Any]:
    """Measure a finished run; raises as `measure`."""
    return measure(candidate_of_run(recipe, run), request, console)


def measure(candidate: Candidate, request: EvalRequest, console: Console) -> dict[str, Any]:
    """Measure a model, unless its sealed report answers the very same question.

    Raises:
        UsageError: windows do not fit the model or are not named, or its recipe cannot draw answers by chance.
        DataError: there is nothing to measure on, it was trained on, or the base is not the adapter's.
        OmniError: another process is training or measuring this run, or is taking the shards away.
    """
    return answer(open_session(candidate, request, console))


def answer(session: "Session") -> dict[str, Any]:
    """Measure a model on windows that were checked, unless its sealed report answers the very same question.

    Raises:
        DataError: the base is not the adapter's.
        OmniError: another process is training or measuring this run, or is taking the shards away.
    """
    out = session.candidate.out
    with session.held():
        if models.made_from(out, **session.facts()):
            session.console.say(f"{out} answers for these weights, shards and split; nothing to do")
        else:
            session.measure()
            runs.seal_folder(out, **session.facts())
    return _result(session)


@dataclass(frozen=True)
class Session:
    """A candidate and the windows that it is asked about."""

    candidate: Candidate
    request: EvalRequest
    shards: ShardSet
    split: str
    own: ShardSet | None  # what it learned from, where that is still there
    console: Console

    @property
    def _has_twin(self) -> bool:
        return self.request.blind and self.candidate.is_run and self.own is not None and not self._is_blind

    @property
    def _is_blind(self) -> bool:
        return bool(self.candidate.recipe.train.blind)

    def facts(self) -> dict[str, Any]:
        """Return what a report depends on: another of these, another report."""
        asked = self.request
        return {
            "version": __version__,
            "format": _FORMAT,
            "run_weights": self.candidate.key,
            "shards": self.shards.manifest.fingerprint,
            "split": self.split,
            "blind": self._has_twin,
            "controls": asked.controls,
            "samples": asked.samples,
            "temperature": asked.temperature if asked.samples else None,
            "constrained": asked.constrained or None,  # nothing, as in receipts that do not know of it
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from taking away or changing what is measured."""
        learned_from, held = self.own or self.shards, self.candidate.held
        with reading(self.shards.folder), reading(learned_from.folder), files.exclusive(held, "measuring"):
            yield

    def check(self) -> None:
        """Refuse windows that were learned from, and tell what cannot be checked or had.

        Raises:
            DataError: there are none, or they were learned from.
        """
        dataset, learned = WindowDataset(self.shards, self.split), self.candidate.learned()
        if not len(dataset):
            raise DataError(f"{self.shards.folder}: no window in split {self.split!r}; it has {_splits(self.shards)}")
        if learned is not None:  # else the report says that nobody knows
            check_leak(dataset, learned, is_own=is_own(self.candidate, self.shards))
        if self.request.blind and self.candidate.is_run and not self._is_blind and self.own is None:
            self.console.warn("no twin trained blind: the shards that the run learned from are gone or were made anew")

    def measure(self) -> None:
        """Put every question to the model and its controls, and write the report."""
        candidate, recipe = self.candidate, self.candidate.recipe
        dataset = WindowDataset(self.shards, self.split, ensure_sidecar(self.shards, recipe, self.console))
        medians, of = candidate.medians(dataset)
        conditions = self._conditions(dataset)
        if self._has_twin:
            conditions.append(self._blind_twin(dataset))
        rows = [dataset.row(index) for index in range(len(dataset))]
        conditions += self._baselines(rows, medians)
        scored = Scored(recipe, rows, medians, conditions, self.request.samples)
        pairs = recipe.pairs(conditions[0].predictions, rows)
        self._publish(dataset, {**self._report(dataset), "constant_of": of}, scored, pairs)

    def _conditions(self, dataset: WindowDataset) -> list[Condition]:
        candidate, asked = self.candidate, self.request
        built = self._held(candidate.recipe, candidate.load(dataset.preprocess, self.console), dataset)
        asker = Asker(candidate.recipe, built, dataset, self.console, asked.batch)
        told = [asker.ask(name, see) for name, see in shown(dataset, asked.controls, self.console).items()]
        drawn = [asker.draw(number, asked.samples, asked.temperature) for number in range(asked.samples)]
        return [replace(told[0], drawn=drawn), *told[1:]]

    def _held(self, recipe: Any, built: BuiltModel, dataset: WindowDataset) -> BuiltModel:
        """Return a model that answers as it was asked to: freely, or in the format alone."""
        return recipe.held_to_format(built, dataset.preprocess) if self.request.constrained else built

    def _baselines(self, rows: Sequence[Row], medians: Mapping[str, Any]) -> list[Condition]:
        """Return what needs no picture; whatever is drawn of it is always the same."""
        said = self.candidate.recipe.baselines(rows, medians).items()
        return [Condition(name, those, (those,) if self.request.samples else ()) for name, those in said]

    def _blind_twin(self, dataset: WindowDataset) -> Condition:
        """Train the same recipe on the same rows with every picture grey, and ask it."""
        run, recipe = self.candidate.run, self.candidate.recipe
        assert run is not None  # `_has_twin` says so
        assert self.own is not None
        twin = recipe.model_copy(update={"train": recipe.train.model_copy(update={"blind": True})})
        folder = run.folder / BLIND
        with files.exclusive(folder, runs.TRAINING):
            train_in(folder, twin, self.own, run.manifest.profile, self.console)
        built = self._held(twin, placed(twin, twin.load(dataset.preprocess, folder / runs.FINAL)), dataset)
        return Asker(twin, built, dataset, self.console, self.request.batch).ask(TRAINED_BLIND, dataset.pictures)

    def _report(self, dataset: WindowDataset) -> dict[str, Any]:
        manifest, learned = dataset.shards.manifest, self.candidate.learned()
        origin = origin_of_shards(manifest)
        return {
            **self.candidate.said_in_report(),
            "recipe": self.candidate.recipe.name,
            "shards": str(dataset.shards.folder),
            "source": origin.source,
            "licences": list(origin.licences),
            "split": dataset.split,
            "split_rule": manifest.split_rule,
            "windows": len(dataset),
            "recordings": len(dataset.entries),
            "learned_from": learned and {"windows": learned.windows, "recordings": len(learned.recordings)},
            "chosen_on": self._chosen_on(),
            "reference": self.candidate.recipe.reference,
            "controls": self.request.controls,
            "samples": self.request.samples,
            "temperature": self.request.temperature if self.request.samples else None,
            "constrained": self.request.constrained,
        }

    def _chosen_on(self) -> str | None:
        """Return the split by whose loss the weights were chosen, where it is the one that is measured."""
        run = self.candidate.run
        if run is None or not is_own(self.candidate, self.shards):
            return None
        chosen_on = (files.read_receipt(run.final) or {}).get("chosen_on")
        return self.split if chosen_on == self.split else None

    def _publish(self, dataset: WindowDataset, report: dict[str, Any], scored: Scored, pairs: Sequence[Pair]) -> None:
        """Write the numbers and the pictures."""
        folder, run = self.candidate.out, self.candidate.run
        report |= {"conditions": scored.lines(), "strata": scored.strata()}
        files.receipt_path(folder).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / REPORT_FILE, report)
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in scored.windows())
        files.write_text(folder / WINDOWS_FILE, "".join(f"{line}\n" for line in lines))
        drawn = pictures.evaluation_pictures(folder, run.folder if run else None, dataset, pairs)
        write_report_page(folder / PAGE, report, scored.metrics, drawn)


def open_session(candidate: Candidate, request: EvalRequest, console: Console) -> Session:
    """Choose the windows that a model is asked about, and refuse those that it cannot be measured on.

    Raises:
        UsageError: none are named of what omni does not know the training, they do not fit the model, or its recipe
            cannot draw answers by chance, or gives none that have a format.
        DataError: there are none, they were learned from, or they are gone.
    """
    if request.samples:
        require(candidate.recipe, Drawable)  # type: ignore[type-abstract]  # a protocol names the capability
    if request.constrained and not isinstance(candidate.recipe, Formatted):
        raise UsageError(f"--constrained: answers of recipe {candidate.recipe.name} are numbers, which have no format")
    if candidate.run is None and request.shards is None:
        raise UsageError(f"{candidate.name}: nothing says what to measure it on; name windows with --shards")
    if request.constrained:  # the other report is what people take the model for
        candidate = replace(candidate, out=candidate.out.with_name(f"{candidate.out.name}-{CONSTRAINED}"))
    own = own_shards(candidate.run, are_needed=request.shards is None) if candidate.run else None
    shards = open_shards(request.shards) if request.shards else own
    if shards is None:
        raise DataError(f"the shards of run {candidate.name} are gone or were made anew; name others with --shards")
    check_fit(candidate.recipe, shards, candidate.profile, is_to_measure=True)
    _say_filters(candidate, shards, console)
    split = request.split or ("val" if is_own(candidate, shards) else "all")
    session = Session(candidate, request, shards, split, own, console)
    session.check()
    return session


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


def _say_filters(candidate: Candidate, shards: ShardSet, console: Console) -> None:
    """Say where other steps are measured than those that were learned from."""
    learned, measured = candidate.learned_with, shards.manifest.preprocess
    for name in learned.filters if learned else ():
        if (here := getattr(measured, name)) != (there := getattr(learned, name)):
            console.say(f"measuring with {name} {here}, as shards {shards.folder} are; the run learned with {there}")


def _splits(shards: ShardSet) -> str:
    names = sorted({name for entry in shards.manifest.recordings for name in entry.windows})
    return ", ".join(f"{name} ({shards.manifest.count(name)})" for name in names)


def _result(session: Session) -> dict[str, Any]:
    """Show a published report, and return it with the paths as they are now."""
    candidate, console, folder = session.candidate, session.console, session.candidate.out
    paths = {**candidate.said_in_report(), "shards": str(session.shards.folder)}
    report = {**files.read_json(folder / REPORT_FILE), **paths}
    metrics = metrics_of(candidate.recipe, report["samples"])
    for line in notes_of(report):
        console.warn(line)
    show_scores(title_of(report), report, metrics, console)
    if session.request.strata:
        show_strata(title_of(report), report, metrics, console)
    for line in verdicts(report, next(metric for metric in metrics if metric.is_shown)):
        console.warn(line)
    page, drawn = folder / PAGE, sorted(folder.glob("*.png"))
    console.say(f"report {page}")
    windows = str(folder / WINDOWS_FILE)
    return {**report, "report": str(page), "answers": windows, "pictures": [str(path) for path in drawn]}
