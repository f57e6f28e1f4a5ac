"""`DATA/ledger.json`: which data under a licence that ends came here, since when, and where every copy lies.

    {"format": 1,
     "licences": [{"source", "repository", "licence", "revision", "first_fetched": date,
                   "copies": [{"path", "kind": "raw" or "shards", "since": date}]}],
     "purged": [the same, and "purged": date, "certificate"]}

A path inside DATA is noted relative to it, so that DATA may move; another is absolute. A copy is entered before its
first byte is written: what a killed run left is listed too.
"""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError

LEDGER_FILE = "ledger.json"
FORMAT = 1
RAW, SHARDS = "raw", "shards"
_FACTS = frozenset({"source", "repository", "licence", "revision", "first_fetched", "copies"})


def register_copy(
    data: Path, source: str, place: Path, kind: str, *, repository: str, licence: str, revision: str,
    since: str | None = None,
) -> None:  # fmt: skip
    """Enter a copy into the ledger; one that is there already is left as it is.

    Args:
        data: the folder with the ledger.
        source: the source's name.
        place: the folder of the copy.
        kind: `RAW` or `SHARDS`.
        repository: where the data come from.
        licence: that they came under.
        revision: of the repository.
        since: the day on which they first came, in ISO 8601; None: today.

    Raises:
        DataError: the ledger cannot be read.
    """
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with updated_ledger(data) as ledger:
        entry = next((entry for entry in ledger["licences"] if entry["source"] == source), None)
        if entry is None:
            entry = {"source": source, "repository": repository, "licence": licence, "revision": revision,
                     "first_fetched": since or today, "copies": []}  # fmt: skip
            ledger["licences"].append(entry)
        entry["first_fetched"] = min(entry["first_fetched"], since or today)
        path = noted_path(data, place)
        if path not in [copy["path"] for copy in entry["copies"]]:
            entry["copies"].append({"path": path, "kind": kind, "since": today})


def read_ledger(data: Path) -> dict[str, Any]:
    """Return the ledger of a data folder; an empty one where there is none.

    Raises:
        DataError: it is not one that omni wrote.
    """
    path = data / LEDGER_FILE
    if not path.is_file():
        return {"format": FORMAT, "licences": [], "purged": []}
    try:
        ledger = files.read_json(path)
        if ledger["format"] == FORMAT and all(_is_entry(entry) for entry in (*ledger["licences"], *ledger["purged"])):
            return dict(ledger)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"{path}: not a ledger; mend it by hand, it says where the copies of licensed data lie")


def _is_entry(entry: dict[str, Any]) -> bool:
    return entry.keys() >= _FACTS and all(isinstance(copy["path"], str) and "kind" in copy for copy in entry["copies"])


@contextlib.contextmanager
def updated_ledger(data: Path) -> Iterator[dict[str, Any]]:
    """Yield the ledger and write what became of it, one process after the other."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / f".{LEDGER_FILE}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = read_ledger(data)
        ledger = read_ledger(data)
        yield ledger
        if ledger != before:
            files.remove_leftovers(data)
            files.write_json(data / LEDGER_FILE, ledger)


def noted_path(data: Path, place: Path) -> str:
    """Return how a folder is noted: relative to DATA where it is inside, else absolute."""
    absolute, inside = (Path(os.path.normpath(path.absolute())) for path in (place, data))
    return (absolute.relative_to(inside) if absolute.is_relative_to(inside) else absolute).as_posix()


def place_of(data: Path, path: str) -> Path:
    """Return the folder that a noted path stands for, without `..` in it."""
    return Path(os.path.normpath(data.absolute() / path))


def first_fetched(data: Path, place: Path) -> str | None:
    """Return the day on which the data of a listed copy first came, in ISO 8601; None where it is not listed.

    Raises:
        DataError: the ledger cannot be read.
    """
    noted = noted_path(data, place)
    days = (e["first_fetched"] for e in read_ledger(data)["licences"] for copy in e["copies"] if copy["path"] == noted)
    return next(days, None)
