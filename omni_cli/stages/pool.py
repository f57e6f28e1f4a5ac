"""A supervised pool of processes: whatever happens to a worker costs one attempt of one item.

Each worker holds one item at a time, so that a crash, a hang or an allocation beyond the limit is known to be that
item's. Workers come from a forkserver that has imported nothing heavy, ignore Ctrl-C (the supervisor decides), and end
themselves when the supervisor is gone.
"""

import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_S = 0.2
_LOST_SUPERVISOR = 1


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of one item: a result, or the error of its last attempt."""

    item: Item
    result: Result | None
    error: str | None
    attempts: int


@dataclass
class _Worker:
    connection: Connection
    process: BaseProcess


@dataclass
class _Task(Generic[Item]):
    item: Item
    attempts: int = 0


@dataclass
class _Running(Generic[Item]):
    worker: _Worker
    task: _Task[Item]
    deadline: float


def run_pool(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    attempts: int = 2,
    timeout_s: float = 600.0,
    memory_bytes: int | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Apply a function to every item and yield an outcome for each, in the order of completion.

    Args:
        function: picklable; its exceptions are errors of the item, not of the pool.
        items: picklable.
        workers: processes; 0 runs everything in this process, and so does a single item.
        attempts: how often an item is tried before its outcome is an error.
        timeout_s: a worker that takes longer for one item is killed.
        memory_bytes: limit of a worker's private memory (RLIMIT_DATA); None sets no limit.
    """
    todo = deque(_Task(item) for item in items)
    if workers == 0 or len(items) <= 1:
        yield from _inline(function, todo, attempts)
    else:
        yield from _Pool(function, workers, attempts, timeout_s, memory_bytes).run(todo)


def _inline(
    function: Callable[[Item], Result], todo: deque[_Task[Item]], attempts: int
) -> Iterator[Outcome[Item, Result]]:
    for task in todo:
        is_result, value = _attempt(function, task.item)
        task.attempts = 1
        while not is_result and task.attempts < attempts:
            is_result, value = _attempt(function, task.item)
            task.attempts += 1
        yield Outcome(task.item, value if is_result else None, None if is_result else value, task.attempts)


@dataclass
class _Pool(Generic[Item, Result]):
    function: Callable[[Item], Result]
    workers: int
    attempts: int
    timeout_s: float
    memory_bytes: int | None
    idle: list[_Worker] = field(default_factory=list)
    running: dict[Connection, _Running[Item]] = field(default_factory=dict)

    def run(self, todo: deque[_Task[Item]]) -> Iterator[Outcome[Item, Result]]:
        try:
            while todo or self.running:
                while todo and len(self.running) < self.workers:
                    self._start(todo.popleft())
                for running, answer in [*self._answers(), *self._overdue()]:
                    outcome = self._judge(running.task, answer)
                    if outcome is None:
                        todo.append(running.task)
                    else:
                        yield outcome
        finally:
            self._stop()

    def _start(self, task: _Task[Item]) -> None:
        worker = self.idle.pop() if self.idle else self._spawn()
        try:
            worker.connection.send(task.item)
        except OSError:  # an idle worker died; its death is nobody's fault
            worker.process.join()
            worker = self._spawn()
            worker.connection.send(task.item)
        self.running[worker.connection] = _Running(worker, task, time.monotonic() + self.timeout_s)

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, pickle.dumps(self.function), self.memory_bytes), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(ours, process)

    def _answers(self) -> list[tuple[_Running[Item], tuple[bool, Any]]]:
        """Collect what workers said; a worker that died said that it died."""
        found = []
        for connection in wait(list(self.running), timeout=_POLL_S):
            assert isinstance(connection, Connection)
            running = self.running.pop(connection)
            try:
                answer = connection.recv()
                self.idle.append(running.worker)
            except (EOFError, OSError):
                running.worker.process.join()
                answer = False, f"worker died: {_exit_text(running.worker.process.exitcode)}"
            found.append((running, answer))
        return found

    def _overdue(self) -> list[tuple[_Running[Item], tuple[bool, Any]]]:
        now = time.monotonic()
        late = [running for running in self.running.values() if now > running.deadline]
        for running in late:
            del self.running[running.worker.connection]
            _kill(running.worker)
        return [(running, (False, f"took longer than {self.timeout_s:g} s")) for running in late]

    def _judge(self, task: _Task[Item], answer: tuple[bool, Any]) -> Outcome[Item, Result] | None:
        """Return the outcome of an item, or None where it gets another attempt."""
        is_result, value = answer
        task.attempts += 1
        if is_result:
            return Outcome(task.item, value, None, task.attempts)
        return None if task.attempts < self.attempts else Outcome(task.item, None, value, task.attempts)

    def _stop(self) -> None:
        for running in self.running.values():
            _kill(running.worker)
        for worker in self.idle:
            worker.connection.close()
        for worker in self.idle:
            worker.process.join()


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(connection: Connection, function: bytes, memory_bytes: int | None) -> None:
    """Serve items until the supervisor closes the pipe.

    The function comes pickled: what it imports may take seconds, and the watch over the supervisor begins before that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    serve = pickle.loads(function)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(serve, item))


def _attempt(function: Callable[[Any], Any], item: Any) -> tuple[bool, Any]:
    try:
        return True, function(item)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _end_with_supervisor() -> None:
    """End this process as soon as the supervisor is gone, even in the middle of an item."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        wait([supervisor.sentinel])
        os._exit(_LOST_SUPERVISOR)
