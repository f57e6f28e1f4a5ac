"""`omni run`."""

from typing import Annotated

import typer

from omni_cli.commands._options import DATA, RUNS, ConfigFile, Data, Json, ProfileName, Quiet, Runs, Sets

EXAMPLE = "omni run --profile cpu-tiny"


def command(
    *,
    profile: ProfileName = None,
    config: ConfigFile = None,
    sets: Sets = None,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="What will be learned.")] = "vlm",
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Name of the run. [default: RECIPE-PROFILE]")
    ] = None,
    data: Data = DATA,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch, audit, etl, train and eval in one command.

    A [fetch] table in the --config file says what to fetch, in the words of `omni fetch`; without one it is two chunks
    of the synthetic world. Killed and run again, it goes on where it was.
    """
    from omni_cli.commands._compose import choose_profile, compose_recipe, table_of
    from omni_cli.report import Console
    from omni_cli.stages.pipeline import FetchSettings, PipelineRequest, pipeline
    from omni_cli.telemetry import usable_cores

    console = Console(quiet=quiet, json_output=json)
    chosen = choose_profile(profile, console, dry_run=False)
    settings = compose_recipe(recipe, chosen, config=config, sets=sets).value
    to_fetch = table_of(config, "fetch", FetchSettings)
    request = PipelineRequest(to_fetch, data, runs, run, chosen.name, workers=usable_cores())
    console.finish(pipeline(settings, request, console))
