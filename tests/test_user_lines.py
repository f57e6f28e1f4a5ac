"""The lines that a user types, as typed, in an empty folder; a loopback hub stands for the real one."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from omni_cli.formats.physical_ai_av import CAMERA_SETS, FEATURES
from omni_cli.sources import open_source
from omni_cli.world.clip import SyntheticSpec
from omni_cli.world.dataset import render_clip, write_chunk, write_indices
from tests.support.hub import serve_hub
from tests.support.warm import WarmProcess

TOKEN = "hf_secretSECRETsecret"
CHUNKS = range(5)
FRONT, *OTHERS = CAMERA_SETS["4-cam"]
STEPS = "--set train.max_steps=2"  # of 800: whether it learns is another test's question
OMNI = Path(sys.executable).with_name("omni")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Five chunks of one small clip each, behind a hub that asks for a token."""
    root = tmp_path_factory.mktemp("hub")
    spec = SyntheticSpec(
        clips_per_chunk=1, seconds=2.5, fps=20, width_px=96, height_px=54, cameras=CAMERA_SETS["4-cam"]
    )
    for chunk in CHUNKS:
        write_chunk(root, spec, chunk, [render_clip(spec, chunk, 0)])
    write_indices(root, spec, CHUNKS)
    with serve_hub(root) as hub:
        hub.token = TOKEN
        yield hub


@pytest.fixture(scope="module")
def user(hub, tmp_path_factory):
    """A user's folder in which `omni fetch --chunks 5` has run."""
    folder = tmp_path_factory.mktemp("user")
    done = type_line("omni fetch --chunks 5", folder, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    reader = open_source("physical_ai_av", folder / "data" / "raw" / "physical_ai_av")
    recording = reader.open(reader.recordings()[0].id, (FRONT,))
    (folder / "clip.mp4").write_bytes(recording.cameras[FRONT].videos[0].read())
    return folder


@pytest.fixture(scope="module")
def type_warm(warm):
    """Types a line whose libraries are imported already; `one` and the lines of fetch are run as they are installed."""

    def type_line_warm(line: str, folder: Path) -> WarmProcess:
        process = warm.start("omni_cli", *shlex.split(line)[1:], cwd=folder, environment=inherited())
        process.wait()
        return process

    return type_line_warm


@pytest.fixture(scope="module")
def four(user, type_warm):
    """The lines of DESIGN §7, one after the other: a run that looks at four cameras."""
    for line in ("omni etl --profile cpu-tiny", f"omni train --profile cpu-tiny {STEPS}"):
        done = type_warm(line, user)
        assert done.returncode == 0, done.stderr
    return user


@pytest.fixture(scope="module")
def one(user, tmp_path_factory):
    """Train straight after fetch, on one camera; what it printed."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "data").mkdir()
    (folder / "data" / "raw").symlink_to(user / "data" / "raw")
    (folder / "clip.mp4").symlink_to(user / "clip.mp4")
    done = type_line(f"omni train --profile cpu-tiny --set sample.cameras=1-cam {STEPS}", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def inherited() -> dict[str, str]:
    """The environment of a user who has set nothing for omni."""
    ours = ("OMNI_", "HF_", "HUGGING")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def type_line(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words, given = [str(OMNI), *shlex.split(line)[1:]], inherited() | environment
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, cwd=folder, env=given)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_fetch_brings_every_chunk_and_keeps_the_token_to_itself(user, hub):
    raw = user / "data" / "raw" / "physical_ai_av"
    for chunk in CHUNKS:
        assert all((raw / FEATURES[camera].chunk_path(chunk)).is_file() for camera in CAMERA_SETS["4-cam"])
    texts = [path.read_text() for path in raw.rglob("*.json")]
    assert texts
    assert not any(TOKEN in text for text in texts)
    again = type_line("omni fetch --chunks 5 --json", user, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert json.loads(again.stdout)["fetched"] == 0
    assert TOKEN not in again.stdout + again.stderr


def test_etl_and_train_leave_a_finished_run(four):
    assert (four / "runs" / "vlm-cpu-tiny" / "final.receipt.json").is_file()
    assert len(list((four / "data" / "shards").glob("*/manifest.json"))) == 1


def test_infer_refuses_one_view_for_a_four_camera_run_and_names_the_missing_cameras(four, type_warm):
    done = type_warm("omni infer clip.mp4", four)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"missing {', '.join(OTHERS)}" in said
    assert "--camera NAME=FILE" in said
    assert "Traceback" not in done.stderr


def test_train_straight_after_fetch_makes_its_shards_and_says_so(one):
    folder, said = one
    assert "no shards yet: omni etl comes first, on data/raw/physical_ai_av" in said
    assert len(list((folder / "data" / "shards").iterdir())) == 1


def test_infer_answers_about_a_clip_with_a_one_camera_run(one, type_warm):
    folder, _ = one
    done = type_warm("omni infer clip.mp4 --json", folder)
    assert done.returncode == 0, done.stderr
    (clip,) = json.loads(done.stdout)["clips"]
    assert clip["windows"] == len((folder / clip["file"]).read_text().splitlines()) > 0


def test_train_with_other_cameras_than_the_shards_is_one_line_with_the_right_command(one, type_warm):
    folder, _ = one
    done = type_warm("omni train --profile cpu-tiny", folder)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "asks for camera_" in said
    assert "omni etl --recipe vlm --profile cpu-tiny" in said


@pytest.mark.parametrize("verb", ["etl", "train"])
def test_the_plan_for_another_machine_touches_nothing(user, type_warm, verb):
    before = tree(user)
    done = type_warm(f"omni {verb} --profile mi300x-bf16 --dry-run --json", user)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["dry_run"] is True
    assert len(plan["cameras"]) == 7
    assert "plan" in done.stderr
    assert tree(user) == before
