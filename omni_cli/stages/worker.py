"""One worker process of a pool: it serves items one after the other, and is known by what it says.

It comes from a forkserver that has imported nothing heavy, leaves every signal to its supervisor, and ends itself when
the supervisor is gone. What it writes to stderr goes to the supervisor, which keeps the last 4 KB: there a crash tells
where it was.
"""

import faulthandler
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

TAIL_BYTES = 4096
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_READ_BYTES = 1 << 16
_LOST_SUPERVISOR = 1
_DEATH_S = 10.0
_TELL_S = 0.2  # between two words of how far an item is
_LONGEST_TEMPDIR = 107 - len("/pymp-12345678/listener-12345678")


@dataclass(frozen=True)
class Begun:
    """What an item's function said with `begin`."""

    what: str
    allow_s: float


@dataclass(frozen=True)
class Moved:
    """What an item's function said with `moved`."""

    share: float


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
    listener: Callable[[float], None] | None = None  # of an item that runs in the supervisor's own process
    begun: str = ""
    told_s: float = 0.0  # when it last said how far it is


_HERE = _Here()


def begin(what: str, allow_s: float) -> None:
    """Tell the supervisor what this item turned out to be, and how long it may take from now on.

    To be called by an item's function. An attempt that fails is counted as one of `what`.
    """
    _HERE.begun = what
    if _HERE.supervisor is not None:
        _HERE.supervisor.send(Begun(what, allow_s))


def moved(share: float) -> None:
    """Tell the supervisor how much of an item is done, 0 to 1; to be called as often as is handy by its function."""
    now_s = time.monotonic()
    if now_s - _HERE.told_s < _TELL_S:
        return
    _HERE.told_s = now_s
    if _HERE.supervisor is not None:
        _HERE.supervisor.send(Moved(share))
    elif _HERE.listener is not None:
        _HERE.listener(share)


def attempt_here(
    function: Callable[[Any], Any], item: Any, listener: Callable[[float], None] | None = None
) -> tuple[Answer, str]:
    """Apply a function in this process; return the answer and what it said to `begin`.

    Args:
        function: to apply.
        item: to it.
        listener: is told what the function says to `moved`.
    """
    _HERE.begun, _HERE.listener = "", listener
    try:
        return _attempt(function, item), _HERE.begun
    finally:
        _HERE.listener = None


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
        """End the worker whatever it does; one that waits for a disk that is gone ends when that answers."""
        self.process.kill()
        self.process.join(_DEATH_S)

    def close(self) -> None:
        """Let go of a worker that has ended."""
        self.connection.close()
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
    start_server()
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


def start_server() -> None:
    """Start the process that workers are forked from, where it does not run yet.

    A terminal and a scheduler send SIGINT and SIGTERM to every process of a group. This one holds them back, and so
    does what is forked from it until it says otherwise: the process that it works for decides what they mean.
    """
    _place_sockets()
    resource_tracker.ensure_running()  # it lets the signals through again where it starts
    with undisturbed():
        forkserver.ensure_running()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back the signals that would end a clean-up half-way."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _place_sockets() -> None:
    """Have multiprocessing name its sockets in /tmp where TMPDIR is too long for that (unix(7): 108 bytes).

    It chooses a folder once, and tells it to every process that is made later.
    """
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPDIR:
        tempfile.tempdir = "/tmp"
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def _work(connection: Connection, stderr: Connection, function: bytes, memory_bytes: int | None) -> None:
    """Serve items until the supervisor closes the pipe.

    The function comes pickled: what it imports may take seconds, and the watch over the supervisor begins before that.
    """
    os.dup2(stderr.fileno(), _STDERR)
    stderr.close()
    faulthandler.enable()
    for each in GROUP_SIGNALS:  # the supervisor decides
        signal.signal(each, signal.SIG_IGN)
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None  # this is its worker
    _have_me_killed_with(supervisor.sentinel)
    threading.Thread(target=_end_with, args=(supervisor.sentinel,), daemon=True).start()
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    _HERE.supervisor = connection
    serve = pickle.loads(function)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(serve, item))


def _limit_memory(memory_bytes: int) -> None:
    """Set the limit, or leave the one that is set from outside (`ulimit -d`) where that is lower."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    own = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (own, own))


def _attempt(function: Callable[[Any], Any], item: Any) -> Answer:
    try:
        return Answer(function(item))
    except Exception as error:
        return Answer(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _have_me_killed_with(sentinel: int) -> None:
    """Have the kernel kill this process when the pipe from the supervisor breaks (fcntl(2), F_SETSIG).

    A thread has no turn while a library holds the interpreter's lock, and none in a process that is stopped.
    """
    if sys.platform == "linux":
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def _end_with(sentinel: int) -> None:
    """End this process as soon as the supervisor is gone, even in the middle of an item."""
    wait([sentinel])
    os._exit(_LOST_SUPERVISOR)
