"""One recording of a shard set, opened for random access: its numbers, and the pictures of a window put together.

A window's pictures are read once, from the file to where they lie in the window.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from omni_cli.errors import DataError
from omni_cli.files import sha256_of
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.mapped import MappedFile
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import (
    DAMAGED_REMEDY,
    WINDOW_ROWS_PER_BATCH,
    RecordingEntry,
    ShardFile,
    ShardSet,
    frames_path,
    listed_file,
    not_a_stream,
    open_stream,
    windows_path,
)
from omni_cli.scene.clock import Int64Array

_OF_THE_PICTURES = ("frames", "timestamps_us")  # columns that say where pictures lie, for `pictures` alone
_TOKENS = ("input_ids", "labels", "position_ids")
_Run = tuple[slice, slice]  # instants of a window, and the bytes of the file that hold one view's pictures at them


class StoredRecording:
    """The files of one recording; `position` counts its windows of one split (None: of all).

    Raises:
        DataError: a file is not the one that was listed, or its rows make no sense.
        OmniError: the disk does not give a file.
    """

    def __init__(
        self, shards: ShardSet, entry: RecordingEntry, split: str | None, sidecar_key: str | None, *, verify: bool
    ) -> None:
        path, preprocess = windows_path(shards.folder, entry.id), shards.manifest.preprocess
        _check(path, entry.windows_file, verify=verify)
        windows = open_stream(path)
        self._id = entry.id
        self._rows = [row for row, name in enumerate(windows["split"].to_pylist()) if split in (name, None)]
        columns = [field for field in windows.schema if field.name not in _OF_THE_PICTURES]
        plain = [field.name for field in columns if not pa.types.is_list(field.type)]
        values = zip(*(windows[name].to_pylist() for name in plain), strict=True)
        self._scalars = [dict(zip(plain, row, strict=True)) for row in values]
        lists = [field.name for field in columns if pa.types.is_list(field.type)]
        self._lists = {name: _Lists(windows[name].chunks) for name in lists}
        self._window_shape, shape = preprocess.window_shape, preprocess.picture_shape
        file, starts = _open_pictures(frames_path(shards.folder, entry.id), entry.frames_file, prod(shape), verify)
        self._pictures = _Pictures(file, shape, starts[_frames(windows, preprocess, len(starts), path)])
        self._tokens = _open_tokens(shards.tokens_file(entry.id, sidecar_key), verify=verify) if sidecar_key else None

    def row(self, position: int) -> dict[str, Any]:
        """Return a window without its pictures."""
        row = self._rows[position]
        lists = {name: torch.from_numpy(column[row].copy()) for name, column in self._lists.items()}
        tokens = self._tokens.row(row) if self._tokens else {}
        return {"recording": self._id, **self._scalars[row], **lists, **tokens}

    def pictures(self, position: int) -> Uint8Array:
        """Return the pictures of a window in its window shape; in memory as in the file, view after view."""
        instants, views, *shape = self._window_shape
        window, runs = np.empty((views, instants, *shape), dtype=np.uint8), enumerate(self._runs(position))
        self._pictures.file.read([(where, window[view, part]) for view, of_view in runs for part, where in of_view])
        return window.swapaxes(0, 1)

    def pieces(self, position: int) -> tuple[Path, list[slice]]:
        """Return the file of the pictures of a window, and the bytes of it that hold them."""
        return self._pictures.file.path, [where for of_view in self._runs(position) for _, where in of_view]

    def first_view(self, shares: Sequence[float]) -> list[Uint8Array]:
        """Return pictures of the first view as they are stored, each at a share (0 to below 1) of all that are."""
        return self._pictures.of_first_view(shares)

    def token_lengths(self) -> list[int]:
        """Return the number of tokens of each window, of a recording that was opened with its tokens."""
        assert self._tokens is not None
        return [self._tokens.length(row) for row in self._rows]

    def _runs(self, position: int) -> list[list[_Run]]:
        return self._pictures.runs(self._rows[position])


class _Lists:
    """A column of lists, where it lies in memory or in the map of a file."""

    def __init__(self, chunks: Sequence[pa.ListArray]) -> None:
        self._chunks = [(chunk.values.to_numpy(), chunk.offsets.to_pylist()) for chunk in chunks]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        values, start, end = self._find(row)
        return np.asarray(values[start:end])

    def length(self, row: int) -> int:
        _, start, end = self._find(row)
        return end - start

    def _find(self, row: int) -> tuple[npt.NDArray[Any], int, int]:
        number, row = divmod(row, WINDOW_ROWS_PER_BATCH)
        values, offsets = self._chunks[number]
        return values, offsets[row], offsets[row + 1]


class _Tokens:
    """The rows of a tokens file, which are brought when they are asked for."""

    def __init__(self, file: MappedFile) -> None:
        batches = list(file.batches())
        chunks = {name: [batch[name] for batch in batches] for name in _TOKENS}
        file.bring([file.place(chunk.buffers()[1]) for column in chunks.values() for chunk in column])  # the offsets
        self._file, self._columns = file, {name: _Lists(column) for name, column in chunks.items()}

    def row(self, row: int) -> dict[str, Tensor]:
        parts = {name: column[row] for name, column in self._columns.items()}
        self._file.bring([self._file.place(pa.py_buffer(part)) for part in parts.values()])
        tensors = {name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()}
        return {**tensors, "position_ids": tensors["position_ids"].view(4, -1)}

    def length(self, row: int) -> int:
        return self._columns["input_ids"].length(row)


class _Pictures:
    """The pictures of a frames file, all of one shape, by window.

    Args:
        file: that holds them.
        shape: of each.
        starts: (windows, instants, views) where in the file the picture starts that a window shows.
    """

    def __init__(self, file: MappedFile, shape: tuple[int, ...], starts: Int64Array) -> None:
        self.file, self._shape, self._bytes = file, shape, prod(shape)
        self._starts = np.ascontiguousarray(starts.swapaxes(1, 2))

    def runs(self, window: int) -> list[list[_Run]]:
        """Return the pictures of a window as few pieces of the file, view by view."""
        return [self._runs(of_view) for of_view in self._starts[window].tolist()]

    def of_first_view(self, shares: Sequence[float]) -> list[Uint8Array]:
        """Return pictures of the first view, each at a share (0 to below 1) of all that any window shows."""
        starts = np.unique(self._starts[:, 0])
        return [self._picture(int(starts[int(share * len(starts))])) for share in shares]

    def _picture(self, start: int) -> Uint8Array:
        where = slice(start, start + self._bytes)
        self.file.bring([where])
        return self.file.bytes[where].reshape(self._shape)

    def _runs(self, starts: list[int]) -> list[_Run]:
        """Join what lies side by side; plain Python takes a third of the time of numpy for so few."""
        size, count = self._bytes, len(starts)
        breaks = [0, *(place for place in range(1, count) if starts[place] != starts[place - 1] + size), count]
        return [(slice(a, b), slice(starts[a], starts[b - 1] + size)) for a, b in pairwise(breaks)]


def _check(path: Path, listed: ShardFile, *, verify: bool) -> None:
    try:
        size, sha256 = path.stat().st_size, sha256_of(path) if verify else listed.sha256
    except OSError as error:
        raise not_a_stream(path, error) from None
    if size != listed.size:
        raise DataError(f"{path}: holds {size} bytes, not the {listed.size} that are listed; {DAMAGED_REMEDY}")
    if sha256 != listed.sha256:
        raise DataError(f"{path}: its content is not what was written; {DAMAGED_REMEDY}")


def _open_pictures(path: Path, listed: ShardFile, picture_bytes: int, verify: bool) -> tuple[MappedFile, Int64Array]:
    """Return a frames file, and where in it each picture starts."""
    _check(path, listed, verify=verify)
    try:
        file = MappedFile(path)
        starts, ends = _bounds(file)
    except (pa.ArrowException, OSError) as error:
        raise not_a_stream(path, error) from None
    is_inside = starts.min() >= 0 and ends.max() <= len(file.bytes)
    if not is_inside or (ends - starts != picture_bytes).any():
        raise DataError(f"{path}: a picture is not of the size that the preprocessing gives; {DAMAGED_REMEDY}")
    return file, starts


def _bounds(file: MappedFile) -> tuple[Int64Array, Int64Array]:
    """Return where in the file every picture starts and ends."""
    found = []
    for batch in file.batches():
        _, offsets, data = batch["pixels"].buffers()
        file.bring([file.place(offsets)])
        bounds = np.frombuffer(offsets, dtype=np.int64)[: len(batch) + 1] + file.place(data).start
        found.append((bounds[:-1], bounds[1:]))
    starts, ends = (np.concatenate(column) for column in zip(*found, strict=True))
    return starts, ends


def _frames(windows: pa.Table, preprocess: Preprocess, pictures: int, path: Path) -> Int64Array:
    """Return the picture that each window shows at each instant in each view (windows, instants, views)."""
    shape = windows.num_rows, preprocess.num_frames, len(preprocess.views)
    rows = np.asarray(windows["frames"].combine_chunks().flatten().to_numpy(), dtype=np.int64)
    if rows.size != prod(shape) or rows.min() < 0 or rows.max() >= pictures:
        raise DataError(f"{path}: a window shows pictures that are not stored; {DAMAGED_REMEDY}")
    return rows.reshape(shape)


def _open_tokens(path: Path, *, verify: bool) -> _Tokens:
    _check(path, listed_file(path), verify=verify)
    try:
        return _Tokens(MappedFile(path))
    except (pa.ArrowException, OSError) as error:
        raise not_a_stream(path, error) from None
