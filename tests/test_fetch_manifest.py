"""What a fetch tells: features, estimates, limits, the manifest, absent files, names that the hub gives, offline."""

import hashlib
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import constants

from omni_cli import files
from omni_cli.downloads import Meter, RemoteFile, claimed
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES, REASONING_FILE
from omni_cli.report import Console
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.sources.quarantine import move_to_quarantine
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fetch import feature_names, fetch
from omni_cli.stages.fetch.estimate import say_pieces
from omni_cli.stages.fetch.partial import Piece
from omni_cli.stages.ledger import read_ledger, updated_ledger
from tests.support import pai
from tests.support.clips import (
    CLIPS,
    FAR,
    FRONT,
    REAR,
    add_feature,
    add_file,
    ask,
    folder_of,
    get,
    members_of,
    of_clips,
    spoil,
    zip_of,
)
from tests.support.fetch_once import start
from tests.support.plain_recipe import SAMPLE, Plain


def test_a_clip_has_the_same_origin_alone_or_with_its_chunk(hub, tmp_path):
    get(tmp_path / "part", CLIPS[1])
    get(tmp_path / "whole", chunks="0-0")
    part, whole = (PhysicalAiAv(folder_of(tmp_path / name)).open(CLIPS[1]) for name in ("part", "whole"))
    assert part.provenance == whole.provenance
    assert f"sha256 of {FEATURES[FRONT].chunk_path(0)}" in part.provenance
    with pytest.raises(DataError, match=f"has no member {CLIPS[0]}.*; fetch this clip or its chunk"):
        PhysicalAiAv(folder_of(tmp_path / "part")).open(CLIPS[0], (FRONT,))


def test_more_features_come_beside_what_omni_reads(hub, tmp_path):
    add_feature(hub, "obstacle.offline", CLIPS[:2])
    add_feature(hub, "radar_front_center_srr_0", CLIPS[1:])
    features = feature_names("obstacle.offline,radar,reasoning")
    assert len(features) == 1 + 19 + 1
    result = get(tmp_path, CLIPS[0], features=features)
    assert set(members_of(zip_of(tmp_path, "obstacle.offline"))) == {f"{CLIPS[0]}.obstacle.offline.parquet"}
    radar = FEATURES["radar_front_center_srr_0"].chunk_path(0)
    assert result["lacking"] == {radar: [CLIPS[0]]}
    assert not (folder_of(tmp_path) / radar).exists()
    assert all(Path(path).is_file() for path in result["paths"])
    assert {REASONING_FILE, FEATURES["radar_side_left_srr_0"].chunk_path(0)} <= set(result["absent"])
    hub.log.clear()
    assert get(tmp_path, CLIPS[0], features=features)["lacking"] == {radar: [CLIPS[0]]}
    assert hub.log == []
    with pytest.raises(UsageError, match=r"--features: unknown feature 'egomotion.online'; did you mean 'egomotion"):
        feature_names("egomotion.online")


def test_the_reasoning_table_comes_where_the_revision_has_it(hub, tmp_path):
    add_file(hub, REASONING_FILE, b"x" * 5000)
    assert str(folder_of(tmp_path) / REASONING_FILE) in get(tmp_path, CLIPS[0])["paths"]


def test_the_limit_is_obeyed_exactly(hub, tmp_path):
    """It counts what would be transferred: tables, directories and ranges, and not the whole zips."""
    plan = get(tmp_path, CLIPS[0], dry_run=True)
    assert not folder_of(tmp_path).exists()
    sent = hub.sent()
    with pytest.raises(UsageError, match="--max-gb allows"):
        get(tmp_path / "less", CLIPS[0], max_gb=(plan["transfer_bytes"] - 1) / 1e9)
    hub.log.clear()
    get(tmp_path, CLIPS[0], max_gb=plan["transfer_bytes"] / 1e9)
    assert hub.sent() == plan["transfer_bytes"]
    assert sent < plan["transfer_bytes"]


def test_any_number_of_gigabytes_may_be_allowed(hub, tmp_path):
    assert get(tmp_path, CLIPS[0], max_gb=float("inf"), dry_run=True)["fetched"] > 0


def test_a_dry_run_of_too_much_tells_how_much_that_is(hub, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"the plan is 0\.001 GB and --max-gb allows 0\.0001"):
        fetch(ask(tmp_path, chunks="1", dry_run=True, max_gb=0.0001), Console())
    assert "what a fetch would bring" in capsys.readouterr().err


def test_a_long_plan_is_told_in_short(capsys):
    many = [Piece(RemoteFile(f"camera/x/{number}.zip", 10**6, "", None)) for number in range(1000)]
    say_pieces(many, Console())
    told = capsys.readouterr().err.splitlines()
    assert (len(told), told[-1]) == (41, "would fetch 960 files more")


def test_a_disk_must_hold_the_zip_that_clips_are_put_together_in(hub, tmp_path, monkeypatch):
    plan = get(tmp_path, CLIPS[0], dry_run=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, plan["fetched_bytes"] + 256_000_000))
    with pytest.raises(OmniError, match="GB are needed"):
        get(tmp_path, CLIPS[0])


def test_a_lost_revision_is_known_from_the_manifest_and_the_licence_runs_on(hub, tmp_path):
    get(tmp_path, CLIPS[0])
    path = folder_of(tmp_path) / "revision.json"
    manifest = files.read_json(folder_of(tmp_path) / "manifest.json")
    manifest["files"][CLIP_INDEX_FILE]["fetched"] = "2020-01-01"
    files.commit_json(folder_of(tmp_path) / "manifest.json", manifest)
    before = files.read_json(path)
    hub.commit = "b" * 40  # main has moved on
    path.unlink()
    with pytest.raises(UsageError, match=rf"holds revision {before['revision']} and {'b' * 40} was asked for"):
        get(tmp_path, CLIPS[1], revision="main")
    assert get(tmp_path, CLIPS[0])["revision"] == before["revision"]
    assert files.read_json(path) == {**before, "first_fetched": "2020-01-01"}


@pytest.mark.fault("F14")
@pytest.mark.parametrize("damage", ["{", "[]", '{"revision": 7}', "\ud800"])
def test_a_damaged_revision_is_named_and_mended_as_the_message_says(hub, tmp_path, damage):
    get(tmp_path, CLIPS[0])
    path = folder_of(tmp_path) / "revision.json"
    path.write_bytes(damage.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=r"revision\.json: damaged, .*; delete it and run omni fetch again"):
        get(tmp_path, CLIPS[1])
    with pytest.raises(DataError, match=r"revision\.json: damaged"):
        PhysicalAiAv(folder_of(tmp_path)).open(CLIPS[0])
    path.unlink()
    assert get(tmp_path, CLIPS[1])["revision"] == hub.commit


def test_what_is_proved_by_its_content_is_read_once(hub, tmp_path):
    """A copy of the folder has other times: hashed at the first fetch, taken by size and time from then on."""
    get(tmp_path, CLIPS[0])
    for path in (zip_of(tmp_path, "egomotion"), zip_of(tmp_path, FRONT)):
        os.utime(path, (1, 1))
        get(tmp_path, CLIPS[0], dry_run=True)
        assert files.read_receipt(path)["mtime_ns"] != path.stat().st_mtime_ns
        assert get(tmp_path, CLIPS[0])["fetched"] == 0
        assert files.read_receipt(path)["mtime_ns"] == path.stat().st_mtime_ns
        assert files.verified_receipt(path)


def test_what_came_hashed_is_not_read_again(hub, tmp_path):
    add_file(hub, REASONING_FILE, bytes(20_000_000))
    before = read_bytes()
    get(tmp_path, CLIPS[0])
    assert 20_000_000 <= read_bytes() - before < 30_000_000  # the hub's own reading
    assert files.verified_receipt(folder_of(tmp_path) / REASONING_FILE)


def read_bytes():
    """Return how much this process has read of files; what comes from sockets is not counted (proc(5), io, rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_that_another_process_is_waited_for_is_said(hub, tmp_path, capsys):
    get(tmp_path, CLIPS[0])
    with claimed(
        folder_of(tmp_path) / ".fetch", hub.stored[FEATURES[FRONT].chunk_path(0)].sha256, Meter(lambda _: None)
    ):
        waiting = threading.Thread(target=fetch, args=(ask(tmp_path, CLIPS[1]), Console()))
        waiting.start()
        time.sleep(1.0)
    waiting.join(20)
    assert "another omni fetches 1 file into " in capsys.readouterr().err
    assert len(files.read_receipt(zip_of(tmp_path))["clips"]) == 2


def test_a_dry_run_tells_bytes_and_hours_by_feature(hub, tmp_path, capsys):
    result = fetch(ask(tmp_path, CLIPS[0], dry_run=True), Console())
    told = capsys.readouterr().err
    assert f"would fetch {FEATURES[FRONT].chunk_path(0)}  0.2 MB of 1 clip" in told
    row = next(line for line in told.splitlines() if line.startswith(f"│ {FRONT}"))
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["1", "0.2 MB", "0.00", "0.00", "0"]
    assert result["seconds_at_100_mbps"] == pytest.approx(result["fetched_bytes"] * 8 / 100e6)
    assert "0.1 s at 100 Mb/s" in told or "at 100 Mb/s" in told
    fetch(ask(tmp_path, CLIPS[0]), Console())
    assert "to fetch: " in capsys.readouterr().err


def test_the_manifest_tells_what_is_here_and_what_is_absent(hub, tmp_path):
    pruned = FEATURES[REAR].chunk_path(1)
    hub.pruned.add(pruned)
    get(tmp_path, CLIPS[0])
    result = get(tmp_path, chunks="1-1")
    manifest = files.read_json(Path(result["manifest"]))
    assert files.verified_receipt(Path(result["manifest"]))
    assert (manifest["revision"], len(manifest["revision"])) == (hub.commit, 40)
    for path, facts in manifest["files"].items():
        content = (folder_of(tmp_path) / path).read_bytes()
        assert (facts["size"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert facts["fetched"] == time.strftime("%Y-%m-%d", time.gmtime())
    front = manifest["files"][FEATURES[FRONT].chunk_path(0)]
    assert (front["partial"], front["clips"]) == (True, [CLIPS[0]])
    assert manifest["absent"][pruned] == "listed in this revision, and yet 404: pruned"
    assert manifest["absent"][FEATURES["vehicle_dimensions"].chunk_path(0)] == "not in this revision"
    assert set(result["absent"]) <= set(manifest["absent"])
    whole = Path(result["manifest"]).read_bytes()
    Path(result["manifest"]).unlink()
    get(tmp_path, CLIPS[0])
    get(tmp_path, chunks="1-1")
    assert files.read_json(Path(result["manifest"]))["files"] == manifest["files"]
    Path(result["manifest"]).write_bytes(whole[:100])
    get(tmp_path, CLIPS[0])
    assert files.read_json(Path(result["manifest"]))["files"] == manifest["files"]


def test_what_a_killed_fetch_landed_is_entered_by_the_next_one(hub, tmp_path):
    """Whichever that is: a kill comes before the manifest is written."""
    manifest = Path(get(tmp_path, CLIPS[0])["manifest"])
    before = {path: path.read_bytes() for path in (manifest, files.receipt_path(manifest))}
    get(tmp_path, FAR[0])
    for path, content in before.items():
        path.write_bytes(content)
    move_to_quarantine(folder_of(tmp_path), FEATURES[REAR].chunk_path(1), "a test")
    get(tmp_path, CLIPS[0])
    here = {path.removesuffix(files.RECEIPT_SUFFIX) for path in names_in(folder_of(tmp_path)) if "receipt" in path}
    assert files.read_json(manifest)["files"].keys() == here - {"manifest.json"}
    assert FEATURES[FRONT].chunk_path(1) in here


def names_in(folder):
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [name for name in names if not name.startswith((".", "quarantine"))]


def test_what_was_pruned_is_asked_again_where_the_revision_is_named(hub, tmp_path):
    pruned = FEATURES[REAR].chunk_path(1)
    hub.pruned.add(pruned)
    get(tmp_path, chunks="1-1")
    hub.pruned.clear()
    hub.log.clear()
    assert pruned in get(tmp_path, chunks="1-1")["absent"]
    assert hub.log == []
    assert pruned not in get(tmp_path, chunks="1-1", revision=hub.commit)["absent"]
    assert zip_of(tmp_path, REAR, 1).is_file()


@pytest.mark.fault("F31")
@pytest.mark.parametrize("asked", [{"clips": CLIPS[:2]}, {"chunks": "2"}], ids=["clips", "chunks"])
def test_offline_what_is_there_needs_no_call(hub, tmp_path, monkeypatch, asked):
    hub.pruned.add(FEATURES[REAR].chunk_path(1))
    before = get(tmp_path, **{"clips": (), **asked})
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = get(tmp_path, **{"clips": (), **asked})
    assert (again["fetched"], again["absent"], again["paths"]) == (0, before["absent"], before["paths"])
    assert hub.log == []
    if "clips" in asked:
        with pytest.raises(OmniError, match="HF_HUB_OFFLINE is set"):
            get(tmp_path, CLIPS[3])


@pytest.mark.fault("F14")
@pytest.mark.parametrize("chunk", [-1, 10_000, "../../etc", None])
def test_an_index_that_would_name_other_files_is_refused(hub, tmp_path, chunk):
    table = {"clip_id": list(CLIPS), "clip_is_valid": [True] * 4, "chunk": [chunk] * 4, "split": ["train"] * 4}
    spoil(hub, CLIP_INDEX_FILE, pai.parquet(pa.table(table)))
    with pytest.raises(DataError, match=r"a chunk's number is 0 to 9999"):
        get(tmp_path, CLIPS[0])


@pytest.mark.fault("F14")
def test_names_that_only_the_hub_gives_become_no_path(hub, tmp_path):
    for path in ("../evil", "/etc/evil", ".fetch/evil", "manifest.json", "camera/{0.__class__}/evil"):
        add_file(hub, path, b"evil")
    get(tmp_path / "data", CLIPS[0])
    assert not list(tmp_path.rglob("*evil*"))
    assert b"evil" not in (folder_of(tmp_path / "data") / "manifest.json").read_bytes()


def test_a_part_is_imported_as_a_part(hub, tmp_path):
    get(tmp_path / "one", CLIPS[1])
    get(tmp_path / "two", chunks="0-0", clips=(), origin=folder_of(tmp_path / "one"))
    assert [ref.id for ref in PhysicalAiAv(folder_of(tmp_path / "two")).recordings()] == [CLIPS[1]]


def test_an_audit_does_not_miss_what_was_never_asked_for(hub, tmp_path):
    from omni_cli.stages.audit import AuditRequest, audit

    hub.pruned.add(FEATURES[REAR].chunk_path(1))
    get(tmp_path, CLIPS[1], CLIPS[3])
    get(tmp_path, FAR[2])
    found = audit(AuditRequest(folder_of(tmp_path), deep=True), Console(quiet=True))
    assert (found["audited"], found["refused"]) == (3, 0), [
        (f["code"], f["detail"]) for f in found["findings"] if f["severity"] == "refuse"
    ]
    absent = [finding["detail"].partition(":")[0] for finding in found["findings"] if "absent" in finding["code"]]
    assert FEATURES[REAR].chunk_path(1) in absent
    assert not {REASONING_FILE, "splits/default.parquet"} & set(absent)
    get(tmp_path, chunks="0-0")
    assert audit(AuditRequest(folder_of(tmp_path)), Console(quiet=True))["audited"] == len(CLIPS) + 1


def test_etl_makes_the_same_shards_of_a_clip_alone_or_with_its_chunk(hub, tmp_path):
    sample = SAMPLE.model_copy(update={"cameras": FRONT})
    split = tmp_path / "split.csv"
    split.write_text(f"recording,split\n{CLIPS[1]},train\n{CLIPS[3]},val\n")
    made = {}
    for name, asked in (("part", {"clips": (CLIPS[1], CLIPS[3])}), ("whole", {"clips": (), "chunks": "0-0"})):
        get(tmp_path / name, **asked)
        out = tmp_path / name / "shards" / "out"
        request = EtlRequest(tmp_path / name, "physical_ai_av", out, workers=0, split_file=split)
        etl(Plain(sample=sample), request, Console(quiet=True))
        made[name] = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}
        assert [copy["kind"] for copy in read_ledger(tmp_path / name)["licences"][0]["copies"]] == ["raw", "shards"]
    assert made["part"] == made["whole"]
    assert len([path for path in made["part"] if path.name == "windows.arrow"]) == 2
    with updated_ledger(tmp_path / "part") as ledger:  # the raw data may be gone: of shards the ledger tells
        ledger["licences"][0]["first_fetched"] = "2020-01-01"
    codes = {name: _codes(tmp_path / name / "shards" / "out") for name in made}
    assert ("licence-ended" in codes["part"], "licence-ended" in codes["whole"]) == (True, False)


def _codes(folder):
    from omni_cli.stages.audit import AuditRequest, audit

    return {finding["code"] for finding in audit(AuditRequest(folder), Console(quiet=True))["findings"]}


@pytest.mark.fault("F10")
def test_two_processes_that_fetch_other_clips_of_a_zip_unite_them(hub, repository, tmp_path):
    hub.bytes_per_second = 1_000_000
    for process in [start(tmp_path, clips=[clip], cameras=pai.CAMERAS) for clip in (CLIPS[0], CLIPS[2])]:
        assert process.wait() == 0
    assert members_of(zip_of(tmp_path)) == of_clips(repository, {CLIPS[0], CLIPS[2]})
    assert files.verified_receipt(zip_of(tmp_path))["clips"] == [CLIPS[0], CLIPS[2]]
    manifest = files.read_json(folder_of(tmp_path) / "manifest.json")
    assert manifest["files"][FEATURES[FRONT].chunk_path(0)]["clips"] == [CLIPS[0], CLIPS[2]]
