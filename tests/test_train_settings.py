"""What a training refuses before it touches anything: a name that leads elsewhere, others' folders, wrong settings."""

import re
import shlex
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from omni_cli.__main__ import run
from omni_cli.errors import UsageError
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.trainer import trainer_arguments
from tests.support.no_bitsandbytes import without_bitsandbytes
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic


def ask(folder, name, recipe=None, **changes):
    """Ask for a training; there are no data, so that one which is not refused says so."""
    request = TrainRequest(None, folder / "data", folder / "runs", name, "test", **changes)
    train(recipe or tiny_recipe(), request, QUIET)


def with_optimizer(name):
    return tiny_recipe(train=tiny_recipe().train.model_copy(update={"optimizer": name}))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name", ["{0}/mine", ".", "..", "../mine", "a/b", "a/", "", ".hidden", "a\\b", "a\0b", "ä" * 120]
)
def test_a_name_that_is_not_plain_is_refused_and_nothing_is_touched(tmp_path, name, fresh):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"--run .*: expected a plain name, without slashes and without a dot in fro"):
        ask(tmp_path, name.format(tmp_path), fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_command_line_refuses_such_a_name_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert run(f"train --profile cpu-tiny --fresh --run {tmp_path / 'mine'}".split()) == 2
    assert capsys.readouterr().err.startswith(f"error: --run '{tmp_path / 'mine'}': expected a plain name")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["r", "lr=1e-4", "zwölf Läufe", "v1.2", "-"])
def test_a_plain_name_is_taken(tmp_path, name, fresh):
    with pytest.raises(UsageError, match="no data folder"):
        ask(tmp_path, name, fresh=fresh)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("file", ["thesis.txt", "checkpoints/../thesis.txt", ".git"])
def test_a_folder_that_omni_did_not_make_is_refused_and_left_as_it_is(tmp_path, file, fresh):
    notes = tmp_path / "runs" / "notes"
    (notes / "checkpoints").mkdir(parents=True)
    (notes / file).write_text("mine")
    with pytest.raises(
        UsageError, match=rf"notes is no run of omni \(it holds {(notes / file).resolve().name}\); choose"
    ):
        ask(tmp_path, "notes", fresh=fresh)
    assert (notes / file).read_text() == "mine"


def test_a_run_json_of_another_tool_does_not_make_a_folder_ours(tmp_path):
    notes = tmp_path / "runs" / "notes"
    notes.mkdir(parents=True)
    (notes / "run.json").write_text('{"tool": "another"}')
    (notes / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes is no run of omni \(it holds thesis\.txt\)"):
        ask(tmp_path, "notes", fresh=True)


def test_a_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").write_text("mine")
    with pytest.raises(UsageError, match=r"--run r: .* is a file; choose another name"):
        ask(tmp_path, "r")


def test_what_a_kill_before_run_json_leaves_is_no_obstacle(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    for name in (".lock", "config.toml", "run.json.omni-tmp-1-abcd"):
        (folder / name).touch()
    runs.check_ours(folder, fresh=False)
    runs.check_ours(folder, fresh=True)


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_unknown_optimizer_is_refused_with_the_nearest_name(tmp_path, dry_run):
    with pytest.raises(
        UsageError, match=r"train\.optimizer = 'adamw_torch_fussed': no .* did you mean 'adamw_torch_fuse"
    ):
        ask(tmp_path, "r", with_optimizer("adamw_torch_fussed"), dry_run=dry_run)


def test_an_optimizer_whose_package_is_absent_names_the_extra(tmp_path):
    message = r"'paged_adamw_8bit': needs bitsandbytes; install it with: pip install 'omni-cli\[bnb\]'"
    with without_bitsandbytes():
        with pytest.raises(UsageError, match=message):
            ask(tmp_path, "r", with_optimizer("paged_adamw_8bit"))
        assert list(tmp_path.iterdir()) == []
        ask(tmp_path, "r", with_optimizer("paged_adamw_8bit"), dry_run=True)  # the plan may be of another machine


def test_an_optimizer_that_needs_more_than_its_name_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"train\.optimizer = 'lomo': cannot be used here: You need to "):
        ask(tmp_path, "r", with_optimizer("lomo"))


def test_one_of_several_processes_that_nobody_introduced_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE = 2 and no RANK: several processes are started by torchrun"):
        ask(tmp_path, "r")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UsageError, match="no data folder"):
        ask(tmp_path, "r")


def test_of_several_gpus_the_trainer_takes_one(monkeypatch):
    """Of four it would make one step of four times the batch, and SFTTrainer refuses."""

    def find_four(arguments):
        arguments._n_gpu = 4
        return torch.device("cpu")

    four = cached_property(find_four)
    four.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", four)
    assert TrainingArguments(per_device_train_batch_size=2, report_to="none").train_batch_size == 8
    recipe = tiny_recipe()
    assert trainer_arguments(Path(), recipe, steps=3).train_batch_size == recipe.train.batch_size


def test_that_the_other_gpus_stay_idle_is_said(tmp_path, monkeypatch, capsys):
    write_synthetic(tmp_path, cameras=("camera_front_wide_120fov",))
    recipe = tiny_recipe(cameras="1-cam")
    made = make_run(tmp_path, recipe, data=tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    train(recipe, TrainRequest(made.shards, tmp_path, tmp_path, "r", "test"), Console())
    assert "training on one of 4 GPUs; CUDA_VISIBLE_DEVICES chooses which" in capsys.readouterr().err


@pytest.mark.fault("F27")
def test_a_loss_that_is_no_number_is_never_replaced_by_another(tmp_path):
    """The Trainer would log the mean of the losses that are numbers in its place, and train on."""
    arguments = trainer_arguments(tmp_path, tiny_recipe(), steps=1)
    assert not arguments.logging_nan_inf_filter


def test_the_command_that_a_refusal_prints_makes_shards_that_fit(tmp_path, monkeypatch, capsys):
    write_synthetic(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    tiny = ["--profile", "cpu-tiny", "--quiet"]
    assert run(["etl", *tiny, "--window", "4", "--workers", "0"]) == 0
    wanted = {"window": 3, "cameras": "1-cam", "canvas_px": 168, "aspect": 1.5, "labels": "speed", "past_speed": "true"}
    other = [word for key, value in wanted.items() for word in ("--set", f"sample.{key}={value}")]
    train_line = ["train", *tiny, *other, "--set", "train.max_steps=1"]
    capsys.readouterr()
    assert run(train_line) == 2
    said = capsys.readouterr().err
    as_they_are = shlex.split(re.search(r"; train on these with: (.*)", said)[1])
    assert run([*train_line, *as_they_are, "--run", "as-they-are"]) == 0
    remedy = re.search(r"make fitting ones: omni (.*), or name others", said)[1]
    assert run([*shlex.split(remedy), "--workers", "0", "--quiet"]) == 0
    assert run(train_line) == 0
