"""Checks of one PhysicalAI-AV chunk: the members of its zips, and what is in them.

Zips are read in place and never extracted, so that no member name can reach the file system.
"""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni_cli.formats.physical_ai_av import EGOMOTION_COLUMNS, FEATURES, Feature
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion
from omni_cli.sources import Source
from omni_cli.stages.checks.findings import Finding, is_refused, refuse, warn
from omni_cli.stages.checks.members import member_findings, of_all
from omni_cli.stages.checks.motion import ego_findings
from omni_cli.stages.checks.recordings import camera_spans_us, opened, video_findings, whole_span_us
from omni_cli.stages.checks.repository import EGOMOTION, Chunk
from omni_cli.stages.checks.timing import spread_findings, timestamp_findings

MAX_MEMBER_BYTES = 1 << 30  # a minute of one camera is about 60 MB
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)

Archives = Mapping[str, zipfile.ZipFile]


class _Refused(Exception):
    """A member cannot be used; what comes after it need not be tried."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = refuse(code, detail)


def chunk_findings(chunk: Chunk, clips: Sequence[str], source: Source, *, deep: bool) -> Iterator[Finding]:
    """Check the zips of one chunk, each clip's times, videos and motion, and that omni's reader takes the clip.

    Args:
        chunk: the chunk.
        clips: those of its clips whose content is checked.
        source: omni's reader of the same folder.
        deep: decode every frame.
    """
    with ExitStack() as stack:
        archives: dict[str, zipfile.ZipFile] = {}
        of_archives = [*_camera_set_findings(chunk), *_archive_findings(chunk, archives, stack)]
        yield from of_archives
        barred = {finding.recording for finding in of_archives if finding.severity == "refuse"}
        for clip in clips:
            found = list(_clip_findings(chunk, archives, clip, deep=deep))
            if clip not in barred and not is_refused(found):
                found += _reader_findings(chunk, archives, source, clip)
            yield from found


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
                found = member_findings(FEATURES[feature], archives[feature].namelist(), chunk.clips, expected)
            except _ZIP_ERRORS as error:
                bad = refuse("unreadable-zip", f"{path.relative_to(chunk.root)}: {error}; fetch it again")
                found = of_all(expected, bad)
        camera = "" if feature == EGOMOTION else feature
        yield from (finding.about(finding.recording, camera) for finding in found)


def _absent(chunk: Chunk, feature: str, expected: Sequence[str]) -> list[Finding]:
    """Some chunk files are pruned upstream: without a camera that nobody asked for, the rest may still be used."""
    if not expected:
        return []
    detail = f"{FEATURES[feature].chunk_path(chunk.number)}: not there; fetch the chunk again"
    if feature == EGOMOTION or chunk.are_cameras_asked:
        return of_all(expected, refuse("missing-zip", detail))
    return [warn("missing-zip", detail)]


def _clip_findings(chunk: Chunk, archives: Archives, clip: str, *, deep: bool) -> Iterator[Finding]:
    times_us: dict[str, Int64Array] = {}
    for camera in _cameras_of(chunk, archives, clip):
        found = _camera_findings(archives[camera], FEATURES[camera], clip, times_us, deep=deep)
        yield from (finding.about(clip, camera) for finding in found)
    spans = camera_spans_us(times_us)
    of_clip = [*spread_findings(spans)] if spans else []
    if EGOMOTION in archives and clip in chunk.expected(EGOMOTION):
        of_clip += _ego_findings(archives[EGOMOTION], clip, whole_span_us(spans.values()))
    yield from (finding.about(clip) for finding in of_clip)


def _camera_findings(
    archive: zipfile.ZipFile, feature: Feature, clip: str, times_us: dict[str, Int64Array], *, deep: bool
) -> Iterator[Finding]:
    """Check one clip of one camera; times that can be trusted are added to `times_us`."""
    times_name, video_name = feature.member(clip, "frame_timestamps"), feature.member(clip, "video")
    if not {times_name, video_name} <= archive.NameToInfo.keys():
        return  # its absence is named already
    try:
        timestamp_us = _times_us(_table(archive, times_name, ("timestamp",)), times_name)
        found = list(timestamp_findings(timestamp_us, "frame times"))
        times_us |= {} if is_refused(found) else {feature.name: timestamp_us}
        yield from found
        yield from video_findings(_read(archive, video_name), video_name, len(timestamp_us), deep=deep)
    except _Refused as stop:
        yield stop.finding


def _ego_findings(archive: zipfile.ZipFile, clip: str, span_us: tuple[int, int] | None) -> Iterator[Finding]:
    name = FEATURES[EGOMOTION].member(clip, EGOMOTION)
    if name not in archive.NameToInfo:
        return
    try:
        table = _table(archive, name, EGOMOTION_COLUMNS)
        yield from ego_findings(_ego_motion(table, _times_us(table, name)), span_us)
    except _Refused as stop:
        yield stop.finding


def _reader_findings(chunk: Chunk, archives: Archives, source: Source, clip: str) -> list[Finding]:
    """Open the clip as every later stage will: whatever else the reader refuses is found here, not during etl."""
    found = opened(source, clip, _cameras_of(chunk, archives, clip))
    return [found] if isinstance(found, Finding) else []


def _cameras_of(chunk: Chunk, archives: Archives, clip: str) -> tuple[str, ...]:
    return tuple(camera for camera in chunk.cameras if camera in archives and clip in chunk.expected(camera))


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member to its end, which checks its CRC."""
    size = archive.getinfo(name).file_size
    if size > MAX_MEMBER_BYTES:
        raise _Refused("oversized-member", f"{name}: claims {size} bytes, at most {MAX_MEMBER_BYTES} expected")
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
