"""`omni merge`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, Json, Quiet, RunArgument, Runs

EXAMPLE = "omni merge adapter"


def command(
    *,
    run: RunArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the merged model. [default: RUN/merged]")
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold a run's adapter into its base, once the logits are proven to be the same.

    The base is loaded anew in full precision, never in 4 bit. Nothing is published where the logits differ. They are
    compared in float32, one model at a time: without a GPU that has the room, this takes about 3.4 times the bytes of
    a 16-bit base's files in memory.
    """
    from omni_cli.commands._compose import open_run
    from omni_cli.report import Console
    from omni_cli.stages.merge import MergeRequest, merge

    console = Console(quiet=quiet, json_output=json)
    recipe, opened = open_run(run, runs, console)
    console.finish(merge(recipe, opened, MergeRequest(out), console))
