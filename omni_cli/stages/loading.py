"""What a loader's worker says when it fails, in the words of what failed there: torch puts its traceback into them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from omni_cli.errors import OmniError

_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
_ERRNO = re.compile(r"\[Errno (\d+)\] [^:\n]*(?:: '(.*)')?\s*$")
_KILLED = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")


@contextmanager
def in_words_of_workers() -> Iterator[None]:
    """Raise what a worker of a loader raised as it was raised there.

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
