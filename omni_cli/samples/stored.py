"""One recording of a shard set, opened for random access: its numbers, and the pictures of a window put together.

A window's pictures are copied once, from the map of the file to where they lie in the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
_SMALL_BYTES = 1 << 20  # a window up to this is cleared as a whole, sooner than the gaps in it
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
        self._pictures = _open_pictures(frames_path(shards.folder, entry.id), entry.frames_file, preprocess, verify)
        self._frames = _frames(windows, preprocess, len(self._pictures.starts), path)
        first = self._frames[0, 0].tolist()  # a camera's pictures are of one size
        self._layout = _layout(preprocess, tuple(self._pictures.shapes[row] for row in first))
        self._tokens = _tokens(shards.tokens_file(entry.id, sidecar_key), verify=verify) if sidecar_key else {}

    def row(self, position: int) -> dict[str, Any]:
        """Return a window without its pictures."""
        row = self._rows[position]
        lists = {name: torch.from_numpy(column[row].copy()) for name, column in self._lists.items()}
        return {"recording": self._id, **self._scalars[row], **lists, **self._token_row(row)}

    def pictures(self, position: int) -> Uint8Array:
        """Return the pictures of a window in its window shape; black where none lies."""
        file, runs = self._pictures.file, self._runs(position)
        file.bring([where for of_view in runs for _, where in of_view])
        window = np.empty(self._layout.window_shape, dtype=np.uint8)
        for gap in self._layout.gaps:
            gap.clear(window)
        for place, shape, of_view in zip(self._layout.places, self._layout.shapes, runs, strict=True):
            slot = window[place]
            for instants, where in of_view:
                slot[instants] = file.bytes[where].reshape(-1, *shape)
        return window

    def pieces(self, position: int) -> tuple[Path, list[slice]]:
        """Return the file of the pictures of a window, and the bytes of it that hold them."""
        return self._pictures.file.path, [where for of_view in self._runs(position) for _, where in of_view]

    def first_view(self, shares: Sequence[float]) -> list[Uint8Array]:
        """Return pictures of the first view as they are stored, each at a share (0 to below 1) of all that are."""
        rows = np.unique(self._frames[:, :, 0])
        return [self._pictures.picture(int(rows[int(share * len(rows))])) for share in shares]

    def token_lengths(self) -> list[int]:
        """Return the number of tokens of each window."""
        return [self._tokens["input_ids"].length(row) for row in self._rows]

    def _runs(self, position: int) -> list[list[_Run]]:
        return self._pictures.runs(self._frames[self._rows[position]])

    def _token_row(self, row: int) -> dict[str, Tensor]:
        columns = {name: torch.from_numpy(column[row].astype(np.int64)) for name, column in self._tokens.items()}
        return columns and {**columns, "position_ids": columns["position_ids"].view(4, -1)}


class _Lists:
    """A column of lists where it lies: in memory, or in the map of a file, of which each list is brought."""

    def __init__(self, chunks: Sequence[pa.ListArray], file: MappedFile | None = None) -> None:
        self._file = file
        if file is not None:
            file.bring([file.place(chunk.buffers()[1]) for chunk in chunks])  # the offsets
        self._chunks = [(chunk.values.to_numpy(), chunk.offsets.to_pylist()) for chunk in chunks]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        values, start, end = self._find(row)
        part = np.asarray(values[start:end])
        if self._file is not None:
            self._file.bring([self._file.place(pa.py_buffer(part))])
        return part

    def length(self, row: int) -> int:
        _, start, end = self._find(row)
        return end - start

    def _find(self, row: int) -> tuple[npt.NDArray[Any], int, int]:
        number, row = divmod(row, WINDOW_ROWS_PER_BATCH)
        values, offsets = self._chunks[number]
        return values, offsets[row], offsets[row + 1]


@dataclass(frozen=True)
class _Pictures:
    """The pictures of a frames file, by row."""

    file: MappedFile
    starts: Int64Array  # (rows,) in the file
    ends: Int64Array  # (rows,)
    shapes: list[tuple[int, ...]]

    def picture(self, row: int) -> Uint8Array:
        where = slice(int(self.starts[row]), int(self.ends[row]))
        self.file.bring([where])
        return self.file.bytes[where].reshape(self.shapes[row])

    def runs(self, rows: Int64Array) -> list[list[_Run]]:
        """Return the rows (instants, views) of a window as few pieces of the file, view by view."""
        starts, ends = self.starts[rows], self.ends[rows]
        is_broken = starts[1:] != ends[:-1]
        whole = zip(starts[0].tolist(), ends[-1].tolist(), is_broken.any(axis=0).tolist(), strict=True)
        return [
            _pieces(starts[:, view], ends[:, view]) if broken else [(slice(0, len(rows)), slice(start, end))]
            for view, (start, end, broken) in enumerate(whole)
        ]


def _pieces(starts: Int64Array, ends: Int64Array) -> list[_Run]:
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    runs = pairwise((0, *breaks.tolist(), len(starts)))
    return [(slice(a, b), slice(int(starts[a]), int(ends[b - 1]))) for a, b in runs]


def _check(path: Path, listed: ShardFile, *, verify: bool) -> None:
    try:
        size, sha256 = path.stat().st_size, sha256_of(path) if verify else listed.sha256
    except OSError as error:
        raise not_a_stream(path, error) from None
    if size != listed.size:
        raise DataError(f"{path}: holds {size} bytes, not the {listed.size} that are listed; {DAMAGED_REMEDY}")
    if sha256 != listed.sha256:
        raise DataError(f"{path}: its content is not what was written; {DAMAGED_REMEDY}")


def _open_pictures(path: Path, listed: ShardFile, preprocess: Preprocess, verify: bool) -> _Pictures:
    _check(path, listed, verify=verify)
    try:
        file = MappedFile(path)
        widths, heights, starts, ends = _columns(file)
    except (pa.ArrowException, OSError) as error:
        raise not_a_stream(path, error) from None
    sizes_px = list(zip(widths.tolist(), heights.tolist(), strict=True))
    shape_of = {size: preprocess.picture_shape(*size) for size in set(sizes_px)}
    shapes = [shape_of[size] for size in sizes_px]
    is_inside = starts.min() >= 0 and ends.max() <= len(file.bytes)
    if not is_inside or (ends - starts).tolist() != list(map(prod, shapes)):
        raise DataError(f"{path}: a picture is not of the size that is listed for it; {DAMAGED_REMEDY}")
    return _Pictures(file, starts, ends, shapes)


def _columns(file: MappedFile) -> list[Int64Array]:
    """Return width and height of every picture, and where in the file it starts and ends."""
    found = []
    for batch in file.batches():
        width, height = (batch[name].buffers()[1] for name in ("width_px", "height_px"))
        _, offsets, data = batch["pixels"].buffers()
        file.bring([file.place(buffer) for buffer in (width, height, offsets)])
        sizes = [np.frombuffer(buffer, dtype=np.int32)[: len(batch)] for buffer in (width, height)]
        bounds = np.frombuffer(offsets, dtype=np.int64)[: len(batch) + 1] + file.place(data).start
        found.append((*sizes, bounds[:-1], bounds[1:]))
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def _frames(windows: pa.Table, preprocess: Preprocess, pictures: int, path: Path) -> Int64Array:
    """Return the picture that each window shows at each instant in each view (windows, instants, views)."""
    shape = windows.num_rows, preprocess.num_frames, len(preprocess.views)
    rows = np.asarray(windows["frames"].combine_chunks().flatten().to_numpy(), dtype=np.int64)
    if rows.size != prod(shape) or rows.min() < 0 or rows.max() >= pictures:
        raise DataError(f"{path}: a window shows pictures that are not stored; {DAMAGED_REMEDY}")
    return rows.reshape(shape)


def _tokens(path: Path, *, verify: bool) -> dict[str, _Lists]:
    _check(path, listed_file(path), verify=verify)
    try:
        file = MappedFile(path)
        batches = list(file.batches())
        return {name: _Lists([batch[name] for batch in batches], file) for name in _TOKENS}
    except (pa.ArrowException, OSError) as error:
        raise not_a_stream(path, error) from None


@dataclass(frozen=True)
class _Gap:
    """A rectangle of a canvas (height, width, ...) that no picture covers."""

    rows: slice
    columns: slice

    def clear(self, window: Uint8Array) -> None:
        """Black it at every instant of a window; numpy writes one item a row in half the time of its bytes."""
        part = window[:, self.rows, self.columns]
        start = self.rows.start * window.strides[1] + self.columns.start * window.strides[2]
        row = np.dtype((np.void, part[0, 0].nbytes))
        np.ndarray(part.shape[:2], row, window.data, start, part.strides[:2])[...] = np.zeros((), row)


@dataclass(frozen=True)
class _Layout:
    """How the pictures of one recording make a window."""

    window_shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of one picture of each view
    places: tuple[tuple[Any, ...], ...]  # of each view's pictures in a window
    gaps: tuple[_Gap, ...]  # what no picture covers, or more of it


@cache
def _layout(preprocess: Preprocess, shapes: tuple[tuple[int, ...], ...]) -> _Layout:
    shape, places = preprocess.window_shape, preprocess.places(shapes)
    covered = np.zeros(shape[1:], dtype=np.bool_)
    for place in places:
        covered[place] = True
    gaps = _rectangles(covered.reshape(*shape[1:3], -1).min(axis=2) == 0)
    if gaps and prod(shape) <= _SMALL_BYTES:
        gaps = [_Gap(slice(0, shape[1]), slice(0, shape[2]))]
    return _Layout(shape, shapes, places, tuple(gaps))


def _rectangles(mask: npt.NDArray[np.bool_]) -> list[_Gap]:
    """Cut what is true of a mask (rows, columns) into rectangles: bands of equal rows, and runs along each."""
    bands = [0, *(np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1).tolist(), len(mask)]
    found = []
    for top, bottom in pairwise(bands):
        edges = np.flatnonzero(np.diff(mask[top].astype(np.int8), prepend=0, append=0))
        found += [_Gap(slice(top, bottom), slice(left, right)) for left, right in edges.reshape(-1, 2).tolist()]
    return found
