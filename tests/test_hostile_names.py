"""Names that a stranger's repository gives, in each place where it can: none becomes a path, and each is told."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES, FEATURES_FILE, PRESENCE_FILE
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.sources.index_names import unsafe_clips, unsafe_index_names
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.checks.repository import read_repository
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fetch.tables import chunk_of_clip
from tests.support import pai
from tests.support.clips import CLIPS, FAR, FRONT, folder_of, get, members_of, spoil, zip_of
from tests.support.plain_recipe import SAMPLE, Plain

QUIET = Console(quiet=True)
HOSTILE = (
    *("../../../evil", "/tmp/evil", "~/evil", "evil\0evil", "evil\nevil", "..\\evil", "evil" * 1200, "con", "C:evil"),
    *("{0.__class__}evil", "\u0435vil", "..", ""),  # one is a Cyrillic letter
)
KNOWN = (*CLIPS, *FAR)


def tables_with(hub, path, *clips):
    """Let a table name more clips: their other values are the last row's."""
    table = pq.read_table(hub.stored[path].place).to_pydict()
    for name, column in table.items():
        table[name] = [*column, *(clips if name == "clip_id" else [column[-1]] * len(clips))]
    spoil(hub, path, pai.parquet(pa.table(table)))


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def evil_in(folder):
    return [path for path in folder.rglob("*") if "vil" in path.name or path.name == "con"]


@pytest.mark.fault("F14")
def test_clips_of_hostile_names_are_skipped_and_told_by_fetch_audit_and_etl(hub, tmp_path, capsys):
    for table in (CLIP_INDEX_FILE, PRESENCE_FILE):
        tables_with(hub, table, *HOSTILE)
    result = get(tmp_path / "data", chunks="0-0,1-1", clips=())
    raw, out = folder_of(tmp_path / "data"), tmp_path / "data" / "shards" / "out"
    for table in (CLIP_INDEX_FILE, PRESENCE_FILE):
        told = [entry for entry in result["unsafe"] if entry.startswith(f"{table}: clip ")]
        assert len(told) == len(HOSTILE)
        assert all(entry.isprintable() and len(entry) < 150 for entry in told)
    assert "paths or names of the hub are unsafe and skipped" in capsys.readouterr().err
    assert json.loads((raw / "manifest.json").read_text())["skipped"] == result["unsafe"]
    found = audit(AuditRequest(raw), QUIET)["findings"]
    assert len([finding for finding in found if finding["code"] == "unsafe-name"]) == 2 * len(HOSTILE)
    recipe = Plain(sample=SAMPLE.model_copy(update={"cameras": FRONT}))
    etl(recipe, EtlRequest(tmp_path / "data", "physical_ai_av", out, workers=0, max_refused=1.0), QUIET)
    manifest = open_shards(out).manifest
    assert {**manifest.refused, **manifest.quarantined}.keys() == set(HOSTILE)
    assert {path.parent.name for path in (out / "recordings").glob("*/windows.arrow")} == set(KNOWN)
    assert not [path for path in evil_in(tmp_path) if path.parent != out / "recordings"]


@pytest.mark.fault("F14")
def test_hostile_names_in_features_csv_are_skipped_and_told(hub, tmp_path):
    path = hub.stored[FEATURES_FILE].place
    rows = rows_of(path)
    for hostile in HOSTILE:
        member = json.dumps({"video": f"{{clip_id}}.{hostile}/x"})
        rows += [[f"lidar_{len(rows)}", "lidar", f"{hostile}/x.chunk_{{chunk_id:04d}}.zip", ""]]
        rows += [[f"lidar_{len(rows)}", "lidar", "lidar/x.chunk_{chunk_id:04d}.zip", member]]
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    spoil(hub, FEATURES_FILE, path.read_bytes())
    result = get(tmp_path / "data", CLIPS[0])
    told = [entry for entry in result["unsafe"] if entry.startswith(FEATURES_FILE)]
    assert len(told) == len(HOSTILE) * 2 - 1  # {clip_id}.con is no device
    assert all(entry.isprintable() and len(entry) < 120 for entry in told)
    assert not evil_in(tmp_path)
    found = audit(AuditRequest(folder_of(tmp_path / "data")), QUIET)["findings"]
    assert len([finding for finding in found if finding["code"] == "unsafe-name"]) == len(told)


@pytest.mark.fault("F14")
@pytest.mark.parametrize("content", [b"\xff\xfe", b'"' + b"x" * 200_000, b"a,b\n\0,\0\n"])
def test_a_features_csv_that_is_none_is_told(hub, tmp_path, content):
    spoil(hub, FEATURES_FILE, content)
    assert FEATURES_FILE in next(iter(get(tmp_path, CLIPS[0])["unsafe"]))


def test_the_real_names_are_plain(tmp_path):
    pai.write_repository(tmp_path)
    assert unsafe_index_names(tmp_path) == {}
    assert len(rows_of(tmp_path / FEATURES_FILE)) == 1 + len(FEATURES)


@pytest.mark.fault("F14")
def test_two_clips_that_are_one_on_another_system_are_not_both_used(hub, tmp_path):
    upper = "ABCDEF00-0000-4000-8000-000000000000"
    tables_with(hub, CLIP_INDEX_FILE, upper)
    tables_with(hub, CLIP_INDEX_FILE, upper.lower())
    result = get(tmp_path, CLIPS[0])
    assert result["unsafe"] == {
        f"{CLIP_INDEX_FILE}: clip '{upper.lower()}'": f"{upper} but for the case of its letters"
    }
    assert unsafe_clips(["a", "A", "a", 7, None]) == {
        "A": "a but for the case of its letters",
        7: "not 1 to 100 letters, digits, _ and -",
        None: "not 1 to 100 letters, digits, _ and -",
    }


@pytest.mark.fault("F14")
@pytest.mark.parametrize("chunk", [-1, 10_000, "../../etc", None, 0.5, True])
def test_a_reader_takes_no_chunk_that_is_no_number(tmp_path, chunk):
    pai.write_repository(tmp_path)
    table = pq.read_table(tmp_path / CLIP_INDEX_FILE).to_pydict()
    pq.write_table(pa.table({**table, "chunk": [chunk] * len(table["chunk"])}), tmp_path / CLIP_INDEX_FILE)
    with pytest.raises(DataError, match=r"in chunk .*; a chunk's number is 0 to 9999: fetch it again"):
        PhysicalAiAv(tmp_path).recordings()


def not_utf8(count):
    """Texts of one byte that begins no letter."""
    offsets = pa.array(range(count + 1), pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(b"\xff" * count))


READERS = {
    "fetch": lambda root: chunk_of_clip(root / CLIP_INDEX_FILE),
    "etl": lambda root: PhysicalAiAv(root).recordings(),
    "audit": lambda root: read_repository(root, None),
}


@pytest.mark.fault("F14")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("column", [pa.array([["a"], ["b"]]), pa.array([{"a": 1}] * 2), not_utf8(2)], ids=range(3))
def test_ids_that_are_no_texts_are_refused(tmp_path, column, reader):
    pai.write_repository(tmp_path)
    table = pq.read_table(tmp_path / CLIP_INDEX_FILE).to_pydict()
    pq.write_table(pa.table({**table, "clip_id": column}), tmp_path / CLIP_INDEX_FILE)
    with pytest.raises(DataError, match=r"lists or structures; |Invalid UTF8 .*; fetch it again"):
        READERS[reader](tmp_path)
    assert list(unsafe_index_names(tmp_path)) == [CLIP_INDEX_FILE]


def test_files_that_are_gone_are_not_told_as_unsafe(hub, tmp_path):
    tables_with(hub, CLIP_INDEX_FILE, "con")
    for path in [path for path in hub.stored if "chunk_0001" in path]:
        del hub.stored[path]
    with pytest.raises(DataError, match=r"none of the \d+ files of chunks 1-1 exist"):
        get(tmp_path, chunks="1-1", clips=())


@pytest.mark.fault("F14")
def test_a_link_in_the_folder_is_not_followed_out_of_it(hub, tmp_path, capsys):
    elsewhere, raw = tmp_path / "elsewhere", folder_of(tmp_path / "data")
    elsewhere.mkdir()
    (raw / "inside").mkdir(parents=True)
    (raw / "camera").mkdir()
    (raw / "camera" / FRONT).symlink_to(elsewhere)
    (raw / "labels").symlink_to(raw / "inside")  # leads nowhere else
    result = get(tmp_path / "data", chunks="0-0", clips=())
    assert list(result["unsafe"]) == [FEATURES[FRONT].chunk_path(0)]
    assert "leads out of" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())
    assert (raw / "inside" / "egomotion").is_dir()
    assert not zip_of(tmp_path / "data").exists()
    (raw / "camera" / FRONT).unlink()
    assert get(tmp_path / "data", chunks="0-0", clips=())["unsafe"] == {}
    assert zip_of(tmp_path / "data").is_file()


def test_a_folder_that_is_itself_a_link_is_the_users_choice(hub, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "raw").mkdir(parents=True)
    folder_of(tmp_path / "data").symlink_to(tmp_path / "disk")
    assert get(tmp_path / "data", CLIPS[0])["unsafe"] == {}
    assert zip_of(tmp_path / "data").is_file()


@pytest.mark.fault("F14")
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(hub, tmp_path):
    victim, path = tmp_path / "victim", zip_of(tmp_path / "data")
    victim.write_text("mine")
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    get(tmp_path / "data", chunks="0-0", clips=())
    assert victim.read_text() == "mine"
    assert not path.is_symlink()


MEMBERS = ["con", "nul.mp4", "x" * 5000, "е.mp4", CLIPS[0].upper() + ".mp4", f"{CLIPS[0]}.aux", f"{CLIPS[0]}.\n"]


@pytest.mark.fault("F13", "F14")
@pytest.mark.parametrize("asked", [{"clips": CLIPS[:1]}, {"clips": (), "chunks": "0-0"}], ids=["clips", "chunk"])
@pytest.mark.parametrize("name", MEMBERS, ids=range(len(MEMBERS)))
def test_a_member_of_an_odd_name_becomes_no_path_and_is_told(hub, tmp_path, name, asked):
    path = FEATURES[FRONT].chunk_path(0)
    pai.edit_zip(hub.stored[path].place, {}, ((name, b"evil"),))
    spoil(hub, path, hub.stored[path].place.read_bytes())
    get(tmp_path, **asked)
    raw = folder_of(tmp_path)
    plain = {Path(feature.chunk_path(0)).name for feature in FEATURES.values()}
    assert {each.name for each in (raw / "camera").rglob("*.zip")} <= plain
    found = audit(AuditRequest(raw), QUIET)["findings"]
    is_here = name in members_of(zip_of(tmp_path))
    assert is_here == ("chunks" in asked or name.startswith(f"{CLIPS[0]}."))
    assert ("extra-member" in {finding["code"] for finding in found}) == is_here
    assert PhysicalAiAv(raw).open(CLIPS[0]).id == CLIPS[0]


@pytest.mark.fault("F13", "F14")
@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_a_member_that_leaves_its_folder_costs_its_chunk_alone(hub, tmp_path, name):
    path = FEATURES[FRONT].chunk_path(0)
    pai.edit_zip(hub.stored[path].place, {}, ((name, b"evil"),))
    spoil(hub, path, hub.stored[path].place.read_bytes())
    get(tmp_path / "data", chunks="0-0", clips=())
    with pytest.raises(DataError, match="has a name that leaves its folder"):
        PhysicalAiAv(folder_of(tmp_path / "data")).open(CLIPS[0])
    found = audit(AuditRequest(folder_of(tmp_path / "data")), QUIET)["findings"]
    assert "unsafe-member" in {finding["code"] for finding in found}
    assert not evil_in(tmp_path)
