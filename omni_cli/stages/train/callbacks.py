"""What watches a Trainer's steps: gradients are checked, checkpoints sealed, signals obeyed."""

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from omni_cli import files
from omni_cli.errors import OmniError
from omni_cli.models.adapters import check_gradients, has_gradient
from omni_cli.report import Console, Step
from omni_cli.stages.checkpoints import read_history, remove_stray_receipts
from omni_cli.stages.disk import writing
from omni_cli.stages.runs import HISTORY, Run, seal_folder
from omni_cli.stages.train.dropping import PATIENCE_S
from omni_cli.stages.train.guards import Guard
from omni_cli.stages.train.pace import Pace, peak_memory_bytes
from omni_cli.stages.train.ranks import ALONE, Ranks
from omni_cli.stages.train.rates import SUFFIX
from omni_cli.stages.train.telemetry import Recorder
from omni_cli.stages.train.validation import LOSS


class Keeper(Protocol):
    """Knows something that a checkpoint keeps, so that a resumed run does as an undisturbed one."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the receipt of a checkpoint says of it."""


class GradientCheck(TrainerCallback):
    """After the first step with a positive rate: every trainable tensor has a gradient, no frozen one has any.

    A step without a label has no gradient at all, and counts for nothing here.

    Args:
        saved: the facts of the checkpoint that training goes on from; none where it begins.
        guard: which knows of gradients that float16's scaler skips.
        ranks: of the training, which all check alike.
    """

    def __init__(self, saved: Mapping[str, Any], guard: Guard, ranks: Ranks = ALONE) -> None:
        self._guard, self._ranks = guard, ranks
        self.passed_at: int | None = saved.get("gradients_checked_at_step")
        self._moved: bool = saved.get("weights_moved", False)
        self.had_label: bool = saved.get("had_label", False)  # at any step

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run checks when an undisturbed one does."""
        facts = {"gradients_checked_at_step": self.passed_at, "weights_moved": self._moved}
        return {**facts, "had_label": self.had_label}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once, when an earlier step has moved the weights."""
        if self.passed_at is not None or self._guard.is_skipped or not has_gradient(kwargs["model"]):
            return
        self.had_label = True
        if self._moved:
            with self._ranks.alike():
                check_gradients(kwargs["model"])
            self.passed_at = state.global_step
        self._moved = self._moved or any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)


class Journal(TrainerCallback):
    """Appends to the history, seals each checkpoint for its run, moves the progress bar.

    Args:
        run: that is trained.
        keepers: of what a checkpoint keeps.
        bar: of the steps.
        recorder: knows how long the run was trained, and is told the step.
        pace: of the Trainer.
        guard: which has judged the step that is logged.
        ranks: of the training; all watch alike, the first writes.
    """

    def __init__(
        self, run: Run, keepers: Sequence[Keeper], bar: Step, recorder: Recorder, pace: Pace, *, guard: Guard,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._ranks = ranks
        self._run_key = run.manifest.key()
        self._folder = run.folder
        self._keepers = keepers
        self._bar = bar
        self._recorder = recorder
        self._pace = pace
        self._guard = guard
        self._counted: Counter[str] = Counter()  # what the steps that are kept learned from
        self._waits = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting where the history ends."""
        self._recorder.step = state.global_step
        last = ([{}, *read_history(self._folder)])[-1]
        self._counted = Counter({name: int(last[name]) for name in ("samples", "tokens") if name in last})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append one line, on disk before a checkpoint counts; the final summary of the Trainer is left out."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        if self._guard.is_skipped:
            logs.pop("grad_norm", None)  # overflows, which is what the step was skipped for
        names = ("loss", "learning_rate", "grad_norm", "epoch", LOSS, *(name for name in logs if name.endswith(SUFFIX)))
        if wrong := [name for name in names if not math.isfinite(logs.get(name, 0.0))]:
            said = (
                f"{wrong[0]} is {logs[wrong[0]]} at step {state.global_step}; the last checkpoint is good: go on from "
                "it with a lower --set train.learning_rate in a run of another name"
            )
            self._ranks.fail(OmniError(said))
        measured = self._measured(args)
        logs |= measured  # after the Trainer's own record, which a checkpoint keeps: the reporters that follow see it
        line = {name: float(logs[name]) for name in names if name in logs}
        line |= {"step": state.global_step, "elapsed_s": self._recorder.elapsed_s, **measured}
        with self._ranks.alike():
            if self._ranks.is_first:
                self._append(line)

    def _append(self, line: Mapping[str, float]) -> None:
        with (self._folder / HISTORY).open("a") as stream:
            stream.write(files.canonical_json(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _measured(self, args: TrainingArguments) -> dict[str, float]:
        """Return the pace since the last line, what was learned from so far, and the peak of memory."""
        pace, counted = self._pace.lap()
        self._counted.update(counted)
        if "data_wait_share" in pace:
            self._waits = f", {pace['data_wait_share']:.1%} of the time waiting for data"
        return {**pace, **self._counted, "peak_memory_bytes": peak_memory_bytes(args.device)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, with the last loss beside it; log where a checkpoint is due.

        A mean that began before a checkpoint would be another one after a resume, and the last step has its line.
        """
        self._recorder.step = state.global_step
        control.should_log = control.should_log or control.should_save
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.advance(note=f"loss {losses[-1]:.3f}{self._waits}" if losses else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the checkpoint count."""
        assert args.output_dir is not None
        with self._ranks.alike():
            if self._ranks.is_first:
                self._seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state.global_step)

    def _seal(self, checkpoint: Path, step: int) -> None:
        facts = {key: value for keeper in self._keepers for key, value in keeper.facts.items()}
        with writing(checkpoint):
            seal_folder(checkpoint, run=self._run_key, step=step, **facts)
        remove_stray_receipts(checkpoint.parent)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C the running step ends, a checkpoint is saved, and training stops: run again to go on.

    A step that does not end soon is dropped between two micro-batches. Of several ranks one alone may hear the signal:
    at the end of each step they ask each other, and stop at the same one; their steps are shorter, and none is dropped.

    Args:
        console: told of it.
        saved_at: the step that training goes on from, which is saved.
        drop: makes the training be as when the last step ended.
        ranks: of the training.
    """

    def __init__(self, console: Console, saved_at: int, drop: Callable[[], None], ranks: Ranks = ALONE) -> None:
        self._heard, self._heard_at_s = 0, 0.0
        self._console, self._ranks = console, ranks
        self._saved_at, self._drop = saved_at, drop
        heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {each: signal.signal(each, self._note) for each in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._heard == signal.SIGINT and self._ranks.count == 1:  # torchrun repeats what a terminal sends
            raise KeyboardInterrupt  # asked twice: now, without saving
        if not self._heard:
            self._heard_at_s = time.monotonic()
        self._heard = number
        self._console.warn("stopping after this step, to save it")

    def agree(self) -> int:
        """Return the signal that any rank has heard, 0 for none; all must call it."""
        return max(self._ranks.gather(self._heard))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where a signal came."""
        if self.agree():
            control.should_save = control.should_training_stop = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop a step that takes too long to end; save the last one that ended, where it is not saved."""
        if not self._heard or self._ranks.count > 1 or time.monotonic() - self._heard_at_s < PATIENCE_S:
            return
        self._console.warn(f"dropping this step, which did not end within {PATIENCE_S:g} s; it will be taken again")
        self._drop()
        control.should_training_stop = True
        control.should_save = control.should_log = state.global_step > self._saved_at

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note which step is saved."""
        self._saved_at = state.global_step

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for each, previous in self._previous.items():
            signal.signal(each, previous)


class StopWhenSaved(TrainerCallback):
    """The last callback: a signal that came while a step was measured or saved takes no step more."""

    def __init__(self, stop: StopOnSignal) -> None:
        self._stop = stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, since the checkpoint counts."""
        if self._stop.agree():
            control.should_training_stop = True
