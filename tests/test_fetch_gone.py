"""A folder holds a commit that the hub has no more: one line says so, and its commands work as they stand."""

import re
import shlex

import pytest

from omni_cli import files
from omni_cli.__main__ import run as omni
from omni_cli.errors import UsageError
from omni_cli.report import Console
from omni_cli.stages.fetch import fetch
from tests.support import pai
from tests.support.clips import FAR, ask, folder_of, get
from tests.support.folders import tree

NEW = "d" * 40


@pytest.fixture
def gone(hub, tmp_path, monkeypatch):
    """A folder with a chunk of a commit that was replaced upstream since."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    get(data, chunks="0-0")
    old, hub.commit = hub.commit, NEW
    return data, old


@pytest.mark.fault("F9")
@pytest.mark.parametrize("asked", [{}, {"dry_run": True}, {"revision": "OLD"}])
def test_one_line_says_what_happened_and_what_to_do(hub, gone, asked):
    data, old = gone
    before = tree(data)
    words = " ".join(["--chunks", "0-1", "--cameras", ",".join(pai.CAMERAS), "--data"])
    asked = {name: old if value == "OLD" else value for name, value in asked.items()}
    with pytest.raises(UsageError) as raised:
        get(data, chunks="0-1", **asked)
    host = hub.endpoint.removeprefix("http://")
    assert str(raised.value) == (
        f"{folder_of(data)} holds revision {old}, which {host} has no more: what is there stays good, and nothing can "
        f"be added; fetch the newest revision beside it: omni fetch {words} {data}-new; or delete all copies of "
        f"the old one, shards too, and begin anew: omni fetch --purge --data {data} && omni fetch {words} {data}"
    )
    assert tree(data) == before


def test_its_commands_work(hub, gone):
    data, _ = gone
    with pytest.raises(UsageError) as raised:
        fetch(ask(data.relative_to(data.parent), FAR[0], FAR[1], workers=2), Console(quiet=True))
    beside, anew = re.findall(r": (omni fetch .*?)(?:;|$)", str(raised.value))
    for command in (beside, *anew.split(" && ")):
        assert omni(shlex.split(command)[1:]) == 0
    for folder in (data.with_name("data-new"), data):
        assert files.read_json(folder_of(folder) / "revision.json")["revision"] == NEW
        assert pai.zip_path(folder_of(folder), pai.FRONT, 1).exists()


def test_what_is_all_there_needs_no_hub(gone):
    data, old = gone
    assert get(data, chunks="0-0")["revision"] == old


def test_a_slip_in_an_empty_folder_is_told_as_one(hub, tmp_path):
    with pytest.raises(UsageError, match="has no such revision; give a branch, tag or commit with --revision"):
        get(tmp_path, chunks="0-0", revision="e" * 40)
