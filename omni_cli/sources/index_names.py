"""Names in a PhysicalAI-AV folder's indices: a repository is written by strangers, and a name may be an attack.

No path is made of what features.csv says (formats/physical_ai_av.py has the templates), nor of a clip's name as it is.
What would leave its folder all the same, or be two things on another system, is left out and told. This package reads:
the rules for what a hub lists, which is written, are in downloads/paths.py.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES_FILE, LEGACY_PRESENCE_FILE, PRESENCE_FILE
from omni_cli.sources.parquet_tables import read_table

_CLIP = re.compile(r"[0-9A-Za-z_-]{1,100}")
_PART = r"[0-9A-Za-z_-](?:[0-9A-Za-z._-]{0,180}[0-9A-Za-z_-])?"
_PATH = re.compile(rf"{_PART}(/{_PART}){{0,8}}")
_DEVICE = re.compile(r"(?:^|/)(con|prn|aux|nul|com\d|lpt\d)(?:[./]|$)", re.IGNORECASE)  # of Windows
_MOST_SHOWN = 80


def unsafe_clip_reason(clip: object) -> str | None:
    """Return why something must not name a clip, or None where it may."""
    if not isinstance(clip, str) or not _CLIP.fullmatch(clip):
        return "not 1 to 100 letters, digits, _ and -"
    return "a device of Windows" if _DEVICE.search(clip) else None


def unsafe_clips(clips: Iterable[object]) -> dict[object, str]:
    """Return the names that no clip may have, and those that differ from an earlier one in the case of letters."""
    found: dict[object, str] = {}
    spelled: dict[str, str] = {}
    for clip in clips:
        if reason := unsafe_clip_reason(clip):
            found[clip] = reason
        elif (known := spelled.setdefault(str(clip).casefold(), str(clip))) != clip:
            found[clip] = f"{known} but for the case of its letters"
    return found


def unsafe_index_names(root: Path) -> dict[str, str]:
    """Return what the indices in a folder name and must not: where, and the name in a printable form -> why.

    One that cannot be read is named as a whole.
    """
    found: dict[str, str] = {}
    for index in (FEATURES_FILE, CLIP_INDEX_FILE, PRESENCE_FILE, LEGACY_PRESENCE_FILE):
        try:
            found |= _unsafe_names(root, index) if (root / index).is_file() else {}
        except DataError as error:
            found[index] = str(error).removeprefix(f"{root / index}: ")
    return found


def shown(name: object) -> str:
    """Return a name in letters that can be printed, and not many of them."""
    text = ascii(name)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _unsafe_names(root: Path, index: str) -> dict[str, str]:
    if index == FEATURES_FILE:
        return dict(_of_features(root / index))
    clips = read_table(root / index, str(root / index), ("clip_id",)).column("clip_id").to_pylist()
    return {f"{index}: clip {shown(clip)}": reason for clip, reason in unsafe_clips(clips).items()}


def _of_features(path: Path) -> Iterator[tuple[str, str]]:
    for row in _rows(path):
        for name in _names(row):
            filled = name.replace("{chunk_id:04d}", "0000").replace("{clip_id}", "0")  # format() would read attributes
            if not _PATH.fullmatch(filled) or _DEVICE.search(filled):
                yield f"{FEATURES_FILE}: {shown(name)}", "not a plain path inside the folder"


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.reader(stream))[1:]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV table ({error}); fetch it again") from None


def _names(row: list[str]) -> list[str]:
    """Return a row's feature, folder, chunk path and members."""
    try:
        members = json.loads(row[3]) if len(row) > 3 and row[3] else {}
    except (ValueError, RecursionError):
        members = {}
    named = members.values() if isinstance(members, dict) else ()
    return [*row[:3], *(name for name in named if isinstance(name, str))]
