"""Trainers that take steps in turn, each timed by phase: what else the machine does falls on all of them alike."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from omni_cli.stages.bench.timing import Timing, synchronise
from omni_cli.stages.resident import forget_peak, give_back, peak_bytes

PHASES = ("data", "forward", "backward", "optimiser")  # the last with clipping and zeroing the gradients
WARMUPS = 2
_STEPS_A_TURN = 2
_MEASURED = WARMUPS - 1  # the step whose memory is measured on a CPU


class Turns:
    """Says whose turn it is among trainers that run in a thread each."""

    def __init__(self) -> None:
        self._waiting: list[object] = []
        self._changed = Condition()
        self._taken = 0
        self.is_over = False  # one of them has failed: the others stop

    def join(self, who: object) -> None:
        """Be one of those that take turns, after those that have joined before."""
        self._waiting.append(who)

    def wait(self, who: object) -> None:
        """Return when it is one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self._waiting[0] is who)

    def step_done(self) -> None:
        """Count a step, and give the turn to the next after a few of them."""
        with self._changed:
            self._taken += 1
            if self._taken == _STEPS_A_TURN:
                self._pass_on()

    def leave(self, who: object, *, has_failed: bool) -> None:
        """Take no more turns."""
        with self._changed:
            self.is_over |= has_failed
            self._waiting.remove(who)
            self._taken = 0
            self._changed.notify_all()

    def _pass_on(self) -> None:
        self._waiting.append(self._waiting.pop(0))
        self._taken = 0
        self._changed.notify_all()


@dataclass(eq=False)
class Clock(TrainerCallback):
    """Notes when each phase of a step ended, and what the step's loss was."""

    turns: Turns = field(default_factory=Turns)
    steps: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # of the accelerator's memory, by this trainer alone; without one, as `_note_peak` tells
    _held_bytes: int | None = None  # of this machine's memory before the step that is measured

    def __post_init__(self) -> None:
        self.turns.join(self)
        self._own_bytes = _allocated_bytes()

    def now_built(self) -> "Clock":
        """Note that what was allocated since the clock was made is this trainer's; returns the clock."""
        self._own_bytes = _allocated_bytes() - self._own_bytes
        return self

    def start(self) -> None:
        """Begin a step, once it is this trainer's turn."""
        self.turns.wait(self)
        self._before_bytes = _allocated_bytes()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif len(self.steps) == _MEASURED:
            give_back()
            self._held_bytes = forget_peak()
        self.steps.append([])
        self.mark()

    def mark(self) -> None:
        """Note that what came before is done, on the device too."""
        synchronise()
        self.steps[-1].append(time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the end of the optimiser's work, and let another have its turn."""
        self.mark()
        if torch.cuda.is_available():
            others = self._before_bytes - self._own_bytes
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
            self._own_bytes = _allocated_bytes() - others
        elif len(self.steps) == _MEASURED + 1:
            self._note_peak(kwargs["optimizer"])
        control.should_training_stop |= self.turns.is_over
        self.turns.step_done()

    def _note_peak(self, optimizer: Any) -> None:
        """Note what a step takes beside the weights: what the process grew by in it, and the optimiser's state.

        It is the last step that is not timed, before which freed memory is given back. The first also loads what all
        later ones use, those of the other trainers too.
        """
        if self._held_bytes is not None:
            state = [value for of_weight in optimizer.state.values() for value in of_weight.values()]
            held = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
            self.peak_bytes = peak_bytes() - self._held_bytes + held

    def timings(self) -> dict[str, Timing]:
        """Return the phases and the whole step, without the first steps."""
        counted = self.steps[WARMUPS:]
        phases = {name: Timing(tuple(marks[at + 1] - marks[at] for marks in counted)) for at, name in enumerate(PHASES)}
        return {"step": Timing(tuple(marks[-1] - marks[0] for marks in counted)), **phases}


def _allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Timed:
    """Mixin of a Trainer: tells a clock where the phases of a step end."""

    clock: Clock

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Time how long the step waits for its batch."""
        self.clock.start()
        batches = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]  # of the Trainer beside it
        self.clock.mark()
        return batches

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Time the forward pass, with the way of the batch to the device."""
        value = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]  # as above
        self.clock.mark()
        return value

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Time what follows the forward pass."""
        value = super().training_step(*args, **kwargs)  # type: ignore[misc]  # as above
        self.clock.mark()
        self.clock.losses.append(float(value))
        return value


def train_in_turn(trainers: Sequence[Any]) -> None:
    """Run trainers whose clocks share their turns, each to its end."""
    first, *others = trainers
    with ThreadPoolExecutor(max(len(others), 1)) as pool:
        running = [pool.submit(_train, trainer) for trainer in others]
        _train(first)
        for each in running:
            each.result()


def _train(trainer: Any) -> None:
    trainer.add_callback(trainer.clock)
    trainer.args.save_strategy = SaveStrategy.NO
    has_failed = True
    try:
        trainer.train()
        has_failed = False
    finally:
        trainer.clock.turns.leave(trainer.clock, has_failed=has_failed)
