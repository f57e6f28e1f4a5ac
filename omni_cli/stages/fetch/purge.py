"""`omni fetch --purge`: every copy of data under a licence that ends is deleted, and it is shown that none is left.

A copy is what the ledger lists, the source's raw folder, every shard folder whose provenance names the licence,
half-made ones too, and the pages of `omni audit` in DATA, which show pictures of the data. What is found is entered
into the ledger before anything is deleted, so that a killed purge, run again, finishes and certifies all of it. No link
is followed: a copy behind one is named, and is the user's to delete. Weights are no copy of the data; the runs that
learned from them are listed by name.
"""

import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError, refused_by_machine
from omni_cli.files import RECEIPT_SUFFIX
from omni_cli.formats.physical_ai_av import LICENCE, REPOSITORY
from omni_cli.report import Console
from omni_cli.stages import licences
from omni_cli.stages.fetch import landing
from omni_cli.stages.ledger import RAW, SHARDS, noted_path, place_of, read_ledger, register_copy, updated_ledger
from omni_cli.stages.raw_lock import alone
from omni_cli.stages.run_file import RUN_FILE, shards_of

PENDING_FILE = "purge.pending.json"
CERTIFICATE = "purge-certificate"
_PAGE = "audit page"
_PAGES = "*audit.html"  # what omni audit calls them
_PAGE_FOLDERS = (".", "raw", "shards")


@dataclass(frozen=True)
class PurgeRequest:
    """One call of `omni fetch --purge`."""

    data: Path
    source: str
    runs: Path
    dry_run: bool = False
    is_choosy: bool = False  # chunks, clips or cameras were named too


@dataclass(frozen=True)
class Copy:
    """One copy on disk."""

    path: str  # as the ledger notes it
    kind: str
    place: Path


def purge(request: PurgeRequest, console: Console) -> dict[str, Any]:
    """Delete every copy of a source's data, look again, and write a certificate; a dry run lists them.

    Raises:
        UsageError: the source is under no licence that ends, or a part is named.
        OmniError: another omni fetches or reads the data; or copies are left, behind a link, or the disk refuses:
            then there is no certificate.
    """
    if request.is_choosy:
        raise UsageError("--purge deletes every copy, not some: leave out --chunks, --clips, --cameras and --features")
    if request.source != licences.SOURCE:
        raise UsageError(
            f"--purge: {request.source} data are under no licence that ends; delete their folders yourself"
        )
    copies, derived = find_copies(request), derived_runs(request)
    if copies:
        console.table("copies", ("copy", "kind", "files", "size"), [_row(request, copy) for copy in copies])
    for run in derived:
        console.warn(f"{run} learned from these data: weights and reports are not deleted; do what the licence asks")
    result = {"source": request.source, "licence": LICENCE, "dry_run": request.dry_run,
              "copies": [copy.path for copy in copies], "derived_runs": derived}  # fmt: skip
    if request.dry_run:
        console.say(f"would delete {len(copies)} copies of what lies in {request.data}")
        return {**result, "remaining": [copy.path for copy in copies], "certificate": None}
    with _held(request, copies):
        certificate = _purge(request, copies, console)
    return {**result, "remaining": [], "certificate": certificate}


def find_copies(request: PurgeRequest) -> tuple[Copy, ...]:
    """Return every copy that is on disk: what the ledger lists, and what lies in DATA without it."""
    data = request.data
    listed = [(place_of(data, copy["path"]), copy["kind"]) for copy in _entry(request).get("copies", ())]
    folders = sorted(path for path in (data / "shards").glob("*") if _is_of_the_licence(path))
    pages = sorted(path for folder in _PAGE_FOLDERS for path in (data / folder).glob(_PAGES))
    found = [(data / "raw" / request.source, RAW), *((path, SHARDS) for path in folders)]
    found += [(path, _PAGE) for path in pages] if any(os.path.lexists(path) for path, _ in (*listed, *found)) else []
    noted = {noted_path(data, place): kind for place, kind in (*found, *listed)}
    copies = {path: Copy(path, kind, place_of(data, path)) for path, kind in noted.items()}
    return tuple(copy for copy in copies.values() if os.path.lexists(copy.place))


def derived_runs(request: PurgeRequest) -> list[str]:
    """Return the folders of the runs that learned from shards of these data, whether those are still here or not."""
    ledger = read_ledger(request.data)
    entries = [entry for entry in (*ledger["licences"], *ledger["purged"]) if entry["source"] == request.source]
    listed = {place_of(request.data, copy["path"]) for entry in entries for copy in entry["copies"]}
    listed |= {copy.place.absolute() for copy in find_copies(request)}
    runs = sorted(path.parent for path in request.runs.glob(f"*/{RUN_FILE}"))
    return [str(run) for run in runs if shards_of(run) in listed]


def _entry(request: PurgeRequest) -> dict[str, Any]:
    entries = (entry for entry in read_ledger(request.data)["licences"] if entry["source"] == request.source)
    return next(entries, {})


def _is_of_the_licence(folder: Path) -> bool:
    """Return whether a shard folder, finished or not, says that it was made of such data.

    Its manifest says so, or else the receipt of a recording.
    """
    documents = itertools.chain(folder.glob("*.json"), folder.glob(f"recordings/*/*{RECEIPT_SUFFIX}"))
    return any(_names_the_licence(document) for document in documents if document.is_file())


def _names_the_licence(document: Path) -> bool:
    try:
        return bool(LICENCE in files.read_json(document).get("provenance", {}).get("licence", ()))
    except (ValueError, AttributeError, TypeError):  # torn, or another document: the ledger or another receipt tells
        return False


@contextmanager
def _held(request: PurgeRequest, copies: Sequence[Copy]) -> Iterator[None]:
    """Hold every copy against whoever reads it, and the raw folder against fetches; all ask for it before they begin.

    Raises:
        HeldError: an etl, a training or another omni uses one.
    """
    raw = request.data / "raw" / request.source
    folders = [copy.place for copy in copies if copy.place.is_dir() and not copy.place.is_symlink()]
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():  # some are listed by two paths
            held.enter_context(alone(folder))
        if raw.is_dir():
            held.enter_context(files.exclusive(raw, "fetching into"))
        yield


def _purge(request: PurgeRequest, copies: Sequence[Copy], console: Console) -> str | None:
    pending = request.data / PENDING_FILE
    begun = _begun(pending)
    if not copies and not begun and not _entry(request):
        console.say(f"{request.data}: no copy is here or listed; nothing to delete")
        return None
    _register(request, copies)
    sure = [copy for copy in copies if copy.path in begun or _is_ours(request, copy)]
    files.write_json(pending, begun | {copy.path: _told(copy) for copy in sure if copy.path not in begun})
    problems = [f"{copy.place} does not look like shards of these data" for copy in copies if copy not in sure]
    for copy in sure:
        problems += _linked(request, copy) or _delete(copy.place)
    problems += [f"{copy.place} is still there" for copy in find_copies(request)]
    if problems:
        raise OmniError(f"{len(problems)} things are left, the first: {problems[0]}; delete it yourself and run again")
    return _certify(request, console)


def _register(request: PurgeRequest, copies: Sequence[Copy]) -> None:
    revision = _revision(request)
    for copy in copies:
        register_copy(request.data, request.source, copy.place, copy.kind, repository=REPOSITORY, licence=LICENCE,
                      revision=revision)  # fmt: skip


def _revision(request: PurgeRequest) -> str:
    try:
        return landing.pinned_revision(request.data / "raw" / request.source) or "unknown"
    except DataError:  # damage is no reason to keep the data
        return "unknown"


def _begun(pending: Path) -> dict[str, Any]:
    """Return what an earlier purge, that was killed, noted of the copies that it began to delete.

    Raises:
        DataError: the note is damaged.
    """
    if not pending.is_file():
        return {}
    try:
        return dict(files.read_json(pending))
    except (ValueError, TypeError):
        raise DataError(f"{pending}: damaged, expected what a purge began to delete; delete it and run again") from None


def _is_ours(request: PurgeRequest, copy: Copy) -> bool:
    """Return whether a copy may be deleted: where omni does not put it by itself, it must show what it is."""
    place, data = copy.place, Path(os.path.normpath(request.data.absolute()))
    if copy.kind == _PAGE or place == data / "raw" / request.source or place.parent == data / "shards":
        return True
    return _is_of_the_licence(place) or _is_empty(place)


def _is_empty(folder: Path) -> bool:
    return next(_walk(folder), None) is None


def _told(copy: Copy) -> dict[str, Any]:
    """Return what the certificate says of a copy: the hashes in its receipts, and no name of a file or clip."""
    paths = list(_walk(copy.place))
    places = [path.with_name(path.name.removesuffix(RECEIPT_SUFFIX)) for path in paths if _is_receipt(path)]
    receipts = [files.read_receipt(place) or {} for place in places]
    hashes = sorted(receipt["sha256"] for receipt in receipts if "sha256" in receipt)
    size_bytes = sum(path.lstat().st_size for path in paths)
    return {"kind": copy.kind, "files": len(paths), "bytes": size_bytes, "sha256": hashes}


def _is_receipt(path: Path) -> bool:
    return path.name.endswith(RECEIPT_SUFFIX) and path.is_file()


def _row(request: PurgeRequest, copy: Copy) -> tuple[object, ...]:
    if not _is_ours(request, copy):
        return copy.path, copy.kind, "?", "not what the ledger says"
    sizes = [path.lstat().st_size for path in _walk(copy.place)]
    return copy.path, copy.kind, len(sizes), landing.size_text(sum(sizes))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file and link of a copy; no link is followed, and a folder that is one itself holds nothing."""
    if folder.is_file() and not folder.is_symlink():
        yield folder
    for here, folders, names in os.walk("" if folder.is_symlink() else folder):
        yield from (Path(here, name) for name in sorted(names))
        yield from (Path(here, name) for name in sorted(folders) if Path(here, name).is_symlink())


def _linked(request: PurgeRequest, copy: Copy) -> list[str]:
    """Return why a copy is not touched: it, or a folder between DATA and it, is a link to elsewhere."""
    data = request.data.absolute()
    above = [path for path in copy.place.absolute().parents if path.is_relative_to(data) and path != data]
    links = [path for path in (copy.place, *above) if path.is_symlink()]
    return [f"{path} is a link to {path.readlink()}, which is not followed" for path in links[:1]]


def _delete(folder: Path) -> list[str]:
    """Delete a folder, held open by its descriptor so that nobody can put a link in its place; return what is left."""
    problems: list[str] = []
    if folder.is_file():
        folder.unlink()
    if not folder.is_dir():  # or it was listed by two paths, and is gone
        return problems
    for here, folders, names, descriptor in os.fwalk(folder, topdown=False, follow_symlinks=False):
        for name in (*names, *folders):
            try:
                _remove(name, descriptor, Path(here))
            except OSError as error:
                problems.append(str(refused_by_machine(error, Path(here, name)) or error))
            except _LinkError as error:
                problems.append(str(error))
    if not problems and folder.is_dir():
        problems += _emptied(folder)
    return problems


def _emptied(folder: Path) -> list[str]:
    try:
        folder.rmdir()
    except OSError as error:  # another process put something there meanwhile
        return [str(refused_by_machine(error, folder) or f"{folder}: {str(error.strerror).lower()}")]
    return []


class _LinkError(Exception):
    """A link in a copy: what it leads to may be a copy too."""


def _remove(name: str, descriptor: int, here: Path) -> None:
    mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        raise _LinkError(f"{here / name} is a link to {os.readlink(name, dir_fd=descriptor)}, which is not followed")
    if stat.S_ISDIR(mode):
        os.rmdir(name, dir_fd=descriptor)
    else:
        os.unlink(name, dir_fd=descriptor)


def _certify(request: PurgeRequest, console: Console) -> str:
    """Write the certificate, close the ledger's entry, and forget that a purge was under way; in this order."""
    pending = request.data / PENDING_FILE
    deleted, entry = files.read_json(pending), _entry(request)
    facts = {key: entry[key] for key in ("source", "repository", "licence", "revision", "first_fetched")}
    document = {"format": 1, **facts, "purged": landing.today(), "deleted": deleted, "remaining": 0}
    path = request.data / f"{CERTIFICATE}-{landing.today()}-{files.hash_json(document)[:8]}.json"
    files.write_json(path, document)
    with updated_ledger(request.data) as ledger:
        ledger["licences"] = [other for other in ledger["licences"] if other["source"] != request.source]
        ledger["purged"].append({**entry, "purged": landing.today(), "certificate": path.name})
    pending.unlink()
    console.say(f"deleted {len(deleted)} copies; looked again: 0 are left; certificate: {path}")
    return str(path)
