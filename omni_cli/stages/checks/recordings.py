"""Checks of one recording, whatever its source: its videos, its times, its motion."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from omni_cli.errors import DataError, OmniError
from omni_cli.formats import video
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.recording import CameraStream, Recording
from omni_cli.sources import PartRefused, Source
from omni_cli.stages.checks.findings import Finding, refuse, warn
from omni_cli.stages.checks.motion import ego_findings, speed_findings
from omni_cli.stages.checks.timing import spread_findings, timestamp_findings

_DEEP_SIDE_PX = 32  # decoding is the work; what it is scaled to is not looked at


def opened(source: Source, recording_id: str, cameras: tuple[str, ...] | None) -> Recording | Finding:
    """Open a recording as every later stage will, or return why that is refused: it, or a part of it alone."""
    try:
        return source.open(recording_id, cameras)
    except PartRefused as error:
        return refuse("refused-by-reader", str(error)).about(error.part_id)
    except DataError as error:
        return refuse("refused-by-reader", str(error)).about(recording_id)


def recording_findings(recording: Recording, *, deep: bool) -> Iterator[Finding]:
    """Check everything that a recording holds.

    Args:
        recording: as its source opened it.
        deep: decode every frame, rather than read the headers and packets.
    """
    is_joined = bool(recording.parts)
    for camera, stream in recording.cameras.items():
        of_times = timestamp_findings(stream.timestamp_us, "frame times", is_joined=is_joined)
        yield from (finding.about(recording.id, camera) for finding in of_times)
        yield from _videos_findings(recording, stream, deep=deep)
    spans = camera_spans_us({camera: stream.timestamp_us for camera, stream in recording.cameras.items()})
    found = [*spread_findings(spans)] if spans else []
    if recording.provenance.get("log_is_truncated") == "true":
        logs = recording.provenance["truncated_logs"]
        found.append(warn("truncated-log", f"{logs} ends inside an event; read up to there"))
    span = whole_span_us(spans.values())
    if recording.ego is not None:
        found += ego_findings(recording.ego, span)
    if recording.speed is not None:
        found += speed_findings(recording.speed, span, is_joined=is_joined)
    yield from (finding.about(recording.id) for finding in found)


def video_findings(
    content: bytes,
    name: str,
    num_timestamps: int,
    *,
    deep: bool,
    surplus: Callable[[str, str], Finding] = refuse,
) -> Iterator[Finding]:
    """Check that a video can be read and has a frame for each timestamp.

    Args:
        content: the video file.
        name: what to call it in a detail.
        num_timestamps: how many frames have a time.
        deep: decode every frame.
        surplus: how grave frames without a time are; where a reader vouches for the first ones, the rest do no harm.
    """
    try:
        info = video.probe(content, name)
        if info.num_frames != num_timestamps:
            make = surplus if info.num_frames > num_timestamps else refuse
            yield make("frame-count", f"{info.num_frames} frames, {num_timestamps} timestamps; equal counts expected")
        if deep:
            _decode_all(content, name, info.num_frames)
    except OmniError as error:
        yield refuse("unreadable-video", str(error))


def _videos_findings(recording: Recording, stream: CameraStream, *, deep: bool) -> Iterator[Finding]:
    """Check each video of a camera; what is wrong with one concerns the part that it belongs to."""
    for part, location in zip(recording.parts or (recording.id,), stream.videos, strict=True):
        count = len(stream.timestamp_us) if location.num_frames is None else location.num_frames
        found = video_findings(location.read(), stream.name, count, deep=deep, surplus=warn)
        yield from (finding.about(part, stream.name) for finding in found)


def camera_spans_us(timestamps_us: Mapping[str, Int64Array]) -> dict[str, tuple[int, int]]:
    """Return camera -> first and last time, of the cameras that have any."""
    return {camera: (int(times[0]), int(times[-1])) for camera, times in timestamps_us.items() if len(times)}


def whole_span_us(spans_us: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the span from the first frame of any camera to the last of any, or None without cameras."""
    spans = list(spans_us)
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else None


def _decode_all(content: bytes, name: str, num_frames: int) -> None:
    for _ in video.decode(content, name, range(num_frames), width_px=_DEEP_SIDE_PX, height_px=_DEEP_SIDE_PX):
        pass
