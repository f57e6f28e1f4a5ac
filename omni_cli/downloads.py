"""The Hugging Face hub as omni uses it: a pinned commit, promised hashes, patient retries, one-line errors.

The bytes come through huggingface_hub's own downloader: authentication, redirects, resume within a process. Measured on
2.4.0, it compares sizes only, gives up on a reset connection, and may wait for ever on an API call. So this module adds
what is missing: every file is compared with the hash that the hub promises, what may pass is tried again, every request
has a time limit. Plain HTTP rather than Xet, which has hung on this very dataset.

No text of a library's exception reaches a message: it may hold a token or a signed address.
"""

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, RepoFile, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from omni_cli.errors import OmniError, UsageError
from omni_cli.files import sha256_of

DEFAULT_ENDPOINT = "https://huggingface.co"
_API_TIMEOUT_S = 60.0
_PATHS_PER_REQUEST = 500
_LONGEST_WAIT_S = 300.0
_TRANSFER_ATTEMPTS = 8
_API_ATTEMPTS = 4
_WRONG_CONTENT_ATTEMPTS = 3
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_MEGABYTE = 1_000_000

T = TypeVar("T")


class FileAbsentError(OmniError):
    """The hub has no such file at this commit."""


class TransferError(OmniError):
    """One file could not be fetched, others may."""


class StoppedError(OmniError):
    """A transfer was given up because the whole run ends."""


class _WrongContentError(OSError):
    """A file arrived whole and differs from what the hub promised."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a pinned commit: its repository path, its size in bytes and the hash that the hub promises."""

    path: str
    size: int
    git_sha1: str  # of the content for a small file, of the pointer for a large one
    sha256: str | None  # of the content of a large (LFS) file

    def is_content_of(self, path: Path) -> bool:
        """Return whether a local file is this one, byte for byte."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        return _git_sha1(path) == self.git_sha1


@dataclass
class Meter:
    """Counts transferred bytes of many threads in whole megabytes, and tells all of them to stop."""

    advance: Callable[[int], None]
    _bytes: int = 0
    _shown_mb: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def add(self, count: int) -> None:
        """Count bytes; negative where an attempt came to nothing.

        Raises:
            StoppedError: the run ends.
        """
        with self._lock:
            self._bytes += count
            step = self._bytes // _MEGABYTE - self._shown_mb
            if step:
                self._shown_mb += step
                self.advance(step)
        self.wait(0.0)

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run ends first.

        Raises:
            StoppedError: the run ends.
        """
        if self._stop.wait(seconds) if seconds else self._stop.is_set():
            raise StoppedError("stopped")

    def stop(self) -> None:
        """End every transfer at its next block."""
        self._stop.set()


@dataclass(frozen=True)
class Hub:
    """One dataset repository of a hub. `first_wait_s` is the pause before the second attempt; it doubles."""

    repository: str
    endpoint: str
    first_wait_s: float = 1.0

    @property
    def api(self) -> HfApi:
        """Return huggingface_hub's client of this hub."""
        return HfApi(endpoint=self.endpoint, library_name="omni-cli")

    def resolve_revision(self, revision: str | None) -> str:
        """Return the 40-hex commit that a branch, tag or commit stands for now.

        Raises:
            UsageError: there is no such revision.
            OmniError: the hub refuses or cannot be reached.
        """
        info = self._ask(lambda: self.api.dataset_info(self.repository, revision=revision, timeout=_API_TIMEOUT_S))
        if not info.sha:
            raise OmniError(f"{self.host} gave no commit for {self.repository}; check HF_ENDPOINT")
        return info.sha

    def list_files(self, paths: Sequence[str], commit: str) -> dict[str, RemoteFile]:
        """Return those of the named files that exist at a commit, by path.

        Raises:
            OmniError: the hub refuses or cannot be reached.
        """
        found: dict[str, RemoteFile] = {}
        for start in range(0, len(paths), _PATHS_PER_REQUEST):
            batch = list(paths[start : start + _PATHS_PER_REQUEST])
            for entry in self._ask(partial(self._paths_info, batch, commit)):
                if isinstance(entry, RepoFile) and entry.path in batch:
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found[entry.path] = RemoteFile(entry.path, entry.size, entry.blob_id, sha256)
        return found

    def download(self, file: RemoteFile, commit: str, folder: Path, meter: Meter) -> Path:
        """Fetch one file to its path under `folder` and compare it with the promised hash; return where it lies.

        Raises:
            FileAbsentError: the hub has no such file after all.
            TransferError: this file failed for good, others may still come.
            OmniError: no file will come (access, disk, network).
        """
        wrong = 0
        for attempt in range(1, _TRANSFER_ATTEMPTS + 1):
            transfer = _Transfer(meter)
            try:
                return self._download_once(file, commit, folder, transfer)
            except (httpx2.HTTPError, OSError, RuntimeError) as error:
                transfer.undo()
                cause = _cause(error)
                wrong += isinstance(cause, _WrongContentError)
                last = attempt == _TRANSFER_ATTEMPTS or wrong == _WRONG_CONTENT_ATTEMPTS
                if last or not _may_pass(cause):
                    raise self._explain(cause, file.path) from None
                meter.wait(self._pause_s(cause, attempt))
        raise AssertionError("the last attempt returns or raises")

    @property
    def host(self) -> str:
        """Return the hub's name for messages, without credentials."""
        parts = urlsplit(self.endpoint)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)

    def _paths_info(self, paths: list[str], commit: str) -> list[Any]:
        return self.api.get_paths_info(self.repository, paths, revision=commit, repo_type="dataset")

    def _download_once(self, file: RemoteFile, commit: str, folder: Path, transfer: "_Transfer") -> Path:
        path = Path(
            self.api.hf_hub_download(
                self.repository,
                file.path,
                repo_type="dataset",
                revision=commit,
                local_dir=folder,
                tqdm_class=_bar_class(transfer),
            )
        )
        if not file.is_content_of(path):
            path.unlink()
            raise _WrongContentError
        transfer.complete(file.size)
        return path

    def _ask(self, call: Callable[[], T]) -> T:
        for attempt in range(1, _API_ATTEMPTS + 1):
            try:
                return call()
            except json.JSONDecodeError:
                raise OmniError(f"{self.host} does not answer like a hub; check HF_ENDPOINT and your proxy") from None
            except (httpx2.HTTPError, OSError, RuntimeError) as error:
                cause = _cause(error)
                if attempt == _API_ATTEMPTS or not _may_pass(cause):
                    raise self._explain(cause, self.repository) from None
                threading.Event().wait(self._pause_s(cause, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _pause_s(self, cause: BaseException, attempt: int) -> float:
        asked_s = _asked_pause_s(cause.response) if isinstance(cause, HfHubHTTPError) else 0.0
        doubled_s: float = self.first_wait_s * 2 ** (attempt - 1)
        return min(max(asked_s, doubled_s), _LONGEST_WAIT_S)

    def _explain(self, cause: BaseException, what: str) -> OmniError:
        if isinstance(cause, RemoteEntryNotFoundError):
            return FileAbsentError(f"{what}: not in {self.repository} at this commit")
        if isinstance(cause, RevisionNotFoundError):
            return UsageError(f"{self.repository} has no such revision; give a branch, tag or commit with --revision")
        if isinstance(cause, HfHubHTTPError):
            return self._explain_status(cause, what)
        if isinstance(cause, OfflineModeIsEnabled):
            return OmniError("HF_HUB_OFFLINE is set: unset it, or import files you have with --from DIR")
        if isinstance(cause, httpx2.TransportError):
            kind = type(cause).__name__
            return OmniError(
                f"cannot reach {self.host} ({kind}) for {what}; check the network and HF_ENDPOINT, then run the same "
                "command again, or import files you have with --from DIR"
            )
        return _explain_disk(cause, what)

    def _explain_status(self, cause: HfHubHTTPError, what: str) -> OmniError:
        status = cause.response.status_code
        page = f"https://{self.host}/datasets/{self.repository}"
        if status == 401:
            found = "the token was refused" if get_token() else "no token was found"
            return OmniError(
                f"{self.host} answers 401 for {what}: {found}; accept the terms at {page}, make a read token, and run "
                "`hf auth login` or set HF_TOKEN"
            )
        if isinstance(cause, GatedRepoError) or (status == 403 and not _is_expired_link(cause.response)):
            return OmniError(
                f"{self.host} answers 403 for {what}: this account has not accepted the dataset's terms; accept them "
                f"at {page} and run the same command again"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return OmniError(f"{self.host} has no dataset {self.repository}; check HF_ENDPOINT")
        if status == 429:
            return TransferError(f"{what}: {self.host} still limits the rate (429); run again later, or --workers 2")
        return TransferError(f"{what}: {self.host} answers {status}; run the same command again")


def open_hub(repository: str, *, first_wait_s: float = 1.0) -> Hub:
    """Return a dataset of the hub that HF_ENDPOINT names, with huggingface_hub made quiet, patient and plain.

    Raises:
        UsageError: HF_ENDPOINT is not an address.
    """
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"HF_ENDPOINT is not an address like {DEFAULT_ENDPOINT}; unset it or correct it")
    constants.HF_HUB_DISABLE_XET = True
    constants.DOWNLOAD_CHUNK_SIZE = (
        _MEGABYTE  # a meter that moves, and a stop that is prompt: its own blocks are 10 MiB
    )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings print signed addresses
    set_client_factory(_client)
    return Hub(repository, endpoint, first_wait_s)


@dataclass
class _Transfer:
    """The bytes of one attempt at one file."""

    meter: Meter
    received: int = 0

    def add(self, count: int) -> None:
        self.received += count
        self.meter.add(count)

    def undo(self) -> None:
        self.add(-self.received)

    def complete(self, size: int) -> None:
        self.add(size - self.received)


def _bar_class(transfer: _Transfer) -> type[Any]:
    """Return what huggingface_hub takes for a tqdm class: it reports each block and draws nothing."""

    class Bar:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float = 1) -> None:
            transfer.add(int(count))

    return Bar


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(_API_TIMEOUT_S)
    return client


def _git_sha1(path: Path) -> str:
    """Return a file's git blob id (git's object format: `blob`, the size and a zero byte before the content)."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _cause(error: BaseException) -> BaseException:
    """Return what really happened: huggingface_hub wraps a failed HEAD in a 'not in the local cache' error."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _may_pass(cause: BaseException) -> bool:
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _TRANSIENT_STATUS or _is_expired_link(cause.response)
    if isinstance(cause, OfflineModeIsEnabled | httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return False
    is_local = isinstance(cause, OSError) and cause.errno is not None
    return not is_local  # a reset, a stall, a short or wrong body, a client that another thread closed


def _is_expired_link(response: httpx2.Response) -> bool:
    """Return whether a storage server, not the hub, refused: its signed addresses live for an hour or so."""
    from_hub = "X-Error-Code" in response.headers or "/resolve/" in response.request.url.path
    return response.status_code == 403 and not from_hub


def _asked_pause_s(response: httpx2.Response) -> float:
    """Return how long the hub asks to wait: `RateLimit: "api";r=0;t=55` or `Retry-After: 55`."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _explain_disk(cause: BaseException, what: str) -> OmniError:
    if isinstance(cause, _WrongContentError):
        return TransferError(f"{what}: its content differs from the hub's hash, {_WRONG_CONTENT_ATTEMPTS} times over")
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return OmniError(f"{what}: the disk is full; free space and run the same command again")
    if isinstance(cause, OSError) and cause.errno is not None:
        return OmniError(f"{what}: {os.strerror(cause.errno)}; check the folder and its permissions, then run again")
    return TransferError(f"{what}: the transfer broke off ({type(cause).__name__}); run the same command again")
