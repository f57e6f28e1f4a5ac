"""Checks of what omni itself wrote: every file against its receipt, the receipts themselves, and what has none."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.samples.shards import frames_path, listed_file, open_shards, windows_path
from omni_cli.sources.quarantine import QUARANTINE_FOLDER
from omni_cli.stages.audit.subset import Subset
from omni_cli.stages.checks.findings import Finding, refuse, warn
from omni_cli.stages.runs import FINAL, RUN_FILE

_AGAIN = "make or fetch it again"
# Of what omni writes: a file that ends so and that no receipt lists was left half-done, or came another way.
_SEALED = (".arrow", ".parquet", ".zip", ".mp4", ".hevc", ".ts", ".safetensors", ".onnx", ".pt")


@dataclass(frozen=True)
class Listed:
    """A file that a receipt lists."""

    path: Path
    name: str  # relative to the audited folder
    size: Any
    sha256: Any
    remedy: str = _AGAIN


@dataclass
class Read:
    """How much of a store was read and hashed."""

    files: int = 0
    of_files: int = 0
    bytes: int = 0
    of_bytes: int = 0

    def add(self, other: "Read") -> None:
        """Add up two stores."""
        self.files, self.of_files = self.files + other.files, self.of_files + other.of_files
        self.bytes, self.of_bytes = self.bytes + other.bytes, self.of_bytes + other.of_bytes


@dataclass
class Receipts:
    """What the receipts under a folder say, and what is wrong with them."""

    folder: Path
    listed: list[Listed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)  # receipts of an older omni, which no hash proves


def read_receipts(folder: Path) -> Receipts:
    """Read every receipt under a folder, and its own."""
    found = Receipts(folder)
    own = [files.receipt_path(folder)] if files.receipt_path(folder).is_file() else []
    for path in [*own, *(path for path in _walk(folder) if path.name.endswith(files.RECEIPT_SUFFIX))]:
        _read_one(path, found)
    if found.unproved:
        detail = f"{len(found.unproved)} receipts, such as {found.unproved[0]}, hold no hash of themselves: of omni 0.2"
        found.findings.append(warn("old-receipt", f"{detail}, or damaged; what they list is compared all the same"))
    return found


def size_findings(receipts: Receipts) -> Iterator[Finding]:
    """Compare the size of every listed file."""
    for file in receipts.listed:
        if not file.path.is_file():
            yield refuse("missing-artefact", f"{file.name}: has a receipt and is not there; {file.remedy}", file.name)
        elif (found := file.path.stat().st_size) != file.size:
            detail = f"{file.name}: {found} bytes, {file.size} expected; {file.remedy}"
            yield refuse("wrong-size", detail, file.name)


def content_findings(
    receipts: Receipts, subset: Subset, threads: int, advance: Callable[[int], None]
) -> tuple[list[Finding], Read]:
    """Hash the listed files of a subset.

    Args:
        receipts: what lists them.
        subset: which of them are read.
        threads: how many at once; hashing leaves the interpreter's lock.
        advance: is told how many megabytes were read.
    """
    whole = [file for file in receipts.listed if file.path.is_file() and file.path.stat().st_size == file.size]
    chosen = [file for file in whole if subset.holds(file.name)]
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for file, sha256 in zip(chosen, pool.map(lambda one: files.sha256_of(one.path), chosen), strict=True):
            if sha256 != file.sha256:
                detail = f"{file.name}: not the bytes of its receipt; {file.remedy}"
                found.append(refuse("wrong-content", detail, file.name))
            advance(file.size)
    return found, Read(len(chosen), len(whole), sum(one.size for one in chosen), sum(one.size for one in whole))


def stray_findings(receipts: Receipts) -> Iterator[Finding]:
    """Name what killed processes left, and files that omni writes sealed and that no receipt lists."""
    covered = {file.path for file in receipts.listed}
    for path in _walk(receipts.folder):
        name = path.relative_to(receipts.folder)
        if files.TEMPORARY_MARK in path.name:
            yield warn("leftover", f"{name}: of a process that was killed; may be deleted")
        elif receipts.listed and path.suffix in _SEALED and path not in covered and path.is_file():
            yield warn("unsealed", f"{name}: has no receipt, so nothing proves its bytes; {_AGAIN}")


def shard_findings(folder: Path) -> Iterator[Finding]:
    """Check that a shard set opens, and that its manifest and receipts agree; contents are `content_findings`' work.

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
                detail = f"{path.relative_to(folder)}: receipt and manifest differ; run omni etl again"
                yield refuse("not-in-manifest", detail, path.relative_to(folder).as_posix())


def unfinished_findings(folder: Path) -> Iterator[Finding]:
    """Name a run whose training has not ended."""
    if (folder / RUN_FILE).is_file() and not files.receipt_path(folder / FINAL).is_file():
        yield warn("unfinished-run", f"{folder.name}: has no sealed {FINAL} weights; finish it with: omni train")


def _read_one(path: Path, found: Receipts) -> None:
    artefact = path.with_name(path.name.removesuffix(files.RECEIPT_SUFFIX))
    receipt = files.read_receipt(artefact)
    if receipt is None or not _is_as_written(path):
        name = _name(artefact, found.folder)
        found.findings.append(refuse("torn-receipt", f"{name}: its receipt is damaged; {_AGAIN}", name))
        return
    if files.RECEIPT_PROOF not in files.read_json(path):
        found.unproved.append(_name(path, found.folder))
    listed = receipt.get("files")
    for name, facts in {".": receipt}.items() if listed is None else listed.items():
        found.listed.append(_listed(artefact / name, found.folder, facts))
    for name, facts in receipt.get("beside", {}).items():  # of a run: its manifest, settings and history
        remedy = "the weights do not depend on it; restore it from a copy"
        found.listed.append(_listed(artefact.parent / name, found.folder, facts, remedy))


def _is_as_written(path: Path) -> bool:
    """Say whether a receipt has the bytes that omni writes: a flip that changes its spelling alone is one too."""
    rendered = json.dumps(files.read_json(path), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return path.read_bytes() == rendered.encode()


def _listed(path: Path, folder: Path, facts: Mapping[str, Any], remedy: str = _AGAIN) -> Listed:
    return Listed(path, _name(path, folder), facts.get("size"), facts.get("sha256"), remedy)


def _name(path: Path, folder: Path) -> str:
    """Return a name relative to the folder; of the folder's own receipt and what lies beside it, to its parent."""
    return path.relative_to(folder if path.is_relative_to(folder) else folder.parent).as_posix()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything under a folder, sorted, but for what was set aside and for hidden staging folders."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name != QUARANTINE_FOLDER and not path.name.startswith("."):
                yield from _walk(path)
        else:
            yield path
