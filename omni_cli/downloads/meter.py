"""What many transfers share: the progress they make, and the word to stop."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from omni_cli.errors import OmniError

_MEGABYTE = 1_000_000


class StoppedError(OmniError):
    """A transfer was given up because the whole run ends."""


@dataclass
class Meter:
    """Counts transferred bytes of many threads in whole megabytes, and tells all of them to stop."""

    advance: Callable[[int], None]
    _bytes: int = 0
    _shown_mb: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _connections: set[socket.socket] = field(default_factory=set)

    def add(self, count: int) -> None:
        """Count bytes; negative where they came to nothing.

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

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """Have a connection cut when the run ends: a thread that waits for bytes hears of nothing else.

        Raises:
            StoppedError: the run ends.
        """
        with self._lock:
            self._connections.add(connection)
        try:
            self.wait(0.0)
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def stop(self) -> None:
        """End every transfer at once."""
        self._stop.set()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the other side was faster
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would write first
