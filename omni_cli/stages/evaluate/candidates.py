"""Who is measured: a run, a model folder, or a base model as it is; and what is known of how it learned."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.models.hub_models import fetch_with
from omni_cli.profiles import default_profile
from omni_cli.recipe import BuiltModel
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages import models, runs
from omni_cli.stages.evaluate.request import EVAL
from omni_cli.stages.fitting import as_cut

_README = "README.md"  # the hub's card, which export writes anew from what was measured: no part of a model


@dataclass(frozen=True)
class Candidate:
    """A model to be measured."""

    recipe: Any
    name: str  # in tables
    source: Path | str  # of the run or the model, or its id on the hub
    out: Path  # folder of its report
    profile: str  # named where shards do not fit it
    key: str  # hash of its weights
    learned_with: Preprocess | None = None  # None: not known
    weights: Path | None = None  # None: the recipe's base model, as it is
    run: runs.Run | None = None  # whose training led to it, where that is known

    @property
    def is_run(self) -> bool:
        """Whether it is a run itself, and no model that one led to."""
        return self.run is not None and self.weights == self.run.final

    @property
    def held(self) -> Path:
        """The folder that is locked while it is measured."""
        return self.run.folder if self.run and self.is_run else self.out

    def said_in_report(self) -> dict[str, str]:
        """Return how a report names it."""
        return {"name": self.name, ("run" if self.is_run else "model"): str(self.source)}

    def learned(self) -> runs.Learned | None:
        """Return what it saw in training; None where nobody knows."""
        return self.run.learned() if self.run else None

    def medians(self, dataset: WindowDataset) -> tuple[Mapping[str, Any], str]:
        """Return what the constant baseline says, and of which windows that is the median.

        Where nobody knows what it learned from, they are the training windows of the shards, or as a last resort the
        very windows that are measured, which a constant knows better than it should.
        """
        if learned := self.learned():
            return learned.medians, "the windows that it learned from"
        training, of = WindowDataset(dataset.shards, "train"), f"the training windows of {dataset.shards.folder}"
        if dataset.split == "train" or not len(training):
            training, of = dataset, "the windows measured, which favours the constant"
        return self.recipe.medians([training.row(index) for index in range(len(training))]), of

    def load(self, preprocess: Preprocess, console: Console) -> BuiltModel:
        """Load it, ready to be asked.

        Raises:
            DataError: an adapter does not match its base.
        """
        if self.run and self.is_run:
            models.check_base(self.recipe, self.run)
        if self.weights is not None:
            return placed(self.recipe, self.recipe.load(preprocess, self.weights))
        built, note = self.recipe.load_base_to_ask(preprocess)
        console.warn(f"no training of ours: {note}")
        return placed(self.recipe, built)


def placed(recipe: Any, built: BuiltModel) -> BuiltModel:
    """Move a model to where it answers fastest."""
    moved: BuiltModel = recipe.place(built, models.ready_device(), None)
    return moved


def candidate_of_run(recipe: Any, run: runs.Run) -> Candidate:
    """Return the trained model of a run."""
    facts = run.manifest
    return Candidate(
        recipe, run.name, run.folder, run.folder / EVAL, facts.profile, models.weights_key(run), facts.preprocess,
        run.final, run,
    )  # fmt: skip


def candidate_of_model(recipe: Any, model: models.ModelFolder, out: Path, called: str) -> Candidate:
    """Return the model of a model folder.

    Args:
        recipe: that loads it.
        model: the folder and its card.
        out: under which its report goes.
        called: what the user called it.
    """
    receipt = files.read_receipt(model.folder)
    key = _key_of_folder(receipt["files"]) if receipt else _key_of_base(recipe)
    run = _run_of(model.folder, receipt or {})
    profile = run.manifest.profile if run else default_profile()
    facts = (out / report_name(called), profile, key, model.card.preprocess)
    return Candidate(recipe, called, called, *facts, model.folder, run)


def candidate_of_base(recipe: Any, shards: Path, profile: str, out: Path, console: Console) -> Candidate:
    """Return a base model as it is, asked as the windows of some shards ask.

    Args:
        recipe: whose base it is; what makes its windows is taken from the shards.
        shards: to measure on.
        profile: named where they do not fit the model.
        out: under which its report goes.
        console: told where shards are read otherwise than asked for.
    """
    asked = as_cut(recipe, open_shards(shards), console, ())
    name = recipe.model
    return Candidate(asked, name, name, out / report_name(name), profile, _key_of_base(asked))


def _key_of_folder(listed: Mapping[str, Any]) -> str:
    return files.hash_json({name: facts for name, facts in listed.items() if name != _README})


def _key_of_base(recipe: Any) -> str:
    """Return the hash of a base and of the settings by which it is loaded and asked, precision and quantisation too."""
    return files.hash_json([recipe.base_fingerprint(), recipe.model_dump(mode="json", exclude={"model"})])


def fetched_model(model: str) -> Path | None:
    """Return the folder of a model that omni pushed to the hub; None where it is none of ours.

    Raises:
        OmniError: there is no such model or revision, or the hub cannot be reached.
    """
    return fetch_with(models.CARD_FILE, model)


def report_name(called: str) -> str:
    """Return the name of the folder of a model's report; models that are called the same elsewhere have others."""
    path = Path(called)
    if not path.is_dir():
        return called.replace("/", "--").replace(":", "-")
    return f"{path.resolve().name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def is_own(candidate: Candidate, shards: ShardSet) -> bool:
    """Say whether a candidate learned from these shards."""
    return candidate.run is not None and shards.manifest.fingerprint == candidate.run.manifest.shards.fingerprint


def _run_of(folder: Path, receipt: Mapping[str, Any]) -> runs.Run | None:
    """Return the run that a model lies in and was made from; its weights must still be those."""
    above = [parent for parent in folder.resolve().parents[:2] if (parent / runs.RUN_FILE).is_file()]
    if not above:
        return None
    run = runs.open_run(above[0])
    return run if run.is_done() and receipt.get("run_weights") == models.weights_key(run) else None
