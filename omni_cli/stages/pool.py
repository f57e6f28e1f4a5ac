"""A supervised pool of processes: whatever happens to a worker costs one attempt of one item.

Each worker holds one item at a time, so that a crash, a hang or an allocation beyond the limit is known to be that
item's. A worker that failed is replaced: what it leaked goes with it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from omni_cli.stages.worker import TAIL_BYTES, Answer, Begun, Moved, Worker, attempt_here, spawn, undisturbed

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_S = 0.2
_LOOK_S = 1.0  # the most that one look at the workers counts for a deadline


@dataclass(frozen=True)
class Failure:
    """One attempt that ended without a result."""

    error: str  # one line
    trace: str  # the last 4 KB of the worker's stderr, or where the exception was raised
    begun: str  # what the item's function said to `begin`, or nothing


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of one item: a result, or the error of its last attempt."""

    item: Item
    result: Result | None
    error: str | None
    attempts: int


CountAttempt = Callable[[Item, Failure], int]
Listen = Callable[[Item, float], None]


@dataclass
class _Task(Generic[Item]):
    item: Item
    attempts: int = 0


@dataclass
class _Running(Generic[Item]):
    worker: Worker
    task: _Task[Item]
    allow_s: float
    deadline: float
    begun: str = ""


def run_pool(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    attempts: int = 2,
    timeout_s: float = 600.0,
    memory_bytes: int | None = None,
    count: CountAttempt[Item] | None = None,
    listen: Listen[Item] | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Apply a function to every item and yield an outcome for each, in the order of completion.

    Args:
        function: picklable; its exceptions are errors of the item, not of the pool.
        items: picklable.
        workers: processes; 0 runs everything in this process, without limits.
        attempts: how often an item is tried before its outcome is an error.
        timeout_s: a worker that takes longer for one item is killed, unless the function asked `begin` for more.
        memory_bytes: limit of a worker's private memory (RLIMIT_DATA); None sets no limit.
        count: called for each failed attempt, returns how many an item has failed: a memory that outlives this
            process. None counts here.
        listen: told how much of an item is done, 0 to 1, where its function says so with `moved`; a new attempt
            begins at 0 again.
    """
    with Pool(function, workers, attempts, timeout_s, memory_bytes, count, listen) as pool:
        yield from pool.run(items)


@dataclass
class Pool(Generic[Item, Result]):
    """Workers that stay for the next items; arguments as for `run_pool`. To be used in a `with` block."""

    function: Callable[[Item], Result]
    workers: int
    attempts: int
    timeout_s: float
    memory_bytes: int | None = None
    count: CountAttempt[Item] | None = None
    listen: Listen[Item] | None = None
    _idle: list[Worker] = field(default_factory=list)
    _running: dict[Connection, _Running[Item]] = field(default_factory=dict)
    _watched_s: float = 0.0  # the clock of the deadlines
    _looked_s: float = field(default_factory=time.monotonic)

    def __enter__(self) -> "Pool[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, items: Iterable[Item]) -> Iterator[Outcome[Item, Result]]:
        """Yield an outcome for every item."""
        todo = deque(_Task(item) for item in items)
        if self.workers == 0:
            yield from self._run_here(todo)
        while todo or self._running:
            while todo and len(self._running) < self.workers:
                self._start(todo.popleft())
            for task, answer, failure in [*self._answers(), *self._overdue()]:
                outcome = self._judge(task, answer, failure)
                if outcome is None:
                    todo.append(task)
                else:
                    yield outcome

    def close(self) -> None:
        """End all workers, those in the middle of an item too; an idle one has nothing to lose, and may be stuck."""
        workers = [*self._idle, *(running.worker for running in self._running.values())]
        with undisturbed():
            for worker in workers:
                worker.process.kill()
        for worker in workers:
            worker.kill()
            worker.close()
        self._idle.clear()
        self._running.clear()

    def _run_here(self, todo: deque[_Task[Item]]) -> Iterator[Outcome[Item, Result]]:
        while todo:
            task = todo.popleft()
            answer, begun = attempt_here(self.function, task.item, partial(self._tell, task.item))
            failure = Failure(answer.error, answer.trace[-TAIL_BYTES:], begun) if answer.error is not None else None
            outcome = self._judge(task, answer, failure)
            if outcome is None:
                todo.appendleft(task)
            else:
                yield outcome

    def _start(self, task: _Task[Item]) -> None:
        worker = self._idle.pop() if self._idle else spawn(self.function, self.memory_bytes)
        try:
            worker.connection.send(task.item)
        except OSError:  # an idle worker died; its death is nobody's fault
            worker.kill()
            worker.close()
            worker = spawn(self.function, self.memory_bytes)
            worker.connection.send(task.item)
        deadline = self._watched_s + self.timeout_s
        self._running[worker.connection] = _Running(worker, task, self.timeout_s, deadline)

    def _answers(self) -> list[tuple[_Task[Item], Answer, Failure | None]]:
        """Collect what workers said; a worker that died said that it died."""
        talking = [running.worker.stderr for running in self._running.values() if running.worker.is_talking]
        heard = wait([*self._running, *talking], timeout=_POLL_S)
        for running in self._running.values():
            running.worker.listen()
        found = (self._hear(connection) for connection in list(self._running) if connection in heard)
        return [ended for ended in found if ended is not None]

    def _hear(self, connection: Connection) -> tuple[_Task[Item], Answer, Failure | None] | None:
        running = self._running[connection]
        try:
            said = connection.recv()
        except (EOFError, OSError):
            return self._lose(running, running.worker.death())
        except Exception as error:  # whatever unpickling raises
            return self._lose(running, f"worker sent what cannot be read: {error}")
        if isinstance(said, Moved):
            self._tell(running.task.item, said.share)
            return None
        if isinstance(said, Begun):
            running.begun, running.allow_s = said.what, said.allow_s
            running.deadline = self._watched_s + said.allow_s
            return None
        if said.error is not None:
            return self._lose(running, said.error, said.trace)
        self._idle.append(self._running.pop(connection).worker)
        return running.task, said, None

    def _tell(self, item: Item, share: float) -> None:
        if self.listen is not None:
            self.listen(item, share)

    def _overdue(self) -> list[tuple[_Task[Item], Answer, Failure | None]]:
        self._look()
        late = [running for running in self._running.values() if self._watched_s > running.deadline]
        return [self._lose(running, f"took longer than {running.allow_s:g} s") for running in late]

    def _look(self) -> None:
        """Advance the clock of the deadlines; it stands while this process does, for what stops one stops them all.

        Ctrl-Z, a suspended job and a paused container are no fault of any item.
        """
        now_s = time.monotonic()
        self._watched_s += min(now_s - self._looked_s, _LOOK_S)
        self._looked_s = now_s

    def _lose(self, running: _Running[Item], error: str, trace: str = "") -> tuple[_Task[Item], Answer, Failure]:
        """Let a worker go whose attempt failed."""
        worker = self._running.pop(running.worker.connection).worker
        worker.kill()
        said = f"{worker.tail()}{trace}"[-TAIL_BYTES:]
        worker.close()
        return running.task, Answer(error=error), Failure(error, said, running.begun)

    def _judge(self, task: _Task[Item], answer: Answer, failure: Failure | None) -> Outcome[Item, Result] | None:
        """Return the outcome of an item, or None where it gets another attempt."""
        if failure is None:
            return Outcome(task.item, answer.result, None, task.attempts + 1)
        remembered = self.count(task.item, failure) if self.count else 0
        task.attempts = max(task.attempts + 1, remembered)  # a memory that is lost, or starts anew, ends here
        if task.attempts < self.attempts:
            return None
        return Outcome(task.item, None, failure.error, task.attempts)
