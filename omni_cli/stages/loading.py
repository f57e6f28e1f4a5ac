"""The workers of a loader: slow to hear of an end, and when one fails, in the words of what failed there."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from omni_cli.errors import OmniError
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.stages.worker import GROUP_SIGNALS

_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
_ERRNO = re.compile(r"\[Errno (\d+)\] [^:\n]*(?:: '(.*)')?\s*$")
_PATIENCE_S = 120  # one that nobody ends, since the training crashed, must not stay for ever
_KILLED = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")


@dataclass(frozen=True)
class Patient:
    """What a worker of a loader does first: it outlives a signal that is sent to every process of a training.

    A terminal sends Ctrl-C, a scheduler SIGTERM, to all of them; the one that trains ends its step first, and saves.

    Attributes:
        first: what the worker would have done first without this.
    """

    first: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        """Begin in a worker; torch has set its own handlers by then."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_PATIENCE_S))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        keep_freed_blocks()
        if self.first is not None:
            self.first(worker_id)


@contextmanager
def in_words_of_workers() -> Iterator[None]:
    """Raise what a worker of a loader raised as it was raised there: torch puts its traceback into the words.

    Raises:
        OmniError: as in the worker; or one was killed.
        OSError: as in the worker.
    """
    try:
        yield
    except (OmniError, OSError) as error:
        said = str(error)
        if not _FROM_WORKER.match(said):
            raise
        raise _as_it_was(error, said) from None
    except RuntimeError as error:
        if not _KILLED.search(str(error)):
            raise
        raise OmniError(
            "a worker that reads shards was killed, perhaps for memory; run the same command again, or with none of "
            "them: --set train.workers=0"
        ) from None


def _as_it_was(error: OmniError | OSError, said: str) -> Exception:
    kind = type(error)
    if isinstance(error, OmniError):
        return kind(said.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())
    found = _ERRNO.search(said)
    return OSError(int(found[1]), os.strerror(int(found[1])), found[2]) if found else error
