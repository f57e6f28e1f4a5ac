"""The frames of a shard, decoded while they are written: no more than a batch of pictures is in memory at a time.

Rows lie view after view, so that the pictures which a window takes from one view lie side by side. Views that are cut
from the same frames of a camera, which are decoded once, take turns in blocks that fill a batch together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from omni_cli.formats.video import Uint8Array
from omni_cli.samples.tables import FRAME_ROWS_PER_BATCH, FRAMES, Frames
from omni_cli.scene.clock import Int64Array


@dataclass(frozen=True)
class StoredViews:
    """Views of one camera, cut from the same n frames."""

    names: tuple[str, ...]
    frame_index: Int64Array  # (n,) in the camera's video, ascending
    timestamp_us: Int64Array  # (n,) their true times
    size_px: tuple[int, int]  # width and height of every picture
    picture_bytes: int
    decode: Callable[[], Iterator[Sequence[Uint8Array]]]  # frame by frame: a picture of each view

    @property
    def rows(self) -> Int64Array:
        """Where each picture lies among the rows of these views (views, n)."""
        frame, views = np.arange(len(self.frame_index)), len(self.names)
        of_block = FRAME_ROWS_PER_BATCH // views
        begins = frame // of_block * of_block
        in_block = np.minimum(of_block, len(frame) - begins)  # the last block may be shorter
        return np.stack([begins * views + view * in_block + frame - begins for view in range(views)])


def row_of_view(stored: Sequence[StoredViews]) -> list[Int64Array]:
    """Return for each view, in order, the row of each of its pictures in the frames table."""
    firsts = np.cumsum([0, *(of.rows.size for of in stored)])
    return [rows + first for of, first in zip(stored, firsts, strict=False) for rows in of.rows]


def frame_batches(stored: Sequence[StoredViews]) -> Frames:
    """Return the frames table; nothing is decoded until its batches are asked for, and again each time they are.

    Args:
        stored: what lies in the table, in order.
    """
    table = _Rows.of(stored)
    return Frames(len(table.names), lambda: _batches(table, stored))


@dataclass(frozen=True)
class _Rows:
    """What is known of every row (n,) before anything is decoded."""

    names: list[str]
    frame_index: Int64Array
    timestamp_us: Int64Array
    width_px: Int64Array
    height_px: Int64Array
    picture_bytes: Int64Array

    @classmethod
    def of(cls, stored: Sequence[StoredViews]) -> "_Rows":
        parts = [_rows_of(one) for one in stored]
        names = [name for of_names, _ in parts for name in of_names]
        numbers = np.concatenate([np.zeros((5, 0), np.int64), *(numbers for _, numbers in parts)], axis=1)
        return cls(names, *numbers)


def _rows_of(stored: StoredViews) -> tuple[list[str], Int64Array]:
    view, frame = np.divmod(np.argsort(stored.rows.ravel()), len(stored.frame_index))
    same = np.array([*stored.size_px, stored.picture_bytes])[:, None].repeat(len(view), axis=1)
    names = [stored.names[number] for number in view]
    return names, np.stack([stored.frame_index[frame], stored.timestamp_us[frame], *same])


def _batches(table: _Rows, stored: Sequence[StoredViews]) -> Iterator[pa.RecordBatch]:
    begun: dict[int, _Batch] = {}
    for row, picture in _pictures(stored):
        number, place = divmod(row, FRAME_ROWS_PER_BATCH)
        batch = begun.setdefault(number, _Batch(table, number))
        batch.put(place, picture)
        del batch, picture  # nothing is held while the next are filled
        while begun and begun[min(begun)].is_full:
            yield begun.pop(min(begun)).finish()


def _pictures(stored: Sequence[StoredViews]) -> Iterator[tuple[int, Uint8Array]]:
    """Yield (row, picture) in the order of decoding."""
    first = 0
    for of in stored:
        rows = of.rows + first
        for places, pictures in zip(rows.T.tolist(), of.decode(), strict=True):
            yield from zip(places, pictures, strict=True)
        first += rows.size


@dataclass
class _Batch:
    """Rows of one batch, filled in any order."""

    table: _Rows
    number: int
    missing: int = field(init=False)
    offsets: Int64Array = field(init=False)
    body: Uint8Array = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.table.picture_bytes[self._span]
        self.missing = len(sizes)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.body = np.empty(int(self.offsets[-1]), dtype=np.uint8)

    @property
    def _span(self) -> slice:
        return slice(self.number * FRAME_ROWS_PER_BATCH, (self.number + 1) * FRAME_ROWS_PER_BATCH)

    @property
    def is_full(self) -> bool:
        return not self.missing

    def put(self, place: int, picture: Uint8Array) -> None:
        self.body[self.offsets[place] : self.offsets[place + 1]].reshape(picture.shape)[:] = picture
        self.missing -= 1

    def finish(self) -> pa.RecordBatch:
        """Wrap the rows without copying the pictures."""
        table, span = self.table, self._span
        buffers = [None, pa.py_buffer(self.offsets), pa.py_buffer(self.body)]
        columns = [
            pa.array(table.names[span], pa.string()),
            pa.array(table.frame_index[span], pa.int32()),
            pa.array(table.timestamp_us[span], pa.int64()),
            pa.array(table.width_px[span], pa.int32()),
            pa.array(table.height_px[span], pa.int32()),
            pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.offsets) - 1, buffers),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=FRAMES)
