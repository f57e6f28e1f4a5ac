"""`omni etl --dry-run`: what would happen, from settings and indices alone."""

from contextlib import ExitStack
from typing import Any

from omni_cli.errors import UsageError
from omni_cli.recipe import Sampled
from omni_cli.report import Console
from omni_cli.samples.splits import SPLITS
from omni_cli.stages.etl.estimate import Estimate, estimate, slow_line, too_few
from omni_cli.stages.etl.plan import Plan
from omni_cli.stages.etl.request import EtlRequest, prepared


def dry_run(recipe: Sampled, request: EtlRequest, console: Console) -> dict[str, Any]:
    """Say what would happen and touch nothing; raw data may be absent, the profile of another machine.

    Args:
        recipe: as for `etl`.
        request: as for `etl`.
        console: shows the plan.

    Raises:
        DataError: the raw data are there, but no recording in them.
    """
    for note in recipe.notes():
        console.say(note)
    preprocess = recipe.preprocess()
    facts, rows = preprocess.facts(), [*preprocess.described(), ("stride", f"{recipe.sample.stride} frames")]
    rows.append(("pictures of a window", f"{facts['bytes_per_window'] / 1e6:.2f} MB"))
    title = f"plan for {request.profile or 'this machine'}"
    with ExitStack() as held:
        try:
            job, plan = held.enter_context(prepared(recipe, preprocess, request))
        except UsageError as error:
            console.table(title, ("what", "value"), rows)
            console.say(f"no raw data yet: {error}")
            return {**facts, "dry_run": True, "profile": request.profile, "recordings": 0, "raw": None}
        expected = estimate(job, plan.share(request.shard), _OPENED)
    rows += [
        ("recordings", f"{expected.recordings} in {job.raw}"),
        ("hours of driving, about", f"{expected.hours:.2f}"),
        *((f"windows to {name}, about", expected.windows[split]) for split, name in _PURPOSES),
        ("disk, about", f"{expected.stored_bytes / 2**30:.2f} GiB in {job.out}"),
        ("memory of a worker, about", f"{expected.worker_bytes / 2**20:.0f} MiB, however long a drive is"),
    ]
    console.table(title, ("what", "value"), rows)
    _foresee(expected, plan, preprocess.rate_hz, console)
    where = {"profile": request.profile, "raw": str(job.raw), "shards": str(job.out)}
    return {**facts, **expected.facts(), "dry_run": True, **where}


_OPENED = 12  # recordings: their windows and texts differ
_PURPOSES = (("train", "train on"), ("val", "measure on"))


def _foresee(expected: Estimate, plan: Plan, rate_hz: float, console: Console) -> None:
    """Warn of what the real run would warn of."""
    if expected.slow_hz:
        console.warn(f"{slow_line(expected.slow_hz, rate_hz)}; lower --rate-hz")
    if expected.why_none and not any(expected.windows.values()):
        console.warn(f"no window in what was looked at; the first is {expected.why_none}")
    for split in SPLITS:
        if plan.split_rule != "file" and any(expected.windows.values()) and not expected.windows[split]:
            console.warn(too_few(split, plan.split_rule))
