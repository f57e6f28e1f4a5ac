"""Where else a training's curves go, besides history.jsonl: what the Trainer can report to, by `--report-to`."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.stages.runs import TENSORBOARD, Run
from omni_cli.telemetry import installed_version

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet-ml", "trackio": "trackio"}


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a reporter that nobody knows, or whose package is not installed.

    Raises:
        UsageError: there is one; the message says what to do.
    """
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--report-to {name}: no such reporter; {nearest(name, PACKAGES)}")
        if installed_version(PACKAGES[name]) is None:
            package = PACKAGES[name]
            raise UsageError(f"--report-to {name}: {package} is not installed; install it with: pip install {package}")


def reporters(names: Sequence[str], run: Run, step: int) -> list[TrainerCallback]:
    """Return the Trainer's own callbacks for what was asked; TensorBoard's curves lie in the run's folder.

    Args:
        names: of the reporters.
        run: that is trained.
        step: that it goes on from; what TensorBoard holds of later ones was lost, and is hidden.
    """
    return [_tensorboard(run, step) if name == "tensorboard" else _other(name) for name in names]


def _tensorboard(run: Run, step: int) -> Any:
    callback = TensorBoardCallback()  # loads the package
    folder = run.folder / TENSORBOARD
    callback.tb_writer = callback._SummaryWriter(log_dir=str(folder), purge_step=step + 1)
    return callback


def _other(name: str) -> Any:
    (kind,) = get_reporting_integration_callbacks([name])
    return kind()
