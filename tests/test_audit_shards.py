"""Shard sets: one drive on both sides of a split is found, and a torn recording is set aside for etl to make anew."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from omni_cli.errors import DataError
from omni_cli.report import Console
from omni_cli.samples.shards import (
    Manifest,
    RecordingEntry,
    SkewStats,
    frames_path,
    listed_file,
    open_shards,
    windows_path,
    write_manifest,
    write_recording,
)
from omni_cli.samples.tables import FRAMES, Frames, ShardTables
from omni_cli.stages.audit import AuditRequest, audit
from tests.support.drives import preprocess

WIDTH, HEIGHT, COUNT = 72, 64, 16


def pictures(seed: int, noise: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    drive = [np.kron(rng.integers(20, 220, (8, 9, 3)), np.ones((8, 8, 1))).astype(np.int64) for _ in range(COUNT)]
    change = np.random.default_rng(99).integers(-noise, noise + 1, (COUNT, HEIGHT, WIDTH, 3))
    return [np.clip(one + other, 0, 255).astype(np.uint8) for one, other in zip(drive, change, strict=True)]


def write_shards(folder: Path, drives: dict[str, tuple[str, list[np.ndarray]]]) -> Path:
    """Write a set with the pictures and the split of each recording; one without pictures has no window."""
    entries = []
    for name, (split, shown) in drives.items():
        count, splits = len(shown), [split] * bool(shown)
        columns = {
            "camera": ["front"] * count,
            "frame_index": range(count),
            "timestamp_us": [100_000 * row for row in range(count)],
            "width_px": [WIDTH] * count,
            "height_px": [HEIGHT] * count,
            "pixels": [one.tobytes() for one in shown],
        }
        batch = pa.RecordBatch.from_pydict({key: list(values) for key, values in columns.items()}, FRAMES)
        tables = ShardTables(
            Frames(count, lambda batch=batch: iter([batch])), pa.table({"split": pa.array(splits, pa.string())})
        )
        write_recording(folder, name, tables, "key")
        files = {"frames_file": frames_path(folder, name), "windows_file": windows_path(folder, name)}
        listed = {key: listed_file(path) for key, path in files.items()}
        facts = {
            "id": name,
            "group": "",
            "windows": {split: len(splits)},
            "num_frames": count,
            "dropped": {},
            "max_skew_us": 0,
        }
        entries.append(RecordingEntry(**facts, **listed))
    values = {"recipe": "vlm", "settings": {}, "source": "test", "split_rule": "hash"}
    skew = SkewStats(median_us=0, max_us=0)
    write_manifest(folder, Manifest(**values, skew=skew, preprocess=preprocess(), recordings=tuple(entries)))
    return folder


def found(folder: Path, **options) -> list[tuple[str, str, str]]:
    result = audit(AuditRequest(folder, **options), Console(quiet=True))
    return [(one["severity"], one["code"], one["recording"]) for one in result["findings"]]


def test_other_drives_on_either_side_are_no_leak(tmp_path):
    drives = {"a": ("train", pictures(1)), "b": ("val", pictures(2)), "c": ("train", pictures(3))}
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
