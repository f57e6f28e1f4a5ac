"""A step that takes too long to end once a signal came is dropped: what is saved is all as the last one left it.

A scheduler kills 30 s after its SIGTERM, and a step of many micro-batches takes longer. So between two of them the
training goes back to where the last step ended: its random numbers, its part of the mean loss, what was counted, and
what BatchNorm layers learned by being run. No weight has moved since; the step is taken again, whole, when the run goes
on.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from omni_cli.stages.train.pace import Counted, Pace

PATIENCE_S = 10.0  # that a running step has to end; saving takes some of the other 20


@dataclass(frozen=True)
class _Drawing:
    """What a process draws at random from."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "_Drawing":
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class _Kept:
    """What the end of a step left."""

    drawing: _Drawing
    loss: Tensor  # summed since the last that was logged
    flos: float
    counted: Counted
    norms: list[tuple[Tensor, Tensor]]  # what BatchNorm layers hold of all batches, and a copy


class Droppable:
    """Mixin of a Trainer that has a pace: it can go back to the end of its last step, until the next one has ended."""

    pace: Pace
    model: nn.Module
    current_flos: float
    _kept: _Kept
    _tr_loss: Tensor
    _last_step: tuple[Any, float | None] = (None, None)  # its gradient norm and learning rate

    def drop(self) -> None:
        """Be as when the last step ended; called between two micro-batches."""
        self._kept.drawing.restore()
        self._tr_loss = self._kept.loss
        self.current_flos = self._kept.flos
        self.pace.go_back(self._kept.counted)
        for held, copy in self._kept.norms:
            held.copy_(copy)

    def _keep(self) -> None:
        layers = [each for each in self.model.modules() if isinstance(each, _BatchNorm)]
        norms = [(held, held.clone()) for each in layers for held in each.buffers()]
        self._kept = _Kept(_Drawing.now(), self._tr_loss.clone(), self.current_flos, self.pace.counted, norms)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what was before the first step of all; of a later epoch it is what the last step left."""
        self._keep()
        return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]  # of the Trainer

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Keep what a run goes on from."""
        super()._load_rng_state(checkpoint)  # type: ignore[misc]  # of the Trainer
        self._keep()

    def _maybe_log_save_evaluate(
        self, loss: Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        """Keep what a step left once it is logged, measured and saved.

        An epoch whose first step was dropped knows neither norm nor rate of the last one that ended, of which the line
        of history is that is written then.
        """
        if grad_norm is not None:
            self._last_step = grad_norm, learning_rate
        grad_norm, learning_rate = self._last_step
        super()._maybe_log_save_evaluate(  # type: ignore[misc]  # of the Trainer
            loss, grad_norm, *args, learning_rate=learning_rate, **kwargs
        )
        self._keep()
