"""What can be asked of the hub: a commit, the promises for files, a file, a part of one."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, RepoFile, constants, get_hf_file_metadata, hf_hub_url, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

from omni_cli.downloads.messages import explain
from omni_cli.downloads.meter import Meter
from omni_cli.downloads.partial import Partial
from omni_cli.downloads.remote import RemoteFile
from omni_cli.downloads.retries import FAILURES, NotAHubError, Patience, UnexpectedAnswerError, persist, within
from omni_cli.downloads.transfer import Address, FileSpan, Span, pull
from omni_cli.errors import OmniError, UsageError

DEFAULT_ENDPOINT = "https://huggingface.co"
_PATHS_PER_REQUEST = 500
_COMMIT_DIGITS = 40
_PROGRESS_BYTES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Hub:
    """One dataset repository of a hub."""

    repository: str
    endpoint: str
    patience: Patience
    _addresses: dict[tuple[str, str], Address] = field(default_factory=dict, repr=False, compare=False)

    @property
    def api(self) -> HfApi:
        """Return huggingface_hub's client of this hub."""
        return HfApi(endpoint=self.endpoint, library_name="omni-cli")

    @property
    def host(self) -> str:
        """Return the hub's name for messages, without credentials."""
        parts = urlsplit(self.endpoint)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)

    @property
    def page(self) -> str:
        """Return the address of the repository of a model, without credentials."""
        return f"{urlsplit(self.endpoint).scheme}://{self.host}/{self.repository}"

    def resolve_revision(self, revision: str | None) -> str:
        """Return the 40-hex commit that a branch or tag stands for now; a commit stands for itself, unasked.

        Raises:
            UsageError: there is no such revision.
            OmniError: the hub refuses or cannot be reached.
        """
        if revision is not None and len(revision) == _COMMIT_DIGITS and not revision.strip("0123456789abcdef"):
            return revision
        commit = self._ask(lambda: self.api.dataset_info(self.repository, revision=revision).sha)
        if not commit:
            raise OmniError(f"{self.host} gave no commit for {self.repository}; check HF_ENDPOINT")
        return commit

    def list_files(self, paths: Sequence[str], commit: str) -> dict[str, RemoteFile]:
        """Return those of the named files that exist at a commit, by path.

        Raises:
            UsageError: there is no such commit.
            OmniError: the hub refuses or cannot be reached.
        """
        found: dict[str, RemoteFile] = {}
        for start in range(0, len(paths), _PATHS_PER_REQUEST):
            batch = list(paths[start : start + _PATHS_PER_REQUEST])
            asked = frozenset(batch)
            listed = self._ask(partial(self._paths_info, batch, commit))
            found |= {file.path: file for file in listed if file.path in asked}
        return found

    def download(self, file: RemoteFile, commit: str, folder: Path, meter: Meter) -> Path:
        """Fetch one file into a staging folder, from what killed runs left there on; return where it lies.

        It is whole, compared with the promised hash, and on the disk. Hold it with `claimed` until it is landed.

        Raises:
            FileAbsentError: the hub has no such file after all.
            TransferError: this file failed for good, others may still come.
            OmniError: no file will come (access, disk, network).
        """
        with Partial(file, folder, meter) as here:
            self._persist(here.adopt, file, meter)
            self._persist(
                lambda: self._complete(here, commit, meter), file, meter, progress=lambda: here.best // _PROGRESS_BYTES
            )
        self._addresses.pop((commit, file.path), None)
        return here.path

    def read_range(self, file: RemoteFile, commit: str, start: int, size: int, meter: Meter) -> bytes:
        """Return `size` bytes of a file from byte `start` on; the hub promises no hash for a part of a file.

        Raises:
            FileAbsentError: the hub has no such file after all.
            TransferError: this range failed for good, others may still come.
            OmniError: nothing will come (access, network).
        """
        span = Span(start, size, meter)
        self._fill(span, file, commit, meter)
        return bytes(span.content)

    def append_range(self, file: RemoteFile, commit: str, start: int, size: int, path: Path, *, meter: Meter) -> None:
        """Append to a file here what it lacks of `size` bytes from byte `start` on; it is not kept in memory.

        Raises:
            FileAbsentError: the hub has no such file after all.
            TransferError: this range failed for good, others may still come.
            OmniError: nothing will come (access, disk, network).
        """
        with FileSpan(start, size, path, meter) as span:
            self._fill(span, file, commit, meter)

    def _fill(self, span: Span | FileSpan, file: RemoteFile, commit: str, meter: Meter) -> None:
        self._persist(lambda: self._pull(span, file, commit, meter), file, meter, lambda: span.first // _PROGRESS_BYTES)

    def _complete(self, here: Partial, commit: str, meter: Meter) -> None:
        self._pull(here, here.file, commit, meter)
        here.check()

    def _pull(self, sink: Partial | Span | FileSpan, file: RemoteFile, commit: str, meter: Meter) -> None:
        if sink.first == sink.end:
            return
        try:
            pull(self._address(file, commit, meter), sink, file.size, self.patience, meter)
        except (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError):  # the address is still good
            raise
        except FAILURES:
            self._addresses.pop((commit, file.path), None)
            raise

    def _address(self, file: RemoteFile, commit: str, meter: Meter) -> Address:
        """Return where a file's bytes are; a signed address is used again until it is refused."""
        known = self._addresses.get((commit, file.path))
        return known or self._addresses.setdefault((commit, file.path), self._resolve(file, commit, meter))

    def _resolve(self, file: RemoteFile, commit: str, meter: Meter) -> Address:
        url = hf_hub_url(self.repository, file.path, repo_type="dataset", revision=commit, endpoint=self.endpoint)
        ask = partial(get_hf_file_metadata, url, timeout=self.patience.connect_s, endpoint=self.endpoint)
        found = within(self.patience.answer_s, meter, partial(_of_a_hub, ask))
        if found.commit_hash is None:
            raise UnexpectedAnswerError(f"{self.host} does not answer like a hub")
        return Address(found.location, _origin(found.location) == _origin(self.endpoint))

    def _paths_info(self, paths: list[str], commit: str) -> list[RemoteFile]:
        entries = self.api.get_paths_info(self.repository, paths, revision=commit, repo_type="dataset")
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return [RemoteFile(file.path, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None) for file in files]

    def _ask(self, question: Callable[[], T]) -> T:
        """Put a question to the API, patiently."""
        meter = Meter(lambda _: None)
        patience = self.patience
        answer = partial(within, patience.answer_s, meter, partial(_of_a_hub, question))
        return persist(
            answer, patience, patience.questions, meter, explain=lambda cause: self._explain(cause, self.repository)
        )

    def _persist(
        self, attempt: Callable[[], None], file: RemoteFile, meter: Meter, progress: Callable[[], int] = lambda: 0
    ) -> None:
        patience = self.patience
        persist(
            attempt,
            patience,
            patience.attempts,
            meter,
            explain=lambda cause: self._explain(cause, file.path),
            progress=progress,
        )

    def _explain(self, cause: BaseException, what: str) -> OmniError:
        return explain(cause, what, self.repository, self.host)


def open_hub(repository: str, patience: Patience) -> Hub:
    """Return a dataset of the hub that HF_ENDPOINT names, with huggingface_hub made quiet, patient and plain.

    Raises:
        UsageError: HF_ENDPOINT is not an address.
    """
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"HF_ENDPOINT is not an address like {DEFAULT_ENDPOINT}; unset it or correct it")
    constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask the hub which agents there are, before the first request
    for name in ("huggingface_hub", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what they log has signed addresses in it
    set_client_factory(partial(_client, patience))
    return Hub(repository, endpoint, patience)


def _client(patience: Patience) -> httpx2.Client:
    client = default_client_factory()
    client.timeout = patience.timeout(patience.answer_s)
    return client


def _of_a_hub(call: Callable[[], T]) -> T:
    """Call huggingface_hub, which takes every document for a hub's."""
    try:
        return call()
    except HfHubHTTPError:  # a refusal; BadRequestError is a ValueError too
        raise
    except (ValueError, KeyError, TypeError):
        raise NotAHubError from None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
