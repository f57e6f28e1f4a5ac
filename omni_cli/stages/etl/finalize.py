"""The manifest of a shard set, made from receipts alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_cli.errors import DataError
from omni_cli.files import read_receipt, remove_leftovers, verified_receipt
from omni_cli.samples.shards import (
    MANIFEST_FILE,
    Manifest,
    RecordingEntry,
    SkewStats,
    frames_path,
    listed_file,
    open_stream,
    read_manifest,
    windows_path,
    write_manifest,
)
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages.etl.plan import Job, Plan, Unit
from omni_cli.stages.etl.refusals import refusal

_SUMMARISED = ("revision", "licence", "grid_phase_us", "teacher_provider")


def is_done(job: Job, unit: Unit) -> bool:
    """Say whether a unit's receipt is there and was made under these settings; its content is not read."""
    path = windows_path(job.out, unit.recording_id)
    receipt = read_receipt(path)
    if receipt is None or not path.is_file() or not frames_path(job.out, unit.recording_id).is_file():
        return False
    return bool(receipt.get("plan_key") == job.plan_key(unit) and receipt["size"] == path.stat().st_size)


def made_otherwise(job: Job, unit: Unit) -> bool:
    """Say whether a unit's shard is there, and was made under other settings or by another version."""
    receipt = read_receipt(windows_path(job.out, unit.recording_id))
    return receipt is not None and receipt.get("plan_key") != job.plan_key(unit)


def missing_units(job: Job, plan: Plan) -> list[Unit]:
    """Return the units that are neither done nor refused: another share of the work has them."""
    return [unit for unit in plan.units if not is_done(job, unit) and refusal(job, unit) is None]


def finalize(job: Job, plan: Plan) -> Manifest:
    """Publish the manifest of a shard set whose every unit is done or refused, and some are done.

    A manifest that is equal is left untouched.

    Raises:
        DataError: a drive lies in train and in val, or no recording gave a window.
    """
    done = [unit for unit in plan.units if is_done(job, unit)]
    entries = tuple(sorted((_entry(job, unit) for unit in done), key=lambda entry: entry.id))
    check_no_leak([(entry.id, entry.group, entry.windows) for entry in entries], plan.split_rule)
    reasons = {unit.recording_id: refusal(job, unit) for unit in plan.units if unit not in set(done)}
    _check_any_window(job, entries)
    skews = np.concatenate([_skews_us(windows_path(job.out, entry.id)) for entry in entries])
    manifest = Manifest(
        recipe=job.recipe_name,
        settings=job.settings,
        preprocess=job.preprocess,
        source=job.source,
        provenance=_provenance(job, done),
        split_rule=plan.split_rule,
        recordings=entries,
        refused={name: reason for name, reason in sorted(reasons.items()) if reason is not None},
        quarantined=dict(sorted(plan.quarantined.items())),
        skew=SkewStats(median_us=int(np.median(skews)), max_us=int(skews.max())),
    )
    remove_leftovers(job.out)
    if current_manifest(job.out) != manifest:
        write_manifest(job.out, manifest)
    return manifest


def _check_any_window(job: Job, entries: Sequence[RecordingEntry]) -> None:
    """Refuse a set in which nothing is wrong and nothing is there, such as texts of recordings that have none."""
    if not any(sum(entry.windows.values()) for entry in entries):
        dropped = sum((Counter(entry.dropped) for entry in entries), Counter[str]())
        reasons = ", ".join(f"{count} because {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"{job.raw}: no recording gives a window; dropped: {reasons}; choose other --labels or recordings"
        )


def current_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder of shards, or None where there is none that verifies."""
    path = folder / MANIFEST_FILE
    try:
        return read_manifest(path) if verified_receipt(path) else None
    except DataError:  # of an older format: made again
        return None


def _provenance(job: Job, units: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    """Return the distinct revisions, licences and phases; the hashes of each recording's inputs stay in its receipt."""
    told = [_receipt(job, unit)["provenance"] for unit in units]
    found = {key: tuple(sorted({facts[key] for facts in told if key in facts})) for key in _SUMMARISED}
    return {key: values for key, values in found.items() if values}


def _receipt(job: Job, unit: Unit) -> dict[str, Any]:
    receipt = read_receipt(windows_path(job.out, unit.recording_id))
    assert receipt is not None  # of a unit that is done
    return receipt


def _entry(job: Job, unit: Unit) -> RecordingEntry:
    path, receipt = windows_path(job.out, unit.recording_id), _receipt(job, unit)
    return RecordingEntry(
        id=unit.recording_id,
        group=unit.group,
        windows=receipt["windows"],
        num_frames=receipt["num_frames"],
        dropped=receipt["dropped"],
        max_skew_us=int(_skews_us(path).max(initial=0)),
        frames_file=listed_file(frames_path(job.out, unit.recording_id)),
        windows_file=listed_file(path),
    )


def _skews_us(path: Path) -> np.ndarray:
    return np.asarray(open_stream(path)["max_skew_us"].to_numpy())
