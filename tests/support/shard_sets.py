"""Shard sets written from tables, without a recipe or a video."""

from collections import Counter
from pathlib import Path

from omni_cli.samples.shards import (
    Manifest,
    RecordingEntry,
    SkewStats,
    frames_path,
    listed_file,
    windows_path,
    write_manifest,
    write_recording,
)
from omni_cli.samples.tables import ShardTables
from omni_cli.samples.tiling import TiledPreprocess


def write_shard_set(folder: Path, drives: dict[str, ShardTables], layout: TiledPreprocess) -> Path:
    """Write a finished set of these drives, by name."""
    entries = []
    for name, tables in drives.items():
        write_recording(folder, name, tables, "key")
        entries.append(
            RecordingEntry(
                id=name,
                group="",
                windows=dict(Counter(tables.windows["split"].to_pylist())),
                num_frames=tables.frames.num_rows,
                dropped={},
                max_skew_us=0,
                frames_file=listed_file(frames_path(folder, name)),
                windows_file=listed_file(windows_path(folder, name)),
            )
        )
    values = {"recipe": "vlm", "settings": {}, "source": "test", "split_rule": "hash"}
    skew = SkewStats(median_us=0, max_us=0)
    write_manifest(folder, Manifest(**values, skew=skew, preprocess=layout, recordings=tuple(entries)))
    return folder
