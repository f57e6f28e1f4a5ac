"""Training: what it proves, what it refuses, and that being killed changes nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from omni_cli.config import resolve
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.files import exclusive, read_json, sha256_of
from omni_cli.profiles import load_profile
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards, write_manifest
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, kill_recipe, make_run, tiny_recipe, write_synthetic
from tests.support.warm import Warm, WarmProcess

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_synthetic(folder)
    return folder


@pytest.fixture(scope="module")
def shards(data):
    return {
        family: Path(etl(tiny_recipe(family), EtlRequest(data=data, name=family, workers=0), QUIET)["shards"])
        for family in ("qwen2_5_vl", "qwen3_vl")
    }


def request(shards: Path, folder: Path, **changes) -> TrainRequest:
    return replace(TrainRequest(shards, folder, folder, "r", "cpu-tiny"), **changes)


def published(folder: Path) -> dict:
    """The receipt of a run's weights: how they came to be, and the hash of every file."""
    receipt = read_json(folder / "r" / "final.receipt.json")
    assert all(sha256_of(folder / "r" / "final" / name) == file["sha256"] for name, file in receipt["files"].items())
    assert any(name.endswith(".safetensors") for name in receipt["files"])
    return receipt


def train_here(folder: Path, shards: Path, *how: str) -> None:
    """Train in this process what `start` trains in another; `how` is family, mode and schedule."""
    train(kill_recipe(*how, STEPS), TrainRequest(shards, folder, folder, "r", "t"), QUIET)


def start(warm: Warm, folder: Path, shards: Path, *how: str) -> WarmProcess:
    return warm.start("tests.support.train_once", str(folder), str(shards), *how, str(STEPS))


def kill_once(process: WarmProcess, folder: Path, pattern: str, wait_s: float) -> None:
    """Kill once another checkpoint is there, or is being written, at a moment nobody chose."""
    saved, deadline = folder / "r" / "checkpoints", time.monotonic() + 120
    before = set(saved.glob(pattern))
    while set(saved.glob(pattern)) <= before and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.01)
    time.sleep(wait_s)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0), process.stderr  # 0: it was quicker


@pytest.fixture
def check_killed(warm, tmp_path, shards):
    return partial(check_killed_equals_undisturbed, warm, tmp_path, shards)


def check_killed_equals_undisturbed(warm, tmp_path, shards, how, kills) -> None:
    """`kills`: at which checkpoint, and how many seconds after it."""
    undisturbed, killed, learned_from = tmp_path / "a", tmp_path / "b", shards[how[0]]
    train_here(undisturbed, learned_from, *how)
    for pattern, wait_s in kills:
        kill_once(start(warm, killed, learned_from, *how), killed, pattern, wait_s)
    train_here(killed, learned_from, *how)
    assert published(killed) == published(undisturbed)
    histories = [checkpoints.read_history(folder / "r") for folder in (killed, undisturbed)]
    assert [line["loss"] for line in histories[0]] == [line["loss"] for line in histories[1]]


FIRST, LAST = "checkpoint-*", f"checkpoint-{STEPS}.receipt.json"


@pytest.mark.parametrize(
    ("how", "kill"),
    [
        (("qwen2_5_vl", "full", "constant_with_warmup"), (FIRST, 0.3)),
        (("qwen3_vl", "full", "cosine"), (FIRST, 0.1)),
        (("qwen2_5_vl", "lora", "constant_with_warmup"), (LAST, 0.0)),
    ],
)
@pytest.mark.fault("F1")
def test_killed_and_run_again_the_weights_are_the_same_bit_for_bit(check_killed, how, kill) -> None:
    """Pain 12."""
    check_killed(how, [kill])


@pytest.mark.marathon
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("mode", ["full", "lora", "dora"])
@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup"])
def test_five_kills(check_killed, family, mode, schedule) -> None:
    generator = random.Random(f"{family} {mode}")
    kills = [*((FIRST, generator.uniform(0, 0.6)) for _ in range(4)), (LAST, generator.uniform(0, 0.1))]
    check_killed((family, mode, schedule), kills)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.fault("F2")
def test_sigterm_and_ctrl_c_save_what_was_learned(warm, tmp_path, shards, sent, code) -> None:
    process = start(warm, tmp_path, shards["qwen2_5_vl"], "qwen2_5_vl", "full", "cosine")
    while not list((tmp_path / "r" / "checkpoints").glob("checkpoint-*")):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.wait() == code
    run_key = runs.open_run(tmp_path / "r").manifest.key()
    assert 3 <= checkpoints.find_start(tmp_path / "r" / "checkpoints", run_key).step < STEPS


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.fault("F2")
@pytest.mark.storm
def test_a_signal_to_every_process_of_a_training_saves_what_was_learned(tmp_path, shards, sent, code) -> None:
    """As a terminal and a scheduler send it: the workers of the loader hear it too."""
    words = [str(tmp_path), str(shards["qwen2_5_vl"]), "qwen2_5_vl", "full", "cosine", "400", "2"]
    process = subprocess.Popen([sys.executable, "-m", "tests.support.train_once", *words], start_new_session=True)
    while not list((tmp_path / "r" / "checkpoints").glob("checkpoint-*.receipt.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    assert process.wait(300) == code
    run_key = runs.open_run(tmp_path / "r").manifest.key()
    assert checkpoints.find_start(tmp_path / "r" / "checkpoints", run_key).step > 0


@pytest.mark.fault("F22")
def test_a_tmpdir_too_long_for_a_socket_is_no_fault_of_the_loader(warm, tmp_path, shards) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    words = [str(tmp_path), str(shards["qwen2_5_vl"]), "qwen2_5_vl", "lora", "cosine", "2", "1"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = warm.start("tests.support.train_once", *words, environment=environment)
    assert process.wait() == 0, process.stderr


@pytest.mark.fault("F26")
def test_a_checkpoint_that_is_damaged_or_another_runs_does_not_count(tmp_path) -> None:
    for step, run_key in ((3, "mine"), (6, "mine"), (12, "another's")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * step)
        runs.seal_folder(folder, run=run_key, step=step)
    assert checkpoints.find_start(tmp_path, "mine").checkpoint == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "weights").write_bytes(b"x" * 6)
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoints.find_start(tmp_path, "mine").checkpoint == tmp_path / "checkpoint-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-3.receipt.json"]
    assert checkpoints.find_start(tmp_path, "a third").step == 0


def test_a_run_records_what_it_learned_from_and_does_nothing_twice(tmp_path, data) -> None:
    made = make_run(tmp_path, tiny_recipe(train=tiny_recipe().train.model_copy(update={"max_steps": 3})), data=data)
    manifest, learned = made.run.manifest, made.run.learned()
    assert manifest.recipe == "vlm"
    assert manifest.preprocess == open_shards(made.shards).manifest.preprocess
    assert learned.windows == open_shards(made.shards).manifest.count("train")
    assert set(learned.recordings).isdisjoint(
        entry.id for entry in open_shards(made.shards).manifest.recordings if entry.windows.get("val")
    )
    receipt = json.loads(made.run.final.with_name("final.receipt.json").read_text())
    assert receipt["gradients_checked_at_step"] is not None
    before = made.run.final.stat().st_mtime_ns
    train(made.recipe, TrainRequest(made.shards, data, tmp_path / "runs", "run", "test"), QUIET)
    assert made.run.final.stat().st_mtime_ns == before


def test_other_settings_are_refused_and_fresh_starts_anew(tmp_path, shards) -> None:
    first = tiny_recipe()
    train(first, request(shards["qwen2_5_vl"], tmp_path), QUIET)
    other = first.model_copy(update={"train": first.train.model_copy(update={"learning_rate": 0.5e-2})})
    with pytest.raises(UsageError, match=r"settings.train.learning_rate: 0.01 -> 0.005.*--fresh"):
        train(other, request(shards["qwen2_5_vl"], tmp_path), QUIET)
    train(other, request(shards["qwen2_5_vl"], tmp_path, fresh=True), QUIET)
    assert runs.open_finished(tmp_path / "r").manifest.settings["train"]["learning_rate"] == 0.5e-2


def test_shards_that_do_not_fit_are_refused_with_the_right_command(tmp_path, shards) -> None:
    wider = tiny_recipe(sample=VlmSample(cameras="4-cam", window=4, stride=4, canvas_px=168))
    with pytest.raises(
        UsageError, match=r"have canvas_width_px 112, this recipe asks for 168; .*omni etl --recipe vlm --profile"
    ):
        train(wider, request(shards["qwen2_5_vl"], tmp_path), QUIET)
    with pytest.raises(UsageError, match=r"have cameras .*asks for camera_front_wide_120fov; "):
        train(tiny_recipe(cameras="1-cam"), request(shards["qwen2_5_vl"], tmp_path), QUIET)


def test_a_sample_that_is_too_long_is_refused_never_cut(tmp_path, shards) -> None:
    """Pain 1: a cut would run through the placeholders of pictures."""
    recipe = tiny_recipe(train=VlmTrain(max_tokens=20, gradient_checkpointing=False))
    with pytest.raises(DataError, match=r"a sample has \d+ tokens, more than train.max_tokens = 20"):
        train(recipe, request(shards["qwen2_5_vl"], tmp_path), QUIET)


def test_an_empty_shard_folder_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty, it has no manifest\.json; finish it with the same omni etl"):
        train(tiny_recipe(), request(tmp_path / "empty", tmp_path), QUIET)


@pytest.mark.fault("F10")
def test_two_trainings_of_one_run_at_once_are_refused(tmp_path, shards) -> None:
    with exclusive(tmp_path / "r", "training in"), pytest.raises(OmniError, match="another omni is training in"):
        train(tiny_recipe(), request(shards["qwen2_5_vl"], tmp_path), QUIET)


def test_accumulated_small_batches_learn_as_one_large_batch(tmp_path, shards) -> None:
    """Pain 11. Rows have different numbers of labelled tokens: a mean of means would differ."""
    final = {}
    for name, batch, accumulation in (("one", 4, 1), ("four", 1, 4)):
        settings = tiny_recipe().train.model_copy(
            update={"batch_size": batch, "accumulation": accumulation, "learning_rate": 1e-3, "optimizer": "sgd"}
        )
        train(tiny_recipe(train=settings), request(shards["qwen2_5_vl"], tmp_path, run=name), QUIET)
        recipe = tiny_recipe()
        built = recipe.load(recipe.preprocess(), tmp_path / name / "final")
        final[name] = torch.cat([weight.flatten() for weight in built.model.parameters()])
    assert torch.allclose(final["one"], final["four"], atol=2e-6, rtol=0)


def test_dry_run_of_another_machines_profile_touches_nothing(tmp_path) -> None:
    recipe = resolve(Vlm, [load_profile("mi300x-4bit").recipe_layer("vlm")]).value
    plan = train(recipe, request(None, tmp_path, dry_run=True, profile="mi300x-4bit"), QUIET)
    assert plan["trainable_parameters"] == 61_341_696
    assert plan["visual_tokens_per_window"] == 1152
    assert list(tmp_path.iterdir()) == []


def test_without_shards_the_raw_data_are_cut_first(tmp_path, data, capsys) -> None:
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / "raw").symlink_to(data / "raw")
    asked = TrainRequest(None, mine, tmp_path, "r", "cpu-tiny")
    train(tiny_recipe(), asked, Console())
    assert "no shards yet: omni etl comes first, on " in capsys.readouterr().err
    assert runs.open_finished(tmp_path / "r").manifest.shards.folder.startswith(str(mine / "shards"))


def test_without_shards_and_without_raw_data_it_says_how_to_get_some(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no data folder .*; get some with: omni fetch --source synthetic"):
        train(tiny_recipe(), TrainRequest(None, tmp_path / "data", tmp_path, "r", "cpu-tiny"), QUIET)


def test_shards_that_leak_are_refused(tmp_path, shards) -> None:
    """One drive in train and in val, as a shard set of another hand may have it."""
    leaky = tmp_path / "leaky"
    shutil.copytree(shards["qwen2_5_vl"], leaky)
    manifest = open_shards(leaky).manifest
    one_drive = tuple(entry.model_copy(update={"group": "one drive"}) for entry in manifest.recordings)
    assert {split for entry in one_drive for split, count in entry.windows.items() if count} == {"train", "val"}
    write_manifest(leaky, manifest.model_copy(update={"recordings": one_drive}))
    with pytest.raises(DataError, match=r"one drive has windows in train and in val \(1 such groups\)"):
        train(tiny_recipe(), request(leaky, tmp_path), QUIET)
    assert not (tmp_path / "r" / "run.json").exists()
