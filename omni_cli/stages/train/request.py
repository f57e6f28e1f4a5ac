"""What a user asks of `omni train`, and what it needs of a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omni_cli.profiles import Machine
from omni_cli.recipe import Sampled, Trainable


@runtime_checkable
class TrainableRecipe(Sampled, Trainable, Protocol):
    """What `train` needs a recipe to be."""

    name: str
    model: str
    precision: str

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the settings as plain values."""


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked of `omni train`."""

    shards: Path | None
    data: Path
    runs: Path
    run: str | None
    profile: str
    fresh: bool = False
    dry_run: bool = False
    asked: frozenset[str] | None = None  # keys of the settings that the user typed; None: all of them
    machine: Machine | None = None  # what the profile promises; None: no memory is held against it
    report_to: tuple[str, ...] = ()  # where curves go besides history.jsonl; the weights do not depend on it
