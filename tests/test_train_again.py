"""Training that goes on: whatever was lost, the receipt in the end is the undisturbed run's, byte for byte."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_cli.errors import DataError, UsageError
from omni_cli.files import RECEIPT_PROOF, read_json, receipt_path, sha256_of
from omni_cli.report import Console
from omni_cli.stages import checkpoints, locate, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from tests.support.hostile import Hostile
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic

BASE = Path(__file__).parent / "assets" / "tiny_base"
TORN = b'{"epoch":0.5,"grad_no'  # a line in the history, killed while it was written


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    write_synthetic(folder, cameras=("camera_front_wide_120fov",))
    return folder


@pytest.fixture(scope="module")
def shards(data):
    return Path(etl(recipe_of(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def recipe_of(mode="full", **train_settings):
    """A rate that never falls to zero and an end within an epoch: a step too many would change the weights."""
    settings = {"schedule": "constant_with_warmup", "max_steps": 4, "save_steps": 1, **train_settings}
    train_table = tiny_recipe().train.model_copy(update=settings)
    return tiny_recipe(cameras="1-cam", mode=mode, train=train_table, model=str(BASE))


def run_train(recipe, shards, folder, *, fresh=False):
    train(recipe, TrainRequest(shards, folder, folder, "r", "test", fresh=fresh), QUIET)
    return folder / "r"


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """Finished runs: one is trained where its settings are first asked for, and every test takes a copy."""
    made = {}

    def take(recipe, folder: Path) -> Path:
        key = recipe.model_dump_json()
        if key not in made:
            made[key] = run_train(recipe, shards, tmp_path_factory.mktemp("trained"))
        return Path(shutil.copytree(made[key], folder / "r"))

    return take


def published(run_folder: Path) -> dict[str, bytes]:
    """The files of the weights, and the receipt that says how they came to be."""
    paths = [receipt_path(run_folder / "final"), *(run_folder / "final").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("lost", ["receipt", "all"])
def test_after_the_last_checkpoint_no_step_more_is_taken(tmp_path, trained, shards, mode, lost):
    folder = trained(recipe_of(mode), tmp_path)
    undisturbed = published(folder)
    receipt_path(folder / "final").unlink()
    if lost == "all":
        shutil.rmtree(folder / "final")
    run_train(recipe_of(mode), shards, tmp_path)
    assert published(folder) == undisturbed


@pytest.mark.parametrize("steps", [2, 3])
def test_resumed_with_one_step_left_the_receipt_is_the_same(tmp_path, trained, shards, steps):
    """From step 1 the check of the gradients is still due, from step 2 it is done; no line was due in the history."""
    recipe = recipe_of(max_steps=steps)
    folder = trained(recipe, tmp_path)
    undisturbed = published(folder)
    assert read_json(receipt_path(folder / "final"))["gradients_checked_at_step"] == 1
    receipt_path(folder / "final").unlink()
    shutil.rmtree(folder / "checkpoints" / f"checkpoint-{steps}")
    run_train(recipe, shards, tmp_path)
    assert published(folder) == undisturbed


def test_where_log_and_save_do_not_meet_the_means_are_the_same(tmp_path, trained, shards):
    recipe = recipe_of(max_steps=6, save_steps=3, log_steps=2)
    folder = trained(recipe, tmp_path)
    history, undisturbed = checkpoints.read_history(folder), published(folder)
    assert [line["step"] for line in history] == [2, 3, 4, 6]
    receipt_path(folder / "final").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    run_train(recipe, shards, tmp_path)
    assert [line["loss"] for line in checkpoints.read_history(folder)] == [line["loss"] for line in history]
    assert published(folder) == undisturbed


def test_a_torn_last_line_of_the_history_is_logged_again(tmp_path, trained, shards):
    folder = trained(recipe_of(), tmp_path)
    history, undisturbed = checkpoints.read_history(folder), published(folder)
    path = folder / "history.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"{")] + TORN)
    receipt_path(folder / "final").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    run_train(recipe_of(), shards, tmp_path)
    assert [line["loss"] for line in checkpoints.read_history(folder)] == [line["loss"] for line in history]
    assert published(folder) == undisturbed


@pytest.mark.parametrize("damage", [TORN, b"\0" * 40, b"\xff\xfe", b"[1]"], ids=["torn", "zeros", "no text", "a list"])
def test_a_damaged_line_of_the_history_is_dropped_at_the_end_and_refused_within(tmp_path, damage):
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3)]
    (tmp_path / "history.jsonl").write_bytes(b"\n".join([*lines, damage]))
    assert [line["step"] for line in checkpoints.read_history(tmp_path)] == [1, 2, 3]
    (tmp_path / "history.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(DataError, match=r"history\.jsonl: line 2 is damaged; start the run anew with --fresh"):
        checkpoints.read_history(tmp_path)


def test_a_history_that_does_not_reach_the_last_step_is_refused(tmp_path, trained, shards):
    folder = trained(recipe_of(), tmp_path)
    receipt_path(folder / "final").unlink()
    (folder / "history.jsonl").unlink()
    with pytest.raises(DataError, match=r"history\.jsonl: has no line of step 4; start the run anew with --fresh"):
        run_train(recipe_of(), shards, tmp_path)


@pytest.mark.parametrize("left", ["final", "checkpoints"])
def test_weights_of_another_training_never_count(tmp_path, trained, shards, left):
    """A run.json beside the weights and checkpoints of other settings, as a kill could once leave it."""
    mine, others = recipe_of(), recipe_of(learning_rate=5e-3)
    undisturbed = published(trained(mine, tmp_path / "mine"))
    folder = trained(others, tmp_path / "others")
    for name in ("run.json", "config.toml"):
        shutil.copy(tmp_path / "mine" / "r" / name, folder / name)
    if left == "checkpoints":
        receipt_path(folder / "final").unlink()
    assert not runs.open_run(folder).is_done()
    run_train(mine, shards, tmp_path / "others")
    assert published(folder) == undisturbed


def test_killed_inside_fresh_nothing_of_the_old_run_is_taken_for_the_new(tmp_path, trained, shards, monkeypatch):
    old, new = recipe_of(), recipe_of(learning_rate=5e-3)
    undisturbed = published(trained(new, tmp_path / "undisturbed"))
    folder = trained(old, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_train(new, shards, tmp_path / "killed", fresh=True)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not locate.finished_runs(tmp_path / "killed")
    run_train(new, shards, tmp_path / "killed")
    assert published(folder) == undisturbed
    assert [path.name for path in folder.parent.iterdir()] == ["r"]


@pytest.mark.fault("F12", "F26")
def test_whatever_is_damaged_in_the_newest_checkpoint_the_one_before_it_goes_on(tmp_path, trained, shards, capsys):
    """One flipped bit of one file, or the file lost; which checkpoint is the newest is told by no clock."""
    folder = trained(recipe_of(), tmp_path)
    undisturbed, newest = published(folder), folder / "checkpoints" / "checkpoint-4"
    lost = {"optimizer.pt", "rng_state.pth"}
    for part in ("model.safetensors", "scheduler.pt", "trainer_state.json", *sorted(lost)):
        (newest / part).unlink() if part in lost else flip(newest / part)
        os.utime(newest.with_name("checkpoint-3"), (4e9, 4e9))
        receipt_path(folder / "final").unlink()
        train(recipe_of(), TrainRequest(shards, tmp_path, tmp_path, "r", "test"), Console())
        assert "going on at step 3 of 4" in capsys.readouterr().err, part
        assert published(folder) == undisturbed, part


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.fault("F24")
@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_that_another_hand_sealed_never_runs(tmp_path, trained, shards, part):
    folder = trained(recipe_of(), tmp_path)
    newest = folder / "checkpoints" / "checkpoint-3"
    shutil.rmtree(newest.with_name("checkpoint-4"))
    receipt_path(folder / "final").unlink()
    facts = {
        key: value for key, value in read_json(receipt_path(newest)).items() if key not in ("files", RECEIPT_PROOF)
    }
    torch.save({"state": Hostile(tmp_path / "canary")}, newest / part)
    runs.seal_folder(newest, **facts)
    if part == "training_args.bin":
        run_train(recipe_of(), shards, tmp_path)  # nobody reads it
    else:
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            run_train(recipe_of(), shards, tmp_path)
    assert not (tmp_path / "canary").exists()


def interrupt(*args, **kwargs):
    """Stands for a kill at the first file that is deleted."""
    raise KeyboardInterrupt


def test_what_fresh_is_refused_for_discards_nothing(tmp_path, trained, shards):
    before = published(trained(recipe_of(), tmp_path))
    with pytest.raises(DataError, match=r"more than train\.max_tokens = 20"):
        run_train(recipe_of(max_tokens=20), shards, tmp_path, fresh=True)
    assert published(tmp_path / "r") == before


def test_a_refused_training_leaves_no_settings_that_bind_the_next(tmp_path, shards):
    with pytest.raises(DataError, match=r"more than train\.max_tokens = 20"):
        run_train(recipe_of(max_tokens=20), shards, tmp_path)
    assert runs.open_finished(run_train(recipe_of(), shards, tmp_path)).is_done()


def test_a_run_without_its_run_json_is_started_only_with_fresh(tmp_path, trained, shards):
    folder = trained(recipe_of(), tmp_path)
    (folder / "run.json").unlink()
    with pytest.raises(UsageError, match=r"holds best and no run\.json .*use --fresh to discard it"):
        run_train(recipe_of(), shards, tmp_path)
    run_train(recipe_of(learning_rate=5e-3), shards, tmp_path, fresh=True)
    assert runs.open_finished(folder).manifest.settings["train"]["learning_rate"] == 5e-3


def test_fresh_follows_a_link_to_another_disk(tmp_path, trained, shards):
    elsewhere = trained(recipe_of(), tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").symlink_to(elsewhere)
    run_train(recipe_of(learning_rate=5e-3), shards, tmp_path / "runs", fresh=True)
    assert (tmp_path / "runs" / "r").is_symlink()
    assert runs.open_finished(elsewhere).manifest.settings["train"]["learning_rate"] == 5e-3


def test_what_the_run_learned_from_belongs_to_the_weights(tmp_path, trained, shards):
    folder = trained(recipe_of(), tmp_path)
    before, run = published(folder), runs.open_finished(folder)
    groups = run.learned().groups
    (folder / "learned.json").unlink()
    with pytest.raises(DataError, match=r"or its weights or learned\.json do not verify; finish it with: omni train"):
        runs.open_finished(folder)
    with pytest.raises(DataError, match=r"learned\.json: is not there; omni train writes it again"):
        run.learned()
    run_train(recipe_of(), shards, tmp_path)
    assert published(folder) == before
    assert run.learned().groups == groups
    (folder / "learned.json").write_text("{}")
    with pytest.raises(DataError, match=r"learned\.json: not what a run learned from \(recordings: Field required\)"):
        replace(run).learned()
    assert sha256_of(folder / "learned.json") != read_json(receipt_path(folder / "final"))["learned_sha256"]
    assert not run.is_done()
