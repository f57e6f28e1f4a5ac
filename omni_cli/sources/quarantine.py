"""What is set aside: kept on disk, with its reason in `quarantine.json`, until it is put back.

A recording is listed; its bytes stay where they are, since its files are parts of zips that other recordings share.
A whole file that is damaged is moved to `quarantine/`, under its own path: then the next fetch brings it anew, and
until it is back the recordings in it are barred. Nothing is deleted. `omni audit --restore` undoes all of it; to use
one recording again delete its line.

Every stage that reads raw data leaves both out: `etl` lists them in its manifest, `infer` refuses them by their reason.
Shards that were made before know nothing of the list: run etl again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError

QUARANTINE_FILE = "quarantine.json"
QUARANTINE_FOLDER = "quarantine"


@dataclass
class Restored:
    """What was undone of one folder's quarantine, and what was not; names are relative to the folder."""

    put_back: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)  # recordings whose line was deleted
    kept: dict[str, str] = field(default_factory=dict)  # what stays in quarantine -> why


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
    target = _free(folder / QUARANTINE_FOLDER / name)
    noted = target.relative_to(folder / QUARANTINE_FOLDER).as_posix()
    document["moved"][name] = {"reason": reason, "recordings": sorted(recordings), "place": noted}
    _write(folder, document)
    target.parent.mkdir(parents=True, exist_ok=True)
    for source, place in ((folder / name, target), (files.receipt_path(folder / name), files.receipt_path(target))):
        if source.exists():
            source.rename(place)
    files.sync_folder(target.parent)
    files.sync_folder((folder / name).parent)
    return target


def restore(folder: Path) -> Restored:
    """Move everything back that was set aside, and delete every line; what was made anew since stays as it is.

    A receipt goes before its file: a part of a chunk without one would be taken for the whole chunk, and a receipt
    without a file is worth nothing. A line is deleted when its file is back: killed anywhere, the next call goes on.

    Args:
        folder: the source folder or shard set.

    Raises:
        DataError: the list is not one that omni wrote.
    """
    document, found = _read(folder), Restored()
    for name, moved in sorted(document["moved"].items()):
        aside, place = folder / QUARANTINE_FOLDER / moved["place"], folder / name
        if aside.exists() and place.exists():
            found.kept[name] = f"it was made anew since; the old one stays in {QUARANTINE_FOLDER}/{moved['place']}"
            continue
        if aside.exists():
            _put_back(aside, place)
            found.put_back.append(name)
        if place.exists():
            del document["moved"][name]
            _write(folder, document)
        else:
            found.kept[name] = "neither in its place nor in quarantine; fetch it, or make it, again"
    found.released = sorted(document["recordings"])
    if found.released:
        _write(folder, {**document, "recordings": {}})
    return found


def _put_back(aside: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if files.receipt_path(aside).exists():
        files.receipt_path(aside).rename(files.receipt_path(place))
        files.sync_folder(place.parent)
    aside.rename(place)
    files.sync_folder(place.parent)
    files.sync_folder(aside.parent)


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
        moved = {_inside(name): {"reason": str(one["reason"]), "recordings": list(one["recordings"]),
                                 "place": _inside(one.get("place", name))}  # omni 0.3 noted none
                 for name, one in document.get("moved", {}).items()}  # fmt: skip
        return {"recordings": dict(document["recordings"].items()), "moved": moved}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a quarantine list; delete it and run `omni audit --quarantine` again") from None


def _inside(name: Any) -> str:
    """Return a name that stays in its folder.

    Raises:
        ValueError: it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(name)
    return str(path)


def _write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / QUARANTINE_FILE
    files.write_json(path, document)
    return path
