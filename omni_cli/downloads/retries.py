"""How long is waited for a server, and when a request is given up.

A failure that may pass is tried again after a pause that doubles, or after the one that the server asks for. Attempts
count only while they bring nothing: a line that breaks every minute and delivers in between still gets there.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from time import monotonic, time
from typing import TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils._http import parse_ratelimit_headers

from omni_cli.downloads.meter import Meter
from omni_cli.errors import OmniError

# What a request may raise; RuntimeError is httpx2's own of streams and of closed clients.
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError)
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_WRONG_CONTENT_ATTEMPTS = 3
_LOOK_S = 0.2
_DAY_S = 86_400.0  # longer is no answer

T = TypeVar("T")


class UnexpectedAnswerError(RuntimeError):
    """A server sent what a hub and its storage do not send; the text says what, without an address."""


class NotAHubError(RuntimeError):
    """What answers is no hub: its documents are of another kind."""


class ExpiredAddressError(RuntimeError):
    """The storage refused a signed address: it lives for an hour or so, and another can be had."""


class TooSlowError(RuntimeError):
    """A server is silent, or sends too little to ever end."""


@dataclass
class WrongContentError(RuntimeError):
    """A file arrived whole, and differs from what the hub promised for the `times`th time."""

    times: int


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds; the hub's own HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT are heeded."""

    first_wait_s: float = 1.0  # before the second attempt; it doubles
    longest_wait_s: float = 300.0  # the hub counts requests in windows of five minutes
    attempts: int = 8  # at a file, in a row, that bring nothing
    questions: int = 4  # attempts at a question to the API
    connect_s: float = float(constants.HF_HUB_ETAG_TIMEOUT)
    answer_s: float = 3.0 * constants.HF_HUB_ETAG_TIMEOUT  # for the whole answer to a question
    block_s: float = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)  # for the next bytes of a file
    least_bytes_per_s: float = 1000.0  # over three times that

    def timeout(self, read_s: float) -> httpx2.Timeout:
        """Return httpx2's limits: none of them ends an answer that drips, see `within` and the least rate."""
        return httpx2.Timeout(read_s, connect=self.connect_s, pool=None)


def persist(
    attempt: Callable[[], T],
    patience: Patience,
    attempts: int,
    meter: Meter,
    *,
    explain: Callable[[BaseException], OmniError],
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Call until it succeeds, or until so many `attempts` brought no `progress`, or the cause will not pass.

    Raises:
        OmniError: what `explain` makes of the last failure.
        StoppedError: the run ends.
    """
    fruitless = 0
    while True:
        before = progress()
        try:
            return attempt()
        except FAILURES as error:
            meter.wait(0.0)  # a cut connection is no failure of the server
            is_fruitful = progress() > before and not isinstance(error, TooSlowError)
            fruitless = 1 if is_fruitful else fruitless + 1
            if fruitless >= attempts or not _may_pass(error, patience):
                raise explain(error) from None
            meter.wait(max(asked_pause_s(error), patience.first_wait_s * 2 ** (fruitless - 1)))


def within(limit_s: float, meter: Meter, call: Callable[[], T], discard: Callable[[T], None] = lambda _: None) -> T:
    """Return what a blocking call returns within a time, whatever it waits for.

    A server that sends its header byte by byte satisfies every limit of a client. The call goes on in a thread of its
    own until its socket's limits end it; a result that comes too late is handed to `discard`.

    Raises:
        TooSlowError: the time is over.
        StoppedError: the run ends.
    """
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, call), daemon=True).start()
    deadline = monotonic() + limit_s
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    try:
        while not done.wait(_LOOK_S):
            meter.wait(0.0)
            if monotonic() > deadline:
                raise TooSlowError
    except BaseException:
        future.add_done_callback(partial(_discard_late, discard))
        raise
    return future.result()


def asked_pause_s(cause: BaseException) -> float:
    """Return how long a refusal asks to wait: `RateLimit: "api";r=0;t=55`, or `Retry-After`; 0 where it does not."""
    if not isinstance(cause, HfHubHTTPError):
        return 0.0
    headers = cause.response.headers
    limit = parse_ratelimit_headers(headers)
    if cause.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return min(limit.reset_in_seconds, _DAY_S) + 1.0
    asked = headers.get("Retry-After", "").strip()
    if asked.isascii() and asked.isdigit():
        return min(float(asked), _DAY_S)
    until_s = _http_date_s(asked)
    if until_s is None:
        return 0.0
    return min(max(0.0, until_s - (_http_date_s(headers.get("Date", "")) or time())), _DAY_S)


def _http_date_s(text: str) -> float | None:
    """Return the seconds since 1970 of a date such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7)."""
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()


def _settle(future: "Future[T]", call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _discard_late(discard: Callable[[T], None], late: "Future[T]") -> None:
    if late.exception() is None:
        discard(late.result())


def _may_pass(cause: BaseException, patience: Patience) -> bool:
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _TRANSIENT_STATUS and asked_pause_s(cause) <= patience.longest_wait_s
    if isinstance(cause, WrongContentError):
        return cause.times < _WRONG_CONTENT_ATTEMPTS
    if isinstance(cause, NotAHubError | OfflineModeIsEnabled | httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return False
    is_local = isinstance(cause, OSError) and cause.errno is not None  # the disk's; the network's are httpx2's
    return not is_local
