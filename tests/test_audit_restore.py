"""`omni audit --restore`: what was set aside comes back, never over what was made anew, whatever kills it when."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from typer.testing import CliRunner

from omni_cli import files
from omni_cli.commands import app
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.report import Console
from omni_cli.sources.quarantine import (
    QUARANTINE_FILE,
    QUARANTINE_FOLDER,
    move_to_quarantine,
    read_quarantine,
    restore,
    write_quarantine,
)
from omni_cli.stages.audit import AuditRequest, audit, restore_all
from omni_cli.stages.fetch import fetch
from tests.support import pai
from tests.support.clips import CLIPS, FRONT, ask, folder_of, get, zip_of
from tests.support.folders import tree
from tests.support.injection import count_calls, needs_strace, run_traced

NAME = pai.FEATURES[FRONT].chunk_path(0)
QUIET = Console(quiet=True)


@pytest.fixture
def data(hub, tmp_path):
    get(tmp_path / "data", chunks="0-0", clips=())
    return tmp_path / "data"


def damage(data):
    path = zip_of(data)
    content = bytearray(path.read_bytes())
    content[-400:-300] = bytes(100)
    path.write_bytes(content[:-50])


def quarantined(data):
    """Set a torn chunk aside, and list a recording of another reason; return what everything was before."""
    damage(data)
    before = state(data)
    audit(AuditRequest(folder_of(data), quarantine=True), QUIET)
    write_quarantine(folder_of(data), {CLIPS[0]: "its driver sneezed"})
    assert not zip_of(data).exists()
    return before


def state(data):
    ours = (QUARANTINE_FILE, QUARANTINE_FOLDER, ".lock")
    return {name: value for name, value in tree(folder_of(data)).items() if not name.startswith(ours)}


def test_what_was_set_aside_is_put_back_named_and_used_again(data, capsys):
    before = quarantined(data)
    folder = str(folder_of(data))
    assert set(read_quarantine(folder_of(data))) == set(CLIPS)
    result = restore_all(data, Console())
    said = capsys.readouterr().err
    assert result["restored"] == {folder: [NAME]}
    assert result["released"] == {folder: [CLIPS[0]]}
    assert result["kept"] == {folder: {}}
    assert f"put back {folder_of(data) / NAME}" in said
    assert f"recording {CLIPS[0]}" in said
    assert state(data) == before
    assert read_quarantine(folder_of(data)) == {}
    again = restore_all(data, Console())
    assert (again["restored"], again["released"]) == ({folder: []}, {folder: []})
    assert "nothing to put back" in capsys.readouterr().err
    assert audit(AuditRequest(folder_of(data)), QUIET)["refused"] >= len(CLIPS)  # as it was before
    get(data, chunks="0-0", clips=())  # and fetch mends it
    assert audit(AuditRequest(folder_of(data)), QUIET)["refused"] == 0


def test_what_was_made_anew_stays_as_it_is(data, capsys):
    whole = zip_of(data).read_bytes()
    quarantined(data)
    get(data, chunks="0-0", clips=())
    fetched = state(data)
    aside = tree(folder_of(data) / QUARANTINE_FOLDER)
    result = restore_all(folder_of(data), Console())
    assert result["restored"] == {str(folder_of(data)): []}
    assert "made anew since; the old one stays in quarantine/" in result["kept"][str(folder_of(data))][NAME]
    assert f"warning: {folder_of(data) / NAME}: it was made anew since" in capsys.readouterr().err.replace("\n", " ")
    assert zip_of(data).read_bytes() == whole
    assert (state(data), tree(folder_of(data) / QUARANTINE_FOLDER)) == (fetched, aside)


def test_moved_aside_twice_the_newer_one_comes_back(tmp_path):
    for content in ("old", "new"):
        files.write_text(tmp_path / "a" / "b.zip", content)
        files.write_receipt(tmp_path / "a" / "b.zip")
        move_to_quarantine(tmp_path, "a/b.zip", "torn", ["x"])
    assert restore(tmp_path).put_back == ["a/b.zip"]
    assert (tmp_path / "a" / "b.zip").read_text() == "new"
    assert files.verified_receipt(tmp_path / "a" / "b.zip") is not None
    assert (tmp_path / QUARANTINE_FOLDER / "a" / "b.zip").read_text() == "old"
    assert restore(tmp_path).put_back == []
    assert (tmp_path / "a" / "b.zip").read_text() == "new"


def test_a_list_of_before_restore_was_there_is_understood(tmp_path):
    files.write_text(tmp_path / QUARANTINE_FOLDER / "b.zip", "old")
    files.write_json(
        tmp_path / QUARANTINE_FILE, {"recordings": {}, "moved": {"b.zip": {"reason": "torn", "recordings": []}}}
    )
    assert restore(tmp_path).put_back == ["b.zip"]
    assert (tmp_path / "b.zip").read_text() == "old"


def test_what_is_nowhere_stays_barred(tmp_path):
    files.write_text(tmp_path / "b.zip", "old")
    move_to_quarantine(tmp_path, "b.zip", "torn", ["x"])
    shutil.rmtree(tmp_path / QUARANTINE_FOLDER)
    assert restore(tmp_path).kept == {"b.zip": "neither in its place nor in quarantine; fetch it, or make it, again"}
    assert list(read_quarantine(tmp_path)) == ["x"]


@pytest.mark.fault("F14")
@pytest.mark.parametrize("name", ["../b.zip", "/etc/b.zip", "a/../../b.zip", ""])
@pytest.mark.parametrize("where", ["name", "place"])
def test_a_list_that_leads_out_of_its_folder_is_refused(tmp_path, name, where):
    moved = {name: {"reason": "", "recordings": []}}
    if where == "place":
        moved = {"b.zip": {"reason": "", "recordings": [], "place": name}}
    files.write_json(tmp_path / "in" / QUARANTINE_FILE, {"recordings": {}, "moved": moved})
    files.write_text(tmp_path / "b.zip", "another's")
    with pytest.raises(DataError, match="not a quarantine list"):
        restore(tmp_path / "in")
    assert (tmp_path / "b.zip").read_text() == "another's"


@pytest.mark.fault("F10")
def test_it_waits_for_no_fetch_and_is_refused_beside_one(data):
    quarantined(data)
    with ask(data).held(shared=True), pytest.raises(OmniError, match="another omni is working on"):
        restore_all(data, QUIET)
    assert restore_all(data, QUIET)["restored"] == {str(folder_of(data)): [NAME]}


def test_it_is_asked_for_alone_and_of_a_folder(tmp_path):
    with pytest.raises(UsageError, match="--restore audits nothing: leave out"):
        restore_all(tmp_path, QUIET, is_choosy=True)
    with pytest.raises(UsageError, match="no folder"):
        restore_all(tmp_path / "away", QUIET)


def test_the_command_ends_with_one_document(data):
    quarantined(data)
    result = CliRunner().invoke(app, ["audit", str(data), "--restore", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["restored"] == {str(folder_of(data)): [NAME]}


def small(folder):
    """Two chunks' files set aside, and a recording listed."""
    random = np.random.default_rng(3)
    for name in ("a/b.zip", "a/c.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.bytes(100))
        files.write_receipt(folder / name, partial=True, clips=["x"])
    before = tree(folder)
    for name in ("a/b.zip", "a/c.parquet"):
        move_to_quarantine(folder, name, "torn", ["x"])
    write_quarantine(folder, {"y": "bad"})
    return before


@needs_strace
@pytest.mark.fault("F1", "F3", "F4")
def test_killed_or_failed_at_any_call_the_next_restore_finishes(tmp_path):
    before = small(tmp_path / "pattern")
    shutil.copytree(tmp_path / "pattern", tmp_path / "counted")
    calls = count_calls(partial(restore, tmp_path / "counted"), tmp_path / "log")
    rules = [
        (call, fault, number)
        for call in ("rename", "fsync", "write", "openat")
        for number in range(1, calls[call] + 1)
        for fault in (("signal=SIGKILL",) if call == "openat" else ("signal=SIGKILL", "error=EIO"))
    ]
    assert len(rules) > 20
    for call, fault, number in rules:
        folder = tmp_path / f"{call}-{fault}-{number}"
        shutil.copytree(tmp_path / "pattern", folder)
        assert run_traced(partial(restore, folder), f"inject={call}:{fault}:when={number}") != 0
        for name in ("a/b.zip", "a/c.parquet"):  # a part without its receipt would pass for a whole chunk
            assert not (folder / name).exists() or files.receipt_path(folder / name).exists()
            assert (folder / name).exists() or "x" in read_quarantine(folder)
        restore(folder)
        ours = (QUARANTINE_FILE, QUARANTINE_FOLDER)
        found = {name: value for name, value in tree(folder).items() if not name.startswith(ours)}
        assert found == before
        assert read_quarantine(folder) == {}
        shutil.rmtree(folder)


def test_fetch_takes_what_is_back_and_whole_for_done(data, hub):
    move_to_quarantine(folder_of(data), NAME, "looked odd", CLIPS)
    restore_all(data, QUIET)
    hub.log.clear()
    assert fetch(ask(data, chunks="0-0", clips=()), QUIET)["fetched"] == 0
    assert hub.log == []
