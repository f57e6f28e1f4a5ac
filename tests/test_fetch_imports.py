"""`omni fetch --from`: folders, hub caches and routes, by verified copy and never out of the folder."""

import os
import shutil
from pathlib import Path

import pytest

from omni_cli import files
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES
from omni_cli.sources import open_source
from omni_cli.stages.fetch.openpilot import segment_place
from tests.support.chunks import BIG, contents, expected, get, just_before_the_lock, write_repository

LOGS = ("2023-07-27--13-01-19", "00000008--0696c823fa")
DONGLE = "a2a0ccea32023010"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("repository"))


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
        assert contents(folder) == expected(repository, (0, 1))
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


def test_two_imports_at_a_time_neither_mix_revisions_nor_copy_twice(repository, tmp_path, monkeypatch):
    origins = [shutil.copytree(repository, tmp_path / (letter * 40)) for letter in ("a", "b")]
    data = tmp_path / "data"
    just_before_the_lock(monkeypatch, lambda: get(data, origin=origins[0], chunks="0-0"))
    with pytest.raises(UsageError, match=rf"holds revision {'a' * 40} and {'b' * 40} was asked for"):
        get(data, origin=origins[1], chunks="1-1")
    assert contents(data / "raw" / "physical_ai_av") == expected(repository, (0,))
    just_before_the_lock(monkeypatch, lambda: get(data, origin=origins[0], chunks="1-1"))
    assert get(data, origin=origins[0], chunks="1-1")["fetched"] == 0


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
    assert contents(folder) == {place: contents(origin)[path] for path, place in places.items()}
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
