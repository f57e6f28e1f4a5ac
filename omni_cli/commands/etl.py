"""`omni etl`."""

from pathlib import Path
from typing import Annotated

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
        str | None, typer.Option(metavar="NAME", help="What the answers tell: ego-motion or speed.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="motion|log|FILES", help="Who says where to drive (distill); FILES: A.onnx,B.onnx."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="hash|time|FILE", help="How windows to train on and to measure on are parted.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; 0 uses this one. [default: one a core]")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do share I of N of the work, for jobs side by side.")
    ] = None,
    data: Data = DATA,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="[default: a folder of --data/shards]")] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn recordings into shards of windows with true timestamps.

    Killed and run again, it finishes what is missing, with the same bytes.
    """
    from omni_cli.commands._compose import choose_profile, compose_recipe
    from omni_cli.report import Console
    from omni_cli.stages.etl import EtlRequest, etl
    from omni_cli.telemetry import usable_cores

    console = Console(quiet=quiet, json_output=json)
    rule, split_file = parse_split(split)
    flags = {"--cameras": cameras, "--window": window, "--stride": stride, "--rate-hz": rate_hz, "--canvas": canvas}
    flags |= {"--labels": labels, "--teacher": teacher, "--split": rule}
    chosen = choose_profile(profile, console, dry_run=dry_run)
    settings = compose_recipe(recipe, chosen, config=config, sets=sets, flags=flags).value
    request = EtlRequest(
        data, source, out, workers=usable_cores() if workers is None else workers, shard=parse_share(shard),
        split_file=split_file, dry_run=dry_run, profile=chosen.name,
    )  # fmt: skip
    console.finish(etl(settings, request, console))
