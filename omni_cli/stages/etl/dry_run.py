"""`omni etl --dry-run`: what would happen, from settings and indices alone."""

from typing import Any

from omni_cli.errors import UsageError
from omni_cli.recipe import Sampled
from omni_cli.report import Console
from omni_cli.stages.etl.estimate import estimate
from omni_cli.stages.etl.request import EtlRequest, prepare


def dry_run(recipe: Sampled, request: EtlRequest, console: Console) -> dict[str, Any]:
    """Say what would happen and touch nothing; raw data may be absent, the profile of another machine.

    Args:
        recipe: as for `etl`.
        request: as for `etl`.
        console: shows the plan.

    Raises:
        DataError: the raw data are there, but no recording in them.
    """
    preprocess = recipe.preprocess()
    facts, rows = preprocess.facts(), [*preprocess.described(), ("stride", f"{recipe.sample.stride} frames")]
    rows.append(("pictures of a window", f"{facts['bytes_per_window'] / 1e6:.2f} MB"))
    title = f"plan for {request.profile or 'this machine'}"
    try:
        job, plan = prepare(recipe, preprocess, request)
    except UsageError as error:
        console.table(title, ("what", "value"), rows)
        console.say(f"no raw data yet: {error}")
        return {**facts, "dry_run": True, "profile": request.profile, "recordings": 0, "raw": None}
    expected = estimate(job, plan.share(request.shard))
    rows += [
        ("recordings", f"{expected.recordings} in {job.raw}"),
        ("hours of driving, about", f"{expected.hours:.2f}"),
        ("windows, about", expected.windows),
        ("disk, at most about", f"{expected.stored_bytes / 2**30:.2f} GiB in {job.out}"),
    ]
    console.table(title, ("what", "value"), rows)
    where = {"profile": request.profile, "raw": str(job.raw), "shards": str(job.out)}
    return {**facts, **expected.facts(), "dry_run": True, **where}
