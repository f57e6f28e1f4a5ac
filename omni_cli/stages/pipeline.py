"""`omni run`: fetch what is missing, audit all of it, make shards, train and measure, in one command.

Every step finishes only what its receipts do not say is done, so that the whole can be killed and run again.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from omni_cli.config import Settings
from omni_cli.errors import DataError, UsageError
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, camera_names, fetch
from omni_cli.stages.train import TrainRequest, train

_SYNTHETIC_CHUNKS = "2"  # where nothing is asked for


def _chunks_text(value: Any) -> Any:
    return str(value) if type(value) is int else value  # `chunks = 2`, but never `true`


def _comma_list(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class FetchSettings(Settings):
    """The `[fetch]` table of a pipeline's TOML file: `omni fetch` with the same words."""

    source: str = "synthetic"
    chunks: Annotated[str | None, BeforeValidator(_chunks_text)] = None
    clips: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = ()
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

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str) -> str:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            raise ValueError('expected "WIDTHxHEIGHT" in pixels, such as "320x180"')
        return size


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
    """Return what `omni fetch` would be asked for.

    Raises:
        UsageError: both chunks and clips are asked for, or a camera is unknown.
    """
    if settings.chunks and settings.clips:
        raise UsageError("[fetch] holds both chunks and clips; keep one of them")
    width_px, height_px = map(int, settings.size.split("x"))
    world = SyntheticSpec(
        settings.seed, settings.clips_per_chunk, settings.seconds, settings.fps, width_px, height_px,
        rig=settings.rig, clutter=settings.clutter,
    )  # fmt: skip
    return FetchRequest(
        source=settings.source,
        data=data,
        chunks=settings.chunks or (_SYNTHETIC_CHUNKS if settings.source == "synthetic" else None),
        clips=settings.clips,
        cameras=camera_names(settings.cameras) if settings.cameras else (),
        origin=Path(settings.origin) if settings.origin else None,
        max_gb=settings.max_gb,
        workers=settings.workers,
        revision=settings.revision,
        synthetic=world,
    )
