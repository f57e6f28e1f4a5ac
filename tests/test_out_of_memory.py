"""Memory that runs out is one line that says what is saved and what would take less, wherever in a training it does."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from omni_cli.errors import OmniError
from omni_cli.files import receipt_path
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from omni_cli.stages.checkpoints import find_start
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.memory import GIB
from omni_cli.stages.out_of_memory import in_words
from omni_cli.stages.runs import open_run
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.fits import lighter, smaller_shards
from tests.support.bad_steps import night_recipe, spoilt
from tests.support.folders import tree
from tests.support.pipeline import QUIET, write_synthetic
from tests.support.ranked import train_ranked
from tests.support.trackers import stand_in_wandb

ON_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB"
GOES_ON = r"the same command goes on from \S+/checkpoint-{} where more memory is free"
LESS = (
    "a run of another name takes less with --set train.batch_size=1 --set train.accumulation=2, or --set "
    "train.gradient_checkpointing=true, or --set tune.mode=lora, or --set train.optimizer=adamw_8bit; or make a "
    "smaller --canvas or --window at etl"
)


def too_large(*_, **__):
    """What torch says on a CPU, in its own words: 2^60 bytes."""
    torch.empty(1 << 60, dtype=torch.uint8)


def on_gpu(*_, **__):
    raise torch.OutOfMemoryError(ON_GPU)


def recipe_of(**changes) -> Vlm:
    return night_recipe("full", **{"max_steps": 4, "save_steps": 2, "log_steps": 1, **changes})


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("short")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return Path(etl(recipe_of(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def run_train(shards, folder, recipe=None, **asked):
    return train(recipe or recipe_of(), TrainRequest(shards, folder, folder, "r", "test", **asked), QUIET)


def run_short(shards, folder, **asked) -> str:
    """Return the line that a training ends with."""
    with pytest.raises(OmniError) as ended:
        run_train(shards, folder, **asked)
    assert ended.value.exit_code == 1
    return str(ended.value)


def published(run_folder: Path):
    return tree(run_folder / "final"), receipt_path(run_folder / "final").read_bytes()


def test_a_step_without_memory_ends_in_one_line_and_training_goes_on_from_its_checkpoint(shards, tmp_path):
    run_train(shards, tmp_path / "undisturbed")
    with spoilt(lambda taken, batch, made: too_large() if taken == 3 else made):
        said = run_short(shards, tmp_path)
    sizes = r"this machine has \d+\.\d\d GiB of memory, this process held \d+\.\d\d GiB \(.*can't allocate memory.*\)"
    line = rf"run {tmp_path}/r: memory ran out at step 3 of 4: {sizes}; {GOES_ON.format(2)}; {re.escape(LESS)}"
    assert re.fullmatch(line, said)
    run_train(shards, tmp_path)
    assert published(tmp_path / "r") == published(tmp_path / "undisturbed" / "r")


def test_a_trackers_session_ends_as_one_that_failed(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with stand_in_wandb(tmp_path / "site", monkeypatch) as told, spoilt(on_gpu):
        run_short(shards, tmp_path, report_to=("wandb",))
        assert json.loads(told.read_text().splitlines()[-1]) == {"finished": 1}


def test_before_the_first_checkpoint_it_is_said_that_nothing_is_saved(shards, tmp_path):
    with spoilt(on_gpu):
        said = run_short(shards, tmp_path)
    assert "ran out at step 1 of 4: " in said
    assert "the same command begins anew, since nothing is saved yet, where more memory is free; " in said


def test_memory_that_runs_out_in_validation_keeps_the_checkpoint_before(shards, tmp_path, monkeypatch):
    learned, loss = [], Vlm.loss

    def failing(self, model, batch, preprocess):
        learned.extend([batch] if model.training else [])
        return loss(self, model, batch, preprocess) if model.training or len(learned) < 4 else on_gpu()

    monkeypatch.setattr(Vlm, "loss", failing)
    said = run_short(shards, tmp_path)
    assert "memory ran out as step 4 of 4 was measured and saved: " in said
    assert re.search(GOES_ON.format(2), said)
    assert find_start(tmp_path / "r" / "checkpoints", open_run(tmp_path / "r").manifest.key()).step == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("omni_cli.recipes.vlm.Vlm.self_test", "in the first try-out"),
        ("omni_cli.recipes.vlm.Vlm.build", "as the model was built"),
        ("transformers.Trainer._move_model_to_device", "as the model was put on its device"),
        ("omni_cli.recipes.vlm.Vlm.save", "as the trained weights were written"),
    ],
)
def test_it_is_said_at_what_moment_it_ran_out(where, said, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(where, on_gpu)
    recipe = recipe_of(max_steps=1, validation_windows=0)
    assert f"memory ran out {said}: this machine has " in run_short(shards, tmp_path, recipe=recipe)


def test_of_two_ranks_the_one_that_has_no_memory_says_so_and_the_other_does_not_wait(warm, shards, tmp_path):
    """It is in the middle of a step, where the other waits for its gradients."""
    first, other = train_ranked(warm, 2, tmp_path, shards, "r", faults={"memory": [1, 3]}, save_steps=2,
                                validation_windows=0)  # fmt: skip
    assert (first.returncode, other.returncode) == (1, 1), first.stderr + other.stderr
    assert re.search(rf"^error: run \S+: memory of process 1 of 2 ran out at step 3 of 20: .*; {GOES_ON.format(2)}; ",
                     other.stderr, re.MULTILINE)  # fmt: skip
    assert "error: process 0 of 2 lost another one, which says itself why it ended" in first.stderr
    assert "Traceback" not in first.stderr + other.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("HIP out of memory."), "GPU Tiny has 24.00 GiB of memory, this process held 23.50 GiB"),
        (RuntimeError("CUDA error: out of memory"), "GPU Tiny has 24.00 GiB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU Tiny has"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: "),
            "this machine",
        ),
    ],
)
def test_a_gpu_is_told_from_its_host(error, said, monkeypatch):
    found = SimpleNamespace(name="Tiny", total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(23.5 * GIB))
    with pytest.raises(OmniError, match=said), in_words(str):
        raise error


@pytest.mark.parametrize("fail", [too_large, on_gpu, lambda: bytearray(1 << 60)], ids=["tensor", "gpu", "python"])
def test_whatever_says_that_memory_ran_out_is_one_line(fail):
    held = r"^this machine has \d+\.\d\d GiB of memory, this process held \d+\.\d\d GiB \(.*(allocate|MemoryError)"
    with pytest.raises(OmniError, match=held) as told, in_words(str):
        fail()
    assert isinstance(told.value.__cause__, RuntimeError | MemoryError)  # whoever looks for a bug of ours finds where


def test_what_is_no_lack_of_memory_stays_as_it_is():
    with pytest.raises(RuntimeError, match="device-side assert"), in_words(str):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_student_is_told_only_of_what_it_can_do():
    student = Distill()
    assert smaller_shards(student) == "make a smaller --window at etl"
    assert lighter(student) == ["--set tune.mode=lora", "--set train.optimizer=adamw_8bit"]
    with pytest.raises(ValueError, match="a driving net's layers cannot be recomputed; leave it at false"):
        Distill(train={"gradient_checkpointing": True})
