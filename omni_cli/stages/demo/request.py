"""What a user asks of `omni demo`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PROFILE = "cpu-tiny"
Base = Literal["tiny", "smollm2"]

RecipeMaker = Callable[[Mapping[str, Any]], Any]  # settings laid over those of the profile -> a recipe


@dataclass(frozen=True)
class DemoRequest:
    """One call of `omni demo`; None: what suits the recipe."""

    folder: Path
    seed: int = 0
    chunks: int | None = None  # of ten drives each
    base_steps: int | None = None
    adapter_steps: int | None = None
    workers: int = 2
    base: Base = "tiny"  # of the vlm recipe
