"""`manifest.json` of a source folder: what came, with hash and date; what came in part; what is absent upstream.

    {"format": 1, "repository": ..., "revision": 40 hex, "licence": ...,
     "files": {PATH: {"size", "sha256", "fetched": date, "git_sha1",
                      and for some clips of a zip "partial": true, "clips", "whole": {"size", "sha256"}}},
     "absent": {PATH: reason}, "skipped": {PATH: reason},
     "unlisted": {PATH: reason} of tables that not every revision has,
     "lacking": {PATH: {"clips", "size", ...}} of zips that hold none of the clips asked for}

It is made from the receipts, which alone say that a file is there; lost or damaged, it is made from them again.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omni_cli import files
from omni_cli.downloads import RemoteFile
from omni_cli.formats.physical_ai_av import LICENCE, MANIFEST_FILE
from omni_cli.sources.quarantine import QUARANTINE_FOLDER

FORMAT = 1
UNLISTED = "not in this revision"
PRUNED = "listed in this revision, and yet 404: pruned"
_TABLES = ("files", "absent", "skipped", "unlisted", "lacking")
_CAME = frozenset({"fetched", "source_sha256"})  # one of them is in each receipt of what came from a hub or a folder
_NOT_UPSTREAM = (".", f"{QUARANTINE_FOLDER}/")
_FACTS = ("size", "sha256", "fetched", "git_sha1", "partial", "clips", "whole")

T = TypeVar("T")


@dataclass
class Record:
    """What a folder's manifest says."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, dict[str, Any]] = field(default_factory=dict)

    def known_file(self, path: str) -> RemoteFile | None:
        """Return what the hub promises of a file, where an earlier call noted it."""
        facts = self.files.get(path) or self.lacking.get(path, {})
        if "git_sha1" not in facts:  # it was imported: nothing is known of the hub's
            return None
        whole = facts.get("whole", facts)
        return RemoteFile(path, whole["size"], facts["git_sha1"], whole["sha256"])


def read_record(folder: Path) -> Record:
    """Return what the manifest of a folder says, or its receipts where there is no whole manifest."""
    path = folder / MANIFEST_FILE
    if files.verified_receipt(path) is None:
        return Record(files=_from_receipts(folder))
    document = files.read_json(path)
    return Record(**{name: document[name] for name in _TABLES})


def recorded_origin(folder: Path) -> dict[str, str]:
    """Return the revision and the first day that the manifest of a folder tells; nothing where it is not whole."""
    path = folder / MANIFEST_FILE
    if files.verified_receipt(path) is None:
        return {}
    document = files.read_json(path)
    days = [facts["fetched"] for facts in document["files"].values() if "fetched" in facts]
    return {"revision": document["revision"], **({"first_fetched": min(days)} if days else {})}


def write_record(folder: Path, repository: str, revision: str, found: Record) -> Path:
    """Enter what is here, by its receipts, and what a fetch found into the manifest; return its path.

    Called with the folder's lock held. A manifest that says the same already is left untouched.

    Args:
        folder: the source folder.
        repository: where the files come from.
        revision: the commit that they belong to.
        found: what is absent and skipped.
    """
    record, here = read_record(folder), _from_receipts(folder)  # of all fetches: one that was killed entered nothing
    document = {
        "format": FORMAT,
        "repository": repository,
        "revision": revision,
        "licence": LICENCE,
        "files": record.files | here,
        "absent": _others(record.absent | found.absent, here),
        "unlisted": _others(record.unlisted | found.unlisted, here),
        "skipped": record.skipped | found.skipped,
        "lacking": _others(record.lacking | found.lacking, here),
    }
    path = folder / MANIFEST_FILE
    if files.verified_receipt(path) is None or files.read_json(path) != document:
        files.commit_json(path, document)
    return path


def _others(table: dict[str, T], here: Container[str]) -> dict[str, T]:
    return {path: value for path, value in table.items() if path not in here}


def _facts(path: Path) -> dict[str, Any] | None:
    receipt = files.read_receipt(path)
    if receipt is None or not _CAME & receipt.keys():  # a record of ours
        return None
    return {key: receipt[key] for key in _FACTS if key in receipt}


def _from_receipts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of every chunk file and index in its place that a receipt vouches for."""
    receipts = folder.rglob(f"*{files.RECEIPT_SUFFIX}")
    places = [path.with_name(path.name.removesuffix(files.RECEIPT_SUFFIX)) for path in receipts]
    named = {path.relative_to(folder).as_posix(): path for path in places if path.is_file()}
    upstream = {name: path for name, path in named.items() if not name.startswith(_NOT_UPSTREAM)}
    return {name: facts for name, path in sorted(upstream.items()) if (facts := _facts(path)) is not None}
