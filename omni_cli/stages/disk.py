"""Whether the disk can hold what a training or a model folder writes, and what is said where it could not."""

import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from omni_cli.errors import OmniError
from omni_cli.recipe import ModelSize, TrainSettings

CHECKPOINTS_KEPT = 2
_BEST_KEPT = 2  # the best, and the one before it until the checkpoint that names the new one counts
_BESIDE_BYTES = 16 << 20  # of every folder of weights: tokenizer, states of generators, receipts
_LEARNING_BYTES = 4  # of a weight that learns: it is held in float32, whatever is computed in
_GIB = 1 << 30
_CODE = re.compile(r"os error (\d+)")  # as Rust tells it
_TORCH = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


def checkpoint_bytes(size: ModelSize, tuning: str, optimizer: str) -> int:
    """Return what one checkpoint takes: the weights, and what the optimiser keeps of those that learn."""
    return _folder_bytes(size, tuning, size.weight_bytes) + optimizer_bytes(size, optimizer)


def optimizer_bytes(size: ModelSize, optimizer: str) -> int:
    """Return what the optimiser keeps, in memory and in a checkpoint: Adam and its kin two numbers of each weight."""
    if "8bit" in optimizer:
        return 2 * size.learning
    return 0 if optimizer in ("sgd", "adafactor") else 2 * _LEARNING_BYTES * size.learning


def final_bytes(size: ModelSize, tuning: str) -> int:
    """Return what the trained weights take: of a whole model, or of an adapter."""
    return _folder_bytes(size, tuning, size.published_bytes)


def _folder_bytes(size: ModelSize, tuning: str, whole_bytes: int) -> int:
    return (whole_bytes if tuning == "full" else size.learning * _LEARNING_BYTES) + _BESIDE_BYTES


def run_bytes(size: ModelSize, tuning: str, settings: TrainSettings, steps: int | None) -> int:
    """Return what a training has on the disk at most: a new checkpoint is whole before the oldest goes.

    So it is with the weights of the best step, which are kept beside them where that is measured.

    Args:
        size: of the model.
        tuning: `full`, or the kind of adapter.
        settings: how it is trained.
        steps: of the optimiser; None: many.
    """
    saves = math.inf if steps is None else math.ceil(steps / settings.save_steps)
    checkpoints = min(saves, CHECKPOINTS_KEPT + 1)
    models = 1 + (min(saves, _BEST_KEPT) if settings.validation_windows else 0)
    return round(checkpoints * checkpoint_bytes(size, tuning, settings.optimizer) + models * final_bytes(size, tuning))


def free_bytes(folder: Path) -> int:
    """Return what a folder may hold: what is free there, and what it holds now: the old goes as the new comes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    state = os.statvfs(existing)
    held = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return state.f_bavail * state.f_frsize + held


def check_room(
    folder: Path, needed_bytes: int, *, what: str = "checkpoints and weights need", option: str = "--runs"
) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        folder: that will hold it.
        needed_bytes: of all that is written.
        what: needs them.
        option: that names another folder.

    Raises:
        OmniError: less is free than is needed.
    """
    if (free := free_bytes(folder)) < needed_bytes:
        raise OmniError(
            f"{folder}: {what} about {needed_bytes / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free; "
            f"free some space, or choose another disk with {option}"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let libraries write a folder; where that fails, nothing of it is left.

    Raises:
        OSError: the disk refused it, in whatever words a library says so.
    """
    try:
        yield
    except Exception as error:
        code = _refusal(error, folder)
        shutil.rmtree(folder, ignore_errors=True)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(getattr(error, "filename", None) or folder)) from None


def _refusal(error: Exception, folder: Path) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError) and (told := _CODE.search(str(error))):
        return int(told[1])
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH):  # it does not say why
        state = os.statvfs(next(path for path in (folder, *folder.absolute().parents) if path.is_dir()))
        return errno.EIO if state.f_bavail * state.f_frsize > _BESIDE_BYTES else errno.ENOSPC
    return None
