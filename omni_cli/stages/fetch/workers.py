"""Threads that bring what a plan lacks, beside other processes that do the same in the same folder.

Two fetches split the work file by file: what another process holds is left for the end, and taken from there when it
is landed. What one process must do at a time, such as writing the manifest, is done `in_turn`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from omni_cli import files
from omni_cli.downloads import FileAbsentError, Meter, TransferError, claimed, sweep
from omni_cli.report import counted
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.partial import FarZip, Piece, fetch_clips
from omni_cli.stages.fetch.plan import Job
from omni_cli.stages.fetch.record import PRUNED
from omni_cli.stages.raw_lock import HeldError

_STAGING = ".fetch"
_RECORDS = "records"
_LANDINGS = 3


def in_turn(folder: Path) -> AbstractContextManager[bool]:
    """Return the lock of a folder's records; entering it waits for other processes."""
    return claimed(folder / _STAGING, _RECORDS, Meter(lambda _: None))


def transfer(job: Job, missing: Sequence[Piece]) -> None:
    """Fetch files with a pool of threads; one that fails for good does not stop the others, what concerns all does.

    Raises:
        OmniError: no file will come (access, disk, network).
    """
    for parent in {(job.folder / piece.file.path).parent for piece in missing}:
        files.remove_leftovers(parent)
    total_mb = sum(piece.transfer_bytes for piece in missing) // landing.MEGABYTE
    with job.console.progress("fetch", total_mb, "MB") as step, ThreadPoolExecutor(job.request.workers) as pool:
        meter = Meter(step.advance)
        try:
            held = _round(job, missing, pool, meter, wait=False)
            if held:
                job.console.say(f"another omni fetches {counted(len(held), 'file')} into {job.folder}: waiting for it")
            _round(job, held, pool, meter, wait=True)
        except BaseException:
            meter.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def tidy(folder: Path) -> None:
    """Remove what killed fetches left in a folder where this one is complete."""
    sweep(folder / _STAGING)


def _round(job: Job, pieces: Sequence[Piece], pool: ThreadPoolExecutor, meter: Meter, *, wait: bool) -> list[Piece]:
    """Bring pieces; return those that other processes hold, none where `wait` is on."""
    futures = {pool.submit(_bring, job, piece, meter, wait=wait): piece for piece in pieces}
    held: list[Piece] = []
    for future in as_completed(futures):
        piece = futures[future]
        try:
            if not future.result():
                held.append(piece)
        except FileAbsentError:
            job.absent[piece.file.path] = PRUNED
        except (TransferError, HeldError) as error:
            job.failures.append(str(error))
    return held


def _bring(job: Job, piece: Piece, meter: Meter, *, wait: bool) -> bool:
    with claimed(job.folder / _STAGING, piece.file.content_hash, meter, wait=wait) as is_mine:
        if is_mine and job.is_done(piece.file):  # another process landed it since it was planned
            meter.add(piece.transfer_bytes)
        elif is_mine and piece.clips:
            read = partial(job.hub.read_range, piece.file, job.commit, meter=meter)
            far = FarZip(read, partial(job.hub.append_range, piece.file, job.commit, meter=meter))
            fetch_clips(far, piece, job.folder / piece.file.path, job.folder / _STAGING, meter)
        elif is_mine:
            _fetch_whole(job, piece, meter)
    return is_mine


def _fetch_whole(job: Job, piece: Piece, meter: Meter) -> None:
    """Fetch a file and land it; where a disk's locks do not tell, another process may take it from the staging."""
    for _ in range(_LANDINGS):
        staged = job.hub.download(piece.file, job.commit, job.folder / _STAGING, meter)
        try:
            return landing.land(
                staged, job.folder / piece.file.path, sha256=piece.file.sha256, git_sha1=piece.file.git_sha1,
                fetched=landing.today(),
            )  # fmt: skip
        except FileNotFoundError:
            if job.is_done(piece.file):
                return None
    raise TransferError(f"{piece.file.path}: other processes keep taking it; fetch into this folder from one at a time")
