"""Time as omni keeps it: integer microseconds on one clock a recording, never frame numbers times a rate."""

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

MICROSECONDS_PER_SECOND = 1_000_000


def seconds(duration_us: int) -> float:
    """Return a duration in seconds."""
    return duration_us / MICROSECONDS_PER_SECOND


def period_us(rate_hz: float) -> int:
    """Return the period of a rate, rounded to a microsecond."""
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


def typical_period_us(timestamps_us: Int64Array) -> int:
    """Return the median interval between timestamps; needs at least two."""
    return int(np.median(np.diff(timestamps_us)))
