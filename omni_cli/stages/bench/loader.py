"""How fast shards become tensors and batches, and what share of a bare read of the same bytes that is."""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_cli.errors import DataError
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.recipe import Batch
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.samples.mapped import is_cached
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, Timing, measure
from omni_cli.stages.etl import ensure_sidecar

READ, RAW = "dataset[i]", "preadv"
_BATCHES = 4  # in one go of the loader
_MOST_WINDOWS, _MOST_BYTES = 256, 1 << 30  # in one go of reading
_LEAST_WINDOWS = 64  # in one that is warm, some of them again: two alone take 2 ms, too little to time
_SEED = 20_261
_TRIES, _BUSY_S = 5, 0.05  # a page that the kernel is busy with is not dropped


@dataclass(frozen=True)
class Record:
    """Where the pictures of one window lie."""

    index: int  # of the window
    path: Path
    pieces: tuple[slice, ...]  # of the file, ascending, no byte twice

    @property
    def num_bytes(self) -> int:
        """How many bytes its pictures are."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def bench_loader(inputs: Inputs, repeats: int) -> Part:
    """Time windows on their way from shards to tensors, in random order, and into batches, in one process.

    Beside the reading of windows stands a `preadv` of the very bytes that their pictures are, into one buffer. Cold is
    after the kernel was told to forget the files, and warm is when it holds them.
    """
    keep_freed_blocks()  # as the loader's workers do
    shards, key = inputs.shards, ensure_sidecar(inputs.shards, inputs.recipe, inputs.console)

    def anew() -> WindowDataset:
        return WindowDataset(shards, ALL, key)

    batches, records = _batch_line(inputs, anew(), repeats), chosen_records(anew())
    warm = [*records] * math.ceil(_LEAST_WINDOWS / len(records))
    with _opened({record.path for record in records}) as files:
        timings = _warm(anew(), warm, files, repeats)
        timings |= _cold(anew, records, files, repeats) if _can_forget(files, inputs.console) else {}
    read = {"warm": warm, "cold": records}
    lines = (batches, *(Line(f"{way}, {state}", timings[way, state], _amounts(read[state])) for way, state in timings))
    size = f"{sum(record.num_bytes for record in records) / len(records) / 1e6:.2f} MB each"
    where = f"{shards.folder}, {len(records)} of {counted(len(anew()), 'window')}, {size}"
    return Part("loader", f"{where}, in random order, one process", lines, _shares(timings))


def chosen_records(dataset: WindowDataset) -> list[Record]:
    """Return windows in a random order, of which no two share a picture, up to as many as one go reads."""
    order = list(range(len(dataset)))
    random.Random(_SEED).shuffle(order)
    chosen: list[Record] = []
    taken: dict[Path, list[slice]] = {}
    left = _MOST_BYTES
    for index in order:
        path, pieces = dataset.pieces(index)
        record, others = Record(index, path, tuple(_merged(pieces))), taken.setdefault(path, [])
        if any(one.start < other.stop and other.start < one.stop for one in record.pieces for other in others):
            continue
        if len(chosen) == _MOST_WINDOWS or (chosen and record.num_bytes > left):
            break
        others += record.pieces
        chosen.append(record)
        left -= record.num_bytes
    return chosen


def forget(files: Mapping[Path, int]) -> bool | None:
    """Have the kernel drop open files from its cache, what nobody maps of them.

    Returns:
        Whether it did; None where the file system does not say what is in memory.
    """
    for _ in range(_TRIES):
        for descriptor in files.values():
            os.fdatasync(descriptor)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = [is_cached(descriptor, 0) for descriptor in files.values()]
        if None in cached:
            return None
        if not any(cached):
            return True
        time.sleep(_BUSY_S)
    return False


def _can_forget(files: Mapping[Path, int], console: Console) -> bool:
    forgot = forget(files)
    if forgot is None:
        console.warn("cold may be warm: this file system does not say what of a file is in memory")
    elif not forgot:
        console.warn("no cold figures: this file system keeps in memory what it is told to forget")
    return forgot is not False


def _cold(
    anew: Callable[[], WindowDataset], records: Sequence[Record], files: Mapping[Path, int], repeats: int
) -> dict[tuple[str, str], Timing]:
    """Time both readings, each on files that were forgotten and by a dataset that has none of them open."""
    work = {(READ, "cold"): lambda: _read(anew(), records), (RAW, "cold"): _raw_reader(records, files)}
    return measure(work, repeats, warmups=0, before=lambda: forget(files))


def _warm(
    dataset: WindowDataset, records: Sequence[Record], files: Mapping[Path, int], repeats: int
) -> dict[tuple[str, str], Timing]:
    work = {(READ, "warm"): lambda: _read(dataset, records), (RAW, "warm"): _raw_reader(records, files)}
    return measure(work, repeats)


def _amounts(records: Sequence[Record]) -> dict[str, float]:
    return {"samples": len(records), "MB": sum(record.num_bytes for record in records) / 1e6}


def _read(dataset: WindowDataset, records: Sequence[Record]) -> None:
    for record in records:
        dataset[record.index]


def _raw_reader(records: Sequence[Record], files: Mapping[Path, int]) -> Callable[[], None]:
    buffer = np.empty(max(record.num_bytes for record in records), dtype=np.uint8).data

    def read() -> None:
        for record in records:
            start = 0
            for piece in record.pieces:
                end = start + piece.stop - piece.start
                if os.preadv(files[record.path], [buffer[start:end]], piece.start) != end - start:
                    raise DataError(f"{record.path}: ends early; run omni audit")
                start = end

    return read


def _shares(timings: Mapping[tuple[str, str], Timing]) -> dict[str, float]:
    states = [state for name, state in timings if name == RAW]
    shares = {state: timings[RAW, state].median_s / timings[READ, state].median_s for state in states}
    return {f"{READ} of {RAW}, {state}": share for state, share in shares.items()}


def _merged(pieces: Sequence[slice]) -> list[slice]:
    """Return the same bytes in ascending order, each once."""
    merged: list[slice] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if merged and piece.start <= merged[-1].stop:
            merged[-1] = slice(merged[-1].start, max(merged[-1].stop, piece.stop))
        else:
            merged.append(piece)
    return merged


@contextmanager
def _opened(paths: set[Path]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        yield {path: stack.enter_context(path.open("rb")).fileno() for path in sorted(paths)}


def _batch_line(inputs: Inputs, dataset: WindowDataset, repeats: int) -> Line:
    size = inputs.recipe.train.batch_size
    numbers = [index % len(dataset) for index in range(size * _BATCHES)]
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def load() -> list[Batch]:
        return [_batch(inputs, dataset, batch) for batch in batches]

    timing = measure({"load": load}, repeats)["load"]
    amounts = {"windows": len(numbers), "MB": len(numbers) * dataset.pictures(0).numel() / 1e6}
    return Line(f"{_BATCHES} batches of {size}", timing, amounts)


def _batch(inputs: Inputs, dataset: WindowDataset, numbers: Sequence[int]) -> Batch:
    batch: Batch = inputs.recipe.collate([dataset[number] for number in numbers], dataset.preprocess)
    return batch
