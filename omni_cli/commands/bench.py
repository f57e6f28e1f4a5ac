"""`omni bench`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import DATA, RUNS, ConfigFile, Data, Json, ProfileName, Quiet, Runs, Sets, typed_options

EXAMPLE = "omni bench train --profile cpu-tiny"


def command(
    context: typer.Context,
    *,
    part: Annotated[
        str | None,
        typer.Argument(metavar="[PART]", help="etl, loader, train, infer or export, all by default; or gpu."),
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
    alone: Annotated[bool, typer.Option("--alone", help="Measure train without stock TRL beside it.")] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="gpu: where its rows go.")] = Path("bench-gpu.json"),
    minutes: Annotated[float, typer.Option(min=0, help="gpu: how long it takes at most.")] = 9.0,
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
    `gpu` measures whole trainings of 7 and 8 billion random weights, each in a process of its own, and prints a table;
    it needs no data, no weights and no network.
    """
    from omni_cli.commands._subject import bench_subject, check_bench_options, rows_request
    from omni_cli.config import comma_list
    from omni_cli.report import Console
    from omni_cli.stages.bench import FULL_HD, BenchRequest, bench, bench_gpu

    console = Console(quiet=quiet, json_output=json)
    check_bench_options(part, typed_options(context))
    if part == "gpu":
        return console.finish(bench_gpu(rows_request(profile, sets, out, minutes, console), console))
    asked = {"--profile": profile, "--recipe": recipe, "--config": config, "--set": sets}
    files = tuple(Path(name).expanduser() for name in comma_list(teacher or ""))
    settings, name, opened = bench_subject(run, runs, asked, console)
    where = (part, data, runs, name, repeats, files, opened, FULL_HD)
    return console.finish(bench(settings, BenchRequest(*where, is_beside_stock=not alone), console))
