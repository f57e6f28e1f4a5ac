"""Teachers that are missing, damaged, hostile or of another kind: one line each, before any work is done."""

import base64
import json
import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch

from omni_cli import files
from omni_cli.__main__ import run
from omni_cli.errors import UsageError
from omni_cli.formats.driving_model import SLICES_KEY
from omni_cli.recipes.distill.teaching import identity
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.stages import runs
from omni_cli.stages.train import TrainRequest, train
from tests.support import driving_onnx
from tests.support.driving import FRONT, write_routes
from tests.support.hostile import Hostile
from tests.support.pipeline import QUIET
from tests.support.taught import comma, cut, student_of, write_bright_drives


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return driving_onnx.write_v0_10_3(tmp_path)


@pytest.fixture(scope="module")
def short_drives(tmp_path_factory) -> Path:
    return write_bright_drives(tmp_path_factory.mktemp("short"), clips=1, seconds=8.0)


# -- training needs no file, and takes no other teacher's shards


def test_a_file_that_is_gone_stops_no_training_and_another_teacher_does(short_drives, tmp_path):
    steps = {"max_steps": 2, "log_steps": 1}
    paths = driving_onnx.write_v0_10_3(tmp_path)
    cut(student_of(paths), short_drives, tmp_path / "s")
    cut(student_of(["motion"]), short_drives, tmp_path / "motion")

    def learn(teacher, shards, name="r"):
        request = TrainRequest(tmp_path / shards, short_drives, tmp_path / "runs", name, "test")
        return train(student_of(teacher, **steps), request, QUIET)

    (tmp_path / "other").mkdir()
    other = driving_onnx.write_v0_10_3(tmp_path / "other", seed=7)
    message = rf"s have teacher onnx:\w+, this recipe asks for onnx:\w+; make .*--teacher {re.escape(comma(other))},"
    with pytest.raises(UsageError, match=message):
        learn(other, "s")
    held = identity(comma(paths))
    for path in paths:
        path.unlink()
    learn(paths, "s", "gone")
    learn([held], "s", "named")
    found = runs.open_finished(tmp_path / "runs" / "gone").manifest
    assert (found.preprocess.teacher, found.settings["sample"]["teacher"]) == (held, held)
    with pytest.raises(
        UsageError, match=r"motion have teacher motion, this recipe asks for onnx:\*; make fitting ones"
    ):
        learn(paths, "motion")
    with pytest.raises(UsageError, match=rf"s have teacher {held}, this recipe asks for onnx:0123; make fitting ones"):
        learn(["onnx:0123"], "s")


@pytest.mark.parametrize("moved_at", ["the end", "the start"])
def test_a_run_goes_on_whether_its_teachers_files_have_moved_or_come_back(moved_at, short_drives, tmp_path, capsys):
    """Stopped before its last step, it is the same run: its teacher is the shards', whatever lies on this disk."""
    paths = driving_onnx.write_v0_10_3(tmp_path)
    shards = cut(student_of(paths), short_drives, tmp_path / "s")
    gone = tmp_path / "gone"

    def learn(*, here: bool):
        named = paths if here else [gone / path.name for path in paths]
        request = TrainRequest(shards.folder, short_drives, tmp_path / "runs", "r", "test")
        return train(student_of(named, max_steps=2, log_steps=1), request, Console())

    first = moved_at == "the end"
    learn(here=first)
    files.receipt_path(tmp_path / "runs" / "r" / runs.FINAL).unlink()  # as if killed before the weights were published
    capsys.readouterr()
    learn(here=not first)
    said = capsys.readouterr().err
    assert ("are not as asked (sample.teacher: onnx:* -> onnx:" in said) == first
    assert "2 steps, loss" in said
    assert learn(here=first)["steps"] == 2
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_the_etl_command_of_a_refusal_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    write_routes(tmp_path / "data", count=160)
    (tmp_path / "my models").mkdir()
    paths = [path.relative_to(tmp_path) for path in driving_onnx.write_v0_10_3(tmp_path / "my models")]
    assert run(["etl", "--recipe", "distill", "--profile", "cpu-tiny", "--workers", "0", "--quiet"]) == 0
    training = ["train", "--profile", "cpu-tiny", "--set", f"sample.teacher={comma(paths)}", "--dry-run", "--json"]
    request = ["train", "--profile", "cpu-tiny", "--set", f"sample.teacher={comma(paths)}"]
    capsys.readouterr()
    assert run(request) == 2
    printed = re.search(r"make fitting ones: omni (etl .*), or name others", capsys.readouterr().err)
    assert run([*shlex.split(printed[1]), "--workers", "0"]) == 0
    assert re.search(r"teacher onnx:\w{16} \(tiny/1, tiny/2\) runs on cpu", capsys.readouterr().err)
    assert run(training) == 0
    chosen = json.loads(capsys.readouterr().out.splitlines()[-1])["shards"]
    assert open_shards(Path(chosen)).manifest.preprocess.teacher == identity(comma(paths))


# -- a wrong file is one line, before any recording is opened


def hostile(folder: Path) -> list[Path]:
    text = base64.b64encode(pickle.dumps({"plan": Hostile(folder / "pwned")})).decode()
    return driving_onnx.write_v0_10_3(folder, metadata={SLICES_KEY: text})


def of_another_generation(folder: Path) -> list[Path]:
    return [driving_onnx.write_vision(folder / "v.onnx", names=("img", "wide_img"))]


def damaged(folder: Path) -> list[Path]:
    (folder / "a.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    return [folder / "a.onnx"]


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        (
            hostile,
            (3, r"driving_vision.onnx: output_slices: a pickle that is refused: it asks for \w+.mkdir; expected"),
        ),
        (
            of_another_generation,
            (3, r"v.onnx: a model of the inputs .*: no driving model that omni knows has them; kno"),
        ),
        (
            lambda folder: driving_onnx.write_v0_10_3(folder)[:1],
            (3, r"found vision; expected the files of one model: "),
        ),
        (
            lambda folder: driving_onnx.write_v0_10_3(folder)[1:],
            (3, r"driving_policy.onnx: found policy; expected the files of one model: "),
        ),
        (damaged, (3, r"a.onnx: ONNX Runtime cannot load it on cpu: .*; expected an ONNX program")),
        (lambda folder: [folder / "gone.onnx"], (2, r"gone.onnx: no such file; expected an ONNX program")),
        (lambda folder: ["onnx:0123"], (2, r"'onnx:0123' says what the files hold, not where they are; etl runs them")),
        (
            lambda folder: ["moton"],
            (2, r"--teacher: sample.teacher = 'moton': no such teacher; did you mean 'motion'\?"),
        ),
        (lambda folder: ["a.onnx", "b.pt"], (2, r"'a.onnx,b.pt': no such teacher; known: log, motion, or give .onnx")),
    ],
)
def test_a_wrong_teacher_is_one_line_before_the_work(files, refusal, short_drives, tmp_path, capsys):
    exit_code, message = refusal
    asked = ["--teacher", comma(files(tmp_path)), "--cameras", FRONT, "--data", str(short_drives)]
    assert (
        run(["etl", "--recipe", "distill", "--profile", "cpu-tiny", "--out", str(tmp_path / "s"), *asked]) == exit_code
    )
    line = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", line)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "pwned").exists()


def test_an_unknown_device_lists_those_that_are_known(pair, short_drives, capsys):
    asked = ["--data", str(short_drives), "--teacher", comma(pair), "--set", "sample.teacher_device=gpu"]
    assert run(["etl", "--recipe", "distill", *asked]) == 2
    assert re.search(r"sample.teacher_device = 'gpu': input should be 'auto', 'cuda', 'tensorrt', 'rocm' or 'cpu'",
                     capsys.readouterr().err)  # fmt: skip
