"""The repository's global tables, and the one that omni reads to choose: which chunk holds each clip."""

from pathlib import Path

import pyarrow
from pyarrow import parquet

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import (
    CLIP_INDEX_FILE,
    COLLECTION_FILE,
    FEATURES_FILE,
    LEGACY_PRESENCE_FILE,
    PRESENCE_FILE,
)

REQUIRED_INDICES = (FEATURES_FILE, CLIP_INDEX_FILE)
INDICES = (*REQUIRED_INDICES, PRESENCE_FILE, LEGACY_PRESENCE_FILE, COLLECTION_FILE)


def chunk_of_clip(path: Path) -> dict[str, int]:
    """Read the clip index.

    Raises:
        DataError: the table is unreadable or lacks its columns.
    """
    try:
        table = parquet.read_table(path, columns=["clip_id", "chunk"])
        return dict(zip(table["clip_id"].to_pylist(), table["chunk"].to_pylist(), strict=True))
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a clip index with clip_id and chunk columns ({reason}); fetch it again") from None
