"""A step that is too long for who sent SIGTERM is dropped, and taken again whole: no weight and no number changes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_cli.errors import Preempted
from omni_cli.recipes.vlm import Vlm
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, callbacks, train
from tests.support.bad_steps import night_recipe, spoilt
from tests.support.driving import tiny_student, write_drives
from tests.support.folders import tree
from tests.support.pipeline import QUIET, write_synthetic

MICRO_BATCHES = 3  # of a step
TIMES = ("elapsed_s", "samples_per_s", "tokens_per_s", "data_wait_share", "peak_memory_bytes")


def recipe(log_steps: int = 2) -> Vlm:
    """With dropout, whose random numbers a dropped step has drawn; epochs end within the run."""
    settings = {"batch_size": 1, "accumulation": MICRO_BATCHES, "max_steps": 6, "save_steps": 4, "log_steps": log_steps}
    return night_recipe("lora", **settings)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("dropping")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return Path(etl(recipe(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def trained(shards: Path, folder: Path, learns: Any = None) -> Path:
    train(learns or recipe(), TrainRequest(shards, folder, folder, "r", "test"), QUIET)
    return folder / "r"


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    return trained(shards, tmp_path_factory.mktemp("undisturbed"))


def interrupted(shards: Path, folder: Path, at: int, learns: Any = None) -> str:
    """Send SIGTERM in one of the micro-batches that are learned from; return what the training ends with."""

    def send(number, batch, made):
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    with spoilt(send, type(learns or recipe())), pytest.raises(Preempted) as stopped:
        trained(shards, folder, learns)
    return str(stopped.value)


def history(folder: Path) -> dict[int, dict[str, float]]:
    """What was learned from and how well, by step, without times; a stop may add a line, and begins the next mean."""
    lines = {line["step"]: line for line in checkpoints.read_history(folder)}
    return {step: {name: line[name] for name in line if name not in TIMES} for step, line in lines.items()}


@pytest.mark.fault("F2")
@pytest.mark.parametrize("at", [(1, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 2)])
def test_a_step_that_takes_too_long_is_dropped_and_taken_again(at, shards, undisturbed, tmp_path, monkeypatch) -> None:
    """Pain 12. Whether the last step is saved already or not, in the first step of an epoch or later."""
    monkeypatch.setattr(callbacks, "PATIENCE_S", 0.0)
    in_step, micro_batch = at
    saved = in_step - 1
    said = interrupted(shards, tmp_path, saved * MICRO_BATCHES + micro_batch)
    folder = tmp_path / "r"
    assert checkpoints.find_start(folder / "checkpoints", runs.open_run(folder).manifest.key()).step == saved
    assert said.startswith(f"stopped at step {saved} of 6, saved" if saved else "stopped before the first step")
    assert trained(shards, tmp_path) == folder
    assert tree(folder / "final") == tree(undisturbed / "final")
    found, expected = history(folder), history(undisturbed)
    counted = {step: (line["samples"], line["tokens"], line["grad_norm"]) for step, line in found.items()}
    assert {step: each for step, each in counted.items() if step in expected} == {
        step: (line["samples"], line["tokens"], line["grad_norm"]) for step, line in expected.items()
    }
    whole = {step: line for step, line in found.items() if step in expected and step not in (saved, saved + 1)}
    assert whole == {step: expected[step] for step in whole}


def test_the_mean_loss_of_a_stop_is_that_of_the_steps_that_ended(shards, undisturbed, tmp_path, monkeypatch) -> None:
    """What is logged at the stop has no part of the step that was dropped."""
    monkeypatch.setattr(callbacks, "PATIENCE_S", 0.0)
    interrupted(shards, tmp_path, MICRO_BATCHES + 2)
    first = history(tmp_path / "r")[1]
    trained(shards, tmp_path)
    second = history(tmp_path / "r")[2]
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(history(undisturbed)[2]["loss"], rel=1e-6)


@pytest.mark.fault("F2")
def test_what_norms_learned_from_a_dropped_step_is_dropped_too(tmp_path, monkeypatch) -> None:
    """BatchNorm learns whenever it is run, and no weight has to move for that; said is what was done."""
    settings = {"batch_size": 2, "accumulation": 3, "max_steps": 3, "save_steps": 3, "log_steps": 2}
    student = tiny_student("resnet", mode="full", train=settings)
    write_drives(tmp_path / "data", clips_per_chunk=2, seconds=3.0)
    shards = Path(etl(student, EtlRequest(data=tmp_path / "data", workers=0), QUIET)["shards"])
    undisturbed = trained(shards, tmp_path / "undisturbed", student)
    monkeypatch.setattr(callbacks, "PATIENCE_S", 0.0)
    said = interrupted(shards, tmp_path, 2 * 3 + 2, student)
    assert said.startswith("stopped at step 2 of 3, saved")
    trained(shards, tmp_path, student)
    assert tree(tmp_path / "r" / "final") == tree(undisturbed / "final")


def test_a_stop_in_the_first_step_of_an_epoch_is_logged_as_the_step_before(shards, undisturbed, tmp_path, monkeypatch):
    """The Trainer forgets the norm and the rate of its last step where an epoch begins."""
    monkeypatch.setattr(callbacks, "PATIENCE_S", 0.0)
    interrupted(shards, tmp_path, 2 * MICRO_BATCHES + 1, recipe(log_steps=6))
    (line,) = checkpoints.read_history(tmp_path / "r")
    expected = checkpoints.read_history(undisturbed)[0]
    assert (expected["step"], expected["epoch"]) == (2, 1.0)
    same = ("step", "epoch", "grad_norm", "learning_rate", "loss")
    assert {name: line[name] for name in same} == {name: expected[name] for name in same}


@pytest.mark.fault("F2")
def test_a_step_that_ends_in_time_is_kept(shards, undisturbed, tmp_path) -> None:
    said = interrupted(shards, tmp_path, MICRO_BATCHES + 1)
    assert said.startswith("stopped at step 2 of 6, saved")
    trained(shards, tmp_path)
    assert tree(tmp_path / "r" / "final") == tree(undisturbed / "final")


@pytest.mark.fault("F2")
def test_a_signal_that_kills_the_compiler_too_is_a_stop(shards, undisturbed, tmp_path) -> None:
    """A scheduler signals all processes of a job at once; the run goes on from what was saved before."""

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("g++ ended with -15")

    def fail(number, batch, made):
        if number == 4 * MICRO_BATCHES + 2:
            torch.compile(torch.sin, backend=killed)(torch.zeros(2))
        return made

    with spoilt(fail), pytest.raises(Preempted, match=r"^stopped at a step that was being compiled, unsaved; run the"):
        trained(shards, tmp_path)
    trained(shards, tmp_path)
    assert tree(tmp_path / "r" / "final") == tree(undisturbed / "final")
