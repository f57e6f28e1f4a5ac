"""Shards on disk: one folder a recording, a manifest over them all, tokens beside them.

    NAME/manifest.json                          written last, and only when every unit is done
    NAME/recordings/ID/frames.arrow             each picture once      } Arrow IPC streams, which `datasets` opens,
    NAME/recordings/ID/windows.arrow            what a model looks at  } each with its receipt
    NAME/tokens/KEY/ID.arrow                    token ids for one tokenizer and template

Bytes are a function of the tables alone: no nulls, no compression, a fixed number of rows a record batch (row r is in
batch r // n, so that the batches themselves are the offset index), no metadata, no times, no paths.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote

import pyarrow as pa
from pydantic import Field

from omni_cli.config import Settings, read_document
from omni_cli.errors import DataError, UsageError
from omni_cli.files import (
    commit_json,
    commit_stream,
    hash_json,
    read_receipt,
    receipt_path,
    sync_folder,
    verified_receipt,
)
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.splits import SplitRule
from omni_cli.samples.tables import FRAMES, Frames, ShardTables

FORMAT: Literal[2] = 2  # 1: pictures without the bars beside them
MANIFEST_FILE = "manifest.json"
WINDOW_ROWS_PER_BATCH = 1024
_MAX_NAME = 200


class ShardFile(Settings):
    """Size and content hash of one file of a recording."""

    size: int
    sha256: str


class RecordingEntry(Settings):
    """One recording of a shard set."""

    id: str  # provenance only: it never reaches a prompt or a target
    group: str
    windows: dict[str, int]  # by split
    num_frames: int  # pictures stored, all cameras
    dropped: dict[str, int]  # reason -> windows
    max_skew_us: int
    frames_file: ShardFile
    windows_file: ShardFile


class SkewStats(Settings):
    """Spread between cameras at one instant, over all windows (the largest of each window)."""

    median_us: int
    max_us: int


class Manifest(Settings):
    """What a shard set is: everything that its bytes depend on, and nothing of when or where it was made."""

    format: Literal[2] = FORMAT
    recipe: str
    settings: dict[str, Any]  # the recipe's [sample] and [split] tables
    preprocess: Preprocess
    source: str
    provenance: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # revisions, licences, grids, teachers
    split_rule: SplitRule
    recordings: tuple[RecordingEntry, ...]  # sorted by id
    refused: dict[str, str] = Field(default_factory=dict)  # recording -> reason, found by etl
    quarantined: dict[str, str] = Field(default_factory=dict)  # recording -> reason, found by audit
    skew: SkewStats

    @property
    def fingerprint(self) -> str:
        """The hash of the whole manifest, and so of every file it lists."""
        return hash_json(self.model_dump(mode="json"))

    def count(self, split: str) -> int:
        """Return the number of windows of one split."""
        return sum(entry.windows.get(split, 0) for entry in self.recordings)

    @property
    def dropped(self) -> dict[str, int]:
        """Windows that were refused, by reason."""
        reasons = sorted({reason for entry in self.recordings for reason in entry.dropped})
        return {reason: sum(entry.dropped.get(reason, 0) for entry in self.recordings) for reason in reasons}


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards."""

    folder: Path
    manifest: Manifest

    def windows(self, recording_id: str) -> pa.Table:
        """Read the windows of one recording."""
        return open_stream(windows_path(self.folder, recording_id))

    def frames(self, recording_id: str) -> pa.Table:
        """Read the frames of one recording, every picture of it, into memory."""
        return open_stream(frames_path(self.folder, recording_id))

    def tokens(self, recording_id: str, sidecar_key: str) -> pa.Table:
        """Read the token sidecar of one recording; raises as `tokens_file`."""
        return open_stream(self.tokens_file(recording_id, sidecar_key))

    def tokens_file(self, recording_id: str, sidecar_key: str) -> Path:
        """Return the file of the token sidecar of one recording.

        Raises:
            DataError: this sidecar is not there.
        """
        path = tokens_path(self.folder, recording_id, sidecar_key)
        if not path.is_file():
            raise DataError(f"{self.folder}: has no tokens for this model and template; {_REMAKE.format(self.folder)}")
        return path

    def damaged(self) -> list[str]:
        """Return the files whose content is not what the manifest says; reads every byte."""
        return [
            str(path.relative_to(self.folder))
            for entry in self.manifest.recordings
            for path, file in _listed(self.folder, entry)
            if verified_receipt(path, expect={"sha256": file.sha256}) is None
        ]


_MAKE_ANEW = "make them anew with the same omni etl, and --out {}"
_REMAKE = "finish it with the same omni etl, and --out {}"
DAMAGED_REMEDY = "omni audit tells what else is damaged; make the shards again with omni etl"


def recording_folder(folder: Path, recording_id: str) -> Path:
    """Return the folder of one recording."""
    return folder / "recordings" / safe_name(recording_id)


def frames_path(folder: Path, recording_id: str) -> Path:
    """Return the file of one recording's frames."""
    return recording_folder(folder, recording_id) / "frames.arrow"


def windows_path(folder: Path, recording_id: str) -> Path:
    """Return the file of one recording's windows."""
    return recording_folder(folder, recording_id) / "windows.arrow"


def tokens_path(folder: Path, recording_id: str, sidecar_key: str) -> Path:
    """Return the file of one recording's tokens."""
    return folder / "tokens" / sidecar_key / f"{safe_name(recording_id)}.arrow"


def safe_name(recording_id: str) -> str:
    """Return a file name that no id can use to leave its folder: everything but letters, digits and _-~ is escaped.

    Raises:
        DataError: the id is empty or too long for a file name.
    """
    name = quote(recording_id, safe="").replace(".", "%2E")
    if not 0 < len(name) <= _MAX_NAME:
        raise DataError(f"recording id {recording_id[:40]!r} cannot name a file; expected 1..{_MAX_NAME} characters")
    return name


def write_stream(table: pa.Table, stream: BinaryIO, rows_per_batch: int) -> None:
    """Write an Arrow IPC stream with a fixed number of rows a batch."""
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for start in range(0, table.num_rows, rows_per_batch):  # one batch in memory at a time, not the table twice
            writer.write_table(table.slice(start, rows_per_batch).combine_chunks())


def open_stream(path: Path) -> pa.Table:
    """Read an Arrow IPC stream into memory.

    Raises:
        DataError: it is no such stream.
    """
    try:
        return pa.ipc.open_stream(path.read_bytes()).read_all()
    except (pa.ArrowException, OSError) as error:
        raise not_a_stream(path, error) from None


def not_a_stream(path: Path, error: Exception) -> DataError:
    """Return the error of a file that cannot be read as an Arrow stream."""
    why = " ".join(str(error).split())
    return DataError(f"{path}: cannot be read as an Arrow stream ({why}); {DAMAGED_REMEDY}")


def write_recording(folder: Path, recording_id: str, tables: ShardTables, unit_key: str, **facts: Any) -> None:
    """Write one recording's tables, frames first: the receipt of its windows says that the unit is done.

    The frames are decoded here, while they are written. Once they are whole a published manifest is taken back, and
    the receipt of windows that were made from something else: they would be taken for those of the new frames.

    Args:
        folder: of the shard set.
        recording_id: names the recording's folder.
        tables: what to write.
        unit_key: hash of everything the tables depend on.
        facts: what else the receipt of the windows tells.

    Raises:
        DataError: a table has a null, or a video is damaged.
    """
    _refuse_nulls(recording_id, "windows", tables.windows)

    def frames(stream: BinaryIO) -> None:
        _write_frames(recording_id, tables.frames, stream)
        retract_manifest(folder)
        _retract_windows(windows_path(folder, recording_id), unit_key)

    windows = partial(write_stream, tables.windows, rows_per_batch=WINDOW_ROWS_PER_BATCH)
    commit_stream(frames_path(folder, recording_id), frames, unit_key=unit_key, rows=tables.frames.num_rows)
    commit_stream(windows_path(folder, recording_id), windows, unit_key=unit_key, rows=tables.windows.num_rows, **facts)


def _retract_windows(path: Path, unit_key: str) -> None:
    receipt = read_receipt(path)
    if receipt is not None and receipt.get("unit_key") != unit_key:
        receipt_path(path).unlink(missing_ok=True)
        sync_folder(path.parent)


def _write_frames(recording_id: str, frames: Frames, stream: BinaryIO) -> None:
    with pa.ipc.new_stream(stream, FRAMES) as writer:
        for batch in frames.batches():
            _refuse_nulls(recording_id, "frames", batch)
            writer.write_batch(batch)
            del batch  # before the next is filled


def _refuse_nulls(recording_id: str, name: str, table: pa.Table | pa.RecordBatch) -> None:
    if any(column.null_count for column in table.columns):
        raise DataError(f"{recording_id}: the {name} table has nulls; a shard holds none")


def finished_recording(folder: Path, recording_id: str, unit_key: str) -> dict[str, Any] | None:
    """Return the receipt of a recording's windows if both its files verify and were made from `unit_key`."""
    expect = {"unit_key": unit_key}
    if verified_receipt(frames_path(folder, recording_id), expect=expect) is None:
        return None
    return verified_receipt(windows_path(folder, recording_id), expect=expect)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a shard set: from now on it can be opened."""
    commit_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))


def retract_manifest(folder: Path) -> None:
    """Take back a published shard set before one of its files changes."""
    path = folder / MANIFEST_FILE
    if path.is_file():
        path.unlink(missing_ok=True)
        sync_folder(folder)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: it is not one of this format.
    """
    try:
        return read_document(path, Manifest, f"a manifest of shards of format {FORMAT}")
    except DataError as error:
        raise DataError(f"{error}; {_MAKE_ANEW.format(path.parent)}") from None


def open_shards(folder: Path) -> ShardSet:
    """Open a finished shard set: its manifest verifies and every file has the listed size.

    Raises:
        UsageError: there is no such folder.
        DataError: the folder is empty or unfinished, or its files are not those of its manifest.
    """
    if not folder.is_dir():
        raise UsageError(f"no shard folder {folder}; make one with: omni etl --out {folder}")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        if any(folder.iterdir()) and not (folder / "recordings").is_dir():
            raise DataError(f"{folder}: is no shard folder, it has no {MANIFEST_FILE}; shards are made by: omni etl")
        state = "unfinished" if (folder / "recordings").is_dir() else "empty"
        raise DataError(f"{folder}: {state}, it has no {MANIFEST_FILE}; {_REMAKE.format(folder)}")
    if verified_receipt(path) is None:
        raise DataError(f"{path}: does not match its receipt; {_REMAKE.format(folder)}")
    manifest = read_manifest(path)
    for entry in manifest.recordings:
        for file_path, file in _listed(folder, entry):
            if not file_path.is_file() or file_path.stat().st_size != file.size:
                raise DataError(f"{file_path}: missing or not the {file.size} bytes listed; {_REMAKE.format(folder)}")
    if not manifest.recordings:
        raise DataError(f"{folder}: holds no recording; {_REMAKE.format(folder)}")
    return ShardSet(folder, manifest)


def listed_file(path: Path) -> ShardFile:
    """Return what a file's receipt says of it.

    Raises:
        DataError: it has no receipt.
    """
    receipt = read_receipt(path)
    if receipt is None:
        raise DataError(f"{path}: has no receipt; run omni etl again")
    return ShardFile(size=receipt["size"], sha256=receipt["sha256"])


def _listed(folder: Path, entry: RecordingEntry) -> list[tuple[Path, ShardFile]]:
    return [
        (frames_path(folder, entry.id), entry.frames_file),
        (windows_path(folder, entry.id), entry.windows_file),
    ]
