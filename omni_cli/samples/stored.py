"""One recording of a shard set, opened for random access: its numbers, and the pictures of a window put together.

A window's pictures are copied once, from the map of the file to where they lie in the window. That was measured
against `preadv` into a buffer and a copy from there (7 cameras x 16 frames, records of 5.2 MB, ext4): 80 % of a bare
`preadv` of the same bytes against 52 % where the page cache holds them. Where it does not, what the kernel is told to
read ahead comes in 1.5 times as fast as by `preadv`, and 3.5 times as fast as by the faults of a map alone.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
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
from omni_cli.formats.video import Uint8Array
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import (
    DAMAGED_REMEDY,
    WINDOW_ROWS_PER_BATCH,
    RecordingEntry,
    ShardFile,
    ShardSet,
    frames_path,
    map_stream,
    windows_path,
)
from omni_cli.scene.clock import Int64Array

_OF_THE_PICTURES = ("frames", "timestamps_us")  # columns that say where pictures lie, for `pictures` alone
_TOKENS = ("input_ids", "labels", "position_ids")
_Run = tuple[slice, slice]  # instants of a window, and the bytes of the file that hold one view's pictures at them
_FAULT_BYTES = 1 << 17  # what one fault of a map reads ahead by itself
_READ_AHEAD_BYTES = 1 << 20  # the kernel takes no more of one request than the disk takes at a time


class StoredRecording:
    """The mapped files of one recording; `position` counts its windows of one split (None: of all).

    Raises:
        DataError: a file is not the one that was listed, or its rows make no sense.
    """

    def __init__(
        self, shards: ShardSet, entry: RecordingEntry, split: str | None, sidecar_key: str | None, *, verify: bool
    ) -> None:
        windows, _ = _map(windows_path(shards.folder, entry.id), entry.windows_file, verify=verify)
        self._id = entry.id
        self._rows = [row for row, name in enumerate(windows["split"].to_pylist()) if split in (name, None)]
        columns = [field for field in windows.schema if field.name not in _OF_THE_PICTURES]
        plain = [field.name for field in columns if not pa.types.is_list(field.type)]
        values = zip(*(windows[name].to_pylist() for name in plain), strict=True)
        self._scalars = [dict(zip(plain, row, strict=True)) for row in values]
        self._lists = {field.name: _Lists(windows[field.name]) for field in columns if pa.types.is_list(field.type)}
        self._frames = _Lists(windows["frames"])
        self._pictures = _map_pictures(shards, entry, verify=verify)
        first = self._frames[0][: len(shards.manifest.preprocess.views)].tolist()  # a camera's pictures are of one size
        self._layout = _layout(shards.manifest.preprocess, tuple(self._pictures.shapes[row] for row in first))
        tokens = shards.tokens(entry.id, sidecar_key) if sidecar_key else None
        self._tokens = {name: _Lists(tokens[name]) for name in _TOKENS} if tokens is not None else {}

    def row(self, position: int) -> dict[str, Any]:
        """Return a window without its pictures."""
        row = self._rows[position]
        lists = {name: torch.from_numpy(column[row].copy()) for name, column in self._lists.items()}
        return {"recording": self._id, **self._scalars[row], **lists, **self._token_row(row)}

    def pictures(self, position: int) -> Uint8Array:
        """Return the pictures of a window in its window shape; black where none lies."""
        stored, runs = self._pictures, self._runs(position)
        stored.read_ahead([where for of_view in runs for _, where in of_view])
        window = np.empty(self._layout.window_shape, dtype=np.uint8)
        for gap in self._layout.gaps:
            window[gap] = 0
        for place, shape, of_view in zip(self._layout.places, self._layout.shapes, runs, strict=True):
            slot = window[place]
            for instants, where in of_view:
                slot[instants] = stored.data[where].reshape(-1, *shape)
        return window

    def pieces(self, position: int) -> tuple[Path, list[slice]]:
        """Return the file of the pictures of a window, and the bytes of it that hold them."""
        return self._pictures.path, [where for of_view in self._runs(position) for _, where in of_view]

    def token_lengths(self) -> list[int]:
        """Return the number of tokens of each window."""
        return [len(self._tokens["input_ids"][row]) for row in self._rows]

    def _runs(self, position: int) -> list[list[_Run]]:
        frames, views = self._frames[self._rows[position]].tolist(), len(self._layout.shapes)
        return [self._pictures.runs(frames[view::views]) for view in range(views)]

    def _token_row(self, row: int) -> dict[str, Tensor]:
        columns = {name: torch.from_numpy(column[row].astype(np.int64)) for name, column in self._tokens.items()}
        return columns and {**columns, "position_ids": columns["position_ids"].view(4, -1)}


class _Lists:
    """A column of lists where it lies in its file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [(chunk.values.to_numpy(), chunk.offsets.to_pylist()) for chunk in column.chunks]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        number, row = divmod(row, WINDOW_ROWS_PER_BATCH)
        values, offsets = self._chunks[number]
        return np.asarray(values[offsets[row] : offsets[row + 1]])


@dataclass(frozen=True)
class _MappedPictures:
    """The pictures of a frames file; lists are by row."""

    path: Path
    data: Uint8Array  # the whole file
    starts: list[int]
    ends: list[int]
    shapes: list[tuple[int, ...]]

    def runs(self, rows: Sequence[int]) -> list[_Run]:
        """Return the rows of one view, an instant each, as few pieces of the file."""
        starts, ends = [self.starts[row] for row in rows], [self.ends[row] for row in rows]
        breaks = [instant for instant in range(1, len(rows)) if starts[instant] != ends[instant - 1]]
        return [(slice(a, b), slice(starts[a], ends[b - 1])) for a, b in pairwise((0, *breaks, len(rows)))]

    def read_ahead(self, pieces: Sequence[slice]) -> None:
        """Have the kernel read long pieces of the file all at once; the faults of a map wait for one another."""
        if not (long := [piece for piece in pieces if piece.stop - piece.start > _FAULT_BYTES]):
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for piece in long:
                if not is_cached(descriptor, piece.stop - 1):
                    _advise(descriptor, piece)
        finally:
            os.close(descriptor)


def is_cached(descriptor: int, offset: int) -> bool | None:
    """Say whether a byte of an open file is in memory; None where the file system does not tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


def _advise(descriptor: int, piece: slice) -> None:
    for start in range(piece.start, piece.stop, _READ_AHEAD_BYTES):
        os.posix_fadvise(descriptor, start, min(_READ_AHEAD_BYTES, piece.stop - start), os.POSIX_FADV_WILLNEED)


def _map_pictures(shards: ShardSet, entry: RecordingEntry, *, verify: bool) -> _MappedPictures:
    path = frames_path(shards.folder, entry.id)
    frames, file = _map(path, entry.frames_file, verify=verify)
    sizes_px = list(zip(frames["width_px"].to_numpy().tolist(), frames["height_px"].to_numpy().tolist(), strict=True))
    shape_of = {size: shards.manifest.preprocess.picture_shape(*size) for size in set(sizes_px)}
    shapes = [shape_of[size] for size in sizes_px]
    starts, ends = (np.concatenate(side) for side in zip(*_places(frames, file.address), strict=True))
    if (ends - starts).tolist() != list(map(prod, shapes)):
        raise DataError(f"{path}: a picture is not of the size that is listed for it; {DAMAGED_REMEDY}")
    return _MappedPictures(path, np.frombuffer(file, dtype=np.uint8), starts.tolist(), ends.tolist(), shapes)


def _map(path: Path, listed: ShardFile, *, verify: bool) -> tuple[pa.Table, pa.Buffer]:
    table, file = map_stream(path)
    if file.size != listed.size:  # to read behind the end of a map ends the process
        raise DataError(f"{path}: holds {file.size} bytes, not the {listed.size} that are listed; {DAMAGED_REMEDY}")
    if verify and hashlib.sha256(file).hexdigest() != listed.sha256:
        raise DataError(f"{path}: its content is not what was written; {DAMAGED_REMEDY}")
    return table, file


def _places(frames: pa.Table, file_address: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yield where in the file the pictures of each batch start and end."""
    for pixels in frames["pixels"].chunks:
        _, offsets, data = pixels.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[: len(pixels) + 1] + (data.address - file_address)
        yield bounds[:-1], bounds[1:]


@dataclass(frozen=True)
class _Layout:
    """How the pictures of one recording make a window."""

    window_shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of one picture of each view
    places: tuple[tuple[Any, ...], ...]  # of each view's pictures in a window
    gaps: tuple[tuple[Any, ...], ...]  # what no picture covers


@cache
def _layout(preprocess: Preprocess, shapes: tuple[tuple[int, ...], ...]) -> _Layout:
    shape, places = preprocess.window_shape, preprocess.places(shapes)
    covered = np.zeros(shape[1:], dtype=np.bool_)
    for place in places:
        covered[place] = True
    gaps = [(slice(None), *gap) for gap in _rectangles(covered.reshape(*shape[1:3], -1).min(axis=2) == 0)]
    return _Layout(shape, shapes, places, tuple(gaps))


def _rectangles(mask: npt.NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Cut what is true of a mask (rows, columns) into rectangles: bands of equal rows, and runs along each."""
    bands = [0, *(np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1).tolist(), len(mask)]
    found = []
    for top, bottom in pairwise(bands):
        edges = np.flatnonzero(np.diff(mask[top].astype(np.int8), prepend=0, append=0))
        found += [(slice(top, bottom), slice(left, right)) for left, right in edges.reshape(-1, 2).tolist()]
    return found
