"""What a user asks of `omni eval`, and the names of what it leaves behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

from omni_cli.recipe import Evaluable
from omni_cli.stages.train import TrainableRecipe

Controls = Literal["all", "basic", "none"]
CONTROLS: tuple[str, ...] = get_args(Controls)
EVAL = "eval"  # the folder of a run's report
CONSTRAINED = "constrained"  # after the name of the folder of a report of held answers
REPORT_FILE = "report.json"
PAGE = "report.html"
WINDOWS_FILE = "windows.jsonl"  # what was said of each window, and how wrong it was
BLIND = "blind"
MODEL = "model"  # the first row of every table
SWAPPED = "pictures swapped"
REPEATED = "first frame repeated"
CAMERAS_SHUFFLED = "cameras shuffled"
TIME_SHUFFLED = "time shuffled"
TRAINED_BLIND = "trained blind"


@runtime_checkable
class EvaluableRecipe(TrainableRecipe, Evaluable, Protocol):
    """What `eval` needs a recipe to be."""


@dataclass(frozen=True)
class EvalRequest:
    """What a user asked of `omni eval`."""

    shards: Path | None = None  # None: those the run was trained on
    split: str | None = None  # None: val of its own shards, every window of others
    blind: bool = True  # train the blind twin if it is not there
    controls: Controls = "all"  # basic: pictures swapped and the first frame repeated alone
    samples: int = 0  # answers drawn by chance of each window, beside the greedy one
    temperature: float = 1.0  # at which they are drawn
    batch: int | None = None  # windows asked about at once; None: 32, or fewer where they are long
    strata: bool = False  # show each kind of driving in the terminal too
    constrained: bool = False  # hold answers to their format, and count those that had to be forced
