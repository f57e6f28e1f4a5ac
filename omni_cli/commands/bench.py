"""`omni bench`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import DATA, RUNS, ConfigFile, Data, Json, ProfileName, Quiet, Runs, Sets

EXAMPLE = "omni bench train --profile cpu-tiny"


def command(
    *,
    part: Annotated[
        str | None, typer.Argument(metavar="[PART]", help="etl, loader, train, infer or export. [default: all]")
    ] = None,
    profile: ProfileName = None,
    config: ConfigFile = None,
    sets: Sets = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="What would be learned. [default: as the newest run]")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="NAME", help="Measure with the settings of this run, and its export.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each piece of work is timed.")] = 5,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="FILES",
            help="Time these ONNX files, A.onnx,B.onnx, beside the export. [default: those of the settings]",
        ),
    ] = None,
    data: Data = DATA,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast each stage is on this machine.

    On the newest data, shards and run that fit the profile; where there are none, on a small synthetic drive. Timings
    are synchronised, warmed up and repeated; what is compared runs in turn in one process. `etl` stands beside a bare
    decoder and the prototypes' way, and where the data are easier to decode than 1080p at 10 Mb/s, on a texture too.
    `train` takes its steps in turn with stock TRL, on the same rows from the same weights.
    `export` is latency: the run in torch, its ONNX programs on every provider that ONNX Runtime has here, and its
    teacher's; by batch size, host to host and device only.
    """
    from omni_cli.commands._subject import bench_subject
    from omni_cli.config import comma_list
    from omni_cli.report import Console
    from omni_cli.stages.bench import FULL_HD, BenchRequest, bench

    console = Console(quiet=quiet, json_output=json)
    files = tuple(Path(name).expanduser() for name in comma_list(teacher or ""))
    asked = {"--profile": profile, "--recipe": recipe, "--config": config, "--set": sets}
    settings, name, opened = bench_subject(run, runs, asked, console)
    console.finish(bench(settings, BenchRequest(part, data, runs, name, repeats, files, opened, FULL_HD), console))
