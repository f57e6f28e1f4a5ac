"""Waypoints and reasons through every stage of a tiny model, and windows of 64 frames with every kind of labels."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_cli import files
from omni_cli.__main__ import run as omni
from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.formats.video import decode, probe
from omni_cli.recipe import Prediction
from omni_cli.recipes.vlm.labels import LABELS
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain
from omni_cli.samples import views
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.prompts import parse_answer
from omni_cli.samples.shards import open_shards
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.waypoints import known_waypoints
from omni_cli.scene.recording import Caption
from omni_cli.sources import open_source
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.overlay import WIDTH_PX, Said, write_overlay
from tests.support.drives import drive
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

ONE = CAMERA_SETS["1-cam"]


def recipe_of(labels, **sample):
    values = {"cameras": "1-cam", "window": 4, "stride": 16, "canvas_px": 84, "labels": labels, **sample}
    train = VlmTrain(batch_size=4, learning_rate=3e-3, max_steps=2, gradient_checkpointing=False, workers=0)
    return tiny_recipe(cameras=values["cameras"], sample=VlmSample(**values), train=train)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("forecast")
    write_synthetic(data, seconds=10.0, fps=10, cameras=ONE, roads="winding", clips_per_chunk=2)
    return data


@pytest.fixture(scope="module", params=["waypoints", "reasoning"])
def made(request, data, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp(request.param), recipe_of(request.param), data=data)


def dataset_of(made):
    return WindowDataset(open_shards(made.shards), "all", made.recipe.sidecar_key(made.run.manifest.preprocess))


def test_shards_hold_every_waypoint_and_tokens_hold_the_answer(made):
    dataset, labels = dataset_of(made), made.recipe.sample.labels
    tokenizer = made.recipe.tokenizer(dataset.preprocess)
    assert len(dataset) >= 4
    for index in range(len(dataset)):
        row = dataset[index]
        answer = tokenizer.decode([number for number in row["labels"].tolist() if number != -100])
        answer = answer.removesuffix("<|im_end|>")
        recording = open_source("synthetic", made.data / "raw" / "synthetic").open(row["recording"])
        (truth,) = known_waypoints(recording, [_window(row)])
        np.testing.assert_allclose(row["future_xyz_m"].reshape(64, 3), truth.xyz_m[16:])
        np.testing.assert_allclose(row["curvature_per_m"], truth.actions[:, 1])
        values = LABELS[labels].answers.plain(parse_answer(labels, answer))
        np.testing.assert_allclose(values["xy_m"], truth.xyz_m[16:, :2], atol=0.15)
        assert row["recording"] not in tokenizer.decode(row["input_ids"])
        if labels == "reasoning":
            assert values["reasoning"] in {caption.text for caption in recording.captions}


def _window(row):
    instants = np.arange(row["start_us"], row["end_us"] + 1, 100_000)
    return PlannedWindow(instants, np.zeros((4, 1), np.int64), instants[:, None])


def test_eval_measures_paths_beside_what_needs_no_eyes(made):
    report = evaluate(made.recipe, made.run, EvalRequest(blind=False), QUIET)
    by_name = {line["name"]: line for line in report["conditions"]}
    assert {"model", "constant median", "stationary", "constant velocity", "constant curvature"} <= set(by_name)
    for horizon in ("1s", "2s", "3s", "6.4s"):
        for key in (f"ade_{horizon}", f"fde_{horizon}"):
            assert by_name["model"][key] is not None
            assert 0 <= by_name["constant curvature"][key] <= by_name["stationary"][key]
    assert by_name["stationary"]["unreadable"] == 0
    has_words = "reasoning_words_off" in by_name["model"]
    assert has_words == (made.recipe.sample.labels == "reasoning")
    if has_words:
        assert 0 <= by_name["model"]["reasoning_words_off"] <= 1
        assert by_name["stationary"]["reasoning_words_off"] is None
    assert Path(report["report"]).is_file()


def test_infer_writes_what_it_says_and_an_overlay_of_the_path(made, tmp_path):
    name = open_shards(made.shards).manifest.recordings[0].id
    request = InferRequest((name,), data=made.data, out=tmp_path, overlay=True, stride=24)
    result = infer(made.recipe, subject_of_run(made.run), request, QUIET)
    lines = [json.loads(line) for line in Path(result["clips"][0]["file"]).read_text().splitlines()]
    known = [line for line in lines if "truth" in line]
    assert 0 < len(known) < len(lines)  # the last windows have no future
    assert all(np.shape(line["truth"]["xy_m"]) == (64, 2) for line in known)
    assert all(line["end_us"] + 6_400_000 <= 10_500_000 for line in known)
    assert files.verified_receipt(Path(result["clips"][0]["overlay"]))


def test_the_overlay_draws_both_paths_where_the_window_ends(made, tmp_path):
    recording = open_source("synthetic", made.data / "raw" / "synthetic").open(
        open_shards(made.shards).manifest.recordings[0].id
    )
    preprocess, answers = made.run.manifest.preprocess, LABELS["waypoints"].answers
    windows = views.plan_views(recording, preprocess, stride=2, max_age_us=100_000).windows[8:11]
    truth = answers.truth(recording, windows, [{}] * len(windows))
    aside = [{"xy_m": one["xy_m"] + [0.0, 1.5]} for one in truth]
    said = [Said(*one) for one in zip(windows, aside, truth, strict=True)]
    write_overlay(tmp_path / "o.mp4", recording, ONE[0], said, recipe=made.recipe, preprocess=preprocess)
    content = (tmp_path / "o.mp4").read_bytes()
    info = probe(content, "o")
    pictures = dict(decode(content, "o", [0, 1, 2], width_px=info.width_px, height_px=info.height_px))
    assert info.width_px == WIDTH_PX
    for picture in pictures.values():
        red, green, blue = np.moveaxis(picture[:300].astype(int), 2, 0)
        assert ((green > red + 60) & (green > blue + 60)).sum() > 50  # the truth
        assert ((red > blue + 60) & (green > blue + 60)).sum() > 50  # what was said


@pytest.mark.parametrize("labels", sorted(LABELS))
def test_a_window_of_64_frames_goes_from_etl_to_a_loss(labels, tmp_path):
    recording = drive(tmp_path, seconds=15.0, cameras=("front",))
    recording = replace(recording, captions=(Caption(7_000_000, "Keep left because the road bends."),))
    recipe = recipe_of(labels, cameras="front", window=64)
    preprocess = recipe.preprocess()
    tables = recipe.table_maker()(recording, preprocess, assign_split=lambda _start, _end: "train")
    assert tables.windows.num_rows >= 1
    tokens = recipe.encode_windows(tables.windows, preprocess)
    length = len(tokens["input_ids"][0])
    row = {
        "input_ids": torch.tensor(tokens["input_ids"][0].as_py()),
        "labels": torch.tensor(tokens["labels"][0].as_py()),
        "position_ids": torch.tensor(tokens["position_ids"][0].as_py()).view(4, length),
        "pictures": torch.randint(0, 256, preprocess.window_shape, dtype=torch.uint8),
    }
    assert len(tables.windows["frames"][0]) == 64
    assert preprocess.window_shape[0] == 64
    batch = recipe.collate([row, row], preprocess)
    loss = recipe.loss(recipe.build(preprocess).model, batch, preprocess)
    assert loss.count == 2 * sum(number != -100 for number in tokens["labels"][0].as_py())
    assert torch.isfinite(loss.total)


def test_recordings_without_a_text_are_no_fault_but_a_set_of_them_is(data, tmp_path):
    recipe = recipe_of("reasoning", window=40)  # no event lies 4 s into a clip and 6.4 s before its end
    with pytest.raises(DataError, match=r"no recording gives a window; dropped: .* because"):
        etl(recipe, EtlRequest(data=data, out=tmp_path / "shards", workers=0), QUIET)


def test_a_caption_is_called_reasoning_here(data, capsys):
    assert omni(["etl", "--data", str(data), "--labels", "caption", "--profile", "cpu-tiny"]) == 2
    assert "input should be 'ego-motion', 'speed', 'waypoints' or 'reasoning'" in capsys.readouterr().err


def test_an_answer_that_cannot_be_read_still_makes_a_report(made):
    rows = [dataset_of(made).row(0)]
    found = made.recipe.errors([Prediction("?", None)], rows, made.recipe.medians(rows))
    assert all(np.isfinite(values).all() for values in found.values())
