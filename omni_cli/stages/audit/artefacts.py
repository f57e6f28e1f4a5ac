"""Checks of what omni itself wrote: receipts everywhere, manifests of shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.samples.shards import frames_path, listed_file, open_shards, windows_path
from omni_cli.stages.checks.findings import Finding, refuse, warn
from omni_cli.stages.runs import FINAL, RUN_FILE


def receipt_findings(folder: Path, *, deep: bool) -> Iterator[Finding]:
    """Check every receipt under a folder, and name the leftovers of killed processes.

    Args:
        folder: searched to any depth.
        deep: hash every file; else only its size is compared.
    """
    own = [files.receipt_path(folder)] if files.receipt_path(folder).is_file() else []
    for path in [*own, *sorted(folder.rglob(f"*{files.RECEIPT_SUFFIX}"))]:
        yield from _artefact_findings(path.with_name(path.name.removesuffix(files.RECEIPT_SUFFIX)), folder, deep=deep)
    for path in sorted(folder.rglob(f"*{files.TEMPORARY_MARK}*")):
        yield warn("leftover", f"{path.relative_to(folder)}: of a process that was killed; may be deleted")


def shard_findings(folder: Path) -> Iterator[Finding]:
    """Check that a shard set opens, and that its manifest and receipts agree; contents are `receipt_findings`' work.

    Raises:
        DataError: it cannot be opened; the message says why.
    """
    shards = open_shards(folder)
    for entry in shards.manifest.recordings:
        listed = {
            frames_path(folder, entry.id): entry.frames_file,
            windows_path(folder, entry.id): entry.windows_file,
        }
        for path, file in listed.items():
            try:
                is_same = listed_file(path) == file
            except DataError:
                is_same = False
            if not is_same:
                name = path.relative_to(folder)
                yield refuse("not-in-manifest", f"{name}: receipt and manifest differ; run omni etl again")


def unfinished_findings(folder: Path) -> Iterator[Finding]:
    """Name a run whose training has not ended."""
    if (folder / RUN_FILE).is_file() and not files.receipt_path(folder / FINAL).is_file():
        yield warn("unfinished-run", f"{folder.name}: has no sealed {FINAL} weights; finish it with: omni train")


def _artefact_findings(path: Path, folder: Path, *, deep: bool) -> Iterator[Finding]:
    """Check one artefact: a file, or a folder whose receipt lists its files (weights, checkpoints, exports)."""
    receipt = files.read_receipt(path)
    if receipt is None:
        yield refuse("torn-receipt", f"{path.relative_to(folder)}: its receipt cannot be read; make or fetch it again")
        return
    listed = receipt.get("files")
    for name, facts in {".": receipt}.items() if listed is None else listed.items():
        yield from _file_findings(path / name, facts, folder, deep=deep)


def _file_findings(path: Path, facts: Mapping[str, Any], folder: Path, *, deep: bool) -> Iterator[Finding]:
    name, remedy = path.relative_to(folder), "make or fetch it again"
    if not path.is_file():
        yield refuse("missing-artefact", f"{name}: has a receipt and is not there; {remedy}")
    elif path.stat().st_size != facts.get("size"):
        found, expected = path.stat().st_size, facts.get("size")
        yield refuse("wrong-size", f"{name}: {found} bytes, {expected} expected; {remedy}")
    elif deep and files.sha256_of(path) != facts.get("sha256"):
        yield refuse("wrong-content", f"{name}: not the bytes of its receipt; {remedy}")
