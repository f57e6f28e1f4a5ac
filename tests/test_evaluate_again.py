"""`omni eval` run again: the sealed report answers where it is the same question, and only there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.recipe import SplitSettings
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages import runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import (
    EVAL,
    REPORT_FILE,
    EvalRequest,
    candidate_of_run,
    check_leak,
    compare,
    evaluate,
    measure,
    table_of,
)
from omni_cli.stages.evaluate.tables import notes_of
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

SEEING = EvalRequest(blind=False)
NOTHING_TO_DO = "answers for these weights, shards and split; nothing to do"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    write_synthetic(folder / "data", cameras=("camera_front_wide_120fov",))
    made = make_run(folder, tiny_recipe(cameras="1-cam"), data=folder / "data")
    evaluate(made.recipe, made.run, SEEING, QUIET)
    return made


@pytest.fixture
def made(original, tmp_path):
    """A copy of the run and its report, which a test may spoil."""
    folder = tmp_path / "runs" / "run"
    shutil.copytree(original.run.folder.parent, folder.parent)
    return replace(original, run=runs.open_finished(folder))


def again(made, capsys, request=SEEING):
    result = evaluate(made.recipe, made.run, request, Console())
    return result, NOTHING_TO_DO in capsys.readouterr().err


def test_the_same_question_is_answered_by_the_sealed_report(made, original, capsys):
    result, skipped = again(made, capsys)
    assert skipped
    assert result["run"] == str(made.run.folder)
    assert result["report"] == str(made.run.folder / EVAL / "report.html")
    measured = files.read_json(original.run.folder / EVAL / REPORT_FILE)
    assert {**result, "run": measured["run"]} == {
        **measured, "report": result["report"], "pictures": result["pictures"], "answers": result["answers"]
    }  # fmt: skip


def test_another_split_is_another_question(made, capsys):
    with pytest.raises(DataError, match="trained on: 1 recording, or"):
        again(made, capsys, EvalRequest(blind=False, split="train"))


def test_a_report_without_the_blind_twin_does_not_answer_for_one_with_it(made, capsys):
    result, skipped = again(made, capsys, EvalRequest())
    assert not skipped
    assert "trained blind" in {condition["name"] for condition in result["conditions"]}
    assert again(made, capsys, EvalRequest())[1]


def test_held_answers_have_a_report_of_their_own_that_says_so(made, capsys):
    """A model of two steps says nothing; held to its format it has numbers, each of them forced."""
    held = replace(SEEING, constrained=True)
    result, skipped = again(made, capsys, held)
    assert not skipped
    model, constant = result["conditions"][0], result["conditions"][-1]
    assert result["constrained"]
    assert (model["unreadable"], model["forced"], model["forced_windows"]) == (0.0, 1.0, result["windows"])
    assert 0 < model["off_grammar"] < 1
    assert notes_of(result)[-1].startswith("answers were held to their format, so that each could be read: 100.0% had")
    header, rows = table_of(result, made.recipe.metrics)
    assert (header[-1], rows[0][-1], rows[-1][-1]) == ("forced", "100.0%", "n/a")
    assert "forced" not in constant
    lines = [json.loads(line) for line in Path(result["answers"]).read_text().splitlines()]
    assert all(line["is_readable"] and line["forced"] for line in lines)
    assert again(made, capsys, held)[1]
    free, skipped = again(made, capsys)
    assert skipped
    assert Path(free["report"]).parent != Path(result["report"]).parent
    assert (free["constrained"], free["conditions"][0]["unreadable"]) == (False, 1.0)


def test_a_comparison_of_held_answers_stands_beside_that_of_free_ones(made, tmp_path):
    """Neither replaces a file of the other."""
    twin = tmp_path / "runs" / "twin"
    shutil.copytree(made.run.folder, twin)
    both = [candidate_of_run(made.recipe, run) for run in (made.run, runs.open_finished(twin))]
    free = compare(both, SEEING, tmp_path / "both", QUIET)
    written = {file: file.read_bytes() for file in (tmp_path / "both").iterdir()}
    held = compare(both, replace(SEEING, constrained=True), tmp_path / "both", QUIET)
    names = [f"comparison{held}.{kind}" for held in ("", "-constrained") for kind in ("html", "json", "png")]
    assert sorted(file.name for file in (tmp_path / "both").iterdir()) == sorted(names)
    assert all(file.read_bytes() == before for file, before in written.items())
    assert (Path(free["report"]).name, Path(held["report"]).name) == (names[0], names[3])
    assert files.read_json(tmp_path / "both" / names[4])["constrained"]


def test_numbers_have_no_format_to_be_held_to(made):
    class Silent:
        name = "silent"

    candidate = replace(candidate_of_run(made.recipe, made.run), recipe=Silent())
    with pytest.raises(UsageError, match="--constrained: answers of recipe silent are numbers, which have no format"):
        measure(candidate, replace(SEEING, constrained=True), QUIET)


def test_a_damaged_report_is_made_again(made, capsys):
    path = made.run.folder / EVAL / REPORT_FILE
    whole = files.read_json(path)
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    assert not again(made, capsys)[1]
    assert files.read_json(path)["conditions"] == whole["conditions"]
    assert again(made, capsys)[1]


def test_other_weights_are_measured(made, capsys):
    faster = made.recipe.model_copy(update={"train": made.recipe.train.model_copy(update={"learning_rate": 2e-2})})
    asked = TrainRequest(made.shards, made.data, made.run.folder.parent, "run", "test", fresh=True)
    train(faster, asked, QUIET)
    other = replace(made, recipe=faster, run=runs.open_finished(made.run.folder))
    assert not again(other, capsys)[1]


def test_one_short_recording_has_no_swapped_control_and_says_so(made, capsys):
    """All validation windows are of one clip of 2.5 s: there is nothing to swap between."""
    files.receipt_path(made.run.folder / EVAL).unlink()
    result = evaluate(made.recipe, made.run, SEEING, Console())
    assert "no control with swapped pictures: all windows are of 5 s of one recording" in capsys.readouterr().err
    names = [condition["name"] for condition in result["conditions"]]
    assert names == ["model", "first frame repeated", "time shuffled", "constant median"]


def cut_by_time(made, folder):
    """Cut the same recordings anew, each parted by time."""
    recipe = made.recipe.model_copy(update={"split": SplitSettings(rule="time", validation=0.4, gap_s=0.1)})
    request = EtlRequest(data=made.data, out=folder, workers=0)
    return recipe, Path(etl(recipe, request, QUIET)["shards"])


def test_recordings_that_were_trained_on_are_refused_however_they_are_cut_now(made, tmp_path):
    _, shards = cut_by_time(made, tmp_path / "by-time")
    with pytest.raises(DataError, match="trained on: 1 recording, or others of their drives, first "):
        evaluate(made.recipe, made.run, EvalRequest(shards, "val", blind=False), QUIET)


def test_of_its_own_shards_parted_by_time_only_the_later_part_is_measured(made, tmp_path):
    recipe, shards = cut_by_time(made, tmp_path / "by-time")
    trained = train(recipe, TrainRequest(shards, made.data, tmp_path, "timed", "test"), QUIET)
    run = runs.open_finished(Path(trained["run"]))
    assert evaluate(recipe, run, SEEING, QUIET)["split_rule"] == "time"
    with pytest.raises(DataError, match="split train: trained on: 2 recordings, or"):
        evaluate(recipe, run, EvalRequest(split="train", blind=False), QUIET)


def test_no_twin_learns_from_shards_that_were_made_anew(original, tmp_path):
    """Where the run's shards lay, others lie now: there is nothing that it learned from, and no twin."""
    recipe, shards = original.recipe, tmp_path / "shards" / "run"
    shutil.copytree(original.shards, shards)
    folder = tmp_path / "runs" / "run"
    shutil.copytree(original.run.folder, folder)
    run_file = folder / runs.RUN_FILE
    manifest = original.run.manifest
    moved = manifest.shards.model_copy(update={"folder": str(shards), "fingerprint": "0" * 64})
    files.write_json(run_file, manifest.model_copy(update={"shards": moved}).model_dump(mode="json"))
    run = runs.open_run(folder)
    with pytest.raises(DataError, match="shards of run run are gone or were made anew; name others with --shards"):
        evaluate(recipe, run, EvalRequest(), QUIET)
    assert not (folder / "blind").exists()


def test_a_run_whose_own_shards_are_damaged_is_measured_on_others_without_a_twin(original, tmp_path, capsys):
    own, folder = tmp_path / "shards", tmp_path / "runs" / "run"
    (own / "recordings").mkdir(parents=True)
    shutil.copytree(original.run.folder, folder)
    moved = original.run.manifest.shards.model_copy(update={"folder": str(own), "fingerprint": "0" * 64})
    manifest = original.run.manifest.model_copy(update={"shards": moved})
    files.write_json(folder / runs.RUN_FILE, manifest.model_dump(mode="json"))
    run = runs.open_run(folder)
    with pytest.raises(DataError, match="unfinished"):
        evaluate(original.recipe, run, EvalRequest(split="val"), QUIET)
    report = evaluate(original.recipe, run, EvalRequest(original.shards, split="val"), Console())
    assert "trained blind" not in [line["name"] for line in report["conditions"]]
    told = "no twin trained blind: the shards that the run learned from are gone or were made anew"
    assert f"warning: {told}" in capsys.readouterr().err


def test_two_do_not_measure_one_run_at_once(made):
    with files.exclusive(made.run.folder, "training in"), pytest.raises(OmniError, match="another omni is measuring"):
        evaluate(made.recipe, made.run, SEEING, QUIET)


def test_other_segments_of_a_drive_that_was_trained_on_are_refused(original):
    dataset = WindowDataset(open_shards(original.shards), "val")
    learned = runs.Learned(recordings=("another",), groups=(dataset.entries[0].group,), windows=1, medians={})
    with pytest.raises(DataError, match="others of their drives"):
        check_leak(dataset, learned, is_own=False)
    check_leak(dataset, learned.model_copy(update={"groups": ("elsewhere",)}), is_own=False)
