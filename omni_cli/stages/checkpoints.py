"""Checkpoints that can be trusted: a manifest of hashes, written last, is what makes one count, for its own run alone.

What is logged lies beside them: every checkpoint's step has its line in the history before the checkpoint counts.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.stages.runs import EVENTS, HISTORY, verified_folder

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Start:
    """Where a run goes on: after its newest checkpoint that verifies, or at its beginning."""

    step: int = 0
    checkpoint: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the checkpoint's receipt


def find_start(checkpoints: Path, run_key: str) -> Start:
    """Return where a run goes on; delete what a kill left half-written, what is another run's, and stray receipts."""
    found = [Start()]
    for folder in checkpoints.glob(f"{PREFIX}*/"):
        if receipt := verified_folder(folder, expect={"run": run_key}):
            found.append(Start(receipt["step"], folder, receipt))
        else:
            shutil.rmtree(folder)
    remove_stray_receipts(checkpoints)
    return max(found, key=lambda start: start.step)


def steps_saved(checkpoints: Path) -> list[int]:
    """Return the steps that have a checkpoint, whether it verifies or not."""
    return sorted(int(folder.name.removeprefix(PREFIX)) for folder in checkpoints.glob(f"{PREFIX}*/"))


def discard_from(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of a step and of those after it."""
    for each in steps_saved(checkpoints):
        if each >= step:
            shutil.rmtree(checkpoints / f"{PREFIX}{each}")
    remove_stray_receipts(checkpoints)


def remove_stray_receipts(checkpoints: Path) -> None:
    """Delete the receipts of checkpoints that the Trainer has rotated away."""
    for path in checkpoints.glob(f"{PREFIX}*{files.RECEIPT_SUFFIX}"):
        if not path.with_name(path.name.removesuffix(files.RECEIPT_SUFFIX)).is_dir():
            path.unlink()


def read_history(run_folder: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run, without a torn last line: a kill left it, and its step is logged again.

    Raises:
        DataError: another line is damaged.
    """
    path = run_folder / HISTORY
    lines = [_parse(text) for text in path.read_bytes().splitlines()] if path.is_file() else []
    whole = [line for line in lines if line is not None]
    if None in lines[:-1]:
        raise DataError(f"{path}: line {lines.index(None) + 1} is damaged; start the run anew with --fresh")
    return whole


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """Return what befell a run and its weights do not tell; a torn line is left out."""
    path = run_folder / EVENTS
    lines = [_object(text) for text in path.read_bytes().splitlines()] if path.is_file() else []
    return [line for line in lines if line is not None]


def append_event(run_folder: Path, event: Mapping[str, Any]) -> None:
    """Add a line to what befell a run; it is on disk when this returns."""
    lines = [files.canonical_json(each) + "\n" for each in (*read_events(run_folder), event)]
    files.write_text(run_folder / EVENTS, "".join(lines))


def truncate_history(run_folder: Path, step: int) -> None:
    """Forget what was logged after a step: a resumed run logs it again."""
    kept = [line for line in read_history(run_folder) if line["step"] <= step]
    files.write_text(run_folder / HISTORY, "".join(files.canonical_json(line) + "\n" for line in kept))


def last_loss(run_folder: Path, step: int) -> float:
    """Return the loss that was logged at a run's last step.

    Raises:
        DataError: its history does not reach that step.
    """
    history = read_history(run_folder)
    if not history or history[-1]["step"] != step:
        raise DataError(f"{run_folder / HISTORY}: has no line of step {step}; start the run anew with --fresh")
    return history[-1]["loss"]


def _parse(text: bytes) -> dict[str, float] | None:
    line = _object(text)
    return line if line is not None and line.keys() >= {"step", "loss"} else None


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
