"""Shard sets: one drive on both sides of a split is found, and a torn recording is set aside for etl to make anew."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from omni_cli.errors import DataError
from omni_cli.report import Console
from omni_cli.samples.shards import frames_path, open_shards
from omni_cli.samples.tables import FRAMES, Frames, ShardTables, windows_schema
from omni_cli.stages.audit import AuditRequest, audit
from tests.support.drives import preprocess
from tests.support.shard_sets import write_shard_set

WIDTH, HEIGHT, COUNT = 72, 64, 16  # in a cell of 112 x 84 px: there are bars on all sides
LAYOUT = preprocess(cameras=("front",), columns=1, canvas_height_px=84, num_frames=COUNT)


def pictures(seed: int, noise: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    drive = [np.kron(rng.integers(20, 220, (8, 9, 3)), np.ones((8, 8, 1))).astype(np.int64) for _ in range(COUNT)]
    change = np.random.default_rng(99).integers(-noise, noise + 1, (COUNT, HEIGHT, WIDTH, 3))
    return [np.clip(one + other, 0, 255).astype(np.uint8) for one, other in zip(drive, change, strict=True)]


def write_shards(folder: Path, drives: dict[str, tuple[str, list[np.ndarray]]]) -> Path:
    """Write a set with the pictures and the split of each recording: one window shows them all, or there is none."""
    tables = {}
    for name, (split, shown) in drives.items():
        count = len(shown)
        columns = {
            "camera": ["front"] * count,
            "frame_index": range(count),
            "timestamp_us": [100_000 * row for row in range(count)],
            "width_px": [112] * count,
            "height_px": [84] * count,
            "pixels": [LAYOUT.in_cell(one).tobytes() for one in shown],
        }
        batch = pa.RecordBatch.from_pydict({key: list(values) for key, values in columns.items()}, FRAMES)
        window = [0, 0, 100_000 * COUNT, split, list(range(count)), columns["timestamp_us"], 0, 0]
        windows = pa.table([[value] * bool(shown) for value in window], schema=windows_schema(()))
        tables[name] = ShardTables(Frames(count, lambda batch=batch: iter([batch])), windows)
    return write_shard_set(folder, tables, LAYOUT)


def found(folder: Path, **options) -> list[tuple[str, str, str]]:
    result = audit(AuditRequest(folder, **options), Console(quiet=True))
    return [(one["severity"], one["code"], one["recording"]) for one in result["findings"]]


def test_other_drives_on_either_side_are_no_leak(tmp_path):
    drives = {"a": ("train", pictures(1)), "b": ("val", pictures(2)), "c": ("train", pictures(3))}
    assert found(write_shards(tmp_path / "one", drives), deep=True) == []


def dim(seed: int) -> list[np.ndarray]:
    """Night: hardly lighter in the middle, with noise of its own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    light = 60 - 16 * np.hypot(x / WIDTH - 0.5, y / HEIGHT - 0.5)[..., None]
    noise = np.random.default_rng(seed).normal(0, 0.7, (COUNT, HEIGHT, WIDTH, 3))
    return list((light + noise).astype(np.uint8))


def test_the_bars_beside_pictures_make_no_drives_look_alike(tmp_path):
    drives = {"a": ("train", dim(1)), "b": ("val", dim(2))}
    assert found(write_shards(tmp_path / "one", drives), deep=True) == []


def test_recordings_without_a_window_are_passed_over(tmp_path):
    """As those without a text are, which etl --labels reasoning keeps with no row."""
    drives = {"a": ("train", pictures(1)), "b": ("val", pictures(2)), "c": ("train", []), "d": ("val", [])}
    assert found(write_shards(tmp_path / "one", drives), deep=True) == []


def test_the_same_pictures_on_both_sides_are_a_leak(tmp_path):
    folder = write_shards(tmp_path / "one", {"a": ("train", pictures(1)), "b": ("val", pictures(1))})
    assert found(folder) == [("refuse", "split-leak", "b")]
    assert found(folder, deep=True) == [("refuse", "split-leak", "b")]


def test_pictures_that_look_alike_on_both_sides_are_told_and_on_one_side_are_not(tmp_path):
    drives = {"a": ("train", pictures(1)), "b": ("val", pictures(1, noise=6)), "c": ("val", pictures(2))}
    folder = write_shards(tmp_path / "one", drives)
    assert found(folder) == []  # pictures are read by --deep alone
    assert found(folder, deep=True) == [("warn", "duplicate-across-splits", "b")]
    alike = {"a": ("train", pictures(1)), "b": ("train", pictures(1, noise=6)), "c": ("val", pictures(2))}
    assert found(write_shards(tmp_path / "two", alike), deep=True) == []


@pytest.mark.fault("F5", "F6")
def test_a_damaged_recording_is_moved_aside_so_that_etl_makes_it_anew(tmp_path):
    folder = write_shards(tmp_path / "one", {"a": ("train", pictures(1)), "b": ("val", pictures(2))})
    path = frames_path(folder, "a")
    content = bytearray(path.read_bytes())
    content[-400] ^= 4
    path.write_bytes(content)
    result = audit(AuditRequest(folder, deep=True, quarantine=True), Console(quiet=True))
    assert (result["refused"], result["moved"]) == (0, [str(folder / "recordings" / "a")])
    assert (folder / "quarantine" / "recordings" / "a" / "frames.arrow").read_bytes() == bytes(content)
    assert frames_path(folder, "b").is_file()
    with pytest.raises(DataError, match="omni etl"):
        open_shards(folder)
