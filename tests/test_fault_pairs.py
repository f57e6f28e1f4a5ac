"""Two at once on one folder, and kills, of the verbs that take a model or a folder of data to another state.

Both end with a sane exit code, in one line where one has to refuse; what is left is what one alone leaves.
"""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from omni_cli.files import TEMPORARY_MARK, receipt_path
from omni_cli.stages import runs
from omni_cli.stages.merge import MergeRequest, merge
from tests.support.folders import tree
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic
from tests.support.warm import Warm, WarmProcess

FRONT = "camera_front_wide_120fov"
ROUNDS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of an adapter, and its merged model."""
    folder = tmp_path_factory.mktemp("pairs")
    write_synthetic(folder / "data", cameras=(FRONT,))
    made = make_run(folder, tiny_recipe(cameras="1-cam", mode="lora"), data=folder / "data")
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    return made


@pytest.fixture
def damaged(made, tmp_path) -> Path:
    """Raw data of which one chunk's zip is cut short."""
    shutil.copytree(made.data, tmp_path / "data")
    zips = sorted((tmp_path / "data").rglob("*.zip"))
    zips[0].write_bytes(zips[0].read_bytes()[:1000])
    return tmp_path / "data"


def start(warm: Warm, *words: object) -> WarmProcess:
    return warm.start("omni_cli", *map(str, words), "--quiet")


def ended(process: WarmProcess, *codes: int) -> int:
    """The exit code, which is one of these; an error is one line."""
    code = process.wait()
    assert code in codes, (code, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    assert process.stderr.count("error: ") == (code == 1), process.stderr
    return code


def content(folder: Path) -> dict[str, str]:
    """What was published: all but the page of an audit, which holds the time, and locks."""
    return {name: value for name, value in tree(folder).items() if not name.endswith((".lock", "audit.html"))}


def crumbs(folder: Path) -> list[str]:
    marks = (TEMPORARY_MARK, ".partial", ".discarded")
    return [path.name for path in folder.rglob("*") if any(mark in path.name for mark in marks)]


def exporting(made, out: Path) -> tuple[object, ...]:
    return "export", made.run.folder, "--format", "hf", "--out", out


def merging(made, out: Path) -> tuple[object, ...]:
    return "merge", made.run.folder, "--out", out


@pytest.mark.storm
@pytest.mark.fault("F10")
@pytest.mark.parametrize("verb", [merging, exporting])
def test_two_at_once_publish_one_model(verb, made, warm, tmp_path):
    ended(start(warm, *verb(made, tmp_path / "alone" / "model")), 0)
    whole = content(tmp_path / "alone")
    for number in range(ROUNDS):
        place = tmp_path / f"{number}"
        pair = [start(warm, *verb(made, place / "model"))]
        time.sleep(0.2 * number)
        pair.append(start(warm, *verb(made, place / "model")))
        codes = [ended(process, 0, 1) for process in pair]
        assert 0 in codes
        assert all("another omni" in one.stderr for one, code in zip(pair, codes, strict=True) if code)
        ended(start(warm, *verb(made, place / "model")), 0)
        assert content(place) == whole
        assert crumbs(place) == []


@pytest.mark.storm
@pytest.mark.fault("F1", "F30")
@pytest.mark.parametrize("verb", [merging, exporting])
def test_killed_at_any_moment_a_model_is_published_whole_the_next_time(verb, made, warm, tmp_path):
    started = time.monotonic()
    ended(start(warm, *verb(made, tmp_path / "alone" / "model")), 0)
    longest_s, chance = time.monotonic() - started, random.Random(7)
    whole, place, killed = content(tmp_path / "alone"), tmp_path / "killed", 0
    while killed < 5:
        process = start(warm, *verb(made, place / "model"))
        time.sleep(chance.uniform(0.3, 1.0) * longest_s)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        is_whole = runs.verified_folder(place / "model") is not None
        assert not is_whole or content(place / "model") == content(tmp_path / "alone" / "model")
        if is_whole:
            receipt_path(place / "model").unlink()
    ended(start(warm, *verb(made, place / "model")), 0)
    assert content(place) == whole
    assert crumbs(place) == []


def audited(warm: Warm, data: Path, *options: str) -> WarmProcess:
    return start(warm, "audit", data, "--report", data.parent / "audit.html", *options)


@pytest.mark.storm
@pytest.mark.fault("F10")
@pytest.mark.parametrize("pair", [("", ""), ("--quarantine", "--quarantine"), ("--quarantine", ""), ("--restore", "")])
def test_two_audits_at_once_find_and_leave_what_one_does(pair, damaged, made, warm, tmp_path):
    alone = tmp_path / "alone" / "data"
    shutil.copytree(damaged, alone)
    if "--restore" in pair:
        for data in (damaged, alone):
            ended(audited(warm, data, "--quarantine"), 3, 0)
    for word in dict.fromkeys(pair):
        one = start(warm, "audit", alone, word) if word == "--restore" else audited(warm, alone, *filter(None, [word]))
        ended(one, 0, 1, 3)
    processes = [
        start(warm, "audit", damaged, word) if word == "--restore" else audited(warm, damaged, *filter(None, [word]))
        for word in pair
    ]
    codes = [ended(process, 0, 1, 3) for process in processes]
    assert set(codes) & {0, 3}
    for word in dict.fromkeys(pair):
        last = (
            start(warm, "audit", damaged, word)
            if word == "--restore"
            else audited(warm, damaged, *filter(None, [word]))
        )
        ended(last, 0, 3)
    assert content(damaged) == content(alone)
    assert crumbs(damaged) == []


@pytest.mark.storm
@pytest.mark.fault("F1")
@pytest.mark.parametrize("undo", [False, True])
def test_an_audit_killed_at_any_moment_is_done_the_next_time(undo, damaged, warm, tmp_path):
    before, chance, alone = content(damaged), random.Random(3), tmp_path / "alone" / "data"
    shutil.copytree(damaged, alone)
    started = time.monotonic()
    ended(audited(warm, alone, "--quarantine"), 0, 3)
    longest_s, whole = time.monotonic() - started, content(alone)
    for _ in range(4):
        process = audited(warm, damaged, "--quarantine")
        time.sleep(chance.uniform(0.2, 1.0) * longest_s)
        process.kill()
        process.wait()
        if undo:
            process = start(warm, "audit", damaged, "--restore")
            time.sleep(chance.uniform(0.0, 0.4))
            process.kill()
            process.wait()
    ended(audited(warm, damaged, "--quarantine"), 0, 3)
    assert content(damaged) == whole
    if undo:
        ended(start(warm, "audit", damaged, "--restore"), 0)
        assert {name: one for name, one in content(damaged).items() if "quarantine" not in name} == before
    assert crumbs(damaged.parent) == []


@pytest.mark.storm
@pytest.mark.fault("F10")
def test_a_quarantine_beside_an_etl_takes_nothing_from_under_it(damaged, warm, tmp_path):
    settings = ["--profile", "cpu-tiny", "--cameras", FRONT, "--window", "4", "--workers", "0"]
    out = tmp_path / "shards"
    pair = [start(warm, "etl", *settings, "--data", damaged, "--out", out), audited(warm, damaged, "--quarantine")]
    codes = [process.wait() for process in pair]
    assert codes[0] in (1, 3), pair[0].stderr  # half of the recordings are refused
    assert codes[1] in (0, 1, 3), pair[1].stderr
    assert not [one.stderr for one in pair if "Traceback" in one.stderr]
    ended(audited(warm, damaged, "--quarantine"), 0, 3)
    assert crumbs(damaged) == []
