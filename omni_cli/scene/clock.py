"""Time as omni keeps it: integer microseconds on one clock a recording, never frame numbers times a rate."""

import numpy as np
import numpy.typing as npt

from omni_cli.errors import UsageError

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

MICROSECONDS_PER_SECOND = 1_000_000
SLOWEST_HZ, FASTEST_HZ = 0.001, 1000.0  # of instants that a model looks at; no camera is faster


def seconds(duration_us: int) -> float:
    """Return a duration in seconds."""
    return duration_us / MICROSECONDS_PER_SECOND


def check_rate(rate_hz: float) -> None:
    """Refuse a rate whose period in microseconds would be 0, far off, or past the range of an int64.

    Raises:
        UsageError: it is not between `SLOWEST_HZ` and `FASTEST_HZ`.
    """
    if not SLOWEST_HZ <= rate_hz <= FASTEST_HZ:
        raise UsageError(
            f"sample.rate_hz = {rate_hz:g}: expected {SLOWEST_HZ:g} to {FASTEST_HZ:g} frames a second, such as 10"
        )


def period_us(rate_hz: float) -> int:
    """Return the period of a rate, rounded to a microsecond.

    Raises:
        UsageError: no camera is that fast, or that slow.
    """
    check_rate(rate_hz)
    return round(MICROSECONDS_PER_SECOND / rate_hz)


def latest_at(timestamps_us: Int64Array, at_us: Int64Array) -> Int64Array:
    """Return, for each instant, the index of the last timestamp that is not after it.

    Args:
        timestamps_us: (n,) strictly increasing.
        at_us: (m,) instants.

    Returns:
        (m,) indices into `timestamps_us`; -1 where every timestamp is later. Past the last timestamp the last index
        is returned: whether that is still fresh enough is the caller's tolerance.
    """
    return np.searchsorted(timestamps_us, at_us, side="right").astype(np.int64) - 1


def nearest_to(timestamps_us: Int64Array, at_us: Int64Array) -> Int64Array:
    """Return, for each instant (m,), the index of the nearest timestamp; of two, the earlier.

    Args:
        timestamps_us: (n,) strictly increasing, not empty.
        at_us: (m,) instants.
    """
    after = np.clip(np.searchsorted(timestamps_us, at_us), 1, max(len(timestamps_us) - 1, 1))
    after = np.minimum(after, len(timestamps_us) - 1)
    before = np.maximum(after - 1, 0)
    is_before = at_us - timestamps_us[before] <= timestamps_us[after] - at_us
    return np.where(is_before, before, after).astype(np.int64)


def typical_period_us(timestamps_us: Int64Array) -> int:
    """Return the median interval between timestamps; needs at least two."""
    return int(np.median(np.diff(timestamps_us)))
