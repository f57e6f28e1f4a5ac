"""`omni etl`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_cli.commands._options import (
    DATA,
    Cameras,
    ConfigFile,
    Data,
    DryRun,
    Json,
    ProfileName,
    Quiet,
    Sets,
    parse_share,
    parse_split,
)

EXAMPLE = "omni etl --profile cpu-tiny"

EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Where: this machine, or a Ray cluster (RAY_ADDRESS names it)."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; 0 uses this one. [default: one a core]")]
WorkerGb = Annotated[
    float | None,
    typer.Option(min=1.0, max=2.0**20, help="GiB of memory each may use. [default: a share of its machine]"),
]
RetryCrashed = Annotated[
    bool, typer.Option("--retry-crashed", help="Try those again that crashed or hung at every attempt.")
]


def command(
    *,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="What will be learned.")] = "vlm",
    profile: ProfileName = None,
    config: ConfigFile = None,
    sets: Sets = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which raw data. [default: the newest under --data]")
    ] = None,
    cameras: Cameras = None,
    window: Annotated[int | None, typer.Option(help="Frames in a window.")] = None,
    stride: Annotated[int | None, typer.Option(help="Frames between the starts of two windows.")] = None,
    rate_hz: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    canvas: Annotated[int | None, typer.Option(metavar="PX", help="Width of the tiled canvas.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What answers tell: ego-motion, speed, waypoints, or reasoning with them."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="motion|log|FILES", help="Who says where to drive (distill); FILES: A.onnx,B.onnx."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="hash|time|FILE", help="How windows to train on and to measure on are parted.")
    ] = None,
    engine: EngineName = "local",
    workers: Workers = None,
    worker_gb: WorkerGb = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do share I of N of the work, for jobs side by side.")
    ] = None,
    retry_crashed: RetryCrashed = False,
    data: Data = DATA,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="[default: a folder of --data/shards]")] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn recordings into shards of windows with true timestamps.

    Killed and run again, it finishes what is missing, with the same bytes. Exits with 75 when SIGTERM stopped it.
    """
    from omni_cli.commands._compose import choose_profile, compose_recipe
    from omni_cli.report import Console
    from omni_cli.stages.etl import EtlRequest, etl

    console = Console(quiet=quiet, json_output=json)
    rule, split_file = parse_split(split)
    flags = {"--cameras": cameras, "--window": window, "--stride": stride, "--rate-hz": rate_hz, "--canvas": canvas}
    flags |= {"--labels": labels, "--teacher": teacher, "--split": rule}
    chosen = choose_profile(profile, console, dry_run=dry_run)
    settings = compose_recipe(recipe, chosen, config=config, sets=sets, flags=flags).value
    request = EtlRequest(
        data, source, out, workers=workers, worker_gb=worker_gb, engine=engine, shard=parse_share(shard),
        split_file=split_file, dry_run=dry_run, profile=chosen.name, retry_crashed=retry_crashed,
    )  # fmt: skip
    console.finish(etl(settings, request, console))
