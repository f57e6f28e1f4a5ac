"""Checks of one PhysicalAI-AV chunk: the members of its zips, and what is in them.

Zips are read in place and never extracted, so that no member name can reach the file system. Without `deep` only their
directories, the tables in them and the index of each video are read: no picture, and of a video of 20 MB a few
kilobytes.
"""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import EGOMOTION_COLUMNS, FEATURES, Feature
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import VideoLocation
from omni_cli.sources import Source
from omni_cli.sources.zip_members import MAX_MEMBERS, ZipDirectory
from omni_cli.stages.checks.calibration import Calibrations
from omni_cli.stages.checks.facts import (
    PictureFacts,
    RecordingFacts,
    SeenTurn,
    camera_facts,
    motion_of_ego,
)
from omni_cli.stages.checks.findings import Checked, Finding, is_refused, refuse, warn
from omni_cli.stages.checks.members import layout_findings, member_findings, of_all
from omni_cli.stages.checks.motion import ego_findings, speed_of_ego
from omni_cli.stages.checks.recordings import camera_spans_us, opened, skew_facts, whole_span_us
from omni_cli.stages.checks.repository import EGOMOTION, Chunk
from omni_cli.stages.checks.seen_motion import seen_motion, seen_motion_findings
from omni_cli.stages.checks.seen_turns import Turns, Wides, seen_turns, view_of_travel
from omni_cli.stages.checks.timing import jitter_findings, spread_findings, timestamp_findings
from omni_cli.stages.checks.videos import MEMBER_BYTES, deep_findings, header_findings

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)

Archives = Mapping[str, zipfile.ZipFile]


class _Refused(Exception):
    """A member cannot be used; what comes after it need not be tried."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = refuse(code, detail)


@dataclass
class _Clip:
    """What is known of one clip so far."""

    id: str
    cameras: tuple[str, ...]
    found: list[Finding] = field(default_factory=list)
    times_us: dict[str, Int64Array] = field(default_factory=dict)  # of cameras whose times can be trusted
    pictures: dict[str, PictureFacts | None] = field(default_factory=dict)
    content_keys: dict[str, str] = field(default_factory=dict)
    wides: dict[str, Wides] = field(default_factory=dict)  # of cameras that were decoded
    seen_turns: dict[str, SeenTurn] = field(default_factory=dict)
    ego: EgoMotion | None = None

    def add(self, findings: Iterable[Finding], camera: str = "") -> None:
        try:
            self.found.extend(finding.about(self.id, camera) for finding in findings)
        except _Refused as stop:
            self.found.append(stop.finding.about(self.id, camera))

    @property
    def span_us(self) -> tuple[int, int] | None:
        return whole_span_us(camera_spans_us(self.times_us).values())


def check_chunk(chunk: Chunk, clips: Sequence[str], source: Source, *, deep: bool) -> Checked:
    """Check the zips of one chunk, each clip's times, videos, calibration and motion, and that omni's reader takes it.

    Args:
        chunk: the chunk.
        clips: those of its clips whose content is checked.
        source: omni's reader of the same folder.
        deep: decode every frame, and read every member to its end, which checks its CRC.
    """
    with ExitStack() as stack:
        archives: dict[str, zipfile.ZipFile] = {}
        of_archives = [*_camera_set_findings(chunk), *_archive_findings(chunk, archives, stack)]
        barred = {finding.recording for finding in of_archives if finding.severity == "refuse"}
        calibrations = Calibrations(chunk)
        found = [*of_archives, *calibrations.unreadable, *calibrations.strangers()]
        facts = []
        for name in clips:
            clip = _Clip(name, _cameras_of(chunk, archives, name))
            _check_clip(clip, chunk, archives, calibrations, deep=deep)
            if name not in barred and not is_refused(clip.found):
                clip.found += _reader_findings(source, clip)
            found += clip.found
            facts.append(_facts(clip, calibrations))
    return Checked(tuple(found), tuple(facts))


def _camera_set_findings(chunk: Chunk) -> Iterator[Finding]:
    """Say which clips cannot show the cameras that the audit is about."""
    if not chunk.cameras:
        yield from of_all(chunk.clips, refuse("no-camera", f"chunk {chunk.number:04d} has no camera file; fetch one"))
    for camera in chunk.cameras if chunk.are_cameras_asked else ():
        for clip in sorted(set(chunk.clips).difference(chunk.expected(camera))):
            yield warn("not-recorded", "the presence table says that this clip has no such camera").about(clip, camera)


def _archive_findings(chunk: Chunk, archives: dict[str, zipfile.ZipFile], stack: ExitStack) -> Iterator[Finding]:
    """Open the zips into `archives`, and check what can be said of each as a whole."""
    for feature in (EGOMOTION, *chunk.cameras):
        path, expected = chunk.path(feature), chunk.expected(feature)
        if not path.is_file():
            found: Iterable[Finding] = _absent(chunk, feature, expected)
        else:
            try:
                archives[feature] = stack.enter_context(zipfile.ZipFile(path))
                found = _whole_archive_findings(chunk, feature, archives)
            except _ZIP_ERRORS as error:
                name = path.relative_to(chunk.root).as_posix()
                bad = refuse("unreadable-zip", f"{name}: {error}; fetch it again", name)
                found = of_all(expected, bad)
        camera = "" if feature == EGOMOTION else feature
        yield from (finding.about(finding.recording, camera) for finding in found)


def _whole_archive_findings(chunk: Chunk, feature: str, archives: dict[str, zipfile.ZipFile]) -> list[Finding]:
    entries, name = archives[feature].infolist(), chunk.path(feature).relative_to(chunk.root).as_posix()
    if len(entries) > MAX_MEMBERS:
        archives.pop(feature)
        detail = f"{name}: {len(entries)} members, at most {MAX_MEMBERS} expected; fetch it again"
        return of_all(chunk.expected(feature), refuse("unreadable-zip", detail, name))
    names = [entry.filename for entry in entries]
    listed = [*layout_findings(entries, name, chunk.clips)]
    return [*listed, *member_findings(FEATURES[feature], names, chunk.clips, chunk.expected(feature), chunk.listed)]


def _absent(chunk: Chunk, feature: str, expected: Sequence[str]) -> list[Finding]:
    """Some chunk files are pruned upstream: without a camera that nobody asked for, the rest may still be used."""
    if not expected:
        return []
    if feature in chunk.absent:
        return [warn("absent-upstream", f"{FEATURES[feature].chunk_path(chunk.number)}: the hub has no such file")]
    detail = f"{FEATURES[feature].chunk_path(chunk.number)}: not there; fetch the chunk again"
    if feature == EGOMOTION or chunk.are_cameras_asked:
        return of_all(expected, refuse("missing-zip", detail))
    return [warn("missing-zip", detail)]


def _check_clip(clip: _Clip, chunk: Chunk, archives: Archives, calibrations: Calibrations, *, deep: bool) -> None:
    for camera in clip.cameras:
        clip.add(_times_findings(clip, archives[camera], camera), camera)
    if EGOMOTION in archives and clip.id in chunk.expected(EGOMOTION):
        clip.add(_ego_findings(clip, archives[EGOMOTION]))
    for camera in clip.cameras:
        clip.add(_video_findings(clip, archives[camera], FEATURES[camera], calibrations, deep=deep), camera)
    spans = camera_spans_us(clip.times_us)
    clip.add(spread_findings(spans) if spans else ())
    clip.add(_same_videos(clip, archives))
    clip.found += calibrations.findings(clip.id, clip.cameras)


def _times_findings(clip: _Clip, archive: zipfile.ZipFile, camera: str) -> Iterator[Finding]:
    """Check one camera's times; those that can be trusted are kept."""
    name = FEATURES[camera].member(clip.id, "frame_timestamps")
    if name not in archive.NameToInfo:
        return  # its absence is named already
    timestamp_us = _times_us(_table(archive, name, ("timestamp",)), name)
    found = list(timestamp_findings(timestamp_us, "frame times"))
    clip.times_us |= {} if is_refused(found) else {camera: timestamp_us}
    clip.pictures[camera] = None
    yield from found
    yield from () if is_refused(found) else jitter_findings(timestamp_us, "frame times")


def _video_findings(
    clip: _Clip, archive: zipfile.ZipFile, feature: Feature, calibrations: Calibrations, *, deep: bool
) -> Iterator[Finding]:
    name = feature.member(clip.id, "video")
    if name not in archive.NameToInfo or feature.name not in clip.pictures:
        return
    times_us = clip.times_us.get(feature.name)
    count = len(times_us) if times_us is not None else None
    size = calibrations.size_px(clip.id, feature.name)
    if not deep:
        yield from header_findings(_located(archive, name), name, times_us, size)
        return
    content = _read(archive, name)
    yield from header_findings(content, name, times_us, size)
    speed_at = partial(speed_of_ego, clip.ego)
    looked = deep_findings(content, name, times_us, count, speed_at)
    clip.pictures[feature.name] = looked.facts
    clip.wides |= {} if looked.wides is None else {feature.name: looked.wides}
    yield from looked.findings


def _ego_findings(clip: _Clip, archive: zipfile.ZipFile) -> Iterator[Finding]:
    name = FEATURES[EGOMOTION].member(clip.id, EGOMOTION)
    if name not in archive.NameToInfo:
        return
    table = _table(archive, name, EGOMOTION_COLUMNS)
    ego = _ego_motion(table, _times_us(table, name))
    found = list(ego_findings(ego, clip.span_us))
    clip.ego = None if is_refused(found) else ego
    yield from found


def _same_videos(clip: _Clip, archives: Archives) -> Iterator[Finding]:
    """Two cameras cannot have filmed the same bytes: one file lies in another's place."""
    seen: dict[str, str] = {}
    for camera in clip.cameras:
        info = archives[camera].NameToInfo.get(FEATURES[camera].member(clip.id, "video"))
        if info is None:
            continue
        key = clip.content_keys[camera] = f"{info.CRC:08x}-{info.file_size}"
        if (other := seen.setdefault(key, camera)) != camera:
            yield refuse("same-video", f"{camera} and {other} hold the same video; one is in the other's place")


def _facts(clip: _Clip, calibrations: Calibrations) -> RecordingFacts:
    skews, worst = skew_facts(clip.times_us)
    return RecordingFacts(
        recording=clip.id,
        cameras=camera_facts(clip.times_us, clip.pictures, clip.content_keys, clip.seen_turns),
        motion=None if clip.ego is None else motion_of_ego(clip.ego, clip.span_us),
        rig=calibrations.rig(clip.id),
        skew_counts=skews,
        max_skew_us=worst,
    )


def _reader_findings(source: Source, clip: _Clip) -> list[Finding]:
    """Open the clip as every later stage will: whatever else the reader refuses is found here, not during etl."""
    recording = opened(source, clip.id, clip.cameras)
    if isinstance(recording, Finding):
        return [recording]
    turns: dict[str, Turns] = {}
    for camera, wides in clip.wides.items():
        stream = recording.cameras[camera]
        view = view_of_travel(stream.calibration) if stream.calibration is not None else None
        turns |= {} if view is None else {camera: seen_turns(wides, stream.timestamp_us, view)}
    clip.seen_turns |= seen_motion(recording, turns, partial(speed_of_ego, clip.ego))
    return [*seen_motion_findings(clip.id, clip.seen_turns)]


def _cameras_of(chunk: Chunk, archives: Archives, clip: str) -> tuple[str, ...]:
    return tuple(camera for camera in chunk.cameras if camera in archives and clip in chunk.expected(camera))


def _located(archive: zipfile.ZipFile, name: str) -> VideoLocation:
    """Return where a stored member lies, without reading it."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Refused("compressed-member", f"{name}: is compressed, stored bytes expected; fetch the chunk again")
    path = Path(str(archive.filename))
    try:
        return ZipDirectory(path, {name: info}).locate(name)
    except DataError:
        detail = f"{name}: is not where the zip's directory says; fetch the chunk again"
        raise _Refused("damaged-member", detail) from None


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member to its end, which checks its CRC."""
    info = archive.getinfo(name)
    if info.file_size > MEMBER_BYTES:
        raise _Refused("oversized-member", f"{name}: claims {info.file_size} bytes, at most {MEMBER_BYTES} expected")
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Refused("compressed-member", f"{name}: is compressed, stored bytes expected; fetch the chunk again")
    try:
        return archive.read(name)
    except _ZIP_ERRORS as error:
        raise _Refused("damaged-member", f"{name}: {error}; fetch the chunk again") from None


def _table(archive: zipfile.ZipFile, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(_read(archive, name)))
    except (pa.ArrowException, OSError) as error:
        raise _Refused("damaged-member", f"{name}: not a readable Parquet table ({error})") from None
    if missing := [column for column in columns if column not in table.column_names]:
        raise _Refused("wrong-columns", f"{name}: no column {missing[0]}; {', '.join(columns)} expected")
    if wrong := [column for column in columns if not _is_number(table.schema.field(column).type)]:
        raise _Refused("wrong-columns", f"{name}: column {wrong[0]} is no number")
    return table


def _times_us(table: pa.Table, name: str) -> Int64Array:
    column = table["timestamp"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise _Refused("wrong-columns", f"{name}: timestamp is {column.type}, {column.null_count} null; int64 expected")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _ego_motion(table: pa.Table, timestamp_us: Int64Array) -> EgoMotion:
    def columns(*names: str) -> Float64Array:
        return np.column_stack([np.asarray(table[name].to_numpy(), dtype=np.float64) for name in names])

    return EgoMotion(
        timestamp_us=timestamp_us,
        position_m=columns("x", "y", "z"),
        quaternion_xyzw=columns("qx", "qy", "qz", "qw"),
        velocity_mps=columns("vx", "vy", "vz"),
        acceleration_mps2=columns("ax", "ay", "az"),
        curvature_per_m=columns("curvature")[:, 0],
    )
