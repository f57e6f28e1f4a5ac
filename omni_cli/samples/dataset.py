"""Shards as a map-style dataset: random access by memory map, a window's pictures put together when it is read."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import RecordingEntry, ShardSet
from omni_cli.samples.stored import StoredRecording

ALL = "all"  # as a split: every window
_MAX_OPEN = 256  # recordings whose files stay mapped


class WindowDataset(Dataset[dict[str, Any]]):
    """The windows of one split (or of `all`), ordered by recording and time.

    A row is a dict: `recording` (str), every scalar column of the windows as a Python value, every list of targets as
    a flat tensor, `pictures` uint8 in the window shape of the preprocessing, and with a sidecar `input_ids` and
    `labels` int64 (tokens,) and `position_ids` int64 (4, tokens). Files open on first use, in whichever process that
    is; a pickled dataset opens its own. Where `verify` is set, their hashes are checked then, once a process.

    Raises:
        DataError: a file of a recording is damaged, as far as that was looked for; when it is opened.
    """

    def __init__(self, shards: ShardSet, split: str, sidecar_key: str | None = None, *, verify: bool = False) -> None:
        self.shards = shards
        self.verify = verify
        self.split = split
        self.sidecar_key = sidecar_key
        self.entries = tuple(entry for entry in shards.manifest.recordings if _count(entry, split))
        self._ends = tuple(accumulate(_count(entry, split) for entry in self.entries))
        self._open: dict[str, StoredRecording] = {}
        self._verified: set[str] = set()

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing that the shards were made with."""
        return self.shards.manifest.preprocess

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.row(index), "pictures": self.pictures(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_verified": set()}

    def row(self, index: int) -> dict[str, Any]:
        """Return one row without its pictures."""
        recording, position = self._locate(index)
        return recording.row(position)

    def pictures(self, index: int) -> Tensor:
        """Return the pictures of one window, uint8 in its window shape."""
        recording, position = self._locate(index)
        return torch.from_numpy(recording.pictures(position))

    def pieces(self, index: int) -> tuple[Path, list[slice]]:
        """Return the file that holds the pictures of one window, and which of its bytes they are."""
        recording, position = self._locate(index)
        return recording.pieces(position)

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

    def _locate(self, index: int) -> tuple[StoredRecording, int]:
        number = self._entry_of(index)
        return self._recording(self.entries[number]), index - (self._ends[number - 1] if number else 0)

    def _recording(self, entry: RecordingEntry) -> StoredRecording:
        recording = self._open.get(entry.id)
        if recording is None:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            recording = self._open[entry.id] = self._opened(entry)
        return recording

    def _opened(self, entry: RecordingEntry) -> StoredRecording:
        split, verify = None if self.split == ALL else self.split, self.verify and entry.id not in self._verified
        recording = StoredRecording(self.shards, entry, split, self.sidecar_key, verify=verify)
        self._verified |= {entry.id} if verify else set()
        return recording


def _count(entry: RecordingEntry, split: str) -> int:
    return sum(entry.windows.values()) if split == ALL else entry.windows.get(split, 0)
