"""PhysicalAI-AV from the Hugging Face hub: plan on a pinned commit, then whole verified files, any of them once."""

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.downloads import FileAbsentError, Hub, Meter, RemoteFile, TransferError, open_hub
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import CAMERAS, CLIP_INDEX_FILE, LEGACY_PRESENCE_FILE, PRESENCE_FILE, REPOSITORY
from omni_cli.report import Console
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.request import FetchRequest
from omni_cli.stages.fetch.selection import chunk_paths, require_choice, select_chunks
from omni_cli.stages.fetch.tables import INDICES, REQUIRED_INDICES, chunk_of_clip

STAGING = ".fetch"
_GIGABYTE = 1e9


@dataclass
class _Job:
    """One fetch on one pinned commit."""

    hub: Hub
    commit: str
    request: FetchRequest
    console: Console
    remote: list[RemoteFile] = field(default_factory=list)  # what is asked for and exists
    missing: list[RemoteFile] = field(default_factory=list)  # what of it no verified receipt vouches for
    absent: list[str] = field(default_factory=list)  # what is asked for and does not exist upstream

    @property
    def folder(self) -> Path:
        return self.request.folder

    def facts(self, file: RemoteFile) -> dict[str, Any]:
        promised = {"git_sha1": file.git_sha1, **({"sha256": file.sha256} if file.sha256 else {})}
        return {**promised, "size": file.size}

    def is_done(self, file: RemoteFile) -> bool:
        """Return whether a file is there and verified; one that came another way is hashed and adopted."""
        path = self.folder / file.path
        if landing.is_landed(path, **self.facts(file)):
            return True
        if self.request.dry_run or not path.is_file() or not file.is_content_of(path):
            return False
        landing.vouch(path, git_sha1=file.git_sha1)
        return True


def fetch_hub(request: FetchRequest, console: Console) -> dict[str, Any]:
    """Fetch the indices, then every file of the chunks asked for that no verified receipt vouches for.

    Raises:
        UsageError: chunks, clips, cameras, revision or size cannot be.
        DataError: the repository lacks its index.
        OmniError: access, network, disk, or files that failed; running again fetches what is missing.
    """
    require_choice(request.chunks, request.clips)
    hub = open_hub(REPOSITORY, first_wait_s=request.retry_wait_s)
    commit = _commit(hub, request, console)
    landing.check_revision(request.folder, commit)
    job = _Job(hub, commit, request, console)
    if request.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            chunks = _plan(job, _peek_index(job, _wanted_indices(job), Path(scratch)))
        return _result(job, chunks)
    with request.held():
        landing.check_revision(request.folder, commit)
        _transfer(job, _missing_among(job, _wanted_indices(job)))
        landing.pin_revision(request.folder, hub.repository, commit)
        already = len(job.missing)
        chunks = _plan(job, chunk_of_clip(request.folder / CLIP_INDEX_FILE))
        _transfer(job, job.missing[already:])
        shutil.rmtree(request.folder / STAGING, ignore_errors=True)
    return _result(job, chunks)


def check_size(needed_bytes: int, max_gb: float) -> None:
    """Refuse more than the user allows.

    Raises:
        UsageError: the plan is larger.
    """
    if needed_bytes > max_gb * _GIGABYTE:
        raise UsageError(
            f"the plan is {needed_bytes / _GIGABYTE:.3g} GB and --max-gb allows {max_gb:g}; ask for fewer chunks or "
            f"cameras, or give --max-gb {needed_bytes // int(_GIGABYTE) + 1}"
        )


def _commit(hub: Hub, request: FetchRequest, console: Console) -> str:
    """Return the commit to use: what the folder already holds, unless the user names one."""
    held = landing.pinned_revision(request.folder)
    if request.revision is None and held is not None:
        console.say(f"{request.folder} holds revision {held}: going on with it")
        return held
    return hub.resolve_revision(request.revision)


def _wanted_indices(job: _Job) -> list[RemoteFile]:
    remote = job.hub.list_files(INDICES, job.commit)
    if lacking := sorted(set(REQUIRED_INDICES) - set(remote)):
        raise DataError(f"{job.hub.repository} at {job.commit} has no {lacking[0]}; choose another --revision")
    return [file for path, file in remote.items() if path != LEGACY_PRESENCE_FILE or PRESENCE_FILE not in remote]


def _peek_index(job: _Job, indices: Sequence[RemoteFile], scratch: Path) -> dict[str, int]:
    """Read the clip index without leaving a trace in the data folder."""
    index = next(file for file in indices if file.path == CLIP_INDEX_FILE)
    if index not in _missing_among(job, indices):
        return chunk_of_clip(job.folder / CLIP_INDEX_FILE)
    return chunk_of_clip(job.hub.download(index, job.commit, scratch, Meter(lambda _: None)))


def _missing_among(job: _Job, remote: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Enter files into the plan; return those that must come, if the disk can hold them."""
    missing = [file for file in remote if not job.is_done(file)]
    landing.check_disk(job.folder, sum(file.size for file in missing))
    job.remote += remote
    job.missing += missing
    return missing


def _plan(job: _Job, index: dict[str, int]) -> tuple[int, ...]:
    """Enter the files of the chunks asked for into the plan; return the chunks."""
    request = job.request
    chunks = select_chunks(request.chunks, request.clips, index)
    if request.clips:
        job.console.say(f"the hub stores whole chunks: {len(request.clips)} clips are in {len(chunks)} chunks")
    paths = chunk_paths(chunks, request.cameras or CAMERAS)
    remote = job.hub.list_files(paths, job.commit)
    job.absent.extend(path for path in paths if path not in remote)
    if not remote:
        raise DataError(f"none of the {len(paths)} files of chunks {request.chunks or chunks} exist at {job.commit}")
    missing = _missing_among(job, list(remote.values()))
    check_size(sum(file.size for file in missing), request.max_gb)
    return chunks


def _transfer(job: _Job, missing: Sequence[RemoteFile]) -> None:
    """Fetch files with a pool of threads; one that fails for good does not stop the others, what concerns all does."""
    staging = job.folder / STAGING
    for partial in staging.rglob("*.incomplete"):  # of a killed run; the downloader cannot continue them
        partial.unlink()
    for parent in {(job.folder / file.path).parent for file in missing}:
        files.remove_leftovers(parent)
    failures: list[str] = []
    total_mb = sum(file.size for file in missing) // landing.MEGABYTE
    with job.console.progress("fetch", total_mb, "MB") as step, ThreadPoolExecutor(job.request.workers) as pool:
        meter = Meter(step.advance)
        futures = {pool.submit(_fetch_one, job, file, meter): file for file in missing}
        try:
            _collect(job, futures, failures)
        except BaseException:
            meter.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise OmniError(f"{len(failures)} of {len(missing)} files failed, the others are kept; first: {failures[0]}")


def _collect(job: _Job, futures: dict[Future[None], RemoteFile], failures: list[str]) -> None:
    for future in as_completed(futures):
        try:
            future.result()
        except FileAbsentError:
            job.absent.append(futures[future].path)
        except TransferError as error:
            failures.append(str(error))


def _fetch_one(job: _Job, file: RemoteFile, meter: Meter) -> None:
    staged = job.hub.download(file, job.commit, job.folder / STAGING, meter)
    landing.land(staged, job.folder / file.path, git_sha1=file.git_sha1)


def _result(job: _Job, chunks: tuple[int, ...]) -> dict[str, Any]:
    present = [file for file in job.remote if file.path not in job.absent]
    fetched = [file for file in job.missing if file.path not in job.absent]
    fetched_bytes, skipped = sum(file.size for file in fetched), len(present) - len(fetched)
    if job.absent:
        job.console.warn(f"{len(job.absent)} files are absent upstream: {landing.names_text(job.absent)}")
    if job.request.dry_run:
        for file in fetched:
            job.console.say(f"would fetch {file.path}  {landing.size_text(file.size)}")
    verb, size = "would fetch" if job.request.dry_run else "fetched", landing.size_text(fetched_bytes)
    job.console.say(
        f"{verb} {len(fetched)} files, {size}, of {len(chunks)} chunks at {job.commit[:12]}; "
        f"{skipped} already there, {len(job.absent)} absent upstream; {job.folder}"
    )
    return {
        "source": job.request.source,
        "folder": str(job.folder),
        "revision": job.commit,
        "dry_run": job.request.dry_run,
        "chunks": list(chunks),
        "paths": [str(job.folder / file.path) for file in present],
        "bytes": sum(file.size for file in present),
        "fetched": len(fetched),
        "fetched_bytes": fetched_bytes,
        "skipped": skipped,
        "absent": sorted(job.absent),
    }
