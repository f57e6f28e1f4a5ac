"""`omni run`: fetch what is missing, audit all of it, make shards, train and measure, in one command.

Every step finishes only what its receipts do not say is done, so that the whole can be killed and run again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from omni_cli.config import Settings, comma_list
from omni_cli.errors import DataError, UsageError
from omni_cli.report import Console
from omni_cli.stages import locate, runs
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, camera_names, fetch, parse_size
from omni_cli.stages.train import TrainRequest, train

_SYNTHETIC_CHUNKS = "2"  # where nothing is asked for


def _chunks_text(value: Any) -> Any:
    return str(value) if type(value) is int else value  # `chunks = 2`, but never `true`


def _clips(value: Any) -> Any:
    return comma_list(value) if isinstance(value, str) else value


class FetchSettings(Settings):
    """The `[fetch]` table of a pipeline's TOML file: `omni fetch` with the same words."""

    source: str = "synthetic"
    chunks: Annotated[str | None, BeforeValidator(_chunks_text)] = None
    clips: Annotated[tuple[str, ...], BeforeValidator(_clips)] = ()
    cameras: str | None = None
    origin: str | None = Field(None, alias="from")
    max_gb: float = 150.0
    workers: int = Field(12, ge=1)
    revision: str | None = None
    seed: int = Field(0, ge=0)
    clips_per_chunk: int = Field(4, ge=1)
    seconds: float = 20.0
    fps: int = Field(30, ge=1)
    size: str = "320x180"
    rig: str = "mixed"
    clutter: float = 1.0
    roads: str = "gentle"


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
        UsageError: the run's name leads elsewhere.
        DataError: the audit refused data; it names the folder to look at.
    """
    if request.run is not None:
        locate.named_folder(request.runs, request.run)  # a bad name is said now, not after an hour of etl
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
    """Return what `omni fetch` would be asked for.

    Raises:
        UsageError: both chunks and clips are asked for, a camera is unknown, or the size is none.
    """
    if settings.chunks and settings.clips:
        raise UsageError("[fetch] holds both chunks and clips; keep one of them")
    world = SyntheticSpec(
        settings.seed, settings.clips_per_chunk, settings.seconds, settings.fps, *parse_size(settings.size),
        rig=settings.rig, clutter=settings.clutter, roads=settings.roads,
    )  # fmt: skip
    return FetchRequest(
        source=settings.source,
        data=data,
        chunks=settings.chunks or (_SYNTHETIC_CHUNKS if settings.source == "synthetic" else None),
        clips=settings.clips,
        cameras=camera_names(settings.cameras, settings.source) if settings.cameras else (),
        origin=Path(settings.origin) if settings.origin else None,
        max_gb=settings.max_gb,
        workers=settings.workers,
        revision=settings.revision,
        synthetic=world,
    )
