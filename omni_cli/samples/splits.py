"""Which windows train a model and which measure it.

By group (a drive, a place, or the recording itself): the groups are ranked by a seeded hash and the lowest share is
for validation, so that both sides exist as soon as there are two groups. By time, for a single drive: its last share,
after a gap. By file: what the user says.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

from omni_cli.errors import DataError, UsageError
from omni_cli.files import read_json
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND

Split = Literal["train", "val"]
SplitRule = Literal["hash", "time", "file"]
SPLITS: tuple[Split, ...] = ("train", "val")


def assign_splits(groups: Iterable[str], *, validation: float, seed: int) -> dict[str, Split]:
    """Return the split of every group.

    Args:
        groups: names; repeats are one group.
        validation: share of the groups for validation; at least one of two or more, never all.
        seed: another seed, another choice.
    """
    ranked = sorted(set(groups), key=lambda group: _hash(group, seed))
    if len(ranked) < 2:
        return dict.fromkeys(ranked, "train")
    held_out = min(max(round(validation * len(ranked)), 1), len(ranked) - 1)
    return {group: "val" if rank < held_out else "train" for rank, group in enumerate(ranked)}


def time_split(
    start_us: int, end_us: int, *, first_us: int, last_us: int, validation: float, gap_s: float
) -> Split | None:
    """Return the split of a window inside one drive, or None in the gap that keeps the two apart.

    The last share of the time is for validation; training ends `gap_s` before it begins.

    Args:
        start_us: first instant of the window.
        end_us: last instant of the window.
        first_us: first instant of the drive.
        last_us: last instant of the drive.
        validation: share of the time.
        gap_s: seconds between the last training window and the first validation window.
    """
    boundary_us = first_us + round((1 - validation) * (last_us - first_us))
    if start_us >= boundary_us:
        return "val"
    return "train" if end_us <= boundary_us - round(gap_s * MICROSECONDS_PER_SECOND) else None


def read_split_file(path: Path) -> dict[str, Split]:
    """Read which recording belongs to which split.

    Args:
        path: a CSV with the columns recording and split, or a JSON object {recording: split}.

    Raises:
        UsageError: the file is missing, or says something else than train or val.
    """
    if not path.is_file():
        raise UsageError(f"no split file {path}; give a CSV with the columns recording,split or a JSON object")
    try:
        table = _read_json_table(path) if path.suffix == ".json" else _read_csv_table(path)
    except (ValueError, KeyError, TypeError, csv.Error):
        raise UsageError(
            f"{path}: expected the CSV columns recording,split or a JSON object {{recording: split}}"
        ) from None
    for recording, split in table.items():
        if split not in SPLITS:
            raise UsageError(f"{path}: recording {recording} has split {split!r}; expected train or val")
    return cast(dict[str, Split], table)


def check_no_leak(recordings: Iterable[tuple[str, str, Mapping[str, int]]], rule: SplitRule) -> None:
    """Refuse a shard set where one drive lies on both sides; a split by time does so on purpose, and is marked.

    Args:
        recordings: (recording, group, windows by split) of each recording.
        rule: how the split was made.

    Raises:
        DataError: a recording or a group has windows in train and in val.
    """
    sides: dict[str, set[str]] = {}
    for recording, group, windows in recordings:
        sides.setdefault(group or recording, set()).update(split for split, count in windows.items() if count)
    both = sorted(group for group, found in sides.items() if len(found) > 1)
    if both and rule != "time":
        raise DataError(
            f"{both[0]} has windows in train and in val ({len(both)} such groups); "
            "a split by recording was expected: make the shards again with omni etl"
        )


def _hash(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def _read_json_table(path: Path) -> dict[str, str]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise TypeError(f"a JSON {type(table).__name__}")
    return {str(recording): str(split) for recording, split in table.items()}


def _read_csv_table(path: Path) -> dict[str, str]:
    with path.open(newline="") as stream:
        return {row["recording"]: row["split"] for row in csv.DictReader(stream)}
