"""What `distill` is asked for is what it gets: no setting is dropped between etl, train, eval and infer, none leaks."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_cli.__main__ import run as omni
from omni_cli.config import read_layer
from omni_cli.errors import UsageError
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.distill.settings import DistillSplit
from omni_cli.report import Console
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages import runs
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.train import TrainRequest, train
from tests.support.driving import REAL_ID, copy_real_segment, real_data, tiny_student, write_routes
from tests.support.pipeline import QUIET, Made
from tests.support.taught import cut, write_bright_drives

CALIBRATED = {"require_calibrated": True}


def student(**changes) -> Distill:
    return tiny_student(cameras="qcamera", **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two drives of 4 s, whose mount is known in the second half; newest first: shards of all steps, of known ones."""
    folder = tmp_path_factory.mktemp("routes")
    write_routes(folder)
    cut(student(sample=CALIBRATED), folder, folder / "shards" / "calibrated")
    cut(student(), folder, folder / "shards" / "plain")
    return folder


def request(data: Path, folder: Path, shards: str | None = None, **changes) -> TrainRequest:
    return TrainRequest(data / "shards" / shards if shards else None, data, folder, "r", "cpu-tiny", **changes)


@pytest.fixture(scope="module")
def calibrated(data, tmp_path_factory) -> Made:
    """A student of the steps at which the mount was known."""
    folder, recipe = tmp_path_factory.mktemp("runs"), student(sample=CALIBRATED)
    train(recipe, request(data, folder), QUIET)
    return Made(recipe, data, data / "shards" / "calibrated", runs.open_finished(folder / "r"))


# -- which steps count


@pytest.mark.parametrize(
    ("name", "value", "shards"),
    [("require_calibrated", False, "calibrated"), ("require_calibrated", True, "plain"), ("require_fix", True, None)],
)
def test_shards_of_other_filters_are_refused_with_the_right_etl_command(data, tmp_path, name, value, shards):
    command = f"omni etl --recipe distill --profile cpu-tiny --set sample.{name}={str(value).lower()}, or"
    message = f"have {name} {not value}, this recipe asks for {value}; make fitting ones: {command}"
    with pytest.raises(UsageError, match=message):
        train(student(sample={name: value}), request(data, tmp_path, shards), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_shards_of_other_filters_are_passed_over(data, calibrated, tmp_path):
    chosen = train(student(sample=CALIBRATED), request(data, tmp_path, dry_run=True), QUIET)
    assert chosen["shards"] == str(data / "shards" / "calibrated") == calibrated.run.manifest.shards.folder
    assert train(student(), request(data, tmp_path, dry_run=True), QUIET)["shards"] == str(data / "shards" / "plain")


def test_the_etl_command_of_such_a_refusal_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_routes(tmp_path / "data", count=160)
    assert omni(["etl", "--recipe", "distill", "--profile", "cpu-tiny", "--workers", "0", "--quiet"]) == 0
    training = ["train", "--profile", "cpu-tiny", "--set", "sample.require_calibrated=true", "--quiet"]
    capsys.readouterr()
    assert omni(training) == 2
    printed = re.search(r"make fitting ones: omni (etl .*), or name others", capsys.readouterr().err)
    assert omni([*shlex.split(printed[1]), "--workers", "0", "--quiet"]) == 0
    assert omni([*training, "--dry-run", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out.splitlines()[-1])["shards"]
    assert open_shards(Path(chosen)).manifest.preprocess.require_calibrated


def test_a_run_is_measured_by_the_steps_that_shards_count_and_says_so(data, calibrated, capsys):
    windows = {}
    for name in ("calibrated", "plain"):
        shards = EvalRequest(data / "shards" / name, split="val", blind=False)
        windows[name] = evaluate(calibrated.recipe, calibrated.run, shards, Console())["windows"]
        told = "measuring with require_calibrated False, as shards .*plain are; the run learned with True"
        assert bool(re.search(told, capsys.readouterr().err)) == (name == "plain")
    assert windows["plain"] > windows["calibrated"] > 0


def test_a_student_is_asked_about_every_step(data, calibrated, tmp_path):
    subject = subject_of_run(calibrated.run)
    (val,) = [entry.id for entry in open_shards(calibrated.shards).manifest.recordings if entry.windows["val"]]
    (clip,) = infer(calibrated.recipe, subject, InferRequest((val,), data=data, out=tmp_path), QUIET)["clips"]
    assert clip["windows"] == sum(
        entry.windows["val"] for entry in open_shards(data / "shards" / "plain").manifest.recordings
    )


# -- what a run says that it learned from


def test_a_run_records_how_its_shards_were_cut_and_not_what_was_asked(data, tmp_path, capsys):
    """Windows that begin elsewhere are no other kind of window: they fit, and are told as what they are."""
    made = student(sample={"stride": 2, "max_age_ms": 70.0}, split=DistillSplit(validation=0.4, seed=3))
    cut(made, data, tmp_path / "s")
    asked = TrainRequest(tmp_path / "s", data, tmp_path, "r", "test")
    train(student(), asked, Console())
    told = "sample.max_age_ms: 100.0 -> 70.0; sample.stride: 4 -> 2; split.seed: 0 -> 3; split.validation: 0.5 -> 0.4"
    said = capsys.readouterr().err
    assert f"shards {tmp_path / 's'} are not as asked ({told}); the run records what they are" in said
    run = runs.open_finished(tmp_path / "r")
    assert run.recipe_settings(Distill) == made
    assert read_layer(run.folder / runs.CONFIG).table["sample"]["stride"] == 2
    train(made, asked, Console())
    said = capsys.readouterr().err
    assert "is finished; nothing to do" in said
    assert "not as asked" not in said
    for typed, told in (({"sample.stride", "model"}, "(sample.stride: 4 -> 2)"), ((), None)):
        train(student(), replace(asked, asked=frozenset(typed)), Console())
        said = capsys.readouterr().err
        assert (f"are not as asked {told};" in said) if told else ("not as asked" not in said)


# -- a split by time


def reach_s(shards: ShardSet) -> float:
    """How far the targets to learn from reach beyond the first instant to measure on, over all drives."""
    found = []
    for entry in shards.manifest.recordings:
        table = shards.windows(entry.id).to_pylist()
        val_us = min(row["start_us"] for row in table if row["split"] == "val")
        for row in (row for row in table if row["split"] == "train"):
            steps_us = np.reshape(row["timestamps_us"], (-1, 2))[1:, 0]
            points = np.array(row["target_points"])
            ends_us = steps_us[points > 0] + T_IDXS_S[points[points > 0] - 1] * 1e6
            found.append(float((ends_us.max() - val_us) / 1e6))
    return max(found)


@pytest.fixture(scope="module")
def long_drives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_bright_drives(folder, clips=1, seconds=40.0)
    return folder


def by_time(teacher: str = "motion", **split) -> Distill:
    sample = {"max_age_ms": 200.0, "teacher": teacher}
    return tiny_student(sample=sample, split=DistillSplit(rule="time", validation=0.3, **split))


def test_by_time_no_target_to_learn_from_reaches_into_what_is_measured_on(long_drives, tmp_path):
    assert DistillSplit().gap_s == T_IDXS_S[-1]
    apart = cut(by_time(), long_drives, tmp_path / "apart")
    assert -3 < reach_s(apart) <= 0  # and not more is lost than must be
    assert reach_s(cut(by_time(gap_s=5.0), long_drives, tmp_path / "near")) > 3


@pytest.mark.parametrize(
    ("split", "teacher", "is_told"),
    [
        ({"gap_s": 5.0}, "motion", True),
        ({"gap_s": 9.9}, "motion", True),
        ({}, "motion", False),
        ({"gap_s": 5.0}, "log", False),
        ({"gap_s": 5.0, "rule": "hash"}, "motion", False),
    ],
)
def test_a_split_by_time_that_leaks_is_told_before_the_work(split, teacher, is_told):
    recipe = by_time(teacher).model_copy(update={"split": DistillSplit(**{"rule": "time", **split})})
    told = (f"split.gap_s = {split.get('gap_s', 10):g}: paths to learn from reach 10 s ahead, into the stretch that is "
            "measured on, and its numbers will flatter; 10 or more keeps the two apart")  # fmt: skip
    assert recipe.notes() == ((told,) if is_told else ())


@real_data
@pytest.mark.real_data
def test_the_real_minute_split_by_time_still_teaches_and_measures(tmp_path, monkeypatch, capsys):
    """The command of the README; `omni etl` says nothing of a leak."""
    monkeypatch.chdir(tmp_path)
    copy_real_segment(tmp_path / "data")
    asked = ["--split", "time", "--workers", "0", "--json"]
    assert omni(["etl", "--recipe", "distill", "--profile", "cpu-tiny", *asked]) == 0
    said = capsys.readouterr()
    assert "flatter" not in said.err
    report = json.loads(said.out.splitlines()[-1])
    assert report["windows"] == {"train": 32, "val": 7}
    shards = open_shards(Path(report["shards"]))
    assert reach_s(shards) <= 0
    rows = [row for row in shards.windows(REAL_ID).to_pylist() if row["split"] == "val"]
    assert sum(np.sum(np.array(row["driven_points"]) > np.searchsorted(T_IDXS_S, 5.0)) for row in rows) > 50
