"""A student is asked about drives: its plan lies on the road in the overlay; what it cannot look at is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_cli.__main__ import run as omni
from omni_cli.errors import UsageError
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.formats.video import decode, probe
from omni_cli.recipes.distill.settings import DistillSplit
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.samples.windows import plan_cameras
from omni_cli.scene.cameras import Pinhole
from omni_cli.scene.recording import Recording
from omni_cli.sources import open_source
from omni_cli.stages.clips import Clip
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.infer import Asker, InferRequest, infer, subject_of_run
from omni_cli.stages.overlay import BAND_PX, WIDTH_PX
from omni_cli.stages.train import TrainRequest, train
from tests.support import openpilot as made_of
from tests.support.driving import (
    FRONT,
    REAL_ID,
    copy_real_segment,
    real_data,
    tiny_student,
    write_drives,
    write_routes,
)
from tests.support.model_frames import QCAMERA, k_matrix, rotation
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe

VIEW_FROM_DEVICE = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
SMALL = Pinhole(  # what tests/support/openpilot.py films: 1928x1208 px, made smaller
    96, 64, 2648.0 * 96 / 1928, 2648.0 * 64 / 1208, 964.5 * 96 / 1928 - 0.5, 604.5 * 64 / 1208 - 0.5
)
BY_TIME = DistillSplit(rule="time", validation=0.4)
ROUTES = tuple(made_of.recording_id(number) for number in range(2))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A student of two drives of a comma device."""
    data = tmp_path_factory.mktemp("routes")
    assert tuple(write_routes(data)) == ROUTES
    return make_run(data, tiny_student(cameras="qcamera"), data=data)


@pytest.fixture(scope="module")
def real_segment(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("real")
    copy_real_segment(data)
    return data


@pytest.fixture(scope="module")
def made_of_reality(real_segment) -> Made:
    recipe = tiny_student(cameras="qcamera", sample={"window": 6, "stride": 40}, split=BY_TIME)
    return make_run(real_segment, recipe, data=real_segment)


def ask(made: Made, out: Path, name: str, **changes) -> dict:
    request = InferRequest((name,), data=made.data, out=out, overlay=True, **changes)
    (clip,) = infer(made.recipe, subject_of_run(made.run), request, QUIET)["clips"]
    return clip


# -- what is drawn


def on_the_road(recording: Recording, lens: Pinhole, path_m, time_us: int) -> np.ndarray:
    """Where openpilot's matrices put the points of a path in the overlay's picture, (n, 2)."""
    mount = recording.device.mount
    row = max(int((mount.timestamp_us <= time_us).sum()) - 1, 0)
    calib = np.column_stack([path_m, np.full(len(path_m), mount.height_m[row])])
    u, v, w = k_matrix(lens) @ VIEW_FROM_DEVICE @ rotation(mount.rpy_rad[row]) @ calib.T
    scale = WIDTH_PX / lens.width_px, height_px(lens) / lens.height_px
    pixels = (np.stack([u / w, v / w], axis=1) + 0.5) * scale - 0.5
    margin = 4
    inside = (pixels > margin).all(axis=1) & (pixels < [WIDTH_PX - margin, height_px(lens) - margin]).all(axis=1)
    return np.rint(pixels[inside & (path_m[:, 0] > 2.5)]).astype(int)


def height_px(lens: Pinhole) -> int:
    return round(lens.height_px * WIDTH_PX / lens.width_px / 2) * 2


def check_drawn(made: Made, clip: dict, lens: Pinhole) -> None:
    """The plan of each step is drawn where it lies, over the picture that the step ends with, and little else is."""
    recording = open_source("openpilot", made.data / "raw" / "openpilot").open(clip["clip"], ("qcamera",))
    stream, source = recording.cameras["qcamera"], recording.cameras["qcamera"].videos[0].read()
    overlay = Path(clip["overlay"]).read_bytes()
    info, height = probe(overlay, "overlay"), height_px(lens)
    steps = [step for line in clip["answers"] for step in steps_of(line)]
    assert (info.num_frames, info.width_px, info.height_px) == (len(steps), WIDTH_PX, height + BAND_PX)
    frames = [int((stream.timestamp_us <= instant_us).sum()) - 1 for instant_us, _ in steps]
    plain = dict(decode(source, "source", frames, width_px=WIDTH_PX, height_px=height))
    drawn = decode(overlay, "overlay", range(len(steps)), width_px=WIDTH_PX, height_px=height + BAND_PX)
    for (_, picture), frame, (_, path_m) in zip(drawn, frames, steps, strict=True):
        changed = np.abs(picture[:height].astype(int) - plain[frame]).max(axis=2)
        points = on_the_road(recording, lens, np.array(path_m), int(stream.timestamp_us[frame]))
        assert len(points) > 5
        assert np.median(changed[points[:, 1], points[:, 0]]) > 60
        assert (picture[points[:, 1], points[:, 0]].mean(axis=0)[[0, 2]] @ [1, -1]) > 60  # yellow: more red than blue
        assert np.median(changed[40:]) < 6  # below the camera's name


def steps_of(line: dict) -> list[tuple[int, list]]:
    """(instant, plan) of each step of an answer."""
    return [(line["start_us"] + 200_000 * (number + 1), path) for number, path in enumerate(line["values"]["xy_m"])]


def test_the_plan_is_drawn_on_the_road(made, tmp_path):
    check_drawn(made, ask(made, tmp_path, ROUTES[0], stride=8), SMALL)


@real_data
@pytest.mark.real_data
def test_the_plan_is_drawn_on_the_real_road(made_of_reality, tmp_path):
    clip = ask(made_of_reality, tmp_path, REAL_ID, stride=100)
    assert clip["windows"] == 3
    check_drawn(made_of_reality, clip, QCAMERA)


@pytest.mark.parametrize("dropped", [(), (0,), (2,), (1, 3, 4)])
@pytest.mark.parametrize(("frames", "stride"), [(5, 1), (5, 2), (5, 4), (5, 5), (5, 9), (2, 1), (26, 7)])
def test_of_overlapping_windows_the_one_with_the_longest_memory_speaks(frames, stride, dropped):
    recipe, spoken = tiny_student(sample={"window": frames}), dict[int, int]()
    starts = [number * stride for number in range(6) if number not in dropped]
    for start in starts:
        for at in recipe.speaks_for(np.arange(start, start + frames), spoken.keys()):
            assert spoken.setdefault(start + at, start) == start  # each instant once
    for instant in range(5 * stride + frames):
        those = [start for start in starts if start < instant < start + frames]
        assert spoken.get(instant) == (those[0] if those else None)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_after_a_gap_of_the_camera_every_planned_instant_is_shown_and_the_leap_is_said(made, tmp_path, capsys, stride):
    """The second half of the pictures was exposed a second later."""
    whole = open_source("openpilot", made.data / "raw" / "openpilot").open(ROUTES[0], ("qcamera",))
    stream = whole.cameras["qcamera"]
    times_us = stream.timestamp_us + 1_000_000 * (np.arange(len(stream.timestamp_us)) >= len(stream.timestamp_us) // 2)
    torn = replace(whole, speed=None, cameras={"qcamera": replace(stream, timestamp_us=times_us)})
    preprocess = made.recipe.preprocess()
    plan = plan_cameras(torn, ("qcamera",), preprocess, stride=stride, max_age_us=100_000)
    planned_us = np.unique([window.instants_us[1:] for window in plan.windows])
    skipped_s = (np.diff(planned_us) - 200_000).sum() / 1e6
    built = made.recipe.load(preprocess, made.run.final)
    request = InferRequest(out=tmp_path, overlay=True, stride=stride)
    clip = Asker(made.recipe, built, preprocess, request, Console()).ask(Clip("torn", lambda: torn))
    assert probe(Path(clip["overlay"]).read_bytes(), "overlay").num_frames == len(planned_us)
    assert clip["dropped"] == plan.dropped
    ((reason, count),) = plan.dropped.items()
    said = capsys.readouterr().err
    assert f"torn: left out {count} windows: {reason}\n" in said
    assert f"overlay {clip['overlay']}; it leaps over {skipped_s:.1f} s that no answer speaks for\n" in said
    assert skipped_s > 1


def test_a_caption_tells_where_the_car_is_in_two_seconds():
    caption, plain = tiny_student().caption, tiny_student().plain
    xy_m = np.stack([np.stack([speed * T_IDXS_S, side * T_IDXS_S], axis=1) for speed, side in ((10, 0.5), (20, -1))])
    assert caption({"xy_m": xy_m}, 1) == "in 2 s 20.0 m ahead, 1.0 m right"
    assert caption({"xy_m": xy_m}, 2) == caption({"xy_m": xy_m}) == "in 2 s 40.0 m ahead, 2.0 m left"
    assert caption(None) == "no plan"
    xy_m[1, 10:] = np.nan
    assert caption({"xy_m": xy_m}, 2) == "unknown: the log ends before"
    told = plain({"xy_m": xy_m, "is_truth": True})
    assert list(told) == ["xy_m"]
    assert told["xy_m"][1][10] == [None, None]
    assert told["xy_m"][0][-1] == [100.0, 5.0]
    json.dumps(told, allow_nan=False)


def test_answers_have_the_path_truly_driven_beside_them(made, tmp_path):
    clip = ask(made, tmp_path, ROUTES[1])
    recording = open_source("openpilot", made.data / "raw" / "openpilot").open(ROUTES[1], ("qcamera",))
    last_us = min(recording.speed.timestamp_us[-1], recording.device.yaw_rate.timestamp_us[-1])
    for line in clip["answers"]:
        truth = np.array(line["truth"]["xy_m"], dtype=float)
        for step, (instant_us, _) in enumerate(steps_of(line)):
            known = np.isfinite(truth[step]).all(axis=1)
            assert known.sum() == pytest.approx((instant_us + T_IDXS_S * 1e6 <= last_us).sum(), abs=1)
            assert truth[step, known.sum() - 1, 0] > 0
            assert (truth[step, known, 1] <= 0).all()  # it turns left


# -- the real segment


@real_data
@pytest.mark.real_data
def test_the_real_segment_is_learned_from_and_measured(made_of_reality):
    """Two steps teach nothing; what needs no learning is as good as the facts say."""
    report = evaluate(made_of_reality.recipe, made_of_reality.run, EvalRequest(), QUIET)
    rows = {row["name"]: row for row in report["conditions"]}
    assert report["split_rule"] == "time"
    assert 0 < rows["constant velocity"]["ade_1s"] < 0.3
    assert 0 < rows["constant curvature"]["ade_2s"] < 1
    assert rows["model"]["ade_5s"] > rows["constant velocity"]["ade_5s"]
    assert rows["trained blind"]["ade_5s"] > 0


@real_data
@pytest.mark.real_data
def test_the_real_cars_own_model_teaches(real_segment, tmp_path):
    """A qlog keeps one modelV2 in 40: the steps that end with those frames learn, and are about where the car went."""
    sample = {"window": 11, "stride": 20, "teacher": "log"}
    recipe = tiny_student(cameras="qcamera", sample=sample, split=BY_TIME, train={"batch_size": 4})
    made = make_run(tmp_path, recipe, data=real_segment)
    report = evaluate(recipe, made.run, EvalRequest(blind=False), QUIET)
    rows = {row["name"]: row for row in report["conditions"]}
    assert rows["teacher"]["ade_2s"] is None  # it does not speak at every step of any window
    assert rows["teacher"]["ade_2s_taught"] < 2
    assert rows["teacher"]["lane_l1"] == 0 < rows["model"]["lane_l1"]
    apart = rows["model"]["ade_2s_taught"] - rows["model"]["teacher_ade_2s"]
    assert rows["teacher"]["teacher_ade_2s"] == 0 < abs(apart) < rows["teacher"]["ade_2s_taught"]


def test_training_says_which_layers_no_adapter_sits_on_and_what_it_sits_on(made, tmp_path, capsys):
    recipe = tiny_student("convnextv2", cameras="qcamera", mode="dora")
    request = TrainRequest(made.shards, made.data, tmp_path, "r", "test")
    left_out, base = train(recipe, replace(request, dry_run=True), QUIET)["notes"]
    assert left_out.startswith("no adapter sits on ")
    assert base.startswith("the base never learned to drive")
    train(recipe, request, Console())
    said = capsys.readouterr().err.splitlines()
    assert (said.count(left_out), said.count(base)) == (1, 1)


# -- bad input, as a user meets it


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, where no earlier work is found."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMNI_DATA", "OMNI_RUNS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def said_by(line: str, capsys) -> tuple[int, str]:
    """The exit code and the one line of an error."""
    code = omni(line.split())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (error,) = [one for one in captured.err.splitlines() if one.startswith("error: ")]
    assert captured.err.endswith(f"{error}\n")
    return code, error.removeprefix("error: ")


ETL = "etl --recipe distill --profile cpu-tiny --quiet --workers 0 --window 5 --out shards"
REFUSED = "1 of 1 recording refused, more than the 20% allowed; the first is "
RAW = "data/raw/openpilot/"
SEGMENT = f"{RAW}{made_of.DONGLE}/00000000--0696c823fa--0"


def uncalibrated(folder: Path) -> None:
    (folder / "qlog").write_bytes(made_of.events(80))


def truncated(folder: Path) -> None:
    """All but the first events, which come before any of the car."""
    (folder / "qlog").write_bytes((folder / "qlog").read_bytes()[:3000])


def whole(folder: Path) -> None:
    """Nothing is wrong with it."""


@pytest.mark.parametrize(
    ("damage", "options", "code", "message"),
    [
        (
            uncalibrated,
            "",
            3,
            f"{REFUSED}{ROUTES[0]}: qcamera has no calibration, which a driving model's view is warped "
            "with; none: the log holds no roadCameraState, which names the sensor: name a recording of a calibrated",
        ),
        (whole, "--cameras qcamera,ecamera", 3, f"{REFUSED}{ROUTES[0]}: has no ecamera; it has qcamera;"),
        (whole, "--cameras fcamera,ecamera", 3, f"{REFUSED}{ROUTES[0]}: has no fcamera; it has qcamera;"),
        (truncated, "", 3, f"{REFUSED}{ROUTES[0]}: RAW/{SEGMENT[len(RAW) :]}/qlog: holds 0 valid carState events, at"),
        (whole, "--cameras qcamra", 2, "no camera 'qcamra' in openpilot data; did you mean 'qcamera'?"),
        (whole, "--cameras a,b,c", 2, "cameras 'a,b,c': expected the road camera, or the road and the wide one"),
        (whole, "--set sample.teacher=lgo", 2, "--set: sample.teacher = 'lgo': no such teacher; did you mean 'log'?"),
        (whole, "--rate-hz 10", 2, "--rate-hz: sample.rate_hz = 10.0: input should be less than or equal to 5"),
        (whole, "--canvas 112", 2, "--canvas: unknown key sample.canvas_px;"),
        (whole, "--window 60", 3, f"{REFUSED}{ROUTES[0]}: no window of 60 frames; "),
    ],
)
def test_an_etl_that_cannot_be_is_one_line(place, made, capsys, *, damage, options, code, message):
    shutil.copytree(made.data / SEGMENT.removeprefix("data/"), place / SEGMENT)
    damage(place / SEGMENT)
    found, said = said_by(f"{ETL} {options}", capsys)
    assert (found, said[: len(message)]) == (code, message)
    assert not (place / "shards" / "manifest.json").exists()


def test_a_log_whose_tail_is_missing_is_read_up_to_there(place, made):
    """It is cut after the car's speed; the device's mount and turns come later in this file, and are lost."""
    shutil.copytree(made.data / "raw", place / "data" / "raw")
    log = place / SEGMENT / "qlog"
    content = log.read_bytes()
    log.write_bytes(content[:-1000])
    assert omni(ETL.split()) == 0
    assert len(open_shards(place / "shards").manifest.recordings) == 2


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (
            "infer VIDEO --run RUN",
            2,
            "VIDEO: recipe distill takes no plain videos; give it the id of a recording, whose calibration it looks th",
        ),
        (
            "infer VIDEO --run RUN --tiled",
            2,
            "--tiled: recipe distill takes no plain videos; give it the id of a recording, whose calibration it looks",
        ),
        ("infer 0123 --run RUN", 2, "no video file 0123, and no recording of that id under data"),
        ("infer ROUTE --run RUN --stride 0", 2, "Invalid value for '--stride'"),
        ("export RUN --format hf", 2, "--format hf: recipe distill is exported as onnx"),
        ("export RUN --opset 17", 2, "--opset 17: expected 18 to "),
        ("merge RUN", 2, "run run was tuned in full: nothing to merge, its weights are whole; use: omni export"),
        (
            "eval RUN --shards VLM",
            2,
            "shards VLM were made for recipe vlm; make others with: omni etl --recipe distill",
        ),
        ("train --profile cpu-tiny --shards VLM --set hypotheses=2", 2, "--set: unknown key hypotheses;"),
    ],
)
def test_what_a_student_cannot_do_is_one_line(place, made, vlm_shards, capsys, *, line, code, message):
    video = place / "plain.mp4"
    video.write_bytes((made.data / SEGMENT.removeprefix("data/") / "qcamera.ts").read_bytes())
    places = {"VIDEO": video, "RUN": made.run.folder, "VLM": vlm_shards, "ROUTE": ROUTES[0]}
    words = [str(places.get(word, word)) for word in line.split()]
    found, said = said_by(" ".join([*words, "--quiet"]), capsys)
    expected = message.replace("VLM", str(vlm_shards)).replace("VIDEO", str(video))
    assert (found, said[: len(expected)]) == (code, expected)


@pytest.fixture(scope="module")
def vlm_shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("vlm")
    write_drives(data, seconds=2.5)
    return Path(etl(tiny_recipe(cameras="1-cam"), EtlRequest(data=data, workers=0), QUIET)["shards"])


def test_shards_of_one_recipe_do_not_train_another(made, vlm_shards, tmp_path):
    for recipe, shards, message in (
        (
            tiny_student(),
            vlm_shards,
            "were made for recipe vlm; make others with: omni etl --recipe distill --profile t",
        ),
        (
            tiny_recipe(),
            made.shards,
            "were made for recipe distill; make others with: omni etl --recipe vlm --profile t",
        ),
        (
            tiny_student(),
            made.shards,
            f"have cameras qcamera, this recipe asks for {FRONT}; make fitting ones: omni etl",
        ),
        (
            tiny_student(cameras="qcamera", sample={"teacher": "log"}),
            made.shards,
            "have teacher motion, this recipe asks for log; make fitting ones: omni etl --recipe distill --profile t ",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe, TrainRequest(shards, tmp_path, tmp_path, "r", "t"), QUIET)
    assert list(tmp_path.iterdir()) == []
