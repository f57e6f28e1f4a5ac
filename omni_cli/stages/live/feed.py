"""Live cameras read side by side, a thread each, into the newest windows that are whole: a queue that never grows."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_cli.errors import OmniError
from omni_cli.formats.live_video import Address, LiveFrame, StreamLostError, live_frames
from omni_cli.formats.video import Uint8Array
from omni_cli.report import Console
from omni_cli.samples.live_windows import LiveWindow, LiveWindows, Shot
from omni_cli.scene.stream_clock import StreamClock

TOO_SLOW = "the model was still busy with others"
EARLIER = "frames stated to be no later than the one before"
RECONNECTED = "connections made again"
CLOCK_SET = "clocks set again"
_SETTLING_US = 1_000_000  # of several cameras: what a server held back comes in a burst, and tells nothing of delays
_BACKOFF_S = 1.0  # before the first new connection; twice that before the next
_GOODBYE_S = 1.0  # that a thread is waited for at the end


@dataclass(frozen=True)
class Ready:
    """A window that waits for the model."""

    window: LiveWindow
    taken_us: int  # when its newest frame was taken, as far as its arrival tells; this machine's monotonic clock
    ended_us: int  # when its last instant was, likewise


@dataclass(frozen=True)
class Reading:
    """How live cameras are read."""

    cameras: Sequence[Address]
    size_of: Callable[[int, int], tuple[int, int]]  # of a camera's pictures -> of those that are made
    cells: Callable[[Uint8Array], Uint8Array]  # a picture -> the cells that it fills
    patience_s: float
    reconnects: int
    waiting: int  # windows that may wait


@dataclass
class Feed:
    """The windows of live cameras."""

    reading: Reading
    windows: LiveWindows
    console: Console
    ended: str = ""  # why no more comes
    failure: BaseException | None = None
    _ready: deque[Ready] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _origin_us: int | None = None
    _inputs: list["_Input"] = field(init=False)
    _threads: list[threading.Thread] = field(init=False)

    def __post_init__(self) -> None:
        self._inputs = [_Input(number) for number in range(len(self.reading.cameras))]
        self._threads = [
            threading.Thread(target=self._read, args=(one,), name=f"camera {one.number}", daemon=True)
            for one in self._inputs
        ]

    def __enter__(self) -> "Feed":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        for thread in self._threads:  # one that waits for a silent camera ends with the process
            thread.join(_GOODBYE_S)

    def take(self, until_s: float | None) -> list[Ready]:
        """Wait for windows; return those that are whole, the oldest first, or none where no more will come.

        Args:
            until_s: on the clock of `time.monotonic`: from then on none is returned, not even one that is whole.
        """
        with self._changed:
            while until_s is None or time.monotonic() < until_s:
                if self._ready or self.ended or self.failure:
                    break
                self._changed.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
            else:
                return []
            taken = list(self._ready)
            self._ready.clear()
        return taken

    @property
    def troubles(self) -> dict[str, int]:
        """What went wrong on the way, by what it was."""
        return dict(sum((one.counted for one in self._inputs), Counter[str]()))

    # -- in a thread of each camera

    def accept(self, camera: int, frame: LiveFrame) -> None:
        """Take a frame of a camera, by its number."""
        with self._changed:
            self._accept(self._inputs[camera], frame)

    def _read(self, one: "_Input") -> None:
        try:
            ended = self._read_on(one)
        except BaseException as error:  # it belongs to whoever waits
            self._end(error)
        else:
            self._end(ended)

    def _read_on(self, one: "_Input") -> str:
        """Read a camera until its stream ends; one that is lost is connected to again, a few times in a row."""
        title = self.reading.cameras[one.number].title
        while not self._stopping.is_set():
            try:
                if self._read_once(one) or not self.reading.reconnects:
                    return f"{title} has ended"
                raise StreamLostError(f"{title}: closed the connection")
            except OmniError as error:
                self._bear(one, error)
        return ""

    def _read_once(self, one: "_Input") -> bool:
        """Read one connection to its end; say whether it was we who ended it."""
        reading = self.reading
        address = reading.cameras[one.number]
        patience_s = reading.patience_s
        for frame in live_frames(address, reading.size_of, patience_s=patience_s, counted=one.counted):
            if self._stopping.is_set():
                return True
            self.accept(one.number, frame)
        return False

    def _bear(self, one: "_Input", error: OmniError) -> None:
        """Wait before a lost camera is connected to again, or give up."""
        if not one.number_seen or one.tries >= self.reading.reconnects or self._stopping.is_set():
            raise error
        with self._changed:
            self.windows.break_off(one.number)
            one.clock = StreamClock()
            one.counted[RECONNECTED] += 1
        one.tries += 1
        wait_s = _BACKOFF_S * 2 ** (one.tries - 1)
        self.console.warn(f"{error}; trying again in {wait_s:g} s ({one.tries} of {self.reading.reconnects})")
        self._stopping.wait(wait_s)

    def _end(self, why: str | BaseException) -> None:
        with self._changed:
            if isinstance(why, BaseException):
                self.failure = self.failure or why
            else:
                self.ended = self.ended or why or "stopped"
            self._changed.notify_all()

    # -- with the lock held

    def _accept(self, one: "_Input", frame: LiveFrame) -> None:
        one.tries = 0
        one.number_seen += 1
        if one.clock.jumped_us(frame.pts_us, frame.arrived_us) > self.reading.patience_s * 1e6:
            self._set_again(one)
        one.clock.note(frame.pts_us, frame.arrived_us)
        if len(self._inputs) > 1 and abs(one.clock.drift_us) > self.windows.max_age_us // 2:
            self._set_again(one)
            one.clock.note(frame.pts_us, frame.arrived_us)
        one.newest = frame
        if one.clock.offset_us is None:
            self._set_clocks(frame.arrived_us)
        elif self._origin_us is not None:
            self._put(one, frame)

    def _set_again(self, one: "_Input") -> None:
        self.windows.break_off(one.number)
        one.clock = StreamClock()
        one.counted[CLOCK_SET] += 1

    def _set_clocks(self, now_us: int) -> None:
        """Set the clocks of cameras whose delays are known; the windows' clock begins when all of them have been."""
        settling_us = _SETTLING_US if len(self._inputs) > 1 else 0
        fresh = [one for one in self._inputs if one.clock.offset_us is None]
        fresh = [one for one in fresh if one.clock.has_settled(now_us, settling_us)]
        for one in fresh:
            one.clock.set()
        if self._origin_us is not None:
            for one in fresh:
                self._put_newest(one)
        elif all(one.clock.offset_us is not None for one in self._inputs):
            self._origin_us = max(one.taken_us(one.newest_pts_us) for one in self._inputs)
            for one in self._inputs:
                self._put_newest(one)

    def _put_newest(self, one: "_Input") -> None:
        if one.newest is not None:
            self._put(one, one.newest)

    def _put(self, one: "_Input", frame: LiveFrame) -> None:
        """Give a frame its place on the windows' clock, and let the windows that it makes whole wait for the model."""
        assert self._origin_us is not None
        time_us = one.taken_us(frame.pts_us) - self._origin_us
        if one.last_us is not None and time_us <= one.last_us:
            one.counted[EARLIER] += 1
            return
        one.last_us = time_us
        shot = Shot(one.number_seen - 1, time_us, lambda: self.reading.cells(frame.picture()))
        for window in self.windows.accept(one.number, shot):
            if len(self._ready) == self.reading.waiting:
                self._ready.popleft()
                self.windows.dropped[TOO_SLOW] += 1
            self._ready.append(self._timed(window, self._origin_us, frame.arrived_us))
            self._changed.notify_all()

    def _timed(self, window: LiveWindow, origin_us: int, arrived_us: int) -> Ready:
        """Say when a window was: by the stated times and the shortest delays of late, and not after it was whole."""
        late = np.array([one.clock.late_us for one in self._inputs])
        taken_us = origin_us + int(np.max(window.planned.timestamp_us[-1] + late))
        ended_us = origin_us + window.planned.end_us + int(np.max(late))
        return Ready(window, min(taken_us, arrived_us), min(ended_us, arrived_us))


@dataclass
class _Input:
    """What is known of one camera; of its frames only the newest."""

    number: int
    clock: StreamClock = field(default_factory=StreamClock)
    newest: LiveFrame | None = None
    number_seen: int = 0  # frames
    last_us: int | None = None  # time of its newest frame in windows
    tries: int = 0  # connections in a row that gave no frame
    counted: Counter[str] = field(default_factory=Counter)  # what went wrong on the way

    @property
    def newest_pts_us(self) -> int:
        assert self.newest is not None  # its clock is set by it
        return self.newest.pts_us

    def taken_us(self, pts_us: int) -> int:
        """Return a stated time on this machine's clock."""
        assert self.clock.offset_us is not None
        return pts_us + self.clock.offset_us
