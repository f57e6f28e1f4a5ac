"""Token ids beside the shards: made for one tokenizer and template, remade in seconds for another."""

from functools import partial
from typing import Any

import pyarrow as pa

from omni_cli.errors import DataError
from omni_cli.files import commit_stream, remove_leftovers, verified_receipt
from omni_cli.models.losses import IGNORED
from omni_cli.recipe import Tokenized
from omni_cli.report import Console
from omni_cli.samples.shards import WINDOW_ROWS_PER_BATCH, RecordingEntry, ShardSet, tokens_path, write_stream


def ensure_sidecar(shards: ShardSet, recipe: Any, console: Console) -> str | None:
    """Make what is missing of the token sidecar that a recipe needs, and return its key.

    Args:
        shards: a finished shard set.
        recipe: one that is not `Tokenized` needs no sidecar: None is returned.
        console: shows the progress.

    Raises:
        DataError: a window has no label that counts.
    """
    if not isinstance(recipe, Tokenized):
        return None
    key = recipe.sidecar_key(shards.manifest.preprocess)
    folder = tokens_path(shards.folder, "any", key).parent
    if folder.is_dir():
        remove_leftovers(folder)
    todo = [entry for entry in shards.manifest.recordings if not _is_done(shards, entry, key)]
    with console.progress("tokens", len(todo), "recordings") as step:
        for entry in todo:
            _write(shards, entry, key, recipe)
            step.advance()
    return key


def _is_done(shards: ShardSet, entry: RecordingEntry, key: str) -> bool:
    path = tokens_path(shards.folder, entry.id, key)
    return verified_receipt(path, expect={"windows_sha256": entry.windows_file.sha256}) is not None


def _write(shards: ShardSet, entry: RecordingEntry, key: str, recipe: Tokenized) -> None:
    windows = shards.windows(entry.id)
    table = recipe.encode_windows(windows, shards.manifest.preprocess)
    _check_labels(table, windows, entry.id)
    write = partial(write_stream, table, rows_per_batch=WINDOW_ROWS_PER_BATCH)
    path = tokens_path(shards.folder, entry.id, key)
    commit_stream(path, write, windows_sha256=entry.windows_file.sha256, rows=table.num_rows)


def _check_labels(tokens: pa.Table, windows: pa.Table, recording: str) -> None:
    """Refuse a window of which nothing would be learned, here where its labels are at hand.

    Raises:
        DataError: there is one.
    """
    for labels, window in zip(tokens["labels"], windows["window"], strict=True):
        if not (labels.values.to_numpy() != IGNORED).any():
            raise DataError(
                f"window {window} of {recording} has no label that counts: its prompt would be read, and nothing "
                "learned; make its shards again with omni etl, and other labels"
            )
