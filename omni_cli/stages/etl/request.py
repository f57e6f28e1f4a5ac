"""What a user asks `omni etl` for, and what that means on this disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from omni_cli.files import hash_json
from omni_cli.recipe import Sampled
from omni_cli.samples.preprocess import Preprocess
from omni_cli.sources import open_source
from omni_cli.stages.etl.engines import Engine
from omni_cli.stages.etl.plan import Job, Plan, make_job, make_plan
from omni_cli.stages.locate import raw_folder
from omni_cli.stages.raw_lock import reading


@dataclass(frozen=True)
class EtlRequest:
    """One call of `omni etl`."""

    data: Path  # DATA, or a folder in a source's own layout
    source: str | None = None
    out: Path | None = None  # the shard folder itself
    name: str | None = None  # or its name under DATA/shards
    workers: int | None = 1  # processes; 0 runs in this one, None: one a core
    worker_gb: float | None = None  # limit of each one's private memory; None: an equal share of the machine
    engine: Engine = "local"
    shard: tuple[int, int] | None = None  # share I of N of the units, 1-based
    split_file: Path | None = None
    max_refused: float = 0.2  # share of the recordings; more fails the run
    retry_crashed: bool = False  # what crashed its worker at every attempt too
    dry_run: bool = False
    profile: str = ""  # named in the plan


@contextmanager
def prepared(recipe: Sampled, preprocess: Preprocess, request: EtlRequest) -> Iterator[tuple[Job, Plan]]:
    """Find the raw data, plan the units and choose the shard folder; touches nothing.

    Inside the block nobody takes the raw data away.

    Raises:
        UsageError: there is no raw data, or the split file is wrong.
        DataError: the raw data hold no recording.
        OmniError: another omni is taking them away.
    """
    if request.engine == "ray":  # a worker may stand in another folder
        request = replace(request, data=request.data.absolute(), out=request.out and request.out.absolute())
    source, raw = raw_folder(request.data, request.source)
    with reading(raw):
        reader = open_source(source, raw.absolute())  # its errors name files by whole paths
        plan = make_plan(reader, raw, recipe.split, request.split_file)
        job = make_job(recipe, preprocess, source, reader, raw)
        folder = request.out or request.data / "shards" / (request.name or _default_name(job, plan))
        yield replace(job, out=folder), plan


def _default_name(job: Job, plan: Plan) -> str:
    """Return a name that other settings never share, so that no shard set overwrites another."""
    by_file = [[unit.recording_id, unit.split] for unit in plan.units] if plan.split_rule == "file" else None
    facts = [job.source, job.settings, job.preprocess.model_dump(mode="json"), plan.split_rule, by_file]
    return f"{job.recipe_name}-{len(job.preprocess.cameras)}-cam-{hash_json(facts)[:8]}"
