"""Import of data that are already on a disk: verified copies, never links, nothing from outside the folder named."""

import datetime
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.downloads import Meter
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.fetched import read_origin
from omni_cli.formats.physical_ai_av import CAMERAS, CLIP_INDEX_FILE, LICENCE, REPOSITORY
from omni_cli.report import Console, counted
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.record import Record, write_record
from omni_cli.stages.fetch.request import FetchRequest
from omni_cli.stages.fetch.selection import chunk_paths, require_choice, select_chunks
from omni_cli.stages.fetch.tables import INDICES, chunk_of_clip
from omni_cli.stages.ledger import RAW, register_copy
from omni_cli.stages.raw_lock import alone

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHE_NAME = "datasets--" + REPOSITORY.replace("/", "--")


def import_physical_ai_av(request: FetchRequest, origin: Path, console: Console) -> dict[str, Any]:
    """Copy chosen chunks from a folder in the repository's layout, or from a hub cache.

    Raises:
        UsageError: chunks, clips, cameras or revision cannot be.
        DataError: the folder holds no such layout, or none of the files asked for.
        OmniError: too little disk space, or a copy that differs.
    """
    require_choice(request.chunks, request.clips)
    layout = find_layout(origin, request.revision)
    revision = _revision_of(layout)
    landing.check_revision(request.folder, revision)
    chunks = select_chunks(request.chunks, request.clips, chunk_of_clip(layout / CLIP_INDEX_FILE))
    wanted = chunk_paths(chunks, request.cameras or CAMERAS, request.features)
    absent = [path for path in wanted if not (layout / path).is_file()]
    if len(absent) == len(wanted):
        raise DataError(f"{layout}: none of the {len(wanted)} files of these chunks is here, for example {wanted[0]}")
    present = [path for path in (*INDICES, *wanted) if (layout / path).is_file()]
    pairs = {request.folder / path: _inside(layout, path) for path in present}
    if absent:
        console.warn(f"not in {layout}: {counted(len(absent), 'file')}: {landing.names_text(absent)}")
    with request.held():
        if not request.dry_run:
            since = _first_fetched(layout)
            register_copy(request.data, request.source, request.folder, RAW, repository=REPOSITORY, licence=LICENCE,
                          revision=revision, since=since)  # fmt: skip
            landing.pin_revision(request.folder, REPOSITORY, revision, since)
        result = copy_all(request, pairs, console)
        if not request.dry_run:
            manifest = write_record(request.folder, REPOSITORY, revision, Record())
            result |= {"manifest": str(manifest)}
    return {**result, "revision": revision, "chunks": list(chunks), "absent": absent}


def copy_all(request: FetchRequest, pairs: Mapping[Path, Path], console: Console) -> dict[str, Any]:
    """Copy each source that its place does not hold already, verified; called with the folder's lock held.

    Args:
        request: where to, and whether it is a dry run.
        pairs: place -> source.
        console: shows the progress.

    Raises:
        OmniError: too little disk space, a copy that differs, or another omni reads what would be replaced.
    """
    missing = [path for path, source in pairs.items() if not landing.is_copied(source, path)]
    sizes = {path: source.stat().st_size for path, source in pairs.items()}
    copied_bytes = sum(sizes[path] for path in missing)
    landing.check_disk(request.folder, copied_bytes)
    if not request.dry_run:
        with alone(request.folder) if any(path.exists() for path in missing) else nullcontext():
            _copy_missing(pairs, missing, copied_bytes, console)
    verb = "would copy" if request.dry_run else "copied"
    console.say(
        f"{verb} {counted(len(missing), 'file')}, {landing.size_text(copied_bytes)}; "
        f"{len(pairs) - len(missing)} already there; {request.folder}"
    )
    return {
        "source": request.source,
        "folder": str(request.folder),
        "dry_run": request.dry_run,
        "paths": [str(path) for path in sorted(pairs)],
        "bytes": sum(sizes.values()),
        "fetched": len(missing),
        "fetched_bytes": copied_bytes,
        "skipped": len(pairs) - len(missing),
    }


def find_layout(origin: Path, revision: str | None) -> Path:
    """Return the folder with the repository's layout: `origin` itself, or a snapshot of the hub cache that it holds.

    Raises:
        UsageError: a cache holds several snapshots, or not the one asked for.
        DataError: nothing of the kind is there.
    """
    if (origin / CLIP_INDEX_FILE).is_file():
        return origin
    folders = (origin, origin / _CACHE_NAME, origin / "hub" / _CACHE_NAME)
    snapshots = sorted(path.parent for folder in folders for path in folder.glob(f"snapshots/*/{CLIP_INDEX_FILE}"))
    named = [path for path in snapshots if revision in (None, path.name)]
    if len(named) == 1:
        return named[0]
    if snapshots:
        names = ", ".join(path.name for path in snapshots)
        raise UsageError(f"{origin} holds snapshots {names}; choose one with --revision")
    raise DataError(
        f"{origin}: found {describe(origin)}; expected a folder with {CLIP_INDEX_FILE} and chunk files in "
        f"the layout of {REPOSITORY}, or a hub cache that holds {_CACHE_NAME}"
    )


def describe(folder: Path) -> str:
    """Return what a folder holds, in a few words."""
    if not folder.is_dir():
        return "no such folder" if not folder.exists() else "a file"
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


def _copy_missing(pairs: Mapping[Path, Path], missing: Sequence[Path], total_bytes: int, console: Console) -> None:
    with console.progress("copy", total_bytes // landing.MEGABYTE, "MB") as step:
        meter = Meter(step.advance)
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(path.parent)
            landing.copy(pairs[path], path, meter)


def _inside(layout: Path, path: str) -> Path:
    """Return a file's true place; a snapshot's links lead to its cache's blobs and must lead nowhere else.

    Raises:
        DataError: a link leads out of the folder.
    """
    true = (layout / path).resolve()
    resolved = layout.resolve()
    cache = layout.absolute().parent.parent.resolve() if layout.absolute().parent.name == "snapshots" else resolved
    if not (true.is_relative_to(resolved) or true.is_relative_to(cache)):
        raise DataError(f"{layout / path}: a link that leads out of the folder; put the file itself there")
    return true


def _first_fetched(layout: Path) -> str:
    """Return the day on which a licence began to run: what an earlier fetch noted, or else when the index was written.

    A copy may bear the day of the copying: then the true day is earlier, and only the user knows it.
    """
    noted = read_origin(layout).get("first_fetched")
    written_s = (layout / CLIP_INDEX_FILE).stat().st_mtime
    written = datetime.datetime.fromtimestamp(written_s, datetime.UTC).date().isoformat()
    return str(noted) if noted else min(written, landing.today())


def _revision_of(layout: Path) -> str:
    """Return a snapshot's commit, what an earlier fetch recorded, or else a name made from the clip index's content."""
    if _COMMIT.fullmatch(layout.absolute().name):
        return layout.absolute().name
    return landing.pinned_revision(layout) or f"index-{files.sha256_of(layout / CLIP_INDEX_FILE)[:40]}"
