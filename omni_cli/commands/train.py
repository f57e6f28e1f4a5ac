"""`omni train`."""

from typing import Annotated

import typer

from omni_cli.commands._options import (
    DATA,
    RUNS,
    ConfigFile,
    Data,
    DryRun,
    Json,
    ProfileName,
    Quiet,
    Runs,
    Sets,
    Shards,
    names_in,
)

EXAMPLE = "omni train --profile cpu-tiny"


def command(
    *,
    profile: ProfileName = None,
    shards: Shards = None,
    config: ConfigFile = None,
    sets: Sets = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="Name of the run, a folder in --runs. [default: RECIPE-PROFILE]"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what the run of this name has learned.")] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to",
            metavar="NAME,...",
            help="Send the curves there too: tensorboard, wandb, comet_ml, trackio. May be given again.",
        ),
    ] = None,
    data: Data = DATA,
    runs: Runs = RUNS,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on shards; killed and run again, it continues bit for bit.

    Exits with 75 when SIGTERM stopped it: it has saved itself, run the same command again. The running step has 10 s
    to end; then, between two of its micro-batches, it is dropped, and what was learned before it is saved.

    On N GPUs it is started by torchrun --nproc-per-node N -m -- omni_cli train; a step learns from as many windows as
    on one, and is never dropped. torchrun itself exits with 1 whatever omni did: the code is in the last line of
    --json. It kills what has not ended 30 s after SIGTERM: what it had not saved by then is learned again.
    """
    from omni_cli.commands._compose import choose_profile, compose_recipe, recipe_of_shards, typed_keys
    from omni_cli.report import console_of_rank
    from omni_cli.stages.train import TrainRequest, train

    console = console_of_rank(quiet=quiet, json_output=json)
    chosen = choose_profile(profile, console, dry_run=dry_run)
    kind = recipe_of_shards(shards, data)
    recipe = compose_recipe(kind, chosen, config=config, sets=sets, is_to_measure=dry_run)
    asked = typed_keys(recipe, chosen)
    where, names = (shards, data, runs, run, chosen.name), names_in(report_to)
    machine = chosen.machine
    request = TrainRequest(*where, fresh=fresh, dry_run=dry_run, asked=asked, machine=machine, report_to=names)
    console.finish(train(recipe.value, request, console))
