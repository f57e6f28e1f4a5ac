"""`omni infer` of live cameras: the newest windows are asked about, for as long as the streams come.

A model that is slower than its cameras answers the newest window that is whole; those that it had no time for are
counted. Every answer is on disk before the next window is taken.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from omni_cli.errors import OmniError, UsageError
from omni_cli.formats.live_video import Address, check_there, live_address
from omni_cli.formats.video import Uint8Array
from omni_cli.recipe import Asked, BuiltModel, Inferable, Row, Watchful, require
from omni_cli.report import Console, counted
from omni_cli.samples.live_windows import LiveWindows
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.views import MOSAIC
from omni_cli.stages.clips import in_order
from omni_cli.stages.infer import Answer, InferRequest, Subject, infer, load_subject
from omni_cli.stages.live.feed import Feed, Reading, Ready
from omni_cli.stages.live.lines import Lines
from omni_cli.stages.preemption import preemptible

__all__ = ["Limits", "ask", "watch"]

_RECONNECTS = 3  # in a row, of RTSP; what else breaks off has ended
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Limits:
    """When a live stream is left, or given up."""

    seconds: float | None = None
    windows: int | None = None  # answers
    patience_s: float | None = None  # without a picture; None: 10
    reconnects: int | None = None  # in a row; None: 3 of RTSP, else 0

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        values = {"--seconds": self.seconds, "--windows": self.windows, "--patience": self.patience_s}
        return [name for name, value in {**values, "--reconnect": self.reconnects}.items() if value is not None]


def ask(recipe: Any, subject: Subject, request: InferRequest, limits: Limits, console: Console) -> dict[str, Any]:
    """Ask a model about live cameras where any is named, about clips otherwise.

    Raises:
        OmniError: as `watch` and `infer` do.
        UsageError: also where both are named.
    """
    if cameras := _live(subject.preprocess, request):
        return watch(recipe, subject, replace(request, cameras=None, clips=()), cameras, limits=limits, console=console)
    if limits.given:
        raise UsageError(f"{limits.given[0]} is for live cameras; a clip is asked about to its end")
    return infer(recipe, subject, request, console)


def watch(
    recipe: Any,
    subject: Subject,
    request: InferRequest,
    cameras: Mapping[str, Address],
    *,
    limits: Limits,
    console: Console,
) -> dict[str, Any]:
    """Ask a model about live cameras until they end, a limit is reached, or the user stops it.

    Args:
        recipe: of the model.
        subject: the model.
        request: how it is asked.
        cameras: by name, in the model's order; or the mosaic alone.
        limits: when it ends.
        console: is told.

    Raises:
        UsageError: the options do not fit the model, or each other.
        DataError: a camera sends no video.
        OmniError: a camera cannot be reached, or is lost; what was answered until then is kept.
        Preempted: SIGTERM came; what was answered until then is kept.
    """
    _check(recipe, subject.preprocess, request)
    preprocess = subject.preprocess
    assert isinstance(preprocess, TiledPreprocess)  # as of every recipe that takes plain videos
    inferable: Inferable = require(recipe, Inferable)  # type: ignore[type-abstract]  # a protocol names the capability
    watchful: Watchful = require(recipe, Watchful)  # type: ignore[type-abstract]  # as above
    patience_s = limits.patience_s or _PATIENCE_S
    for address in cameras.values():
        check_there(address, patience_s)
    built = load_subject(inferable, subject, request, console)
    stride = request.stride or inferable.sample.stride
    max_age_us = inferable.sample.max_age_us
    windows = LiveWindows(len(cameras), preprocess.rate_hz, preprocess.num_frames, stride, max_age_us)
    is_mosaic = list(cameras) == [MOSAIC]
    reading = Reading(
        tuple(cameras.values()), *_shapes(preprocess, is_mosaic=is_mosaic), patience_s, _reconnects(cameras, limits),
        request.batch or 1,
    )  # fmt: skip
    console.say(_promise(windows, reading, preprocess))
    lines = Lines(request.out, [address.title for address in cameras.values()])
    watcher = _Watcher(inferable, watchful.prompt_row, built, preprocess, lines, console)
    with preemptible(f"stopped; its answers, if any, are in {lines.path}; run the same command again to go on"):
        return {"model": subject.title, **watcher.run(Feed(reading, windows, console), limits)}


@dataclass
class _Watcher:
    """Puts the windows of a feed to one loaded model."""

    recipe: Inferable
    make_row: Callable[..., Row]  # as `Watchful.prompt_row`
    built: BuiltModel
    preprocess: TiledPreprocess
    lines: Lines
    console: Console

    def run(self, feed: Feed, limits: Limits) -> dict[str, Any]:
        until_s = None if limits.seconds is None else time.monotonic() + limits.seconds
        try:
            with feed:
                ended = self._answer(feed, limits.windows, until_s)
        except KeyboardInterrupt:
            ended = "stopped by Ctrl-C"
        finally:
            self.lines.close(dropped=dict(feed.windows.dropped), troubles=feed.troubles)
        self._tell(feed)
        if feed.failure is not None:
            raise self._failed(feed.failure)
        where = f"in {self.lines.path}" if self.lines.count else "(nothing was written)"
        self.console.say(f"{ended}: {counted(self.lines.count, 'answer')} {where}")
        clip = {**self.lines.facts, "dropped": dict(feed.windows.dropped), "troubles": feed.troubles, "ended": ended}
        return {"clips": [{**clip, "overlay": None}], "failed": 0, "failures": {}}

    def _answer(self, feed: Feed, wanted: int | None, until_s: float | None) -> str:
        while ready := feed.take(until_s):
            left = len(ready) if wanted is None else wanted - self.lines.count
            self._put(ready[:left])
            if self.lines.count == wanted:
                return "done"
        return feed.ended or "done"

    def _put(self, ready: list[Ready]) -> None:
        rows = [
            self.make_row(torch.from_numpy(one.window.pictures), self.preprocess, self.built.tokenizer, 0.0)
            for one in ready
        ]
        said = self.recipe.predict(self.built, rows, self.preprocess)
        for one, prediction in zip(ready, said, strict=True):
            answer = Answer(Asked(one.window.planned, {}, {}), prediction)
            self.lines.append(answer.line(self.lines.title, self.recipe.plain), one)
        shown = f"{ready[-1].window.planned.end_us / 1e6:.2f} s: {self.recipe.caption(said[-1].values)}{answer.mark}"
        self.lines.seldom(lambda: self.console.say(f"{shown} ({self.lines.latency_s[-1]:.2f} s late)"))

    def _tell(self, feed: Feed) -> None:
        for reason, count in feed.windows.dropped.items():
            self.console.say(f"left out {counted(count, 'window')}: {reason}")
        for trouble, count in feed.troubles.items():
            self.console.say(f"{trouble}: {count}")
        if self.lines.forced:
            self.console.warn(
                f"{self.lines.forced} of {counted(self.lines.count, 'answer')} had to be forced into the format"
            )
        if self.lines.count:
            median_s, late_s = np.percentile(self.lines.latency_s, [50, 95])
            self.console.say(
                f"from a window's newest frame to its answer: median {median_s:.2f} s, 95 % {late_s:.2f} s"
            )

    def _failed(self, failure: BaseException) -> BaseException:
        if not isinstance(failure, OmniError) or not self.lines.count:
            return failure
        kept = f"; {counted(self.lines.count, 'answer')} until then in {self.lines.path}"
        return type(failure)(f"{failure}{kept}")


def _live(preprocess: Preprocess, request: InferRequest) -> dict[str, Address]:
    """Return the live cameras of a request by name, in the model's order; none where it is about clips.

    Raises:
        UsageError: they are not those that the model looks at, or clips are named too.
    """
    words = [(word, live_address(word)) for word in request.clips]
    named = {name: live_address(str(place)) for name, place in (request.cameras or {}).items()}
    if not any([*(address for _, address in words), *named.values()]):
        return {}
    if len(words) + bool(named) > 1 or None in named.values():
        raise UsageError("one live camera at a time, or several of one car with --camera NAME=URL for each; no clips")
    if named:
        views = {name: address for name, address in named.items() if address}
        return in_order(preprocess, views, tiled=request.tiled, needed="give --camera NAME=URL for each")
    ((_, address),) = words
    assert address is not None
    if not request.tiled and len(preprocess.cameras) > 1:
        raise UsageError(
            f"{address.title} is one view: the model looks at {len(preprocess.cameras)} cameras; "
            "give --camera NAME=URL for each, or --tiled where the stream is a mosaic of them"
        )
    return {MOSAIC if request.tiled else preprocess.cameras[0]: address}


def _check(recipe: Any, preprocess: Preprocess, request: InferRequest) -> None:
    """Refuse what a live camera cannot give, before a model is loaded."""
    if recipe.instead_of_videos:
        raise UsageError(f"recipe {recipe.name} takes no live cameras; give it {recipe.instead_of_videos}")
    if request.overlay:
        raise UsageError("--overlay draws over a clip; leave it out, or record the stream and ask about the file")
    if preprocess.decoder != "pyav":
        raise UsageError(f"the model's pictures are made by {preprocess.decoder}, which reads no live camera")
    if isinstance(preprocess, TiledPreprocess) and preprocess.past_speed:
        raise UsageError(
            "the model is told the speed at the first frame, which no live camera says; "
            "ask one that was trained with sample.past_speed = false"
        )


def _shapes(
    preprocess: TiledPreprocess, *, is_mosaic: bool
) -> tuple[Callable[[int, int], tuple[int, int]], Callable[[Uint8Array], Uint8Array]]:
    """Return how large a camera's pictures are made, and how they fill cells (cells, cell height, cell width, 3)."""
    if is_mosaic:
        height, width, _ = preprocess.canvas_shape
        return lambda _width, _height: (width, height), preprocess.cut
    return preprocess.fit_in_cell, partial(_one_cell, preprocess=preprocess)


def _one_cell(picture: Uint8Array, preprocess: TiledPreprocess) -> Uint8Array:
    return preprocess.in_cell(picture)[None]


def _reconnects(cameras: Mapping[str, Address], limits: Limits) -> int:
    if limits.reconnects is not None:
        return limits.reconnects
    return _RECONNECTS if all(address.scheme in ("rtsp", "rtsps") for address in cameras.values()) else 0


def _promise(windows: LiveWindows, reading: Reading, preprocess: TiledPreprocess) -> str:
    """Say what is kept, and what happens to a camera that is lost."""
    instants = windows.room + 2 * reading.waiting * windows.num_frames  # kept, waiting, and with the model
    memory_mb = instants * prod(preprocess.window_shape[1:]) / 1e6
    titles = ", ".join(address.title for address in reading.cameras)
    lost = f"tried again {counted(reading.reconnects, 'time')}" if reading.reconnects else "the end"
    clock = "; the cameras' clocks are told by when frames arrive" if len(reading.cameras) > 1 else ""
    waiting = counted(reading.waiting, "window")
    return (
        f"watching {titles}: at most {waiting} waiting for the model, and {memory_mb:.1f} MB of pictures; "
        f"no picture for {reading.patience_s:g} s is a lost stream, and that is {lost}{clock}"
    )
