"""`omni fetch` against a loopback hub, folders and the synthetic world: whole, verified, and only once."""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from omni_cli import files
from omni_cli.__main__ import run
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS, CAMERAS, CLIP_INDEX_FILE, FEATURES
from omni_cli.report import Console
from omni_cli.sources import open_source
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, camera_names, fetch
from omni_cli.stages.fetch.openpilot import segment_place
from omni_cli.stages.fetch.selection import parse_chunks
from omni_cli.stages.pipeline import FetchSettings, fetch_request
from tests.support import pai
from tests.support.hub import Fault, serve_hub

TOKEN = "hf_secretSECRETsecret"
BIG = CAMERAS[:3]
BIG_BYTES = 600_000


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Three chunks: real small tables, and random bytes for the zips of three cameras."""
    root = pai.write_repository(tmp_path_factory.mktemp("repository"), chunks=3)
    random = np.random.default_rng(7)
    for chunk in range(3):
        for camera in BIG:
            path = pai.zip_path(root, camera, chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.bytes(BIG_BYTES + chunk))
    return root


@pytest.fixture
def hub(repository, monkeypatch):
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def ask(data, **options):
    defaults = {"source": "physical_ai_av", "chunks": "2", "cameras": BIG, "workers": 4, "retry_wait_s": 0.01}
    return FetchRequest(data=data, **{**defaults, **options})


def get(data, **options):
    return fetch(ask(data, **options), Console(quiet=True))


def tree(folder):
    """Return every file's hash but those of our own records."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    kept = (
        p
        for p in paths
        if p.name not in ("revision.json", "manifest.json") and not p.name.endswith(files.RECEIPT_SUFFIX)
    )
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def expected(repository, chunks):
    """Return what a fetch of these chunks must leave: the indices, and every file asked for that exists."""
    names = (*BIG, "egomotion", "camera_intrinsics", "sensor_extrinsics", "vehicle_dimensions")
    wanted = {FEATURES[name].chunk_path(chunk) for chunk in chunks for name in names}
    return {path: digest for path, digest in tree(repository).items() if path in wanted or "chunk_" not in path}


def test_chunks_arrive_whole_once_and_named_where_absent(hub, repository, tmp_path):
    result = get(tmp_path)
    folder = tmp_path / "raw" / "physical_ai_av"
    assert tree(folder) == expected(repository, (0, 1))
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
    assert tree(folder) == expected(repository, (0, 1, 2))


def test_a_clip_that_the_index_does_not_list_is_refused(hub, tmp_path):
    with pytest.raises(UsageError, match=r"no clip 'nobody' in the index of 6"):
        get(tmp_path, chunks=None, clips=("nobody",))


FETCH = """
import sys
from pathlib import Path
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, fetch
from omni_cli.formats.physical_ai_av import CAMERAS
request = FetchRequest("physical_ai_av", Path(sys.argv[1]), sys.argv[2], cameras=CAMERAS[:3], workers=2)
fetch(request, Console(quiet=True))
"""


def start(data, chunks):
    return subprocess.Popen([sys.executable, "-c", FETCH, str(data), chunks])


@pytest.mark.fault("F1")
def test_killed_and_run_again_it_completes_and_fetches_nothing_twice(hub, repository, tmp_path):
    hub.bytes_per_second = 1_000_000
    folder = tmp_path / "raw" / "physical_ai_av"
    process = start(tmp_path, "3")
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
    assert tree(folder) == expected(repository, (0, 1, 2))
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
    assert tree(tmp_path / "raw" / "physical_ai_av") == expected(repository, (0,))


@pytest.mark.fault("F7")
def test_a_file_that_stays_wrong_is_named_and_the_others_are_kept(hub, repository, tmp_path):
    bad = FEATURES[BIG[1]].chunk_path(0)
    hub.faults.append(Fault(hub.stored[bad].sha256, "flip", after=5, times=3))
    with pytest.raises(OmniError, match=rf"1 of \d+ files failed.*{bad}.*differs from the hub's hash"):
        get(tmp_path, chunks="0-0")
    folder = tmp_path / "raw" / "physical_ai_av"
    assert not (folder / bad).exists()
    assert get(tmp_path, chunks="0-0")["fetched"] == 1
    assert tree(folder) == expected(repository, (0,))


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
    assert tree(tmp_path / "raw" / "physical_ai_av") == expected(repository, (0,))
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
    before = tree(tmp_path)
    assert get(tmp_path / "data", dry_run=True)["fetched"] == 3 + 3
    assert tree(tmp_path) == before


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
    processes = [start(tmp_path, chunks) for chunks in ("0-1", "1-2")]
    while not hub.sent("camera_"):
        time.sleep(0.01)
    with pytest.raises(OmniError, match="another omni is fetching into"), files.exclusive(folder, "fetching into"):
        pass
    assert [process.wait(60) for process in processes] == [0, 0]
    assert tree(folder) == expected(repository, (0, 1, 2))
    assert hub.sent(r"\.zip$") == sum(hub.stored[path].size for path in tree(folder) if path.endswith(".zip"))
    assert files.read_json(folder / "manifest.json")["files"].keys() == tree(folder).keys()
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
    assert (hub.sent("zip"), tree(folder)) == (sent, expected(repository, (0,)))


def test_requests_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UsageError, match="either --chunks or --clips"):
        get(tmp_path, chunks=None)
    with pytest.raises(UsageError, match=r"cannot fetch 'openpilott'; did you mean 'openpilot'"):
        get(tmp_path, source="openpilott")
    with pytest.raises(UsageError, match="omni fetch --source openpilot --from ROUTES"):
        get(tmp_path, source="openpilot")


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "synthetic").touch()
    assert run(["fetch", "--source", "synthetic", "--chunks", "1", "--data", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.endswith("raw/synthetic: file exists; a folder was expected there; choose another\n")
    assert told.count("\n") == 1
    for seconds in ("nan", "inf"):
        assert run(["fetch", "--source", "synthetic", "--chunks", "1", "--seconds", seconds]) == 2


def test_what_fetches_does_not_import_torch():
    code = "import sys, omni_cli.stages.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_selection():
    known = (0, 1, 3, 4, 7)
    assert parse_chunks("3", known) == (0, 1, 3)
    assert parse_chunks("3-4", known) == (3, 4)
    assert parse_chunks("7,0-1", known) == (0, 1, 7)
    for text in ("9", "0", "0-8", "1-0", "a", "1,,3", "0-2", "1-99999999999"):
        with pytest.raises(UsageError, match=r"--chunks"):
            parse_chunks(text, known)
    assert camera_names("4-cam") == CAMERA_SETS["4-cam"]
    assert camera_names("fcamera", "openpilot") == ("fcamera",)
    assert camera_names(" camera_rear_tele_30fov ,1-cam") == ("camera_rear_tele_30fov", "camera_front_wide_120fov")
    with pytest.raises(UsageError, match="did you mean 'camera_front_wide_120fov'"):
        camera_names("camera_front_wide_120")


def test_a_folder_and_a_hub_cache_are_imported_by_verified_copy(repository, tmp_path):
    commit = "c" * 40
    cache = tmp_path / "cache" / "datasets--nvidia--PhysicalAI-Autonomous-Vehicles"
    (cache / "snapshots" / commit).parent.mkdir(parents=True)
    shutil.copytree(repository, cache / "blobs")
    for path in (p for p in (cache / "blobs").rglob("*") if p.is_file()):
        link = cache / "snapshots" / commit / path.relative_to(cache / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for name, origin in (("folder", repository), ("cache", cache.parent)):
        result = get(tmp_path / name, origin=origin)
        folder = tmp_path / name / "raw" / "physical_ai_av"
        assert tree(folder) == expected(repository, (0, 1))
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert all(files.verified_receipt(Path(path)) for path in result["paths"])
        assert get(tmp_path / name, origin=origin)["fetched"] == 0
    assert result["revision"] == commit
    with pytest.raises(UsageError, match=f"holds revision {commit} and index-"):
        get(tmp_path / "cache", origin=repository)


def test_an_import_follows_no_link_out_of_its_folder(repository, tmp_path):
    origin = shutil.copytree(repository, tmp_path / "origin")
    (tmp_path / "secret").write_text("secret")
    path = origin / FEATURES[BIG[0]].chunk_path(0)
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="a link that leads out of the folder"):
        get(tmp_path, origin=origin)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"empty: found nothing; expected a folder with {CLIP_INDEX_FILE}"):
        get(tmp_path, origin=tmp_path / "empty")


def just_before_the_lock(monkeypatch, another):
    """Let another fetch do all of its work between what the next one reads first and the moment it holds the folder."""
    flock = fcntl.flock

    def interleaved(stream, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        another()
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", interleaved)


def test_two_imports_at_a_time_neither_mix_revisions_nor_copy_twice(repository, tmp_path, monkeypatch):
    origins = [shutil.copytree(repository, tmp_path / (letter * 40)) for letter in ("a", "b")]
    data = tmp_path / "data"
    just_before_the_lock(monkeypatch, lambda: get(data, origin=origins[0], chunks="0-0"))
    with pytest.raises(UsageError, match=rf"holds revision {'a' * 40} and {'b' * 40} was asked for"):
        get(data, origin=origins[1], chunks="1-1")
    assert tree(data / "raw" / "physical_ai_av") == expected(repository, (0,))
    just_before_the_lock(monkeypatch, lambda: get(data, origin=origins[0], chunks="1-1"))
    assert get(data, origin=origins[0], chunks="1-1")["fetched"] == 0


LOGS = ("2023-07-27--13-01-19", "00000008--0696c823fa")
DONGLE = "a2a0ccea32023010"


def test_every_layout_of_routes_lands_in_one(tmp_path):
    origin = tmp_path / "routes"
    places = {
        f"one/{DONGLE}|{LOGS[0]}--0/qcamera.ts": f"{DONGLE}/{LOGS[0]}--0/qcamera.ts",
        f"two/{DONGLE}_{LOGS[0]}--1/fcamera.hevc": f"{DONGLE}/{LOGS[0]}--1/fcamera.hevc",
        f"{DONGLE}/{LOGS[1]}--2/qlog.bz2": f"{DONGLE}/{LOGS[1]}--2/qlog.bz2",
        f"four/{DONGLE}|{LOGS[0]}/3/rlog.zst": f"{DONGLE}/{LOGS[0]}--3/rlog.zst",
        f"realdata/{LOGS[1]}--4/ecamera.hevc": f"unknown/{LOGS[1]}--4/ecamera.hevc",
        f"{DONGLE}_{LOGS[1]}--5--rlog": f"{DONGLE}/{LOGS[1]}--5/rlog",
    }
    others = (f"{DONGLE}|{LOGS[0]}--0/dcamera.hevc", f"{DONGLE}/notes.txt", "preview.png")
    for number, path in enumerate((*places, *others)):
        (origin / path).parent.mkdir(parents=True, exist_ok=True)
        (origin / path).write_bytes(b"content %d" % number)
    result = get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)
    folder = tmp_path / "raw" / "openpilot"
    assert tree(folder) == {place: tree(origin)[path] for path, place in places.items()}
    assert len(result["segments"]) == result["fetched"] == 6
    assert all(files.verified_receipt(Path(path)) for path in result["paths"])
    assert get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)["fetched"] == 0
    changed = origin / next(iter(places))
    changed.write_bytes(b"Content 0")
    assert get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)["fetched"] == 1
    assert segment_place(folder / places[f"realdata/{LOGS[1]}--4/ecamera.hevc"]).parts[0] == "unknown"


def test_routes_that_escape_collide_or_are_none(tmp_path):
    origin = tmp_path / "routes"
    segment = origin / f"{DONGLE}|{LOGS[0]}--0"
    segment.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (segment / "qlog").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"routes: found .*; expected segments like"):
        get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)
    (segment / "qcamera.ts").write_text("one")
    assert get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)["links_not_followed"] == 1
    twin = origin / f"{DONGLE}_{LOGS[0]}--0"
    twin.mkdir()
    (twin / "qcamera.ts").write_text("two")
    with pytest.raises(DataError, match=r"both qcamera.ts of .*--0 and differ; keep one"):
        get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=origin)
    with pytest.raises(DataError, match="nowhere: found no such folder; expected segments"):
        get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=tmp_path / "nowhere")


@pytest.mark.real_data
@pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA is not set")
def test_the_real_route_is_imported_and_opens(tmp_path):
    route = Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"
    result = get(tmp_path, source="openpilot", chunks=None, cameras=(), origin=route)
    assert result["segments"] == ["a2a0ccea32023010/2023-07-27--13-01-19--0"]
    assert [Path(path).name for path in result["paths"]] == ["qcamera.ts", "qlog.bz2"]
    assert len(open_source("openpilot", tmp_path / "raw" / "openpilot").recordings()) == 1


WORLD = SyntheticSpec(seed=3, clips_per_chunk=1, seconds=0.3, fps=10, width_px=64, height_px=36)
SYNTHETIC = {"source": "synthetic", "cameras": CAMERAS[:2], "synthetic": WORLD, "workers": 2}


def test_what_another_process_rendered_meanwhile_is_kept(tmp_path, monkeypatch):
    just_before_the_lock(monkeypatch, lambda: get(tmp_path, chunks="0-0", **SYNTHETIC))
    get(tmp_path, chunks="1-1", **SYNTHETIC)
    folder = tmp_path / "raw" / "synthetic"
    assert sorted(map(int, json.loads((folder / "synthetic.json").read_text())["chunks"])) == [0, 1]
    assert [ref.bundle for ref in open_source("synthetic", folder).recordings()] == ["chunk_0000", "chunk_0001"]
    assert get(tmp_path, chunks="2", **SYNTHETIC)["fetched"] == 0


def test_fetched_again_nothing_is_written_but_what_differs(tmp_path):
    get(tmp_path, chunks="0-0", **SYNTHETIC)
    folder = tmp_path / "raw" / "synthetic"
    index = folder / CLIP_INDEX_FILE
    outdated = {path: path.read_bytes() for path in (index, files.receipt_path(index))}
    get(tmp_path, **SYNTHETIC)
    whole = tree(folder)

    def written():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = written()
    assert get(tmp_path, **SYNTHETIC)["fetched"] == 0
    assert written() == before
    for path, content in outdated.items():  # as a kill between the chunk and the index leaves them
        path.write_bytes(content)
    get(tmp_path, **SYNTHETIC)
    changed = {path.name for path, time_ns in written().items() if before[path] != time_ns} - {"synthetic"}
    assert changed == {"clip_index.parquet", "clip_index.parquet.receipt.json"}
    assert tree(folder) == whole
    assert audit(AuditRequest(folder), Console(quiet=True))["refused"] == 0


def test_the_synthetic_world_is_rendered_once_and_mended(tmp_path):
    options = SYNTHETIC
    result = get(tmp_path, **options)
    folder = tmp_path / "raw" / "synthetic"
    assert (result["chunks"], result["fetched"], result["clips"]) == ([0, 1], 2, 2)
    assert len(open_source("synthetic", folder).recordings()) == 2
    before = tree(folder)
    assert get(tmp_path, **options)["fetched"] == 0
    Path(result["paths"][0]).write_bytes(b"damaged")
    assert get(tmp_path, **options)["fetched"] == 1
    assert tree(folder) == before
    get(tmp_path, **{**options, "chunks": "3-3"})
    assert sorted(map(int, json.loads((folder / "synthetic.json").read_text())["chunks"])) == [0, 1, 3]
    assert len(open_source("synthetic", folder).recordings()) == 3
    record = json.loads((folder / "synthetic.json").read_text())
    del record["spec"]["roads"]  # as it was written before there were winding ones
    (folder / "synthetic.json").write_text(json.dumps(record))
    assert get(tmp_path, **options)["fetched"] == 0
    other = {**options, "synthetic": SyntheticSpec(seed=4, clips_per_chunk=1, seconds=0.3, fps=10)}
    with pytest.raises(UsageError, match=r"another synthetic world \(.*seed: 3 there, 4 asked for.*--data"):
        get(tmp_path, **other)
    assert get(tmp_path / "dry", **options, dry_run=True)["fetched"] == 2
    assert not (tmp_path / "dry").exists()


def test_the_fetch_table_of_omni_run_draws_the_same_world_as_omni_fetch() -> None:
    assert fetch_request(FetchSettings(), Path("d")).synthetic == SyntheticSpec()
    assert fetch_request(FetchSettings(), Path("d")).chunks == "2"
    asked = fetch_request(FetchSettings(rig="b", clutter=0.5, seed=3, size="96x54", roads="winding"), Path("d"))
    assert asked.synthetic == SyntheticSpec(rig="b", clutter=0.5, seed=3, width_px=96, height_px=54, roads="winding")


@pytest.mark.parametrize("source", ["openpilot", "comma2k19"])
@pytest.mark.parametrize("asked", [{"chunks": "2"}, {"clips": ("xxx",)}, {"cameras": ("fcamera",)}])
def test_no_part_is_chosen_of_what_is_imported_whole(tmp_path, source, asked):
    (option,) = asked
    with pytest.raises(UsageError, match=rf"--{option}: {source} segments are imported whole, .*; leave it out"):
        fetch(FetchRequest(source, tmp_path / "data", origin=tmp_path, **asked), Console(quiet=True))
    assert not (tmp_path / "data").exists()
