"""Putting every window of a dataset to one model, in batches."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from omni_cli.recipe import BuiltModel, Prediction, Row
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.stages.out_of_memory import in_words

MOST_WINDOWS = 32  # asked about at once, unless a user says how many
MOST_TOKENS = 65_536  # of these windows together: what the profiles train one sample of at most
Pictures = Callable[[int], Tensor]


@dataclass(frozen=True)
class Condition:
    """One row of the table: a name, and what was said of each window."""

    name: str
    predictions: Sequence[Prediction]
    drawn: Sequence[Sequence[Prediction]] = ()  # by chance, k answers of every window


@dataclass(frozen=True)
class Asker:
    """Puts every window of a dataset to one model."""

    recipe: Any
    built: BuiltModel
    dataset: WindowDataset
    console: Console
    batch: int | None = None  # windows at once; None: as `batch_ends` says

    def ask(self, name: str, see: Pictures) -> Condition:
        """Ask about each window while showing what `see` returns for it.

        Raises:
            OmniError: the memory is too small for so many windows at once.
        """
        said: list[Prediction] = []
        for rows in self._blocks(name, see):
            with _in_words(len(rows)):
                said += self.recipe.predict(self.built, rows, self.dataset.preprocess)
        return Condition(name, said)

    def draw(self, number: int, of: int, temperature: float) -> list[Prediction]:
        """Return one answer of each window, drawn by chance; another number, another answer.

        Raises:
            OmniError: as of `ask`.
        """
        said: list[Prediction] = []
        for rows in self._blocks(f"drawn answer {number + 1} of {of}", self.dataset.pictures):
            seeds = [seed_of(row, number) for row in rows]
            with _in_words(len(rows)):
                said += self.recipe.draw(self.built, rows, self.dataset.preprocess, seeds, temperature)
        return said

    def _blocks(self, name: str, see: Pictures) -> Iterator[list[Row]]:
        """Yield the rows of one batch after the other."""
        with self.console.progress(f"eval: {name}", len(self.dataset), "windows") as bar:
            for start, end in pairwise(batch_ends(self._lengths(), self.batch)):
                yield [{**self.dataset.row(index), "pictures": see(index)} for index in range(start, end)]
                bar.advance(end - start)

    def _lengths(self) -> list[int]:
        """Return the tokens of each window; of what has none, nothing."""
        if self.dataset.sidecar_key is None:
            return [0] * len(self.dataset)
        return self.dataset.token_lengths()


def batch_ends(lengths: Sequence[int], batch: int | None) -> list[int]:
    """Return where batches of consecutive windows begin, and the end of the last.

    Args:
        lengths: tokens of each window.
        batch: windows of each batch; None: 32, or fewer where these would hold more than 65,536 tokens as they are
            padded. One window is always a batch, however long.
    """
    if batch is not None:
        return [*range(0, len(lengths), batch), len(lengths)]
    ends, longest = [0], 0
    for index, length in enumerate(lengths):
        longest, count = max(longest, length), index + 1 - ends[-1]
        if count > MOST_WINDOWS or (count > 1 and count * longest > MOST_TOKENS):
            ends.append(index)
            longest = length
    return [*ends, len(lengths)]


def seed_of(row: Row, number: int) -> int:
    """Return the seed of a window's draw: it depends on the window alone, and not on what is asked beside it."""
    text = f"{row['recording']} {row['start_us']} {row['end_us']} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _in_words(windows: int) -> AbstractContextManager[None]:
    """Return a context that says what to do where a batch does not fit the memory.

    Raises:
        OmniError: it does not.
    """
    fewer = f"ask about fewer with --batch {max(windows // 2, 1)}" if windows > 1 else "choose a larger device"
    return in_words(lambda what: f"{what}, too little for {counted(windows, 'window')} at once; {fewer}")
