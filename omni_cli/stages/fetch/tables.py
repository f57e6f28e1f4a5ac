"""The repository's global tables, and the one that omni reads to choose: which chunk holds each clip."""

from pathlib import Path

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import (
    CLIP_INDEX_FILE,
    COLLECTION_FILE,
    FEATURES_FILE,
    LEGACY_PRESENCE_FILE,
    MOST_CHUNKS,
    PRESENCE_FILE,
    REASONING_FILE,
    SPLIT_FILE,
    is_chunk,
)
from omni_cli.sources.index_names import shown, unsafe_clips
from omni_cli.sources.parquet_tables import read_table

REQUIRED_INDICES = (FEATURES_FILE, CLIP_INDEX_FILE)
INDICES = (*REQUIRED_INDICES, PRESENCE_FILE, LEGACY_PRESENCE_FILE, COLLECTION_FILE, SPLIT_FILE, REASONING_FILE)


def chunk_of_clip(path: Path) -> dict[str, int]:
    """Read the clip index: clip id -> chunk, of the ids that a clip may have.

    Raises:
        DataError: the table is unreadable, lacks its columns, or holds what is no chunk number.
    """
    table = read_table(path, str(path), ("clip_id", "chunk"))
    index = dict(zip(table["clip_id"].to_pylist(), table["chunk"].to_pylist(), strict=True))
    for clip, chunk in index.items():
        if not is_chunk(chunk):
            raise DataError(
                f"{path}: clip {shown(clip)} in chunk {shown(chunk)}; a chunk's number is 0 to {MOST_CHUNKS - 1}"
            )
    unsafe = unsafe_clips(index)
    return {clip: chunk for clip, chunk in index.items() if clip not in unsafe}
