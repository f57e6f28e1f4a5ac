"""`omni eval`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, Json, ProfileName, Quiet, Runs

EXAMPLE = "omni eval --split val"

Controls = Annotated[
    str,
    typer.Option(
        metavar="all|basic|none",
        help="Show other pictures, the first frame alone (basic), and shuffled cameras and frames (all). Each asks "
        "about every window once more.",
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="K",
        help="Also draw K answers of each window and score the best: minADE_K. Each asks about every window again.",
    ),
]


def command(
    *,
    measured: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs, model folders, or ids on the hub; of several, one table. [default: the newest finished run]",
        ),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option("--revision", metavar="REV", help="Of the model on the hub; several are compared."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="[default: val of the run's own shards, all of others]")
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option("--shards", metavar="DIR", help="Windows to measure on. [default: those of what it learned from]"),
    ] = None,
    blind: Annotated[bool, typer.Option(help="Train a twin that sees nothing, as a control.")] = True,
    controls: Controls = "all",
    samples: Samples = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="At which they are drawn.")] = 1.0,
    constrained: Annotated[
        bool, typer.Option("--constrained", help="Hold answers to their format, and count what was forced.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Windows at once. [default: 32, or fewer of more than 65,536 tokens]"),
    ] = None,
    strata: Annotated[bool, typer.Option("--strata", help="Show each manoeuvre and speed here too.")] = False,
    profile: ProfileName = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of comparisons, and of what is measured of models.")
    ] = Path("eval"),
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure runs and models on recordings they never saw, beside controls.

    Every number stands beside baselines that need no picture, and beside the same model shown the wrong pictures. Of
    several models each pair is compared at the same windows. Those that learned from different shards need --shards,
    and so does a model of which nothing says what it learned from.
    """
    from omni_cli.commands._candidates import open_candidates
    from omni_cli.commands._options import parse_controls
    from omni_cli.report import Console
    from omni_cli.stages.evaluate import EvalRequest, compare, measure

    console = Console(quiet=quiet, json_output=json)
    request = EvalRequest(
        shards, split, blind, parse_controls(controls), samples, temperature, batch, strata, constrained
    )
    found = open_candidates(measured or (), revision or (), runs, console, shards=shards, profile=profile, out=out)
    console.finish(measure(found[0], request, console) if len(found) == 1 else compare(found, request, out, console))
