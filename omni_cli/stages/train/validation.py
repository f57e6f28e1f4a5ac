"""The loss on windows that are not learned from, measured at every checkpoint; the weights where it is lowest are kept.

Answers are given (teacher forcing) and nothing is generated; of a batch only two numbers are kept, never its logits.
What is drawn at random, and in which order windows are learned from, is the same with and without it.

The Trainer's own `load_best_model_at_end` would keep a best checkpoint too, and at the end load it by names that a full
Qwen2.5-VL has only in memory (transformers 5.23): with strict=False no key would match and the last weights would stay.
Here the recipe saves the weights as it publishes them, and what it saved is published.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.models.modes import evaluating
from omni_cli.recipe import BuiltModel, TrainSettings
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.stages import runs
from omni_cli.stages.disk import writing
from omni_cli.stages.train.ranks import ALONE, Ranks

SPLIT = "val"
LOSS = "validation_loss"  # in the history, and in receipts
_PREFIX = "step-"


@dataclass(frozen=True)
class Best:
    """At which step the loss was lowest."""

    step: int
    loss: float


class Validation:
    """Measures a model on a fixed choice of windows.

    Args:
        recipe: that learns.
        dataset: the windows of the val split.
        saved: the facts of the checkpoint that training goes on from.
        console: told where it ends, since a window cannot be read.
        ranks: of the training, which share the windows.
    """

    def __init__(
        self, recipe: Any, dataset: WindowDataset, saved: Mapping[str, Any], console: Console, ranks: Ranks = ALONE
    ) -> None:
        self._recipe, self._dataset, self._console, self._ranks = recipe, dataset, console, ranks
        self._chosen = _chosen(dataset, recipe.train)
        self.fault: OmniError | None = None  # of the windows: nothing is measured any more
        kept = saved.get("best")
        self.best: Best | None = Best(**kept) if kept else None

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": {"step": self.best.step, "loss": self.best.loss} if self.best else None}

    def is_due(self, step: int, steps: int) -> bool:
        """Say whether a step is one of those that every run measures, and not only one that a signal stopped."""
        return not self.fault and (step % self._recipe.train.save_steps == 0 or step == steps)

    @property
    def ends_training(self) -> bool:
        """Whether nobody can say any more which weights are the best, and those are asked for."""
        return self.fault is not None and self._recipe.train.publish == "best"

    def check_fault(self, step: int) -> None:
        """Check that the training did not end early, at a step that is saved, for windows that cannot be read.

        Raises:
            OmniError: it did.
        """
        if self.fault and self.ends_training:
            raise type(self.fault)(
                f"{self.fault}; split {SPLIT} is measured for train.publish = best: training stopped at step {step}, "
                "saved and not measured; when the shards are whole run the same command again"
            )

    def at(self, step: int, trainer: Any) -> dict[str, float]:
        """Return what the history says of a step; a loss that is no number is none, and nowhere the best."""
        loss = self.measure(trainer)
        if self.fault and not self.ends_training:
            self._console.warn(_goes_on_without(self.fault))
        if not math.isfinite(loss):
            return {}
        if self.best is None or loss < self.best.loss:
            self.best = Best(step, loss)
        return {LOSS: loss}

    def find_fault(self) -> OmniError | None:
        """Return why a window cannot be read, as far as that shows without its pictures; None where all can."""
        try:
            for number in self._chosen:
                self._dataset.row(number)
        except OmniError as error:
            return error
        return None

    def measure(self, trainer: Any) -> float:
        """Return the mean loss of what counts in the chosen windows; NaN where nothing does, or one cannot be read."""
        model: nn.Module = trainer.model
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
            sums = self._ranks.gather(self._sums(trainer))
        self.fault = next((fault for fault in self._ranks.gather(self.fault) if fault), None)
        total, count = (math.fsum(each) for each in zip(*sums, strict=True))
        return total / count if count and not self.fault else math.nan

    def _sums(self, trainer: Any) -> tuple[float, float]:
        """Return the summed loss and what was counted in this rank's batches; all ranks take equally many."""
        size, total, count = self._recipe.train.batch_size, 0.0, 0.0
        batches = [self._chosen[first : first + size] for first in range(0, len(self._chosen), size)]
        for turn in range(0, len(batches), self._ranks.count):
            number = turn + self._ranks.index
            rows = self._read(batches[min(number, len(batches) - 1)])
            all_read = all(self._ranks.gather(rows is not None))  # one that left would be waited for
            if rows is None or not all_read:
                break
            loss = self._loss(rows, trainer)
            if number < len(batches):
                total, count = total + float(loss.total), count + float(loss.count)
        return total, count

    def _read(self, numbers: Sequence[int]) -> list[dict[str, Any]] | None:
        try:
            return [self._dataset[number] for number in numbers]
        except OmniError as error:  # what was learned since the last checkpoint is saved first
            self.fault = error
            return None

    def _loss(self, rows: Sequence[dict[str, Any]], trainer: Any) -> Any:
        batch = trainer._prepare_inputs(self._recipe.collate(rows, self._dataset.preprocess))
        return self._recipe.loss(trainer.model, batch, self._dataset.preprocess)


class Validated:
    """Mixin of a Trainer: the line of a step at which a checkpoint is due has the loss on the val split."""

    validation: Validation | None
    state: Any

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's numbers, to wherever the Trainer reports them."""
        if self.validation and "loss" in logs and self.validation.is_due(self.state.global_step, self.state.max_steps):
            logs = {**logs, **self.validation.at(self.state.global_step, self)}
        super().log(logs, start_time)  # type: ignore[misc]  # of the Trainer


class KeepBest(TrainerCallback):
    """Keeps the weights of the best step, before the checkpoint that names it counts.

    Those that the checkpoint before this one names stay too: training may have to go back to it.
    """

    def __init__(
        self, run: runs.Run, recipe: Any, built: BuiltModel, validation: Validation, ranks: Ranks = ALONE
    ) -> None:
        self._run, self._recipe, self._built, self._validation, self._ranks = run, recipe, built, validation, ranks
        self._named = validation.best

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the weights where this step is the best; where none can be said to be, this step is the last."""
        best, before = self._validation.best, self._named
        with self._ranks.alike():  # by itself: all give their part of the weights, or none
            if self._ranks.is_first:
                forget_others(self._run.folder, {each.step for each in (best, before) if each})
        with self._ranks.alike():
            self._write(best, state.global_step)
        self._named = best
        control.should_training_stop = control.should_training_stop or self._validation.ends_training

    def _write(self, best: Best | None, step: int) -> None:
        if best is None or best.step != step:
            return
        folder = best_folder(self._run.folder, best.step)
        with writing(folder) if self._ranks.is_first else nullcontext():
            save_weights(self._recipe, self._built, folder, self._ranks)
            if self._ranks.is_first:
                runs.seal_folder(folder, run=self._run.manifest.key(), step=best.step, **{LOSS: best.loss})


def save_weights(recipe: Any, built: BuiltModel, folder: Path, ranks: Ranks = ALONE) -> None:
    """Write the weights into a folder; of a model that is cut over the ranks each gives its part, and one writes."""
    if ranks.is_first or recipe.train.sharding != "none":
        recipe.save(built, folder)


def make_validation(
    recipe: Any, dataset: WindowDataset, saved: Mapping[str, Any], console: Console, ranks: Ranks = ALONE
) -> Validation | None:
    """Return what measures a training, None where nothing does; say which.

    Args:
        recipe: that learns.
        dataset: the windows that are learned from; those to measure on are in the same shards.
        saved: the facts of the checkpoint that training goes on from.
        console: told of it.
        ranks: of the training.

    Raises:
        UsageError: the best weights are asked for, and nothing would say which those are.
        OmniError: they are asked for, and a window to measure on cannot be read.
    """
    settings: TrainSettings = recipe.train
    if not settings.validation_windows:
        return None
    held_out = WindowDataset(dataset.shards, SPLIT, dataset.sidecar_key, verify=settings.verify_shards)
    if not len(held_out):
        if settings.publish == "best":
            raise UsageError(
                f"train.publish = best needs a {SPLIT} split, and shards {dataset.shards.folder} have none; "
                "make others with omni etl, or train with --set train.publish=last"
            )
        console.say(f"no {SPLIT} split in {dataset.shards.folder}: nothing is measured while it trains")
        return None
    validation = Validation(recipe, held_out, saved, console, ranks)
    if fault := validation.find_fault():
        if settings.publish == "best":
            raise fault
        console.warn(_goes_on_without(fault))
        return None
    windows = counted(min(settings.validation_windows, len(held_out)), "window")
    console.say(f"measuring the loss of {windows} of the {SPLIT} split at every checkpoint")
    return validation


def _goes_on_without(fault: OmniError) -> str:
    return f"{fault}; training goes on, and its loss on split {SPLIT} is not measured"


def longest_measured(dataset: WindowDataset, settings: TrainSettings) -> int:
    """Return the number of tokens of the longest window that would be measured, of those that can be read.

    Args:
        dataset: the windows that are learned from, with their tokens; those to measure on are in the same shards.
        settings: how many are measured.
    """
    held_out = WindowDataset(dataset.shards, SPLIT, dataset.sidecar_key)
    lengths = [0]
    for number in _chosen(held_out, settings):
        with suppress(OmniError):  # one that cannot be read does not end every training: see `make_validation`
            lengths.append(len(held_out.row(number)["input_ids"]))
    return max(lengths)


def _chosen(held_out: WindowDataset, settings: TrainSettings) -> list[int]:
    return spread([entry.windows[SPLIT] for entry in held_out.entries], settings.validation_windows)


def spread(counts: Sequence[int], most: int) -> list[int]:
    """Return the numbers of at most `most` windows, spread evenly over recordings and over the time of each.

    Args:
        counts: of the windows of each recording; they are numbered one recording after the other, by time.
        most: how many windows.
    """
    starts, left = [0, *accumulate(counts)], most
    chosen = _evenly(range(len(counts)), most)
    quotas: dict[int, int] = {}
    for done, recording in enumerate(sorted(chosen, key=counts.__getitem__)):  # what the short ones lack the long give
        quotas[recording] = min(counts[recording], left // (len(chosen) - done))
        left -= quotas[recording]
    return [starts[each] + at for each in chosen for at in _evenly(range(counts[each]), quotas[each])]


def _evenly(numbers: Sequence[int], most: int) -> list[int]:
    count, total = min(len(numbers), most), len(numbers)
    return [numbers[(2 * place + 1) * total // (2 * count)] for place in range(count)]


def best_folder(run_folder: Path, step: int) -> Path:
    """Return where the weights of the best step are."""
    return run_folder / runs.BEST / f"{_PREFIX}{step}"


def is_best_whole(run: runs.Run, facts: Mapping[str, Any]) -> bool:
    """Say whether the best weights that a checkpoint names, if any, are there byte for byte."""
    best = facts.get("best")
    if not best:
        return True
    expected = {"run": run.manifest.key(), "step": best["step"]}
    return runs.verified_folder(best_folder(run.folder, best["step"]), expect=expected) is not None


def forget_others(run_folder: Path, steps: set[int]) -> None:
    """Delete the weights of steps that no checkpoint names as the best any more, the receipt first."""
    for folder in (run_folder / runs.BEST).glob(f"{_PREFIX}*/"):
        if int(folder.name.removeprefix(_PREFIX)) not in steps:
            files.receipt_path(folder).unlink(missing_ok=True)
            shutil.rmtree(folder)


def publish_best(run: runs.Run, best: Best) -> None:
    """Copy the weights of the best step to where the run's weights are.

    Raises:
        OmniError: they are damaged.
    """
    folder = best_folder(run.folder, best.step)
    if not is_best_whole(run, {"best": {"step": best.step}}):
        raise OmniError(f"{folder}: does not match its receipt; run the same command again: it says what can be done")
    shutil.copytree(folder, run.final)
