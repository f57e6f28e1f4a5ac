"""What an etl leaves of a shard set in which no recording gives a window: nothing."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from omni_cli.files import read_receipt, receipt_path, remove_leftovers
from omni_cli.samples.shards import MANIFEST_FILE, frames_path, recording_folder, windows_path
from omni_cli.stages.etl.finalize import is_done
from omni_cli.stages.etl.plan import Job, Plan, Unit
from omni_cli.stages.etl.refusals import REFUSAL_FILE


def clear_away(job: Job, plan: Plan) -> bool:
    """Remove a shard set that holds no window, so that nothing half-made is left; return whether it is gone.

    It stays as it is where anything else lies in it: a shard with windows or what was one, another plan's recording, or
    the note of a crash, which keeps every later etl from trying for ever.
    """
    recordings = job.out / "recordings"
    folders = {recording_folder(job.out, unit.recording_id): unit for unit in plan.units}
    there = sorted(recordings.iterdir()) if recordings.is_dir() else []
    if (job.out / MANIFEST_FILE).exists() or not all(
        folder in folders and _is_nothing(job, folders[folder]) for folder in there
    ):
        return False
    for folder in there:
        _remove(folder, folder.iterdir())
    remove_leftovers(job.out)
    _remove(recordings, ())
    _remove(job.out, [receipt_path(job.out / MANIFEST_FILE)])  # of a manifest that was taken back
    return not job.out.exists()


def _is_nothing(job: Job, unit: Unit) -> bool:
    """Return whether a recording's folder holds a refusal, or a shard without a window, and nothing else."""
    folder = recording_folder(job.out, unit.recording_id)
    remove_leftovers(folder)
    known = {REFUSAL_FILE} | ({path.name for path in _shard(job, unit)} if _is_empty_shard(job, unit) else set())
    return {path.name for path in folder.iterdir()} <= known


def _is_empty_shard(job: Job, unit: Unit) -> bool:
    receipt = read_receipt(windows_path(job.out, unit.recording_id)) or {}
    return is_done(job, unit) and not any(receipt["windows"].values())


def _shard(job: Job, unit: Unit) -> list[Path]:
    tables = [frames_path(job.out, unit.recording_id), windows_path(job.out, unit.recording_id)]
    return [*tables, *map(receipt_path, tables)]


def _remove(folder: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # another etl put something there meanwhile, or took it away
        folder.rmdir()
