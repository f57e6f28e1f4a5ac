"""One recording: opened, decoded, cut, written with its receipts; or refused with a reason. Runs in a worker."""

import hashlib
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, OmniError, refused_by_machine
from omni_cli.files import hash_json, read_json, receipt_path, remove_leftovers, write_json
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import (
    finished_recording,
    recording_folder,
    retract_manifest,
    windows_path,
    write_recording,
)
from omni_cli.samples.splits import SPLITS, time_split
from omni_cli.samples.tables import ShardTables
from omni_cli.samples.windows import AssignSplit, span_us
from omni_cli.scene.recording import CameraStream, Recording
from omni_cli.stages.etl.plan import Job, Unit

REFUSAL_FILE = "refused.json"


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit; `stopped` ends the whole stage."""

    status: Literal["made", "kept", "refused", "stopped"]
    reason: str = ""
    frames: int = 0  # decoded


def run_unit(job: Job, unit: Unit) -> UnitResult:
    """Make one recording's shard, unless it is there already."""
    folder = recording_folder(job.out, unit.recording_id)
    keep_freed_blocks()
    try:
        if folder.is_dir():
            remove_leftovers(folder)
        return _make(job, unit, folder)
    except DataError as error:
        return refuse(job, unit, str(error))
    except OmniError as error:
        return UnitResult("stopped", str(error))
    except OSError as error:
        if not (reason := refused_by_machine(error, folder)):
            raise
        return UnitResult("stopped", reason)


def refuse(job: Job, unit: Unit, reason: str) -> UnitResult:
    """Note that a recording is refused; the next run tries it again."""
    plain = reason.replace(str(job.raw.absolute()), "RAW").replace(str(job.raw), "RAW")  # the same on every machine
    if refusal(job, unit) != plain:
        retract_manifest(job.out)
        receipt_path(windows_path(job.out, unit.recording_id)).unlink(missing_ok=True)  # what was made is outdated
        write_json(_refusal_path(job, unit), {"plan_key": job.plan_key(unit), "reason": plain})
    return UnitResult("refused", plain)


def refusal(job: Job, unit: Unit) -> str | None:
    """Return why a recording was refused under these settings, or None where it was not."""
    path = _refusal_path(job, unit)
    if not path.is_file():
        return None
    noted = read_json(path)
    return str(noted["reason"]) if noted["plan_key"] == job.plan_key(unit) else None


def _refusal_path(job: Job, unit: Unit) -> Path:
    return recording_folder(job.out, unit.recording_id) / REFUSAL_FILE


def _make(job: Job, unit: Unit, folder: Path) -> UnitResult:
    recording = job.reader.open(unit.recording_id, job.preprocess.cameras)
    unit_key = hash_json({"plan": job.plan_key(unit), "inputs": _identity(recording, job.preprocess)})
    if finished_recording(job.out, unit.recording_id, unit_key):
        (folder / REFUSAL_FILE).unlink(missing_ok=True)
        return UnitResult("kept")
    tables = job.make_tables(recording, job.preprocess, assign_split=_assign_split(job, unit, recording))
    retract_manifest(job.out)
    provenance = {**recording.provenance, **tables.facts}
    facts = {"plan_key": job.plan_key(unit), "group": unit.group, "provenance": provenance}
    write_recording(job.out, unit.recording_id, tables, unit_key, **facts, **_summary(tables))
    (folder / REFUSAL_FILE).unlink(missing_ok=True)
    return UnitResult("made", frames=tables.frames.num_rows)


def _assign_split(job: Job, unit: Unit, recording: Recording) -> AssignSplit:
    if unit.split != "by time":
        return partial(_constant_split, unit.split)
    first_us, last_us = span_us(recording, job.preprocess.cameras)
    validation, gap_s = job.settings["split"]["validation"], job.settings["split"]["gap_s"]
    return partial(time_split, first_us=first_us, last_us=last_us, validation=validation, gap_s=gap_s)


def _constant_split(split: str, _start_us: int, _end_us: int) -> str:
    return split


def _summary(tables: ShardTables) -> dict[str, Any]:
    splits = tables.windows["split"].to_pylist()
    return {
        "windows": {split: splits.count(split) for split in SPLITS},
        "num_frames": tables.frames.num_rows,
        "dropped": dict(sorted(tables.dropped.items())),
    }


def _identity(recording: Recording, preprocess: Preprocess) -> dict[str, Any]:
    """Return what says that these are the same inputs.

    Sizes of the videos, every timestamp and motion sample, and the source's provenance (hashes of fetched files).
    """
    cameras = {name: recording.cameras[name] for name in preprocess.cameras if name in recording.cameras}
    return {
        "cameras": {name: _camera_identity(stream) for name, stream in cameras.items()},
        "motion": _hashes(recording.ego or recording.speed),
        "device": _hashes(recording.device),
        "provenance": dict(recording.provenance),
        "captions": [[caption.timestamp_us, caption.text] for caption in recording.captions],
    }


def _camera_identity(stream: CameraStream) -> list[Any]:
    sizes = [
        video.path.stat().st_size - video.offset_bytes if video.size_bytes is None else video.size_bytes
        for video in stream.videos
    ]
    return [sizes, _hashes(stream.timestamp_us), _hashes(stream.calibration)]


def _hashes(value: Any) -> Any:
    """Return a value of the scene with every array, at any depth, as its hash."""
    if isinstance(value, Rotation):
        value = value.as_quat()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return [_hashes(getattr(value, part.name)) for part in fields(value)] if is_dataclass(value) else value
