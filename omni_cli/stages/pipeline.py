"""`omni run`: fetch what is missing, audit all of it, make shards, train and measure, in one command.

Every step finishes only what its receipts do not say is done, so that the whole can be killed and run again.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omni_cli.config import Settings
from omni_cli.errors import DataError
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, camera_names, fetch
from omni_cli.stages.train import TrainRequest, train


class FetchSettings(Settings):
    """The `[fetch]` table of a pipeline's TOML file: `omni fetch` with the same words."""

    source: str = "synthetic"
    chunks: str | None = "2"
    clips: tuple[str, ...] = ()
    cameras: str | None = None
    origin: str | None = None  # `--from`
    max_gb: float = 150.0
    workers: int = 12
    revision: str | None = None
    seed: int = 0
    clips_per_chunk: int = 4
    seconds: float = 20.0
    fps: int = 30
    width_px: int = 320
    height_px: int = 180
    rig: str = "mixed"
    clutter: float = 1.0


@dataclass(frozen=True)
class PipelineRequest:
    """One call of `omni run`."""

    fetch: FetchSettings
    data: Path
    runs: Path
    run: str | None
    profile: str
    workers: int


def pipeline(recipe: Any, request: PipelineRequest, console: Console) -> dict[str, Any]:
    """Go from nothing to a measured model.

    Raises:
        DataError: the audit refused data; it names the folder to look at.
    """
    wanted = fetch_request(request.fetch, request.data)
    console.say(f"1/5 fetch: {wanted.source}")
    fetched = fetch(wanted, console)
    console.say(f"2/5 audit: {wanted.folder}")
    audited = audit(AuditRequest(wanted.folder), console)
    if audited["refused"]:
        raise DataError(
            f"{wanted.folder}: {audited['refused']} units refused, named above; "
            f"leave them out with: omni audit {wanted.folder} --quarantine"
        )
    console.say("3/5 etl: recordings to shards")
    shards = etl(recipe, EtlRequest(request.data, wanted.source, workers=request.workers), console)
    console.say("4/5 train")
    trained = train(
        recipe, TrainRequest(Path(shards["shards"]), request.data, request.runs, request.run, request.profile), console
    )
    console.say("5/5 eval: on recordings that it never saw")
    measured = evaluate(recipe, runs.open_finished(Path(trained["run"])), EvalRequest(), console)
    return {"fetch": fetched, "audit": audited, "etl": shards, "train": trained, "eval": measured}


def fetch_request(settings: FetchSettings, data: Path) -> FetchRequest:
    """Return what `omni fetch` would be asked for."""
    world = {field.name: getattr(settings, field.name) for field in fields(SyntheticSpec) if field.name != "cameras"}
    return FetchRequest(
        source=settings.source,
        data=data,
        chunks=settings.chunks if not settings.clips else None,
        clips=settings.clips,
        cameras=camera_names(settings.cameras) if settings.cameras else (),
        origin=Path(settings.origin) if settings.origin else None,
        max_gb=settings.max_gb,
        workers=settings.workers,
        revision=settings.revision,
        synthetic=SyntheticSpec(**world),
    )
