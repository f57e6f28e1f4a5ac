"""Every optimiser step is judged before a weight moves.

transformers 5.23 (`Trainer._run_epoch`) sums the gradients of a step's micro-batches, clips them (`_clip_grad_norm`),
hands the norm from before the clip to `_get_grad_norm`, and steps, whatever the norm is: a NaN multiplies every
gradient and then every weight, and is seen only in the mean that is logged some steps later. So the norm is looked at
where it is handed over, with the loss of the step. That waits for the device once a step, after its backward, and costs
the time to launch the optimiser's kernels, which nothing hides then: milliseconds of a step that takes seconds.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from omni_cli.errors import OmniError
from omni_cli.recipe import TrainSettings
from omni_cli.stages.train.ranks import ALONE, Ranks

WINDOWS = "window_numbers"  # in a batch: which rows of the dataset it was made of
SPIKE_STEPS = 3  # in a row: a batch of odd windows is no spike
SPIKE_DEVIATIONS = 10.0  # of the recent losses from their median (the median of the absolute ones), at least
DEAD_STEPS = 3  # in a row: a single step may have nothing to teach
OVERFLOWS = 20  # in a row: from 2^16 float16's scale has fallen below 1, and what overflows is the gradient itself


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step."""

    reason: str  # loss, gradient, spike or dead
    said: str
    step: int  # at which it was found
    since: int  # the first step that is part of it: a checkpoint from before is good
    windows: tuple[int, ...]  # that the step looked at


class BadStep(OmniError):
    """A step that must not move a weight; it ends the Trainer's loop, and `fit` says what follows."""

    def __init__(self, found: Finding) -> None:
        super().__init__(found.said)
        self.found = found


class Guard:
    """Judges every step by its loss and the norm of its gradient.

    - Both must be finite. Where float16 scales the loss, a gradient that overflows is the scaler's to skip, unless it
      goes on.
    - A loss is high that is above the median m of the last W labelled steps by 10 times their median absolute
      deviation, and by (f - 1) |m|: above f m where losses are positive. Three high ones in a row are a spike. High
      losses do not enter the window; before it holds W there are none.
    - A norm of exactly zero under a loss that is not zero, in three labelled steps in a row, is dead.

    Args:
        settings: W is `spike_window`, f is `spike_factor`.
        saved: the facts of the checkpoint that training goes on from: it judges as an undisturbed run does.
        ranks: of the training; each judges the whole step, and so all judge alike.
    """

    def __init__(self, settings: TrainSettings, saved: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        state = saved.get("guard", {"recent_losses": [], "suspects": {}})
        self._window, self._factor = settings.spike_window, settings.spike_factor
        self._recent: deque[float] = deque(state["recent_losses"], maxlen=settings.spike_window)
        self._suspects: dict[str, list[int]] = {reason: list(steps) for reason, steps in state["suspects"].items()}
        self._windows: list[Tensor] = []
        self._loss: Tensor | None = None
        self._labels: Any = 1

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"guard": {"recent_losses": list(self._recent), "suspects": self._suspects}}

    @property
    def is_skipped(self) -> bool:
        """Whether the step that was judged last overflows, and the scaler skips it."""
        return bool(self._suspects.get("gradient"))

    def note(self, loss: Tensor, windows: Tensor, labels: Any) -> None:
        """Take one micro-batch of the running step.

        Args:
            loss: its share of the step's loss, a number on the device.
            windows: numbers of its windows (n,).
            labels: of the whole step; None where nobody counts them.
        """
        self._loss = loss if self._loss is None else self._loss + loss
        self._windows.append(windows)
        self._labels = 1 if labels is None else labels

    def judge(self, norm: Tensor | float, step: int, *, may_overflow: bool = False) -> None:
        """Judge the running step, before the optimiser moves a weight.

        Args:
            norm: of its gradient, before clipping.
            step: its number, counted from 1.
            may_overflow: a scaler skips a step whose gradient is not finite.

        Raises:
            BadStep: it is one.
        """
        assert self._loss is not None
        measured = [
            torch.as_tensor(each, device=self._loss.device).float() for each in (self._loss, norm, self._labels)
        ]
        share, size, labels = torch.stack(measured).tolist()  # the one wait for the device
        loss = fmean(self._ranks.gather(share))  # whose scale is that of the whole step: see `TrueLoss`
        windows, self._windows, self._loss = self._windows, [], None
        if said := self._look(loss, size, labels, step, may_overflow):
            reason, words = said
            of_all = self._ranks.gather([int(number) for each in windows for number in each.tolist()])
            numbers = tuple(number for each in of_all for number in each)
            raise BadStep(Finding(reason, words, step, self._suspects[reason][0], numbers))

    def _look(self, loss: float, norm: float, labels: float, step: int, may_overflow: bool) -> tuple[str, str] | None:
        """Return the reason and the words of what is wrong with a step, None where nothing is."""
        overflows = self._in_a_row("gradient", step, of=not math.isfinite(norm))
        if self._in_a_row("loss", step, of=not math.isfinite(loss)):
            return "loss", f"loss is {loss} at step {step}"
        if overflows > (OVERFLOWS if may_overflow else 0):
            return "gradient", f"the gradient's norm is {norm} at step {step}"
        if not labels or overflows:
            return None
        if self._in_a_row("dead", step, of=norm == 0 and loss != 0) >= DEAD_STEPS:
            return "dead", f"the gradient is exactly zero at step {step}, the {DEAD_STEPS}rd in a row"
        return self._look_for_spike(loss, step)

    def _look_for_spike(self, loss: float, step: int) -> tuple[str, str] | None:
        limit = self._limit()
        if self._in_a_row("spike", step, of=loss > limit) >= SPIKE_STEPS:
            against = f"{limit:.4g}, where the median of {self._window} is {median(self._recent):.4g}"
            return "spike", f"loss is {loss:.4g} at step {step}, the {SPIKE_STEPS}rd in a row above {against}"
        if loss <= limit:
            self._recent.append(loss)
        return None

    def _limit(self) -> float:
        """Return the largest loss that is not high."""
        if not self._window or len(self._recent) < self._window:
            return math.inf
        middle = median(self._recent)
        deviation = median(abs(loss - middle) for loss in self._recent)
        return middle + max(SPIKE_DEVIATIONS * deviation, (self._factor - 1) * abs(middle))

    def _in_a_row(self, reason: str, step: int, *, of: bool) -> int:
        """Return how many steps up to this one were suspect for a reason."""
        self._suspects[reason] = [*self._suspects.get(reason, []), step] if of else []
        return len(self._suspects[reason])


class Guarded:
    """Mixin of a Trainer: a guard sees the loss of every micro-batch, and judges the step before the optimiser's."""

    guard: Guard
    accelerator: Any
    state: Any

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Learn from a micro-batch, and note its loss."""
        windows = inputs.pop(WINDOWS)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # of the Trainer
        self.guard.note(loss, windows, num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm that the Trainer logs; what it is called before is the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]  # of the Trainer
        self.guard.judge(norm, self.state.global_step + 1, may_overflow=self.accelerator.scaler is not None)
        return norm
