"""How fast a training goes between two logged steps, and what share of that time its loop waits for the loader."""

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_cli.recipe import Batch
from omni_cli.stages.train.guards import WINDOWS
from omni_cli.stages.train.ranks import ALONE, Ranks

WAIT_GOAL = 0.01  # of a step's time


@dataclass(frozen=True)
class Counted:
    """What was counted since the last lap."""

    samples: int
    tokens: Tensor | None  # None: rows have none; a number on the device, for which nobody waits
    wait_s: float
    passed_s: float


class Pace:
    """Counts windows, tokens and time; the clock stands still between a logged step and the batches of the next.

    There the val split is measured and a checkpoint is saved: neither is a step.

    Args:
        ranks: of the training; what all of them learn from is counted, the time of each is its own.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._start_lap()

    def _start_lap(self) -> None:
        self.go_back(Counted(0, None, 0.0, 0.0))

    @property
    def counted(self) -> Counted:
        """What was counted since the last lap, to go back to."""
        running_s = 0.0 if self._began_s is None else time.perf_counter() - self._began_s
        return Counted(self._samples, self._tokens, self._wait_s, self._passed_s + running_s)

    def go_back(self, counted: Counted) -> None:
        """Forget what was counted since; the clock stands still."""
        self._samples, self._tokens = counted.samples, counted.tokens
        self._wait_s, self._passed_s = counted.wait_s, counted.passed_s
        self._began_s: float | None = None

    def begin(self) -> None:
        """Note that the batches of a step are about to be asked for."""
        if self._began_s is None:
            self._began_s = time.perf_counter()

    def stop(self) -> None:
        """Note that what follows is no longer a step; the device has done its part of it."""
        if self._began_s is not None:
            self._passed_s += time.perf_counter() - self._began_s
            self._began_s = None

    def waited(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield what the loader yields, and count how long that takes."""
        while True:
            began_s = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._wait_s += time.perf_counter() - began_s
            yield batch

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the windows and the tokens of a step; what pads a row is no token."""
        for batch in batches:
            self._samples += len(batch[WINDOWS])
            if "input_ids" in batch and len(batch[WINDOWS]):
                mask = batch.get("attention_mask")
                tokens = torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
                self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def lap(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return the speed since the last call, and what was counted; and begin anew. All ranks must call it."""
        self.stop()
        passed_s = self._passed_s
        own = {"samples": self._samples}
        if self._tokens is not None:
            own["tokens"] = int(self._tokens)
        of_all = self._ranks.gather(own)
        counted = {name: sum(each.get(name, 0) for each in of_all) for name in {**own, **of_all[0]}}
        speed = {}
        if passed_s > 0:
            speed = {f"{name}_per_s": float(f"{count / passed_s:.6g}") for name, count in counted.items()}
            speed["data_wait_share"] = round(min(self._wait_s / passed_s, 1.0), 5)
        self._start_lap()
        return speed, counted


class Paced:
    """Mixin of a Trainer, before all others: tells its pace what was asked for, what came, and when a step is over."""

    pace: Pace

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of a step, as the Trainer does."""
        self.pace.begin()
        waited = self.pace.waited(epoch_iterator)
        batches, count = super().get_batch_samples(waited, num_batches, device)  # type: ignore[misc]  # of the Trainer
        self.pace.count(batches)
        return batches, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's numbers; the Trainer has waited for the device to tell them."""
        self.pace.stop()
        super().log(logs, start_time)  # type: ignore[misc]  # of the Trainer


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that this process held so far: of the GPU that trains, or of the host's memory (getrusage(2))."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
