"""`omni eval`."""

from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, Json, Quiet, RunArgument, Runs, Shards

EXAMPLE = "omni eval --split val"


def command(
    *,
    run: RunArgument = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="[default: val of the run's own shards, all of others]")
    ] = None,
    shards: Shards = None,
    blind: Annotated[bool, typer.Option(help="Train a twin that sees nothing, as a control.")] = True,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run on recordings it never saw, beside controls.

    Every number stands beside baselines that need no picture, and beside the same model shown the wrong pictures.
    """
    from omni_cli.commands._compose import open_run
    from omni_cli.report import Console
    from omni_cli.stages.evaluate import EvalRequest, evaluate

    console = Console(quiet=quiet, json_output=json)
    recipe, opened = open_run(run, runs, console)
    console.finish(evaluate(recipe, opened, EvalRequest(shards=shards, split=split, blind=blind), console))
