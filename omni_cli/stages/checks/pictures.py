"""Checks of what a camera shows: every frame decoded, and looked at small. Pure functions of what the decoder gave."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from omni_cli.formats.video_check import THUMB_HEIGHT_PX, THUMB_WIDTH_PX, Examined
from omni_cli.scene.clock import Int64Array, seconds
from omni_cli.stages.checks.facts import PictureFacts
from omni_cli.stages.checks.findings import Finding, refuse, warn

Thumbs = npt.NDArray[np.uint8]
SpeedAt = Callable[[Int64Array], npt.NDArray[np.float64]]  # times (n,) -> m/s (n,), NaN where it is not known
PLAIN_FORMATS = ("yuv420p", "yuvj420p")
HASHED_AT = tuple((2 * i + 1) / 16 for i in range(8))  # shares of a video
_MAX_BLACK_LUMA, _MAX_BLACK_SPREAD = 22, 4  # of 16 (black) to 235
_SAME_LUMA = 1  # a frozen picture that is coded again differs by a rounding
_FROZEN_US, _MOVING_MPS = 500_000, 2.0
_MAX_BAD_SHARE = 0.2
_MAX_RATE_ERROR = 0.05
_MIN_HASHED_SPREAD = 6.0  # standard deviation of luma below which a picture has no features to hash
_WEIGHTS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def decoding_findings(examined: Examined, name: str, num_timestamps: int, listed: tuple[int, ...]) -> Iterator[Finding]:
    """Check that a decoder gives what the container and the timestamps promise.

    Args:
        examined: of the video.
        name: what to call it.
        num_timestamps: how many frames must at least come.
        listed: times of the frames that the container presents; empty where it has none.
    """
    if examined.error:
        yield refuse("unreadable-video", f"{name}: decoding failed: {examined.error}")
    elif examined.corrupt:
        rows = f"{len(examined.corrupt)} frames, the first is {examined.corrupt[0]}"
        yield refuse("damaged-frames", f"{name}: the decoder marks damage in {rows}")
    elif lost := set(listed).symmetric_difference(examined.pts if listed else ()):
        yield refuse("lost-frames", f"{name}: {len(lost)} frames are listed and not decoded, or decoded and not listed")
    elif len(examined.pts) < num_timestamps:
        yield refuse("frame-count", f"{name}: {len(examined.pts)} frames decode, {num_timestamps} timestamps; "
                     "equal counts expected")  # fmt: skip
    if examined.concealed:
        yield warn("concealed-damage", f"{name}: a strict decoder stops: {examined.concealed}")
    if len({size[:2] for size in examined.sizes}) > 1:
        found = ", then ".join(f"{width}x{height}" for width, height, _ in examined.sizes)
        yield refuse("size-changes", f"{name}: {found}; one size expected")
    if odd := [kind for _, _, kind in examined.sizes if kind not in PLAIN_FORMATS]:
        yield warn("pixel-format", f"{name}: {odd[0]}; yuv420p expected: it is converted to eight bits")
    if examined.rotation_deg:
        yield warn("rotated", f"{name}: a player turns it by {examined.rotation_deg} degrees; omni shows it as coded")


def look(thumbs: Thumbs, timestamp_us: Int64Array, speed_at: SpeedAt) -> tuple[PictureFacts, list[Finding]]:
    """Find black pictures and frozen ones, and hash some.

    Args:
        thumbs: (n, height, width) luma.
        timestamp_us: (m,) of the first m frames; fewer or more than n where something is wrong.
        speed_at: how fast the car was; a picture may stand still where the car does.
    """
    count = min(len(thumbs), len(timestamp_us))
    thumbs, timestamp_us = thumbs[:count], timestamp_us[:count]
    black = (thumbs.mean(axis=(1, 2)) < _MAX_BLACK_LUMA) & (thumbs.std(axis=(1, 2)) < _MAX_BLACK_SPREAD)
    frozen = _frozen(thumbs, timestamp_us, speed_at) & ~black
    facts = PictureFacts(count, int(black.sum()), int(frozen.sum()), picture_hashes(thumbs))
    return facts, [*_share_findings("black-frames", black, "are black"),
                   *_share_findings("frozen-frames", frozen, "repeat the one before while the car moves")]  # fmt: skip


def picture_hashes(thumbs: Thumbs) -> tuple[int, ...]:
    """Return the difference hashes of pictures at fixed shares of a video; 0 for one that shows no feature.

    dHash (Krawetz 2013): of eight rows of nine means each bit says whether brightness falls from one to the next.

    Args:
        thumbs: (n, THUMB_HEIGHT_PX, THUMB_WIDTH_PX) luma.
    """
    if not len(thumbs):
        return ()
    chosen = thumbs[[int(share * len(thumbs)) for share in HASHED_AT]]
    means = chosen.reshape(-1, 8, THUMB_HEIGHT_PX // 8, 9, THUMB_WIDTH_PX // 9).mean(axis=(2, 4))
    bits = (np.diff(means, axis=2) < 0).reshape(-1, 64)
    has_features = chosen.std(axis=(1, 2)) >= _MIN_HASHED_SPREAD
    hashes = (bits * _WEIGHTS).sum(axis=1, dtype=np.uint64)
    return tuple(int(one) if is_told else 0 for one, is_told in zip(hashes, has_features, strict=True))


def _frozen(thumbs: Thumbs, timestamp_us: Int64Array, speed_at: SpeedAt) -> npt.NDArray[np.bool_]:
    """Mark the frames of runs that last `_FROZEN_US`, in which nothing changes and the car moves all the time."""
    frozen = np.zeros(len(thumbs), dtype=np.bool_)
    if len(thumbs) < 2:
        return frozen
    change = np.array([np.abs(a.astype(np.int16) - b).max() for a, b in pairwise(thumbs)])
    is_moving = np.nan_to_num(speed_at(timestamp_us), nan=0.0)[1:] > _MOVING_MPS
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (change <= _SAME_LUMA) & is_moving, [0]])))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if timestamp_us[end] - timestamp_us[start] >= _FROZEN_US:
            frozen[start + 1 : end + 1] = True
    return frozen


def _share_findings(code: str, is_bad: npt.NDArray[np.bool_], what: str) -> Iterator[Finding]:
    if is_bad.any():
        make = refuse if is_bad.mean() > _MAX_BAD_SHARE else warn
        first = int(is_bad.argmax())
        yield make(code, f"{int(is_bad.sum())} of {len(is_bad)} frames {what}, the first is {first}")


def rate_findings(step_us: Int64Array, timestamp_us: Int64Array, start_us: int, name: str) -> Iterator[Finding]:
    """Check a container's clock against the true timestamps; omni counts frames, other readers trust the container.

    Args:
        step_us: between frames by the container, in the order of decoding.
        timestamp_us: (n,) increasing.
        start_us: the container's time of the first frame.
        name: of the video.
    """
    if start_us:
        yield warn("video-start", f"{name}: begins at {seconds(start_us):.3f} s by its container; readers that trust "
                   "it look up other frames, omni counts them")  # fmt: skip
    if not len(step_us) or len(timestamp_us) < 2:
        return
    told, true = float(np.median(step_us)), float(np.median(np.diff(timestamp_us)))
    if abs(told - true) > _MAX_RATE_ERROR * true:
        yield warn("rate-disagrees", f"{name}: a frame every {told / 1000:.2f} ms by its container, every "
                   f"{true / 1000:.2f} ms by the timestamps")  # fmt: skip
    elif np.ptp(step_us) > told / 2:
        yield from _variable_findings(step_us, timestamp_us, told, name)


def _variable_findings(step_us: Int64Array, timestamp_us: Int64Array, period_us: float, name: str) -> Iterator[Finding]:
    """A container of a variable rate tells when each frame was seen: then the timestamps must say the same."""
    yield warn("variable-rate", f"{name}: its container's frames are {step_us.min() / 1000:.1f} to "
               f"{step_us.max() / 1000:.1f} ms apart; readers that divide by a rate look up other frames")  # fmt: skip
    if len(step_us) + 1 == len(timestamp_us):
        apart = np.abs(np.cumsum(step_us) - (timestamp_us[1:] - timestamp_us[0]))
        if apart.max() > period_us:
            yield refuse("times-disagree", f"{name}: frame {int(apart.argmax()) + 1} is "
                         f"{seconds(int(apart.max())):.3f} s off between its container and its timestamps; frames and "
                         "times may be shifted")  # fmt: skip
