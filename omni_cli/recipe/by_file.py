"""What `merge` asks of a recipe whose models are merged in the files of their bases."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch

from omni_cli.recipe import BuiltModel, Mergeable
from omni_cli.samples.preprocess import Preprocess


class FileMerge(Protocol):
    """A merge of an adapter into the files of its base, one tensor at a time."""

    @property
    def types(self) -> Mapping[str, torch.dtype]:
        """Of the tensors that it changes, by the model's names of them: each is rounded to its own once."""

    @property
    def total_bytes(self) -> int:
        """Of the weights that it writes."""

    def write(self, folder: Path, advance: Callable[[int], None]) -> Mapping[str, str]:
        """Write a whole model, and return the sha256 of every tensor by its name.

        Args:
            folder: that is empty.
            advance: told of the bytes of weights that were written.

        Raises:
            DataError: a merged weight is not finite.
        """

    def count_changed(self, folder: Path, digests: Mapping[str, str]) -> int:
        """Return how many tensors of a written folder are not those of `write`, bit for bit."""


@runtime_checkable
class MergeableByFile(Mergeable, Protocol):
    """A recipe whose outputs are logits (tokens, ..., vocabulary), and whose base's own files are merged into."""

    precision: str  # that it loads weights in
    quantization: str  # of the base while the adapter learns; `none` where it is as its files have it

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return the recipe with other values of some fields."""

    def merge_files(self, preprocess: Preprocess, adapter: Path, work: Path) -> FileMerge:
        """Return the merge of an adapter into its base's files, found to fit.

        Args:
            preprocess: of the model.
            adapter: folder of the trained weights.
            work: an empty folder, for a base that has no files: it stays until the merge is written.

        Raises:
            DataError: a tensor of the adapter has no place in the base, or the files are damaged or quantised.
        """

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the model to a device, its weights to another type where one is named."""
