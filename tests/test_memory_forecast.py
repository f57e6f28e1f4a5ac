"""`omni train --dry-run` foresees the memory of a step: held against what a process really took."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from omni_cli.config import resolve
from omni_cli.errors import UsageError
from omni_cli.profiles import Machine, load_profile
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain
from omni_cli.report import Console
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.runs import HISTORY, TELEMETRY
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.cut_forecast import CutMemory, forecast_cut
from omni_cli.stages.train.fits import check_fits
from omni_cli.stages.train.forecast import Memory, forecast
from omni_cli.stages.train.plan import _is_alike, check_memory, dry_run
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

_MIB = 2**20
_ALLOWED = 0.2  # of what was measured
LATER = {"sharding": "fsdp2", "compile": True, "blind": True}  # settings of a step that runs of before do not know


def large(family="qwen2_5_vl", mode="full", *, window=16, canvas_px=336, cameras="1-cam", **train_changes):
    """Return a tiny model's recipe whose activations dwarf its weights."""
    base = tiny_recipe(family, mode=mode)
    sample = VlmSample(cameras=cameras, window=window, stride=window, canvas_px=canvas_px)
    return base.model_copy(update={"sample": sample, "train": base.train.model_copy(update=train_changes)})


def foreseen(recipe, **changes) -> Memory:
    memory = forecast(recipe, recipe.preprocess(), **{"on_gpu": False, **changes})
    assert memory is not None
    return memory


def measured_bytes(recipe) -> int:
    """Return by how much a process grew; the C library gives large blocks back at once: none counts twice."""
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.support.step_memory", recipe.model_dump_json()]
    done = subprocess.run(command, env={**os.environ, **given_back}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def assert_foreseen(recipe, at_least_mib: int) -> None:
    taken, memory = measured_bytes(recipe), foreseen(recipe)
    assert taken > at_least_mib * _MIB  # enough to tell it from what a process has anyway
    assert memory.peak == pytest.approx(taken, rel=_ALLOWED)


def test_what_a_step_takes_is_foreseen_within_a_fifth():
    assert_foreseen(large(batch_size=2), 100)


@pytest.mark.marathon
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_larger_steps_take_is_foreseen_within_a_fifth(family, mode, is_checkpointed):
    changes = {"batch_size": 6, "gradient_checkpointing": is_checkpointed, "accumulation": 2}
    assert_foreseen(large(family, mode, canvas_px=504, **changes), 200)


@pytest.mark.marathon
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_a_window_of_64_frames_takes_is_foreseen_within_a_fifth(family):
    """Measured: 463 MiB where 459 were foreseen, of Qwen3-VL's kind 368 where 364 were."""
    assert_foreseen(large(family, window=64, canvas_px=504, batch_size=1, gradient_checkpointing=True), 200)


@pytest.mark.marathon
def test_what_65536_packed_tokens_take_is_foreseen_within_a_fifth():
    """Measured: 3206 MiB where 3167 were foreseen, in two and a half minutes of one core."""
    recipe = large(window=64, canvas_px=560, batch_size=10, mode="lora", gradient_checkpointing=True)
    assert foreseen(recipe).tokens >= 65_536
    assert_foreseen(recipe, 1000)


def test_what_is_foreseen_follows_the_settings():
    """And none of it is taken: the first step would need more than most machines have."""
    assert foreseen(large(window=64, canvas_px=1400, batch_size=16)).peak > 64 << 30
    recipe = large(batch_size=2)
    plain = foreseen(recipe)
    assert foreseen(large(batch_size=2, gradient_checkpointing=True)).activations < 0.8 * plain.activations
    assert foreseen(large(mode="lora", batch_size=2)).activations < 0.6 * plain.activations
    model = recipe.build(recipe.preprocess()).model
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert (plain.weights, plain.optimizer) == (weights, 2 * weights)
    assert foreseen(large(batch_size=2, accumulation=2)).gradients == weights
    assert foreseen(large(batch_size=4)).activations == pytest.approx(2 * plain.activations, rel=0.02)


def test_the_larger_of_the_backward_pass_and_the_optimisers_step_counts():
    recipe = tiny_recipe(cameras="1-cam")
    small = recipe.train.model_copy(update={"batch_size": 1, "optimizer": "adamw_torch"})
    memory = foreseen(recipe.model_copy(update={"train": small}))
    assert memory.gradients == memory.weights == memory.activations == memory.optimizer / 2  # copies of the gradients


def window_tokens(recipe) -> int:
    preprocess = recipe.preprocess()
    return len(recipe.probe_rows(recipe.build(preprocess), preprocess)[0]["input_ids"])


@pytest.fixture
def tight():
    return Machine(accelerator="cuda", memory_gib=0.1, precision="float32")


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, tight):
    recipe = large(batch_size=8)
    request = TrainRequest(None, tmp_path, tmp_path, "r", "small", dry_run=True, machine=tight)
    with pytest.raises(UsageError, match=r"needs about .* GiB at its peak, profile small has 0.1 GiB; ") as refusal:
        train(recipe, request, QUIET)
    assert "--set train.gradient_checkpointing=true takes less, or --set tune.mode=lora takes less" in str(
        refusal.value
    )
    assert not list(tmp_path.iterdir())


def test_the_batch_that_is_said_to_fit_does(tight):
    recipe, machine = large(batch_size=8), tight.model_copy(update={"memory_gib": 0.5})
    with pytest.raises(UsageError, match=r"--set train.batch_size=\d+ would fit") as refusal:
        check_fits(recipe, foreseen(recipe), machine, "p")
    batch = int(str(refusal.value).split("batch_size=")[1].split()[0])
    fitting = large(batch_size=batch)
    assert "at its peak, profile p has 0.5 GiB" in check_fits(fitting, foreseen(fitting), machine, "p")
    larger = large(batch_size=batch + 1)
    with pytest.raises(UsageError):
        check_fits(larger, foreseen(larger), machine, "p")


def test_a_training_that_cannot_fit_its_accelerator_does_not_begin(tmp_path, tight):
    """A mistake of a profile's user: before etl, and before a model is loaded."""
    request = TrainRequest(None, tmp_path, tmp_path, "r", "small", machine=tight)
    with pytest.raises(UsageError, match=r"profile small has 0\.1 GiB"):
        train(large(batch_size=8), request, QUIET)
    assert not list(tmp_path.iterdir())


def cut(**changes) -> Vlm:
    """A tiny model that is cut over its processes."""
    settings = VlmTrain(batch_size=2, workers=0, gradient_checkpointing=True, sharding="fsdp2", **changes)
    return tiny_recipe("qwen3_vl", cameras="1-cam", train=settings)


def sure(recipe, processes: int) -> CutMemory:
    memory = forecast_cut(recipe, recipe.preprocess(), processes)
    assert memory is not None
    return memory


def test_one_process_plans_for_several_and_says_who_knows_more(tmp_path, tight, capsys):
    """What all hold together; how many there will be, nobody has said."""
    request = TrainRequest(None, tmp_path, tmp_path, "r", "small", dry_run=True, machine=tight)
    planned = train(cut(), request, Console())
    assert planned["memory_without_activations_gib"] > 0
    assert not {"memory_gib", "memory_of_each_process_gib"} & planned.keys()
    assert (
        "train.sharding = fsdp2 needs several processes, which one alone can only plan for" in capsys.readouterr().err
    )
    student = Distill(train={"sharding": "fsdp2"})
    with pytest.raises(UsageError, match="a model of recipe 'distill' is not cut; leave it at none"):
        train(student, request, QUIET)


def test_what_each_process_holds_of_a_cut_model_is_planned_and_refused_where_it_cannot_fit(tmp_path, tight):
    """A lower bound: four numbers of four bytes for each weight, over the processes."""
    recipe, memory = cut(accumulation=4), sure(cut(accumulation=2), 2)  # of which each takes half
    weights = recipe.size(recipe.preprocess()).weights
    assert memory.peak == pytest.approx(4 * 4 * weights / 2 + memory.gathered)
    promised = {fit: tight.model_copy(update={"memory_gib": memory.peak * fit / 2**30}) for fit in (0.99, 1.01)}
    request = TrainRequest(None, tmp_path, tmp_path, "r", "small", dry_run=True, machine=promised[1.01])
    planned = dry_run(recipe, request, QUIET, 2)["memory_of_each_process_gib"]
    assert planned["at_least"] == round(memory.peak / 2**30, 2)
    line = (
        r"^each of 2 processes needs at least 0\.\d\d GiB, without its activations, profile small has 0\.\S+ GiB; no "
    )
    with pytest.raises(UsageError, match=line) as refusal:
        dry_run(recipe, replace(request, machine=promised[0.99]), QUIET, 2)
    assert "no fewer than 3 processes could hold it, or --set train.sharding=none --set tune.mode=lora takes less" in (
        str(refusal.value)
    )
    with pytest.raises(UsageError, match="each of 2 processes needs at least"):
        check_memory(recipe, replace(request, machine=promised[0.99]), QUIET, 2)


def test_more_processes_do_not_hold_what_each_holds_whole_before_it_is_cut(tight):
    memory = sure(cut(), 64)
    assert memory.peak == memory.uncut == 4 * cut().size(cut().preprocess()).weights
    small = tight.model_copy(update={"memory_gib": memory.uncut * 0.9 / 2**30})
    with pytest.raises(UsageError, match=r"to hold the model in float32 until it is cut, profile p has \S+ GiB; --set"):
        check_fits(cut(), memory, small, "p")


@pytest.fixture
def gpu(monkeypatch):
    """Put a GPU here, as far as torch tells of it; returns what sets its memory, and how much of it is free [GiB]."""

    def put(total_gib: float, free_gib: float) -> None:
        total, free = int(total_gib * 2**30), int(free_gib * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        found = SimpleNamespace(name="Tiny", total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))

    return put


@pytest.mark.parametrize("accelerator", ["cuda", "cpu"])
def test_a_step_is_held_against_the_gpu_that_is_here_too(accelerator, gpu, tmp_path, capsys):
    """A profile may promise more than there is; that of a CPU promises nothing of a GPU."""
    recipe = large(batch_size=8, mode="lora")
    peak_gib = foreseen(recipe, on_gpu=True).peak / 2**30
    promised = Machine(accelerator=accelerator, memory_gib=100 * peak_gib, precision="float32")
    request = TrainRequest(None, tmp_path, tmp_path, "r", "p", machine=promised)
    gpu(total_gib=0.8 * peak_gib, free_gib=0.8 * peak_gib)
    line = rf"^a step needs about {peak_gib:.2f} GiB at its peak, GPU Tiny has {0.8 * peak_gib:.2f} GiB; --set train"
    with pytest.raises(UsageError, match=line):
        check_memory(recipe, request, QUIET)
    gpu(total_gib=2 * peak_gib, free_gib=2 * peak_gib)
    check_memory(recipe, request, Console())
    assert "warning" not in capsys.readouterr().err
    gpu(total_gib=2 * peak_gib, free_gib=0.5 * peak_gib)
    check_memory(recipe, request, Console())
    free = f"of GPU Tiny {0.5 * peak_gib:.2f} GiB are free of {2 * peak_gib:.2f} GiB: memory may run out unless other"
    assert f"warning: a step needs about {peak_gib:.2f} GiB at its peak, and {free}" in capsys.readouterr().err
    shared = promised.model_copy(update={"unified_memory": True})
    check_memory(recipe, replace(request, machine=shared), Console())
    assert "warning" not in capsys.readouterr().err


def test_a_training_that_its_gpu_cannot_hold_does_not_begin_and_its_plan_does(gpu, tmp_path, tight):
    """A plan may be for another machine."""
    recipe, promised = large(batch_size=8), tight.model_copy(update={"memory_gib": 100.0})
    gpu(total_gib=0.1, free_gib=0.1)
    request = TrainRequest(None, tmp_path, tmp_path, "r", "p", dry_run=True, machine=promised)
    assert train(recipe, request, QUIET)["dry_run"]
    with pytest.raises(UsageError, match=r"GPU Tiny has 0\.10 GiB"):
        check_memory(recipe, request, QUIET)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A finished run of four steps that logs each, measures and saves every other, and a plan of one like it."""
    folder = tmp_path_factory.mktemp("logged")
    recipe = tiny_recipe(cameras="1-cam")
    each = {"max_steps": 4, "log_steps": 1, "save_steps": 2}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=each)})
    write_synthetic(folder / "data", cameras=("camera_front_wide_120fov",))
    made = make_run(folder, recipe, data=folder / "data")
    request = TrainRequest(made.shards, made.data, folder / "runs", "other", "test", dry_run=True)

    def plan(**changes):
        longer = {"max_steps": 3_600, **changes}
        return train(recipe.model_copy(update={"train": recipe.train.model_copy(update=longer)}), request, QUIET)

    return made, plan


def test_hours_are_those_of_a_run_whose_steps_did_the_same(logged):
    made, plan = logged
    step_s = 2 / statistics.median(line["samples_per_s"] for line in read_history(made.run.folder))
    planned = plan()
    assert planned["hours"] > 1.005 * step_s  # of 3600 steps: what measuring and saving take comes on top
    assert planned["tokens_per_sample"] == window_tokens(made.recipe)
    unknown = "unknown: no finished run of this profile, model, batch and validation is here, of two logged lines"
    for other in ({"batch_size": 3}, {"validation_windows": 3}, {"blind": True}, {"compile": True}):
        assert plan(**other)["hours"].startswith(unknown)


def test_a_run_that_is_finished_needs_no_memory_any_more(logged, tight):
    """It may have been trained on a larger machine."""
    made, _ = logged
    small = tight.model_copy(update={"memory_gib": 1e-6})
    request = TrainRequest(made.shards, made.data, made.run.folder.parent, made.run.folder.name, "test", machine=small)
    assert train(made.recipe, request, QUIET)["run"] == str(made.run.folder)
    with pytest.raises(UsageError, match="profile test has 1e-06 GiB"):
        train(made.recipe, replace(request, fresh=True), QUIET)


def test_a_run_that_does_not_know_a_setting_did_what_that_changes_nothing_of():
    recipe = tiny_recipe(cameras="1-cam")
    settings = recipe.model_dump(mode="json")
    older = {**settings, "train": {name: one for name, one in settings["train"].items() if name not in LATER}}
    assert (_is_alike(older, recipe), _is_alike(settings, recipe)) == (True, True)
    for name, value in LATER.items():
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={name: value})})
        assert not _is_alike(older, other)
        assert _is_alike(other.model_dump(mode="json"), other)


def test_hours_hold_what_measuring_and_saving_take_and_not_what_a_kill_lost(logged):
    """The clock of a line's pace stands still at a checkpoint, people's does not."""
    made, plan = logged
    lines = [(1, 9.0), (2, 13.0), (3, 17.0), (4, 18.0)]  # a step takes one second; at step 2 the val split three
    history = [{"step": at, "loss": 1.0, "samples": 2 * at, "samples_per_s": 2.0, "elapsed_s": s} for at, s in lines]
    place = {"session": 1, "step": 4}
    ends = [{**place, "elapsed_s": 0.0, "opened": {}}, {**place, "elapsed_s": 19.0}]  # to save takes three and one
    write_lines(made.run.folder, history, ends)
    assert plan()["hours"] == pytest.approx((3600 + 1800 * (3 + 3 + 1) / 2) / 3600, rel=0.01)
    history[3]["elapsed_s"], ends[1]["elapsed_s"] = 518.0, 519.0
    write_lines(made.run.folder, history, [ends[0], {**ends[0], "elapsed_s": 500.0}, ends[1]])
    assert plan()["hours"] == pytest.approx((3600 + 1800 * (3 + 3 + 1)) / 3600, rel=0.01)
    write_lines(made.run.folder, history[3:], [ends[0]])
    assert plan()["hours"].startswith("unknown")  # nobody can tell it from what comes before a first step


def write_lines(folder, history, telemetry) -> None:
    for name, lines in ((HISTORY, history), (TELEMETRY, telemetry)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.marathon
@pytest.mark.parametrize("name", ["mi300x-bf16", "mi300x-4bit", "h200-bf16", "dgx-spark", "rtx4090-4bit", "cpu-tiny"])
def test_a_shipped_profile_fits_its_machine(name):
    profile = load_profile(name)
    recipe = resolve(Vlm, [profile.recipe_layer("vlm")]).value
    memory = foreseen(recipe, on_gpu=profile.machine.accelerator != "cpu")
    assert check_fits(recipe, memory, profile.machine, name)
