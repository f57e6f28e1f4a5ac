"""Recordings set aside: kept on disk, listed with a reason in `quarantine.json`.

Every stage that reads raw data leaves them out: `etl` lists them in its manifest, `infer` refuses them by their reason.
Shards that were made before know nothing of the list: run etl again.
"""

from collections.abc import Mapping
from pathlib import Path

from omni_cli import files
from omni_cli.errors import DataError

QUARANTINE_FILE = "quarantine.json"


def read_quarantine(folder: Path) -> dict[str, str]:
    """Return recording id -> reason for a source folder; empty where nothing was set aside.

    Raises:
        DataError: the file is not one that omni wrote.
    """
    path = folder / QUARANTINE_FILE
    if not path.exists():
        return {}
    try:
        reasons = files.read_json(path)["recordings"]
        return {str(recording): str(reason) for recording, reason in reasons.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a quarantine list; delete it and run `omni audit --quarantine` again") from None


def write_quarantine(folder: Path, reasons: Mapping[str, str]) -> Path:
    """Add recordings and why they are refused to a source folder's list; return its path."""
    path = folder / QUARANTINE_FILE
    files.write_json(path, {"recordings": {**read_quarantine(folder), **reasons}})
    return path
