"""What `omni fetch` notes beside PhysicalAI-AV files: parts of chunks in receipts, absent files in the manifest."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import FEATURES, MANIFEST_FILE, REVISION_FILE


def partial_clips(receipt: Mapping[str, Any] | None) -> frozenset[str] | None:
    """Return the clips in a chunk's zip of which only some were fetched; None where nothing says that it is a part."""
    clips = receipt.get("clips") if receipt is not None and receipt.get("partial") else None
    return frozenset(map(str, clips)) if isinstance(clips, list) else None


def upstream_sha256(receipt: Mapping[str, Any]) -> str:
    """Return the hash that the hub promises of a chunk's file, whether all of it is here or some clips."""
    return str(receipt.get("whole", receipt).get("sha256"))


def clips_on_disk(root: Path, features: Iterable[str], chunk: int) -> frozenset[str] | None:
    """Return the clips of a chunk of which any of these features is here; None where one of them is here whole."""
    found: frozenset[str] = frozenset()
    for feature in features:
        path = root / FEATURES[feature].chunk_path(chunk)
        if path.is_file():
            clips = partial_clips(files.read_receipt(path))
            if clips is None:
                return None
            found |= clips
    return found


def read_origin(root: Path) -> dict[str, str]:
    """Return what `omni fetch` and the synthetic world note of a folder's origin; nothing where they did not.

    Raises:
        DataError: the note is damaged.
    """
    path = root / REVISION_FILE
    if not path.is_file():
        return {}
    try:
        origin = files.read_json(path)
        if isinstance(origin["revision"], str):
            return dict(origin)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{path}: damaged, expected the revision that this folder holds; delete it and run omni fetch again"
    )


def absent_upstream(root: Path) -> frozenset[str]:
    """Return the paths that `omni fetch` found to be missing on the hub.

    Raises:
        DataError: the manifest is not one that omni wrote.
    """
    path = root / MANIFEST_FILE
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(files.read_json(path)["absent"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a manifest of omni fetch; delete it and run omni fetch again") from None
