"""How the clock of a live camera's stream lies on this machine's.

A stream says when each frame was taken, on a clock of its own. Nothing says how that lies on another camera's but when
the frames arrive: the shortest delay seen is taken for what the camera and its network always need. By how much that
differs between two cameras is not known.
"""

from dataclasses import dataclass

_INTERVAL_US = 10_000_000  # over which the delay is watched


@dataclass
class StreamClock:
    """One camera's stream, since it was last connected to."""

    offset_us: int | None = None  # this machine's time of the stream's 0; None until it is set
    _began_us: int = 0  # when the first frame arrived
    _last_us: tuple[int, int] | None = None  # stated time and arrival of the newest frame
    _recent_us: int | None = None  # the shortest (arrival - stated time) of the running interval
    _before_us: int | None = None  # and of the one before
    _interval_us: int = 0  # when the running one began

    def jumped_us(self, pts_us: int, arrived_us: int) -> int:
        """Return by how much a frame's stated time leaps, measured by how long it was waited for."""
        if self._last_us is None:
            return 0
        return abs((pts_us - self._last_us[0]) - (arrived_us - self._last_us[1]))

    def note(self, pts_us: int, arrived_us: int) -> None:
        """Note when a frame was taken and when it came."""
        delay_us = arrived_us - pts_us
        if self._last_us is None:
            self._began_us = self._interval_us = arrived_us
        elif arrived_us - self._interval_us >= _INTERVAL_US:
            self._before_us, self._recent_us, self._interval_us = self._recent_us, None, arrived_us
        self._recent_us = delay_us if self._recent_us is None else min(delay_us, self._recent_us)
        self._last_us = pts_us, arrived_us

    def has_settled(self, arrived_us: int, settling_us: int) -> bool:
        """Say whether frames have come for long enough to tell their delay."""
        return self._last_us is not None and arrived_us - self._began_us >= settling_us

    def set(self) -> None:
        """Lay the stream's clock on this machine's, by the shortest delay seen."""
        self.offset_us = self._shortest_us

    @property
    def drift_us(self) -> int:
        """By how far the delay of the last whole interval is from what the clock was set by."""
        return 0 if self.offset_us is None or self._before_us is None else self._before_us - self.offset_us

    @property
    def late_us(self) -> int:
        """By how far the delay now is from that: of the last two intervals alone, for no clock runs as another does."""
        return 0 if self.offset_us is None or self._shortest_us is None else self._shortest_us - self.offset_us

    @property
    def _shortest_us(self) -> int | None:
        return min((delay for delay in (self._before_us, self._recent_us) if delay is not None), default=None)
