"""Checks of one recording, whatever its source: its videos, its times, its motion."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from omni_cli.errors import DataError, OmniError
from omni_cli.formats import video
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation
from omni_cli.sources import PartRefused, Source
from omni_cli.stages.checks.agreement import wheel_findings
from omni_cli.stages.checks.facts import (
    SKEW_EDGES_MS,
    Counts,
    MotionFacts,
    PictureFacts,
    RecordingFacts,
    SeenTurn,
    camera_facts,
    histogram,
    motion_of_ego,
    motion_of_speed,
    skews_us,
)
from omni_cli.stages.checks.findings import Checked, Finding, is_refused, refuse, warn
from omni_cli.stages.checks.motion import ego_findings, speed_findings, speed_of_ego
from omni_cli.stages.checks.seen_motion import seen_motion, seen_motion_findings
from omni_cli.stages.checks.seen_turns import Turns, joined, seen_turns, view_of_travel
from omni_cli.stages.checks.timing import jitter_findings, spread_findings, timestamp_findings
from omni_cli.stages.checks.videos import Looked, count_findings, deep_findings


@dataclass
class _Decoded:
    """What the cameras of a recording showed, so far."""

    pictures: dict[str, PictureFacts | None] = field(default_factory=dict)
    turns: dict[str, Turns] = field(default_factory=dict)  # of those that look along the way


def opened(source: Source, recording_id: str, cameras: tuple[str, ...] | None) -> Recording | Finding:
    """Open a recording as every later stage will, or return why that is refused: it, or a part of it alone."""
    try:
        return source.open(recording_id, cameras)
    except PartRefused as error:
        return refuse("refused-by-reader", _without(error.part_id, error)).about(error.part_id)
    except DataError as error:
        return refuse("refused-by-reader", _without(recording_id, error)).about(recording_id)


def check_recording(recording: Recording, *, deep: bool) -> Checked:
    """Check everything that a recording holds.

    Args:
        recording: as its source opened it.
        deep: decode every frame, rather than read the headers and packets.
    """
    is_joined = bool(recording.parts)
    decoded = _Decoded()
    found: list[Finding] = []
    for camera, stream in recording.cameras.items():
        of_times = list(timestamp_findings(stream.timestamp_us, "frame times", is_joined=is_joined))
        of_times += () if is_refused(of_times) else jitter_findings(stream.timestamp_us, "frame times")
        found += (finding.about(recording.id, camera) for finding in of_times)
        found += _videos_findings(recording, stream, decoded, deep=deep)
    times_us = {camera: stream.timestamp_us for camera, stream in recording.cameras.items()}
    span = whole_span_us(camera_spans_us(times_us).values())
    found += (finding.about(recording.id) for finding in _whole_findings(recording, times_us, span))
    if is_refused(found):
        return Checked(tuple(found))
    seen = seen_motion(recording, decoded.turns, partial(speed_of, recording))
    found += seen_motion_findings(recording.id, seen)
    return Checked(tuple(found), (_facts(recording, times_us, span, decoded.pictures, seen),))


def _whole_findings(
    recording: Recording, times_us: Mapping[str, Int64Array], span: tuple[int, int] | None
) -> Iterator[Finding]:
    if spans := camera_spans_us(times_us):
        yield from spread_findings(spans)
    if recording.provenance.get("log_is_truncated") == "true":
        logs = recording.provenance["truncated_logs"]
        yield warn("truncated-log", f"{logs} ends inside an event and is read up to there; etl makes windows of what "
                   "it covers, and says nothing")  # fmt: skip
    if recording.ego is not None:
        yield from ego_findings(recording.ego, span)
    if recording.speed is not None:
        yield from speed_findings(recording.speed, span, is_joined=bool(recording.parts))
    if recording.ego is not None and recording.speed is not None:
        yield from wheel_findings(recording.speed, recording.ego)


def _videos_findings(recording: Recording, stream: CameraStream, decoded: _Decoded, *, deep: bool) -> Iterator[Finding]:
    """Check each video of a camera; what is wrong with one concerns the part that it belongs to."""
    start, looked = 0, []
    view = view_of_travel(stream.calibration) if stream.calibration is not None else None
    turns = []
    parts_of_videos = recording.parts or (recording.id,) * len(stream.videos)  # none can be set aside by itself
    for part, location in zip(parts_of_videos, stream.videos, strict=True):
        count = len(stream.timestamp_us) if location.num_frames is None else location.num_frames
        times_us = stream.timestamp_us[start : start + count]
        start += count
        one = _video_findings(location, stream.name, times_us, partial(speed_of, recording), deep=deep)
        looked.append(one.facts)
        if view is not None and one.wides is not None:
            turns.append(seen_turns(one.wides, times_us, view))
        yield from (finding.about(part, stream.name) for finding in one.findings)
    decoded.pictures[stream.name] = _joined(looked)
    decoded.turns |= {stream.name: joined(turns)} if turns else {}


def _video_findings(
    location: VideoLocation, name: str, times_us: Int64Array, speed_at: "partial[Float64Array]", *, deep: bool
) -> Looked:
    content = location.read()
    try:
        found = list(count_findings(video.probe(content, name).num_frames, len(times_us), surplus=warn))
    except OmniError as error:
        return Looked(None, [refuse("unreadable-video", str(error))])
    if not deep or is_refused(found):
        return Looked(None, found)
    looked = deep_findings(content, name, times_us, len(times_us), speed_at)
    return looked._replace(findings=found + looked.findings)


def speed_of(recording: Recording, at_us: Int64Array) -> Float64Array:
    """Return how fast the car was (m,), NaN where no log says it."""
    if recording.ego is not None:
        return speed_of_ego(recording.ego, at_us)
    log = recording.speed
    if log is None:
        return np.full(len(at_us), np.nan)
    return np.asarray(np.interp(at_us, log.timestamp_us, np.abs(log.speed_mps), left=np.nan, right=np.nan))


def camera_spans_us(timestamps_us: Mapping[str, Int64Array]) -> dict[str, tuple[int, int]]:
    """Return camera -> first and last time, of the cameras that have any."""
    return {camera: (int(times[0]), int(times[-1])) for camera, times in timestamps_us.items() if len(times)}


def whole_span_us(spans_us: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the span from the first frame of any camera to the last of any, or None without cameras."""
    spans = list(spans_us)
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else None


def skew_facts(times_us: Mapping[str, Int64Array]) -> tuple[Counts, int]:
    """Return how far apart cameras are, counted every 0.1 s, and the worst; nothing with fewer than two."""
    if len(times_us) < 2:
        return (), 0
    skews = skews_us(times_us)
    return histogram(skews / 1000, SKEW_EDGES_MS), int(skews.max(initial=0))


def _facts(
    recording: Recording,
    times_us: Mapping[str, Int64Array],
    span: tuple[int, int] | None,
    pictures: Mapping[str, PictureFacts | None],
    seen: Mapping[str, SeenTurn],
) -> RecordingFacts:
    skews, worst = skew_facts(times_us)
    return RecordingFacts(
        recording=recording.id,
        cameras=camera_facts(times_us, pictures, {}, seen),
        motion=_motion(recording, span),
        skew_counts=skews,
        max_skew_us=worst,
    )


def _motion(recording: Recording, span: tuple[int, int] | None) -> MotionFacts | None:
    if recording.ego is not None:
        return motion_of_ego(recording.ego, span)
    if recording.speed is None:
        return None
    turning = recording.device.yaw_rate if recording.device is not None else None
    yaw_rate = None if turning is None else (turning.timestamp_us, turning.yaw_rate_radps)
    return motion_of_speed(recording.speed, span, yaw_rate)


def _joined(parts: list[PictureFacts | None]) -> PictureFacts | None:
    """Add up the videos of one camera; none where one was not looked at. The hashes are those of the first."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    decoded, black, frozen = (
        sum(getattr(part, name) for part in known) for name in ("num_decoded", "num_black", "num_frozen")
    )
    return PictureFacts(decoded, black, frozen, known[0].hashes)


def _without(recording_id: str, error: DataError) -> str:
    """Return an error's text without the id that every finding names anyway."""
    return str(error).removeprefix(f"{recording_id}: ")
