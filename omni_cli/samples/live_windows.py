"""Windows of cameras that are live, chosen as `samples.sync` does of a recording, while the frames come.

Of each camera no more is kept than its pictures at the newest instants of the grid: a window is whole as soon as every
camera has a frame at or after its last instant. A camera that falls behind or stalls costs windows, never memory.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from omni_cli.formats.video import Uint8Array
from omni_cli.samples.sync import STALE_FRAME, PlannedWindow
from omni_cli.scene.clock import period_us

BEHIND = "a camera was too far behind the others"
_LAG_S = 1.0  # by which one camera may be behind another


@dataclass(frozen=True)
class Shot:
    """A frame as it came, with its place in time; its picture is made if an instant looks at it."""

    number: int  # of the camera's frames
    time_us: int  # on the clock of the windows
    make: Callable[[], Uint8Array]

    @cached_property
    def cells(self) -> Uint8Array:
        """The cells that it fills (cameras, cell height, cell width, 3)."""
        return self.make()


class Seen(NamedTuple):
    """What a camera shows at an instant."""

    number: int
    time_us: int
    cells: Uint8Array


@dataclass(frozen=True)
class LiveWindow:
    """A window that is whole."""

    planned: PlannedWindow
    seen: Sequence[Sequence[Seen]]  # (num_frames) of (cameras)

    @property
    def pictures(self) -> Uint8Array:
        """The window as a model is shown it: (num_frames, cells, cell height, cell width, 3)."""
        return np.stack([np.concatenate([one.cells for one in instant]) for instant in self.seen])


@dataclass
class _Track:
    """One camera at the newest instants."""

    period_us: int
    max_age_us: int
    slots: deque[Seen | None]
    decided: int = 0  # instants 0 .. decided - 1 are
    newest: Shot | None = None

    def accept(self, shot: Shot) -> Iterator[None]:
        """Decide, one after the other, the instants up to a new frame's time."""
        while (instant_us := self.decided * self.period_us) <= shot.time_us:
            shown = shot if instant_us == shot.time_us else self.newest
            self.slots.append(self._seen(shown, instant_us))
            self.decided += 1
            yield
        self.newest = shot

    def _seen(self, shown: Shot | None, instant_us: int) -> Seen | None:
        if shown is None or instant_us - shown.time_us > self.max_age_us:
            return None
        return Seen(shown.number, shown.time_us, shown.cells)

    def forget(self) -> None:
        """Let no window look at what came before now."""
        self.newest = None
        for place in range(len(self.slots)):
            self.slots[place] = None

    def at(self, instants: range) -> list[Seen | None] | None:
        """Return what is shown at some instants; None where that is no longer kept."""
        first_kept = self.decided - len(self.slots)
        if instants.start < first_kept:
            return None
        return [self.slots[instant - first_kept] for instant in instants]


@dataclass
class LiveWindows:
    """Puts the frames of live cameras together to windows.

    Instant i is at i x period on the windows' clock, and window n begins at instant n x stride: as of a recording whose
    clock begins at 0.
    """

    cameras: int
    rate_hz: float
    num_frames: int
    stride: int
    max_age_us: int
    dropped: Counter[str] = field(default_factory=Counter)
    _next: int = 0
    _tracks: list[_Track] = field(init=False)

    def __post_init__(self) -> None:
        period = period_us(self.rate_hz)
        self._tracks = [_Track(period, self.max_age_us, deque(maxlen=self.room)) for _ in range(self.cameras)]

    @property
    def room(self) -> int:
        """How many instants are kept of each camera."""
        lag = round(_LAG_S * self.rate_hz) if self.cameras > 1 else 0
        return self.num_frames + lag

    def accept(self, camera: int, shot: Shot) -> list[LiveWindow]:
        """Take a frame; return the windows that it made whole.

        Args:
            camera: number of its camera.
            shot: later than every one of that camera before.
        """
        made = []
        for _ in self._tracks[camera].accept(shot):
            made += self._whole()
        return made

    def break_off(self, camera: int) -> None:
        """Let no window reach over this moment: the camera's stream is lost, or its clock is set."""
        self._tracks[camera].forget()

    def _whole(self) -> list[LiveWindow]:
        made, decided = [], min(track.decided for track in self._tracks)
        while (start := self._next * self.stride) + self.num_frames <= decided:
            window = self._window(range(start, start + self.num_frames))
            made += [window] if window else []
            self._next += 1
        return made

    def _window(self, instants: range) -> LiveWindow | None:
        columns = [track.at(instants) for track in self._tracks]
        kept = [column for column in columns if column is not None]
        seen = [[one for one in instant if one is not None] for instant in zip(*kept, strict=True)]
        if len(kept) < len(columns):
            self.dropped[BEHIND] += 1
            return None
        if any(len(instant) < self.cameras for instant in seen):
            self.dropped[STALE_FRAME] += 1
            return None
        return LiveWindow(_planned(instants, period_us(self.rate_hz), seen), seen)


def _planned(instants: range, period: int, seen: Sequence[Sequence[Seen]]) -> PlannedWindow:
    index = np.array([[one.number for one in instant] for instant in seen], dtype=np.int64)
    times = np.array([[one.time_us for one in instant] for instant in seen], dtype=np.int64)
    return PlannedWindow(np.array(instants, dtype=np.int64) * period, index, times)
