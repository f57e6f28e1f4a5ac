"""`omni bench`: on what it measures, that its parts add up, and that nothing of it is left behind."""

import itertools
import json
import shutil
import tempfile

import numpy as np
import pyarrow as pa
import pytest
import torch

from omni_cli.__main__ import run
from omni_cli.errors import UsageError
from omni_cli.files import read_json, read_receipt, write_json
from omni_cli.formats.video import decode, probe
from omni_cli.report import Console
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation
from omni_cli.stages import models, runs
from omni_cli.stages.bench import PARTS, BenchRequest, bench
from omni_cli.stages.bench.latency import ROUNDS
from omni_cli.stages.bench.steps import Cycled
from omni_cli.stages.bench.subject import Subject
from omni_cli.stages.bench.texture import TextureSpec, texture_video
from omni_cli.stages.bench.timing import Line, Timing, measure
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.locate import finished_runs
from tests.support.drives import preprocess, write_video
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A user's folder: raw data, shards, a finished run and its ONNX export."""
    folder = tmp_path_factory.mktemp("bench")
    write_synthetic(folder / "data", cameras=("camera_front_wide_120fov",))
    made = make_run(folder, tiny_recipe(cameras="1-cam"), data=folder / "data")
    (folder / "shards").rename(folder / "data" / "shards")
    export(made.recipe, made.run, ExportRequest("onnx"), QUIET)
    return made


def ask(made, part=None, **changes):
    return BenchRequest(part, made.data, made.run.folder.parent, "test", **{"repeats": 2, **changes})


def test_with_a_users_own_data_and_run_every_part_is_measured_on_them(made):
    result = bench(made.recipe, ask(made), QUIET)
    parts = result["parts"]
    assert list(parts) == list(PARTS)
    assert str(made.data / "raw" / "synthetic") in parts["etl"]["on"]
    assert str(made.data / "shards" / "run") in parts["loader"]["on"]
    assert parts["infer"]["on"].startswith(f"run {made.run.folder}")
    ways = itertools.product(("torch cpu", "ONNX cpu"), ("host to host", "device only (cpu, the host)"))
    assert set(parts["export"]["lines"]) == {
        f"model {program}: {runner} b1, {path}"
        for program, (runner, path) in itertools.product(("vision", "decoder", "whole"), ways)
    }
    assert parts["export"]["teacher"] == "no teacher is measured: recipe vlm learns from no other model"
    assert (result["device"], result["threads"]) != ("", 0)
    lines = [line for part in parts.values() for line in part["lines"].values()]
    assert all(0 < line["min_s"] <= line["median_s"] <= line["max_s"] for line in lines)
    assert {name: {line["repeats"] for line in part["lines"].values()} for name, part in parts.items()} == {
        **{name: {2} for name in PARTS},
        "export": {2 * ROUNDS},
    }
    assert all(ratio > 0 for part in parts.values() for ratio in part["ratios"].values())


def test_an_export_of_omni_0_6_holds_the_tower_alone_and_is_measured(made, tmp_path):
    shutil.copytree(made.run.folder.parent, tmp_path / "runs")
    folder = tmp_path / "runs" / made.run.name / "export" / "onnx"
    weights = read_receipt(folder)["run_weights"]
    card = read_json(folder / "programs.json")
    write_json(folder / "programs.json", {**card, "programs": card["programs"][:1]})
    (folder / "decoder.onnx").unlink()
    runs.seal_folder(folder, run_weights=weights, format=2)
    (part,) = bench(made.recipe, BenchRequest("export", made.data, tmp_path / "runs", "test", repeats=1), QUIET)[
        "parts"
    ].values()
    assert {line.split(":")[0] for line in part["lines"]} == {"model vision"}
    with pytest.raises(UsageError, match=r"is a folder of ONNX programs: .* ask their run with --run"):
        models.open_model(folder)


def test_in_an_empty_folder_it_makes_a_drive_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    request = BenchRequest(None, tmp_path / "data", tmp_path / "runs", "test", repeats=1)
    result = bench(tiny_recipe(cameras="1-cam"), request, Console())
    said = capsys.readouterr().err
    assert "no raw data: measuring on a synthetic drive of " in said
    assert "export is left out: no ONNX export" in said
    assert list(result["parts"]) == ["etl", "loader", "train", "infer"]
    assert "untrained" in result["parts"]["infer"]["on"]
    assert list(tmp_path.iterdir()) == []


def test_a_newer_run_of_other_settings_does_not_hide_the_one_that_fits(made):
    newer = made.run.folder.with_name("newer")
    shutil.copytree(made.run.folder, newer)
    manifest = read_json(newer / "run.json")
    write_json(newer / "run.json", {**manifest, "settings": {**manifest["settings"], "model": "another"}})
    (newer / "final.receipt.json").touch()
    assert finished_runs(newer.parent) == [newer, made.run.folder]
    assert bench(made.recipe, ask(made, "export", repeats=1), QUIET)["parts"]["export"]["on"].startswith(
        str(made.run.folder)
    )
    shutil.rmtree(newer)


def test_a_named_run_is_measured_as_it_was_trained(made, capsys):
    words = ["bench", "infer", "--run", made.run.folder.name, "--runs", str(made.run.folder.parent), "--repeats", "1"]
    assert run([*words, "--data", str(made.data), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["recipe"], said["parts"]["infer"]["on"].split(",")[0]) == ("vlm", f"run {made.run.folder}")
    assert run([*words, "--profile", "cpu-tiny"]) == 2
    assert "--run measures with the run's own settings; leave out --profile" in capsys.readouterr().err


def test_without_an_export_it_says_which_run_and_what_to_do(made, capsys):
    words = ["bench", "export", "--run", made.run.folder.name, "--runs", str(made.run.folder.parent)]
    hidden = made.run.folder / "export.hidden"
    (made.run.folder / "export").rename(hidden)
    assert run(words) == 2
    hidden.rename(made.run.folder / "export")
    name = made.run.folder.name
    assert f"{name} has no ONNX export of its weights; make one: omni export {name}" in capsys.readouterr().err
    words = ["bench", "export", "--profile", "cpu-tiny", "--set", "hypotheses=2", "--recipe", "distill"]
    assert run([*words, "--runs", str(made.run.folder.parent)]) == 2
    said = "no run of recipe distill, model tiny:convnextv2, tuned in full is here; name one with --run NAME, or"
    assert said in capsys.readouterr().err


def test_data_of_other_cameras_are_not_measured_on(made, capsys):
    four = tiny_recipe(cameras="4-cam")
    result = bench(four, ask(made, "loader", repeats=1), Console())
    said = capsys.readouterr().err
    assert f"the newest shards, {made.data / 'shards' / 'run'}, do not fit this profile" in said
    assert "lacks a recording with this profile's cameras: measuring on a synthetic drive" in said
    assert str(made.data) not in result["parts"]["loader"]["on"]


def test_etl_is_measured_whole_beside_a_bare_decoder_and_other_ways(made):
    part = bench(made.recipe, ask(made, "etl", repeats=1), QUIET)["parts"]["etl"]
    others = ("decode alone", "the prototypes' way", "first camera, pyav", "first camera, torchcodec")
    inside = ("open it, read its log", "decode and scale, nothing written")
    assert list(part["lines"]) == ["a recording", *inside, *others]
    seconds = {name: line["median_s"] for name, line in part["lines"].items()}
    assert {f"{name} / a recording, in time" for name in (*inside, *others)} < part["ratios"].keys()
    assert part["ratios"]["decode alone / a recording, in time"] == pytest.approx(
        seconds["decode alone"] / seconds["a recording"]
    )
    cpu_s = {name: line["cpu_s"] for name, line in part["lines"].items()}
    share = part["ratios"]["decode alone / a recording, in CPU time"]
    assert 0 < share == pytest.approx(cpu_s["decode alone"] / cpu_s["a recording"])
    amounts = {unit: rate * seconds["a recording"] for unit, rate in part["lines"]["a recording"]["per_second"].items()}
    shards = open_shards(made.data / "shards" / "run")
    entry = shards.manifest.recordings[0]
    assert amounts["pictures"] == pytest.approx(entry.num_frames)
    assert amounts["MB"] == pytest.approx(entry.frames_file.size / 1e6)
    assert amounts["s of driving"] == pytest.approx(2.3, abs=0.2)
    assert amounts["camera-frames"] >= amounts["pictures"]


def test_the_bare_decoder_decodes_no_more_than_etl_does(tmp_path):
    """Of a camera whose every picture is a file, as in DGP scenes, those alone that a window looks at."""
    for number in range(12):
        write_video(tmp_path / f"{number}.mp4", 0, 4 if number == 11 else 1)
    videos = tuple(VideoLocation(tmp_path / f"{n}.mp4", num_frames=4 if n == 11 else 1) for n in range(12))
    stream = CameraStream("road", videos, np.arange(15) * 100_000)
    seen_us = [[200_000, 600_000], [600_000, 1_200_000]]
    windows = pa.table({"timestamps_us": pa.array(seen_us, pa.list_(pa.int64()))})
    layout = preprocess(cameras=("road",), columns=1)
    subject = Subject(Recording("drive", "test", {"road": stream}), None, layout, None, tmp_path, windows, 3)
    assert subject.decode_alone() == 4  # one each of two files, two of the last


def test_videos_that_are_easy_to_decode_are_joined_by_a_texture(made, capsys):
    texture = TextureSpec(128, 72, fps=10)
    part = bench(made.recipe, ask(made, "etl", repeats=1, texture=texture), Console())["parts"]["etl"]
    said = capsys.readouterr().err
    assert f"{made.data / 'raw' / 'synthetic'} holds h264 96x54, " in said
    assert "s of moving texture too, the same for each camera" in said
    assert "; a drive past texture, 1 cameras, h264 128x72, " in part["on"]
    assert {f"texture: {name}" for name in part["lines"] if not name.startswith("texture: ")} <= part["lines"].keys()
    assert part["ratios"]["texture: decode alone / a recording, in time"] > 0


def test_a_texture_moves_and_repeats_each_second():
    content = texture_video(TextureSpec(128, 72, fps=10), seconds=2.5)
    info = probe(content, "texture")
    assert (info.codec, info.num_frames, info.width_px) == ("h264", 30, 128)
    np.testing.assert_array_equal(np.diff(info.pts_us), 100_000)
    shown = [picture for _, picture in decode(content, "texture", range(30), width_px=128, height_px=72)]
    for first, second in itertools.pairwise(shown[:10]):
        assert np.abs(first.astype(int) - second).mean() > 5
    np.testing.assert_array_equal(shown[3], shown[23])
    assert texture_video(TextureSpec(128, 72, fps=10), seconds=2.5) == content


def test_the_phases_of_a_step_add_up_to_it(made):
    part = bench(made.recipe, ask(made, "train", repeats=1), QUIET)["parts"]["train"]
    seconds = {name: line["median_s"] for name, line in part["lines"].items()}
    phases = ("data", "forward", "backward", "optimiser")
    assert seconds["step"] == pytest.approx(sum(seconds[phase] for phase in phases))
    assert sum(part["ratios"][f"{phase} / step"] for phase in phases) == pytest.approx(1)
    rates = part["lines"]["step"]["per_second"]
    assert rates["samples"] * seconds["step"] == pytest.approx(made.recipe.train.batch_size)
    assert rates["tokens"] / rates["samples"] > made.run.manifest.preprocess.visual_tokens


def test_work_is_warmed_up_then_timed_in_turn():
    order = []
    timings = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_a_rate_is_of_the_median():
    line = Line("work", Timing((4.0, 1.0, 2.0)), {"windows": 10})
    tail, spread = {"p95_s": 4.0, "p99_s": 4.0}, {"min_s": 1.0, "max_s": 4.0}
    assert line.facts() == {"median_s": 2.0, **tail, **spread, "repeats": 3, "per_second": {"windows": 5.0}}


def test_a_cycled_dataset_begins_anew(made):
    shards = open_shards(made.data / "shards" / "run")
    windows = WindowDataset(shards, ALL, ensure_sidecar(shards, made.recipe, QUIET))
    cycled = Cycled(windows, 3 * len(windows))
    assert len(cycled) == 3 * len(windows)
    first, again = cycled[1], cycled[1 + 2 * len(windows)]
    assert torch.equal(first["pictures"], again["pictures"])
    assert torch.equal(first["input_ids"], again["input_ids"])
