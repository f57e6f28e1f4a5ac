"""Shards: Arrow that `datasets` opens, bytes that depend on the tables alone, and a dataset that reads them back."""

import mmap
import os
import pickle
import re
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from omni_cli.errors import DataError, UsageError
from omni_cli.files import commit
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import (
    Manifest,
    finished_recording,
    frames_path,
    open_shards,
    safe_name,
    tokens_path,
    windows_path,
    write_recording,
    write_stream,
)
from omni_cli.samples.tables import EGO_MOTION_COLUMNS
from omni_cli.samples.windows import ego_motion_tables
from tests.support.drives import CAMERAS, drive, preprocess
from tests.support.shard_sets import write_shard_set

LAYOUT = preprocess()


def tables_of(recording):
    return ego_motion_tables(
        recording,
        LAYOUT,
        stride=4,
        max_age_us=50_000,
        assign_split=lambda start, end: "train" if end < 1_500_000 else "val",
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drives")
    return {name: tables_of(drive(folder, name, speed_mps=speed)) for name, speed in (("a", 5.0), ("b/..", 9.0))}


@pytest.fixture
def shards(tmp_path, tables):
    return write_shard_set(tmp_path / "shards", tables, LAYOUT)


def test_the_datasets_library_opens_both_tables_as_written(shards, tables):
    for path, table in (
        (frames_path(shards, "a"), tables["a"].frames.read_all()),
        (windows_path(shards, "a"), tables["a"].windows),
    ):
        opened = datasets.Dataset.from_file(str(path))
        assert opened.column_names == table.column_names
        assert opened.to_list() == table.to_pylist()


def test_equal_tables_have_equal_bytes_however_they_are_chunked(tmp_path, tables):
    frames = tables["a"].frames.read_all()
    other = pa.concat_tables([frames.slice(0, 7), frames.slice(7, 1), frames.slice(8)])
    for name, table in (("one", frames), ("two", other)):
        commit(tmp_path / name, lambda stream, table=table: write_stream(table, stream, 32))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_picture_that_windows_share_is_stored_once(tables):
    frames, windows = tables["a"].frames.read_all(), tables["a"].windows
    keys = list(zip(frames["camera"].to_pylist(), frames["frame_index"].to_pylist(), strict=True))
    assert len(keys) == len(set(keys))
    looked_at = [row for rows in windows["frames"].to_pylist() for row in rows]
    assert len(looked_at) > len(set(looked_at)) == len(keys)


def test_a_row_is_the_pictures_and_the_numbers_of_its_window(shards, tables):
    dataset = WindowDataset(open_shards(shards), "val")
    expected = [
        (name, window)
        for name, table in sorted(tables.items())
        for window in table.windows.to_pylist()
        if window["split"] == "val"
    ]
    assert len(dataset) == len(expected) > 2
    for index, (name, window) in enumerate(expected):
        row = dataset[index]
        assert (row["recording"], row["window"]) == (name, window["window"])
        assert dataset.recording_of(index) == name
        assert {field.name: row[field.name] for field in EGO_MOTION_COLUMNS} == {
            field.name: window[field.name] for field in EGO_MOTION_COLUMNS
        }
        assert row["pictures"].dtype == torch.uint8
        frames = tables[name].frames.read_all().to_pylist()
        for instant in range(LAYOUT.num_frames):
            shown = [frames[row] for row in window["frames"][instant * 4 : instant * 4 + 4]]
            assert [frame["camera"] for frame in shown] == list(CAMERAS)
            pictures = [
                np.frombuffer(frame["pixels"], np.uint8).reshape(frame["height_px"], frame["width_px"], 3)
                for frame in shown
            ]
            assert np.array_equal(row["pictures"][instant].numpy(), np.stack(pictures))
    with pytest.raises(IndexError, match="of"):
        dataset[len(dataset)]


def test_a_pickled_dataset_opens_its_own_files(shards):
    dataset = WindowDataset(open_shards(shards), "train")
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 10_000
    assert torch.equal(copy[0]["pictures"], first["pictures"])


def test_loader_workers_read_the_same_rows(shards):
    dataset = WindowDataset(open_shards(shards), "val")
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="forkserver")
    canvases = torch.cat([batch["pictures"] for batch in loader])
    assert torch.equal(canvases, torch.stack([dataset.pictures(index) for index in range(len(dataset))]))


def write_tokens(shards, tables):
    for name, table in tables.items():
        rows = [
            {"input_ids": [w, 1, 2], "labels": [-100, 1, 2], "position_ids": list(range(12))}
            for w in range(table.windows.num_rows)
        ]
        sidecar = pa.Table.from_pylist(rows)
        commit(tokens_path(shards, name, "key"), lambda stream, sidecar=sidecar: write_stream(sidecar, stream, 1024))


def test_tokens_come_from_the_sidecar_of_their_key(shards, tables):
    write_tokens(shards, tables)
    row = WindowDataset(open_shards(shards), "val", "key").row(0)
    assert row["input_ids"].tolist() == [row["window"], 1, 2]
    assert row["labels"].tolist() == [-100, 1, 2]
    assert row["position_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(DataError, match="has no tokens for this model"):
        WindowDataset(open_shards(shards), "val", "other").row(0)


def tokens_of_a(folder, _):
    return tokens_path(folder, "a", "key")


CUTS = {"frames": (frames_path, "pictures"), "tokens": (tokens_of_a, "row")}


@pytest.mark.fault("F5")
@pytest.mark.parametrize("cut_bytes", [1, 100], ids=["a byte", "more"])
@pytest.mark.parametrize("file", CUTS)
def test_a_file_that_is_cut_inside_its_last_page_gives_no_zeros(shards, tables, file, cut_bytes):
    """The kernel gives the page in which a file ends as a whole, with zeros behind its end."""
    path_of, read = CUTS[file]
    path = path_of(shards, "a")
    write_tokens(shards, tables)
    dataset = WindowDataset(open_shards(shards), "train", "key")
    getattr(dataset, read)(0)
    size = path.stat().st_size
    os.truncate(path, size - cut_bytes)
    assert (size - 1) // mmap.PAGESIZE == (size - cut_bytes) // mmap.PAGESIZE  # else the kernel refuses
    with pytest.raises(DataError, match=rf"^{path}: was cut since it was opened; omni audit tells what is damaged$"):
        getattr(dataset, read)(0)


def test_a_sidecar_of_another_size_than_was_written_is_not_opened(shards, tables):
    write_tokens(shards, tables)
    path = tokens_of_a(shards, "a")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    dataset = WindowDataset(open_shards(shards), "train", "key")
    with pytest.raises(
        DataError, match=rf"^{path}: holds {size - 1} bytes, not the {size} that are listed; omni audit"
    ):
        dataset.row(0)


def test_an_id_cannot_leave_the_folder(shards):
    assert safe_name("../../etc") == "%2E%2E%2F%2E%2E%2Fetc"
    assert safe_name("5beb9b58bd12b691|0000--aa") != safe_name("5beb9b58bd12b691_0000--aa")
    assert windows_path(shards, "b/..").is_relative_to(shards / "recordings")
    with pytest.raises(DataError, match="cannot name a file"):
        safe_name("x" * 300)


def test_a_null_never_reaches_a_shard(tmp_path, tables):
    table = tables["a"].windows
    column = pa.array([None] * table.num_rows, pa.float64())
    broken = table.set_column(table.column_names.index("dx_m"), "dx_m", column)
    with pytest.raises(DataError, match="the windows table has nulls"):
        write_recording(tmp_path, "a", replace(tables["a"], windows=broken), "key")


def test_a_unit_is_done_only_if_both_files_verify_and_carry_its_key(shards):
    assert finished_recording(shards, "a", "key")
    assert finished_recording(shards, "a", "other") is None
    path = frames_path(shards, "a")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert finished_recording(shards, "a", "key") is None
    assert open_shards(shards).damaged() == ["recordings/a/frames.arrow"]


def test_an_absent_empty_unfinished_or_cut_folder_is_one_line_with_the_command(shards, tmp_path):
    with pytest.raises(UsageError, match=r"no shard folder .*absent; make one with: omni etl"):
        open_shards(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty, it has no manifest\.json; finish it with the same omni etl, and .*empty"
    ):
        open_shards(tmp_path / "empty")
    (tmp_path / "empty" / "other.txt").touch()
    with pytest.raises(DataError, match=r"empty: is no shard folder, it has no manifest\.json"):
        open_shards(tmp_path / "empty")
    path = windows_path(shards, "a")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"windows\.arrow: missing or not the"):
        open_shards(shards)
    manifest = shards / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"a"', '"c"'))
    with pytest.raises(DataError, match="does not match its receipt"):
        open_shards(shards)
    manifest.unlink()
    with pytest.raises(DataError, match="unfinished"):
        open_shards(shards)


def test_shards_of_an_older_format_are_refused_with_the_command_that_makes_them_anew(shards):
    manifest = shards / "manifest.json"
    older = manifest.read_text().replace('"format": 2', '"format": 1')
    assert older != manifest.read_text()
    commit(manifest, lambda stream: stream.write(older.encode()))
    told = rf"not a manifest of shards of format 2 \(format = 1: .*; make them anew .* --out {re.escape(str(shards))}"
    with pytest.raises(DataError, match=told):
        open_shards(shards)


def test_a_manifest_reads_back_equal_and_its_fingerprint_covers_every_file(shards, tables, tmp_path):
    manifest = open_shards(shards).manifest
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    faster = {**tables, "a": tables["b/.."]}
    assert open_shards(write_shard_set(tmp_path / "other", faster, LAYOUT)).manifest.fingerprint != manifest.fingerprint
    assert str(tmp_path) not in (shards / "manifest.json").read_text()
