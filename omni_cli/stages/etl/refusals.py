"""Recordings that gave no shard, and why: two small notes in a recording's own folder.

    refused.json   the reason in one line; the next run tries again
    crashes.json   attempts that ended their worker, with the last 4 KB of its stderr; three of the same inputs are a
                   quarantine: the recording is refused without another attempt

The second outlives every engine, so that none of them tries for ever.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli.files import read_json, receipt_path, write_json
from omni_cli.samples.shards import recording_folder, retract_manifest, windows_path
from omni_cli.stages.etl.plan import Job, Unit
from omni_cli.stages.pool import Failure

REFUSAL_FILE = "refused.json"
CRASHES_FILE = "crashes.json"
ATTEMPTS = 3


def refuse(job: Job, unit: Unit, reason: str) -> str:
    """Note that a recording is refused, in words that are the same on every machine, and return them."""
    plain = reason.removeprefix(unit.recording_id).lstrip(": ")  # whoever tells it names the recording
    plain = plain.replace(str(job.raw.absolute()), "RAW")
    if refusal(job, unit) != plain:
        retract_manifest(job.out)
        receipt_path(windows_path(job.out, unit.recording_id)).unlink(missing_ok=True)  # what was made is outdated
        write_json(_path(job, unit, REFUSAL_FILE), {"plan_key": job.plan_key(unit), "reason": plain})
    return plain


def refusal(job: Job, unit: Unit) -> str | None:
    """Return why a recording was refused under these settings, or None where it was not."""
    noted = _read(job, unit, REFUSAL_FILE)
    return str(noted["reason"]) if noted.get("plan_key") == job.plan_key(unit) else None


@dataclass(frozen=True)
class CountCrash:
    """Counts the failed attempts of units in their own folders."""

    job: Job

    def __call__(self, unit: Unit, failure: Failure) -> int:
        """Return how many attempts at these inputs have failed; what was never opened counts for itself."""
        about = {"plan_key": self.job.plan_key(unit), "unit_key": failure.begun}
        noted = _read(self.job, unit, CRASHES_FILE)
        before = noted["attempts"] if about.items() <= noted.items() else 0
        facts = {**about, "attempts": before + 1, "error": failure.error, "stderr": failure.trace}
        write_json(_path(self.job, unit, CRASHES_FILE), facts)
        return int(before + 1)


def quarantined(job: Job, unit: Unit, unit_key: str) -> str | None:
    """Return why these inputs are not tried again, or None where they may be."""
    noted = _read(job, unit, CRASHES_FILE)
    is_known = (noted.get("plan_key"), noted.get("unit_key")) == (job.plan_key(unit), unit_key)
    return crash_reason(noted["error"]) if is_known and noted["attempts"] >= ATTEMPTS else None


def crash_reason(error: str) -> str:
    """Return the reason of a quarantine: the same whichever engine, and process, met with it."""
    return (
        f"{error}, at each of {ATTEMPTS} attempts; its {CRASHES_FILE} tells where; it is tried again with "
        "--retry-crashed (more memory: --worker-gb)"
    )


def clear(job: Job, unit: Unit) -> None:
    """Forget what was noted of a unit: it is done."""
    _path(job, unit, REFUSAL_FILE).unlink(missing_ok=True)
    forgive(job, unit)


def forgive(job: Job, unit: Unit) -> None:
    """Forget a unit's crashes: it may be tried again."""
    _path(job, unit, CRASHES_FILE).unlink(missing_ok=True)


def _read(job: Job, unit: Unit, name: str) -> dict[str, Any]:
    try:
        noted = read_json(_path(job, unit, name))
    except (FileNotFoundError, ValueError):  # a damaged note is as good as none
        return {}
    return noted if isinstance(noted, dict) else {}


def _path(job: Job, unit: Unit, name: str) -> Path:
    return recording_folder(job.out, unit.recording_id) / name
