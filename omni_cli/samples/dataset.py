"""Shards as a map-style dataset: random access by memory map, a window's pictures put together when it is read."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from omni_cli.formats.video import Uint8Array
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import FRAME_ROWS_PER_BATCH, RecordingEntry, ShardSet

ALL = "all"  # as a split: every window
_OF_THE_PICTURES = ("frames", "timestamps_us")  # columns that say where pictures lie, for `pictures` alone
_MAX_OPEN = 256  # recordings whose files stay mapped


class WindowDataset(Dataset[dict[str, Any]]):
    """The windows of one split (or of `all`), ordered by recording and time.

    A row is a dict: `recording` (str), every scalar column of the windows as a Python value, every list of targets as
    a flat tensor, `pictures` uint8 in the window shape of the preprocessing, and with a sidecar `input_ids` and
    `labels` int64 (tokens,) and `position_ids` int64 (4, tokens). Files open on first use, in whichever process that
    is; a pickled dataset opens its own.
    """

    def __init__(self, shards: ShardSet, split: str, sidecar_key: str | None = None) -> None:
        self.shards = shards
        self.split = split
        self.sidecar_key = sidecar_key
        self.entries = tuple(entry for entry in shards.manifest.recordings if _count(entry, split))
        self._ends = tuple(accumulate(_count(entry, split) for entry in self.entries))
        self._open: dict[str, _OpenRecording] = {}

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing that the shards were made with."""
        return self.shards.manifest.preprocess

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.row(index), "pictures": self.pictures(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def row(self, index: int) -> dict[str, Any]:
        """Return one row without its pictures."""
        recording, position = self._locate(index)
        return recording.row(position)

    def pictures(self, index: int) -> Tensor:
        """Return the pictures of one window, uint8 in its window shape."""
        recording, position = self._locate(index)
        return torch.from_numpy(recording.pictures(position, self.preprocess))

    def recording_of(self, index: int) -> str:
        """Return the id of the recording that a window is from, without opening it."""
        return self.entries[self._entry_of(index)].id

    def token_lengths(self) -> list[int]:
        """Return the number of tokens of every row of the sidecar, without reading pictures."""
        return [length for entry in self.entries for length in self._recording(entry).token_lengths()]

    def _entry_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return bisect_right(self._ends, index)

    def _locate(self, index: int) -> tuple["_OpenRecording", int]:
        number = self._entry_of(index)
        return self._recording(self.entries[number]), index - (self._ends[number - 1] if number else 0)

    def _recording(self, entry: RecordingEntry) -> "_OpenRecording":
        recording = self._open.get(entry.id)
        if recording is None:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            recording = self._open[entry.id] = _OpenRecording(self.shards, entry, self.split, self.sidecar_key)
        return recording


class _OpenRecording:
    """The mapped files of one recording; `position` counts its windows of one split."""

    def __init__(self, shards: ShardSet, entry: RecordingEntry, split: str, sidecar_key: str | None) -> None:
        self._id = entry.id
        self._windows = shards.windows(entry.id)
        self._pictures = _Pictures(shards.frames(entry.id), shards.manifest.preprocess)
        self._tokens = shards.tokens(entry.id, sidecar_key) if sidecar_key else None
        self._rows = [row for row, name in enumerate(self._windows["split"].to_pylist()) if split in (name, ALL)]
        columns = [field for field in self._windows.schema if field.name not in _OF_THE_PICTURES]
        self._scalars = {one.name: self._windows[one.name] for one in columns if not pa.types.is_list(one.type)}
        self._lists = {one.name: self._windows[one.name] for one in columns if pa.types.is_list(one.type)}

    def row(self, position: int) -> dict[str, Any]:
        row = self._rows[position]
        values = {name: column[row].as_py() for name, column in self._scalars.items()}
        lists = {name: torch.tensor(column[row].values.to_numpy()) for name, column in self._lists.items()}
        return {"recording": self._id, **values, **lists, **self._token_row(row)}

    def pictures(self, position: int, preprocess: Preprocess) -> Uint8Array:
        frames = self._windows["frames"][self._rows[position]].as_py()
        window = np.zeros(preprocess.window_shape, dtype=np.uint8)
        views = len(preprocess.views)
        for number, instant in enumerate(window):
            rows = frames[number * views : (number + 1) * views]
            preprocess.place(instant, [self._pictures[row] for row in rows])
        return window

    def token_lengths(self) -> list[int]:
        assert self._tokens is not None
        return [len(self._tokens["input_ids"][row]) for row in self._rows]

    def _token_row(self, row: int) -> dict[str, Tensor]:
        if self._tokens is None:
            return {}
        columns = {
            name: torch.tensor(self._tokens[name][row].values.to_numpy(), dtype=torch.int64)
            for name in ("input_ids", "labels", "position_ids")
        }
        return {**columns, "position_ids": columns["position_ids"].reshape(4, -1)}


def _count(entry: RecordingEntry, split: str) -> int:
    return sum(entry.windows.values()) if split == ALL else entry.windows.get(split, 0)


class _Pictures:
    """The pictures of a mapped frames table, each a view of the file."""

    def __init__(self, frames: pa.Table, preprocess: Preprocess) -> None:
        columns = [frames[name].to_numpy().tolist() for name in ("width_px", "height_px")]
        self._shapes = [preprocess.picture_shape(*size) for size in zip(*columns, strict=True)]
        self._blocks = [_block(batch["pixels"]) for batch in frames.to_batches()]

    def __getitem__(self, frame: int) -> Uint8Array:
        number, row = divmod(frame, FRAME_ROWS_PER_BATCH)
        data, offsets = self._blocks[number]
        return data[offsets[row] : offsets[row + 1]].reshape(self._shapes[frame])


def _block(pixels: pa.LargeBinaryArray) -> tuple[Uint8Array, list[int]]:
    """Return the bytes of a batch without copying them, and where each picture begins and the last one ends."""
    _, offsets, data = pixels.buffers()
    return np.frombuffer(data, dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64)[: len(pixels) + 1].tolist()
