"""One worker process of a pool: it serves items one after the other, and is known by what it says.

It comes from a forkserver that has imported nothing heavy, leaves every signal to its supervisor, and ends itself when
the supervisor is gone. What it writes to stderr goes to the supervisor, which keeps the last 4 KB: there a crash tells
where it was.
"""

import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

TAIL_BYTES = 4096
_STDERR = 2
_READ_BYTES = 1 << 16
_LOST_SUPERVISOR = 1
_DEATH_S = 10.0


@dataclass(frozen=True)
class Begun:
    """What an item's function said with `begin`."""

    what: str
    allow_s: float


@dataclass(frozen=True)
class Answer:
    """The end of one attempt: a result, or an error in one line and where it happened."""

    result: Any = None
    error: str | None = None
    trace: str = ""


@dataclass
class _Here:
    """This process, seen from the function that it runs."""

    supervisor: Connection | None = None
    begun: str = ""


_HERE = _Here()


def begin(what: str, allow_s: float) -> None:
    """Tell the supervisor what this item turned out to be, and how long it may take from now on.

    To be called by an item's function. An attempt that fails is counted as one of `what`.
    """
    _HERE.begun = what
    if _HERE.supervisor is not None:
        _HERE.supervisor.send(Begun(what, allow_s))


def attempt_here(function: Callable[[Any], Any], item: Any) -> tuple[Answer, str]:
    """Apply a function in this process; return the answer and what it said to `begin`."""
    _HERE.begun = ""
    return _attempt(function, item), _HERE.begun


@dataclass
class Worker:
    """The supervisor's end of a worker."""

    connection: Connection
    process: BaseProcess
    stderr: Connection
    is_talking: bool = True  # until it closes its stderr
    _tail: bytearray = field(default_factory=bytearray)

    def listen(self) -> None:
        """Take what the worker wrote to stderr, so that it never waits for a reader; the last of it is kept."""
        try:
            while block := os.read(self.stderr.fileno(), _READ_BYTES):
                self._tail += block
                del self._tail[:-TAIL_BYTES]
            self.is_talking = False
        except BlockingIOError:  # no more for now
            return

    def tail(self) -> str:
        """Return the last 4 KB of the worker's stderr."""
        self.listen()
        return self._tail.decode(errors="replace")

    def kill(self) -> None:
        """End the worker whatever it does."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Let an idle worker, or a dead one, go."""
        self.connection.close()
        self.process.join()
        self.stderr.close()

    def death(self) -> str:
        """Say how a worker that broke its connection ended."""
        self.process.join(_DEATH_S)
        code = self.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"worker died: {how}"


def spawn(function: Callable[[Any], Any], memory_bytes: int | None) -> Worker:
    """Start a worker that applies a function to each item it is sent.

    Args:
        function: picklable.
        memory_bytes: limit of its private memory (RLIMIT_DATA); None sets no limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    stderr, their_stderr = context.Pipe(duplex=False)
    os.set_blocking(stderr.fileno(), False)
    process = context.Process(
        target=_work, args=(theirs, their_stderr, pickle.dumps(function), memory_bytes), daemon=True
    )
    process.start()
    theirs.close()
    their_stderr.close()
    return Worker(ours, process, stderr)


def _work(connection: Connection, stderr: Connection, function: bytes, memory_bytes: int | None) -> None:
    """Serve items until the supervisor closes the pipe.

    The function comes pickled: what it imports may take seconds, and the watch over the supervisor begins before that.
    """
    os.dup2(stderr.fileno(), _STDERR)
    stderr.close()
    faulthandler.enable()
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the supervisor decides
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    _HERE.supervisor = connection
    serve = pickle.loads(function)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(serve, item))


def _attempt(function: Callable[[Any], Any], item: Any) -> Answer:
    try:
        return Answer(function(item))
    except Exception as error:
        return Answer(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _end_with_supervisor() -> None:
    """End this process as soon as the supervisor is gone, even in the middle of an item."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        wait([supervisor.sentinel])
        os._exit(_LOST_SUPERVISOR)
