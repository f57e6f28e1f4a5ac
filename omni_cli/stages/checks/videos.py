"""Checks of one camera's video: by its index alone, or by decoding every frame of it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from omni_cli.errors import DataError, OmniError
from omni_cli.formats import video
from omni_cli.formats.video_check import examine, read_header
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import VideoLocation
from omni_cli.stages.checks.facts import PictureFacts
from omni_cli.stages.checks.findings import Finding, is_refused, refuse, warn
from omni_cli.stages.checks.pictures import PLAIN_FORMATS, SpeedAt, decoding_findings, look, rate_findings
from omni_cli.stages.checks.seen_turns import Wides

MEMBER_BYTES = 1 << 30  # a minute of one camera is about 60 MB
MAX_SIDE_PX = 8192
Surplus = Callable[[str, str], Finding]


class Looked(NamedTuple):
    """What decoding all of a video gave."""

    facts: PictureFacts | None
    findings: list[Finding]
    wides: Wides | None = None  # (n, rows, columns) small luma pictures; None, as the facts, where it is refused


def header_findings(
    content: bytes | VideoLocation, name: str, timestamp_us: Int64Array | None, size_px: tuple[int, int] | None
) -> Iterator[Finding]:
    """Check a video's index against its timestamps and calibration.

    Args:
        content: the video, or where it lies.
        name: what to call it.
        timestamp_us: (n,) increasing; None where they cannot be trusted, and are not compared.
        size_px: that its camera is calibrated for, where that is known.
    """
    try:
        header = read_header(content, name)
        if max(header.width_px, header.height_px) > MAX_SIDE_PX:
            yield refuse("oversized-picture", f"{name}: {header.width_px}x{header.height_px}, sides of at most "
                         f"{MAX_SIDE_PX} px expected; it is not decoded")  # fmt: skip
            return
        count = header.num_frames if header.num_frames is not None else video.probe(content, name).num_frames
    except OmniError as error:
        yield refuse("unreadable-video", str(error))
        return
    yield from count_findings(count, None if timestamp_us is None else len(timestamp_us))
    if header.pixel_format not in PLAIN_FORMATS:
        yield warn("pixel-format", f"{name}: {header.pixel_format}; yuv420p expected: it is converted to eight bits")
    if size_px is not None and size_px != (header.width_px, header.height_px):
        yield warn("other-size", f"{name}: {header.width_px}x{header.height_px}, calibrated for "
                   f"{size_px[0]}x{size_px[1]}: projections into it are wrong")  # fmt: skip
    if timestamp_us is not None:
        yield from rate_findings(header.step_us, timestamp_us, header.start_us, name)


def count_findings(num_frames: int, num_timestamps: int | None, surplus: Surplus = refuse) -> Iterator[Finding]:
    """Check that each frame has a time, and each time a frame.

    Args:
        num_frames: of the video.
        num_timestamps: None where the times cannot be trusted.
        surplus: how grave frames without a time are; where a reader vouches for the first ones, the rest do no harm.
    """
    if num_timestamps is not None and num_frames != num_timestamps:
        make = surplus if num_frames > num_timestamps else refuse
        yield make("frame-count", f"{num_frames} frames, {num_timestamps} timestamps; equal counts expected")


def deep_findings(
    content: bytes, name: str, timestamp_us: Int64Array | None, num_timestamps: int | None, speed_at: SpeedAt
) -> Looked:
    """Decode every frame, and look at it.

    Args:
        content: the video.
        name: what to call it.
        timestamp_us: of its first frames; None where they cannot be trusted, and only the decoding is judged.
        num_timestamps: how many frames must come at least.
        speed_at: how fast the car was.
    """
    try:
        info = video.probe(content, name)
        if max(info.width_px, info.height_px) > MAX_SIDE_PX:
            return Looked(None, [])  # named by its header
        examined = examine(content, name)
    except DataError as error:
        return Looked(None, [refuse("unreadable-video", str(error))])
    found = list(decoding_findings(examined, name, num_timestamps or 0, info.pts))
    if timestamp_us is None or is_refused(found):
        return Looked(None, found)
    facts, of_pictures = look(examined.thumbs, timestamp_us, speed_at)
    return Looked(facts, found + of_pictures, examined.wides)
