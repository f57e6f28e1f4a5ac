"""What SIGTERM means to work that can be killed at any moment: stop, say so, and be run again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from omni_cli.errors import Preempted


class _Terminated(BaseException):
    """Nothing catches this on its way up, as with Ctrl-C."""


@contextmanager
def preemptible(said: str) -> Iterator[None]:
    """Leave the block on SIGTERM, as on Ctrl-C; a second one does not disturb what then cleans up.

    Args:
        said: what the user is told: what is saved, and what to do.

    Raises:
        Preempted: SIGTERM came.
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except _Terminated:
        raise Preempted(said) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Terminated
