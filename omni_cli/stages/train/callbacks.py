"""What watches a Trainer's steps: gradients are checked, checkpoints sealed, signals obeyed."""

import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from omni_cli import files
from omni_cli.errors import OmniError
from omni_cli.models.adapters import check_gradients, has_gradient
from omni_cli.report import Console, Step
from omni_cli.stages.checkpoints import remove_stray_receipts
from omni_cli.stages.disk import writing
from omni_cli.stages.runs import HISTORY, Run, seal_folder


class GradientCheck(TrainerCallback):
    """After the first step with a positive rate: every trainable tensor has a gradient, no frozen one has any.

    A step without a label has no gradient at all, and counts for nothing here.

    Args:
        saved: the facts of the checkpoint that training goes on from; none where it begins.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
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
        if self.passed_at is not None or not has_gradient(kwargs["model"]):
            return
        self.had_label = True
        if self._moved:
            check_gradients(kwargs["model"])
            self.passed_at = state.global_step
        self._moved = self._moved or any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)


class Journal(TrainerCallback):
    """Appends to the history, seals each checkpoint for its run, moves the progress bar."""

    def __init__(self, run: Run, gradients: GradientCheck, bar: Step) -> None:
        self._run_key = run.manifest.key()
        self._history = run.folder / HISTORY
        self._gradients = gradients
        self._bar = bar
        self._started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append one line, on disk before a checkpoint counts; the final summary of the Trainer is left out."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        names = ("loss", "learning_rate", "grad_norm", "epoch")
        if wrong := [name for name in names if not math.isfinite(logs.get(name, 0.0))]:
            raise OmniError(
                f"{wrong[0]} is {logs[wrong[0]]} at step {state.global_step}; the last checkpoint is good: go on from "
                "it with a lower --set train.learning_rate in a run of another name"
            )
        line = {name: float(logs[name]) for name in names if name in logs}
        line |= {"step": state.global_step, "elapsed_s": round(time.monotonic() - self._started, 3)}
        with self._history.open("a") as stream:
            stream.write(files.canonical_json(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, with the last loss beside it; log where a checkpoint is due.

        A mean that began before a checkpoint would be another one after a resume, and the last step has its line.
        """
        control.should_log = control.should_log or control.should_save
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.advance(note=f"loss {losses[-1]:.3f}" if losses else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the checkpoint count."""
        assert args.output_dir is not None
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with writing(checkpoint):
                seal_folder(checkpoint, run=self._run_key, step=state.global_step, **self._gradients.facts)
            remove_stray_receipts(checkpoint.parent)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C the running step ends, a checkpoint is saved, and training stops: run again to go on."""

    def __init__(self, console: Console) -> None:
        self.signal: int | None = None
        self._console = console
        heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {each: signal.signal(each, self._note) for each in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now, without saving
        self.signal = number
        self._console.warn("stopping after this step, to save it")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where a signal came."""
        if self.signal:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for each, previous in self._previous.items():
            signal.signal(each, previous)
