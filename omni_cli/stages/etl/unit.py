"""One recording: opened, decoded, cut, written with its receipts; or refused with a reason. Runs in a worker."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from omni_cli.errors import DataError, OmniError, refused_by_machine
from omni_cli.files import hash_json, remove_leftovers
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.samples.shards import finished_recording, recording_folder, write_recording
from omni_cli.samples.splits import SPLITS, time_split
from omni_cli.samples.tables import Frames, ShardTables
from omni_cli.samples.windows import AssignSplit, span_us
from omni_cli.scene.recording import Recording
from omni_cli.stages.etl.identity import allowed_s, inputs_of, slow_cameras
from omni_cli.stages.etl.plan import Job, Unit
from omni_cli.stages.etl.refusals import clear, forgive, quarantined, refuse
from omni_cli.stages.worker import begin, moved

# What a disk says of one file that cannot be read; a full disk, or too many open files, are nobody's input.
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit; `stopped` ends the whole stage."""

    status: Literal["made", "kept", "refused", "stopped"]
    reason: str = ""
    frames: int = 0  # decoded
    warnings: tuple[str, ...] = ()
    slow_hz: dict[str, float] = field(default_factory=dict)  # of the cameras whose pictures repeat


def run_unit(job: Job, unit: Unit) -> UnitResult:
    """Make one recording's shard, unless it is there already."""
    folder = recording_folder(job.out, unit.recording_id)
    keep_freed_blocks()
    try:
        if folder.is_dir():
            remove_leftovers(folder)
        return _make(job, unit)
    except DataError as error:
        return _refused(job, unit, str(error))
    except OmniError as error:
        return UnitResult("stopped", str(error))
    except OSError as error:
        if not (reason := refused_by_machine(error, folder)):
            raise
        if error.errno in _UNREADABLE and not _is_ours(job, error):
            return _refused(job, unit, f"cannot be read: {refused_by_machine(error, job.raw.absolute())}")
        return UnitResult("stopped", reason)


def _is_ours(job: Job, error: OSError) -> bool:
    """Say whether the disk refused what we write: a write names its file, the read of an open file does not."""
    return error.filename is not None and Path(error.filename).absolute().is_relative_to(job.out.absolute())


def _refused(job: Job, unit: Unit, reason: str) -> UnitResult:
    forgive(job, unit)  # the worker lived to tell
    return UnitResult("refused", refuse(job, unit, reason))


def _make(job: Job, unit: Unit) -> UnitResult:
    recording = job.reader.open(unit.recording_id, job.preprocess.cameras)
    unit_key = hash_json({"plan": job.plan_key(unit), "inputs": inputs_of(recording, job.preprocess)})
    if reason := quarantined(job, unit, unit_key):
        return UnitResult("refused", refuse(job, unit, reason))
    told: dict[str, Any] = {"warnings": _warnings(recording), "slow_hz": slow_cameras(recording, job.preprocess)}
    if finished_recording(job.out, unit.recording_id, unit_key):
        clear(job, unit)
        return UnitResult("kept", **told)
    begin(unit_key, allowed_s(recording, job.preprocess))
    tables = job.make_tables(recording, job.preprocess, assign_split=assign_split(job, unit, recording))
    provenance = {**recording.provenance, **tables.facts}
    facts = {"plan_key": job.plan_key(unit), "group": unit.group, "provenance": provenance}
    watched = replace(tables, frames=_watched(tables.frames))
    write_recording(job.out, unit.recording_id, watched, unit_key, **facts, **_summary(tables))
    clear(job, unit)
    return UnitResult("made", frames=tables.frames.num_rows, **told)


def _watched(frames: Frames) -> Frames:
    """Return the same frames; how many of them are made is told while they are asked for."""
    return replace(frames, batches=partial(_telling, frames))


def _telling(frames: Frames) -> Iterator[pa.RecordBatch]:
    made = 0
    for batch in frames.batches():
        made += batch.num_rows
        yield batch
        del batch  # before the next is filled
        moved(made / frames.num_rows)


def _warnings(recording: Recording) -> tuple[str, ...]:
    if recording.provenance.get("log_is_truncated") == "true":
        return (f"{recording.provenance['truncated_logs']} ends inside an event; read up to there",)
    return ()


def assign_split(job: Job, unit: Unit, recording: Recording) -> AssignSplit:
    """Return what gives each window of a recording its split: that of the unit, or one by its time."""
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
