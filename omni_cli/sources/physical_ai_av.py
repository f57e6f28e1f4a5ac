"""PhysicalAI-Autonomous-Vehicles, and the synthetic world, which is written in the same layout.

The folder given may be the repository's layout itself, a hub cache, the repository's folder in one, or a snapshot; it
may hold any part of the dataset. Only recordings of which a camera is on disk are listed: of a chunk's zip that was
fetched by clips, those that its receipt names. Which of its two calibrations a clip has: calibration_tables.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats import physical_ai_av as layout
from omni_cli.formats.fetched import absent_upstream, clips_on_disk, read_origin, upstream_sha256
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import CameraStream, Caption, Recording
from omni_cli.sources import RecordingRef
from omni_cli.sources.calibration_tables import CalibrationTables
from omni_cli.sources.index_names import shown, unsafe_clip_reason
from omni_cli.sources.parquet_tables import numbers, read_table, timestamps
from omni_cli.sources.reasoning_table import parse_events, read_events
from omni_cli.sources.zip_members import ZipDirectory, read_directory

SOURCE = "physical_ai_av"
_REVISION = re.compile(r"[0-9a-f]{40}")
_EGO_MARGIN_US = 7_000_000  # the log may run for minutes; the longest published horizon is 6.4 s
_MAX_NORM_ERROR = 1e-3


@dataclass(frozen=True)
class _Entry:
    """One row of the clip index."""

    chunk: int
    split: str


class PhysicalAiAv:
    """Reads one folder. It can be pickled.

    Directories of zips and calibration tables are kept of the chunk that was read last: recordings come by chunk, and
    those of the whole dataset are gigabytes.
    """

    known_cameras: ClassVar[tuple[str, ...]] = tuple(layout.CAMERAS)

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._directories: dict[Path, ZipDirectory] = {}
        self._chunk: int | None = None  # of these directories

    @cached_property
    def root(self) -> Path:
        """The folder that holds clip_index.parquet.

        Raises:
            DataError: there is none, or several.
        """
        return find_root(self.folder)

    @cached_property
    def revision(self) -> str:
        """The dataset's revision, or `unknown`."""
        if _REVISION.fullmatch(self.root.name):
            return self.root.name
        return self._pinned.get("revision", "unknown")

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every recording of which a camera is on disk, sorted by chunk and id.

        Raises:
            DataError: the folder is not this layout, its index is damaged, or no camera's chunk file is there.
        """
        listed = {entry.chunk for entry in self._index.values()}
        on_disk = {chunk: clips_on_disk(self.root, layout.CAMERAS, chunk) for chunk in listed}
        if not any(parts != frozenset() for parts in on_disk.values()):
            raise DataError(f"{self.root}: no camera's chunk files among {len(listed)} chunks of the clip index; "
                            "run omni fetch")  # fmt: skip
        refs = [
            RecordingRef(id=clip_id, group=clip_id, bundle=f"chunk_{entry.chunk:04d}", declared_split=entry.split)
            for clip_id, entry in self._index.items()
            if (part := on_disk[entry.chunk]) is None or clip_id in part
        ]
        return tuple(sorted(refs, key=lambda ref: (ref.bundle, ref.id)))

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one recording.

        Raises:
            DataError: the clip is unknown, or a file, member or value is missing or wrong.
        """
        if reason := unsafe_clip_reason(recording_id):
            raise DataError(f"{self.root}: {shown(recording_id)} can be no clip's id: {reason}; fetch the index again")
        if recording_id not in self._index:
            raise DataError(
                f"{self.root}: no clip {recording_id} in {layout.CLIP_INDEX_FILE}; check the id, or fetch it"
            )
        chunk = self._index[recording_id].chunk
        self._turn_to(chunk)
        names = self._cameras_of(recording_id, chunk) if cameras is None else cameras
        streams = {name: self._camera(recording_id, chunk, name) for name in names}
        if not streams:
            raise DataError(f"{self.root}: no camera of clip {recording_id} is on disk; fetch chunk {chunk}")
        spans = [(int(s.timestamp_us[0]), int(s.timestamp_us[-1])) for s in streams.values()]
        first, last = min(span[0] for span in spans), max(span[1] for span in spans)
        return Recording(
            id=recording_id,
            source=SOURCE,
            cameras=streams,
            ego=self._ego(recording_id, chunk).between(first - _EGO_MARGIN_US, last + _EGO_MARGIN_US),
            captions=self._captions(recording_id),
            group=recording_id,  # the dataset does not say which clips are of one drive
            provenance=self._provenance(recording_id, chunk, names),
        )

    @cached_property
    def _pinned(self) -> Mapping[str, str]:
        """What `omni fetch` and the synthetic world write of a folder's origin."""
        return read_origin(self.root)

    @cached_property
    def _index(self) -> dict[str, _Entry]:
        path = self.root / layout.CLIP_INDEX_FILE
        table = read_table(path, str(path), ("clip_id", "clip_is_valid", "chunk", "split")).to_pydict()
        rows = list(zip(*(table[name] for name in ("clip_id", "clip_is_valid", "chunk", "split")), strict=True))
        if wrong := [(clip, chunk) for clip, _, chunk, _ in rows if not layout.is_chunk(chunk)]:
            clip, chunk = map(shown, wrong[0])
            raise DataError(f"{path}: clip {clip} in chunk {chunk}; a chunk's number is 0 to {layout.MOST_CHUNKS - 1}: "
                            "fetch it again")  # fmt: skip
        entries = {str(clip): _Entry(int(chunk), str(split)) for clip, valid, chunk, split in rows if valid}
        splits = self.root / layout.SPLIT_FILE
        if splits.is_file():
            labels = read_table(splits, str(splits), ("clip_id", "split")).to_pydict()
            override = dict(zip(labels["clip_id"], labels["split"], strict=True))
            entries = {clip: _Entry(entry.chunk, override.get(clip) or "") for clip, entry in entries.items()}
        return entries

    def _chunk_file(self, feature: str, chunk: int) -> Path:
        return self.root / layout.FEATURES[feature].chunk_path(chunk)

    def _turn_to(self, chunk: int) -> None:
        if chunk != self._chunk:
            self._directories.clear()
            self._calibrations.forget()
            self._chunk = chunk

    def _directory(self, feature: str, chunk: int) -> ZipDirectory:
        path = self._chunk_file(feature, chunk)
        if path not in self._directories:
            if not path.is_file() and layout.FEATURES[feature].chunk_path(chunk) in self._absent:
                raise DataError(f"{path}: absent upstream too; choose other cameras, or leave chunk {chunk} out")
            self._directories[path] = read_directory(path)
        return self._directories[path]

    @cached_property
    def _calibrations(self) -> CalibrationTables:
        return CalibrationTables(self.root)

    @cached_property
    def _absent(self) -> frozenset[str]:
        """Return the paths that `omni fetch` found to be missing on the hub."""
        return absent_upstream(self.root)

    def _cameras_of(self, clip_id: str, chunk: int) -> tuple[str, ...]:
        there = [name for name in layout.CAMERAS if self._chunk_file(name, chunk).is_file()]
        video = {name: layout.FEATURES[name].member(clip_id, "video") for name in there}
        return tuple(name for name in there if video[name] in self._directory(name, chunk).entries)

    def _camera(self, clip_id: str, chunk: int, camera: str) -> CameraStream:
        if camera not in layout.CAMERAS:
            raise DataError(f"no camera {camera!r} in this dataset; known: {', '.join(layout.CAMERAS)}")
        directory, feature = self._directory(camera, chunk), layout.FEATURES[camera]
        member = feature.member(clip_id, "frame_timestamps")
        name = f"{directory.path}: {member}"
        table = read_table(directory.read(member), name, ("timestamp",))
        video = directory.locate(feature.member(clip_id, "video"))
        times = timestamps(table, "timestamp", name)
        return CameraStream(camera, (video,), times, self._calibrations.of_camera(clip_id, chunk, camera).calibration)

    def _ego(self, clip_id: str, chunk: int) -> EgoMotion:
        directory = self._directory("egomotion", chunk)
        member = layout.FEATURES["egomotion"].member(clip_id, "egomotion")
        return read_egomotion(directory.read(member), f"{directory.path}: {member}")

    @cached_property
    def _events(self) -> dict[str, str]:
        path = self.root / layout.REASONING_FILE
        return read_events(path) if path.is_file() else {}

    def _captions(self, clip_id: str) -> tuple[Caption, ...]:
        """Return the texts about a clip; most have none."""
        if clip_id not in self._events:
            return ()
        return parse_events(self._events[clip_id], f"{self.root / layout.REASONING_FILE}: clip {clip_id}")

    def _provenance(self, clip_id: str, chunk: int, cameras: tuple[str, ...]) -> dict[str, str]:
        facts = {"revision": self.revision, "licence": self._pinned.get("licence", layout.LICENCE)}
        for camera in cameras:
            facts[f"calibration_{camera}"] = self._calibrations.of_camera(clip_id, chunk, camera).origin
        for feature in ("egomotion", *cameras):
            receipt = files.read_receipt(self._chunk_file(feature, chunk))
            if receipt is not None:  # of the hub's file: clips have the same origin, fetched alone or with their chunk
                facts[f"sha256 of {layout.FEATURES[feature].chunk_path(chunk)}"] = upstream_sha256(receipt)
        return facts


def find_root(folder: Path) -> Path:
    """Return the folder in the repository's layout: the one given, or the snapshot in the hub cache given.

    Raises:
        DataError: there is none, or there are several and no `refs/main` says which.
    """
    if (folder / layout.CLIP_INDEX_FILE).is_file():
        return folder
    cached = folder / f"datasets--{layout.REPOSITORY.replace('/', '--')}"
    repository = cached if cached.is_dir() else folder
    snapshots = sorted(p.parent for p in (repository / "snapshots").glob(f"*/{layout.CLIP_INDEX_FILE}"))
    main = repository / "refs" / "main"
    if len(snapshots) > 1 and main.is_file():
        snapshots = [path for path in snapshots if path.name == main.read_text().strip()]
    if len(snapshots) > 1:
        raise DataError(f"{repository}: {len(snapshots)} snapshots and no refs/main; give one, such as {snapshots[0]}")
    if not snapshots:
        raise DataError(f"{folder}: no {layout.CLIP_INDEX_FILE}, neither here nor in a hub cache's snapshot; give the "
                        "folder that omni fetch filled")  # fmt: skip
    return snapshots[0]


def read_egomotion(content: bytes, name: str) -> EgoMotion:
    """Read an egomotion member.

    Args:
        content: the parquet file.
        name: what to call it in an error.

    Raises:
        DataError: a column is missing, a number is not finite, time does not increase, or a quaternion is no rotation.
    """
    table = read_table(content, name, layout.EGOMOTION_COLUMNS)
    values = numbers(table, layout.EGOMOTION_COLUMNS[1:], name)
    quaternion = values[:, :4]
    off = np.abs(np.linalg.norm(quaternion, axis=1) - 1)
    if off.size and off.max() > _MAX_NORM_ERROR:
        raise DataError(f"{name}: quaternion at row {int(off.argmax())} is off unit norm by {off.max():.3g}; "
                        "quarantine the clip")  # fmt: skip
    return EgoMotion(
        timestamp_us=timestamps(table, "timestamp", name),
        position_m=values[:, 4:7],
        quaternion_xyzw=quaternion,
        velocity_mps=values[:, 7:10],
        acceleration_mps2=values[:, 10:13],
        curvature_per_m=values[:, 13],
    )
