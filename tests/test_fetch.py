"""`omni fetch` of chunks from a loopback hub: whole, verified, and only once."""

import itertools
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.report import Console
from omni_cli.stages.fetch import fetch
from tests.support import pai
from tests.support.chunks import BIG, TOKEN, ask, contents, expected, get, write_repository
from tests.support.fetch_once import start
from tests.support.hub import Fault, serve_hub


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(repository, monkeypatch):
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_chunks_arrive_whole_once_and_named_where_absent(hub, repository, tmp_path):
    result = get(tmp_path)
    folder = tmp_path / "raw" / "physical_ai_av"
    assert contents(folder) == expected(repository, (0, 1))
    assert all(files.verified_receipt(Path(path)) for path in result["paths"])
    assert result["absent"] == [FEATURES["vehicle_dimensions"].chunk_path(chunk) for chunk in (0, 1)]
    assert files.read_json(folder / "revision.json")["revision"] == hub.commit == result["revision"]
    assert not (folder / ".fetch").exists()
    assert not [entry for entry in hub.log if entry.server == "storage" and entry.had_token]
    sent = hub.sent()
    again = get(tmp_path)
    assert (hub.sent(), again["fetched"], again["skipped"]) == (sent, 0, result["fetched"])
    more = get(tmp_path, chunks="0-2")
    assert more["fetched"] == 6
    assert contents(folder) == expected(repository, (0, 1, 2))


def test_a_clip_that_the_index_does_not_list_is_refused(hub, tmp_path):
    with pytest.raises(UsageError, match=r"no clip 'nobody' in the index of 6"):
        get(tmp_path, chunks=None, clips=("nobody",))


@pytest.mark.fault("F1")
def test_killed_and_run_again_it_completes_and_fetches_nothing_twice(hub, repository, tmp_path):
    hub.bytes_per_second = 1_000_000
    folder = tmp_path / "raw" / "physical_ai_av"
    process = start(tmp_path, chunks="3", cameras=BIG, workers=2)
    deadline = time.monotonic() + 60
    while len(list(folder.rglob("camera*.zip.receipt.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = [path.name.removesuffix(files.RECEIPT_SUFFIX) for path in folder.rglob("camera_*.zip.receipt.json")]
    assert 2 <= len(done) < 9
    hub.bytes_per_second = None
    hub.log.clear()
    assert get(tmp_path, chunks="3")["skipped"] >= len(done)
    assert [hub.sent(name) for name in done] == [0] * len(done)
    assert contents(folder) == expected(repository, (0, 1, 2))
    assert not (folder / ".fetch").exists()


@pytest.mark.fault("F7", "F8")
@pytest.mark.parametrize(
    "fault",
    [
        Fault("storage GET", "flip", after=1000),
        Fault("storage GET", "reset", after=200_000),
        Fault("storage GET", "status", status=503),
        Fault("storage GET", "status", status=403),  # an expired signed address
        Fault("hub HEAD .*zip", "status", status=429, headers={"Retry-After": "0"}),
        Fault("hub HEAD .*zip", "status", status=500),
        Fault("hub POST .*paths-info", "status", status=502, times=2),
        Fault("hub GET .*/revision/|hub GET /api/datasets", "status", status=503),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.match.split()[0]}-{fault.match.split()[1][:4]}",
)
def test_what_may_pass_is_tried_again(hub, repository, tmp_path, fault):
    hub.faults.append(fault)
    get(tmp_path, chunks="0-0")
    assert fault.times == 0
    assert contents(tmp_path / "raw" / "physical_ai_av") == expected(repository, (0,))


@pytest.mark.fault("F7")
def test_a_file_that_stays_wrong_is_named_and_the_others_are_kept(hub, repository, tmp_path):
    bad = FEATURES[BIG[1]].chunk_path(0)
    hub.faults.append(Fault(hub.stored[bad].sha256, "flip", after=5, times=3))
    with pytest.raises(OmniError, match=rf"1 of \d+ files failed.*{bad}.*differs from the hub's hash"):
        get(tmp_path, chunks="0-0")
    folder = tmp_path / "raw" / "physical_ai_av"
    assert not (folder / bad).exists()
    assert get(tmp_path, chunks="0-0")["fetched"] == 1
    assert contents(folder) == expected(repository, (0,))


@pytest.mark.parametrize("damage", ["flip", "truncate", "no receipt", "touched"])
def test_a_damaged_file_comes_again_and_a_whole_one_is_adopted(hub, repository, tmp_path, damage):
    get(tmp_path, chunks="0-0")
    path = tmp_path / "raw" / "physical_ai_av" / FEATURES[BIG[0]].chunk_path(0)
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "truncate":
            path.write_bytes(content[:-1])
        case "no receipt":
            files.receipt_path(path).unlink()
        case "touched":
            os.utime(path)
    again = get(tmp_path, chunks="0-0")
    assert again["fetched"] == (damage in ("flip", "truncate"))
    assert contents(tmp_path / "raw" / "physical_ai_av") == expected(repository, (0,))
    assert files.verified_receipt(path)


def test_access_errors_are_one_line_with_a_remedy_and_no_token(hub, tmp_path, monkeypatch):
    hub.token = "another"
    with pytest.raises(
        OmniError, match=r"401 for .*the token was refused, it is expired, revoked or mistyped; .*hf auth login"
    ) as error:
        get(tmp_path)
    assert TOKEN not in str(error.value)
    hub.token, hub.accepted = TOKEN, False
    with pytest.raises(
        OmniError, match=r"403 for .*has not accepted the dataset's terms; accept them at https://"
    ) as error:
        get(tmp_path)
    assert TOKEN not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OmniError, match=r"401 for .*no token was found"):
        get(tmp_path)
    hub.accepted = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get(tmp_path)["fetched"] > 0


@pytest.mark.fault("F9")
def test_a_chunk_that_was_pruned_upstream_is_named_and_counted(hub, tmp_path):
    pruned = FEATURES[BIG[2]].chunk_path(1)
    hub.pruned.add(pruned)
    result = get(tmp_path)
    assert pruned in result["absent"]
    assert str(tmp_path / "raw" / "physical_ai_av" / pruned) not in result["paths"]


def test_a_dry_run_names_bytes_and_touches_nothing(hub, repository, tmp_path, capsys):
    result = fetch(ask(tmp_path / "data", dry_run=True), Console())
    assert not (tmp_path / "data").exists()
    assert result["fetched_bytes"] == sum(hub.stored[path].size for path in expected(repository, (0, 1)))
    assert f"would fetch {FEATURES[BIG[0]].chunk_path(0)}  0.6 MB" in capsys.readouterr().err
    assert hub.sent("zip") == 0
    get(tmp_path / "data", chunks="0-0")
    before = contents(tmp_path)
    assert get(tmp_path / "data", dry_run=True)["fetched"] == 3 + 3
    assert contents(tmp_path) == before


def test_too_much_for_the_disk_or_for_the_user_is_refused_before_it_starts(hub, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"the plan is 0\.004 GB and --max-gb allows 0\.001; .*--max-gb 1"):
        get(tmp_path, max_gb=0.001)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(OmniError, match=r"GB are needed and 0\.0 GB are free; free space"):
        get(tmp_path)
    assert hub.sent("zip") == 0


@pytest.mark.fault("F9")
def test_two_revisions_never_mix(hub, tmp_path):
    get(tmp_path, chunks="0-0")
    old, hub.commit = hub.commit, "b" * 40
    with pytest.raises(UsageError, match=rf"holds revision {old} and {'b' * 40} was asked for.*another --data"):
        get(tmp_path, chunks="0-0", revision="main")
    hub.commit = old
    with pytest.raises(UsageError, match="has no such revision; give a branch, tag or commit"):
        get(tmp_path / "other", revision="25.10")


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    with pytest.raises(OmniError, match=r"cannot reach 127\.0\.0\.1:9 \(ConnectError\).*--from DIR") as error:
        get(tmp_path)
    assert "password" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OmniError, match=r"HF_HUB_OFFLINE is set and nvidia/.* is not here: unset it, or import it"):
        get(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(UsageError, match="HF_ENDPOINT is not an address"):
        get(tmp_path)


@pytest.mark.fault("F31")
@pytest.mark.parametrize("revision", [None, "the commit"])
def test_what_is_there_is_used_without_a_request(hub, repository, tmp_path, monkeypatch, revision):
    get(tmp_path)
    hub.log.clear()
    revision = revision and hub.commit
    assert get(tmp_path, revision=revision)["fetched"] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(tmp_path, revision=revision)["fetched"] == 0
    pai.zip_path(tmp_path / "raw" / "physical_ai_av", BIG[0], 0).unlink()
    with pytest.raises(OmniError, match=r"HF_HUB_OFFLINE is set and camera/.*chunk_0000\.zip is not here"):
        get(tmp_path, revision=revision)
    with pytest.raises(OmniError, match="HF_HUB_OFFLINE is set"):
        get(tmp_path, chunks="0-2", revision=revision)
    assert not hub.log


@pytest.mark.fault("F10")
def test_fetches_of_several_processes_share_a_folder(hub, repository, tmp_path):
    hub.bytes_per_second = 1_000_000
    folder = tmp_path / "raw" / "physical_ai_av"
    processes = [start(tmp_path, chunks=chunks, cameras=BIG, workers=2) for chunks in ("0-1", "1-2")]
    while not hub.sent("camera_"):
        time.sleep(0.01)
    with pytest.raises(OmniError, match="another omni is fetching into"), files.exclusive(folder, "fetching into"):
        pass
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(folder) == expected(repository, (0, 1, 2))
    assert hub.sent(r"\.zip$") == sum(hub.stored[path].size for path in contents(folder) if path.endswith(".zip"))
    assert files.read_json(folder / "manifest.json")["files"].keys() == contents(folder).keys()
    assert not (folder / ".fetch").exists()


@pytest.mark.fault("F12")
def test_a_clock_that_jumps_changes_nothing(hub, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", itertools.cycle([1e9, 3e9, 0.0]).__next__)
    hub.faults.append(Fault("storage GET", "reset", after=200_000))
    get(tmp_path, chunks="0-0")
    folder = tmp_path / "raw" / "physical_ai_av"
    path = pai.zip_path(folder, BIG[0], 0)
    os.utime(path, (4e9, 4e9))
    sent = hub.sent("zip")
    assert get(tmp_path, chunks="0-0")["fetched"] == 0
    assert (hub.sent("zip"), contents(folder)) == (sent, expected(repository, (0,)))
