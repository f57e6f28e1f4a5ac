"""Whether a folder holds files of one revision, by what omni fetch noted: 26.09 changed calibrations in place."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.formats.physical_ai_av import MANIFEST_FILE, REVISION_FILE
from omni_cli.stages.checks.findings import Finding, refuse, warn

_COMMIT = re.compile(r"[0-9a-f]{40}")


def revision_findings(root: Path) -> Iterator[Finding]:
    """Compare the pinned revision with the manifest of what was fetched, and that with the receipts.

    Args:
        root: the folder with the indices; one that omni did not fetch has neither, and says nothing.
    """
    pinned, manifest = _read(root / REVISION_FILE), _read(root / MANIFEST_FILE)
    held = str(pinned.get("revision", ""))
    if _COMMIT.fullmatch(root.name) and held and held != root.name:
        yield refuse("revision-drift", f"{REVISION_FILE} says {held}, the snapshot is {root.name}")
    if manifest and held and manifest.get("revision") != held:
        yield refuse("revision-drift", f"{REVISION_FILE} says {held}, {MANIFEST_FILE} says {manifest.get('revision')}")
    for name, facts in sorted(_table(manifest, "files").items()):
        receipt = files.read_receipt(root / name)
        listed = facts.get("git_sha1") if isinstance(facts, dict) else None
        if receipt is not None and receipt.get("git_sha1") != listed:
            yield refuse("revision-drift", f"{name}: not of the revision that {MANIFEST_FILE} lists; fetch it again")
    for name, why in sorted(_table(manifest, "absent").items()):
        yield warn("absent-upstream", f"{name}: {why}")


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object that omni wrote; an empty one where there is none that can be read."""
    try:
        document = files.read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key, {})
    return table if isinstance(table, dict) else {}
