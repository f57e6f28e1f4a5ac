"""Where else a training's curves go, besides history.jsonl: what the Trainer can report to, by `--report-to`."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from omni_cli.config import nearest
from omni_cli.errors import OmniError, Preempted, UsageError, first_line
from omni_cli.report import Console
from omni_cli.stages.runs import TENSORBOARD, Run
from omni_cli.telemetry import installed_version

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet-ml", "trackio": "trackio"}
_KEEPS_HERE = {"wandb": "WANDB_MODE=offline", "comet_ml": "COMET_START_ONLINE=0"}
_COMET_MODES = ("get", "get_or_create", "create")
_PATIENCE_S = 5.0  # for a session to end once a signal stopped the training: the scheduler kills soon
_MORE_PATIENCE_S = 60.0  # once an error did
_PROJECT = "huggingface"  # the Trainer's own callback for Weights & Biases says so where nobody names one

_End = Callable[[int], object]  # ends a session, with the exit code that is shown of it


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


@contextmanager
def reporting(names: Sequence[str], run: Run, step: int, console: Console) -> Iterator[list[TrainerCallback]]:
    """Give the Trainer's own callbacks for what was asked, logged in before anything slow is done, and end them.

    TensorBoard's curves lie in the run's folder.

    Args:
        names: of the reporters.
        run: that is trained.
        step: that it goes on from; what TensorBoard holds of later ones was lost, and is hidden.
        console: told of a session that does not end well.

    Raises:
        UsageError: nobody is logged in to one.
        OmniError: one does not answer.
    """
    with ExitStack() as held:
        if names:
            held.enter_context(_stdout_to_stderr())
        callbacks = [_callback(name, run, step) for name in names]
        for name in names:
            if name in _SESSIONS:
                held.enter_context(_session(name, run, console))
        yield callbacks


def _callback(name: str, run: Run, step: int) -> Any:
    if name == "tensorboard":
        return _tensorboard(run, step)
    (kind,) = get_reporting_integration_callbacks([name])
    return kind()


def _tensorboard(run: Run, step: int) -> Any:
    callback = TensorBoardCallback()  # loads the package
    folder = run.folder / TENSORBOARD
    callback.tb_writer = callback._SummaryWriter(log_dir=str(folder), purge_step=step + 1)
    return callback


@contextmanager
def _wandb(run: Run) -> Iterator[_End]:
    """Open what the callback finds open; the library itself would end it when the process ends, after `--json`."""
    wandb = import_module("wandb")
    try:
        with _nobody_to_ask():
            session = wandb.init(project=os.environ.get("WANDB_PROJECT", _PROJECT), name=run.name)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise UsageError(_refused("wandb", first_line(error))) from error
    except wandb.errors.Error as error:
        raise OmniError(_refused("wandb", first_line(error))) from error
    yield lambda exit_code: session.finish(exit_code=exit_code)


@contextmanager
def _comet(run: Run) -> Iterator[_End]:
    """Open what the callback finds open: one that is not heard says nothing, and the curves would be lost."""
    comet = import_module("comet_ml")
    mode = os.environ.get("COMET_MODE", "").lower()
    if mode and mode not in _COMET_MODES:
        raise UsageError(f"--report-to comet_ml: COMET_MODE is {mode!r}, expected one of {', '.join(_COMET_MODES)}")
    try:
        experiment = comet.start(mode=mode or None, experiment_config=comet.ExperimentConfig(name=run.name))
    except (ValueError, comet.exceptions.CometException) as error:
        raise UsageError(_refused("comet_ml", first_line(error))) from error
    if not experiment.alive:
        raise OmniError(_refused("comet_ml", "cannot be reached, or does not know the key"))
    # The callback would create another.
    with _variable("COMET_MODE", "get_or_create") if mode == "create" else nullcontext():
        yield lambda exit_code: experiment.end()


_SESSIONS: dict[str, Callable[[Run], AbstractContextManager[_End]]] = {"wandb": _wandb, "comet_ml": _comet}


@contextmanager
def _session(name: str, run: Run, console: Console) -> Iterator[None]:
    """Hold a session open, and end it however the training ends; what its end cannot send never hides that."""
    with _SESSIONS[name](run) as end:
        try:
            yield
        except BaseException as error:
            _end(name, partial(end, 1), console, _PATIENCE_S if isinstance(error, Preempted) else _MORE_PATIENCE_S)
            raise
        _end(name, partial(end, 0), console, None)


def _end(name: str, end: Callable[[], object], console: Console, patience_s: float | None) -> None:
    """End a session, and tell where its last curves may be lost; after a signal nobody waits for long."""
    failures: list[Exception] = []

    def run_it() -> None:
        try:
            end()
        except Exception as error:  # the library's, of any kind
            failures.append(error)

    thread = Thread(target=run_it, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    if thread.is_alive() and patience_s != _PATIENCE_S:
        console.say(f"--report-to {name}: waiting for its session to end")
        thread.join(patience_s)
    if thread.is_alive():
        console.warn(f"--report-to {name}: its session did not end within {patience_s:g} s; last curves may be lost")
    for error in failures:
        console.warn(f"--report-to {name}: its session did not end well; last curves may be lost: {first_line(error)}")


def _refused(name: str, why: str) -> str:
    return f"--report-to {name}: {why.rstrip(' .')}; to keep its curves on this machine set {_KEEPS_HERE[name]}"


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment meanwhile, which is set already."""
    before, os.environ[name] = os.environ[name], value
    try:
        yield
    finally:
        os.environ[name] = before


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Let no library wait for a login to be typed."""
    with Path(os.devnull).open() as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = stdin


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send elsewhere what reporters and the processes that they start print: stdout holds nothing but `--json`."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
