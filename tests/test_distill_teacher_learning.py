"""A student learns to drive as its ONNX teacher does, from the pictures, through the real stages."""

from pathlib import Path

import numpy as np
import pytest

from omni_cli.recipe import BuiltModel, Prediction
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.distill.answers import teacher_values
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import ShardSet
from omni_cli.scores.controls import swap_between_groups
from omni_cli.stages import runs
from omni_cli.stages.evaluate import Asker, Pictures
from omni_cli.stages.train import TrainRequest, train
from tests.support import driving_onnx
from tests.support.pipeline import QUIET
from tests.support.taught import cut, student_of, write_bright_drives

# A tiny teacher's answers are drawn from a seed. Those that hardly follow the pictures are no test of a student: with
# these seeds the best path that is always the same is still off by about 0.8 of what an untrained student is.
TAUGHT = {
    "v0.10.3": (driving_onnx.write_v0_10_3, 1),
    "v0.10.0": (driving_onnx.write_v0_10_0, 2),
    "2026-06": (driving_onnx.write_2026_06, 4),
}


@pytest.fixture(scope="module")
def drives(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("drives")
    write_bright_drives(data, clips=2, seconds=40.0)
    return data


def taught(name: str, folder: Path, drives: Path, **changes) -> tuple[Distill, ShardSet]:
    """A student, and shards labelled by a teacher that looks back a second or two: a window holds no more."""
    write, seed = TAUGHT[name]
    recipe = student_of(write(folder, seed=seed, contrast=1 / 150, memory=0.6), **changes)
    return recipe, cut(recipe, drives, folder / "s")


def learn(recipe: Distill, shards: ShardSet, drives: Path) -> BuiltModel:
    request = TrainRequest(shards.folder, drives, shards.folder.parent / "runs", "r", "test")
    made = train(recipe, request, QUIET)
    return recipe.load(shards.manifest.preprocess, runs.open_finished(Path(made["run"])).final)


def ade_m(recipe: Distill, said: list[Prediction], dataset: WindowDataset) -> float:
    """What `omni eval` calls ADE 10 s, with the teacher's plan in place of the path driven."""
    rows = [dataset.row(index) for index in range(len(dataset))]
    of_teacher = [{**row, "driven_xy_m": row["target_xy_m"], "driven_points": row["target_points"]} for row in rows]
    errors = recipe.errors(said, of_teacher, {})["ade_10s"]
    assert np.isfinite(errors).mean() > 0.8  # the first windows of a drive have no label: the teacher is still cold
    return float(np.nanmean(errors))


def asked_ade_m(recipe: Distill, built: BuiltModel, dataset: WindowDataset, see: Pictures | None = None) -> float:
    said = Asker(recipe, built, dataset, QUIET).ask("student", see or dataset.pictures).predictions
    return ade_m(recipe, list(said), dataset)


def fixed_path(dataset: WindowDataset, learned: WindowDataset) -> list[Prediction]:
    """The median of all that was taught, at every step: nothing that looks at no picture does better."""
    paths = np.concatenate([teacher_values(learned.row(index))["xy_m"] for index in range(len(learned))])
    every = np.broadcast_to(np.nanmedian(paths, axis=0), (dataset.preprocess.steps, 33, 2))
    return [Prediction("", {"xy_m": every}) for _ in range(len(dataset))]


# Half a minute each: CI learns from the newest, the marathon from the others too.
NAMES = [pytest.param(name, marks=() if name == "2026-06" else pytest.mark.marathon) for name in TAUGHT]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_comes_to_drive_as_its_teacher_does(name, drives, tmp_path):
    """On drives that it never saw its ADE to the teacher falls below 25 % of its start, and by its pictures."""
    recipe, shards = taught(name, tmp_path, drives)
    learned, unseen = (WindowDataset(shards, split) for split in ("train", "val"))
    start_m = asked_ade_m(recipe, recipe.build(shards.manifest.preprocess), unseen)
    student = learn(recipe, shards, drives)
    assert asked_ade_m(recipe, student, unseen) < 0.25 * start_m
    assert ade_m(recipe, fixed_path(unseen, learned), unseen) > 0.5 * start_m
    swapped = swap_between_groups([unseen.recording_of(index) for index in range(len(unseen))])
    assert asked_ade_m(recipe, student, unseen, lambda index: unseen.pictures(int(swapped[index]))) > 0.5 * start_m


def test_a_student_that_is_shown_grey_does_not(drives, tmp_path):
    """It learns as long from the same labels, and is left with about what a fixed path is off by."""
    recipe, shards = taught("v0.10.3", tmp_path, drives, blind=True)
    unseen = WindowDataset(shards, "val")
    start_m = asked_ade_m(recipe, recipe.build(shards.manifest.preprocess), unseen)
    assert asked_ade_m(recipe, learn(recipe, shards, drives), unseen) > 0.5 * start_m
