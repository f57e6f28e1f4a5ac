"""The loss on held-out windows: what it is, that measuring it changes nothing, and which weights it chooses."""

import gc
import os
import re
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.config import Layer, resolve
from omni_cli.errors import DataError, OmniError, Preempted, UsageError
from omni_cli.files import read_json, receipt_path
from omni_cli.recipe import SplitSettings, TrainSettings
from omni_cli.recipes.vlm import Vlm
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import frames_path, open_shards
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.evaluate import Asker
from omni_cli.stages.train import TrainRequest, callbacks, train
from omni_cli.stages.train.fit import make_trainer
from omni_cli.stages.train.validation import Validation, spread
from tests.support.bad_steps import night_recipe, spoilt
from tests.support.folders import tree
from tests.support.pipeline import QUIET, write_synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("validation")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return data


@pytest.fixture(scope="module")
def shards(data) -> Path:
    return Path(etl(restless(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def restless(mode: str = "full", **changes) -> Vlm:
    """A rate so high that the best step is hardly the last; the rate does not depend on how many steps there are."""
    values = {"max_steps": 6, "save_steps": 1, "log_steps": 1, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
    return night_recipe(mode, **{**values, "learning_rate": 6e-2, **changes})


def run_train(recipe, shards, folder, console=QUIET):
    return train(recipe, TrainRequest(shards, folder, folder, "r", "test"), console)


@pytest.fixture(scope="module")
def best(shards, tmp_path_factory) -> Path:
    """A finished run whose weights are those of its best step."""
    folder = tmp_path_factory.mktemp("best")
    run_train(restless(publish="best"), shards, folder)
    return folder / "r"


def measured(folder: Path) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in checkpoints.read_history(folder)}


def best_step(folder: Path) -> int:
    losses = measured(folder)
    return min(losses, key=losses.__getitem__)


def test_it_is_the_mean_over_the_labels_of_every_window_alone(shards, best):
    recipe, opened = restless(), open_shards(shards)
    held_out = WindowDataset(opened, "val", ensure_sidecar(opened, recipe, QUIET))
    built = recipe.load(held_out.preprocess, best / "final")
    total, count = 0.0, 0
    for index in range(len(held_out)):
        batch = recipe.collate([held_out[index]], held_out.preprocess)
        with torch.no_grad():
            logits = recipe.outputs(built.model, batch, held_out.preprocess)
        labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels, reduction="sum"))
        count += len(labels)
    assert measured(best)[best_step(best)] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.marathon)])
def test_the_weights_are_the_same_with_and_without_it(shards, tmp_path, workers):
    """Pain 19. Dropout draws random numbers at every step: one that validation drew would change all that follow."""
    for windows in (0, 64):
        recipe = night_recipe("lora", max_steps=4, save_steps=2, workers=workers, validation_windows=windows)
        run_train(recipe, shards, tmp_path / str(windows))
    without, with_it = tmp_path / "0" / "r", tmp_path / "64" / "r"
    assert tree(without / "final") == tree(with_it / "final")
    assert not (without / "best").exists()
    assert sorted(measured(with_it)) == [2, 4]
    states = [
        torch.load(folder / "checkpoints/checkpoint-4/rng_state.pth", weights_only=False)
        for folder in (without, with_it)
    ]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_the_best_weights_are_those_of_a_run_that_ended_there(shards, best, tmp_path):
    """Pain 19. What is published says which step it is, and on which split it was chosen."""
    step = best_step(best)
    assert step < 6, "the last step is the best one: no test of anything"
    run_train(restless(max_steps=step), shards, tmp_path)
    assert tree(tmp_path / "r" / "final") == tree(best / "final")
    receipt = read_json(receipt_path(best / "final"))
    assert (receipt["published_step"], receipt["chosen_on"]) == (step, "val")
    assert receipt["validation_loss"] == measured(best)[step]
    assert read_json(receipt_path(tmp_path / "r" / "final"))["chosen_on"] is None
    assert [path.name for path in sorted((best / "best").iterdir())] == [f"step-{step}", f"step-{step}.receipt.json"]


def unfinished(best: Path, folder: Path, *lost: int) -> Path:
    """A copy of a run, killed before its weights were there; its last checkpoints may be lost too."""
    copy = Path(shutil.copytree(best, folder / "r"))
    receipt_path(copy / "final").unlink()
    for step in lost:
        shutil.rmtree(copy / "checkpoints" / f"checkpoint-{step}")
    return copy


@pytest.mark.fault("F1")
@pytest.mark.parametrize("lost", [(), (6,)])
def test_a_run_that_goes_on_knows_its_best_step(shards, best, tmp_path, lost):
    folder = unfinished(best, tmp_path, *lost)
    result = run_train(restless(publish="best"), shards, tmp_path)
    assert result["published_step"] == best_step(best)
    assert measured(folder) == measured(best)
    assert tree(folder / "final") == tree(best / "final")
    assert receipt_path(folder / "final").read_bytes() == receipt_path(best / "final").read_bytes()


def flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.fault("F6", "F26")
@pytest.mark.parametrize(("lose", "said"), [(flip_a_bit, "does not match its receipt"), (Path.unlink, "is gone")])
def test_lost_best_weights_cost_no_checkpoint_and_can_be_made_again(shards, best, tmp_path, lose, said):
    """Every checkpoint names them: what the line says can be done leads to the weights of an undisturbed run."""
    folder, step = unfinished(best, tmp_path), best_step(best)
    lose(folder / "best" / f"step-{step}" / "model.safetensors")
    if said == "is gone":
        shutil.rmtree(folder / "best")
    saved = tree(folder / "checkpoints")
    line = rf"r/best/step-{step} {said}: the best weights, .* the checkpoint of step 6 is good and stays: put a copy"
    with pytest.raises(OmniError, match=line):
        run_train(restless(publish="best"), shards, tmp_path)
    assert tree(folder / "checkpoints") == saved
    train(restless(publish="best"), TrainRequest(shards, tmp_path, tmp_path, "again", "test"), QUIET)
    shutil.copytree(tmp_path / "again" / "best", folder / "best", dirs_exist_ok=True)
    run_train(restless(publish="best"), shards, tmp_path)
    assert tree(folder / "final") == tree(best / "final")


@pytest.mark.fault("F6", "F26")
def test_lost_best_weights_that_only_the_newest_checkpoint_names_cost_its_steps(shards, tmp_path, capsys):
    """At a low rate every step is better than the one before; the checkpoint before this one names another best."""
    recipe = restless(publish="best", max_steps=3, learning_rate=1e-4)
    folder = tmp_path / "r"
    run_train(recipe, shards, tmp_path)
    assert best_step(folder) == 3, "no test of anything"
    published = tree(folder / "final")
    receipt_path(folder / "final").unlink()
    flip_a_bit(folder / "best" / "step-3" / "model.safetensors")
    run_train(recipe, shards, tmp_path, Console())
    told = capsys.readouterr().err
    assert "step-3 does not match its receipt; going back to the checkpoint of step 2, to find the best" in told
    assert "going on at step 2 of 3" in told
    assert tree(folder / "final") == published


@pytest.mark.fault("F6", "F26")
def test_best_weights_that_nobody_publishes_cost_no_step(shards, tmp_path, capsys):
    run_train(restless(), shards, tmp_path)
    published = tree(tmp_path / "r" / "final")
    receipt_path(tmp_path / "r" / "final").unlink()
    shutil.rmtree(tmp_path / "r" / "best")
    run_train(restless(), shards, tmp_path, Console())
    told = capsys.readouterr().err
    assert re.search(r"/r/best/step-\d is gone; the best step is sought from here on", told)
    assert "going on at step 6 of 6" in told
    assert tree(tmp_path / "r" / "final") == published


def test_shards_without_a_val_split_are_trained_on_and_it_is_said(data, tmp_path, capsys):
    recipe = restless("lora", max_steps=1).model_copy(
        update={"split": SplitSettings(rule="time", validation=0.01, gap_s=0.0)}
    )
    cut = Path(etl(recipe, EtlRequest(data=data, out=tmp_path / "shards", workers=0), QUIET)["shards"])
    assert open_shards(cut).manifest.count("val") == 0
    run_train(recipe, cut, tmp_path, Console())
    assert capsys.readouterr().err.count(f"no val split in {cut}: nothing is measured while it trains") == 1
    assert "validation_loss" not in checkpoints.read_history(tmp_path / "r")[-1]
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"publish": "best"})})
    with pytest.raises(UsageError, match=r"train\.publish = best needs a val split, and shards .* have none; make oth"):
        run_train(asked, cut, tmp_path / "best")


@pytest.fixture
def damaged(shards, tmp_path) -> tuple[Path, Path]:
    """Shards to be damaged, and the pictures of the recording that is measured on."""
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    (entry,) = [entry for entry in open_shards(copy).manifest.recordings if entry.windows.get("val")]
    assert not entry.windows.get("train"), "no test of anything"
    return copy, frames_path(copy, entry.id)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def test_a_sample_to_measure_on_that_is_too_long_is_refused_before_a_run_begins(shards, tmp_path):
    opened = open_shards(shards)
    longest = {
        split: max(WindowDataset(opened, split, ensure_sidecar(opened, restless(), QUIET)).token_lengths())
        for split in ("train", "val")
    }
    assert longest["val"] > longest["train"], "no test of anything"
    with pytest.raises(DataError, match=rf"a sample has {longest['val']} tokens, more than train\.max_tokens"):
        run_train(restless(max_tokens=longest["train"]), shards, tmp_path)
    assert not (tmp_path / "r" / "run.json").exists()
    run_train(restless(max_tokens=longest["train"], validation_windows=0, max_steps=1), shards, tmp_path)


@pytest.mark.fault("F6", "F26")
def test_windows_to_measure_on_that_cannot_be_opened_end_only_what_needs_them(damaged, tmp_path, capsys):
    shards, frames = damaged
    flip_a_bit(frames)
    run_train(restless(max_steps=2, verify_shards=True), shards, tmp_path, Console())
    told = capsys.readouterr().err
    assert re.search(
        r"frames\.arrow: its content is not .*; training goes on, and its loss on split val is not me", told
    )
    assert "validation_loss" not in checkpoints.read_history(tmp_path / "r")[-1]
    with pytest.raises(DataError, match=r"frames\.arrow: its content is not what was written"):
        run_train(restless(publish="best", verify_shards=True), shards, tmp_path / "best")
    assert checkpoints.read_history(tmp_path / "best" / "r") == []


def damaged_at(step: int, path: Path):
    def spoil(taken, batch, made):
        if taken == step:
            cut_short(path)
        return made

    return spoilt(spoil)


@pytest.mark.fault("F6", "F26")
def test_windows_to_measure_on_that_are_damaged_while_it_trains_cost_no_step(shards, damaged, tmp_path, capsys):
    run_train(restless(), shards, tmp_path / "undisturbed")
    with damaged_at(3, damaged[1]):
        run_train(restless(), damaged[0], tmp_path, Console())
    told = capsys.readouterr().err
    assert told.count("was cut since it was opened; omni audit tells what is damaged; training goes on, and its l") == 1
    history = checkpoints.read_history(tmp_path / "r")
    assert [line["step"] for line in history if "validation_loss" in line] == [1, 2]
    assert tree(tmp_path / "r" / "final") == tree(tmp_path / "undisturbed" / "r" / "final")


@pytest.mark.fault("F6", "F26")
def test_where_the_best_is_asked_for_they_end_the_training_after_its_step_is_saved(damaged, tmp_path):
    shards, frames = damaged
    whole = frames.read_bytes()
    line = r"frames\.arrow: was cut .*; split val is measured for train\.publish = best: training stopped at step 3, sa"
    with damaged_at(3, frames), pytest.raises(DataError, match=line):
        run_train(restless(publish="best"), shards, tmp_path)
    run = runs.open_run(tmp_path / "r")
    assert checkpoints.find_start(run.folder / "checkpoints", run.manifest.key()).step == 3
    assert not (run.folder / "final").exists()
    frames.write_bytes(whole)
    assert run_train(restless(publish="best"), shards, tmp_path)["steps"] == 6


def test_it_leaves_every_module_in_its_mode(shards, tmp_path):
    recipe, opened = restless("lora"), open_shards(shards)
    key = ensure_sidecar(opened, recipe, QUIET)
    dataset, held_out = (WindowDataset(opened, split, key) for split in ("train", "val"))
    built = recipe.build(dataset.preprocess, None)
    trainer = make_trainer(tmp_path, recipe, built, dataset, 1)
    built.model.train()
    still = next(module for module in built.model.modules() if isinstance(module, torch.nn.Dropout))
    still.eval()
    modes = [module.training for module in built.model.modules()]
    assert Validation(recipe, held_out, {}, QUIET).measure(trainer) > 0
    assert [module.training for module in built.model.modules()] == modes


@pytest.fixture
def frozen():
    """What there is before is out of the collector's sight: to look at it again and again takes minutes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def logits_alive(built) -> int:
    """How many tensors there are of as many columns as the vocabulary, whoever holds them."""
    gc.collect()
    vocabulary = built.model.get_output_embeddings().weight.shape[0]
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum(one.dim() >= 2 and one.shape[-1] == vocabulary for one in tensors)


@pytest.mark.parametrize("asks", [False, True])
def test_of_a_batch_no_logit_is_kept(shards, tmp_path, monkeypatch, frozen, asks):
    """Pain 19. What measures, and what asks for answers, takes the next batch when the logits of the last are gone."""
    recipe, opened = restless(batch_size=1), open_shards(shards)
    key = ensure_sidecar(opened, recipe, QUIET)
    dataset, held_out = (WindowDataset(opened, split, key) for split in ("train", "val"))
    built = recipe.build(dataset.preprocess)
    between, within, pictures = [], [], WindowDataset.pictures

    def read(self, index):
        between.append(logits_alive(built))
        return pictures(self, index)

    def see(module, inputs, output):
        if len(within) < len(between):  # once a batch: an answer has a hundred tokens
            within.append(logits_alive(built))

    monkeypatch.setattr(WindowDataset, "pictures", read)
    built.model.get_output_embeddings().register_forward_hook(see)
    if asks:
        Asker(recipe, built, held_out, QUIET, 1).ask("model", held_out.pictures)
    else:
        Validation(recipe, held_out, {}, QUIET).measure(make_trainer(tmp_path, recipe, built, dataset, 1))
    assert between == [0] * len(held_out)
    assert len(between) > 2
    assert min(within) > 0  # they are seen where there are some


@pytest.mark.fault("F2")
@pytest.mark.parametrize("when", ["measured", "saved"])
def test_a_signal_while_a_step_is_measured_or_saved_takes_no_step_more(shards, tmp_path, monkeypatch, when):
    target, name = {"measured": (Validation, "measure"), "saved": (callbacks, "seal_folder")}[when]
    real, calls = getattr(target, name), iter(range(1, 1_000))

    def signalled(*values, **named):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*values, **named)

    monkeypatch.setattr(target, name, signalled)
    with pytest.raises(Preempted, match=r"^stopped at step 3 of 6, saved; run the same command again$"):
        run_train(restless(), shards, tmp_path)
    assert max(checkpoints.steps_saved(tmp_path / "r" / "checkpoints")) == 3


def test_the_best_of_nothing_cannot_be_published():
    layer = Layer("run.toml", {"publish": "best", "validation_windows": 0})
    with pytest.raises(UsageError, match=r"publish = best needs validation_windows = 1 or more"):
        resolve(TrainSettings, [layer])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 80))
def test_windows_are_spread_over_recordings_and_their_time(counts, most):
    chosen = spread(counts, most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(most, sum(counts))
    owners = [recording for recording, count in enumerate(counts) for _ in range(count)]
    taken = [[owners[number] for number in chosen].count(recording) for recording in range(len(counts))]
    if most >= len(counts):  # none has two fewer than another, unless all of its windows are taken
        assert all(each >= max(taken) - 1 or each == count for each, count in zip(taken, counts, strict=True))
    for recording, many in enumerate(taken):
        places = [number - owners.index(recording) for number in chosen if owners[number] == recording]
        gaps = [after - before for before, after in pairwise(places)]
        assert not many or max(gaps, default=0) - min(gaps, default=0) <= 1
