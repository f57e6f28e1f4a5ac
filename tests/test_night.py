"""A night in which everything goes wrong that can: in the morning the weights are an undisturbed run's."""

from functools import partial
from pathlib import Path

import pytest

from omni_cli.files import receipt_path
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.bad_steps import night_recipe, train_night
from tests.support.folders import tree
from tests.support.injection import REFUSED, needs_strace, run_traced
from tests.support.pipeline import QUIET, write_synthetic

PREEMPTED = 75


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("night")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return Path(etl(night_recipe("full"), EtlRequest(data=data, workers=0), QUIET)["shards"])


def newest(folder: Path) -> int:
    return checkpoints.find_start(folder / "checkpoints", runs.open_run(folder).manifest.key()).step


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@needs_strace
@pytest.mark.fault("F2", "F3", "F26", "F27")
@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.marathon)])
def test_a_nan_a_sigterm_a_full_disk_and_a_flipped_bit_change_no_weight(mode, shards, warm, tmp_path):
    """Pain 12. A NaN at step 37, SIGTERM at 53, a disk that is full from step 71 on (72 is saved), a flipped bit."""
    undisturbed, folder = tmp_path / "undisturbed" / "r", tmp_path / "here" / "r"
    result = train_night(shards, undisturbed.parent, mode)
    assert result["roll_backs"] == []
    again = partial(train_night, shards, folder.parent, mode)
    taken_by_then = 37 + (53 - 36)  # step 37 is taken twice
    words = [str(folder.parent), str(shards), mode, "37", str(taken_by_then)]
    first = warm.start("tests.support.bad_steps", *words)
    assert first.wait() == PREEMPTED, first.stderr
    assert "warning: loss is nan at step 37, on " in first.stderr
    assert "; going back to the checkpoint of step 36" in first.stderr
    assert newest(folder) == 53
    fault = "inject=write,pwrite64:error=ENOSPC"
    assert run_traced(again, fault, only=folder / "checkpoints" / "checkpoint-72" / "optimizer.pt") == REFUSED
    assert newest(folder) == 54
    flip(folder / "checkpoints" / "checkpoint-54" / "optimizer.pt")
    result = again()
    assert [(each["step"], each["reason"], each["to_step"]) for each in result["roll_backs"]] == [(37, "loss", 36)]
    assert tree(folder / "final") == tree(undisturbed / "final")
    assert receipt_path(folder / "final").read_bytes() == receipt_path(undisturbed / "final").read_bytes()
    assert tree(folder / "best") == tree(undisturbed / "best")
    kept = {step: line for line in lines(folder) if (step := line["step"]) % 9 == 0 or step % 5 == 0}
    assert kept == {line["step"]: line for line in lines(undisturbed)}


def lines(folder: Path) -> list[dict[str, float]]:
    """The history, without times; a step that a signal stopped has a line of its own, and begins the next mean."""
    names = ("step", "validation_loss", "grad_norm", "learning_rate")
    return [{name: line[name] for name in names if name in line} for line in checkpoints.read_history(folder)]
