"""One answer of a server, checked and appended to what is there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

import httpx2
from huggingface_hub import get_session
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from omni_cli.downloads.meter import Meter
from omni_cli.downloads.retries import ExpiredAddressError, Patience, TooSlowError, UnexpectedAnswerError, within

_EXPIRED_STATUS = (400, 401, 403, 410)  # what storages answer to a signed address that is too old
_RATE_SPANS = 3.0


class Sink(Protocol):
    """Where bytes of a file go: they come in order, from `first` up to `end`."""

    @property
    def first(self) -> int:
        """Return the byte of the file that an answer must begin with."""

    @property
    def end(self) -> int:
        """Return the byte of the file after the last one that is wanted."""

    def append(self, block: bytes) -> None:
        """Take what follows."""

    def restart(self) -> bool:
        """Begin again with the file's first byte; return whether that can be done."""


class Span:
    """A part of a file in memory."""

    def __init__(self, start: int, size: int, meter: Meter) -> None:
        self.content = bytearray()
        self.end = start + size
        self._start = start
        self._meter = meter

    @property
    def first(self) -> int:
        """Return the byte of the file that an answer must begin with."""
        return self._start + len(self.content)

    def append(self, block: bytes) -> None:
        """Take what follows.

        Raises:
            StoppedError: the run ends.
        """
        self.content += block
        self._meter.add(len(block))

    def restart(self) -> bool:
        """Refuse: the whole file is not wanted."""
        return False


class FileSpan:
    """A part of a file, on disk: what an earlier call left of it is continued.

    A context manager: leaving it closes the file and keeps what is in it.
    """

    def __init__(self, start: int, size: int, path: Path, meter: Meter) -> None:
        self.end = start + size
        self._stream = path.open("ab", buffering=0)
        self.first = start + self._stream.tell()
        self._meter = meter

    def __enter__(self) -> "FileSpan":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, block: bytes) -> None:
        """Write what follows.

        Raises:
            OSError: the disk refuses.
            StoppedError: the run ends.
        """
        rest = memoryview(block)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self.first += len(block)
        self._meter.add(len(block))

    def restart(self) -> bool:
        """Refuse: the whole file is not wanted."""
        return False


@dataclass(frozen=True)
class Address:
    """Where a file's bytes are: at the hub, which wants the token, or at a storage, which must never see it."""

    url: str
    is_hub: bool

    def __repr__(self) -> str:
        """Return nothing that is signed."""
        return f"Address(is_hub={self.is_hub})"


def pull(address: Address, sink: Sink, size: int, patience: Patience, meter: Meter) -> None:
    """Append what one answer brings of a file of `size` bytes.

    Raises:
        HfHubHTTPError: the server refuses.
        ExpiredAddressError: another address is needed.
        UnexpectedAnswerError: what came is not the range that was asked for.
        TooSlowError: it does not come.
        httpx2.HTTPError: the network failed.
        OSError: the disk refuses.
        StoppedError: the run ends.
    """
    with _opened(address, sink, patience, meter) as response:
        _check_head(response, sink, size)
        for block in _steadily(response, patience):
            if len(block) > sink.end - sink.first:
                raise UnexpectedAnswerError("more bytes came than the hub promises")
            sink.append(block)
    if sink.first < sink.end:
        raise UnexpectedAnswerError("the answer ended early")


@contextlib.contextmanager
def _opened(address: Address, sink: Sink, patience: Patience, meter: Meter) -> Iterator[httpx2.Response]:
    headers = {"Range": f"bytes={sink.first}-{sink.end - 1}", "Accept-Encoding": "identity"}
    client = get_session()
    request = client.build_request(
        "GET",
        address.url,
        headers={**(build_hf_headers() if address.is_hub else {}), **headers},
        timeout=patience.timeout(patience.block_s),
    )

    def open_it() -> httpx2.Response:
        response = client.send(request, stream=True)
        if response.status_code >= 400:
            with contextlib.closing(response):
                _refuse(response, address, sink)
        return response

    response = within(patience.answer_s, meter, open_it, discard=httpx2.Response.close)
    connection = response.extensions["network_stream"].get_extra_info("socket")
    with contextlib.closing(response), meter.watching(connection):
        yield response


def _refuse(response: httpx2.Response, address: Address, sink: Sink) -> None:
    """Raise what a refusal means."""
    if response.status_code == 416:  # the server's file is shorter than what is here
        sink.restart()
        raise UnexpectedAnswerError("the server has no such range of it")
    if not address.is_hub and response.status_code in _EXPIRED_STATUS:
        raise ExpiredAddressError
    response.read()
    hf_raise_for_status(response)


def _check_head(response: httpx2.Response, sink: Sink, size: int) -> None:
    """Refuse an answer that cannot be what was asked for, before a byte of it is kept."""
    headers = response.headers
    if headers.get("Content-Type", "").startswith("text/html"):  # without a length it would spoil what is here
        raise UnexpectedAnswerError("a web page came instead of data")
    if response.status_code not in (200, 206) or headers.get("Content-Encoding", "identity") != "identity":
        raise UnexpectedAnswerError(f"an answer {response.status_code} of another kind came")
    if response.status_code == 206 and headers.get("Content-Range") != f"bytes {sink.first}-{sink.end - 1}/{size}":
        raise UnexpectedAnswerError("another range came than was asked for")
    if response.status_code == 200 and (sink.end < size or (sink.first > 0 and not sink.restart())):
        raise UnexpectedAnswerError("the server ignores ranges")
    wanted = sink.end - sink.first
    if int(headers.get("Content-Length", wanted)) != wanted:
        raise UnexpectedAnswerError(f"an answer of another length came than {wanted} bytes")


def _steadily(response: httpx2.Response, patience: Patience) -> Iterator[bytes]:
    """Yield what comes, as long as enough of it comes."""
    span_s = _RATE_SPANS * patience.block_s
    began, count = monotonic(), 0
    for block in response.iter_raw():
        yield block
        count += len(block)
        if monotonic() - began > span_s:
            if count < patience.least_bytes_per_s * span_s:
                raise TooSlowError
            began, count = monotonic(), 0
