"""The example in each verb's help works: all of them run as typed, one after the other, in one folder.

Only options that make the work small are added. `omni run` comes last and finds nearly everything done.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from omni_cli.__main__ import run
from omni_cli.commands import VERBS
from omni_cli.stages.demo import driving
from tests.support.drives import write_video

TINY = """
[fetch]
chunks = "2"
clips_per_chunk = 2
seconds = 2.5
fps = 20
size = "96x54"
cameras = "1-cam"

[sample]
cameras = "1-cam"
canvas_px = 56
window = 4
stride = 12

[split]
validation = 0.5

[train]
max_steps = 2
"""
SMALLER = {
    "fetch": "--clips-per-chunk 2 --seconds 2.5 --fps 20 --size 96x54 --cameras 1-cam --workers 2",
    "etl": "--config tiny.toml --workers 0",
    "train": "--config tiny.toml",
    "eval": "--no-blind",
    "demo": "--chunks 4 --base-steps 3 --adapter-steps 3",
    "bench": "--config tiny.toml --repeats 2",
    "run": "--config tiny.toml",
}
# what a user has done before who types the example
BEFORE = {"merge": "train --profile cpu-tiny --config tiny.toml --set tune.mode=lora --run adapter --quiet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples")
    (path / "tiny.toml").write_text(TINY)
    write_video(path / "clip.mp4", camera=0, num_frames=60)
    return path


def result_of_the_example(verb, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OMNI_DATA", raising=False)
    monkeypatch.delenv("OMNI_RUNS", raising=False)
    words = import_module(f"omni_cli.commands.{verb}").EXAMPLE.split()
    assert words[:2] == ["omni", verb]
    assert not (verb in BEFORE and run(BEFORE[verb].split()))
    code = run([*words[1:], *SMALLER.get(verb, "").split(), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)  # stdout holds one document and nothing else
    assert result["schema_version"] == 1
    return result, captured.err


def test_the_demo_of_a_driving_student_goes_the_whole_way(folder, monkeypatch, capsys):
    """With small pictures of short drives; `make storm` runs it as it is."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(driving, "DRIVES", replace(driving.DRIVES, seconds=3.0, width_px=96, height_px=54))
    code = run(["demo", "--recipe", "distill", "--dir", "driving", "--chunks", "2", "--base-steps", "3", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)
    conditions = {one["name"] for one in result["student"]["conditions"]}
    assert conditions == {
        "model",
        "pictures swapped",
        "first frame repeated",
        "constant velocity",
        "constant curvature",
        "constant median",
    }
    assert Path(result["student"]["report"]).is_file()
    programs = {path.name for path in Path(result["exported"]["export"]).glob("*.onnx")}
    assert programs == {"driving_vision.onnx", "driving_policy.onnx"}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "run"])
def test_the_example_works(verb, folder, monkeypatch, capsys):
    result_of_the_example(verb, folder, monkeypatch, capsys)


def test_the_example_of_run_finds_the_work_done(folder, monkeypatch, capsys):
    result, said = result_of_the_example("run", folder, monkeypatch, capsys)
    assert (result["fetch"]["fetched"], result["etl"]["made"]) == (0, 0)
    assert "is finished; nothing to do" in said
    assert {condition["name"] for condition in result["eval"]["conditions"]} >= {"model", "trained blind"}


def train_process(folder, steps):
    command = (
        f"-m omni_cli train --profile cpu-tiny --config tiny.toml --run stopped --json --set train.max_steps={steps}"
    )
    words = [sys.executable, *shlex.split(command), "--set", "train.log_steps=1"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def test_train_stopped_by_sigterm_exits_with_75_and_other_settings_are_refused(folder):
    history = folder / "runs" / "stopped" / "history.jsonl"
    with train_process(folder, steps=2000) as process:
        while process.poll() is None and not (history.is_file() and history.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert re.search(r"^error: stopped at step \d+ of 2000, saved; run the same command again$", said, re.MULTILINE)
    assert json.loads(out)["error"]["kind"] == "Preempted"
    with train_process(folder, steps=3000) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.search(r"^error: .*train\.max_steps: 2000 -> 3000\); use --fresh", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "fetch --source synthetic",
            "the synthetic world is asked for by chunks: omni fetch --source synthetic --chunks 2",
        ),
        ("fetch --source synthetic --chunks 2 --size big", "size big: expected WIDTHxHEIGHT in pixels"),
        ("fetch --source synthetik --chunks 2", "cannot fetch 'synthetik'; did you mean 'synthetic'?"),
        ("fetch --source synthetic --chunks 2 --cameras 5-cam", "unknown camera '5-cam'; did you mean '"),
        ("audit nowhere", "no folder nowhere to audit; get data first"),
        ("etl --profile cpu-tiny", "no data folder data; get some with: omni fetch --source synthetic --chunks 2"),
        ("etl --profile cpu-tiny --shard 3/2", "--shard 3/2: expected I/N"),
        ("train --profile cpu-tiny", "no data folder data; get some with: omni fetch --source synthetic --chunks 2"),
        ("run --profile cpu-tiny --set tune.rnak=3", "--set: unknown key tune.rnak; did you mean 'rank'?"),
        ("train --profile cpu-tiny --config absent.toml", "no config file absent.toml"),
        ("eval", "no finished run in runs; train one with: omni train"),
        (
            "eval nowhere",
            "no run nowhere, neither a folder nor a name in runs; there is none; train one with: omni train",
        ),
        ("run --profile cpu-tiny --config wrong.toml", "wrong.toml: unknown key fecth; known: "),
        ("run --profile cpu-tiny --config table.toml", "table.toml [fetch]: unknown key chunk; did you mean 'chunks'?"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("[fecth]\nchunks = '2'\n")
    (tmp_path / "table.toml").write_text("[fetch]\nchunk = '2'\n")
    assert run(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert not {path.name for path in tmp_path.iterdir()} - {"wrong.toml", "table.toml"}
