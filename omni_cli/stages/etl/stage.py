"""The stage itself: plan, run the units, publish the manifest, make the tokens."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from omni_cli.config import differences
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.recipe import Sampled, require
from omni_cli.report import Console, Step, counted
from omni_cli.samples.shards import Manifest, ShardSet
from omni_cli.samples.splits import SPLITS
from omni_cli.scene.clock import check_rate
from omni_cli.stages.etl.dry_run import dry_run
from omni_cli.stages.etl.engines import UnitOutcome, run_units
from omni_cli.stages.etl.estimate import check_space, estimate, room_line, slow_line, too_few
from omni_cli.stages.etl.finalize import current_manifest, finalize, is_done, made_otherwise, missing_units
from omni_cli.stages.etl.nothing import clear_away
from omni_cli.stages.etl.plan import Job, Plan, Unit
from omni_cli.stages.etl.refusals import crash_reason, forgive, refusal, refuse
from omni_cli.stages.etl.request import EtlRequest, prepared
from omni_cli.stages.etl.sidecar import ensure_sidecar
from omni_cli.stages.etl.unit import UnitResult
from omni_cli.stages.licences import register_shards
from omni_cli.stages.preemption import preemptible

_PREEMPTED = "stopped by SIGTERM; every finished recording is kept, run the same command again to go on"


def etl(recipe: Any, request: EtlRequest, console: Console) -> dict[str, Any]:
    """Turn raw recordings into shards.

    Args:
        recipe: a `Sampled` recipe; one that is `Tokenized` gets its sidecar as well.
        request: what to work on, and where to.
        console: shows the progress.

    Returns:
        The shard folder and what was made, kept, dropped and refused.

    Raises:
        UsageError: there is no raw data, the rate cannot be, or the folder holds shards of other settings.
        DataError: too many recordings are refused, or none is left; where no window is, no folder is left either.
        OmniError: the disk is too small, or failed, or another omni is taking the raw data away.
        Preempted: SIGTERM came; what is finished stays.
    """
    with preemptible(_PREEMPTED):
        return _etl(recipe, request, console)


def _etl(recipe: Any, request: EtlRequest, console: Console) -> dict[str, Any]:
    sampled: Sampled = require(recipe, Sampled)  # type: ignore[type-abstract]  # a protocol names the capability
    check_rate(sampled.sample.rate_hz)
    if request.dry_run:
        return dry_run(sampled, request, console)
    for note in sampled.notes():
        console.say(note)
    with prepared(sampled, sampled.preprocess(), request) as (job, plan):
        console.say(f"{job.source} in {job.raw}: {counted(len(plan.units), 'recording')} -> {job.out}")
        _check_settings(job)
        try:
            return _make(job, plan, recipe, request, console)
        except DataError as error:
            # shares know of each other by what lies there
            if request.shard is None and clear_away(job, plan):
                raise DataError(f"{error}; nothing is left in {job.out}") from None
            raise


def _make(job: Job, plan: Plan, recipe: Any, request: EtlRequest, console: Console) -> dict[str, Any]:
    units = plan.share(request.shard)
    left = [unit for unit in units if not is_done(job, unit)]
    check_space(job.out, estimate(job, left).stored_bytes, len(left))
    if others := sum(made_otherwise(job, unit) for unit in left):
        console.warn(
            f"{job.out}: {counted(others, 'recording')} of other settings, or of another version of omni, made anew; "
            "to keep what is there, stop this and choose another --out"
        )
    register_shards(request.data, job.source, job.raw, job.out)
    counts = _run_units(job, units, request, console)
    _check_alone(job, units)
    _check_refused(job, units, request.max_refused)
    if waiting := missing_units(job, plan):
        elsewhere = counted(len(waiting), "recording")
        console.say(f"left to the other shares: {elsewhere}; the last one to end writes the manifest")
        return {"shards": str(job.out), "finished": False, "waiting": len(waiting), **counts}
    _check_refused(job, plan.units, request.max_refused)  # those of the other shares too
    manifest = finalize(job, plan)
    _say_result(manifest, plan, console)
    sidecar = ensure_sidecar(ShardSet(job.out, manifest), recipe, console)
    return {"shards": str(job.out), "finished": True, **counts, **_facts(manifest, plan), "sidecar": sidecar}


def _check_settings(job: Job) -> None:
    """Refuse to mix shards of different settings in one folder."""
    there = current_manifest(job.out)
    if there is None:
        return
    ours = {"recipe": job.recipe_name, "settings": job.settings, "preprocess": job.preprocess, "source": job.source}
    if changed := differences(there, there.model_copy(update=ours)):
        raise UsageError(
            f"{job.out}: holds shards of other settings ({'; '.join(changed[:3])}); "
            "choose another folder with --out, or delete this one"
        )


def _run_units(job: Job, units: tuple[Unit, ...], request: EtlRequest, console: Console) -> dict[str, int]:
    for unit in units if request.retry_crashed else ():
        forgive(job, unit)
    with console.progress("etl", len(units), "recordings") as step:
        told = _Told(console, step)
        outcomes = run_units(
            job, units, engine=request.engine, workers=request.workers, worker_gb=request.worker_gb, listen=told.watch
        )
        for outcome in outcomes:
            result = _result(job, outcome)
            if result.status == "stopped":
                left = [unit for unit in units if not is_done(job, unit)]
                raise OmniError(f"{result.reason} ({room_line(job, left)})")
            told.hear(outcome.item, result)
    told.end(job.preprocess.rate_hz)
    return {name: told.counts[name] for name in ("made", "kept", "decoded_frames")}


@dataclass
class _Told:
    """What the units said."""

    console: Console
    step: Step
    counts: Counter[str] = field(default_factory=Counter)
    slow_hz: dict[str, float] = field(default_factory=dict)
    under_way: dict[Unit, float] = field(default_factory=dict)  # the share of each that is done

    def watch(self, unit: Unit, share: float) -> None:
        self.under_way[unit] = share
        self.step.under_way(sum(self.under_way.values()))

    def hear(self, unit: Unit, result: UnitResult) -> None:
        if result.status == "refused":
            self.console.warn(f"refused {unit.recording_id}: {result.reason}")
        for warning in result.warnings:
            self.console.warn(f"{unit.recording_id}: {warning}")
        for camera, rate_hz in result.slow_hz.items():
            self.slow_hz[camera] = min(rate_hz, self.slow_hz.get(camera, rate_hz))
        self.counts[result.status] += 1
        self.counts["decoded_frames"] += result.frames
        self.under_way.pop(unit, None)
        self.step.advance(under_way=sum(self.under_way.values()))

    def end(self, rate_hz: float) -> None:
        if kept := self.counts["kept"]:
            made = f", {self.counts['made']} made now" if self.counts["made"] else ""
            ending = "" if self.counts["made"] or self.counts["refused"] else "; nothing was left to do"
            self.console.say(f"already there: {counted(kept, 'recording')}{made}{ending}")
        if self.slow_hz:
            self.console.warn(f"{slow_line(self.slow_hz, rate_hz)}; lower --rate-hz")


def _result(job: Job, outcome: UnitOutcome) -> UnitResult:
    """Return a unit's result; a unit that crashed or hung at every attempt is refused."""
    if outcome.result is not None:
        return outcome.result
    return UnitResult("refused", refuse(job, outcome.item, crash_reason(str(outcome.error))))


def _check_alone(job: Job, units: tuple[Unit, ...]) -> None:
    """Refuse to go on where what was made or refused here is gone: two etls that differ would never end."""
    if gone := [unit for unit in units if not is_done(job, unit) and refusal(job, unit) is None]:
        raise OmniError(
            f"{job.out}: another omni etl, of other settings or of another version, made {len(gone)} of "
            f"{counted(len(units), 'recording')} anew; end one of the two, give each its own --out, and run the same "
            "command again"
        )


def _check_refused(job: Job, units: tuple[Unit, ...], max_refused: float) -> None:
    refused = [unit for unit in units if not is_done(job, unit)]
    if len(refused) > max_refused * len(units) or (units and len(refused) == len(units)):
        first = f"{refused[0].recording_id}: {refusal(job, refused[0])}"
        raise DataError(
            f"{len(refused)} of {counted(len(units), 'recording')} refused, more than the {max_refused:.0%} allowed; "
            f"the first is {first}; audit the data with: omni audit"
        )


def _say_result(manifest: Manifest, plan: Plan, console: Console) -> None:
    windows = ", ".join(f"{manifest.count(split)} {split}" for split in SPLITS)
    skew = f"{manifest.skew.median_us / 1000:.1f} ms median, {manifest.skew.max_us / 1000:.1f} ms at most"
    console.say(f"{counted(len(manifest.recordings), 'recording')}, windows: {windows}; camera skew: {skew}")
    for reason, count in manifest.dropped.items():
        console.say(f"dropped {counted(count, 'window')}: {reason}")
    if plan.quarantined:
        console.say(f"left out {counted(len(plan.quarantined), 'recording')} in quarantine")
    if plan.unassigned:
        console.say(f"left out {counted(plan.unassigned, 'recording')} that the split file does not name")
    for split in SPLITS:
        if not manifest.count(split) and plan.split_rule != "file":  # a file says so on purpose
            console.warn(too_few(split, plan.split_rule))


def _facts(manifest: Manifest, plan: Plan) -> dict[str, Any]:
    return {
        "source": manifest.source,
        "recordings": len(manifest.recordings),
        "windows": {split: manifest.count(split) for split in SPLITS},
        "dropped": manifest.dropped,
        "refused": manifest.refused,
        "quarantined": len(plan.quarantined),
        "unassigned": plan.unassigned,
        "skew_ms": {"median": manifest.skew.median_us / 1000, "max": manifest.skew.max_us / 1000},
        "split_rule": manifest.split_rule,
        "fingerprint": manifest.fingerprint,
    }
