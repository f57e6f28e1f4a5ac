"""PhysicalAI-AV from the Hugging Face hub: plan on a pinned commit, say what it costs, then verified files, once."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_cli.downloads import Hub, Meter, Patience, RevisionGoneError, open_hub
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import (
    CAMERAS,
    CLIP_INDEX_FILE,
    LEGACY_PRESENCE_FILE,
    LICENCE,
    OFFLINE_CALIBRATION,
    PRESENCE_FILE,
    REASONING,
    REASONING_FILE,
    REPOSITORY,
)
from omni_cli.report import Console, counted
from omni_cli.sources.index_names import unsafe_index_names
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.estimate import say_estimate, say_pieces, say_table, seconds_at
from omni_cli.stages.fetch.partial import Piece
from omni_cli.stages.fetch.plan import Job, check_size, list_files, plan_files
from omni_cli.stages.fetch.record import Record, read_record, write_record
from omni_cli.stages.fetch.request import FetchRequest
from omni_cli.stages.fetch.selection import chunk_paths, clips_by_path, require_choice, select_chunks
from omni_cli.stages.fetch.tables import INDICES, REQUIRED_INDICES, chunk_of_clip
from omni_cli.stages.fetch.workers import in_turn, tidy, transfer
from omni_cli.stages.ledger import RAW, register_copy

_OPTIONAL = frozenset(INDICES) - frozenset(REQUIRED_INDICES)  # no revision has them all


def fetch_hub(request: FetchRequest, console: Console) -> dict[str, Any]:
    """Fetch the indices, then what was asked for of the chunks and no verified receipt vouches for.

    Raises:
        UsageError: chunks, clips, cameras, revision or size cannot be.
        DataError: the repository lacks its index.
        OmniError: access, network, disk, or files that failed; running again fetches what is missing.
    """
    require_choice(request.chunks, request.clips)
    if len(lone := set(OFFLINE_CALIBRATION).intersection(request.features)) == 1:
        console.warn(
            f"--features {lone.pop()}: it is used with the other one of {', '.join(OFFLINE_CALIBRATION)} alone"
        )
    hub = open_hub(REPOSITORY, Patience(first_wait_s=request.retry_wait_s))
    commit = _commit(hub, request, console)
    landing.check_revision(request.folder, commit)
    with request.held(shared=True):
        landing.check_revision(request.folder, commit)
        job = Job(hub, commit, request, console, read_record(request.folder))
        try:
            return _dry_run(job) if request.dry_run else _run(job)
        except RevisionGoneError:
            if landing.pinned_revision(request.folder) is None:  # a slip of the user's
                raise
            raise UsageError(_gone(job)) from None


def _commit(hub: Hub, request: FetchRequest, console: Console) -> str:
    """Return the commit to use: what the folder already holds, unless the user names another."""
    held = landing.pinned_revision(request.folder)
    if held is not None and request.revision in (None, held):
        console.say(f"{request.folder} holds revision {held}: going on with it")
        return held
    return hub.resolve_revision(request.revision)


def _gone(job: Job) -> str:
    """Return what to do where the commit that a folder holds is gone from the hub: nothing can be added to it."""
    request, hub = job.request, job.hub
    data = request.data if request.data.name else request.data.absolute()
    beside = data.with_name(f"{data.name}-new")
    purge = shlex.join(["omni", "fetch", "--purge", "--data", str(request.data)])
    return (
        f"{request.folder} holds revision {job.commit}, which {hub.host} has no more: what is there stays good, and "
        f"nothing can be added; fetch the newest revision beside it: {request.command(beside)}; or delete all copies "
        f"of the old one, shards too, and begin anew: {purge} && {request.command(request.data)}"
    )


def _dry_run(job: Job) -> dict[str, Any]:
    """Plan without a trace in the data folder."""
    _plan_indices(job)
    with tempfile.TemporaryDirectory() as scratch:
        index = next(piece for piece in job.pieces if piece.file.path == CLIP_INDEX_FILE)
        place = job.folder / CLIP_INDEX_FILE
        if not index.is_there:
            place = job.hub.download(index.file, job.commit, Path(scratch), Meter(lambda _: None))
        chunks = _plan_chunks(job, chunk_of_clip(place))
    say_pieces(job.missing, job.console)
    say_table(job.pieces, job.console)
    check_size(job.transfer_bytes, job.request.max_gb)
    return _result(job, chunks)


def _run(job: Job) -> dict[str, Any]:
    _plan_indices(job)
    indices = tuple(job.missing)
    landing.check_disk(job.folder, job.transfer_bytes)
    register_copy(job.request.data, job.request.source, job.folder, RAW, repository=REPOSITORY, licence=LICENCE,
                  revision=job.commit)  # fmt: skip
    with in_turn(job.folder):  # before the first file comes: two processes may have resolved two commits
        landing.pin_revision(job.folder, job.hub.repository, job.commit)
    transfer(job, indices)
    _refuse_failures(job, len(indices))
    job.skipped |= unsafe_index_names(job.folder)
    chunks = _plan_chunks(job, chunk_of_clip(job.folder / CLIP_INDEX_FILE))
    num_unreadable = len(job.failures)  # zips whose directory makes no sense
    chunk_pieces = [piece for piece in job.missing if piece not in indices]
    check_size(job.transfer_bytes, job.request.max_gb)
    landing.check_disk(job.folder, _needed_bytes(job, chunk_pieces))
    say_estimate(chunk_pieces, job.console)
    try:
        transfer(job, chunk_pieces)
    finally:
        with in_turn(job.folder):
            manifest = _write_record(job)
    _refuse_failures(job, len(chunk_pieces) + num_unreadable)
    tidy(job.folder)
    return {**_result(job, chunks), "manifest": str(manifest)}


def _refuse_failures(job: Job, num_planned: int) -> None:
    if job.failures:
        failed = f"{len(job.failures)} of {counted(num_planned, 'file')} failed"
        raise OmniError(f"{failed}, the others are kept; first: {job.failures[0]}")


def _plan_indices(job: Job) -> None:
    """Enter the global tables into the plan.

    Raises:
        UsageError: they alone are more than the user allows.
        DataError: the repository lacks its index.
    """
    remote = list_files(job, INDICES)
    if lacking := sorted(set(REQUIRED_INDICES) - set(remote)):
        raise DataError(f"{job.hub.repository} at {job.commit} has no {lacking[0]}; choose another --revision")
    if PRESENCE_FILE in remote:
        remote.pop(LEGACY_PRESENCE_FILE, None)
    plan_files(job, remote.values(), {})
    check_size(job.transfer_bytes, job.request.max_gb)


def _plan_chunks(job: Job, index: dict[str, int]) -> tuple[int, ...]:
    """Enter the files of the chunks or clips asked for into the plan; return the chunks."""
    request = job.request
    chunks = select_chunks(request.chunks, request.clips, index)
    cameras = request.cameras or CAMERAS
    paths = chunk_paths(chunks, cameras, request.features)
    remote = list_files(job, paths)
    if not remote and (unsafe := sorted((path, job.skipped[path]) for path in paths if path in job.skipped)):
        raise DataError(f"every file asked for is unsafe and skipped, such as {unsafe[0]}")
    if not remote:
        raise DataError(f"none of the {len(paths)} files of chunks {request.chunks or chunks} exist at {job.commit}")
    plan_files(job, remote.values(), clips_by_path(request.clips, index, cameras, request.features))
    return chunks


def _needed_bytes(job: Job, pieces: Sequence[Piece]) -> int:
    """Return what a disk must hold: what comes and, while clips are put together with those here, their zips again."""
    again = [piece.transfer_bytes + _size_here(job, piece) for piece in pieces if piece.clips]
    return sum(piece.transfer_bytes for piece in pieces) + sum(sorted(again)[-job.request.workers :])


def _write_record(job: Job) -> Path:
    promised = {piece.file.path: piece.file for piece in job.pieces}
    lacking = {path: {**vars(promised[path]), "clips": list(clips)} for path, clips in job.lacking.items()}
    absent = {path: job.absent[path] for path in _absent(job)}
    unlisted = {path: why for path, why in job.absent.items() if path not in absent}
    found = Record(absent=absent, skipped=job.skipped, unlisted=unlisted, lacking=lacking)
    return write_record(job.folder, job.hub.repository, job.commit, found)


def _absent(job: Job) -> list[str]:
    """Return what was asked for and is not upstream; that a revision lacks a table that few have is no news."""
    asked = {REASONING_FILE} if REASONING in job.request.features else set()
    return sorted(path for path in job.absent if path not in _OPTIONAL or path in asked)


def _result(job: Job, chunks: tuple[int, ...]) -> dict[str, Any]:
    present = [piece for piece in job.pieces if piece.file.path not in job.absent and not _is_empty(job, piece)]
    fetched = [piece for piece in present if not piece.is_there]
    fetched_bytes = sum(piece.transfer_bytes for piece in fetched)
    absent = _absent(job)
    _warn(job, absent)
    verb, size = "would fetch" if job.request.dry_run else "fetched", landing.size_text(fetched_bytes)
    job.console.say(
        f"{verb} {counted(len(fetched), 'file')}, {size}, of {counted(len(chunks), 'chunk')} at {job.commit[:12]}; "
        f"{len(present) - len(fetched)} already there, {len(absent)} absent upstream; {job.folder}"
    )
    return {
        "source": job.request.source,
        "folder": str(job.folder),
        "revision": job.commit,
        "dry_run": job.request.dry_run,
        "chunks": list(chunks),
        "clips": list(job.request.clips),
        "paths": [str(job.folder / piece.file.path) for piece in present],
        "bytes": sum(_bytes_of(job, piece) for piece in present),
        "fetched": len(fetched),
        "fetched_bytes": fetched_bytes,
        "transfer_bytes": job.read_bytes + fetched_bytes,
        "seconds_at_100_mbps": seconds_at(fetched_bytes, 100),
        "seconds_at_1000_mbps": seconds_at(fetched_bytes, 1000),
        "skipped": len(present) - len(fetched),
        "absent": absent,
        "unsafe": job.skipped,
        "lacking": {path: list(clips) for path, clips in sorted(job.lacking.items())},
    }


def _bytes_of(job: Job, piece: Piece) -> int:
    """Return the size of what is here, or of what would come."""
    return _size_here(job, piece) or piece.transfer_bytes


def _size_here(job: Job, piece: Piece) -> int:
    path = job.folder / piece.file.path
    return path.stat().st_size if path.is_file() else 0


def _is_empty(job: Job, piece: Piece) -> bool:
    """Return whether a zip has none of the clips asked for: nothing of it comes."""
    return bool(piece.clips) and piece.is_there and not (job.folder / piece.file.path).is_file()


def _warn(job: Job, absent: Sequence[str]) -> None:
    if absent:
        job.console.warn(f"absent upstream: {counted(len(absent), 'file')}: {landing.names_text(absent)}")
    if job.skipped:
        job.console.warn(
            f"{len(job.skipped)} paths or names of the hub are unsafe and skipped: {sorted(job.skipped.items())[0]}"
        )
    if job.lacking:
        job.console.warn(
            f"clips asked for are lacking in {counted(len(job.lacking), 'zip')}, first {sorted(job.lacking.items())[0]}"
        )
