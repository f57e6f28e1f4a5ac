"""What is set aside: kept on disk, with its reason in `quarantine.json`, and undone by hand.

A recording is listed; its bytes stay where they are, since its files are parts of zips that other recordings share.
A whole file that is damaged is moved to `quarantine/`, under its own path: then the next fetch brings it anew, and
until it is back the recordings in it are barred. Nothing is deleted. To use a recording again delete its line; to take
a move back, move the file back.

Every stage that reads raw data leaves both out: `etl` lists them in its manifest, `infer` refuses them by their reason.
Shards that were made before know nothing of the list: run etl again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError

QUARANTINE_FILE = "quarantine.json"
QUARANTINE_FOLDER = "quarantine"


def read_quarantine(folder: Path) -> dict[str, str]:
    """Return recording id -> reason for a source folder; empty where nothing was set aside.

    Raises:
        DataError: the file is not one that omni wrote.
    """
    document = _read(folder)
    barred = {
        str(recording): f"{name} was moved to {QUARANTINE_FOLDER}/ ({moved['reason']}); fetch it again"
        for name, moved in document["moved"].items()
        if not (folder / name).exists()
        for recording in moved["recordings"]
    }
    return barred | {str(recording): str(reason) for recording, reason in document["recordings"].items()}


def write_quarantine(folder: Path, reasons: Mapping[str, str]) -> Path:
    """Add recordings and why they are refused to a source folder's list; return its path."""
    document = _read(folder)
    document["recordings"] = {**document["recordings"], **reasons}
    return _write(folder, document)


def move_to_quarantine(folder: Path, name: str, reason: str, recordings: Iterable[str] = ()) -> Path:
    """Move a file or folder, and its receipt, to the same path under `quarantine/`; return where it lies now.

    The list says so before it is moved: killed between the two, the file is still there, and bars nothing.

    Args:
        folder: the source folder or shard set.
        name: relative to it.
        reason: what is wrong with it.
        recordings: that cannot be used without it.
    """
    document = _read(folder)
    document["moved"][name] = {"reason": reason, "recordings": sorted(recordings)}
    _write(folder, document)
    target = _free(folder / QUARANTINE_FOLDER / name)
    target.parent.mkdir(parents=True, exist_ok=True)
    for source, place in ((folder / name, target), (files.receipt_path(folder / name), files.receipt_path(target))):
        if source.exists():
            source.rename(place)
    files.sync_folder(target.parent)
    files.sync_folder((folder / name).parent)
    return target


def _free(path: Path) -> Path:
    """Return the path, or the first numbered one that is not taken: what was set aside before is kept too."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in range(2, 1 << 20))
    return path if not path.exists() else next(place for place in numbered if not place.exists())


def _read(folder: Path) -> dict[str, Any]:
    path = folder / QUARANTINE_FILE
    if not path.exists():
        return {"recordings": {}, "moved": {}}
    try:
        document = files.read_json(path)
        moved = {str(name): {"reason": str(one["reason"]), "recordings": list(one["recordings"])}
                 for name, one in document.get("moved", {}).items()}  # fmt: skip
        return {"recordings": dict(document["recordings"].items()), "moved": moved}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a quarantine list; delete it and run `omni audit --quarantine` again") from None


def _write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / QUARANTINE_FILE
    files.write_json(path, document)
    return path
