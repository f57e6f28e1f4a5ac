"""Put on PYTHONPATH, this makes flock succeed always and lock nothing, as on some network disks."""

import fcntl


def _flock(descriptor: object, operation: int) -> None:
    pass


fcntl.flock = _flock
