"""`infer` shows the model what `etl` would have shown it, and its answers are those that `eval` measures."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from omni_cli import files
from omni_cli.__main__ import run as omni
from omni_cli.commands._subject import open_subject
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.formats.video import decode, encode_h264, probe
from omni_cli.recipe import Asked, Prediction
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain, VlmTune
from omni_cli.report import Console
from omni_cli.samples import views
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.prompts import ANSWERED
from omni_cli.samples.shards import open_shards
from omni_cli.samples.sync import PlannedWindow
from omni_cli.sources import open_source
from omni_cli.sources.quarantine import write_quarantine
from omni_cli.sources.video_file import video_recording
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.infer import Answer, InferRequest, infer, subject_of_base, subject_of_run
from omni_cli.stages.overlay import BAND_PX, TILED_WIDTH_PX, WIDTH_PX, Said, write_overlay
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic

SPEED = {"mean_speed_mps": 1.0}
FOUR = CAMERA_SETS["4-cam"]
FRONT = FOUR[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("infer")
    write_synthetic(data)
    return data


def short_answers(cameras: str, **sample):
    """A recipe whose answers are short and end: that is learned in 40 steps, and decoded quickly."""
    values = {"window": 4, "stride": 4, "canvas_px": 112, "labels": "speed", **sample}
    train = VlmTrain(batch_size=4, learning_rate=2e-3, max_steps=40, gradient_checkpointing=False, workers=0)
    return tiny_recipe(cameras=cameras, sample=VlmSample(cameras=cameras, **values), train=train)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("four"), short_answers("4-cam"), data=data)


@pytest.fixture(scope="module")
def one_camera(data, tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("one"), short_answers("1-cam"), data=data)


@pytest.fixture(scope="module")
def videos(data, made, tmp_path_factory):
    """The four videos of one recording as files, by camera."""
    folder = tmp_path_factory.mktemp("videos")
    recording = open_source("synthetic", data / "raw" / "synthetic").open(recording_ids(made)[0])
    for name in FOUR:
        (folder / f"{name}.mp4").write_bytes(recording.cameras[name].videos[0].read())
    return {name: folder / f"{name}.mp4" for name in FOUR}


def recording_ids(made: Made) -> list[str]:
    return [entry.id for entry in open_shards(made.shards).manifest.recordings]


def ask(made: Made, out, *clips, **changes):
    request = InferRequest(tuple(map(str, clips)), data=made.data, out=out, **changes)
    return infer(made.recipe, subject_of_run(made.run), request, QUIET)


def test_a_recording_is_seen_exactly_as_in_its_shard(made):
    preprocess, shards = made.run.manifest.preprocess, open_shards(made.shards)
    dataset = WindowDataset(shards, "all", made.recipe.sidecar_key(preprocess))
    tokenizer = made.recipe.tokenizer(preprocess)
    reader = open_source("synthetic", made.data / "raw" / "synthetic")
    seen = 0
    for name in recording_ids(made):
        recording = reader.open(name, preprocess.cameras)
        windows = views.plan_views(recording, preprocess, stride=4, max_age_us=100_000).windows
        for window, pictures in zip(windows, views.tiled_pictures(recording, preprocess, windows), strict=True):
            row = dataset[seen]
            assert (row["recording"], row["start_us"], row["end_us"]) == (name, window.start_us, window.end_us)
            assert torch.equal(row["pictures"], torch.from_numpy(pictures))
            asked = made.recipe.prompt_row(row["pictures"], preprocess, tokenizer, row["start_speed_mps"])
            prompt = int((row["labels"] == -100).sum())
            assert torch.equal(row["input_ids"][:prompt], asked["input_ids"][:prompt])
            assert torch.equal(row["position_ids"][:, :prompt], asked["position_ids"][:, :prompt])
            seen += 1
    assert seen == len(dataset) > 8


def test_overlapping_windows_decode_each_frame_once_and_show_the_same(made):
    preprocess = made.run.manifest.preprocess
    recording = open_source("synthetic", made.data / "raw" / "synthetic").open(recording_ids(made)[0])
    windows = views.plan_views(recording, preprocess, stride=1, max_age_us=100_000).windows
    sparse = windows[::4]
    together = list(views.tiled_pictures(recording, preprocess, windows))[::4]
    for one, other in zip(together, views.tiled_pictures(recording, preprocess, sparse), strict=True):
        np.testing.assert_array_equal(one, other)


def test_its_answers_are_those_that_eval_measures(made, tmp_path):
    preprocess = made.run.manifest.preprocess
    dataset = WindowDataset(open_shards(made.shards), "all", made.recipe.sidecar_key(preprocess))
    rows = [dataset[index] for index in range(len(dataset))]
    expected = made.recipe.predict(made.recipe.load(preprocess, made.run.final), rows, preprocess)
    result = ask(made, tmp_path, *recording_ids(made))
    lines = [line for clip in result["clips"] for line in clip["answers"]]
    assert [line["text"] for line in lines] == [prediction.text for prediction in expected]
    assert [line["forced"] for line in lines] == [prediction.values is None for prediction in expected]
    for line, row, prediction in zip(lines, rows, expected, strict=True):
        assert (line["clip"], line["start_us"], line["end_us"]) == (row["recording"], row["start_us"], row["end_us"])
        assert line["values"] == prediction.values
        assert line["truth"] == {name: row[name] for name in ANSWERED[made.recipe.sample.labels]}
    for clip in result["clips"]:
        path = tmp_path / f"{clip['clip']}.jsonl"
        assert clip["file"] == str(path)
        assert [json.loads(line) for line in path.read_text().splitlines()] == clip["answers"]
        assert files.verified_receipt(path, expect={"windows": clip["windows"]})


def test_named_files_are_the_recording_without_its_truth(made, videos, tmp_path):
    result = ask(made, tmp_path, cameras=videos)
    (clip,) = result["clips"]
    assert clip["clip"] == FRONT
    assert "truth" not in clip["answers"][0]
    assert clip["windows"] == len(clip["answers"]) > 3


def test_one_file_is_the_view_of_a_one_camera_model(one_camera, videos, tmp_path):
    result = ask(one_camera, tmp_path, videos[FRONT], stride=2)
    (clip,) = result["clips"]
    starts = [line["start_us"] for line in clip["answers"]]
    assert starts[:3] == [0, 200_000, 400_000]
    assert result["failed"] == 0


def test_a_mosaic_fills_the_cells_whatever_its_aspect(made, tmp_path):
    path = tmp_path / "mosaic.mp4"
    with path.open("wb") as stream:
        encode_h264(stream, (np.full((64, 64, 3), 30 + 8 * k, np.uint8) for k in range(20)), rate_hz=Fraction(10))
    preprocess = made.run.manifest.preprocess
    recording = video_recording({views.MOSAIC: path})
    windows = views.plan_views(recording, preprocess, stride=4, max_age_us=100_000).windows
    pictures = next(views.tiled_pictures(recording, preprocess, windows))
    assert pictures.shape == preprocess.window_shape == (4, 4, *preprocess.picture_shape)
    for instant, cells in enumerate(pictures):
        assert np.abs(cells.astype(int) - (30 + 8 * instant)).max() <= 3
    (clip,) = ask(made, tmp_path / "out", path, tiled=True)["clips"]
    assert clip["windows"] == len(windows) == 5


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["FILE"], {}, rf"is one view \({FRONT}\?\), missing {FOUR[1]}, {FOUR[2]}, {FOUR[3]}: .* or --tiled"),
        ([], {"cameras": FOUR[:2]}, f"missing {FOUR[2]}, {FOUR[3]}: the model looks at 4 cameras; give --camera NAME="),
        ([], {"cameras": ("camera_front_wide",)}, f"--camera camera_front_wide: .* did you mean '{FRONT}'"),
        ([], {"cameras": FOUR, "tiled": True}, "--tiled asks about ready mosaics, --camera about single views"),
        ([], {}, "name clips, or the views of one drive"),
        (["FILE"], {"cameras": FOUR}, "name clips, or the views of one drive"),
        (["absent.mp4"], {}, "no video file absent.mp4, and no recording of that id under"),
        (["absent.mp4"], {"tiled": True}, "--tiled: no video file absent.mp4"),
        (["FOLDER"], {}, "holds no video"),
    ],
)
def test_less_than_the_model_looks_at_is_refused_by_name(made, videos, tmp_path, *, words, changes, message):
    places = {"FILE": videos[FRONT], "FOLDER": tmp_path}
    words = [str(places.get(word, word)) for word in words]
    if cameras := changes.get("cameras"):
        changes = {**changes, "cameras": dict.fromkeys(cameras, videos[FRONT])}
    with pytest.raises(UsageError, match=message):
        ask(made, tmp_path / "out", *words, **changes)
    assert not (tmp_path / "out").exists()


def test_of_several_clips_the_broken_one_is_named_and_the_rest_go_on(one_camera, videos, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "c"):
        (folder / f"{name}.mp4").write_bytes(videos[FRONT].read_bytes())
    (folder / "b.mp4").write_bytes(b"no video at all")
    words = ["infer", str(folder), "--run", str(one_camera.run.folder), "--out", str(tmp_path / "out"), "--json"]
    assert omni([*words, "--stride", "40", "--quiet"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [clip["clip"] for clip in result["clips"]] == ["a", "c"]
    assert (result["failed"], list(result["failures"])) == (1, ["b"])
    assert "not a readable video" in result["failures"]["b"]
    assert "warning: 1 of 3 clips failed" in captured.err


def test_a_file_that_is_no_video_is_one_line(one_camera, tmp_path, capsys):
    (tmp_path / "notes.mp4").write_text("my notes")
    words = ["infer", str(tmp_path / "notes.mp4"), "--run", str(one_camera.run.folder), "--quiet"]
    assert omni([*words, "--out", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()[-1:]  # in-process, transformers draws its bar before it
    assert line.startswith(f"error: {tmp_path}/notes.mp4: not a readable video (Invalid data found")
    assert captured.out == ""


def test_a_recording_in_quarantine_is_refused_with_its_reason(one_camera, tmp_path):
    shutil.copytree(one_camera.data / "raw", tmp_path / "raw")
    aside, other = recording_ids(one_camera)[:2]
    listed = write_quarantine(tmp_path / "raw" / "synthetic", {aside: "the camera was covered"})
    message = rf"{aside} is in quarantine: the camera was covered; mend it and delete its line from {listed}, or ask"
    subject = subject_of_run(one_camera.run)
    for data in (tmp_path, tmp_path / "raw" / "synthetic"):
        with pytest.raises(DataError, match=message):
            infer(one_camera.recipe, subject, InferRequest((aside,), data=data, out=tmp_path / "out"), QUIET)
        assert not (tmp_path / "out").exists()
    (clip,) = infer(one_camera.recipe, subject, InferRequest((other,), data=tmp_path, out=tmp_path / "out"), QUIET)[
        "clips"
    ]
    assert clip["windows"] > 1


def test_a_clip_shorter_than_a_window_is_refused(one_camera, tmp_path):
    path = tmp_path / "short.mp4"
    with path.open("wb") as stream:
        encode_h264(stream, (np.zeros((36, 64, 3), np.uint8) for _ in range(3)), rate_hz=Fraction(10))
    with pytest.raises(DataError, match=r"short: 0\.2 s hold no window of 4 frames at 10 Hz"):
        ask(one_camera, tmp_path / "out", path)


def test_a_clip_slower_than_the_model_looks_is_told_of(one_camera, tmp_path, capsys):
    path = tmp_path / "slow.mp4"
    with path.open("wb") as stream:
        encode_h264(stream, (np.zeros((36, 64, 3), np.uint8) for _ in range(12)), rate_hz=Fraction(5))
    asked = InferRequest((str(path),), data=tmp_path, out=tmp_path / "out")
    infer(one_camera.recipe, subject_of_run(one_camera.run), asked, QUIET)
    said = capsys.readouterr().err
    assert f"warning: slow: pictures repeat: windows look at 10 Hz, and {FRONT} at 5 Hz sees less often" in said


def test_a_model_that_is_told_its_speed_needs_a_recording(data, tmp_path):
    made = make_run(tmp_path, short_answers("1-cam", past_speed=True), data=data)
    name = recording_ids(made)[0]
    assert ask(made, tmp_path / "out", name)["clips"][0]["windows"] > 1
    recording = open_source("synthetic", data / "raw" / "synthetic").open(name)
    video = tmp_path / "clip.mp4"
    video.write_bytes(recording.cameras[FRONT].videos[0].read())
    with pytest.raises(DataError, match="clip: the model is told the speed at the first frame, which a plain video"):
        ask(made, tmp_path / "out", video)


def test_an_adapter_is_not_asked_over_another_base(made, tmp_path):
    other = made.run.manifest.model_copy(update={"base_fingerprint": "tiny:qwen2_5_vl seed 7"})
    subject = subject_of_run(type(made.run)(made.run.folder, other))
    adapted = made.recipe.model_copy(update={"tune": VlmTune(mode="lora")})
    with pytest.raises(DataError, match="adapter does not match its base"):
        infer(adapted, subject, InferRequest((recording_ids(made)[0],), data=made.data, out=tmp_path), QUIET)


def test_an_exported_model_answers_as_its_run(made, tmp_path):
    folder = export(made.recipe, made.run, ExportRequest("hf", tmp_path / "exported"), QUIET)["export"]
    recipe, subject = open_subject(None, tmp_path, QUIET, model=folder, profile=None, sets=[])
    name = recording_ids(made)[0]
    request = InferRequest((name,), data=made.data, out=tmp_path / "out")
    assert (
        infer(recipe, subject, request, QUIET)["clips"][0]["answers"]
        == (ask(made, tmp_path / "other", name)["clips"][0]["answers"])
    )


def test_weights_of_another_type_still_answer(one_camera, videos, tmp_path):
    (clip,) = ask(one_camera, tmp_path, videos[FRONT], dtype="bfloat16", device="cpu")["clips"]
    assert clip["windows"] > 1
    for changes, message in (
        ({"dtype": "int4"}, "--dtype int4: expected one of"),
        ({"device": "tpu9"}, "--device tpu9"),
    ):
        with pytest.raises(UsageError, match=message):
            ask(one_camera, tmp_path, videos[FRONT], **changes)


def test_without_a_run_the_base_model_is_asked_and_says_that_it_is_untrained(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNI_RUNS", raising=False)
    words = ["infer", str(videos[FRONT]), "--tiled", "--profile", "cpu-tiny", "--stride", "40", "--json"]
    assert omni(words) == 0
    captured = capsys.readouterr()
    assert "warning: no training of ours: tiny:qwen2_5_vl, untrained: " in captured.err
    assert f"of a mosaic of 2 x 2 cells the model sees, row by row, {', '.join(FOUR)}; the rest" in captured.err
    result = json.loads(captured.out)
    assert (result["model"], result["clips"][0]["windows"]) == ("base model tiny:qwen2_5_vl", 1)


def test_noise_is_held_to_the_format_and_marked_so(made, videos, tmp_path, capsys):
    """Each answer can be read, and nobody takes what was forced for what the model said."""
    base, request = subject_of_base(short_answers("1-cam")), InferRequest((str(videos[FRONT]),), out=tmp_path)
    recipe = short_answers("1-cam")
    (clip,) = infer(recipe, base, request, Console())["clips"]
    said = capsys.readouterr().err
    assert clip["windows"] == clip["forced"] == said.count(" tokens)") > 3
    assert clip["unreadable"] == 0
    assert f"{FRONT}: {clip['forced']} of {clip['forced']} answers had to be forced into the format, at " in said
    for line in clip["answers"]:
        assert FORMATS["speed"].grammar.holds(line["text"])
        assert line["values"] is not None
        assert (line["forced"], 0 < line["off_grammar_tokens"] <= line["tokens"]) == (True, True)
    (free,) = infer(recipe, base, replace(request, constrained=False), Console())["clips"]
    assert free["unreadable"] == free["windows"]
    assert not free.keys() & {"forced"}
    assert not free["answers"][0].keys() & {"forced", "tokens", "off_grammar_tokens"}


def test_the_recipe_of_a_base_is_asked_with_its_own_preprocessing():
    recipe = tiny_recipe("qwen3_vl")
    assert subject_of_base(recipe).preprocess == recipe.preprocess()


def test_two_subjects_are_refused(made, tmp_path):
    with pytest.raises(UsageError, match="--run asks a trained model as it is; leave out --model"):
        open_subject(made.run.folder, tmp_path, QUIET, model="x", profile=None, sets=[])
    with pytest.raises(OmniError, match=r"model .*absent: no such folder"):
        open_subject(None, tmp_path, QUIET, model=str(tmp_path / "absent"), profile="cpu-tiny", sets=[])


def test_the_overlay_shows_every_camera_in_real_time_with_the_answer(made, tmp_path):
    name = recording_ids(made)[0]
    (clip,) = ask(made, tmp_path, name, overlay=True)["clips"]
    video = (tmp_path / f"{name}.mp4").read_bytes()
    assert files.verified_receipt(tmp_path / f"{name}.mp4", expect={"camera": FRONT})
    info, width, height = probe(video, "overlay"), TILED_WIDTH_PX, 540 + 180 + BAND_PX
    assert (info.codec, info.width_px, info.height_px) == ("h264", width, height)
    assert info.num_frames == 4 * clip["windows"]  # stride = window: every instant once
    assert np.diff(info.pts_us).tolist() == [100_000] * (info.num_frames - 1)
    recording = open_source("synthetic", made.data / "raw" / "synthetic").open(name)
    window = views.plan_views(recording, made.run.manifest.preprocess, stride=4, max_age_us=100_000).windows[0]
    (_, first), *_ = decode(video, "overlay", [0], width_px=width, height_px=height)
    places = [(0, 0, 960, 540), *((320 * column, 540, 320, 180) for column in range(3))]
    for camera, frame, (left, top, wide, high) in zip(FOUR, window.frame_index[0].tolist(), places, strict=True):
        source = recording.cameras[camera].videos[0].read()
        (_, shown), *_ = decode(source, "source", [frame], width_px=wide, height_px=high)
        tile = first[top + 40 : top + high, left : left + wide]  # below the camera's name
        assert np.abs(tile.astype(int) - shown[40:]).mean() < 4
    answer, truth = first[720 : 720 + BAND_PX // 2], first[720 + BAND_PX // 2 :]
    assert (answer.min(axis=2) > 180).sum() > 200  # white letters
    assert ((truth[..., 1] > 150) & (truth[..., 0] < 160)).sum() > 200  # green ones


def test_a_slow_camera_is_shown_again_and_the_newest_window_speaks(tmp_path):
    path = tmp_path / "slow.mp4"
    greys = (40, 200)
    with path.open("wb") as stream:
        encode_h264(stream, (np.full((36, 64, 3), grey, np.uint8) for grey in greys), rate_hz=Fraction(5))
    recording = video_recording({views.MOSAIC: path})
    instants = np.arange(4) * 100_000
    frames = np.array([[0], [0], [1], [1]])
    said = [
        Said(PlannedWindow(instants[part], frames[part], frames[part]), values, {})
        for part, values in ((slice(0, 2), SPEED), (slice(1, 3), SPEED), (slice(2, 4), None))
    ]
    recipe = tiny_recipe()
    preprocess = recipe.preprocess().model_copy(update={"num_frames": 2})
    write_overlay(tmp_path / "o.mp4", recording, views.MOSAIC, said, recipe=recipe, preprocess=preprocess)
    video = (tmp_path / "o.mp4").read_bytes()
    shown = [p for _, p in decode(video, "o", range(4), width_px=WIDTH_PX, height_px=360 + BAND_PX)]
    assert [round(float(p[100:300].mean()), -1) for p in shown] == [40, 40, 200, 200]
    one, other = (shown[k][360:].astype(int) for k in (1, 2))
    assert np.abs(one - other).max() > 100  # another caption
    assert np.abs(shown[0][360:].astype(int) - one).mean() < 3
    assert np.abs(shown[0][:40].astype(int) - shown[1][:40]).max() > 100  # another time


def test_the_caption_of_an_answer():
    caption = tiny_recipe().caption
    assert caption({"mean_speed_mps": 5.234, "displacement_m": 42.1}) == "speed 5.23 m/s, displacement 42.10 m"
    assert caption(None) == "no readable answer"
    assert caption({"mean_speed_mps": 1.0}) == "speed 1.00 m/s"


def test_a_line_of_the_answers_file():
    instants = np.array([1_000_000, 1_100_000])
    window = PlannedWindow(instants, np.zeros((2, 1), np.int64), instants[:, None])
    line = Answer(Asked(window, {}, {}), Prediction("Speed 5.0", {"v": 5.0})).line("clip", dict)
    assert line == {
        "clip": "clip",
        "start_us": 1_000_000,
        "end_us": 1_100_000,
        "text": "Speed 5.0",
        "values": {"v": 5.0},
    }
    assert Answer(Asked(window, {}, {"v": 4.0}), Prediction("?", None)).line("c", dict) == {
        **line,
        "clip": "c",
        "text": "?",
        "values": None,
        "truth": {"v": 4.0},
    }
