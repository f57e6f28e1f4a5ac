"""What is said where a training runs out of memory: where, of how much, what is saved, and what would take less."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.out_of_memory import in_words
from omni_cli.stages.train.fits import lighter, smaller_shards
from omni_cli.stages.train.ranks import Ranks


@dataclass(frozen=True)
class Shortage:
    """Says in one line that a training ran out of memory.

    Of several ranks the one that did says it, and ends: the others, which may wait for it in the middle of a step,
    notice that (`Ranks.noticing_loss`).

    Attributes:
        run: that is trained.
        recipe: what learns, and how.
        ranks: of the training.
    """

    run: runs.Run
    recipe: Any
    ranks: Ranks

    def told(self, when: Callable[[], str]) -> AbstractContextManager[None]:
        """Return a context that ends in one line where memory runs out in it.

        Args:
            when: says at what moment of the training that is.

        Raises:
            OmniError: it did; the newest checkpoint is as it was.
        """
        return in_words(lambda what: f"{self._met(when(), what)}; {self._saved()}; {self._less()}")

    def _met(self, when: str, what: str) -> str:
        who = f" of process {self.ranks.index} of {self.ranks.count}" if self.ranks.count > 1 else ""
        return f"run {self.run.folder}: memory{who} ran out {when}: {what}"

    def _saved(self) -> str:
        more = "with more processes, or " if self.recipe.train.sharding != "none" else ""
        last = _newest(self.run)
        again = f"goes on from {last}" if last else "begins anew, since nothing is saved yet,"
        return f"the same command {again} {more}where more memory is free"

    def _less(self) -> str:
        ways = ", or ".join([*_smaller_batch(self.recipe), *lighter(self.recipe)])
        smaller = smaller_shards(self.recipe)
        return f"a run of another name takes less with {ways}; or {smaller}" if ways else smaller


def moment(trainer: Any) -> str:
    """Say where in its steps a Trainer is."""
    step, steps = trainer.state.global_step, trainer.args.max_steps
    if trainer.control.should_save:  # which the Trainer takes back once it is done, before the next step
        return f"as step {step} of {steps} was measured and saved"
    return f"at step {step + 1} of {steps}"


def _newest(run: runs.Run) -> Path | None:
    """Return the newest checkpoint of a run that has its receipt, which is written last."""
    saved = run.folder / runs.CHECKPOINTS
    folders = [saved / f"{checkpoints.PREFIX}{step}" for step in reversed(checkpoints.steps_saved(saved))]
    return next((each for each in folders if (files.read_receipt(each) or {}).get("run") == run.manifest.key()), None)


def _smaller_batch(recipe: Any) -> list[str]:
    """Return the settings with which a step learns from as many windows, fewer of them at once."""
    batch, accumulation = recipe.train.batch_size, recipe.train.accumulation
    if batch == 1:
        return []
    smaller = batch // 2 if batch % 2 == 0 else 1
    more = accumulation * batch // smaller
    return [f"--set train.batch_size={smaller} --set train.accumulation={more}"]
