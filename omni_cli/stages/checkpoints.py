"""Checkpoints that can be trusted: a manifest of hashes, written last, is what makes one count."""

import json
import shutil
from pathlib import Path

from omni_cli import files
from omni_cli.stages.runs import HISTORY, verified_folder

PREFIX = "checkpoint-"


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose hashes verify."""
    for folder in sorted(checkpoints.glob(f"{PREFIX}*/"), key=step_of, reverse=True):
        if verified_folder(folder) is not None:
            return folder
    return None


def remove_unsealed(checkpoints: Path) -> None:
    """Delete what a killed run left half-written, and receipts whose checkpoint was rotated away."""
    for folder in checkpoints.glob(f"{PREFIX}*/"):
        if verified_folder(folder) is None:
            shutil.rmtree(folder)
    for receipt in checkpoints.glob(f"{PREFIX}*{files.RECEIPT_SUFFIX}"):
        if not receipt.with_name(receipt.name.removesuffix(files.RECEIPT_SUFFIX)).is_dir():
            receipt.unlink()


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def read_history(run_folder: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run."""
    path = run_folder / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def truncate_history(run_folder: Path, step: int) -> None:
    """Forget what was logged after a step: a resumed run logs it again."""
    kept = [line for line in read_history(run_folder) if line["step"] <= step]
    files.write_text(run_folder / HISTORY, "".join(files.canonical_json(line) + "\n" for line in kept))
